"""A copy of a data set on the node, in /dev/shm or on a local disk, shared by all processes of the node that ask for it. No torch.

    DEST/equihpc-UID/MANIFEST_HASH-…/    as many shards as fit, symbolic links to the others, manifest.json last

The folder itself is the lock (flock): exclusive while it is filled or removed, shared while it is used. The kernel drops the lock
of a killed process, so a folder that can be locked exclusively is in nobody's use: whoever leaves as the last removes it, and
what is left by processes that were killed is removed by the next that comes.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import logging
import os
import shutil
import signal
import stat
import threading
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from equissl.data.parallel import progress
from equissl.data.shards import MANIFEST, find, manifest_sha256, read_manifest
from equissl.data.verify import files_of
from equissl.files import FULL, write_atomic

log = logging.getLogger(__name__)

DESCRIPTION = (
    "Copy a data set to the node, print where, and hold it there until this command is interrupted (Ctrl-C or SIGTERM), which removes"
    " the copy unless another process uses it."
)
MEMORY = Path("/dev/shm")
LEFT_FREE = 0.05  # of the file system
COPIERS = 8  # threads
CHUNK = 2**22
POLL_SECONDS = 0.1
BEAT_SECONDS = 1.0  # between calls of `waiting`
LINE_BEATS = 30  # between lines of the log
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def staged(
    folder: Path,
    splits: Collection[str],
    dest: Path,
    budget_bytes: int | None = None,
    waiting: Callable[[], object] = lambda: None,
) -> Iterator[Path]:
    """The data set `folder` with the files of `splits` copied into `dest`, as far as `budget_bytes` and the free space allow.

    Yields a folder with the same manifest, hence of the same identity. Every process of a node may ask: one copies, the others
    wait; `waiting` is called about once a second meanwhile, and what it raises ends the copying. Where `dest` gets full after
    all, the original is read. Raises ValueError for a shard that is not the manifest's, an unknown split, and a `dest` that is
    missing, not ours or cannot be locked.
    """
    source, splits = folder.resolve(), sorted(set(splits))
    what = json.dumps([str(source), splits, budget_bytes])
    name = f"{manifest_sha256(source)[:16]}-{hashlib.sha256(what.encode()).hexdigest()[:8]}"
    sweep(dest, spare=name)
    try:
        handle, place = _use(dest, name, lambda place: _fill(place, source, splits, budget_bytes, waiting), waiting)
    except OSError as error:
        if error.errno not in FULL:
            raise
        log.warning("%s is full (%s): the data set is read from %s", dest, error, source)
        handle = None
    if handle is None:
        yield source
        return
    try:
        yield place
    finally:
        _leave(handle, place)


def sweep(dest: Path, spare: str | None = None) -> list[Path]:
    """Remove our staged folders in `dest` that nobody uses, but `spare`; returns which. Raises ValueError as `staged` does."""
    base = _base(dest)
    removed = []
    with suppress(FileNotFoundError):  # another removed the folder just now
        for place in sorted(base.iterdir()):
            if place.name == spare:
                continue
            with suppress(FileNotFoundError, NotADirectoryError):
                if _leave(_open(place), place):
                    removed.append(place)
    with suppress(OSError):  # it is not empty
        base.rmdir()
    return removed


# --- locks ------------------------------------------------------------------------------------------------------------------


def _use(dest: Path, name: str, fill: Callable[[Path], None], waiting: Callable[[], object]) -> tuple[int, Path]:
    """The filled folder, and its descriptor, which holds a shared lock."""
    began, beats = time.monotonic(), 0
    while True:
        handle, place = _make(dest, name)
        try:
            if _is_ready(handle, place, fill):
                return handle, place
        except BaseException:
            _leave(handle, place)
            raise
        os.close(handle)
        time.sleep(POLL_SECONDS)
        if (seconds := time.monotonic() - began) > (beats + 1) * BEAT_SECONDS:
            beats += 1
            waiting()
            if beats % LINE_BEATS == 0:
                log.info("another process stages the data set to %s; waiting for %.0f s", dest, seconds)


def _make(dest: Path, name: str) -> tuple[int, Path]:
    while True:
        place = _base(dest) / name
        with suppress(FileNotFoundError):  # another removed it, or the folder above, just now
            with suppress(FileExistsError):
                place.mkdir(mode=0o700)
            return _open(place), place


def _is_ready(handle: int, place: Path, fill: Callable[[Path], None]) -> bool:
    """Whether the folder is filled and locked for use; where nobody fills or uses it, `fill` does."""
    if _lock(handle, place, fcntl.LOCK_SH) and (place / MANIFEST).exists():
        return True
    if not _lock(handle, place, fcntl.LOCK_EX):
        return False
    if not (place / MANIFEST).exists():
        fill(place)
    fcntl.flock(handle, fcntl.LOCK_SH)  # not at one go: another may have it in between, and remove the folder
    return _is_there(handle, place)


def _leave(handle: int, place: Path) -> bool:
    """Give the lock up, and remove the folder if nobody else uses it; returns whether it was removed."""
    try:
        if not _lock(handle, place, fcntl.LOCK_EX):
            return False
        (place / MANIFEST).unlink(missing_ok=True)  # first: nobody takes what a kill leaves of it for the whole
        shutil.rmtree(place)
    except OSError as error:
        log.warning("the staged data set %s cannot be removed: %s", place, error)
        return False
    finally:
        os.close(handle)
    with suppress(OSError):  # it is not empty
        place.parent.rmdir()
    return True


def _open(place: Path) -> int:
    return os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)


def _lock(handle: int, place: Path, kind: int) -> bool:
    """Whether the lock was to be had, and what is locked is still there."""
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise ValueError(f"{place} cannot be locked ({error.strerror}): stage to /dev/shm or to a disk of the node") from None
    return _is_there(handle, place)


def _is_there(handle: int, place: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), place.lstat())
    except FileNotFoundError:
        return False


def _base(dest: Path) -> Path:
    """Our folder in `dest`, made if need be. Raises ValueError where it is not ours alone: another could change what we read."""
    if not dest.is_dir():
        raise ValueError(f"there is no folder {dest} to stage to")
    base = dest / f"equihpc-{os.getuid()}"
    with suppress(FileExistsError):
        base.mkdir(mode=0o700)
    try:
        status = base.lstat()
    except FileNotFoundError:  # removed as empty by another process, just now
        return _base(dest)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise ValueError(f"{base} must be a folder of yours with mode 0700: it is {stat.filemode(status.st_mode)} of user {status.st_uid}")
    return base


# --- copying ----------------------------------------------------------------------------------------------------------------


def _fill(place: Path, source: Path, splits: Collection[str], budget_bytes: int | None, waiting: Callable[[], object]) -> None:
    """Copies, links, and the manifest as the last. Raises ValueError for a shard that is not the manifest's, OSError."""
    _empty(place)  # what a killed process left
    small, shards = files_of(source, splits)
    every = [entry for split in read_manifest(source)["splits"] for entries in files_of(source, [split]) for entry in entries]
    disk = os.statvfs(place)
    room = int((disk.f_bavail - LEFT_FREE * disk.f_blocks) * disk.f_frsize)
    room = room if budget_bytes is None else min(room, budget_bytes)
    copied: dict[str, dict[str, Any]] = {}
    for entry in small + shards:
        if entry["bytes"] <= room:
            copied[entry["name"]] = entry
            room -= entry["bytes"]
    try:
        _link(place, source, [entry for entry in every if entry["name"] not in copied])
        _copy_all(place, source, list(copied.values()), waiting)
    except OSError as error:
        if error.errno not in FULL:
            raise
        log.warning(
            "%s got full while the data set was copied to it: the copy is removed, the original in %s is read", place.parent, source
        )
        _empty(place)
        _link(place, source, every)  # the others need not try again
    write_atomic(place / MANIFEST, (source / MANIFEST).read_bytes())


