"""Checkpoints: `checkpoints/step_N/`, where N updates have been applied.

Written under a temporary name by torch's distributed checkpoint (one file per rank and its metadata), then `checksums.json`, which
lists every file, and renamed: what is called `step_N` was complete once. They can be loaded on any number of ranks. The metadata is
a pickle: what is not the user's own is not read.

The loop waits for a copy of this rank's shards in the CPU's memory; a thread with a group of its own does the rest behind it.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pydantic import BaseModel, ValidationError
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from equissl.distributed import World, local
from equissl.files import FULL, disk_full, sync, write_json

log = logging.getLogger(__name__)

FORMAT = 1  # of what is written here, the folder and the names of its tensors
MARKER = "checksums.json"
NAME = re.compile(r"step_(\d+)")
TEMPORARY = ".writing"
METADATA = ".metadata"
WATCHES = "monitor."
T = TypeVar("T")


class Described(BaseModel):
    bytes: int
    sha256: str


class Format(BaseModel):
    format: int = 1


class Marker(Format):
    """The content of `checksums.json`."""

    step: int
    world_size: int
    torch: str
    milestone: bool = False  # never pruned
    files: dict[str, Described]


class Checkpoints:
    """The checkpoints of one run. All methods are collective, but for `is_milestone`, `has_failed` and `waiting`: every rank calls them."""

    def __init__(self, folder: Path, keep: int, world: World, milestone_every: int | None = None) -> None:
        self.folder, self.keep, self.world, self.milestone_every = folder, keep, world, milestone_every
        self.waited_s = 0.0  # that saves, and what belongs to them (`waiting`), have kept the caller, all together
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup)
        self._group = group  # the thread's: two threads never share one
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._under_way: Future[None] | None = None
        self._copies: dict[str, Tensor] = {}

    def newest(self) -> int:
        """The step of the newest undamaged checkpoint, 0 where none was ever complete; see `find_newest`."""
        self.wait()
        return self._together(lambda: find_newest(self.folder) if self.world.rank == 0 else 0)[0]

    def load(self, step: int, state: dict[str, Tensor]) -> None:
        """Read the checkpoint of `step` into the tensors of `state`. Raises ValueError where it holds other tensors.

        Those that only watch (`monitor.…`) may be others: earlier versions had none. They stay as they are.
        """
        path = _path(self.folder, step)
        saved = _metadata(path).state_dict_metadata.keys()
        different = sorted(name for name in saved ^ state.keys() if not name.startswith(WATCHES))
        if different:
            raise ValueError(f"{path} holds other tensors than this run has, for example {', '.join(different[:3])}")
        known = {name: tensor for name, tensor in state.items() if name in saved}
        dcp.load(known, storage_reader=dcp.FileSystemReader(path), process_group=self.world.cpu_group)

    def is_milestone(self, step: int) -> bool:
        return self.milestone_every is not None and step % self.milestone_every == 0

    def save(self, step: int, state: dict[str, Tensor], behind: bool = False) -> None:
        """Write `state` as the checkpoint of `step`, then remove the oldest beyond `keep`, but no milestone.

        `behind`: return when there is a copy of it; the next `save` or `wait` waits for the rest, and raises what went wrong.
        Where one rank cannot write all of them raise, and nothing is left of the attempt. Raises DiskFull.
        """
        self.wait()
        with self.waiting():
            self._copy(state)
            self._under_way = self._thread.submit(self._write, step, state)
        if not behind:
            self.wait()

    def wait(self) -> None:
        """Until the save under way is complete. Raises what went wrong with it, on all ranks."""
        if self._under_way is None:
            return
        under_way, self._under_way = self._under_way, None
        with self.waiting():
            under_way.result()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """What is done inside counts as `waited_s`."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.waited_s += time.monotonic() - began

    def has_failed(self) -> bool:
        """Whether the save under way has ended with an error: there is no need to go on to the next one."""
        return self._under_way is not None and self._under_way.done() and self._under_way.exception() is not None

    def close(self) -> None:
        """What is being written is finished. Without a `wait` before there is an error on its way: another one is only logged."""
        try:
            self.wait()
        except Exception as error:
            log.error("a checkpoint could not be written: %s", error)
        self._thread.shutdown()

    def _copy(self, state: dict[str, Tensor]) -> None:
        """This rank's shards, in memory that is used again for each save; on GPUs page-locked."""
        for name, tensor in state.items():
            shard = local(tensor)
            copy = self._copies.get(name)
            if copy is None or (copy.shape, copy.dtype) != (shard.shape, shard.dtype):
                copy = self._copies[name] = torch.empty_like(shard, device="cpu", pin_memory=shard.is_cuda)
            copy.copy_(shard, non_blocking=True)
        if self.world.device.type == "cuda":
            torch.cuda.current_stream().synchronize()

    def _write(self, step: int, state: dict[str, Tensor]) -> None:
        """In the thread. Of `state` only names, shapes and placements are read: the values are changing."""
        if self.world.device.type == "cuda":
            torch.cuda.set_device(self.world.device)  # a thread begins with the first one, and what torch asks would live there
        temporary = self.folder / f"{TEMPORARY}_{step}"
        writer = dcp.FileSystemWriter(temporary, single_file_per_rank=True, sync_files=True)
        writer.fs = _FileSystem()
        try:
            self._on_first(lambda: self._begin(temporary))
            dcp.save(state, storage_writer=writer, planner=_Planner(self._copies), process_group=self._group)
            described = self._together(lambda: self._describe_mine(temporary))
            self._on_first(lambda: self._complete(step, temporary, {name: file for files in described for name, file in files.items()}))
        except (Exception, dcp.CheckpointException) as failure:
            self._give_up(step, temporary, state, failure)

    def _together(self, work: Callable[[], T]) -> list[T]:
        """What `work` returned on each rank; what it raised on one is raised on all, so that none waits for it."""
        answers: list[Any] = [None] * self.world.world_size
        try:
            answer: Any = work()
        except Exception as error:
            answer = error
        dist.all_gather_object(answers, answer, group=self._group)
        for each in answers:
            if isinstance(each, Exception):
                raise each
        return answers

    def _on_first(self, work: Callable[[], None]) -> None:
        self._together(lambda: work() if self.world.rank == 0 else None)

    def _begin(self, temporary: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for left_over in self.folder.glob(f"{TEMPORARY}_*"):
            shutil.rmtree(left_over, ignore_errors=left_over != temporary)
        temporary.mkdir()

    def _describe_mine(self, temporary: Path) -> dict[str, Described]:
        mine = [*temporary.glob(f"__{self.world.rank}_*"), *([temporary / METADATA] if self.world.rank == 0 else ())]
        return {file.name: _describe(file) for file in mine}

    def _complete(self, step: int, temporary: Path, files: dict[str, Described]) -> None:
        path = _path(self.folder, step)
        marker = Marker(
            format=FORMAT,
            step=step,
            world_size=self.world.world_size,
            torch=torch.__version__,
            milestone=self.is_milestone(step),
            files=files,
        )
        write_json(temporary / MARKER, marker.model_dump())  # makes the other files' names durable too
        if path.exists():  # one that could not be used
            shutil.rmtree(path)
        temporary.rename(path)
        sync(self.folder)
        try:
            self._prune(step)
        except OSError as error:  # the new one is whole all the same; the next save tries again
            log.warning("an old checkpoint in %s could not be removed: %s", self.folder, error)

    def _give_up(self, step: int, temporary: Path, state: dict[str, Tensor], failure: BaseException) -> NoReturn:
        """After a failure that all ranks have seen: remove what was written, and raise one rank's reason on all."""
        causes = [cause for cause, _ in failure.failures.values()] if isinstance(failure, dcp.CheckpointException) else [failure]
        full = next((cause for cause in causes if isinstance(cause, OSError) and cause.errno in FULL), None)

        def give_up() -> None:
            shutil.rmtree(temporary, ignore_errors=True)
            if full and full.errno is not None:
                num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
                raise disk_full(full.errno, _path(self.folder, step), f"the checkpoint of step {step}", num_bytes) from failure

        self._on_first(give_up)
        raise causes[0] from failure

    def _prune(self, step: int) -> None:
        """Those after `step` were found damaged when the run began; they are left until they are written anew."""
        for old in [other for other in _steps(self.folder) if other <= step][self.keep :]:
            path = _path(self.folder, old)
            if not _is_milestone(path):
                going = self.folder / f"{TEMPORARY}_{old}"  # half removed must not look complete
                path.rename(going)
                shutil.rmtree(going)


# --- reading -------------------------------------------------------------------------------------------------------------


def find_newest(folder: Path) -> int:
    """The step of the newest undamaged checkpoint in `folder`, 0 where none was ever complete; damaged ones are logged.

    Raises ValueError where all are damaged (to begin anew is for people to decide), for those of another user and for those of a
    later version.
    """
    if not folder.is_dir():
        return 0
    _refuse_others(folder)
    damages = {}
    for step in _steps(folder):
        damages[step] = _damage(folder, step)
        if damages[step] is None:
            return step
        log.warning("%s cannot be used: %s; trying the one before", _path(folder, step), damages[step])
    if damages:
        said = "; ".join(f"step_{step}: {damage}" for step, damage in damages.items())
        raise ValueError(
            f"no checkpoint in {folder} can be used: {said}. The run does not begin again from step 0 by itself: "
            "bring one of them back from a copy, or delete that folder to start anew"
        )
    return 0


def read_whole(path: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """The whole tensors of a checkpoint that `find_newest` has found, those with a wanted name; needs no process group."""
    saved = _metadata(path).state_dict_metadata
    state = {
        name: torch.empty(about.size, dtype=about.properties.dtype)
        for name, about in saved.items()
        if isinstance(about, TensorStorageMetadata) and wanted(name)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as is meant
        dcp.load(state, storage_reader=dcp.FileSystemReader(path), no_dist=True)
    return state


def _path(folder: Path, step: int) -> Path:
    return folder / f"step_{step}"


def _steps(folder: Path) -> list[int]:
    """Newest first."""
    found = (NAME.fullmatch(path.name) for path in folder.glob("step_*"))
    return sorted((int(match[1]) for match in found if match), reverse=True)


def read_marker(path: Path) -> Marker:
    content = (path / MARKER).read_bytes()
    if (found := Format.model_validate_json(content).format) != FORMAT:
        raise ValueError(
            f"{path} has the format {found}, this version of equissl reads {FORMAT} only: go on with the version that wrote it. "
            "Nothing was changed; what a complete run exported (*.safetensors) is read by every version"
        )
    return Marker.model_validate_json(content)


def _is_milestone(path: Path) -> bool:
    try:
        return read_marker(path).milestone
    except (OSError, ValueError):  # damaged
        return False


def _metadata(path: Path) -> Metadata:
    """Raises ValueError where another torch wrote it in a way that this one cannot read."""
    try:
        return dcp.FileSystemReader(path).read_metadata()
    except OSError:
        raise
    except Exception as error:  # it is a pickle of torch's own classes: what it raises depends on the version
        written_by = read_marker(path).torch
        raise ValueError(
            f"{path} was written by torch {written_by}, and torch {torch.__version__} cannot read it ({type(error).__name__}: {error}): "
            f"go on with torch {written_by}. What a complete run exported (*.safetensors) is read by every torch"
        ) from error


def _damage(folder: Path, step: int) -> str | None:
    path = _path(folder, step)
    try:
        for each in (path, *path.iterdir()):
            _refuse_others(each)
        marker = read_marker(path)
        if marker.step != step or METADATA not in marker.files:
            return f"{MARKER} is not that of step {step}"
        for name, expected in marker.files.items():
            if not (path / name).is_file():
                return f"{name} is missing"
            if (path / name).stat().st_size != expected.bytes or _describe(path / name) != expected:
                return f"{name} is not what {MARKER} says"
    except ValidationError as error:
        return f"{MARKER} cannot be read: {error.errors()[0]['msg']}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return str(error)
    return None


# --- with torch's writer ---------------------------------------------------------------------------------------------------


class _Planner(dcp.DefaultSavePlanner):
    """Plans with the tensors of the state, and writes their copies."""

    def __init__(self, copies: dict[str, Tensor]) -> None:
        super().__init__()
        self._copies = copies

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._copies[index.fqn]


class _FileSystem(FileSystem):
    """Tells why a write failed: torch's serialization, in C++, raises an error of its own in its place."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        raw = _RawFile(path, mode)
        try:
            with io.BufferedWriter(raw) as stream:
                yield stream
        except Exception as error:
            raise raw.error or error from error


class _RawFile(io.FileIO):
    error: OSError | None = None

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            raise


def _describe(path: Path) -> Described:
    with path.open("rb") as file:
        return Described(bytes=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())


def _refuse_others(path: Path) -> None:
    owner = path.stat().st_uid
    if owner != os.getuid():
        raise ValueError(
            f"{path} belongs to user {owner}, not to you ({os.getuid()}); checkpoints hold a pickle, so only your own are read"
        )
