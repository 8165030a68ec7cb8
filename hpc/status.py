"""What every run of a job is doing: its folder, the ledger, the journal and one question to Slurm, put together."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hpc import local, slurm
from hpc.errors import UserError
from hpc.files import read_json, read_lines
from hpc.journal import Journal
from hpc.messages import choices_text
from hpc.runs import Attempt, Ledger, RunFolder, state_of

GUESTS = Path(".equihpc") / "guests.jsonl"  # in the folder of a job: other jobs that started runs of it

MAX_LAUNCHES = 4  # that fail in a row
NOT_STARTED = "its nodes could not start job"


@dataclass(frozen=True, slots=True)
class Record:
    """What is written down of a planned run."""

    id: str
    hash: str
    stage: str
    params: dict[str, Any]
    after: list[str]
    num_steps: int
    num_segments: int = 1  # estimated
    given: str = ""
    blocked: str = ""  # as at the newest submission


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
    slurm_last: str | None = None  # the last segment of a chain; otherwise the same
    held_seconds: float = 0.0
    failed_launches: int = 0  # in a row; with the one that Slurm holds it for now
    slurm_state: str = ""  # and the reason, where there is one
    segment: int = 0  # the first is 1; another begins after each time limit
    answer_is_new: bool = False  # Slurm was asked for this status, not for an earlier one
    remembered: dict[str, Any] = field(default_factory=dict)  # of a purged run, by the ledger: its result and config

    def is_of(self, job_dir: Path) -> bool:
        """Whether the run's folder is this job's; otherwise it is linked from another one."""
        return self.path.resolve().parent.parent == job_dir.resolve()

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
    former: list[Record] = field(default_factory=list)  # of earlier submissions, no longer in the file
    rules: dict[str, Any] = field(default_factory=dict)  # budgets, notify, requeue, node_memory_hours, command

    @property
    def command(self) -> str:
        """That submits the job again as it was submitted last. Of a record without it `--set` is not known."""
        if command := self.rules.get("command"):
            return str(command)
        stem, _, variant = self.name.partition(f"{Path(self.file).stem}-")
        return f"equihpc submit {self.file}" + (f" --variant {variant}" if variant and not stem else "")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def read(cls, job_dir: Path) -> JobRecord:
        data = read_json(job_dir / ".equihpc" / "job.json")
        if not isinstance(data, dict):
            known = job_names(job_dir.parent)
            raise UserError(f"there is no job {job_dir.name!r} in {job_dir.parent}; {choices_text(job_dir.name, known)}")
        lists = {key: [Record(**record) for record in data.get(key, [])] for key in ("records", "former")}
        return cls(**{**data, **lists})


def job_names(runs_dir: Path) -> list[str]:
    return sorted(path.parent.parent.name for path in runs_dir.glob("*/.equihpc/job.json"))


def collect(
    job_dir: Path, records: Iterable[Record], ledger: Ledger, ask_slurm: bool = True, max_age_seconds: float = 0.0
) -> tuple[list[RunStatus], str]:
    """Statuses in the records' order (upstream first) and a note where Slurm's answer is missing. One Slurm query, or none
    where the user's last one is at most `max_age_seconds` old; what happened after an answer counts, whatever it says.

    A run that is linked from another job is looked up in that job's journal: it is in flight once, wherever it is seen.
    """
    records = list(records)
    paths = {record.hash: (job_dir / record.stage / record.id) for record in records}
    real = {run_hash: path.resolve() if path.is_symlink() else path for run_hash, path in paths.items()}
    owners = {path.parent.parent for path in real.values()} | {job_dir}
    owners |= {owner.parent / record["job"] for owner in owners for record in read_lines(owner / GUESTS)}
    journals = {owner: Journal.of_job(owner) for owner in owners}
    queues: dict[str | None, slurm.Queue] = {}
    note = ""
    if ask_slurm:
        for conf in {conf for journal in journals.values() for conf in journal.slurm_confs()}:
            queues[conf], problem = slurm.query(conf, max_age_seconds)
            note = note or problem
    jobs: dict[str, list[tuple[str, slurm.QueueEntry | None]]] = {}  # run folder -> all jobs that ever carried it, oldest first
    local_runs: dict[str, float] = {}
    asked = max((queue.asked for queue in queues.values()), default=0.0)
    is_new = any(queue.is_new for queue in queues.values())
    for folder, journal in journals.items():
        everything = {name: entry for queue in queues.values() for name, entry in queue.items()}
        for array in journal.submitted(everything):
            for index, element in enumerate(array.elements):
                queue = queues.get(array.slurm_conf)
                entry = None if queue is None else queue.get(array.name(index))
                if queue is not None and entry is None and array.time > queue.asked:
                    entry = slurm.QueueEntry("pending", "PENDING", reason="submitted since Slurm's last answer")
                for run_dir in element:
                    jobs.setdefault(run_dir, []).append((array.name(index), entry))
        if local.alive(folder):
            local_runs |= journal.local_runs()
    statuses: dict[str, RunStatus] = {}
    for record in records:
        path = real[record.hash]
        run = RunFolder(path)
        attempts = run.read_attempts()
        name, entry, last_name = _job_of(jobs.get(str(path), []), attempts)
        word: str | None = entry.state if entry and entry.state != "ended" else None
        if word == "pending" and attempts and attempts[-1].end is None and attempts[-1].start["time"] > asked:
            word = "running"
        if str(path) in local_runs:
            end = attempts[-1].end if attempts else None
            over = end is not None and end["time"] > local_runs[str(path)] and end["outcome"] != "crashed"
            word = "running" if attempts and end is None else None if over else "pending"
        launches = run.failed_launches(name, attempts) if name else 0
        remembered = ledger.read(record.hash) if not run.spec.exists() else {}
        upstream = [statuses[after] for after in record.after if after in statuses]
        cause = ""
        state = state_of(
            run,
            known=remembered,
            queue=word,
            slurm_name=name,
            upstream_states=[status.state for status in upstream],
            upstream=[status.path for status in upstream],
        )
        if state == "complete" and run.invalid_mark.exists():
            state, cause = "stale", f"invalidated: {run.invalid_mark.read_text().strip()}"
        elif state == "stale" and "invalid" in remembered:
            cause = f"invalidated: {remembered['invalid']}"
        elif state in ("complete", "purged") and (old := [other for other in upstream if other.state == "stale"]):
            state, cause = "stale", f"{old[0].record.id} is stale"
        elif state == "planned" and record.blocked:
            state, cause = "blocked", record.blocked
        elif state == "planned" and (other := next((u for u in upstream if u.state == "blocked"), None)):
            state, cause = "blocked", f"{other.record.id} is blocked"
        elif run.hold_mark.exists() and state in ("planned", "pending", "requeued"):
            cause = "held; equihpc release lets it start"
        elif word is None and state != "complete" and launches >= MAX_LAUNCHES:
            cause = f"{NOT_STARTED} {name}, {MAX_LAUNCHES} times in a row"
        if not cause and attempts and state in ("failed", "requeued", "cancelled", "planned"):
            cause = attempts[-1].cause
        progress = read_json(run.progress) or {}
        statuses[record.id] = RunStatus(
            record,
            paths[record.hash],
            state,
            step=int(progress.get("step", 0)),
            num_steps=int(progress.get("num_steps", record.num_steps)),
            attempts=len(attempts),
            cause=cause,
            progress=progress,
            slurm_name=name if entry else None,
            slurm_last=last_name,
            held_seconds=entry.held_seconds if entry and (attempts or entry.launch_failed or launches) else 0.0,
            failed_launches=launches + 1 if entry and entry.launch_failed else 0,
            slurm_state=f"{entry.slurm_state} ({entry.reason})" if entry and entry.reason else entry.slurm_state if entry else "",
            segment=1 + sum(attempt.cause == "time limit" for attempt in attempts[:-1]) if attempts else 0,
            answer_is_new=is_new,
            remembered=remembered if state == "purged" else {},
        )
    return list(statuses.values()), note


def _job_of(
    jobs: Sequence[tuple[str, slurm.QueueEntry | None]], attempts: Sequence[Attempt]
) -> tuple[str | None, slurm.QueueEntry | None, str | None]:
    """(the job that speaks for a run, its entry in the queue, the last job in the queue that carries it).

    The one that runs, else the first that waits. A job in which the run has failed goes on for its neighbours only.
    """
    live = [(name, entry) for name, entry in jobs if entry is not None and entry.state != "ended"]
    if attempts and attempts[-1].outcome == "failed" and len(live) > 1:
        live = [(name, entry) for name, entry in live if name != attempts[-1].start.get("job")]
    if not live:
        return (*jobs[-1], None) if jobs else (None, None, None)
    name, entry = next(((name, entry) for name, entry in live if entry.state == "running"), live[0])
    return name, entry, live[-1][0]


HOLD_SECONDS = 5.0


def lift_holds(statuses: Sequence[RunStatus], slurm_conf: str | None) -> None:
    """A requeued job is held for about two minutes; any live equihpc process may start it where the site permits.

    Not at once: a credential made within the second of the requeue is taken for the revoked one, and the job dies.
    """
    new = [status for status in statuses if status.answer_is_new and status.held_seconds > HOLD_SECONDS]  # of several processes, who asked
    held = dict.fromkeys(s.slurm_name for s in new if s.slurm_name and not s.failed_launches)
    if held:
        with contextlib.suppress(slurm.SlurmError):  # not permitted here: the hold ends by itself
            slurm.start_now([name for name in held if name], slurm_conf)
    _launch_again([status for status in new if status.failed_launches and not RunFolder(status.path).hold_mark.exists()], slurm_conf)


def _launch_again(statuses: Sequence[RunStatus], slurm_conf: str | None) -> None:
    """Slurm holds for good what a node could not start, and has drained that node. Jobs that fail so again and again are given up."""
    again: dict[str, None] = {}
    hopeless: dict[str, None] = {}
    for status in statuses:
        assert status.slurm_name is not None
        (again if status.failed_launches < MAX_LAUNCHES else hopeless)[status.slurm_name] = None
        RunFolder(status.path).launch_again(status.slurm_name)
    for act, names in ((slurm.release, list(again)), (slurm.cancel, list(hopeless))):
        if names:
            with contextlib.suppress(slurm.SlurmError):  # not permitted, or gone: told by `why`
                act(names, slurm_conf)


def eta_seconds(status: RunStatus) -> float | None:
    """Time left of a running run by its own word, counted down since it said so."""
    eta, when = status.progress.get("eta_s"), status.progress.get("time")
    if status.state != "running" or eta is None or when is None:
        return None
    return max(0.0, float(eta) - (time.time() - float(when)))
