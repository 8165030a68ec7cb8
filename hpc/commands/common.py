"""Options and lookups that commands share. Imports are late so that --help is quick."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from hpc.cluster import Cluster
    from hpc.plan import Plan, Run
    from hpc.status import JobRecord, RunStatus

FILE = Annotated[Path, typer.Argument(help="The job file, for example jobs/quickstart.yaml.")]
CLUSTER = Annotated[Optional[str], typer.Option("--cluster", help="Profile in slurm/. Default: local where there is no Slurm.")]  # noqa: UP045
RUNS = Annotated[Path, typer.Option("--runs", envvar="EQUIHPC_RUNS", help="Folder of all run folders.")]
SET = Annotated[Optional[list[str]], typer.Option("--set", help="stage.path=value, before the sweep; repeatable.")]  # noqa: UP045
VARIANT = Annotated[Optional[str], typer.Option("--variant", help="One of the job file's variants.")]  # noqa: UP045
JSON = Annotated[bool, typer.Option("--json", help="For scripts.")]
NAME = Annotated[Optional[str], typer.Argument(help="A job's name; default: the only or the newest one.")]  # noqa: UP045
RUN = Annotated[str, typer.Argument(help="A run's id, its hash, or any part that only one run has.")]
DEFAULT_RUNS = Path("runs")


def make_console(to_stderr: bool = False) -> Console:
    from rich.console import Console

    # a pipe has no width: nothing is cut there
    stream = sys.stderr if to_stderr else sys.stdout
    return Console(stderr=to_stderr, width=None if stream.isatty() else int(os.environ.get("COLUMNS", 200)))


def print_json(data: Any) -> None:
    print(json.dumps(data, indent=1, allow_nan=False))


def find_cluster(name: str | None) -> tuple[str, Cluster, list[str]]:
    from hpc import cluster, slurm
    from hpc.errors import UserError

    if name is None:
        if slurm.found_here() and not slurm.inside_allocation():
            from hpc.messages import choices_text

            raise UserError(
                f"this machine belongs to a Slurm cluster: say which profile with --cluster; {choices_text('', cluster.names())}"
            )
        name = "local"
    found, missing = cluster.load(name)
    return name, found, missing


def make_plan(file: Path, cluster: Cluster, sets: list[str], variant: str | None) -> Plan:
    from hpc import plan, spec

    return plan.expand(spec.load(file, sets, variant), cluster)


def submit_command_text(file: Path, cluster: str | None, runs: Path, sets: list[str] | None, variant: str | None) -> str:
    """The command that asks for the same runs again, as it can be pasted."""
    import shlex

    words = ["equihpc", "submit", str(file)]
    for option, values in (("--cluster", [cluster]), ("--variant", [variant]), ("--set", sets or [])):
        words += [word for value in values if value is not None for word in (option, value)]
    if runs != DEFAULT_RUNS:
        words += ["--runs", str(runs)]
    return shlex.join(words)


def first_pretraining(
    file: Path, cluster: str | None, runs: Path, sets: list[str] | None, variant: str | None
) -> tuple[Run, dict[str, Any]]:
    """The job's first run of equissl.pretrain and its config, with places for data and folders."""
    from hpc.errors import UserError
    from hpc.submit import resolved

    plan = make_plan(file, find_cluster(cluster)[1], sets or [], variant)
    run = next((run for run in plan.runs if run.entry == "equissl.pretrain"), None)
    if run is None:
        raise UserError(f"{file} has no stage with entry equissl.pretrain")
    config = resolved(run.config, run, runs.resolve() / plan.job.name)
    assert isinstance(config, dict)
    return run, config


def call(command: list[str]) -> int:
    """Its exit code. Signals are the command's to answer: it cleans up. Ctrl-C reaches it by itself."""
    import signal
    import subprocess

    with subprocess.Popen(command) as process:
        signal.signal(signal.SIGINT, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        code = process.wait()
    return code if code >= 0 else 128 - code


def find_job(runs_dir: Path, name: str | None) -> tuple[Path, JobRecord]:
    """The job of that name (a job file's path also does); without a name the newest."""
    from hpc.errors import UserError
    from hpc.status import JobRecord, job_names

    runs_dir = runs_dir.resolve()
    if name is None:
        newest = sorted(job_names(runs_dir), key=lambda job: (runs_dir / job / ".equihpc" / "job.json").stat().st_mtime)
        if not newest:
            raise UserError(f"there are no jobs in {runs_dir} yet; submit one: equihpc submit jobs/quickstart.yaml --wait")
        name = newest[-1]
    job_dir = runs_dir / (Path(name).stem if name.endswith(".yaml") else name)
    return job_dir, JobRecord.read(job_dir)


def statuses_of(job_dir: Path, job: JobRecord, former: bool = False, fresh: bool = True) -> tuple[list[RunStatus], str]:
    """`former`: also of runs that left the job's file. `fresh`: ask Slurm now, else not more often than the profile says."""
    from hpc.runs import Ledger
    from hpc.status import collect

    records = [*job.records, *(job.former if former else [])]
    return collect(job_dir, records, Ledger(Path(job.ledger)), max_age_seconds=0.0 if fresh else poll_seconds(job))


def poll_seconds(job: JobRecord) -> float:
    """Slurm is not asked more often than this to show something."""
    return float(job.rules.get("poll_seconds", 30.0))


def find_run(runs_dir: Path, text: str, fresh: bool = True) -> RunStatus:
    """The one run that `text` is a part of, or the whole id or hash. Slurm is asked for that run's job only."""
    from hpc.errors import UserError
    from hpc.status import job_names

    found: dict[Path, tuple[str, str]] = {}
    for name in job_names(runs_dir):
        job_dir, job = find_job(runs_dir, name)
        for record in (*job.records, *job.former):
            path = job_dir / record.stage / record.id
            if text in (record.id, record.hash):
                found = {path.resolve(): (name, record.id)}
                break
            if text in f"{name}/{record.stage}/{record.id}":
                found.setdefault(path.resolve(), (name, record.id))
        else:
            continue
        break
    if len(found) != 1:
        some = ", ".join(str(path.relative_to(runs_dir)) for path in list(found)[:8])
        raise UserError(f"run {text!r} is {'not unique: ' + some if found else 'unknown; equihpc status lists the runs'}")
    name, run_id = next(iter(found.values()))
    job_dir, job = find_job(runs_dir, name)
    return next(status for status in statuses_of(job_dir, job, former=True, fresh=fresh)[0] if status.record.id == run_id)
