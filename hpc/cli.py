"""`equihpc`: the commands. Each is a few lines over the module that does the work; imports are late so that --help is quick."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from hpc.commands import data, steer
from hpc.commands.common import (
    CLUSTER,
    DEFAULT_RUNS,
    FILE,
    JSON,
    NAME,
    RUN,
    RUNS,
    SET,
    VARIANT,
    find_cluster,
    find_job,
    find_run,
    make_console,
    make_plan,
    print_json,
    statuses_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from hpc.cluster import Cluster
    from hpc.status import JobRecord, RunStatus

app = typer.Typer(
    help="Sweeps of self-supervised pretrainings and their evaluations, from one YAML to the table.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,  # rich would double the time of --help
)
testbed_app = typer.Typer(
    help="A real four-node Slurm on this machine, for trying out and for tests.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(testbed_app, name="testbed")
app.add_typer(data.app, name="data")


@app.command("plan")
def plan_command(
    file: FILE,
    cluster: CLUSTER = None,
    runs: RUNS = DEFAULT_RUNS,
    set_: SET = None,
    variant: VARIANT = None,
    json_: JSON = False,
) -> None:
    """What a submission would start: runs, arrays, batch scripts, hours, disk. Needs no Slurm and writes nothing."""
    from collections import Counter

    from hpc import budget, forecast, reconcile, submit, view
    from hpc.plan import arrays
    from hpc.status import collect

    name, profile, missing = find_cluster(cluster)
    plan = make_plan(file, profile, set_ or [], variant)
    plan.warnings.extend(f"profile {name}: environment variable {variable} is not set" for variable in dict.fromkeys(missing))
    job_dir = runs.resolve() / plan.job.name
    old = reconcile.before(job_dir)
    statuses = collect(job_dir, submit.records(plan), submit.ledger_of(profile, runs.resolve()), ask_slurm=False)[0]
    states = dict(Counter(status.state for status in statuses))
    todo = [run for run, status in zip(plan.runs, statuses, strict=True) if status.state in (*submit.START, "blocked")]
    planned = arrays(todo, profile)
    notes = forecast.notes(
        plan,
        planned,
        blocked=[status.cause for status in statuses if status.state == "blocked"],
        changed=reconcile.reidentified(old, plan, job_dir),
        former=reconcile.former(old, plan, job_dir),
        used_hours=budget.used_hours(job_dir, submit.records(plan)),
    )
    scripts = [submit.sbatch_text(array, plan, job_dir) if profile.scheduler == "slurm" else "" for array in planned]
    if json_:
        print_json(
            {
                "job": plan.job.name,
                "cluster": name,
                "runs": [
                    {
                        "id": run.id,
                        "stage": run.stage,
                        "params": run.params,
                        "config": submit.resolved(run.config, run, job_dir),
                        "after": run.after,
                        "gpu_hours": run.cost.gpu_hours,
                        "num_steps": run.cost.num_steps,
                        "memory_bytes": run.cost.memory_bytes,
                    }
                    for run in plan.runs
                ],
                "arrays": [
                    {
                        "stage": array.stage,
                        "runs": [run.id for run in array.runs],
                        "elements": [[run.id for run in element] for element in array.elements],
                        "core_hours": view.core_hours(array, profile),
                        "sbatch": script,
                    }
                    for array, script in zip(planned, scripts, strict=True)
                ],
                "bytes": view.footprint(planned)[0],
                "inodes": view.footprint(planned)[1],
                "billed_gpu_hours": forecast.billed_hours(planned, profile),
                "billed_gpu_hours_unpacked": forecast.billed_hours(planned, profile, packed=False),
                "notes": notes,
                "warnings": plan.warnings,
            }
        )
        return
    shown = scripts if profile.scheduler == "slurm" else []
    console = make_console()
    view.plan_text(plan, planned, name, states, shown, console)
    for note in notes:
        console.print(f"note: {note}", style="yellow", markup=False, soft_wrap=True)
    if profile.quota_command:
        console.print(f"quota ({profile.quota_command}):\n{forecast.quota(profile.quota_command)}", markup=False, soft_wrap=True)


@app.command("submit")
def submit_command(
    file: FILE,
    cluster: CLUSTER = None,
    runs: RUNS = DEFAULT_RUNS,
    set_: SET = None,
    variant: VARIANT = None,
    wait: Annotated[bool, typer.Option("--wait", help="Stay, show the runs live and end with the table.")] = False,
    retry: Annotated[Optional[list[str]], typer.Option("--retry", help="Start runs of this state too: cancelled, purged, failed.")] = None,  # noqa: UP045
    prune: Annotated[bool, typer.Option("--prune", help="Cancel runs in flight that are not in the file any more; asks.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Ask nothing.")] = False,
    reidentify: Annotated[bool, typer.Option("--reidentify", help="Go on although complete runs would run again.")] = False,
    chain: Annotated[Optional[int], typer.Option("--chain", min=1, help="Segments submitted ahead.")] = None,  # noqa: UP045
    json_: JSON = False,
) -> None:
    """Start what is missing, failed or new; what is complete or in flight is left alone. Again is the resume."""
    from collections import Counter
    from dataclasses import replace

    from hpc import submit

    name, profile, missing = find_cluster(cluster)
    plan = make_plan(file, profile, set_ or [], variant)

    def confirmed(gone: list[RunStatus]) -> bool:
        listed = "\n".join(f"  {status.record.stage}/{status.record.id}: {status.state}" for status in gone[:20])
        question = f"not in {file} any more:\n{listed}\ncancel these {len(gone)} runs?"
        return yes or typer.confirm(question, err=json_)

    options = submit.Options(tuple(retry or ()), confirmed if prune else None, reidentify, chain)
    done = submit.submit(plan, name, runs.resolve(), missing, options)
    left = Counter(status.state for status in done.left)
    if json_ and not wait:
        print_json(
            {
                "job": plan.job.name,
                "started": [run.id for run in done.started],
                "left": dict(left),
                "slurm_jobs": done.job_ids,
                "pruned": [status.record.id for status in done.pruned],
                "notes": done.notes,
            }
        )
        return
    console = make_console(to_stderr=json_)
    console.print(
        f"{plan.job.name}: {len(done.started)} runs started on {name}" + (f", Slurm jobs {', '.join(done.job_ids)}" if done.job_ids else "")
    )
    if left:
        console.print("left alone: " + ", ".join(f"{count} {state}" for state, count in left.most_common()))
    if done.pruned:
        console.print(f"cancelled {len(done.pruned)} runs that are not in the file any more")
    for reason in dict.fromkeys(status.cause for status in done.left if status.state == "blocked"):
        console.print(f"blocked: {reason}", style="yellow", soft_wrap=True, markup=False)
    for note in done.notes:
        console.print(f"note: {note}", style="yellow", soft_wrap=True, markup=False)
    console.print(f"runs: {done.job_dir}", soft_wrap=True)
    if wait:
        again = replace(options, retry=(), prune=None)

        def more() -> int:
            """Runs that still wait for the site's limit after as many as possible were submitted."""
            return submit.submit(plan, name, runs.resolve(), missing, again).waiting

        raise typer.Exit(_wait(done.job_dir, profile, console, json_, done.waiting, more))


