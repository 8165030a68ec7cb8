"""What a submission does with each run of the file, and with those that are no longer in it. Nothing is written here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from hpc.cluster import Cluster
from hpc.plan import Plan, Run, arrays
from hpc.runs import RunFolder
from hpc.status import JobRecord, Record, job_names


def before(job_dir: Path) -> JobRecord | None:
    """The newest submission's record, None for a job that was never submitted."""
    return JobRecord.read(job_dir) if (job_dir / ".equihpc" / "job.json").exists() else None


def former(old: JobRecord | None, plan: Plan, job_dir: Path) -> list[Record]:
    """Runs of earlier submissions that have a folder and are not in the file any more."""
    if old is None:
        return []
    present = {run.hash for run in plan.runs}
    gone = {record.hash: record for record in (*old.former, *old.records) if record.hash not in present}
    return [record for record in gone.values() if (job_dir / record.stage / record.id / "spec.json").exists()]


def reidentified(old: JobRecord | None, plan: Plan, job_dir: Path) -> list[Record]:
    """Runs, complete or on their way, of which the file says the same but which would get another identity: the code or data changed."""
    if old is None:
        return []
    present = {run.hash for run in plan.runs}
    given = {(run.stage, run.given) for run in plan.runs}
    return [
        record
        for record in {record.hash: record for record in (*old.former, *old.records)}.values()
        if record.hash not in present
        and record.given
        and (record.stage, record.given) in given
        and _is_worth(RunFolder(job_dir / record.stage / record.id))
    ]


def _is_worth(run: RunFolder) -> bool:
    attempts = run.read_attempts()
    return run.is_complete or (bool(attempts) and attempts[-1].outcome in ("", "stopped", "crashed"))


def shared_with(job_dir: Path) -> dict[str, str]:
    """Run hash -> another job whose file contains that run too."""
    return {
        record.hash: name
        for name in job_names(job_dir.parent)
        if name != job_dir.name
        for record in JobRecord.read(job_dir.parent / name).records
    }


def prefix(ready: Sequence[Run], fits: Callable[[list[Run]], bool]) -> list[Run]:
    """As many runs as fit, the more important ones first, each with what it builds on and then what builds on it."""
    roots: dict[str, int] = {}
    for run in ready:
        roots[run.hash] = max([roots[up.hash] for up in run.upstream.values() if up.hash in roots], default=len(roots))
    ordered = sorted(ready, key=lambda run: roots[run.hash])  # stable: upstream stays first
    if fits(ordered):
        return list(ready)
    low, high = 0, len(ordered)  # the first `low` fit, the first `high` do not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(ordered[:middle]) else (low, middle)
    chosen = {run.hash for run in ordered[:low]}
    return [run for run in ready if run.hash in chosen]


def num_elements(runs: Iterable[Run], cluster: Cluster, in_flight: Mapping[str, str], chain: Callable[[Run], int]) -> int:
    """Elements that Slurm would count."""
    return sum(max(chain(run) for run in array.runs) * len(array.elements) for array in arrays(runs, cluster, in_flight) if array.runs)
