"""What happened to a run, attempt by attempt, and what will happen next, in words."""

from __future__ import annotations

import pwd
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpc import slurm
from hpc.budget import CODE_ERROR, kind_of
from hpc.journal import Journal
from hpc.runs import Attempt, RunFolder
from hpc.status import MAX_LAUNCHES, NOT_STARTED, JobRecord, RunStatus, eta_seconds
from hpc.view import duration

REQUEUE_HOLD_SECONDS = 120.0  # Slurm's usual one: the lifetime of a credential
ERROR_LINES = 12
WORDS = {
    "NODE_FAIL": "its node failed",
    "OUT_OF_MEMORY": "out of memory",
    "TIMEOUT": "time limit",
    "PREEMPTED": "preempted",
    "REQUEUED": "requeued",
    "BOOT_FAIL": "its node did not boot",
    "DEADLINE": "its deadline passed",
    "COMPLETED": "ended with exit code 0",
}


@dataclass(slots=True)
class Story:
    """`accounts`: attempt number -> what Slurm's accounting says of an attempt that left no end; `jobs`: of jobs that never
    began to execute the run; `note`: where the accounting does not answer."""

    status: RunStatus
    attempts: list[Attempt]
    next: str
    accounts: dict[int, str] = field(default_factory=dict)
    jobs: dict[str, str] = field(default_factory=dict)
    note: str = ""

    @property
    def logs(self) -> list[Path]:
        return sorted(self.status.path.glob("node_*.log"))

    def to_step(self, attempt: Attempt) -> int:
        """Where the next attempt went on; for the newest, how far it came."""
        following = [other.start["step"] for other in self.attempts if other.number > attempt.number]
        return int(following[0]) if following else self.status.step

    def cause(self, attempt: Attempt) -> str:
        return attempt.cause or self.accounts.get(attempt.number, "") or (attempt.asked and f"asked to end: {attempt.asked}")

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.status.record.id,
            "state": self.status.state,
            "cause": self.status.cause,
            "next": self.next,
            "note": self.note,
            "attempts": [
                {
                    **attempt.start,
                    "outcome": attempt.outcome,
                    "kind": (attempt.end or {}).get("kind"),
                    "cause": self.cause(attempt),
                    "message": (attempt.end or {}).get("message", ""),
                    "ended": (attempt.end or {}).get("time"),
                    "to_step": self.to_step(attempt),
                }
                for attempt in self.attempts
            ],
            "jobs": self.jobs,
            "logs": [str(path) for path in self.logs],
        }


def tell(status: RunStatus, statuses: Sequence[RunStatus], job: JobRecord) -> Story:
    """The story of a run of `job`. The accounting is asked once, and only where the run's folder leaves something open."""
    attempts = RunFolder(status.path).read_attempts()
    story = Story(status, attempts, next_step(status, attempts, statuses, job))
    submitted = _last_job(status.path)
    open_ends = {
        attempt.number: str(attempt.start["job"])
        for attempt in attempts
        if attempt.end is None and attempt.start.get("job") and not (status.state == "running" and attempt is attempts[-1])
    }
    times = [attempt.start["time"] for attempt in attempts if attempt.number in open_ends]
    vanished: set[str] = set()
    if submitted and status.state == "planned" and all(attempt.start.get("job") != submitted[0] for attempt in attempts):
        vanished.add(submitted[0].partition("_")[0])  # the whole array: what never began is not found by its index
        times.append(submitted[1])
    if not times:
        return story
    try:
        rows = slurm.accounting({*open_ends.values(), *vanished}, min(times), job.slurm_conf)
    except slurm.SlurmError as error:
        story.note = f"accounting does not answer ({' '.join(str(error).split())}): how these attempts ended is not known"
        return story
    for number, name in open_ends.items():
        began = next(attempt.start["time"] for attempt in attempts if attempt.number == number)
        # of the executions of a job, the newest that began before the attempt did; clocks of nodes differ a little
        if found := [row for row in rows if row.name == name and row.start is not None and row.start <= began + 5]:
            story.accounts[number] = account_text(found[-1])
    if vanished and submitted and (found := [row for row in rows if row.is_of(submitted[0])]):
        story.jobs[submitted[0]] = account_text(found[-1])
    return story


def account_text(row: slurm.Account) -> str:
    """Words for what sacct says, with Slurm's own beside them."""
    state, _, by = row.state.partition(" by ")
    if state == "CANCELLED":
        words = f"cancelled by {_user(by)}" if by else "cancelled"
    elif state == "FAILED":
        words = f"ended with exit code {row.exit_code.partition(':')[0]}"
    else:
        words = WORDS.get(state, "")
    where = f" on {row.nodes}" if row.nodes not in ("", "None assigned") else ""
    return f"{words} (Slurm: {state}{where})" if words else f"Slurm: {state}{where}"


def _user(uid: str) -> str:
    try:
        return pwd.getpwuid(int(uid)).pw_name
    except (KeyError, ValueError):
        return f"user {uid}"


def _last_job(path: Path) -> tuple[str, float] | None:
    """(Slurm's name, time of submission) of the newest job that was given the run."""
    real = path.resolve()
    found = None
    for array in Journal.of_job(real.parent.parent).submitted():
        for index, element in enumerate(array.elements):
            if str(real) in element:
                found = array.name(index), array.time
    return found


