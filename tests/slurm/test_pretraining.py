"""The real training on a real Slurm: the quickstart over two nodes, preempted, against the same on this machine."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.harness import preempt

pytestmark = pytest.mark.slurm
ROOT = Path(__file__).parent.parent.parent
Run = Callable[..., subprocess.CompletedProcess[str]]
QUICK = (
    "--set",
    "pretrain.num_steps=24",
    "--set",
    "pretrain.log_every=1",
    "--set",
    "prepare.train_patches=24",
    "--set",
    "prepare.val_patches=8",
)
QUICK = (*QUICK, "--set", "evaluate.preset=smoke")


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Result of every run by its folder's name without the hash."""
    found = {path.parent.name.rpartition("-")[0]: json.loads(path.read_text()) for path in folder.glob("runs/quickstart/*/*/result.json")}
    for path in folder.glob("runs/quickstart/pretrain/*/metrics.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        found[path.parent.name.rpartition("-")[0]]["curve"] = [(line["step"], line["loss"], line["grad_norm"]) for line in lines]
    return found


def test_the_quickstart_on_this_machine_and_preempted_on_slurm_is_the_same_run_bit_for_bit(
    testbed: Any, tmp_path: Path, equihpc: Run
) -> None:
    """Same ranks and threads: every loss of every step, the weights and the metrics are equal."""
    here, there = tmp_path / "here", tmp_path / "there"
    job = str(ROOT / "jobs" / "quickstart.yaml")
    threads = {"OMP_NUM_THREADS": "1"}
    done = equihpc("submit", job, *QUICK, "--cluster", "local", "--runs", str(here / "runs"), "--wait", timeout=400, env=threads)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "r2/rotation" in done.stdout
    assert (here / "runs/quickstart/report.html").is_file()

    options = (*QUICK, "--cluster", "testbed", "--runs", str(there / "runs"))
    assert equihpc("submit", job, *options, env=threads).returncode == 0
    deadline = time.monotonic() + 120
    while not any(json.loads(path.read_text())["step"] >= 5 for path in there.glob("runs/quickstart/pretrain/*/progress.json")):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    preempt(testbed)
    done = equihpc("submit", job, *options, "--wait", timeout=400, env=threads)
    assert done.returncode == 0, done.stdout + done.stderr

    ours, theirs = read(here), read(there)
    assert ours.keys() == theirs.keys()
    assert len(ours) == 7
    attempts = {path.parent.name: path.read_text() for path in there.glob("runs/quickstart/pretrain/*/attempts.jsonl")}
    assert any('"preempted"' in text for text in attempts.values())
    for name, mine in ours.items():
        other = theirs[name]
        if "curve" in mine:
            assert [step for step, _, _ in other["curve"]] == list(range(1, 25))
            assert other["curve"] == mine["curve"]
        assert other.get("weights_sha256") == mine.get("weights_sha256")
        for result in (mine, other):
            result.get("metrics", {}).pop("pretrain/images_per_s", None)
        assert other.get("metrics") == mine.get("metrics")
