"""`equihpc data build SOURCE DEST`: a data set of ours from images that are somewhere already. No torch.

Two phases, both in the folder DEST.partial, which the last step renames:
1. scan: where every image lies (file, offset, size, label, key) goes into a table on disk, about 120 bytes each. The bytes of
   sources that cannot be read at will (CIFAR, iterables) are copied into one file first.
2. write: a permutation keyed by (seed, split) puts the images in order; it is cut into shards of about the same number of bytes,
   which depends on the table and the seed alone; processes write shard after shard. The same bytes for any number of them.

After a kill the same call keeps the finished shards, as long as the names, sizes and times of the source's files and the settings
are the same; otherwise it begins anew.
"""

from __future__ import annotations

import argparse
import fcntl
import io
import json
import logging
import os
import re
import shutil
import signal
import sys
import zlib
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from equissl import draws
from equissl.config import BuildConfig
from equissl.data.parallel import Parallel, Report, Stop, processes, shown, usable_cores
from equissl.data.shards import (
    NO_LABEL,
    SPLIT,
    Sample,
    Shard,
    manifest_sha256,
    read_manifest,
    shard_name,
    write_index,
    write_manifest,
    write_shard,
)
from equissl.data.sources import EMPTY, NO_IMAGE, SPOOL, UNREADABLE, UNREADABLE_SIZE, Files, Source, open_source
from equissl.files import sync, told_when_full, write_atomic, write_json
from equissl.progress import Stopped

log = logging.getLogger(__name__)

DESCRIPTION = "Write a data set from a folder tree, the ImageNet or CIFAR archives, a list, WebDataset shards or a Python iterable."
FORMAT = 1  # raised when the same source and settings give other bytes
ROW = np.dtype([("file", "<i4"), ("offset", "<u8"), ("size", "<u4"), ("label", "<i8"), ("key", "S80"), ("extension", "S8")])
KEY_LENGTH = 70  # of the 80 that a key may have: room for a number that makes it unique
MAX_LEFT_OUT = 0.01  # of the images may be empty or unreadable
BLOCK = 512  # of a tar file, bytes
CHUNK = 10_000  # rows that are written together
OPEN_FILES = 64  # file descriptors that a process keeps
MAX_WORKERS = 32
STATE = "scan.json"  # written when the scan is through
LOCK = "build.lock"  # a folder without it is not of a build


def _silent(stage: str, images: int, of: int | None, num_bytes: int) -> None:
    pass


def build(
    config: BuildConfig,
    dest: Path,
    stop: Stop = lambda: False,
    report: Report = _silent,
    *,
    default_name: str | None = None,
    samples: Iterable[Any] | None = None,
) -> None:
    """Write the data set into `dest`, which must not be there yet; whole or not at all.

    `samples`: an iterable of (image bytes, extension, label or None[, key]) itself, instead of what `config.source` names: such a
    build always begins anew. A script calls this under `if __name__ == "__main__"`, for its processes import it. Raises ValueError for
    a source that is not as it must be, Stopped if `stop()` (what is finished is kept), DiskFull.
    """
    dest = Path(dest).expanduser().absolute()
    work = dest.with_name(f"{dest.name}.partial")
    _refuse_existing(dest, work)
    source = open_source(config, samples)
    place = Path(config.source).expanduser()
    if source.kind in ("folder", "shards") and place.is_dir() and dest.resolve().is_relative_to(place.resolve()):
        raise ValueError(f"{dest} lies in the source {place}: it would become a part of it; choose another place")
    work.mkdir(parents=True, exist_ok=True)
    if any(work.iterdir()) and not (work / LOCK).exists():
        raise ValueError(f"{work}, where the build would work, is there already and not of a build: give another DEST, or move it")
    workers = config.num_workers or min(MAX_WORKERS, 2 * usable_cores())
    with told_when_full(work, None), _locked(work / LOCK, dest):
        _refuse_existing(dest, work)  # the build that held the lock may have finished it
        try:
            with processes(workers, stop) as parallel:
                state = _scanned(source, config, work, parallel, stop, report)
                splits, left_out = _written(source, config, work, state, parallel, report)
            name = config.name or source.default_name or default_name or dest.name
            written = {"kind": source.kind, "seed": config.seed, "shard_mb": config.shard_mb, "left_out": left_out, **source.provenance}
            write_manifest(work / "data", name, state["classes"], splits, written)
            (work / "data").rename(dest)
            sync(dest.parent)
            shutil.rmtree(work, ignore_errors=True)
        finally:
            if not (work / STATE).exists():  # half a scan is of no use
                shutil.rmtree(work, ignore_errors=True)


