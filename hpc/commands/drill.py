"""`rehearse`: faults on purpose, before the cluster brings its own."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from hpc.commands.common import CLUSTER, DEFAULT_RUNS, FILE, JSON, RUNS, SET, find_cluster, make_console, print_json

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from hpc.rehearse import Verdict

SMALL = "smoke"


def register(app: typer.Typer) -> None:
    app.command("rehearse")(rehearse_command)


def rehearse_command(
    file: FILE,
    cluster: CLUSTER = None,
    runs: RUNS = DEFAULT_RUNS,
    set_: SET = None,
    variant: Annotated[str, typer.Option("--variant", help="The small variant of the job; none: the file as it stands.")] = SMALL,
    num_faults: Annotated[int, typer.Option("--faults", min=0, help="How many are drawn.")] = 6,
    seed: Annotated[int, typer.Option("--seed", help="Of the draw: which faults, when, to which run.")] = 0,
    only: Annotated[Optional[list[str]], typer.Option("--only", help="Draw from these faults alone; repeatable.")] = None,  # noqa: UP045
    node_hours: Annotated[Optional[float], typer.Option("--node-hours", min=0.0, help="Ceiling on Slurm; default 1.")] = None,  # noqa: UP045
    hang_seconds: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--hang-seconds", min=2.0, help="Patience with a silent rank instead of the profile's."),
    ] = None,
    rtol: Annotated[float, typer.Option("--rtol", min=0.0, help="Tolerance of the comparison; 0: bit for bit.")] = 0.0,
    json_: JSON = False,
) -> None:
    """Run a job's small variant twice, undisturbed and with injected faults, and compare the two. 1 if anything differs."""
    from hpc import rehearse

    name, profile, missing = find_cluster(cluster)
    console = make_console(to_stderr=json_)
    options = rehearse.Options(
        file=file,
        cluster_name=name,
        cluster=profile,
        runs_dir=runs,
        sets=tuple(set_ or ()),
        variant=_chosen(file, variant),
        num_faults=num_faults,
        seed=seed,
        node_hours=node_hours,
        only=tuple(only or ()),
        hang_seconds=hang_seconds,
        rtol=rtol,
    )
    _check(name, profile.scheduler, missing)
    verdict = rehearse.rehearse(options, lambda text: console.print(f"{time.strftime('%H:%M:%S')} {text}", markup=False, soft_wrap=True))
    if json_:
        print_json(verdict.to_json())
    else:
        _show(verdict, console)
    raise typer.Exit(0 if verdict.ok else 1)


def _check(name: str, scheduler: str, missing: list[str]) -> None:
    from hpc import slurm
    from hpc.errors import UserError

    if missing:
        raise UserError(f"--cluster {name}: environment variable {missing[0]} is not set; export it and try again")
    if scheduler == "local" and not slurm.inside_allocation() and slurm.found_here():
        raise UserError("this is a login node: rehearse with --cluster NAME, on the profile's development partition")


def _chosen(file: Path, variant: str) -> str | None:
    """Raises UserError where the file has no such variant."""
    from hpc import spec
    from hpc.errors import UserError

    if variant == "none":
        return None
    known = spec.load(file).job.variants
    if variant not in known:
        raise UserError(
            f"{file}: it has no variant {variant!r}; a rehearsal runs a job's small variant twice."
            f" Add one, choose from {', '.join(known) or '(none)'}, or rehearse the file as it stands with --variant none"
        )
    return variant


def _show(verdict: Verdict, console: Console) -> None:
    from rich.table import Table

    from hpc.rehearse import summary

    table = Table("fault", header_style="bold")
    for heading in ("injected", "survived", "lost steps at most", "s to the next step"):
        table.add_column(heading, justify="right")
    for name, injected, survived, lost, seconds, _ in summary(verdict.hits):
        table.add_row(name, str(injected), str(survived), "" if lost is None else str(lost), "" if seconds is None else f"{seconds:.1f}")
    console.print(table)
    for hit in verdict.hits:
        if hit.problem:
            console.print(f"{hit.fault} -> {hit.run}: {hit.problem}", style="red", markup=False, soft_wrap=True)
    for text in verdict.differences:
        console.print(text, style="red", markup=False, soft_wrap=True)
    if verdict.accidents:
        console.print(f"died by themselves: {', '.join(verdict.accidents)}", style="yellow", soft_wrap=True)
    if verdict.not_injected:
        console.print(f"not injected, no run fitted: {', '.join(verdict.not_injected)}", style="yellow", soft_wrap=True)
    times = f"{verdict.undisturbed_seconds:.0f} s undisturbed, {verdict.disturbed_seconds:.0f} s with {len(verdict.hits)} faults"
    said = "the same as undisturbed" if verdict.ok else "NOT the same as undisturbed"
    console.print(f"{verdict.num_runs} runs: {said} ({times}); {verdict.folder}", soft_wrap=True, markup=False)
