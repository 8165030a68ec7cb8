"""Ceilings of a run and of a job: what an attempt counts as, what is reached, and the record of an attempt's end.

Time limits, preemptions, node failures and code errors are counted apart, so that a busy cluster uses up nobody's patience
with a broken program. Node failures and code errors are tolerated so many times; the other ceilings end the run when reached.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from hpc.files import read_json
from hpc.runs import Attempt, RunFolder, end_attempt, start_attempt
from hpc.spec import Budgets, Notify

TIME_LIMIT, PREEMPTION, NODE_FAILURE, CODE_ERROR = "time limit", "preemption", "node failure", "code error"
OTHER = "other"  # complete, interrupted, cancelled, disk full: limited by `attempts` alone
NOTHING = "nothing"  # it did not execute: its upstream was not ready, or a ceiling was reached


class Verdict(NamedTuple):
    """How an attempt ended. `outcome` as in `runs.end_attempt`; `node` is the one to blame, where one is."""

    outcome: str
    kind: str
    cause: str
    message: str = ""
    node: str = ""


class Place(Protocol):
    """Of a run within its job; `status.Record` is one."""

    @property
    def stage(self) -> str: ...
    @property
    def id(self) -> str: ...


@dataclass(frozen=True)
class Rules:
    """What the newest submission of a job said; it holds for what is in flight too."""

    budgets: Budgets
    notify: Notify | None
    requeue: str
    node_memory_hours: float

    @classmethod
    def read(cls, job_dir: Path) -> Rules:
        """Defaults stand for what is missing."""
        rules = (read_json(job_dir / ".equihpc" / "job.json") or {}).get("rules", {})
        notify = rules.get("notify")
        return cls(
            Budgets.model_validate(rules.get("budgets", {})),
            Notify.model_validate(notify) if notify else None,
            rules.get("requeue", "self"),
            float(rules.get("node_memory_hours", 24.0)),
        )


def kind_of(attempt: Attempt) -> str:
    """What the attempt counts as. One without an end counts as a node failure, unless it had been asked to end."""
    if attempt.end is not None and "kind" in attempt.end:
        return str(attempt.end["kind"])
    cause = attempt.cause or attempt.asked
    if cause in ("time limit", "preempted"):
        return TIME_LIMIT if cause == "time limit" else PREEMPTION
    return {"crashed": NODE_FAILURE, "": NODE_FAILURE, "failed": CODE_ERROR, "waiting": NOTHING}.get(attempt.outcome, OTHER)


def reached(attempts: Sequence[Attempt], saved_step: int, budgets: Mapping[str, Any]) -> str | None:
    """The ceiling that a run has reached, with the numbers; None while it may go on. A ceiling of None is none."""
    kinds = [(attempt, kind_of(attempt)) for attempt in attempts if not attempt.forgiven]
    kinds = [(attempt, kind) for attempt, kind in kinds if kind != NOTHING]
    if not kinds:
        return None

    def count(*wanted: str) -> list[Attempt]:
        return [attempt for attempt, kind in kinds if kind in wanted]

    def last(found: Sequence[Attempt]) -> str:
        end = found[-1].end or {}
        return str(end.get("was") or found[-1].cause or found[-1].asked or "ended without a word")

    furthest = max(attempt.start["step"] for attempt, _ in kinds)
    begun = next(position for position, (attempt, _) in enumerate(kinds) if attempt.start["step"] == furthest)
    restarts = [attempt for attempt, kind in kinds[begun:] if kind in (TIME_LIMIT, NODE_FAILURE)]
    if saved_step <= furthest and len(restarts) >= budgets["without_progress"]:
        return f"budget: {len(restarts)} restarts without a new checkpoint; the last one: {last(restarts)}"
    for kind, name, is_tolerated in (
        (CODE_ERROR, "code_errors", True),
        (NODE_FAILURE, "node_failures", True),
        (TIME_LIMIT, "time_limits", False),
        (PREEMPTION, "preemptions", False),
    ):
        found, ceiling = count(kind), budgets[name]
        if ceiling is not None and len(found) >= ceiling + is_tolerated:
            return f"budget: {len(found)} {kind}s, {name} is {ceiling}; the last one: {last(found)}"
    ceiling = budgets["attempts"]
    if ceiling is not None and len(kinds) >= ceiling:
        return f"budget: {len(kinds)} attempts, attempts is {ceiling}; the last one: {last([attempt for attempt, _ in kinds])}"
    return None


def used_hours(job_dir: Path, records: Iterable[Place], now: float | None = None) -> float:
    """GPU hours (process hours without GPUs) of all attempts so far, running ones too. One small file is read per run.

    Runs that are linked from another job are that job's.
    """
    now = time.time() if now is None else now
    seconds = 0.0
    for record in records:
        run = RunFolder(job_dir / record.stage / record.id)
        if run.path.is_symlink() and run.path.resolve().parent.parent != job_dir.resolve():
            continue
        for attempt in run.read_attempts():
            began = attempt.start["time"]
            ended = attempt.end["time"] if attempt.end else min(now, max(began, run.last_sign))
            seconds += (ended - began) * attempt.start.get("processes", 1)
    return seconds / 3600


def may_start(run: RunFolder) -> str | None:
    """Why the next attempt must not start, None where it may. An exception may be mended by now: it does not count here."""
    job_dir = run.path.parent.parent
    budgets = Rules.read(job_dir).budgets
    reason = reached(run.read_attempts(), run.saved_step, {**budgets.model_dump(), "code_errors": None})
    if reason is None and budgets.gpu_hours is not None:
        from hpc.status import JobRecord  # imports the local runner, which imports the supervisor, which imports this

        job = JobRecord.read(job_dir)
        used = used_hours(job_dir, [*job.records, *job.former])
        if used >= budgets.gpu_hours:
            return f"budget: the job's {budgets.gpu_hours:g} GPU hours are used up ({used:.2f} so far)"
    return reason


def refuse(run: RunFolder, reason: str, record: Mapping[str, Any]) -> None:
    """The record of an attempt that did not start."""
    end_attempt(run, start_attempt(run, record), "failed", reason, kind=NOTHING)


def settle(run: RunFolder, number: int, verdict: Verdict, when: float | None = None) -> str:
    """Write the end of an attempt; returns its outcome: `failed` where a ceiling is reached, `crashed` for what is tried again."""
    budgets = Rules.read(run.path.parent.parent).budgets
    outcome, kind, cause, message, node = verdict
    more: dict[str, Any] = {"kind": kind, "node": node}
    if when is not None:
        more["time"] = when
    if kind in (TIME_LIMIT, PREEMPTION, NODE_FAILURE, CODE_ERROR):
        attempts = run.read_attempts()
        end = {"outcome": outcome, "cause": cause, **more}
        ended = [replace(attempt, end=end) if attempt.number == number else attempt for attempt in attempts]
        reason = reached(ended, run.saved_step, budgets.model_dump())
        if reason is not None:
            outcome = "failed"
            if kind != CODE_ERROR or budgets.code_errors:
                more["was"], cause = cause, reason
        elif kind == CODE_ERROR:
            outcome = "crashed"
    end_attempt(run, number, outcome, cause, message, **more)
    return outcome