def _wait(job_dir: Path, profile: Cluster, console: Console, json_: bool, waiting: int, more: Callable[[], int]) -> int:
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
    _report(job_dir, job, statuses, console, json_)
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


def _report(job_dir: Path, job: JobRecord, statuses: list[RunStatus], console: Console, json_: bool) -> None:
    from hpc import report, view

    table = report.build(job, statuses)
    csv_path, html_path = report.write(table, job_dir)
    if json_:
        print_json(table.to_json())
        return
    console.print(view.result_table(table))
    console.print(f"table: {csv_path} and {html_path}", soft_wrap=True)
    console.print(f"curves and pictures: equihpc tensorboard {job.name}")


@app.command("status")
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


@app.command("report")
def report_command(name: NAME = None, runs: RUNS = DEFAULT_RUNS, json_: JSON = False) -> None:
    """The table of a job's results so far; also writes report.csv and report.html."""
    job_dir, job = find_job(runs, name)
    _report(job_dir, job, statuses_of(job_dir, job)[0], make_console(), json_)


@app.command("logs")
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


@app.command("why")
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


@app.command("tensorboard")
def tensorboard_command(
    name: NAME = None,
    runs: RUNS = DEFAULT_RUNS,
    port: Annotated[int, typer.Option("--port", help="0 takes a free one.")] = 6006,
) -> None:
    """Curves and pictures of a job's runs in the browser (TensorBoard on this machine)."""
    job_dir, _ = find_job(runs, name)
    os.execv(sys.executable, [sys.executable, "-m", "tensorboard.main", "--logdir", str(job_dir), "--port", str(port)])


@testbed_app.command("up")
def start_testbed() -> None:
    """Start it; installs Slurm's Debian packages where they are missing and this is permitted."""
    from hpc import testbed

    testbed.up(progress=lambda text: print(text, flush=True))
    show_testbed(json_=False)


@testbed_app.command("down")
def stop_testbed() -> None:
    """Stop its daemons and remove its state; the packages stay."""
    from hpc import testbed

    testbed.down()
    print("the testbed is down")


@testbed_app.command("status")
def show_testbed(json_: JSON = False) -> None:
    """Nodes and daemons of the testbed."""
    from hpc import testbed

    found = testbed.status()
    if json_:
        print_json(found)
        return
    print(f"testbed: {'up' if found['up'] else 'down'}" + (f", SLURM_CONF={found['slurm_conf']}" if found["up"] else ""))
    for node in found["nodes"]:
        print(f"  {node['name']} {node['state']}" + (f" ({node['reason']})" if node["reason"] else ""))


steer.register(app)


def main() -> None:
    """Exit codes: 0 done; 2 bad input, one message; 1 anything else."""
    from hpc.errors import EquiHPCError, UserError

    os.umask(0o077)  # runs are private to the user
    sys.path.insert(0, os.getcwd())  # entries may be modules of the folder where people work
    try:
        app()
    except UserError as error:
        print(f"equihpc: {error}", file=sys.stderr)
        sys.exit(2)
    except EquiHPCError as error:
        print(f"equihpc: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # `equihpc status | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        else:
            print(f"equihpc: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
