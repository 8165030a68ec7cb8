"""Jobs on a real Slurm: arrays, two nodes, dependencies, preemption, time limit, cancel."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.harness import preempt, slurm

pytestmark = pytest.mark.slurm
ROOT = Path(__file__).parent.parent.parent
Run = Callable[..., subprocess.CompletedProcess[str]]


def job(steps: int = 5, seconds: float = 0.05, hours: float = 1.0, points: str = "[{value: 1}, {value: 2}]") -> str:
    return f"""
stages:
  a:
    entry: toy
    resources: {{nodes: 2, gpus_per_node: 1, hours: {hours}}}
    config: {{steps: {steps}, seconds: {seconds}}}
    sweep: {{list: {points}}}
  b:
    entry: toy
    after: a
    resources: {{gpus: 1}}
    config: {{steps: 2, upstream: "${{a}}"}}
"""


def expected(steps: int, value: float) -> float:
    return sum(value * step for step in range(1, steps + 1))


def result(folder: Path) -> float:
    return float(json.loads(next(folder.glob("runs/job/a/*/result.json")).read_text())["metrics"]["toy/x"])


def runs(equihpc: Run) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(equihpc("status", "job", "--json").stdout)["runs"]
    return found


def wait_for_step(folder: Path, step: int, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not any(json.loads(path.read_text())["step"] >= step for path in folder.glob("runs/job/a/*/progress.json")):
        assert time.monotonic() < deadline, "no run reached the step"
        time.sleep(0.1)


def attempts(equihpc: Run, run: dict[str, Any]) -> list[dict[str, Any]]:
    """Without those that Slurm itself could not start: its daemons crash now and then, and the run is tried again."""
    found: list[dict[str, Any]] = json.loads(equihpc("why", run["id"], "--json").stdout)["attempts"]
    return [attempt for attempt in found if "the task did not start" not in attempt["cause"]]


def test_arrays_over_two_nodes_and_their_evaluations(testbed: Any, toy: Path, equihpc: Run) -> None:
    (toy / "job.yaml").write_text(job())
    done = equihpc("submit", "job.yaml", "--cluster", "testbed", "--wait")
    assert done.returncode == 0, done.stdout + done.stderr
    found = runs(equihpc)
    assert [run["state"] for run in found] == ["complete"] * 4
    log = equihpc("logs", found[0]["id"]).stdout
    assert "[0] from step 0 of 5, world 2" in log
    assert "[1] from step 0 of 5, world 2" in log
    ended = {run["id"]: attempts(equihpc, run)[-1] for run in found}
    names = [ended[run["id"]]["job"] for run in found]
    assert names[0].endswith("_0")
    assert names[1].endswith("_1")
    assert names[0].partition("_")[0] == names[1].partition("_")[0], "one array"
    for pretraining, evaluation in ((0, 2), (1, 3)):
        assert ended[found[evaluation]["id"]]["time"] >= ended[found[pretraining]["id"]]["ended"]
    again = equihpc("submit", "job.yaml", "--cluster", "testbed")
    assert "0 runs started" in again.stdout
    assert "4 complete" in again.stdout


def test_a_preempted_run_saves_is_requeued_and_ends_the_same(testbed: Any, toy: Path, equihpc: Run) -> None:
    steps = 120
    (toy / "job.yaml").write_text(job(steps=steps, points="[{value: 3}]"))
    assert equihpc("submit", "job.yaml", "--cluster", "testbed").returncode == 0
    wait_for_step(toy, 10)
    preempt(testbed)
    done = equihpc("submit", "job.yaml", "--cluster", "testbed", "--wait")
    assert done.returncode == 0, done.stdout + done.stderr
    assert result(toy) == expected(steps, 3)
    first, last = attempts(equihpc, runs(equihpc)[0])
    assert (first["outcome"], first["cause"], last["outcome"]) == ("stopped", "preempted", "complete")
    assert first["job"] == last["job"], "requeued under its own id"
    assert last["step"] >= 10
    assert f"from step {last['step']} of {steps}" in equihpc("logs", runs(equihpc)[0]["id"]).stdout, "continued where it was saved"
    evaluation = attempts(equihpc, runs(equihpc)[1])
    assert len(evaluation) == 1
    assert evaluation[0]["time"] >= last["ended"]


def test_a_run_longer_than_its_time_limit_continues_in_the_next_segment(testbed: Any, toy: Path, equihpc: Run) -> None:
    """Slurm's own limit and its own USR2, of which it takes the lead with a grain of salt."""
    profile(toy, ("signal_lead_seconds: 60", "signal_lead_seconds: 110"))
    steps = 450
    (toy / "job.yaml").write_text(job(steps=steps, seconds=0.1, hours=2 / 60, points="[{value: 3}]"))
    done = equihpc("submit", "job.yaml", "--cluster", "testbed", "--wait", timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert result(toy) == expected(steps, 3)
    segments = attempts(equihpc, runs(equihpc)[0])
    assert len(segments) >= 2
    assert {segment["cause"] for segment in segments[:-1]} == {"time limit"}
    assert len({segment["job"] for segment in segments}) == 1
    positions = [segment["step"] for segment in segments]
    assert positions == sorted(set(positions)), "each segment started further on"
    log = equihpc("logs", runs(equihpc)[0]["id"], "--rank", "0").stdout
    assert all(f"from step {position} of {steps}" in log for position in positions)


def test_cancelled_jobs_are_not_resurrected(testbed: Any, toy: Path, equihpc: Run) -> None:
    (toy / "job.yaml").write_text(job(steps=2000))
    assert equihpc("submit", "job.yaml", "--cluster", "testbed").returncode == 0
    wait_for_step(toy, 5)
    name = next(run["slurm_job"] for run in runs(equihpc) if run["state"] == "running")
    slurm(testbed, "scancel", name)  # the user's own, without equihpc
    deadline = time.monotonic() + 40
    while (states := [run["state"] for run in runs(equihpc)])[0] != "cancelled":
        assert time.monotonic() < deadline, states
        time.sleep(0.5)
    assert "cancelled 2 runs" in equihpc("cancel", "job").stdout
    while (states := [run["state"] for run in runs(equihpc)]) != ["cancelled", "cancelled", "skipped", "cancelled"]:
        assert time.monotonic() < deadline, states
        time.sleep(0.5)
    time.sleep(3)
    assert not [line for line in slurm(testbed, "squeue", "--noheader", "--format=%j").splitlines() if line.startswith("job.")]
    assert "0 runs started" in equihpc("submit", "job.yaml", "--cluster", "testbed").stdout


def test_a_failed_pretraining_ends_its_evaluation_and_spares_the_others(testbed: Any, toy: Path, equihpc: Run) -> None:
    (toy / "job.yaml").write_text(job(points="[{fail_at: 2}, {value: 2}]"))
    done = equihpc("submit", "job.yaml", "--cluster", "testbed", "--wait")
    assert done.returncode == 1
    assert [run["state"] for run in runs(equihpc)] == ["failed", "complete", "skipped", "complete"]
    assert [len(attempts(equihpc, run)) for run in runs(equihpc)] == [1, 1, 0, 1]


def test_a_killed_rank_comes_back(testbed: Any, toy: Path, equihpc: Run) -> None:
    (toy / "job.yaml").write_text(job(points="[{kill_at: 3}]"))
    done = equihpc("submit", "job.yaml", "--cluster", "testbed", "--wait")
    assert done.returncode == 0, done.stdout + done.stderr
    assert result(toy) == expected(5, 1)
    first, last = attempts(equihpc, runs(equihpc)[0])
    assert (first["outcome"], last["outcome"]) == ("crashed", "complete")
    assert "SIGKILL" in first["cause"]


def test_a_submission_that_died_within_sbatch_is_found_again_and_runs(testbed: Any, toy: Path, equihpc: Run) -> None:
    """Neither the journal has the job ids, nor have the elements' files got their names."""
    (toy / "job.yaml").write_text(job())
    slurm(testbed, "scontrol", "update", "partitionname=booster", "state=down")
    assert equihpc("submit", "job.yaml", "--cluster", "testbed").returncode == 0
    journal = toy / "runs/job/.equihpc/journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(line for line in lines if '"submitted"' not in line))
    named = list(toy.glob("runs/job/.equihpc/slurm/*/*_submitted.pkl"))
    assert len(named) == 4
    for path in named:
        path.unlink()
    slurm(testbed, "scontrol", "update", "partitionname=booster", "state=up")
    again = equihpc("submit", "job.yaml", "--cluster", "testbed", "--wait")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "0 runs started" in again.stdout
    assert [len(attempts(equihpc, run)) for run in runs(equihpc)] == [1, 1, 1, 1]
    assert journal.read_text().count('"submitted"') == 2


def profile(folder: Path, *changes: tuple[str, str]) -> None:
    (folder / "slurm").mkdir()
    text = (ROOT / "slurm" / "testbed.yaml").read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (folder / "slurm" / "testbed.yaml").write_text(text)


@pytest.mark.parametrize("broken", ["srun_args: [--no-such-option]", "setup: ['false']"])
def test_a_task_that_cannot_start_is_given_up(testbed: Any, toy: Path, equihpc: Run, broken: str) -> None:
    profile(toy, ("poll_seconds: 1", f"poll_seconds: 1\n{broken}"))
    (toy / "job.yaml").write_text(job(points="[{value: 3}]"))
    done = equihpc("submit", "job.yaml", "--cluster", "testbed", "--wait")
    assert done.returncode == 1
    failed, skipped = runs(equihpc)
    assert (failed["state"], skipped["state"]) == ("failed", "skipped")
    assert "3 restarts without a new checkpoint" in failed["cause"]
    assert "the task did not start" in failed["cause"]


def test_packed_runs_fail_alone(testbed: Any, toy: Path, equihpc: Run) -> None:
    """Four runs share a node: the failed one is failed at once, the evaluations of the others start."""
    profile(toy, ("poll_seconds: 1", "poll_seconds: 1\nwhole_nodes: true"))
    text = job(points="[{value: 1}, {fail_at: 2}, {value: 2}, {kill_at: 3}]").replace("nodes: 2, gpus_per_node: 1", "gpus: 1")
    (toy / "job.yaml").write_text(text)
    done = equihpc("submit", "job.yaml", "--cluster", "testbed", "--wait")
    assert done.returncode == 1
    found = runs(equihpc)
    assert [run["state"] for run in found] == ["complete", "failed", "complete", "complete", "complete", "skipped", "complete", "complete"]
    assert [len(attempts(equihpc, run)) for run in found[:4]] == [1, 1, 1, 2], "the failed one was not repeated with its neighbour"
    assert len({attempts(equihpc, run)[0]["job"] for run in found[:4]}) == 1
