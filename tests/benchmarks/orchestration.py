"""How long people wait for the command, each figure beside an alternative in the same run.

    python tests/benchmarks/orchestration.py [--cluster testbed] [--repeat 5]

Without --cluster only what needs no Slurm is measured. Medians of wall time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))
from tests.conftest import TOY  # noqa: E402

SWEEP = """
stages:
  pretrain:
    entry: equissl.pretrain
    resources: {nodes: 4, hours: 24}
    config:
      {data: imagenet1k, method: ibot, epochs: 100, batch: 1024, transformation: se2, auxiliary: {name: reconstruction, num_images: 2}}
    sweep: {grid: {auxiliary.lambda: %s, seed: %s}}
  evaluate:
    entry: equissl.evaluate
    after: pretrain
    resources: {gpus: 1}
    config: {checkpoint: "${pretrain}", task: knn}
"""
THOUSAND = """
stages:
  a: {entry: toy, resources: {gpus: 1}, config: {steps: 1}, sweep: {grid: {value: %s}}}
  b: {entry: toy, after: a, resources: {gpus: 1}, config: {steps: 1, upstream: "${a}"}}
"""


def seconds(command: list[str], repeat: int = 1, **kwargs: object) -> float:
    found = []
    for _ in range(repeat):
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, **kwargs)  # type: ignore[call-overload]
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def row(what: str, ours: float, alternative: str, theirs: float) -> None:
    print(f"| {what} | {ours:.2f} s | {alternative}: {theirs:.2f} s | {theirs / ours:.1f}× |", flush=True)


@contextlib.contextmanager
def counted(folder: Path, tool: str) -> Iterator[Callable[[], int]]:
    """A `tool` on PATH that counts its calls and passes them on."""
    import shutil

    real, calls = shutil.which(tool), folder / f"{tool}.calls"
    wrapper = folder / "bin" / tool
    wrapper.parent.mkdir(exist_ok=True)
    wrapper.write_text(f'#!/bin/sh\necho x >> {calls}\nexec {real} "$@"\n')
    wrapper.chmod(0o755)
    yield lambda: calls.read_text().count("x") if calls.exists() else 0


def on_slurm(folder: Path, equihpc: list[str], cluster: str, slurm_conf: str) -> None:
    """The partition is closed meanwhile: submission and status are measured, not the emulated nodes' two cores."""
    (folder / "toy.py").write_text(TOY)
    (folder / "thousand.yaml").write_text(THOUSAND % json.dumps(list(range(1000))))
    environment = {**os.environ, "SLURM_CONF": slurm_conf}
    control = ["scontrol", "update", "partitionname=booster"]
    subprocess.run([*control, "state=down"], check=True, env=environment)
    try:
        with counted(folder, "sbatch") as sbatch, counted(folder, "squeue") as squeue:
            counting = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
            submit = seconds([*equihpc, "submit", "thousand.yaml", "--cluster", cluster], cwd=folder, env=counting)
            submissions = sbatch()
            before = squeue()
            status = seconds([*equihpc, "status", "thousand", "--json"], cwd=folder, env=counting)
            asked = squeue() - before
        script = "#!/bin/bash\\n#SBATCH --partition=booster\\ntrue\\n"
        loop = f"for i in $(seq 50); do printf '{script}' | sbatch --output=/dev/null >/dev/null; done"
        one_by_one = seconds(["bash", "-c", loop], env=environment) / 50 * 2000
        row(
            f"submit 1000 grid points and their evaluations, {submissions} sbatch calls",
            submit,
            "one bare sbatch each (50 measured)",
            one_by_one,
        )
        ask = "for i in $(seq 20); do squeue --me --noheader -o %T -n x; done"
        per_run = seconds(["bash", "-c", ask], env=environment) / 20 * 2000
        row(f"status of 2000 runs, {asked} squeue call", status, "one squeue per run (20 measured)", per_run)
    finally:
        subprocess.run([*equihpc, "cancel", "thousand"], check=True, cwd=folder, capture_output=True)
        subprocess.run(["scancel", "--me", "--partition=booster", "--name=sbatch"], env=environment, check=False)
        subprocess.run([*control, "state=up"], check=True, env=environment)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cluster")
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()
    equihpc = [sys.executable, "-m", "hpc.cli"]
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=base) as name:
        folder = Path(name)
        os.environ["PYTHONPATH"] = str(ROOT)
        torch = seconds([sys.executable, "-c", "import torch"])
        print("| what | equihpc | alternative in the same run | ratio |\n|---|---|---|---|")
        row("`equihpc --help`", seconds([*equihpc, "--help"], arguments.repeat), "import torch", torch)
        (folder / "sweep.yaml").write_text(SWEEP % ([i / 100 for i in range(100)], list(range(50))))
        plan = seconds([*equihpc, "plan", "sweep.yaml", "--cluster", "juwels-booster"], arguments.repeat, cwd=folder)
        bare = """
import yaml
from equissl.config import EvaluateConfig, PretrainConfig
job = yaml.safe_load(open("sweep.yaml"))["stages"]["pretrain"]
for weight in job["sweep"]["grid"]["auxiliary.lambda"]:
    for seed in job["sweep"]["grid"]["seed"]:
        PretrainConfig.model_validate({**job["config"], "seed": seed, "auxiliary": {**job["config"]["auxiliary"], "lambda": weight}})
        EvaluateConfig.model_validate({"checkpoint": "x", "task": "knn"})
"""
        row("plan of 10 000 runs", plan, "the bare validation of its configs", seconds([sys.executable, "-c", bare], cwd=folder))
        if arguments.cluster:
            from hpc import cluster

            conf = cluster.load(arguments.cluster)[0].slurm_conf
            assert conf is not None
            on_slurm(folder, equihpc, arguments.cluster, conf)


if __name__ == "__main__":
    main()
