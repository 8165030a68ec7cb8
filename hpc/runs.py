"""Run folders on disk, the ledger beside them, and the state of a run from both and from the scheduler's word."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hpc.files import append_json, read_json, read_lines, write_json

PRIVATE = 0o700


@dataclass(frozen=True, slots=True)
class RunFolder:
    """`RUNS/JOB/STAGE/RUN_ID/`. Every path of it is named here."""

    path: Path

    @property
    def spec(self) -> Path:
        return self.path / "spec.json"

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def attempts(self) -> Path:
        return self.path / "attempts.jsonl"

    @property
    def progress(self) -> Path:
        return self.path / "progress.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def complete(self) -> Path:
        return self.path / "COMPLETE"

    @property
    def cancel_mark(self) -> Path:
        """There while the run is cancelled; its supervisor ends it."""
        return self.path / ".cancel"

    @property
    def hold_mark(self) -> Path:
        """There while the run is held: it is not started, one that runs goes on."""
        return self.path / ".hold"

    @property
    def invalid_mark(self) -> Path:
        """There with the reason when the result was declared spoiled."""
        return self.path / ".invalid"

    def failed_launches(self, job: str, attempts: Sequence[Attempt]) -> int:
        """How often Slurm could not start `job` on its nodes and was told to try again, since its last execution."""
        since = attempts[-1].start["time"] if attempts else 0.0
        return sum(line["job"] == job and line["time"] > since for line in read_lines(self._launches))

    def launch_again(self, job: str) -> None:
        """Slurm could not start `job` on its nodes and is told to try again."""
        append_json(self._launches, {"job": job, "time": time.time()})

    @property
    def _launches(self) -> Path:
        return self.path / ".launches.jsonl"

    def log(self, node: int) -> Path:
        return self.path / f"node_{node}.log"

    @property
    def is_complete(self) -> bool:
        return self.complete.exists()

    @property
    def saved_step(self) -> int:
        """Of the newest checkpoint, 0 without one."""
        names = (path.name.partition("_")[2] for path in (self.path / "checkpoints").glob("step_*"))
        return max((int(name) for name in names if name.isdigit()), default=0)

    @property
    def lock(self) -> Path:
        """Held by the supervisor of an execution: a run is never executed twice at once."""
        return self.path / ".lock"

    def set_aside(self, spec: Mapping[str, Any]) -> None:
        """A new execution of a run whose result no longer holds; nothing is deleted, and there is always a folder with a spec."""
        real = self.path.resolve()
        stamp = f"{real.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        fresh = real.with_name(f".new-{stamp}")
        RunFolder(fresh).create(spec)
        if real.exists():  # or else it was purged
            real.rename(real.with_name(f".stale-{stamp}"))
        fresh.rename(real)

    def read_attempts(self) -> list[Attempt]:
        """Oldest first; an attempt without an end is running or was killed without warning."""
        by_number: dict[int, Attempt] = {}
        for record in read_lines(self.attempts):
            if record["event"] == "reset":
                by_number = {number: replace(attempt, forgiven=True) for number, attempt in by_number.items()}
                continue
            number = int(record["attempt"])
            if record["event"] == "start":
                by_number[number] = Attempt(number, record, None)
            elif number in by_number:
                change: dict[str, Any] = {"asked": record["cause"]} if record["event"] == "asked" else {"end": record}
                by_number[number] = replace(by_number[number], **change)
        return list(by_number.values())

    @property
    def last_sign(self) -> float:
        """When a supervisor last said that it lives; 0 where none ever did. Each touches the lock now and then."""
        try:
            return self.lock.stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def create(self, spec: Mapping[str, Any]) -> None:
        """Rewritten by each submission that starts the run. Not fsynced: a submission of thousands shall take seconds."""
        self.path.mkdir(parents=True, exist_ok=True, mode=PRIVATE)
        self.cancel_mark.unlink(missing_ok=True)
        write_json(self.spec, spec, durable=False)


@dataclass(frozen=True, slots=True)
class Attempt:
    """One execution of a run: who, where, since when, and how it ended."""

    number: int
    start: dict[str, Any]
    end: dict[str, Any] | None
    asked: str = ""  # why it was asked to end; recorded at once, for it may be killed before its end is
    forgiven: bool = False  # somebody asked for another try since: no budget counts it

    @property
    def outcome(self) -> str:
        return "" if self.end is None else str(self.end["outcome"])

    @property
    def cause(self) -> str:
        return "" if self.end is None else str(self.end.get("cause", ""))


def start_attempt(run: RunFolder, record: Mapping[str, Any]) -> int:
    attempts = run.read_attempts()
    number = attempts[-1].number + 1 if attempts else 1
    append_json(run.attempts, {"event": "start", "attempt": number, "time": time.time(), **record})
    return number


def end_attempt(run: RunFolder, number: int, outcome: str, cause: str, message: str = "", **more: Any) -> None:
    """Outcomes: complete, stopped (saved, to be continued), crashed (to be tried again), failed (for good), waiting, cancelled."""
    record = {"event": "end", "attempt": number, "time": time.time(), "outcome": outcome, "cause": cause, "message": message}
    append_json(run.attempts, {**record, **more})


def ask_attempt(run: RunFolder, number: int, cause: str) -> None:
    """The attempt was asked to end."""
    append_json(run.attempts, {"event": "asked", "attempt": number, "time": time.time(), "cause": cause})


def reset_budgets(run: RunFolder) -> None:
    """Counting starts anew: somebody asked for another try."""
    append_json(run.attempts, {"event": "reset", "time": time.time()})


class Ledger:
    """What is known of every run apart from its folder: one small file per identity, `HASH.json`.

    It tells a run whose folder was purged from one that never ran, and which job owns a run that several jobs contain.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            self._known = {name.removesuffix(".json") for name in os.listdir(folder) if name.endswith(".json")}
        except FileNotFoundError:
            self._known = set()

    def __contains__(self, run_hash: str) -> bool:
        return run_hash in self._known

    def read(self, run_hash: str) -> dict[str, Any]:
        found = read_json(self.folder / f"{run_hash}.json") if run_hash in self._known else None
        return found if isinstance(found, dict) else {}

    def write(self, run_hash: str, record: Mapping[str, Any], durable: bool = True) -> None:
        self.folder.mkdir(parents=True, exist_ok=True, mode=PRIVATE)
        write_json(self.folder / f"{run_hash}.json", record, durable)
        self._known.add(run_hash)