def _empty(place: Path) -> None:
    for path in place.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _link(place: Path, source: Path, entries: list[dict[str, Any]]) -> None:
    for entry in entries:
        _inside(place, entry["name"]).symlink_to(source / entry["name"])


def _inside(place: Path, name: str) -> Path:
    """Where the file goes; the folders above it are made."""
    path = place / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _copy_all(place: Path, source: Path, entries: list[dict[str, Any]], waiting: Callable[[], object]) -> None:
    began, num_bytes = time.monotonic(), sum(entry["bytes"] for entry in entries)
    log.info("copying %d files, %.2f GB, of %s to %s", len(entries), num_bytes / 1e9, source, place)
    stopped = threading.Event()
    with progress("stage", num_bytes) as advance, ThreadPoolExecutor(COPIERS) as pool:
        pending = {pool.submit(_copy, source / entry["name"], _inside(place, entry["name"]), entry, stopped) for entry in entries}
        try:
            while pending:
                done, pending = wait(pending, timeout=BEAT_SECONDS, return_when=FIRST_EXCEPTION)
                for future in done:
                    advance(future.result())
                if pending:
                    waiting()
        except BaseException:
            stopped.set()
            pool.shutdown(cancel_futures=True)
            raise
    seconds = max(time.monotonic() - began, 1e-3)
    log.info("copied in %.1f s, %.0f MB/s", seconds, num_bytes / seconds / 1e6)


