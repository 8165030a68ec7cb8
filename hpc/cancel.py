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
    chosen = [status for status in statuses if status.state in BUSY and not status.path.is_symlink()]
    for status in chosen:
        RunFolder(status.path).cancel_mark.touch(mode=0o600)
    paths = {str(status.path) for status in chosen}
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
    """Runs that have not begun, or not ended, do not start (again) until they are released; returns their ids."""
    chosen = [status for status in statuses if status.state in (*BUSY, "planned", "failed") and not status.path.is_symlink()]
    for status in chosen:
        status.path.mkdir(parents=True, exist_ok=True)
        RunFolder(status.path).hold_mark.touch()
    slurm.hold(_in_queue(job_dir, slurm_conf, chosen), slurm_conf)
    return [status.record.id for status in chosen]


def release(job_dir: Path, slurm_conf: str | None, statuses: Sequence[RunStatus]) -> list[str]:
    chosen = [status for status in statuses if RunFolder(status.path).hold_mark.exists() and not status.path.is_symlink()]
    for status in chosen:
        RunFolder(status.path).hold_mark.unlink(missing_ok=True)
    slurm.release(_in_queue(job_dir, slurm_conf, chosen), slurm_conf)
    return [status.record.id for status in chosen]


def _in_queue(job_dir: Path, slurm_conf: str | None, chosen: Sequence[RunStatus]) -> list[str]:
    """Slurm's names of the elements that carry these runs, later segments too."""
    if not any(status.slurm_name for status in chosen):
        return []
    paths = {str(status.path) for status in chosen}
    queue = slurm.query(slurm_conf)[0]
    return [
        array.name(index)
        for array in Journal.of_job(job_dir).submitted(queue)
        for index, element in enumerate(array.elements)
        if array.name(index) in queue and not paths.isdisjoint(element)
    ]


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
