"""Checkpoints: `checkpoints/step_N/`, where N updates have been applied.

Written under a temporary name by torch's distributed checkpoint (one file per rank and its metadata), then `checksums.json`, which
lists every file, and renamed: what is called `step_N` was complete once. They can be loaded on any number of ranks. The metadata is
a pickle: what is not the user's own is not read.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pydantic import BaseModel, ValidationError
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem

from equissl.distributed import World
from equissl.files import FULL, disk_full, sync_folder, write_json

log = logging.getLogger(__name__)

MARKER = "checksums.json"
NAME = re.compile(r"step_(\d+)")
TEMPORARY = ".writing"
METADATA = ".metadata"
T = TypeVar("T")


class Described(BaseModel):
    bytes: int
    sha256: str


class Marker(BaseModel):
    """The content of `checksums.json`."""

    step: int
    world_size: int
    torch: str
    files: dict[str, Described]


class Checkpoints:
    """The checkpoints of one run. All methods are collective: every rank calls them."""

    def __init__(self, folder: Path, keep: int, world: World) -> None:
        self.folder, self.keep, self.world = folder, keep, world

    def newest(self) -> int:
        """The step of the newest undamaged checkpoint, 0 where none was ever complete; damaged ones are logged.

        Raises ValueError where all are damaged (to begin anew is for people to decide) and for those of another user.
        """
        return self._together(lambda: self._newest() if self.world.rank == 0 else 0)[0]

    def load(self, step: int, state: dict[str, Tensor]) -> None:
        """Read the checkpoint of `step` into the tensors of `state`. Raises ValueError where it holds other tensors."""
        reader = dcp.FileSystemReader(self._path(step))
        try:
            saved = reader.read_metadata().state_dict_metadata.keys()
        except Exception as error:  # torch's pickle: what it raises depends on the version
            written_by = Marker.model_validate_json((self._path(step) / MARKER).read_bytes()).torch
            error.add_note(f"{self._path(step)} was written by torch {written_by}, this is {torch.__version__}")
            raise
        if saved != state.keys():
            different = sorted(saved ^ state.keys())
            raise ValueError(f"{self._path(step)} holds other tensors than this run has, for example {', '.join(different[:3])}")
        dcp.load(state, storage_reader=reader, process_group=self.world.cpu_group)

    def save(self, step: int, state: dict[str, Tensor]) -> None:
        """Write `state` as the checkpoint of `step`, then remove the oldest beyond `keep`.

        Where one rank cannot write all of them raise, and nothing is left of the attempt. Raises DiskFull.
        """
        temporary = self.folder / f"{TEMPORARY}_{step}"
        writer = dcp.FileSystemWriter(temporary, single_file_per_rank=True, sync_files=True)
        writer.fs = _FileSystem()
        try:
            self._on_first(lambda: self._begin(temporary))
            dcp.save(state, storage_writer=writer, process_group=self.world.cpu_group)
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
        dist.all_gather_object(answers, answer, group=self.world.cpu_group)
        for each in answers:
            if isinstance(each, Exception):
                raise each
        return answers

    def _on_first(self, work: Callable[[], None]) -> None:
        self._together(lambda: work() if self.world.rank == 0 else None)

    def _begin(self, temporary: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for left_over in self.folder.glob(f"{TEMPORARY}_*"):
            shutil.rmtree(left_over)
        temporary.mkdir()

    def _describe_mine(self, temporary: Path) -> dict[str, Described]:
        mine = [*temporary.glob(f"__{self.world.rank}_*"), *([temporary / METADATA] if self.world.rank == 0 else ())]
        return {file.name: _describe(file) for file in mine}

    def _complete(self, step: int, temporary: Path, files: dict[str, Described]) -> None:
        path = self._path(step)
        marker = Marker(step=step, world_size=self.world.world_size, torch=torch.__version__, files=files)
        write_json(temporary / MARKER, marker.model_dump())  # makes the other files' names durable too
        if path.exists():  # one that could not be used
            shutil.rmtree(path)
        temporary.rename(path)
        sync_folder(self.folder)
        self._prune(step)

    def _give_up(self, step: int, temporary: Path, state: dict[str, Tensor], failure: BaseException) -> NoReturn:
        """After a failure that all ranks have seen: remove what was written, and raise one rank's reason on all."""
        causes = [cause for cause, _ in failure.failures.values()] if isinstance(failure, dcp.CheckpointException) else [failure]
        full = next((cause for cause in causes if isinstance(cause, OSError) and cause.errno in FULL), None)

        def give_up() -> None:
            shutil.rmtree(temporary, ignore_errors=True)
            if full and full.errno is not None:
                num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
                raise disk_full(full.errno, self._path(step), f"the checkpoint of step {step}", num_bytes) from failure

        self._on_first(give_up)
        raise causes[0] from failure

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step}"

    def _steps(self) -> list[int]:
        """Newest first."""
        found = (NAME.fullmatch(path.name) for path in self.folder.glob("step_*"))
        return sorted((int(match[1]) for match in found if match), reverse=True)

    def _newest(self) -> int:
        if not self.folder.is_dir():
            return 0
        _refuse_others(self.folder)
        damages = {}
        for step in self._steps():
            damages[step] = self._damage(step)
            if damages[step] is None:
                return step
            log.warning("%s cannot be used: %s; trying the one before", self._path(step), damages[step])
        if damages:
            said = "; ".join(f"step_{step}: {damage}" for step, damage in damages.items())
            raise ValueError(
                f"no checkpoint in {self.folder} can be used: {said}. The run does not begin again from step 0 by itself: "
                "bring one of them back from a copy, or delete that folder to start anew"
            )
        return 0

    def _damage(self, step: int) -> str | None:
        path = self._path(step)
        try:
            for each in (path, *path.iterdir()):
                _refuse_others(each)
            marker = Marker.model_validate_json((path / MARKER).read_bytes())
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

    def _prune(self, step: int) -> None:
        """Those after `step` were found damaged when the run began; they are left until they are written anew."""
        for old in [other for other in self._steps() if other <= step][self.keep :]:
            going = self.folder / f"{TEMPORARY}_{old}"  # half removed must not look complete
            self._path(old).rename(going)
            shutil.rmtree(going)


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
