"""Ending runs for good: they are `cancelled` until somebody asks for them again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hpc import slurm
from hpc.journal import Journal
from hpc.runs import RunFolder
from hpc.status import JobRecord, RunStatus

BUSY = ("pending", "running", "requeued")


def cancel(job_dir: Path, job: JobRecord, statuses: Sequence[RunStatus]) -> list[RunStatus]:
    """Cancels those that are pending or running and returns them. Raises SlurmError when scancel fails.

    Each gets a mark in its folder, which its supervisor obeys and which outlives a requeue; a Slurm job whose every run is
    marked is cancelled too. Runs that are linked from another job are that job's to cancel.
    """
    chosen = [status for status in statuses if status.state in BUSY and not status.path.is_symlink()]
    for status in chosen:
        RunFolder(status.path).cancel_mark.touch(mode=0o600)
    paths = {str(status.path) for status in chosen}
    alive = {status.slurm_name for status in chosen}
    gone = [
        array.name(index)
        for array in Journal.of_job(job_dir).submitted()
        for index, element in enumerate(array.elements)
        if array.name(index) in alive
        and not paths.isdisjoint(element)
        and all(path in paths or RunFolder(Path(path)).cancel_mark.exists() or RunFolder(Path(path)).is_complete for path in element)
    ]
    slurm.cancel(gone, job.slurm_conf)
    return chosen
