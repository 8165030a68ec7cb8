"""`equihpc bench FILE`: how fast the job's first pretraining is on this machine; the measuring is `python -m equissl.bench`."""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from hpc.commands.common import CLUSTER, DEFAULT_RUNS, FILE, JSON, RUNS, SET, VARIANT, call, first_pretraining

STEPS = Annotated[int, typer.Option("--steps", min=1, help="Steps to measure, after three others.")]
PROCESSES = Annotated[int, typer.Option("--processes", min=1, help="On this machine, each with its share of the batch.")]


def register(app: typer.Typer) -> None:
    app.command("bench")(bench_command)


def bench_command(
    file: FILE,
    steps: STEPS = 20,
    processes: PROCESSES = 1,
    cluster: CLUSTER = None,
    runs: RUNS = DEFAULT_RUNS,
    set_: SET = None,
    variant: VARIANT = None,
    json_: JSON = False,
) -> None:
    """Images/s, MFU, memory and the parts of a step of the job's first pretraining, on this machine; leaves nothing behind."""
    from hpc import slurm
    from hpc.errors import UserError

    if slurm.found_here() and not slurm.inside_allocation():
        raise UserError(
            "this is a login node (Slurm is here and no allocation), and a measurement belongs on a node with a GPU. With your account and"
            f" partition: srun --ntasks=1 --gpus-per-task=1 --time=0:20:00 {shlex.join(['equihpc', *sys.argv[1:]])}"
        )
    run, config = first_pretraining(file, cluster, runs, set_, variant)
    planned = run.layout.world_size
    if planned != processes:
        share = config["batch"] // planned
        config["batch"] = share * processes
        print(f"the job has {planned} processes, this is {processes}: batch {config['batch']}, {share} for each", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="equihpc-") as scratch:
        path = Path(scratch) / "config.json"
        path.write_text(json.dumps(config))
        torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"] if processes > 1 else []
        # the checkpoint is measured on the file system of the runs
        place = ["--scratch", str(runs)] if runs.is_dir() else []
        words = [str(path), "--steps", str(steps), *place, *(["--json"] if json_ else [])]
        raise typer.Exit(call([sys.executable, "-m", *torchrun, "equissl.bench", *words]))
