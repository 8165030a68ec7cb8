"""`equihpc`: the commands. Each is a few lines over the module that does the work; imports are late so that --help is quick."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from hpc.commands import bench, data, drill, export, keep, look, site, steer
from hpc.commands.common import (
    CLUSTER,
    DEFAULT_RUNS,
    FILE,
    JSON,
    RUNS,
    SET,
    VARIANT,
    find_cluster,
    make_console,
    make_plan,
    print_json,
    submit_command_text,
)

if TYPE_CHECKING:
    from hpc.status import RunStatus

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
                        "memory": run.cost.memory,
                        "sharding": run.cost.sharding,
                        "recipe": run.cost.recipe,
                        "traffic": run.cost.traffic and run.cost.traffic._asdict(),
                        "scaling_seconds": run.cost.scaling,
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

    command = submit_command_text(file, cluster, runs, set_, variant)
    options = submit.Options(tuple(retry or ()), confirmed if prune else None, reidentify, chain=chain, command=command)
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
        again = replace(options, retry=(), prune=None, only_new=True)

        def more() -> int:
            """Runs that still wait for the site's limit after as many as possible were submitted."""
            return submit.submit(plan, name, runs.resolve(), missing, again).waiting

        raise typer.Exit(look.wait(done.job_dir, profile, console, json_, done.waiting, more))


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


look.register(app)
steer.register(app)
site.register(app)
bench.register(app)
drill.register(app)
keep.register(app)
export.register(app)


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
