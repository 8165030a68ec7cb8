"""A bug was fixed: move unfinished runs to today's code, and mark the results that it spoiled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpc import entries, snapshot
from hpc.errors import UserError
from hpc.files import read_json, write_atomic, write_json
from hpc.journal import Journal
from hpc.runs import Ledger, RunFolder
from hpc.status import JobRecord, RunStatus

UNFINISHED = ("pending", "running", "requeued", "failed", "cancelled", "planned", "skipped")


def rebase(job_dir: Path, statuses: Sequence[RunStatus]) -> tuple[dict[str, Any], list[RunStatus]]:
    """(the snapshot of today's code, the runs whose next attempt uses it). Runs that another job owns are left to it.

    The batch scripts keep their own supervisor code: only what the ranks run changes.
    """
    chosen = [s for s in statuses if s.state in UNFINISHED and RunFolder(s.path).spec.exists() and s.is_of(job_dir)]
    specs = [read_json(RunFolder(status.path).spec) for status in chosen]
    used = {spec["entry"] for spec in specs}
    for entry in used:
        entries.config_class(entry)  # raises UserError where today's code cannot even be imported
    code = snapshot.take(snapshot.packages_of(used), job_dir / ".equihpc" / "code")
    moved = []
    for status, spec in zip(chosen, specs, strict=True):
        if spec["code"]["hash"] != code["hash"]:
            write_json(RunFolder(status.path).spec, {**spec, "code": code})
            moved.append(status)
    Journal.of_job(job_dir).add("rebase", code=code["hash"], commit=code["commit"], runs=[status.record.id for status in moved])
    return code, moved


def invalidate(statuses: Sequence[RunStatus], because: str | None) -> None:
    """Mark the results as spoiled, or with None as valid again: in the run's folder, and in the ledger, which outlives it.

    Raises UserError for a run that has no result.
    """
    for status in statuses:
        if status.state not in ("complete", "stale", "purged"):
            raise UserError(f"{status.record.id} is {status.state}: only complete runs have a result to invalidate")
    for status in statuses:
        run, ledger = RunFolder(status.path), Ledger(Path(JobRecord.read(status.path.parent.parent).ledger))
        if known := {key: value for key, value in ledger.read(status.record.hash).items() if key != "invalid"}:
            ledger.write(status.record.hash, known if because is None else {**known, "invalid": because.strip()})
        if because is None:
            run.invalid_mark.unlink(missing_ok=True)
        elif run.is_complete:
            write_atomic(run.invalid_mark, because.strip() + "\n")