def is_stale(result: Mapping[str, Any], upstream: Iterable[Path]) -> bool:
    """The weights in the folders `upstream` are no longer those that this result was made from."""
    made_from = result.get("upstream_sha256", {})
    for path in upstream:
        now = (read_json(path / "result.json") or {}).get("weights_sha256")
        made = made_from.get(path.name) or made_from.get(path.resolve().name)  # under its own name, or that of a link to it
        if now and made not in (None, now):
            return True
    return False


def state_of(
    run: RunFolder,
    *,
    known: Mapping[str, Any],
    queue: str | None,
    slurm_name: str | None,
    upstream_states: Iterable[str],
    upstream: Iterable[Path],
) -> str:
    """The state of one run.

    `known`: what the ledger has of a run whose folder is not there; with a result it was complete once. `queue`: the scheduler's word on
    it now: `pending`, `running`, or None when it has no job that could still run it; `slurm_name`: that job's.
    """
    if run.is_complete:
        return "stale" if is_stale(read_json(run.result) or {}, upstream) else "complete"
    if known.get("result"):
        return "stale" if "invalid" in known or is_stale(known["result"], upstream) else "purged"
    attempts = run.read_attempts()
    last = attempts[-1] if attempts else None
    if last and last.outcome == "failed" and slurm_name is not None and last.start.get("job") == slurm_name:
        return "failed"  # its packed neighbours go on
    if run.cancel_mark.exists() and not (queue is not None and last and last.end is None):
        return "cancelled"
    if queue == "running" and last and last.end is None:
        return "running"
    if queue is not None:
        return "requeued" if last and last.outcome in ("stopped", "crashed", "") else "pending"
    if last and last.outcome in ("failed", "cancelled"):
        return last.outcome
    if last and last.outcome == "crashed":
        return "failed"
    if any(state in ("failed", "cancelled", "skipped", "purged") for state in upstream_states):
        return "skipped"
    return "planned"