def summary(folder: Path) -> dict[str, Any]:
    """Of a finished data set: number of images per split, of classes, the manifest's sha256."""
    manifest = read_manifest(folder)
    return {
        "num_images": {split: entry["num_images"] for split, entry in manifest["splits"].items()},
        "num_classes": len(manifest["classes"]),
        "manifest_sha256": manifest_sha256(folder),
    }


def _refuse_existing(dest: Path, work: Path) -> None:
    if not (dest.exists() or dest.is_symlink()):
        return
    if (work / LOCK).exists() and not (work / "data").exists():  # killed after the data set was finished
        shutil.rmtree(work, ignore_errors=True)
    raise ValueError(f"{dest} is there already: give another DEST, or remove it first")


@contextmanager
def _locked(path: Path, dest: Path) -> Iterator[None]:
    """Raises ValueError where another process has the lock, or has just removed it together with the folder; where there are none."""
    is_new = not path.exists()
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_mine = os.path.samestat(os.fstat(file.fileno()), path.stat())
        except (BlockingIOError, FileNotFoundError):
            is_mine = False
        except OSError as error:
            if is_new:  # then the folder is, too
                shutil.rmtree(path.parent, ignore_errors=True)
            raise ValueError(
                f"{path.parent} cannot be locked ({error.strerror}): build on another file system, such as a disk of the node, and move it"
            ) from None
        if not is_mine:
            raise ValueError(f"another build into {dest} is running: wait for it, or give another DEST")
        yield


# --- scan -------------------------------------------------------------------------------------------------------------------


def _scanned(source: Source, config: BuildConfig, work: Path, parallel: Parallel, stop: Stop, report: Report) -> dict[str, Any]:
    """What STATE says, of an earlier call where nothing has changed. Raises ValueError, Stopped."""
    files, total = Files(), 0
    for number, (name, size, mtime_ns) in enumerate(source.listing()):
        files.add(name, size, mtime_ns)
        total += max(0, size)
        _go_on(number, total, "listing", stop, report)
    settings = {"format": FORMAT, "files": files.sha256(), "kind": source.kind, "seed": config.seed, "shard_mb": config.shard_mb}
    settings["split"] = config.split
    if (work / STATE).exists():
        state: dict[str, Any] = json.loads((work / STATE).read_text())
        if source.is_repeatable and state["settings"] == settings:
            for temporary in (work / "data").glob(".*"):  # of shards in whose middle it was killed
                temporary.unlink()
            return state
        changed = [each for each, value in settings.items() if state["settings"].get(each) != value] or ["an iterable has no memory"]
        what = "the source's files" if changed == ["files"] else ", ".join(changed)
        log.warning("%s cannot be gone on with (changed: %s): the build begins anew", work, what)
    elif left := [path for path in work.iterdir() if path.name != LOCK]:
        log.warning("%s holds a scan that was not finished (%s): the build begins anew", work, left[0].name)
    (work / STATE).unlink(missing_ok=True)  # first: a kill in the middle of this must not leave it
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()
    (work / "data").mkdir()
    files.save(work)
    state = {"settings": settings, **_scan(source, files, work, parallel, stop, report)}
    for path in work.iterdir():
        if path.is_file():
            with path.open("rb") as file:  # a power cut must not leave the state without what it stands for
                os.fsync(file.fileno())
    write_json(work / STATE, state)
    return state


def _go_on(number: int, num_bytes: int, stage: str, stop: Stop, report: Report) -> None:
    """Every 256 images: report, and raise Stopped if `stop()`."""
    if number % 256 == 0:
        report(stage, number, None, num_bytes)
        if stop():
            raise Stopped


class _Table:
    """The rows of one split, appended to a file."""

    def __init__(self, path: Path) -> None:
        self.path, self.num_rows = path, 0
        self._file = path.open("wb")
        self._rows: list[tuple[int, int, int, int, bytes, bytes]] = []

    def add(self, *row: Any) -> None:
        self._rows.append(row)
        self.num_rows += 1
        if len(self._rows) == CHUNK:
            self.flush()

    def flush(self) -> None:
        self._file.write(np.array(self._rows, dtype=ROW).tobytes())
        self._rows = []

    def close(self) -> None:
        self._file.close()


