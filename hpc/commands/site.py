"""`doctor` checks a profile on the spot, `init` writes a first one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from hpc.commands.common import CLUSTER, DEFAULT_RUNS, JSON, RUNS, find_cluster, make_console, print_json


def register(app: typer.Typer) -> None:
    app.command("doctor")(doctor_command)
    app.command("init")(init_command)


def doctor_command(
    cluster: CLUSTER = None,
    runs: RUNS = DEFAULT_RUNS,
    node: Annotated[bool, typer.Option("--node", help="Submit a small job too and check from inside of it.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before submitting.")] = False,
    partition: Annotated[Optional[str], typer.Option("--partition", help="For --node; default: the profile's development.")] = None,  # noqa: UP045
    qos: Annotated[Optional[str], typer.Option("--qos", help="For --node, for example a site's debug qos.")] = None,  # noqa: UP045
    json_: JSON = False,
) -> None:
    """Check a profile on the spot: what Slurm says, places, data sets, caches; with --node what a job sees. 1 if something failed."""
    from hpc import doctor

    name, profile, missing = find_cluster(cluster)
    subject = doctor.Subject(name, profile, missing, runs.resolve())
    console = make_console(to_stderr=json_)
    findings = doctor.check(subject)
    if node:
        from hpc import doctor_job

        probe = doctor_job.probe_job(subject, partition, qos)
        if not yes:
            typer.confirm(f"Submit {probe.description}?", abort=True, err=True)
        findings += doctor_job.check_nodes(probe, lambda text: console.print(text, style="dim", soft_wrap=True))
    if json_:
        print_json({"cluster": name, "ok": not doctor.failed(findings), "findings": [finding._asdict() for finding in findings]})
    else:
        console.print(doctor.table(findings))
    raise typer.Exit(1 if doctor.failed(findings) else 0)


def init_command(
    name: Annotated[Optional[str], typer.Argument(help="The profile's name; default: the cluster's.")] = None,  # noqa: UP045
    runs: RUNS = DEFAULT_RUNS,
    cache_dir: Annotated[Optional[Path], typer.Option("--cache-dir", help="Folder for caches instead of the home.")] = None,  # noqa: UP045
    force: Annotated[bool, typer.Option("--force", help="Write over a profile of that name.")] = False,
    json_: JSON = False,
) -> None:
    """Write a first profile slurm/NAME.yaml from what Slurm says of itself, and place caches outside a small home."""
    from hpc import init

    written = init.write(name, runs.resolve(), cache_dir, force)
    if json_:
        print_json({"path": str(written.path), "caches": written.caches, "unconfirmed": written.unconfirmed})
        return
    print(f"written: {written.path}")
    print("look at what it guessed: " + ", ".join(written.unconfirmed))
    if written.caches:
        print("caches lie outside the home in jobs; for this shell too (put it into your shell's start file):")
        print("\n".join(f"  {line}" for line in init.shell_lines(written.caches)))
    elif written.reason:
        print(f"{written.reason}: give a folder for caches with --cache-dir and --force")
    print(f"next: equihpc doctor --cluster {written.path.stem}")
