"""`equihpc export RUN`: a pretraining's weights and their model card, for others; the writing itself is `python -m equissl.export`."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from hpc.commands.common import DEFAULT_RUNS, JSON, RUN, RUNS, find_job, find_run, statuses_of

ENTRY = "equissl.pretrain"


def register(app: typer.Typer) -> None:
    app.command("export")(export_command)


def export_command(
    run: RUN,
    runs: RUNS = DEFAULT_RUNS,
    to: Annotated[Optional[Path], typer.Option("--to", help="The folder to write. Default: one with the run's id, here.")] = None,  # noqa: UP045
    student: Annotated[bool, typer.Option("--student", help="The student instead of the teacher; it is in checkpoints only.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
    json_: JSON = False,
) -> None:
    """Write a pretraining's encoder, split, heads and model card, for plain timm; of an unfinished run those of its newest checkpoint."""
    from hpc.errors import UserError
    from hpc.files import read_json

    status = find_run(runs.resolve(), run, fresh=False)
    folder = status.path.resolve()
    spec = read_json(folder / "spec.json")
    if spec is None:
        raise UserError(f"{status.record.id} is {status.state}: its folder is not here; equihpc restore brings an archived run back")
    if spec["entry"] != ENTRY:
        raise UserError(f"{status.record.id} is a run of {spec['entry']}; only those of {ENTRY} have weights to export")
    target = to or Path(f"{folder.name}{'-student' if student else ''}")
    about = {
        "evaluations": _evaluations(runs.resolve(), status.record.id),
        "warning": f"The result of this run is stale: {status.cause}." if status.state == "stale" else None,
    }
    with tempfile.TemporaryDirectory(prefix="equihpc-") as scratch:
        (Path(scratch) / "about.json").write_text(json.dumps(about))
        options = [*(["--student"] if student else []), *(["--force"] if force else []), *(["--json"] if json_ else [])]
        words = [str(folder), "--to", str(target), "--about", f"{scratch}/about.json", *options]
        raise typer.Exit(abs(subprocess.run([sys.executable, "-m", "equissl.export", *words]).returncode))


def _evaluations(runs_dir: Path, run_id: str) -> list[dict[str, Any]]:
    """The complete evaluations of a run, in whichever job they are."""
    from hpc.files import read_json
    from hpc.status import job_names

    found = {}
    for name in job_names(runs_dir):
        job_dir, job = find_job(runs_dir, name)
        if not any(run_id in record.after for record in (*job.records, *job.former)):
            continue
        for status in statuses_of(job_dir, job, former=True, fresh=False)[0]:
            if run_id in status.record.after and status.state == "complete":
                result = read_json(status.path / "result.json")
                data = result.get("dataset", {}).get("name", "")
                about = {"id": status.record.id, "protocol": result.get("protocol", ""), "dataset": data}
                found[status.record.hash] = {**about, "metrics": result.get("metrics", {})}
    return list(found.values())