def _scan(source: Source, files: Files, work: Path, parallel: Parallel, stop: Stop, report: Report) -> dict[str, Any]:
    tables: dict[str, _Table] = {}
    names: dict[str, int] = {}  # of classes, to the numbers in the table, which are in the order of appearance
    highest, first_number = NO_LABEL, ""
    left_out = _LeftOut()
    num_bytes = 0
    with (work / "spool").open("wb") as spool:
        try:
            for number, found in enumerate(source.images(files, parallel)):
                _go_on(number, num_bytes, "scan", stop, report)
                if isinstance(found.label, str):
                    label = names.setdefault(found.label, len(names))
                else:
                    label = NO_LABEL if found.label is None else found.label
                    if label > highest:
                        highest, first_number = label, found.key
                if highest != NO_LABEL and names:
                    raise ValueError(
                        f"{source.where}: some labels are numbers ({highest} of {first_number}), others names ({next(iter(names))!r}):"
                        " give numbers or names"
                    )
                size = found.size if found.content is None else len(found.content)
                what = "" if found.file == SPOOL else f" in {files.name(found.file)}"
                if not found.extension:
                    left_out.add(NO_IMAGE, f"{found.key}{what}")
                elif size == 0:
                    left_out.add(EMPTY, f"{found.key}.{found.extension}{what}")
                elif size == UNREADABLE_SIZE or size >= 2**32:
                    left_out.add(UNREADABLE, f"{found.key}.{found.extension}{what}")
                else:
                    offset = found.offset
                    if found.content is not None:
                        offset = spool.tell()
                        spool.write(found.content)
                    if found.split not in tables:
                        if not SPLIT.fullmatch(found.split):
                            raise ValueError(f"{source.where}: the split {found.split!r} is not 1 to 40 letters, digits, '_' and '-'")
                        tables[found.split] = _Table(work / f"{found.split}.rows")
                    extension = found.extension.lower()
                    tables[found.split].add(
                        found.file, offset, size, label, plain(found.key), b"jpg" if extension == "jpeg" else extension.encode()
                    )
                    num_bytes += size
            for table in tables.values():
                table.flush()
        finally:
            for table in tables.values():
                table.close()
    total = sum(table.num_rows for table in tables.values())
    if not total:
        raise ValueError(f"{source.where} has no images{left_out.text()}")
    left_out.check(total + left_out.total())
    classes = source.classes
    if classes is None:
        classes = sorted(names) if names else [str(number) for number in range(highest + 1)]
    elif highest >= len(classes):
        raise ValueError(f"{source.where}: the label {highest} of {first_number} is not one of the {len(classes)} classes")
    position = {name: number for number, name in enumerate(classes)}
    for table in tables.values():
        rows = np.memmap(table.path, ROW, "r+")
        if names:
            places = np.array([*(position[name] for name in names), NO_LABEL])  # the last is that of NO_LABEL, -1
            rows["label"] = places[rows["label"]]
        make_unique(rows["key"])
        rows.flush()
    counts = {split: tables[split].num_rows for split in sorted(tables)}
    return {"classes": classes, "splits": counts, "left_out": left_out.counts, "first_left_out": left_out.first}


def plain(name: str) -> bytes:
    """A key for the manifest and WebDataset: letters, digits, '_' and '-', not too long."""
    return (re.sub(r"[^A-Za-z0-9_-]", "_", name)[:KEY_LENGTH] or "image").encode()


