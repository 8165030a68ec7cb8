"""Commands that change what is under way: cancel, hold, release, throttle, rebase, invalidate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hpc.commands.common import DEFAULT_RUNS, JSON, RUNS, find_job, find_run, make_console, print_json, statuses_of

if TYPE_CHECKING:
    from hpc.status import JobRecord, RunStatus

TARGET = Annotated[str, typer.Argument(help="A job's name or a run.")]


def register(app: typer.Typer) -> None:
    app.command("cancel")(cancel_command)
    app.command("hold")(hold_command)
    app.command("release")(release_command)
    app.command("throttle")(throttle_command)
    app.command("rebase")(rebase_command)
    app.command("invalidate")(invalidate_command)


def cancel_command(target: TARGET, runs: RUNS = DEFAULT_RUNS, json_: JSON = False) -> None:
    """End a job's runs, or one run. They stay cancelled until a submit with --retry cancelled."""
    from hpc import cancel, reconcile

    job_dir, job, statuses, is_run = _targets(runs.resolve(), target)
    shared = {} if is_run else reconcile.shared_with(job_dir)
    spared = [status for status in statuses if status.state in cancel.BUSY and (status.record.hash in shared or not status.is_of(job_dir))]
    ended = cancel.cancel(job_dir, job.slurm_conf, [status for status in statuses if status not in spared])
    others = {s.record.id: shared.get(s.record.hash, s.path.resolve().parent.parent.name) for s in spared}
    if json_:
        print_json({"cancelled": [s.record.id for s in ended], "spared": others})
        return
    make_console().print(f"cancelled {len(ended)} runs" if ended else "nothing to cancel: no run is pending or running")
    if spared:
        first, other = next(iter(others.items()))
        make_console().print(f"spared {len(spared)} that another job contains too, for example {first} ({other}); cancel it by its id")


def hold_command(target: TARGET, runs: RUNS = DEFAULT_RUNS, json_: JSON = False) -> None:
    """Keep runs from starting. What runs goes on to the end of its segment."""
    from hpc import cancel

    job_dir, job, statuses, _ = _targets(runs.resolve(), target)
    _say("held", cancel.hold(job_dir, job.slurm_conf, statuses), json_)


def release_command(target: TARGET, runs: RUNS = DEFAULT_RUNS, json_: JSON = False) -> None:
    """Let held runs start."""
    from hpc import cancel

    job_dir, job, statuses, _ = _targets(runs.resolve(), target)
    _say("released", cancel.release(job_dir, job.slurm_conf, statuses), json_)


def throttle_command(
    name: Annotated[str, typer.Argument(help="A job's name.")],
    elements: Annotated[int, typer.Argument(min=0, help="Elements of each of the job's arrays that may run at once; 0: no limit.")],
    runs: RUNS = DEFAULT_RUNS,
    json_: JSON = False,
) -> None:
    """Change how many elements of a job's arrays run at once, while they run."""
    from hpc import cancel
    from hpc.errors import UserError

    job_dir, job = find_job(runs, name)
    changed = cancel.throttle(job_dir, job.slurm_conf, elements)
    if not changed:
        raise UserError(f"{job.name} has no array in the queue; the profile's array_parallelism is for later submissions")
    if json_:
        print_json({"arrays": changed, "elements": elements})
        return
    make_console().print(f"{', '.join(changed)}: at most {elements or 'any number of'} elements at once")


def rebase_command(name: Annotated[str, typer.Argument(help="A job's name.")], runs: RUNS = DEFAULT_RUNS, json_: JSON = False) -> None:
    """Move a job's unfinished runs to today's code: pending and failed ones now, running ones at their next segment."""
    from hpc import rebase

    job_dir, job = find_job(runs, name)
    code, moved = rebase.rebase(job_dir, statuses_of(job_dir, job)[0])
    if json_:
        print_json({"code": code, "moved": [status.record.id for status in moved]})
        return
    commit = f", commit {code['commit'][:12]}{' with changes' if code['dirty'] else ''}" if code["commit"] else ""
    make_console().print(f"{len(moved)} runs go on with code {code['hash']}{commit}")


def invalidate_command(
    run: Annotated[list[str], typer.Argument(help="Complete runs (ids, hashes or unique parts).")],
    because: Annotated[str, typer.Option("--because", help="The reason; status and why show it.")],
    runs: RUNS = DEFAULT_RUNS,
    json_: JSON = False,
    undo: Annotated[bool, typer.Option("--undo", help="The results hold after all.")] = False,
) -> None:
    """Declare results spoiled: they and what was made from them are stale, leave the table, and the next submit runs them again."""
    from hpc import rebase

    statuses = [find_run(runs.resolve(), text) for text in run]
    rebase.invalidate(statuses, None if undo else because)
    if json_:
        print_json({"runs": [status.record.id for status in statuses], "because": None if undo else because})
        return
    make_console().print(f"{len(statuses)} runs are {'valid again' if undo else 'stale'}; submit the job's file to run what is stale")


def _targets(runs_dir: Path, target: str) -> tuple[Path, JobRecord, list[RunStatus], bool]:
    """(job folder, its record, statuses, whether one run was meant). Runs that left the file count too."""
    from hpc.errors import EquiHPCError
    from hpc.status import job_names

    only = None
    name: str | None = target
    if target not in job_names(runs_dir):
        only = find_run(runs_dir, target)
        name = only.path.resolve().parent.parent.name  # the job that has it, whichever names it
    job_dir, job = find_job(runs_dir, name)
    statuses, note = statuses_of(job_dir, job, former=True)
    if note:
        raise EquiHPCError(f"{note}; nothing was done")
    chosen = statuses if only is None else [status for status in statuses if status.record.hash == only.record.hash]
    return job_dir, job, chosen, only is not None


def _say(what: str, ids: list[str], json_: bool) -> None:
    if json_:
        print_json({what: ids})
        return
    make_console().print(f"{what} {len(ids)} runs" if ids else f"no run was {what}")
