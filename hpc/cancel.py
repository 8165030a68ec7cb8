"""Ending runs for good: they are `cancelled` until somebody asks for them again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hpc import slurm
from hpc.journal import Journal
from hpc.runs import RunFolder
from hpc.status import RunStatus

BUSY = ("pending", "running", "requeued")


def cancel(job_dir: Path, slurm_conf: str | None, statuses: Sequence[RunStatus]) -> list[RunStatus]:
    """Cancels those that are pending or running and returns them. Raises SlurmError when scancel fails.

    Each gets a mark in its folder, which its supervisor obeys and which outlives a requeue; a Slurm job whose every run is
    marked is cancelled too. Runs that are linked from another job are that job's to cancel.
    """
    chosen = [status for status in statuses if status.state in BUSY and status.is_of(job_dir)]
    for status in chosen:
        RunFolder(status.path).cancel_mark.touch(mode=0o600)
    paths = {str(status.path.resolve()) for status in chosen}
    queue = slurm.query(slurm_conf)[0] if any(status.slurm_name for status in chosen) else {}
    gone = [
        array.name(index)
        for array in Journal.of_job(job_dir).submitted(queue)
        for index, element in enumerate(array.elements)
        if array.name(index) in queue
        and not paths.isdisjoint(element)
        and all(path in paths or RunFolder(Path(path)).cancel_mark.exists() or RunFolder(Path(path)).is_complete for path in element)
    ]
    slurm.cancel(gone, slurm_conf)
    return chosen


def hold(job_dir: Path, slurm_conf: str | None, statuses: Sequence[RunStatus]) -> list[str]:
    """Runs that are not complete do not start (again) until they are released; returns their ids.

    What shares a Slurm job with them, packed on one node, is held with them.
    """
    chosen = [status for status in statuses if status.state != "complete" and status.is_of(job_dir)]
    names, folders = _elements(job_dir, slurm_conf, chosen)
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        RunFolder(folder).hold_mark.touch()
    slurm.hold(names, slurm_conf)
    return [folder.name for folder in folders]


def release(job_dir: Path, slurm_conf: str | None, statuses: Sequence[RunStatus]) -> list[str]:
    """Let held runs start, with what shares a Slurm job with them; returns their ids."""
    chosen = [status for status in statuses if RunFolder(status.path).hold_mark.exists() and status.is_of(job_dir)]
    names, folders = _elements(job_dir, slurm_conf, chosen)
    for folder in folders:
        RunFolder(folder).hold_mark.unlink(missing_ok=True)
    slurm.release(names, slurm_conf)
    return [folder.name for folder in folders]


def _elements(job_dir: Path, slurm_conf: str | None, chosen: Sequence[RunStatus]) -> tuple[list[str], list[Path]]:
    """(Slurm's names of the jobs that carry these runs, later segments too; the runs with their unfinished neighbours there)."""
    folders = {status.path.resolve(): None for status in chosen}
    names = []
    queue = slurm.query(slurm_conf)[0] if any(status.slurm_name for status in chosen) else {}
    for array in Journal.of_job(job_dir).submitted(queue):
        for index, element in enumerate(array.elements):
            if array.name(index) in queue and any(Path(path) in folders for path in element):
                names.append(array.name(index))
                folders |= {Path(path): None for path in element if not RunFolder(Path(path)).is_complete}
    return names, list(folders)


def throttle(job_dir: Path, slurm_conf: str | None, elements: int) -> list[str]:
    """Job ids of the arrays in the queue of which now at most `elements` run at once (0: no limit)."""
    queue = slurm.query(slurm_conf)[0]
    arrays = [
        array.job_id
        for array in Journal.of_job(job_dir).submitted(queue)
        if len(array.elements) > 1 and any(array.name(index) in queue for index in range(len(array.elements)))
    ]
    slurm.throttle(arrays, elements, slurm_conf)
    return arrays
