"""Tell somebody: `notify.command` when a run fails for good, and once when nothing of the job is pending or running any more."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from hpc.budget import Rules
from hpc.errors import EquiHPCError
from hpc.files import append_json, locked, read_lines
from hpc.journal import Journal
from hpc.runs import Ledger, RunFolder

TIMEOUT_SECONDS = 60.0
IN_FLIGHT = ("pending", "running", "requeued")


def after_end(job_dir: Path, ended: Iterable[Path]) -> None:
    """To be called when attempts of the runs `ended` are over and they will not be continued from here.

    Each event is told once, however many elements end at the same time: what was told stands in a file, under a lock.
    """
    notify = Rules.read(job_dir).notify
    if notify is None or notify.command is None:
        return
    folder = job_dir / ".equihpc"
    runs = [RunFolder(path) for path in ended]
    with locked(folder / "notify.lock"):
        told = {record["key"] for record in read_lines(folder / "notified.jsonl")}

        def tell(event: str, key: str, run: str, text: str) -> None:
            assert notify is not None
            assert notify.command is not None
            if event in notify.when and key not in told:
                told.add(key)
                append_json(folder / "notified.jsonl", {"key": key})
                run_command(notify.command, {"JOB": job_dir.name, "EVENT": event, "RUN": run, "TEXT": text})

        for run in runs:
            last = run.read_attempts()[-1:]
            if last and last[0].outcome == "failed" and not last[0].forgiven and not run.is_complete:
                tell("fail", f"fail {run.path.name} {last[0].number}", run.path.name, f"{run.path.name} failed: {last[0].cause}")
        key = f"end {_newest_submission(job_dir)}"
        if "end" in notify.when and key not in told and (text := _summary(job_dir, {run.path for run in runs})):
            tell("end", key, "", text)


def _newest_submission(job_dir: Path) -> str:
    records = [record for record in read_lines(Journal.of_job(job_dir).path) if record["event"] in ("intent", "local")]
    return str(records[-1]["time"]) if records else ""


def _summary(job_dir: Path, ended: set[Path]) -> str | None:
    """How the job's runs stand, None while one of them is in flight. Slurm is asked only where the folders leave it open."""
    from hpc.status import JobRecord, collect  # imports the local runner, which imports this

    job = JobRecord.read(job_dir)
    settled = set(ended)
    for record in reversed(job.records):  # the last ones are the least likely to have ended
        run = RunFolder(job_dir / record.stage / record.id)
        last = run.read_attempts()[-1:]
        if last and last[0].outcome in ("waiting", "failed", "cancelled"):
            settled.add(run.path)  # although its Slurm job may not quite have left the queue
        elif run.path not in settled and not run.is_complete and last and last[0].end is None:
            return None
    statuses, note = collect(job_dir, job.records, Ledger(Path(job.ledger)))
    if note or any(status.state in IN_FLIGHT and status.path not in settled for status in statuses):
        return None
    states = Counter("not finished" if status.state in IN_FLIGHT else status.state for status in statuses)
    return f"{job.name}: " + ", ".join(f"{count} {state}" for state, count in states.most_common())


def run_command(command: str, values: dict[str, str]) -> None:
    """In a shell, with EQUIHPC_* set; ended with all that it started after TIMEOUT_SECONDS. Its failure is only said."""
    environment = {**os.environ, **{f"EQUIHPC_{name}": value for name, value in values.items()}}
    try:
        process = subprocess.Popen(command, shell=True, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
        code = process.wait(TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        print(f"equihpc: notify.command did not end in {TIMEOUT_SECONDS:g} s and was killed", flush=True)
    except (OSError, EquiHPCError) as error:
        print(f"equihpc: notify.command: {error}", flush=True)
    else:
        if code:
            print(f"equihpc: notify.command ended with exit code {code}", flush=True)
