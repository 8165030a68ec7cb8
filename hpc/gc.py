"""What may be removed of a job without loss: found first, looked at again under the locks, then removed."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc.cancel import BUSY
from hpc.errors import EquiHPCError
from hpc.files import locked, read_json
from hpc.journal import Journal
from hpc.runs import Ledger, RunFolder
from hpc.status import JobRecord, RunStatus, collect

STALE_DAYS = 7.0  # what was set aside is kept so long, and features that no evaluation has asked for
CACHE, CACHE_LOCK = ".features", ".lock"  # beside the runs of a stage: frozen features, an entry's lock is touched when it is used
CODE_SECONDS = 3600.0  # a snapshot younger than this may belong to a submission that is being made
STALE = re.compile(r"\.stale-.+-(\d{8}-\d{6})")
OPTIMIZER, OLDER = "optimizer state of complete runs", "older checkpoints of cancelled and failed runs"
LEFT_OVER, ASIDE = "left over by runs that ended", f"set aside more than {STALE_DAYS:g} days ago"
FEATURES = f"cached features not used for {STALE_DAYS:g} days; evaluations make them again"
ALL_FEATURES = "cached features; evaluations make them again"
CODE, BATCH = "code that no run refers to", "batch scripts and logs of arrays that are complete"


@dataclass(frozen=True, slots=True)
class Item:
    """A folder or file that may go; `run` is the one whose lock is held meanwhile."""

    path: Path
    kind: str
    num_bytes: int
    inodes: int
    run: Path | None = None


@dataclass(frozen=True)
class Options:
    keep_checkpoints: bool = False
    everything: bool = False  # also milestones, older checkpoints of cancelled and failed runs, and features that were just used


def find(job_dir: Path, options: Options = Options()) -> list[Item]:
    """Nothing of a run that is or could come under way, and nothing that another job owns. Raises EquiHPCError where Slurm
    does not answer: nobody knows then what runs."""
    job = JobRecord.read(job_dir)
    statuses, note = collect(job_dir, [*job.records, *job.former], Ledger(Path(job.ledger)))
    if note:
        raise EquiHPCError(f"{note}; nothing was removed")
    idle = [status for status in statuses if status.state not in BUSY and not status.path.is_symlink()]
    found: list[Item] = []
    for status in idle:
        found += _of_run(status, options)
    for path in job_dir.glob("*/.stale-*"):
        if (match := STALE.fullmatch(path.name)) and time.mktime(
            time.strptime(match[1], "%Y%m%d-%H%M%S")
        ) < time.time() - STALE_DAYS * 86400:
            found.append(_item(path, ASIDE))
    if not any(status.state in BUSY for status in statuses):  # queued batch scripts name the code of their submission
        found += [_item(path, CODE) for path in _unused_code(job_dir)]
        kind = ALL_FEATURES if options.everything else FEATURES
        found += [_item(path, kind) for path in _features(job_dir, 0.0 if options.everything else STALE_DAYS * 86400)]
    found += [_item(path, BATCH) for path in _finished_arrays(job_dir)]
    return [item for item in found if not item.path.is_symlink()]


def _of_run(status: RunStatus, options: Options) -> Iterator[Item]:
    checkpoints = status.path / "checkpoints"
    if status.state == "complete" and checkpoints.is_dir() and not options.keep_checkpoints and _weights(status.path):
        milestones = [] if options.everything else [path for path in checkpoints.glob("step_*") if _is_milestone(path)]
        others = [path for path in checkpoints.iterdir() if path not in milestones] if milestones else [checkpoints]
        yield from (_item(path, OPTIMIZER, status.path) for path in others)
    else:
        yield from (_item(path, LEFT_OVER, status.path) for path in checkpoints.glob(".writing*"))
    if status.state in ("cancelled", "failed") and options.everything and not options.keep_checkpoints:
        yield from (_item(path, OLDER, status.path) for path in _older(checkpoints))
    for path in (*status.path.glob(".writing*"), *status.path.glob(".nodes")):
        yield _item(path, LEFT_OVER, status.path)


def _weights(run_dir: Path) -> list[Path]:
    """The exported weights, where the result names some."""
    result = read_json(run_dir / "result.json")
    return sorted(run_dir.glob("*.safetensors")) if isinstance(result, dict) and result.get("weights_sha256") else []


def weights_are_whole(run_dir: Path) -> bool:
    """Whether a file of exported weights is the one that the result names."""
    expected = read_json(run_dir / "result.json")["weights_sha256"]
    return any(sha256(path) == expected for path in _weights(run_dir))


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_milestone(checkpoint: Path) -> bool:
    """One that its run was told to keep."""
    marker: Any = read_json(checkpoint / "checksums.json")
    return isinstance(marker, dict) and marker.get("milestone") is True


def _older(checkpoints: Path) -> list[Path]:
    """All but the newest checkpoint, where that one has every file that its `checksums.json` names, in its size."""
    steps = sorted((int(path.name[5:]), path) for path in checkpoints.glob("step_*") if path.name[5:].isdigit())
    if not steps:
        return []
    newest = steps[-1][1]
    marker: Any = read_json(newest / "checksums.json")
    files = marker.get("files") if isinstance(marker, dict) else None
    is_whole = files and all(
        (newest / name).is_file() and (newest / name).stat().st_size == about["bytes"] for name, about in files.items()
    )
    return [path for _, path in steps[:-1]] if is_whole else []


def _unused_code(job_dir: Path) -> Iterator[Path]:
    """Snapshots, their changes and lists of packages that no run's spec names; one that was just made may be about to be."""
    used = set()
    for path in job_dir.glob("*/*/spec.json"):
        code = (read_json(path) or {}).get("code", {})
        used |= {code.get("hash"), f"environment-{code.get('environment')}"}
    for path in (job_dir / ".equihpc" / "code").glob("*"):
        name = path.name.removeprefix(".").partition(".")[0]
        if name not in used and path.lstat().st_mtime < time.time() - CODE_SECONDS:
            yield path


