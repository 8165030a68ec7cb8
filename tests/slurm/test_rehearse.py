"""A rehearsal on the real Slurm: a handful of faults over a handful of runs."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.faults import write_job
from tests.slurm.harness import slurm

pytestmark = pytest.mark.slurm
Run = Callable[..., subprocess.CompletedProcess[str]]
FAULTS = ("preempted", "warned", "rank-stopped", "checkpoint-truncated", "step-killed", "submitted-twice")


def test_a_job_with_faults_on_slurm_comes_to_the_same(testbed: Any, tmp_path: Path, equihpc: Run) -> None:
    write_job(tmp_path, num_runs=5, steps=240)
    only = [word for name in FAULTS for word in ("--only", name)]
    options = ("--cluster", "testbed", "--variant", "none", "--faults", "6", "--hang-seconds", "5", "--node-hours", "2", "--json")
    done = equihpc("rehearse", "job.yaml", *options, *only, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["ok"] is True
    assert sorted(hit["fault"] for hit in found["hits"]) == sorted(FAULTS), done.stderr
    lost = {hit["fault"]: hit["lost_steps"] for hit in found["hits"]}
    assert lost["preempted"] == lost["warned"] == 0, "they saved before they ended"


def test_a_rehearsal_ends_at_its_ceiling_of_node_hours(testbed: Any, tmp_path: Path, equihpc: Run) -> None:
    write_job(tmp_path, num_runs=2, steps=2000)
    done = equihpc("rehearse", "job.yaml", "--cluster", "testbed", "--variant", "none", "--node-hours", "0.002")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "the ceiling of node hours was reached" in done.stderr
    deadline = time.monotonic() + 60
    while "job." in slurm(testbed, "squeue", "--noheader", "--format=%j"):
        assert time.monotonic() < deadline
        time.sleep(0.5)
