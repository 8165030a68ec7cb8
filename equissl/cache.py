"""Frozen features on the disk, for all evaluations of the same weights.

    ROOT/ENTRY/key.json                   what the features are of; ENTRY is the beginning of its sha256
    ROOT/ENTRY/00000.SHA.safetensors      the first ROWS images, SHA the beginning of the file's sha256; then the next ones, …

Each file appears whole or not at all, and one that is not what its name says is extracted anew: an evaluation that was stopped among
the images goes on from the last file. Rows do not depend on the number of ranks. One process writes an entry, on its node by `flock`;
its neighbours wait with their heartbeat alive. Across nodes that do not see each other's locks both write the same.

The whole folder may be deleted at any time. Beyond `cache_gb` the entries that were not used for the longest time are removed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load, save
from torch import Tensor

from equissl.export import MODEL
from equissl.files import write_atomic, write_json

if TYPE_CHECKING:
    from equissl.config import EvaluateConfig
    from equissl.data.shards import Images
    from equissl.evals import Context
    from equissl.features import Compute, Geometry

log = logging.getLogger(__name__)

VERSION = 1  # raised when the same key would give other features
ROWS = 65536  # images of a file
WAIT_SECONDS = 1.0  # between two looks at whether the neighbour has finished
NAME = ".features"
LOCK = ".lock"
OFF = "none"
DTYPES = {"float32": torch.float32, "float16": torch.float16}


def root(settings: EvaluateConfig, run_dir: Path | None) -> Path | None:
    """Where the features are. Where nothing is said: beside the pretraining's run folder; beside the evaluation's own, `run_dir`, where
    the weights are from elsewhere. None where there shall be no cache, or nothing is beside it."""
    if settings.cache is not None:
        return None if settings.cache == OFF else Path(settings.cache).expanduser()
    checkpoint = None if settings.checkpoint is None else Path(settings.checkpoint).expanduser()
    beside = checkpoint if checkpoint is not None and not (checkpoint / MODEL).is_file() else run_dir
    return None if beside is None else beside.resolve().parent / NAME


def features(
    context: Context,
    data: Images,
    indices: NDArray[np.int64],
    geometry: Geometry,
    tokens: str,
    compute: Compute,
    stage: str,
    dtype: str = "float32",
    keep: bool = True,
) -> dict[str, Tensor]:
    """As `features.extract`, from the cache where it is there, else into it. `tokens` names what `compute` yields, and `str(geometry)`
    what it sees. On the CPU and rank 0; elsewhere empty. Without `keep` the cache is left alone.

    Rows of images that cannot be decoded are NaN, and noted in the context. Raises ValueError for too many of them.
    """
    from equissl.features import extract, undecodable

    settings, world = context.settings, context.world
    key = {
        "version": VERSION,
        "weights_sha256": context.weights_sha256,
        "manifest_sha256": data.manifest_sha256,
        "split": data.split,
        "images": hashlib.sha256(np.asarray(indices, dtype="<i8").tobytes()).hexdigest(),
        "transform": str(geometry),
        "tokens": tokens,
        "dtype": dtype,
        "device": world.device.type,
        "precision": str(context.precision),
    }
    folder = root(settings, context.run_dir) if keep and context.weights_sha256 and world.rank == 0 else None
    with _entry(context, folder, key) as entry:
        parts: dict[str, list[Tensor]] = {}
        bad = np.empty(0, dtype=np.int64)
        for number, start in enumerate(range(0, len(indices), ROWS)):
            chunk = indices[start : start + ROWS]
            found = entry.read(number, len(chunk)) if entry else None
            if entry and found is not None and _mended(data, chunk[undecodable(found).numpy()]):
                entry.forget(number)
                found = None
            context.tick(stage, start, len(indices), start)
            if not context.of_rank_0(found is not None):
                new = extract(data, chunk, geometry, compute, world, settings.batch, settings.num_workers, context.tick, stage)
                found = {name: new.pop(name).to(DTYPES[dtype]) for name in list(new)}
                if entry:
                    entry.write(number, found)
            if found:
                bad = np.append(bad, chunk[undecodable(found).numpy()])
                context.note_undecodable(data, bad, len(indices))
            for name, values in (found or {}).items():
                parts.setdefault(name, []).append(values)
        joined = {name: torch.cat(parts.pop(name)) for name in list(parts)}
    if folder is not None and entry is not None:
        prune(folder, settings.cache_gb * 1e9, keep=entry.folder)
    return joined


def decodable(
    context: Context, data: Images, indices: NDArray[np.int64], geometry: Geometry, compute: Compute, stage: str
) -> tuple[dict[str, Tensor], NDArray[np.int64]]:
    """Past the cache, without the rows of images that cannot be decoded; and the images left. On rank 0; elsewhere empty, and all."""
    from equissl.features import undecodable

    found = features(context, data, indices, geometry, "", compute, stage, keep=False)
    if not found or (there := ~undecodable(found)).all():
        return found, indices
    return {name: found.pop(name)[there] for name in list(found)}, indices[there.numpy()]


def _mended(data: Images, indices: NDArray[np.int64]) -> bool:
    """Whether one of these images can be decoded by now: a file that was got anew keeps its name, and the data set its sha256 where the
    file is none of those whose bytes are in it."""
    from equissl.data.loader import decode

    for i in indices.tolist():
        with suppress(ValueError):
            decode(data, i)
            return True
    return False


class Entry:
    """One folder of files, locked by this process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, number: int, num_rows: int) -> dict[str, Tensor] | None:
        """None where the file is missing or damaged; one that is damaged is deleted."""
        for path in sorted(self.folder.glob(f"{number:05d}.*.safetensors")):
            try:
                content = path.read_bytes()  # no map, which would end the process where another node removes the file
                if path.name == _file_name(number, hashlib.sha256(content).hexdigest()):
                    found: dict[str, Tensor] = load(content)
                    if all(len(values) == num_rows for values in found.values()):
                        return found
                log.warning("the cached features %s are damaged: they are extracted anew", path)
                path.unlink()
            except OSError as error:
                log.warning("the cached features %s cannot be read: %s; they are extracted anew", path, error)
        return None

    def forget(self, number: int) -> None:
        for path in self.folder.glob(f"{number:05d}.*.safetensors"):
            with suppress(OSError):
                path.unlink()

    def write(self, number: int, tensors: dict[str, Tensor]) -> None:
        """What cannot be written is not cached: the evaluation goes on."""
        content = save({name: values.contiguous() for name, values in tensors.items()})
        try:
            write_atomic(self.folder / _file_name(number, hashlib.sha256(content).hexdigest()), content)
        except OSError as error:
            log.warning("features are not cached in %s: %s", self.folder, error)