def _features(job_dir: Path, min_seconds: float) -> Iterator[Path]:
    """Entries of the job's caches that were last used so long ago."""
    for cache in job_dir.glob(f"*/{CACHE}"):
        entries = [path for path in cache.iterdir() if (path / CACHE_LOCK).is_file()] if cache.is_dir() else []
        yield from (path for path in entries if (path / CACHE_LOCK).stat().st_mtime <= time.time() - min_seconds)


def _finished_arrays(job_dir: Path) -> Iterator[Path]:
    journal = Journal.of_job(job_dir)
    for array in journal.submitted():
        folder = journal.folder / "slurm" / array.uid
        if folder.is_dir() and array.elements and all(RunFolder(Path(run)).is_complete for element in array.elements for run in element):
            yield folder


def _item(path: Path, kind: str, run: Path | None = None) -> Item:
    num_bytes, inodes = size_of(path)
    return Item(path, kind, num_bytes, inodes, run)


def size_of(path: Path) -> tuple[int, int]:
    """(bytes, inodes) of a folder or file; links are not followed. What vanishes meanwhile does not count."""
    try:
        about = path.lstat()
        inside = list(os.scandir(path)) if path.is_dir() and not path.is_symlink() else []
    except FileNotFoundError:
        return 0, 0
    sizes = [size_of(Path(entry)) for entry in inside]
    own = 0 if path.is_dir() else about.st_size
    return own + sum(size for size, _ in sizes), 1 + sum(inodes for _, inodes in sizes)


def remove(job_dir: Path, shown: Sequence[Item], options: Options) -> tuple[list[Item], list[str]]:
    """(what was removed, why something was not). Only what was shown and still may go; nothing can be submitted meanwhile."""
    removed, notes = [], []
    with locked(job_dir / ".equihpc" / "lock"):
        still = {item.path for item in find(job_dir, options)}
        for item in shown:
            if item.path not in still:
                notes.append(f"{item.path}: its run has started, or somebody else removed it")
            elif problem := _remove(item):
                notes.append(problem)
            else:
                removed.append(item)
    return removed, notes


def _remove(item: Item) -> str:
    if item.kind in (FEATURES, ALL_FEATURES):
        with locked(item.path / CACHE_LOCK, wait=False) as free:  # another job's evaluation may use them
            if free:
                shutil.rmtree(item.path)
        return "" if free else f"{item.path}: an evaluation uses these features"
    if item.run is None:
        shutil.rmtree(item.path) if item.path.is_dir() else item.path.unlink()
        return ""
    with locked(RunFolder(item.run).lock, wait=False) as free:
        if not free:
            return f"{item.path}: the run is being executed"
        if item.kind == OPTIMIZER and not weights_are_whole(item.run):
            return f"{item.path} is kept: no exported weights in {item.run} have the sha256 that result.json names"
        gone = item.path.with_name(f".writing-gone-{item.path.name}")  # half removed it must not look whole
        item.path.rename(gone)
        shutil.rmtree(gone)
    return ""


def totals(items: Iterable[Item]) -> dict[str, tuple[int, int, int]]:
    """Kind -> (items, bytes, inodes)."""
    found: dict[str, tuple[int, int, int]] = {}
    for item in items:
        count, num_bytes, inodes = found.get(item.kind, (0, 0, 0))
        found[item.kind] = count + 1, num_bytes + item.num_bytes, inodes + item.inodes
    return found
