"""What every run of a job is doing: its folder, the ledger, the journal and one question to Slurm, put together."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hpc import local, slurm
from hpc.errors import UserError
from hpc.files import read_json
from hpc.journal import Journal
from hpc.messages import choices_text
from hpc.runs import Ledger, RunFolder, state_of


@dataclass(frozen=True, slots=True)
class Record:
    """What is written down of a planned run."""

    id: str
    hash: str
    stage: str
    params: dict[str, Any]
    after: list[str]
    num_steps: int


@dataclass(slots=True)
class RunStatus:
    record: Record
    path: Path
    state: str
    step: int = 0
    num_steps: int = 0
    attempts: int = 0
    cause: str = ""
    progress: dict[str, Any] = field(default_factory=dict)
    slurm_name: str | None = None
    held_seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """The stable keys, and a few more."""
        record = self.record
        return {
            "id": record.id,
            "stage": record.stage,
            "params": record.params,
            "state": self.state,
            "step": self.step,
            "num_steps": self.num_steps,
            "attempts": self.attempts,
            "path": str(self.path),
            "cause": self.cause,
            "slurm_job": self.slurm_name,
        }


@dataclass(frozen=True, slots=True)
class JobRecord:
    """`RUNS/JOB/.equihpc/job.json`: the newest submission's plan, for commands that get a name instead of a file."""

    name: str
    file: str
    cluster: str
    slurm_conf: str | None
    ledger: str
    report: dict[str, Any]
    records: list[Record]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def read(cls, job_dir: Path) -> JobRecord:
        data = read_json(job_dir / ".equihpc" / "job.json")
        if not isinstance(data, dict):
            known = job_names(job_dir.parent)
            raise UserError(f"there is no job {job_dir.name!r} in {job_dir.parent}; {choices_text(job_dir.name, known)}")
        return cls(**{**data, "records": [Record(**record) for record in data["records"]]})


def job_names(runs_dir: Path) -> list[str]:
    return sorted(path.parent.parent.name for path in runs_dir.glob("*/.equihpc/job.json"))


def collect(job_dir: Path, records: Iterable[Record], ledger: Ledger) -> tuple[list[RunStatus], str]:
    """Statuses in the records' order (upstream first) and a note where Slurm's answer is missing. One Slurm query."""
    journal = Journal.of_job(job_dir)
    names: dict[str, tuple[str, str | None]] = {}
    for array in journal.submitted():
        for index, element in enumerate(array.elements):
            for run_dir in element:
                names[run_dir] = (array.name(index), array.slurm_conf)
    queue: slurm.Queue = {}
    note = ""
    for conf in {conf for _, conf in names.values()}:
        found, problem = slurm.query((name.partition("_")[0] for name, other in names.values() if other == conf), conf)
        queue, note = {**queue, **found}, note or problem
    local_runs = journal.local_runs() if local.alive(job_dir) else {}
    statuses: dict[str, RunStatus] = {}
    for record in records:
        path = job_dir / record.stage / record.id
        run = RunFolder(path)
        name, entry = None, None
        word: str | None = None
        if str(path) in names:
            name = names[str(path)][0]
            entry = queue.get(name)
            word = entry.state if entry and entry.state != "ended" else None
        attempts = run.read_attempts()
        if str(path) in local_runs:
            end = attempts[-1].end if attempts else None
            over = end is not None and end["time"] > local_runs[str(path)] and end["outcome"] != "crashed"
            word = "running" if attempts and end is None else None if over else "pending"
        known = record.hash in ledger and bool(ledger.read(record.hash).get("result")) if not run.spec.exists() else False
        upstream = [statuses[after] for after in record.after if after in statuses]
        state = state_of(
            run,
            known=known,
            queue=word,
            upstream_states=[status.state for status in upstream],
            upstream=[status.path for status in upstream],
        )
        progress = read_json(run.progress) or {}
        status = RunStatus(
            record,
            path,
            state,
            step=int(progress.get("step", 0)),
            num_steps=int(progress.get("num_steps", record.num_steps)),
            attempts=len(attempts),
            cause=attempts[-1].cause if attempts and state in ("failed", "requeued", "cancelled", "planned") else "",
            progress=progress,
            slurm_name=name if entry else None,
            held_seconds=entry.held_seconds if entry else 0.0,
        )
        statuses[record.id] = status
    return list(statuses.values()), note


HOLD_SECONDS = 5.0


def lift_holds(statuses: Sequence[RunStatus], slurm_conf: str | None) -> None:
    """A requeued job is held for about two minutes; any live equihpc process may start it where the site permits.

    Not at once: a credential made within the second of the requeue is taken for the revoked one, and the job dies.
    """
    for status in statuses:
        if status.held_seconds > HOLD_SECONDS and status.slurm_name and status.attempts:
            try:
                slurm.start_now(status.slurm_name, slurm_conf)
            except slurm.SlurmError:
                return  # not permitted here: the hold ends by itself


def eta_seconds(status: RunStatus) -> float | None:
    """Time left of a running run by its own word, counted down since it said so."""
    eta, when = status.progress.get("eta_s"), status.progress.get("time")
    if status.state != "running" or eta is None or when is None:
        return None
    return max(0.0, float(eta) - (time.time() - float(when)))
