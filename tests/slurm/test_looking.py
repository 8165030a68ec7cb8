"""What people see of runs on a real Slurm: logs that go on through a preemption, the causes of ends, few questions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.harness import preempt, slurm

Run = Callable[..., subprocess.CompletedProcess[str]]
JOB = """
stages:
  wide: {entry: toy, resources: {nodes: 2, gpus_per_node: 1}, config: {steps: 160, seconds: 0.1}}
  narrow: {entry: toy, resources: {gpus: 1}, config: {steps: 3}}
"""


def until(condition: Callable[[], Any], seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.5)
    return found


@pytest.mark.slurm
def test_logs_and_causes_through_a_preemption_and_a_cancelled_job(testbed: Any, toy: Path, equihpc: Run) -> None:
    (toy / "job.yaml").write_text(JOB)
    calls, real = toy / "calls", slurm(testbed, "which", "squeue").strip()
    (toy / "bin").mkdir()
    (toy / "bin" / "squeue").write_text(f'#!/bin/sh\necho $(date +%s.%N) >> {calls}\nexec {real} "$@"\n')
    (toy / "bin" / "squeue").chmod(0o755)
    counted = {"PATH": f"{toy / 'bin'}:{os.environ['PATH']}"}

    def runs() -> dict[str, dict[str, Any]]:
        return {run["stage"]: run for run in json.loads(equihpc("status", "--json", env=counted).stdout)["runs"]}

    slurm(testbed, "scontrol", "update", "nodename=ALL", "state=drain", "reason=test")
    try:
        assert equihpc("submit", "job.yaml", "--cluster", "testbed", env=counted).returncode == 0
        assert {run["state"] for run in runs().values()} == {"pending"}, "just submitted is not lost"
        slurm(testbed, "scancel", runs()["narrow"]["slurm_job"])
    finally:
        slurm(testbed, "scontrol", "update", "nodename=ALL", "state=resume")
    calls.unlink()
    began = time.time()
    follow = subprocess.Popen(
        [sys.executable, "-m", "hpc.cli", "logs", "-f", "wide"], cwd=toy, env={**os.environ, **counted}, stdout=subprocess.PIPE, text=True
    )
    screens = [toy / "screen_0", toy / "screen_1"]
    watch = []
    for screen in screens:
        with screen.open("w") as file:
            command = [sys.executable, "-m", "hpc.cli", "status", "--watch"]
            watch.append(subprocess.Popen(command, cwd=toy, env={**os.environ, **counted}, stdout=file))
    until(lambda: runs()["wide"]["step"] > 5)
    preempt(testbed, 10)
    until(lambda: bool(slurm(testbed, "squeue", "--noheader", "--partition=urgent", "--states=running")))
    slurm(testbed, "scontrol", "update", "nodename=ALL", "state=drain", "reason=test")  # it waits until all have seen it
    try:
        assert until(lambda: all("requeued" in screen.read_text() for screen in screens))
    finally:
        slurm(testbed, "scontrol", "update", "nodename=ALL", "state=resume")
    until(lambda: runs()["wide"]["attempts"] == 2)
    assert until(lambda: runs()["wide"]["state"] == "complete")
    said = follow.communicate(timeout=60)[0].splitlines()
    begins = [line for line in said if "from step" in line][:2]  # of two nodes, in any order
    assert sorted(begins) == [f"[{rank}] from step 0 of 160, world 2" for rank in (0, 1)]
    again = [line for line in said if "from step" in line][2:]
    assert sorted(line[:3] for line in again) == ["[0]", "[1]"]
    assert all("from step 0 " not in line for line in again)
    for process, screen in zip(watch, screens, strict=True):
        process.wait(timeout=60)
        lines = screen.read_text().splitlines()
        assert any(line.startswith("wide ") and line.endswith(" complete") for line in lines)
        assert lines[-1].startswith("1 planned, 1 complete; ")
        assert any("requeued" in line for line in lines)
    asked = [float(line) for line in calls.read_text().split()]
    assert len(asked) <= time.time() - began + 2, "four processes, poll_seconds 1"
    why = json.loads(equihpc("why", "wide", "--json").stdout)
    assert [(attempt["outcome"], attempt["cause"]) for attempt in why["attempts"]] == [("stopped", "preempted"), ("complete", "")]
    assert why["attempts"][0]["to_step"] == why["attempts"][1]["step"] > 5
    assert why["next"] == "complete: nothing more"
    lost = until(lambda: json.loads(equihpc("why", "narrow", "--json").stdout)["jobs"], 20)
    assert list(lost.values()) == ["cancelled by root (Slurm: CANCELLED)"]
    assert "complete" in equihpc("status").stdout
