"""Commands that look at a job: status, why, logs, report, tensorboard; and what `submit --wait` shows."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from hpc.commands.common import DEFAULT_RUNS, JSON, NAME, RUN, RUNS, find_job, find_run, make_console, print_json, statuses_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from hpc.cluster import Cluster
    from hpc.status import JobRecord, RunStatus


def register(app: typer.Typer) -> None:
    app.command("status")(status_command)
    app.command("report")(report_command)
    app.command("logs")(logs_command)
    app.command("why")(why_command)
    app.command("tensorboard")(tensorboard_command)


def wait(job_dir: Path, profile: Cluster, console: Console, json_: bool, waiting: int, more: Callable[[], int]) -> int:
    """Watch, submit what the site's limit kept back, then show the table. 1 if a run failed.

    Ctrl-C stops local runs at their next step and leaves Slurm's alone.
    """
    from hpc import local, view
    from hpc.cancel import BUSY
    from hpc.status import JobRecord, lift_holds

    job = JobRecord.read(job_dir)

    last: list[RunStatus] = []
    submitted = time.monotonic()

    def collect() -> list[RunStatus]:
        """While Slurm does not answer, what it said last."""
        nonlocal last, waiting, submitted
        statuses, note = statuses_of(job_dir, job)
        if note and last:
            return last
        lift_holds(statuses, job.slurm_conf)
        num_busy = sum(status.state in BUSY for status in statuses)
        if waiting and (not num_busy or time.monotonic() - submitted > 10 * poll):
            waiting, submitted = more(), time.monotonic()
            statuses, _ = statuses_of(job_dir, job)
        last = statuses
        return statuses

    poll = profile.poll_seconds if profile.scheduler == "slurm" else 0.5
    try:
        statuses = view.watch(collect, poll, console)
    except KeyboardInterrupt:
        if profile.scheduler == "local":
            console.print("\nstopping: every run saves at its next step …")
            local.stop(job_dir)
            console.print("stopped; the same submit continues")
        else:
            console.print(f"\nthe jobs go on; equihpc status {job.name} shows them, equihpc cancel {job.name} ends them")
        return 130
    show_report(job_dir, job, statuses, console, json_)
    bad = [status for status in statuses if status.state != "complete"]
    for status in bad:
        console.print(  # a cause is somebody's text, not markup
            f"{status.record.stage}/{status.record.id}: {status.state}" + (f": {status.cause}" if status.cause else ""),
            markup=False,
            style="red",
            soft_wrap=True,
        )
    if bad:
        console.print(f"see equihpc logs {bad[0].record.id}", soft_wrap=True)
    return 1 if bad else 0


def show_report(job_dir: Path, job: JobRecord, statuses: list[RunStatus], console: Console, json_: bool) -> None:
    from hpc import report, view

    table = report.build(job, statuses)
    csv_path, html_path = report.write(table, job_dir)
    if json_:
        print_json(table.to_json())
        return
    console.print(view.result_table(table))
    console.print(f"table: {csv_path} and {html_path}", soft_wrap=True)
    console.print(f"curves and pictures: equihpc tensorboard {job.name}")


def status_command(name: NAME = None, runs: RUNS = DEFAULT_RUNS, json_: JSON = False) -> None:
    """The state of every run of a job, with one question to Slurm."""
    from hpc import view
    from hpc.status import lift_holds

    job_dir, job = find_job(runs, name)
    statuses, note = statuses_of(job_dir, job)
    lift_holds(statuses, job.slurm_conf)
    if json_:
        print_json({"job": job.name, "note": note, "runs": [status.to_json() for status in statuses]})
        return
    console = make_console()
    console.print(view.status_table(statuses))
    if note:
        console.print(f"note: {note}", style="yellow", soft_wrap=True)


def report_command(name: NAME = None, runs: RUNS = DEFAULT_RUNS, json_: JSON = False) -> None:
    """The table of a job's results so far; also writes report.csv and report.html."""
    job_dir, job = find_job(runs, name)
    show_report(job_dir, job, statuses_of(job_dir, job)[0], make_console(), json_)


def logs_command(
    run: RUN,
    runs: RUNS = DEFAULT_RUNS,
    rank: Annotated[Optional[int], typer.Option("--rank", help="Only this rank's lines.")] = None,  # noqa: UP045
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on while the run goes on.")] = False,
) -> None:
    """What the ranks of a run printed."""
    from hpc import logs

    status = find_run(runs.resolve(), run)
    logs.show(
        status.path,
        rank,
        follow,
        is_over=lambda: find_run(runs.resolve(), status.record.hash).state not in ("running", "pending", "requeued"),
    )


def why_command(run: RUN, runs: RUNS = DEFAULT_RUNS, json_: JSON = False) -> None:
    """The attempts of a run: when, where, how each ended and why."""
    import datetime

    from hpc.runs import RunFolder

    status = find_run(runs.resolve(), run)
    attempts = RunFolder(status.path).read_attempts()
    if json_:
        print_json(
            {
                "id": status.record.id,
                "state": status.state,
                "attempts": [
                    {
                        **a.start,
                        "outcome": a.outcome,
                        "cause": a.cause,
                        "message": (a.end or {}).get("message", ""),
                        "ended": (a.end or {}).get("time"),
                    }
                    for a in attempts
                ],
            }
        )
        return
    console = make_console()
    console.print(f"{status.record.stage}/{status.record.id}: {status.state}", soft_wrap=True)
    for attempt in attempts:
        began = datetime.datetime.fromtimestamp(attempt.start["time"]).isoformat(" ", "seconds")
        took = f" after {attempt.end['time'] - attempt.start['time']:.0f} s" if attempt.end else ""
        job = f", Slurm job {attempt.start['job']}" if attempt.start.get("job") else ""
        ended = (f"{attempt.outcome}{took}" + (f": {attempt.cause}" if attempt.cause else "")) if attempt.end else "no end recorded"
        console.print(
            f"{attempt.number}. {began} on {attempt.start['host']}{job}, from step {attempt.start['step']}: {ended}",
            soft_wrap=True,
            markup=False,
        )
        if attempt.end and attempt.end.get("message"):
            console.print(attempt.end["message"], style="dim", soft_wrap=True, markup=False)


def tensorboard_command(
    name: NAME = None,
    runs: RUNS = DEFAULT_RUNS,
    port: Annotated[int, typer.Option("--port", help="0 takes a free one.")] = 6006,
) -> None:
    """Curves and pictures of a job's runs in the browser (TensorBoard on this machine)."""
    job_dir, _ = find_job(runs, name)
    os.execv(sys.executable, [sys.executable, "-m", "tensorboard.main", "--logdir", str(job_dir), "--port", str(port)])