def _copy(source: Path, target: Path, entry: dict[str, Any], stopped: threading.Event) -> int:
    """Returns the bytes copied. Raises ValueError for a source that is missing or not the manifest's."""
    digest = hashlib.sha256()
    try:
        reading = source.open("rb")
    except FileNotFoundError:
        raise ValueError(f"{entry['name']} is missing in {source.parent}: copy it again or write the data set anew") from None
    with reading, target.open("xb") as writing:
        while not stopped.is_set() and (block := reading.read(CHUNK)):
            digest.update(block)
            writing.write(block)
        if stopped.is_set():
            return 0
        writing.flush()
        os.fsync(writing.fileno())  # a manifest beside shards that a crash took would be believed
    if digest.hexdigest() != entry["sha256"]:
        raise ValueError(
            f"{entry['name']} in {source.parent} is not what the manifest says: copy it again or write the data set anew; equihpc data"
            " verify finds what else is damaged"
        )
    return int(entry["bytes"])


# --- the command ------------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", nargs="?", metavar="DIR", help="a data set, or the name photographs; with --sweep: DEST")
    parser.add_argument("dest", type=Path, nargs="?", metavar="DEST", help="default: /dev/shm, the memory of the node")
    parser.add_argument("--budget-gb", type=float, metavar="G", help="copy at most this, in 10^9 bytes; default: 95 %% of DEST may be full")
    parser.add_argument("--split", action="append", metavar="NAME", help="copy only this one; repeatable")
    parser.add_argument("--sweep", action="store_true", help="remove what killed processes left in DEST, and end")
    parser.add_argument("--json", action="store_true", help="for scripts")


def command(arguments: argparse.Namespace) -> int:
    if arguments.sweep:
        removed = [str(place) for place in sweep(arguments.dest or Path(arguments.data or MEMORY))]
        print(json.dumps({"removed": removed}) if arguments.json else "\n".join(removed) or "nothing to remove")
        return 0
    if arguments.data is None:
        raise ValueError("which data set? equihpc data stage DIR [DEST]")
    if arguments.budget_gb is not None and not 0 <= arguments.budget_gb < float("inf"):
        raise ValueError(f"--budget-gb {arguments.budget_gb} must not be negative")
    folder = find(arguments.data)
    splits = arguments.split or list(read_manifest(folder)["splits"])
    budget_bytes = None if arguments.budget_gb is None else int(arguments.budget_gb * 1e9)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # as nohup and a shell's & set it
            signal.signal(number, _interrupt)
    is_staged = False
    try:
        with staged(folder, splits, arguments.dest or MEMORY, budget_bytes) as place:
            is_staged = True
            print(json.dumps({"path": str(place)}) if arguments.json else place, flush=True)
            while True:
                time.sleep(1.0)
    except KeyboardInterrupt:
        return 0 if is_staged else 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(*_: object) -> None:
    for number in SIGNALS:  # a second one must not end the cleaning up
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt
