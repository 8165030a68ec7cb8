"""What people do to jobs on a real Slurm: hold, throttle, chains, site limits, hostile names, containers, mail, groups."""

from __future__ import annotations

import grp
import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.harness import preempt, slurm
from tests.slurm.test_jobs import attempts, expected, job, profile, result, runs, wait_for_step

pytestmark = pytest.mark.slurm
Run = Callable[..., subprocess.CompletedProcess[str]]


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def submit(equihpc: Run, *options: str) -> subprocess.CompletedProcess[str]:
    return equihpc("submit", "job.yaml", "--cluster", "testbed", *options, timeout=240)


def test_hold_throttle_prune_and_release(testbed: Any, toy: Path, equihpc: Run) -> None:
    points = [{"value": value} for value in range(1, 7)]
    (toy / "job.yaml").write_text(job(steps=100, points=json.dumps(points)))
    profile(toy, ("array_parallelism: 1000", "array_parallelism: 1"))
    assert submit(equihpc).returncode == 0

    def num_running() -> int:
        return sum(run["stage"] == "a" and run["state"] == "running" for run in runs(equihpc))

    wait_for(lambda: num_running() == 1)
    assert "at most 3 elements at once" in equihpc("throttle", "job", "3").stdout
    wait_for(lambda: num_running() == 3)
    last = next(run for run in runs(equihpc) if run["params"]["a.value"] == 6)
    assert "held 1 runs" in equihpc("hold", last["id"]).stdout
    (toy / "job.yaml").write_text(job(steps=100, points=json.dumps([point for point in points if point["value"] != 5])))
    assert "cancelled 2 runs that are not in the file any more" in submit(equihpc, "--prune", "--yes").stdout
    wait_for(lambda: [run["state"] for run in runs(equihpc) if run["stage"] == "a"] == ["complete"] * 4 + ["pending"])
    reasons = slurm(testbed, "squeue", "--me", "--noheader", "--array", "--format=%K %r").splitlines()
    assert any(reason.startswith("5 JobHeld") for reason in reasons), reasons
    assert "released 1 runs" in equihpc("release", "job").stdout
    done = submit(equihpc, "--wait")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 runs started" in done.stdout
    assert [run["state"] for run in runs(equihpc)] == ["complete"] * 10
    assert not list(toy.glob("runs/job/?/value-5-*/COMPLETE"))


def test_where_nodes_may_not_requeue_the_next_segment_of_the_chain_continues(testbed: Any, toy: Path, equihpc: Run) -> None:
    profile(toy, ("poll_seconds: 1", "poll_seconds: 1\nrequeue: none"))
    steps = 120
    both = '  c:\n    entry: toy\n    after: [a, b]\n    resources: {gpus: 1}\n    config: {steps: 2, upstream: "${b}"}\n'
    (toy / "job.yaml").write_text(job(steps=steps, points="[{value: 3}]") + both)
    assert submit(equihpc, "--chain", "3").returncode == 0
    wait_for_step(toy, 10)
    preempt(testbed)
    done = submit(equihpc, "--wait")
    assert done.returncode == 0, done.stdout + done.stderr
    assert result(toy) == expected(steps, 3)
    first, last = attempts(equihpc, runs(equihpc)[0])
    assert (first["outcome"], last["outcome"]) == ("stopped", "complete")
    assert first["job"] != last["job"], "another job, not a requeue"
    for below in runs(equihpc)[1:]:  # the one that waits for two stages too
        (only,) = attempts(equihpc, below)
        assert only["outcome"] == "complete"
    assert [run["stage"] for run in runs(equihpc)] == ["a", "b", "c"]
    wait_for(lambda: not [line for line in slurm(testbed, "squeue", "--noheader", "--format=%j").splitlines() if line.startswith("job.")])


def test_packed_evaluations_wait_for_a_run_that_is_started_again(testbed: Any, toy: Path, equihpc: Run) -> None:
    profile(toy, ("poll_seconds: 1", "poll_seconds: 1\nwhole_nodes: true"))
    text = job(steps=150, points="[{kill_at: 3}, {value: 2}]").replace("nodes: 2, gpus_per_node: 1", "nodes: 1")
    (toy / "job.yaml").write_text(text + "budgets: {node_failures: 0}\n")
    assert submit(equihpc).returncode == 0
    wait_for(lambda: [run["state"] for run in runs(equihpc)] == ["failed", "running", "pending", "pending"])
    renamed = (toy / "job.yaml").read_text().replace("sweep: {list:", "sweep: {grid: {seed: [0]}, list:")
    (toy / "job.yaml").write_text(renamed)  # the same runs under other names
    done = submit(equihpc, "--retry", "failed")
    assert "1 runs started" in done.stdout, done.stdout + done.stderr
    assert "0 runs started" in submit(equihpc).stdout
    done = submit(equihpc, "--wait")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [len(attempts(equihpc, run)) for run in runs(equihpc)] == [2, 1, 1, 1]


def test_a_site_that_admits_few_elements_gets_them_in_turn(testbed: Any, toy: Path, equihpc: Run) -> None:
    profile(toy, ("poll_seconds: 1", "poll_seconds: 1\nmax_submitted: 4"))
    (toy / "job.yaml").write_text(job(points=json.dumps([{"fail_at": 2}, *({"value": value} for value in range(1, 6))])))
    waiting = subprocess.Popen(
        [sys.executable, "-m", "hpc.cli", "submit", "job.yaml", "--cluster", "testbed", "--wait"],
        cwd=toy,
        stdout=subprocess.PIPE,
        text=True,
    )
    most = 0
    while waiting.poll() is None:
        names = slurm(testbed, "squeue", "--me", "--noheader", "--array", "--format=%j").split()
        most = max(most, sum(name.startswith("job.") for name in names))
        time.sleep(0.2)
    waiting.communicate()
    assert waiting.returncode == 1, "one of them failed"
    found = runs(equihpc)
    assert [run["state"] for run in found] == ["failed", *["complete"] * 5, "skipped", *["complete"] * 5]
    assert len(attempts(equihpc, found[0])) == 1, "later waves leave it alone"
    assert 2 <= most <= 4


@pytest.mark.parametrize("evil", ["'; touch injected; '", "$(touch injected)", '`touch injected` "x"'])
def test_nothing_from_a_file_reaches_a_shell(testbed: Any, toy: Path, equihpc: Run, evil: str) -> None:
    """In the runs' folder, the profile's environment and a config; the rank sees the texts as they are."""
    profile(toy, ("environment: {GLOO_SOCKET_IFNAME: lo}", f"environment: {{GLOO_SOCKET_IFNAME: lo, EVIL: {json.dumps(evil)}}}"))
    code = (toy / "toy.py").read_text()
    code = code.replace('"toy/x": at["x"]', '"toy/x": float(os.environ["EVIL"] == config["text"])').replace(
        "seed: int = 0", 'seed: int = 0\n    text: str = ""'
    )
    (toy / "toy.py").write_text(code)
    (toy / "job.yaml").write_text(job(points=json.dumps([{"text": evil}])))
    place = toy / f"a {evil.replace('/', '')}"
    done = submit(equihpc, "--wait", "--runs", str(place))
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(next(place.glob("job/a/*/result.json")).read_text())["metrics"]["toy/x"] == 1.0
    assert not [path for folder in (toy, place, Path.cwd()) for path in folder.rglob("injected")]


def test_container_mail_and_group(testbed: Any, toy: Path, equihpc: Run) -> None:
    """The container is a script that stands for apptainer: it notes how it was called and runs the command.

    Each call is noted in one write: the nodes of a job call it at the same time.
    """
    tool = toy / "fake-apptainer"
    lines = ["#!/bin/bash", f'echo "$*" >> {toy}/called', 'while [ "$1" != image.sif ]; do shift; done', "shift 2"]
    tool.write_text("\n".join([*lines, f'exec {sys.executable} "$@"']) + "\n")
    tool.chmod(0o755)
    group = grp.getgrgid(next(gid for gid in (os.getgroups() or [os.getgid()]))).gr_name
    profile(
        toy, ("poll_seconds: 1", f"poll_seconds: 1\ngroup: {group}\ncontainer: {{command: '{tool} exec --nv', binds: ['/data:/data']}}")
    )
    text = job(steps=100, points="[{value: 3}]") + "container: image.sif\nnotify: {mail: someone@example.org, when: end}\n"
    (toy / "job.yaml").write_text(text)
    assert submit(equihpc).returncode == 0
    wait_for_step(toy, 3)
    facts = slurm(testbed, "scontrol", "show", "job", runs(equihpc)[0]["slurm_job"])
    assert "MailUser=someone@example.org" in facts
    assert "MailType=END" in facts
    done = submit(equihpc, "--wait")
    assert done.returncode == 0, done.stdout + done.stderr
    calls = (toy / "called").read_text().splitlines()
    assert calls
    for words in map(str.split, calls):
        assert words[:2] == ["exec", "--nv"]
        assert words[words.index("--bind") + 1] == str(toy / "runs")
        assert "/data:/data" in words
        assert words[words.index("image.sif") + 1] == "python3"
    for path in (toy / "runs/job").rglob("*"):
        if path.name.startswith("node_") or path.name in ("result.json", "COMPLETE", "config.json"):
            assert path.group() == group
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0o040, path