def make_unique(keys: NDArray[np.bytes_]) -> None:
    """Append a number to every key that was there before, in place. `keys`: (n,), of at most KEY_LENGTH bytes."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    counts: Counter[bytes] = Counter()
    for place in np.flatnonzero(ordered[1:] == ordered[:-1]) + 1:
        key, is_taken = bytes(ordered[place]), True
        while is_taken:  # by a key that looks like one with a number; two of the new ones are never the same
            counts[key] += 1
            candidate = b"%b-%d" % (key, counts[key])
            at = int(np.searchsorted(ordered, candidate))
            is_taken = at < len(ordered) and bytes(ordered[at]) == candidate
        keys[order[place]] = candidate


class _LeftOut:
    """Images that are empty or cannot be read: said once each, counted, and too many are refused."""

    def __init__(self, counts: dict[str, int] | None = None, first: str = "") -> None:
        self.counts, self.first = dict(counts or {}), first

    def add(self, why: str, what: str) -> None:
        log.warning("left out, %s: %s", why, what)
        self.counts[why] = self.counts.get(why, 0) + 1
        self.first = self.first or what

    def total(self) -> int:
        return sum(self.counts.values())

    def text(self) -> str:
        return f"; {', '.join(f'{count} are {why}' for why, count in self.counts.items())}, the first is {self.first}" if self.first else ""

    def check(self, num_images: int) -> None:
        """Raises ValueError where there are too many."""
        if self.total() > MAX_LEFT_OUT * num_images:
            raise ValueError(
                f"of {num_images} images more than {MAX_LEFT_OUT:.0%} cannot be used{self.text()}. Mend them or take them out of the source"
            )


# --- write ------------------------------------------------------------------------------------------------------------------


class _Task(NamedTuple):
    """One shard."""

    split: str
    number: int
    start: int  # in the order of the split
    stop: int
    num_bytes: int  # of its images

    @property
    def name(self) -> str:
        return shard_name(self.split, self.number)


def _written(
    source: Source, config: BuildConfig, work: Path, state: dict[str, Any], parallel: Parallel, report: Report
) -> tuple[dict[str, Any], dict[str, int]]:
    """Write what is missing; the splits for the manifest, and how many images were left out for which reason."""
    tasks = [task for split in state["splits"] for task in _tasks(work, split, config)]
    missing = [task for task in tasks if not _is_finished(work, task)]
    if len(missing) < len(tasks):
        log.info("%d of %d shards are finished already", len(tasks) - len(missing), len(tasks))
    needed, room = sum(task.num_bytes for task in missing), os.statvfs(work)
    if needed > (free := room.f_bavail * room.f_frsize):
        log.warning("about %.1f GB are to be written into %s, where %.1f GB are free", needed / 1e9, work.parent, free / 1e9)
    total = sum(state["splits"].values())
    images = total - sum(task.stop - task.start for task in missing)
    num_bytes = sum(task.num_bytes for task in tasks) - needed
    left_out = _LeftOut(state["left_out"], state["first_left_out"])
    root = source.root.absolute()
    report("write", images, total, num_bytes)
    for task, unreadable in zip(missing, parallel(_write, ((work, root, task) for task in missing)), strict=True):
        for what in unreadable:
            left_out.add(UNREADABLE, what)
        left_out.check(total + sum(state["left_out"].values()))
        images, num_bytes = images + task.stop - task.start, num_bytes + task.num_bytes
        report("write", images, total, num_bytes)
    splits = {}
    for split in state["splits"]:
        splits[split] = write_index(work / "data", split, [_load(work, task)[0] for task in tasks if task.split == split])
    return splits, left_out.counts


def _tasks(work: Path, split: str, config: BuildConfig) -> list[_Task]:
    """The shards of a split. Leaves its order on disk for the workers."""
    rows = np.memmap(work / f"{split}.rows", ROW, "r")
    order = draws.permutation(len(rows), config.seed, zlib.crc32(split.encode()), draws.Stream.PREPARE)
    np.save(work / f"{split}.order.npy", order)
    sizes = rows["size"][order].astype(np.int64)
    cuts = cut(tar_bytes(sizes, rows["label"][order] != NO_LABEL), int(config.shard_mb * 1e6)).tolist()
    ends = np.concatenate([[0], np.cumsum(sizes)])
    return [_Task(split, number, a, b, int(ends[b] - ends[a])) for number, (a, b) in enumerate(pairwise(cuts))]


def tar_bytes(sizes: NDArray[np.int64], has_label: NDArray[np.bool_]) -> NDArray[np.int64]:
    """What samples take in a shard: a header and whole blocks for the image, a header and a block for the label."""
    return BLOCK * (1 - -sizes // BLOCK + 2 * has_label)


def cut(num_bytes: NDArray[np.int64], shard_bytes: int) -> NDArray[np.int64]:
    """Cut n samples of so many bytes into the fewest shards that can be equally large and not over `shard_bytes`.

    Returns where each begins, and n: (shards + 1,), increasing, from 0. A shard's size differs from the mean by less than that of
    one sample at each of its ends.
    """
    ends = np.cumsum(num_bytes)
    count = -(-int(ends[-1]) // max(1, shard_bytes))
    targets = [int(ends[-1]) * shard // count for shard in range(1, count)]
    return np.unique([0, *(np.searchsorted(ends, targets) + 1), len(ends)])


def _sidecar(work: Path, task: _Task) -> Path:
    return work / f"{task.name}.npz"


def _write(work: Path, root: Path, task: _Task) -> list[str]:
    """In a worker: write one shard and what the index needs of it; returns what could not be read. Raises DiskFull."""
    unreadable: list[str] = []
    with closing(_Reader(work, root, task.split)) as reader:
        shard = write_shard(work / "data" / task.name, reader.samples(task.start, task.stop, unreadable))
    buffer = io.BytesIO()
    entry = np.frombuffer(json.dumps([shard.entry, len(unreadable)]).encode(), np.uint8)
    np.savez(buffer, rows=shard.rows, keys=shard.keys, entry=entry)
    write_atomic(_sidecar(work, task), buffer.getvalue())
    return unreadable


def _load(work: Path, task: _Task) -> tuple[Shard, int]:
    """A finished shard and how many of its images could not be read."""
    with np.load(_sidecar(work, task)) as saved:
        entry, unreadable = json.loads(saved["entry"].tobytes())
        return Shard(entry, saved["rows"], saved["keys"]), unreadable


def _is_finished(work: Path, task: _Task) -> bool:
    """Whether the shard is there in its size and nothing was left out of it: what could not be read is tried again."""
    try:
        shard, unreadable = _load(work, task)
        return unreadable == 0 and (work / "data" / task.name).stat().st_size == shard.entry["bytes"]
    except FileNotFoundError:
        return False


class _Reader:
    """The images of a split by their place in the order."""

    def __init__(self, work: Path, root: Path, split: str) -> None:
        self._work, self._root = work, root
        self._rows = np.memmap(work / f"{split}.rows", ROW, "r")
        self._order = np.load(work / f"{split}.order.npy", "r")
        self._files = Files.load(work)
        self._open: OrderedDict[int, io.FileIO] = OrderedDict()  # least recently used first

    def samples(self, start: int, stop: int, unreadable: list[str]) -> Iterator[Sample]:
        """Those that can be read; the others are named in `unreadable`."""
        for row in self._rows[self._order[start:stop]]:
            key, extension = bytes(row["key"]).decode(), bytes(row["extension"]).decode()
            file, offset, size = int(row["file"]), int(row["offset"]), int(row["size"])
            try:
                data = os.pread(self._file(file).fileno(), size, offset)
                problem = "" if len(data) == size else "it has become shorter"
            except OSError as error:
                problem = error.strerror or str(error)
            if problem:
                unreadable.append(f"{key}.{extension} in {'spool' if file == SPOOL else self._files.name(file)}: {problem}")
            else:
                yield Sample(key, data, extension, int(row["label"]))

    def _file(self, number: int) -> io.FileIO:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        path = self._work / "spool" if number == SPOOL else self._root / self._files.name(number)
        file = io.FileIO(path)
        if number != SPOOL and os.fstat(file.fileno()).st_size != self._files.sizes[number]:
            file.close()
            raise OSError("its size has changed since the scan")
        if len(self._open) == OPEN_FILES:
            self._open.popitem(last=False)[1].close()
        self._open[number] = file
        return file

    def close(self) -> None:
        for file in self._open.values():
            file.close()


# --- the command --------------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    fields = BuildConfig.model_fields
    parser.add_argument("source", help="folder, archive, list (.tsv, .csv, .jsonl), or module:function that yields images")
    parser.add_argument("dest", type=Path, help="folder of the data set; must not be there yet")
    kinds = ("auto", "folder", "imagenet", "cifar", "shards", "list", "iterable")
    parser.add_argument("--kind", choices=kinds, default="auto", help="of the source; default: by what lies there")
    parser.add_argument("--name", help="of the data set; default: imagenet1k, cifar10, cifar100, else the folder's")
    parser.add_argument("--split", help="of all images, where the source has no splits; default: train")
    parser.add_argument("--shard-mb", type=float, default=fields["shard_mb"].default, help="size of a shard; default: %(default)s")
    parser.add_argument("--seed", type=int, default=fields["seed"].default, help="of the order of the images; default: %(default)s")
    parser.add_argument("--workers", type=int, help=f"processes; default: two for each core, at most {MAX_WORKERS}")
    parser.add_argument("--json", action="store_true", help="print what was built as JSON")


def command(arguments: argparse.Namespace) -> int:
    """Ctrl-C and SIGTERM let the shards in work be finished; a second one ends at once. Raises ValueError, DiskFull."""
    values = {name: getattr(arguments, name) for name in ("source", "kind", "name", "split", "shard_mb", "seed")}
    dest = arguments.dest.expanduser()
    try:
        config = BuildConfig.model_validate({**values, "num_workers": arguments.workers})
    except ValidationError as error:
        raise ValueError("; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())) from None
    asked: list[int] = []

    def ask(number: int, frame: object) -> None:
        asked.append(number)
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with shown() as report:
            build(config, dest, lambda: bool(asked), report)
    except Stopped:
        print("equihpc: stopped as asked; the same command goes on with the shards that are finished", file=sys.stderr)
        return 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    found = {"path": str(dest), "name": read_manifest(dest)["name"], **summary(dest)}
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        images = ", ".join(f"{count:,} in {split}" for split, count in found["num_images"].items())
        print(f"{dest}: {images}; {found['num_classes']} classes; manifest {found['manifest_sha256'][:12]}")
    return 0