def prune(folder: Path, max_bytes: float, keep: Path) -> None:
    """Remove the entries used longest ago until the others have at most `max_bytes`; never `keep`, nor what another process holds."""
    try:
        sizes = {path: _num_bytes(path) for path in folder.iterdir() if (path / LOCK).is_file()}
    except OSError:  # removed meanwhile
        return
    total = sum(sizes.values())
    for path in sorted(sizes, key=_last_used):
        if total <= max_bytes:
            return
        if path == keep:
            continue
        with _lock(path) as locked:
            if locked:
                shutil.rmtree(path, ignore_errors=True)
                total -= sizes[path]


@contextmanager
def _entry(context: Context, folder: Path | None, key: dict[str, Any]) -> Iterator[Entry | None]:
    """The entry when no other process has it; None where there is no cache, and on other ranks. All ranks call it together."""
    path = None if folder is None else folder / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    while True:
        with _lock(path) as locked:
            if context.of_rank_0(locked):
                if path is not None and path.is_dir():
                    try:
                        write_json(path / "key.json", key)
                        os.utime(path / LOCK)
                        for left in path.glob(".*.safetensors.*"):  # by a process that was killed while it wrote
                            left.unlink(missing_ok=True)
                    except OSError as error:
                        log.warning("features are not cached in %s: %s", path, error)
                yield None if path is None else Entry(path)
                return
        context.tick("waiting for features of another evaluation", 0, 1, 0)
        time.sleep(WAIT_SECONDS)


@contextmanager
def _lock(path: Path | None) -> Iterator[bool]:
    """Whether nobody else has the folder; it is made where there is none. True where the file system has no locks."""
    if path is None:
        yield True
        return
    try:
        handle, locked = _take(path)
    except OSError as error:
        log.warning("no cache of features in %s: %s", path, error)
        yield True
        return
    try:
        yield locked
    finally:
        os.close(handle)


def _take(path: Path) -> tuple[int, bool]:
    """The open lock file and whether it is ours now."""
    while True:
        path.mkdir(parents=True, exist_ok=True)
        handle = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle), os.stat(path / LOCK)):
                return handle, True
        except BlockingIOError:
            return handle, False
        except FileNotFoundError:
            pass
        except OSError:  # a file system without locks
            return handle, True
        os.close(handle)  # whoever had the lock removed the entry after this file was opened: another one may be there by now


def _file_name(number: int, digest: str) -> str:
    return f"{number:05d}.{digest[:16]}.safetensors"


def _num_bytes(path: Path) -> int:
    try:
        return sum(each.stat().st_size for each in path.iterdir())
    except OSError:  # another process removes it
        return 0


def _last_used(path: Path) -> float:
    try:
        return (path / LOCK).stat().st_mtime
    except OSError:
        return 0.0