def next_step(status: RunStatus, attempts: Sequence[Attempt], statuses: Sequence[RunStatus], job: JobRecord) -> str:
    """What will happen next without anybody's doing, and what somebody has to do where nothing will."""
    run, submit = RunFolder(status.path), job.command
    goes_on = f"from step {run.saved_step}" if run.saved_step else "from the beginning"
    if run.hold_mark.exists() and status.state not in ("running", "complete"):
        return f"held: equihpc release {status.record.id} lets it start"
    upstream = {other.record.id: other for other in statuses if other.record.id in status.record.after}
    open_upstream = [f"{other.record.id} ({other.state})" for other in upstream.values() if other.state != "complete"]
    match status.state:
        case "complete":
            return "complete: nothing more"
        case "running":
            where = f"Slurm job {status.slurm_name}" if status.slurm_name else "the local runner"
            left = f", about {duration(eta)} left" if (eta := eta_seconds(status)) is not None else ""
            return f"runs in {where}: step {status.step} of {status.num_steps}{left}; killed without warning it would go on {goes_on}"
        case "requeued" | "pending":
            return _waits(status, open_upstream, goes_on)
        case "failed":
            return f"failed: {_after_failure(status.cause, attempts, submit, goes_on)}"
        case "skipped":
            bad = [f"{other.record.id} is {other.state}" for other in upstream.values() if other.state not in ("complete", "running")]
            return f"skipped: its upstream {', '.join(bad) or 'is not complete'}; when that is mended, {submit} starts both"
        case "blocked":
            return f"blocked: {status.cause}; {submit} starts it when that is there"
        case "cancelled":
            return f"cancelled: {submit} --retry cancelled goes on {goes_on}"
        case "purged":
            return f"purged: its folder is gone, its result stands in the ledger; {submit} --retry purged runs it again"
        case "stale":
            return f"stale: {status.cause or 'what it was made from has changed'}; {submit} runs it again"
    if status.cause.startswith(NOT_STARTED):
        return f"{status.cause}, and no job carries it any more: when the nodes are mended, {submit} goes on {goes_on}"
    if attempts:
        return f"no job carries it any more: {submit} goes on {goes_on}"
    return f"not in the queue: {submit} starts it"


def _waits(status: RunStatus, open_upstream: Sequence[str], goes_on: str) -> str:
    word = f"requeued, goes on {goes_on}" if status.state == "requeued" else "pending"
    if status.slurm_name is None:
        return f"{word}: waits for " + (f"the run {', '.join(open_upstream)}" if open_upstream else "room on this machine")
    if "Dependency" in status.slurm_state or (open_upstream and status.state == "pending"):
        return f"{word}: Slurm job {status.slurm_name} waits for the run {', '.join(open_upstream) or '(complete by now)'}"
    if status.failed_launches:
        failed = f"its nodes could not start it ({status.failed_launches} of {MAX_LAUNCHES} times)"
        return f"{word}: Slurm holds job {status.slurm_name}, {failed}; equihpc status lets it try again, as submit --wait does"
    if status.held_seconds:
        left = REQUEUE_HOLD_SECONDS - status.held_seconds
        return f"{word}: waits for Slurm job {status.slurm_name}, held " + (f"about {left:.0f} s more" if left > 0 else "a little longer")
    return f"{word}: waits for Slurm job {status.slurm_name}, {status.slurm_state}"


def _after_failure(cause: str, attempts: Sequence[Attempt], submit: str, goes_on: str) -> str:
    if cause.startswith("budget:"):
        return f"{cause}; it is not tried again by itself, {submit} --retry failed starts it anew"
    if cause.startswith("disk full"):
        return f"{cause}; make room, for example with equihpc gc, then {submit}"
    if attempts and kind_of(attempts[-1]) != CODE_ERROR:
        return f"{cause}; no job carries it any more, {submit} goes on {goes_on}"
    return f"{cause}; an error of the code is not tried again: mend it, then {submit}"


def code_text(code: Mapping[str, Any]) -> str:
    """`code abc123 (commit 0123456789ab with changes)`."""
    if not code:
        return ""
    commit = f" (commit {code['commit'][:12]}{' with changes' if code.get('dirty') else ''})" if code.get("commit") else ""
    return f"code {code.get('hash', '?')}{commit}"


def attempt_text(story: Story, attempt: Attempt) -> str:
    """One line of the timeline."""
    import datetime

    start, end = attempt.start, attempt.end
    began = datetime.datetime.fromtimestamp(start["time"]).isoformat(" ", "seconds")
    nodes = start.get("nodes") or start.get("host", "?")
    job = f", Slurm job {start['job']}" if start.get("job") else ""
    took = f" after {duration(end['time'] - start['time'])}" if end else ""
    is_running = end is None and story.status.state == "running" and attempt is story.attempts[-1]
    outcome = attempt.outcome or ("running" if is_running else "no end recorded")
    cause = f": {cause}" if (cause := story.cause(attempt)) else ""
    code = f", {code}" if (code := code_text(start.get("code") or {})) else ""
    steps = f"step {start['step']} to {story.to_step(attempt)}"
    return f"{attempt.number}. {began} on {nodes}{job}, {steps}{code}: {outcome}{took}{cause}"


def error_text(attempt: Attempt) -> str:
    """The last lines of what an attempt said at its end."""
    lines = str((attempt.end or {}).get("message", "")).rstrip().splitlines()
    return "\n".join((["…"] if len(lines) > ERROR_LINES else []) + lines[-ERROR_LINES:])
