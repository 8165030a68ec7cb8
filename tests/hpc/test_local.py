"""Real processes on this machine: the local runner, the supervisor and its ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]

JOB = """
stages:
  a:
    entry: toy
    resources: {nodes: 2, gpus_per_node: 1}
    config: {steps: %(steps)s, seconds: %(seconds)s}
    sweep: {list: %(points)s}
  b:
    entry: toy
    after: a
    resources: {gpus: 1}
    config: {steps: 2, upstream: "${a}"}
"""


def write(folder: Path, points: list[dict[str, Any]], steps: int = 5, seconds: float = 0.02, name: str = "job") -> None:
    (folder / f"{name}.yaml").write_text(JOB % {"steps": steps, "seconds": seconds, "points": json.dumps(points)})


def states(equihpc: Run, name: str = "job") -> dict[str, dict[str, Any]]:
    runs = json.loads(equihpc("status", name, "--json").stdout)["runs"]
    return {f"{run['stage']} {run['params']}": run for run in runs}


def wait_for_step(folder: Path, step: int, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not any(json.loads(path.read_text())["step"] >= step for path in folder.glob("runs/*/a/*/progress.json")):
        assert time.monotonic() < deadline, "no run reached the step"
        time.sleep(0.05)


def metrics(folder: Path, job: str = "job") -> dict[str, float]:
    return {
        path.parent.name.rpartition("-")[2]: json.loads(path.read_text())["metrics"]["toy/x"]
        for path in folder.glob(f"runs/{job}/a/*/result.json")
    }


def test_a_job_runs_to_its_table_and_again_starts_nothing(toy: Path, equihpc: Run) -> None:
    write(toy, [{"value": 1}, {"value": 2}])
    first = equihpc("submit", "job.yaml", "--wait")
    assert first.returncode == 0, first.stdout + first.stderr
    assert "4 runs started on local" in first.stdout
    assert "report.csv" in first.stdout
    attempts = {path: path.read_bytes() for path in toy.glob("runs/job/*/*/attempts.jsonl")}
    assert len(attempts) == 4
    second = equihpc("submit", "job.yaml", "--wait")
    assert second.returncode == 0
    assert "0 runs started" in second.stdout
    assert "left alone: 4 complete" in second.stdout
    assert {path: path.read_bytes() for path in attempts} == attempts
    rows = json.loads(equihpc("report", "job", "--json").stdout)["rows"]
    assert {row["params"]["a.value"]: row["metrics"]["toy/x"] for row in rows} == {
        1: {"mean": 3.0, "std": None, "n": 1},
        2: {"mean": 3.0, "std": None, "n": 1},
    }
    assert equihpc("logs", "job/a/value-1", "--rank", "1").stdout.splitlines() == ["[1] from step 0 of 5, world 2"]


def test_adding_a_point_starts_only_the_new_runs(toy: Path, equihpc: Run) -> None:
    write(toy, [{"value": 1}])
    assert equihpc("submit", "job.yaml", "--wait").returncode == 0
    write(toy, [{"value": 1}, {"value": 2}])
    more = equihpc("submit", "job.yaml", "--wait")
    assert "2 runs started" in more.stdout
    assert "left alone: 2 complete" in more.stdout
    write(toy, [{"value": 2}], name="other")
    shared = equihpc("submit", "other.yaml", "--wait")
    assert shared.returncode == 0, shared.stdout + shared.stderr
    assert "0 runs started" in shared.stdout
    assert "toy/x" in shared.stdout, "its table stands although nothing ran"
    link = next((toy / "runs" / "other" / "a").iterdir())
    assert link.is_symlink()
    assert not os.path.isabs(os.readlink(link))
    write(toy, [{"value": 2, "seed": 0}])  # the same run with one more swept parameter
    assert "0 runs started" in equihpc("submit", "job.yaml", "--wait").stdout


def test_a_run_that_another_job_has_in_flight_is_not_executed_twice(toy: Path, equihpc: Run) -> None:
    write(toy, [{"value": 1}], steps=60, seconds=0.05)
    write(toy, [{"value": 1}], steps=60, seconds=0.05, name="other")
    assert equihpc("submit", "job.yaml").returncode == 0
    wait_for_step(toy, 2)
    second = equihpc("submit", "other.yaml")
    assert "0 runs started" in second.stdout
    (toy / "elsewhere").symlink_to(toy / "runs")
    assert "0 runs started" in equihpc("submit", "job.yaml", "--runs", "elsewhere/../elsewhere").stdout
    assert equihpc("cancel", "other").stdout.startswith("nothing to cancel"), "it is the other job's run"
    assert equihpc("submit", "other.yaml", "--wait").returncode == 0
    assert {run["attempts"] for run in states(equihpc).values()} == {1}


def test_a_second_supervisor_leaves_a_running_run_alone(toy: Path, equihpc: Run) -> None:
    write(toy, [{"value": 1}], steps=60, seconds=0.05)
    assert equihpc("submit", "job.yaml").returncode == 0
    wait_for_step(toy, 2)
    run = next((toy / "runs/job/a").iterdir())
    code = f"""
from pathlib import Path
from hpc.runs import RunFolder
from hpc.supervisor import Place, Signals, Supervisor
print(Supervisor(RunFolder(Path({str(run)!r})), Place(None, (0,), ()), Signals())())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "waiting", done.stdout + done.stderr
    assert equihpc("submit", "job.yaml", "--wait").returncode == 0
    assert next(iter(states(equihpc).values()))["attempts"] == 1


def test_a_rank_that_never_shows_a_sign_of_life_is_found(toy: Path, equihpc: Run) -> None:
    (toy / "slurm").mkdir()
    (toy / "slurm" / "local.yaml").write_text("{scheduler: local, startup_seconds: 3}")
    write(toy, [{"silent_seconds": 500.0}])
    assert equihpc("submit", "job.yaml", "--wait").returncode == 0
    hung = next(iter(states(equihpc).values()))
    why = json.loads(equihpc("why", hung["id"], "--json").stdout)["attempts"]
    assert [a["outcome"] for a in why] == ["crashed", "complete"]
    assert "rank 0" in why[0]["cause"]


def test_tensorboard_starts(toy: Path, equihpc: Run) -> None:
    write(toy, [{"value": 1}])
    assert equihpc("submit", "job.yaml", "--wait").returncode == 0
    command = [sys.executable, "-m", "hpc.cli", "tensorboard", "job", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "http://" in line:
                break
        assert "http://" in lines[-1], "".join(lines)
    finally:
        process.kill()
        process.communicate()


def test_an_exception_fails_at_once_and_spares_the_rest(toy: Path, equihpc: Run) -> None:
    write(toy, [{"fail_at": 2}, {"value": 2}])
    done = equihpc("submit", "job.yaml", "--wait")
    assert done.returncode == 1
    found = states(equihpc)
    assert [run["state"] for run in found.values()] == ["failed", "complete", "skipped", "complete"]
    failed = next(iter(found.values()))
    assert failed["attempts"] == 1
    assert "boom at step 2" in failed["cause"]
    why = json.loads(equihpc("why", failed["id"], "--json").stdout)
    assert why["attempts"][0]["outcome"] == "failed"
    assert "raise RuntimeError" in why["attempts"][0]["message"]


def test_a_killed_rank_is_replaced_and_the_result_is_the_same(toy: Path, equihpc: Run) -> None:
    write(toy, [{"kill_at": 3}, {"value": 1.0}])
    assert equihpc("submit", "job.yaml", "--wait").returncode == 0
    killed, undisturbed = list(states(equihpc).values())[:2]
    assert killed["attempts"] == 2
    assert undisturbed["attempts"] == 1
    assert len(set(metrics(toy).values())) == 1
    why = json.loads(equihpc("why", killed["id"], "--json").stdout)["attempts"]
    assert [a["outcome"] for a in why] == ["crashed", "complete"]
    assert why[0]["cause"] == f"rank 0 on {os.uname().nodename} was killed by SIGKILL"


def test_a_hung_rank_is_found_and_its_stack_kept(toy: Path, equihpc: Run) -> None:
    (toy / "slurm").mkdir()
    (toy / "slurm" / "local.yaml").write_text("{scheduler: local, hang_seconds: 3}")
    write(toy, [{"hang_at": 3}])
    assert equihpc("submit", "job.yaml", "--wait").returncode == 0
    hung = next(iter(states(equihpc).values()))
    why = json.loads(equihpc("why", hung["id"], "--json").stdout)["attempts"]
    assert [a["outcome"] for a in why] == ["crashed", "complete"]
    assert "rank 0" in why[0]["cause"]
    assert "no sign of life" in why[0]["cause"]
    log = equihpc("logs", hung["id"]).stdout
    assert 'toy.py", line' in log
    assert "in main" in log


def test_interrupted_runs_save_and_continue_to_the_same_result(toy: Path, equihpc: Run) -> None:
    write(toy, [{"value": 3}], steps=40, seconds=0.05)
    assert equihpc("submit", "job.yaml").returncode == 0
    wait_for_step(toy, 5)
    os.kill(int((toy / "runs/job/.equihpc/local.lock").read_text()), signal.SIGTERM)
    deadline = time.monotonic() + 20
    while (state := next(iter(states(equihpc).values())))["state"] != "planned":
        assert time.monotonic() < deadline, state
        time.sleep(0.1)
    assert 5 <= state["step"] < 40
    assert state["cause"] == "interrupted"
    assert json.loads(equihpc("why", state["id"], "--json").stdout)["attempts"][0]["step"] == 0
    assert equihpc("submit", "job.yaml", "--wait").returncode == 0
    log = equihpc("logs", state["id"], "--rank", "0").stdout
    assert f"from step {state['step']} of 40" in log
    assert list(metrics(toy).values()) == [sum(3.0 * step for step in range(1, 41))]


def test_ctrl_c_while_waiting_saves_every_run(toy: Path) -> None:
    write(toy, [{"value": 3}], steps=100, seconds=0.05)
    process = subprocess.Popen([sys.executable, "-m", "hpc.cli", "submit", "job.yaml", "--wait"], stdout=subprocess.PIPE, text=True)
    wait_for_step(toy, 3)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "the same submit continues" in output
    assert list(toy.glob("runs/job/a/*/checkpoints/step_*/state.json"))


def test_cancelled_runs_stay_cancelled_until_asked_for(toy: Path, equihpc: Run) -> None:
    write(toy, [{"value": 1}, {"value": 2}], steps=60, seconds=0.05)
    assert equihpc("submit", "job.yaml").returncode == 0
    wait_for_step(toy, 2)
    assert "cancelled 4 runs" in equihpc("cancel", "job").stdout
    deadline = time.monotonic() + 20
    while {run["state"] for run in states(equihpc).values()} != {"cancelled"}:
        assert time.monotonic() < deadline, states(equihpc)
        time.sleep(0.1)
    again = equihpc("submit", "job.yaml", "--wait")
    assert "0 runs started" in again.stdout
    assert again.returncode == 1
    assert "4 runs started" in equihpc("submit", "job.yaml", "--wait", "--retry", "cancelled").stdout
    assert {run["state"] for run in states(equihpc).values()} == {"complete"}


def test_a_purged_run_is_not_silently_run_again(toy: Path, equihpc: Run) -> None:
    import shutil

    write(toy, [{"value": 1}])
    assert equihpc("submit", "job.yaml", "--wait").returncode == 0
    shutil.rmtree(next((toy / "runs/job/a").iterdir()))
    assert next(iter(states(equihpc).values()))["state"] == "purged"
    again = equihpc("submit", "job.yaml")
    assert "0 runs started" in again.stdout
    assert "1 purged" in again.stdout
    assert "1 runs started" in equihpc("submit", "job.yaml", "--wait", "--retry", "purged").stdout


def test_a_result_is_stale_when_the_weights_below_it_changed(toy: Path, equihpc: Run) -> None:
    write(toy, [{"value": 1}])
    assert equihpc("submit", "job.yaml", "--wait").returncode == 0
    result = next(toy.glob("runs/job/a/*/result.json"))
    result.write_text(json.dumps({**json.loads(result.read_text()), "weights_sha256": "others"}))
    assert [run["state"] for run in states(equihpc).values()] == ["complete", "stale"]
    again = equihpc("submit", "job.yaml", "--wait")
    assert again.returncode == 0
    assert "1 runs started" in again.stdout
    assert [run["state"] for run in states(equihpc).values()] == ["complete", "complete"]
    assert len(list(toy.glob("runs/job/b/.stale-*"))) == 1, "the old result is kept aside"


def test_queued_work_runs_the_code_of_its_submission(toy: Path, equihpc: Run) -> None:
    write(toy, [{"value": 1}, {"value": 2}], steps=40, seconds=0.05)
    assert equihpc("submit", "job.yaml").returncode == 0
    wait_for_step(toy, 1)
    (toy / "toy.py").write_text("raise RuntimeError('edited while the job was queued')\n")
    deadline = time.monotonic() + 40
    while {run["state"] for run in states(equihpc).values()} != {"complete"}:
        assert time.monotonic() < deadline, states(equihpc)
        time.sleep(0.2)


def test_folders_are_private_and_few(toy: Path, equihpc: Run) -> None:
    write(toy, [{"value": 1}])
    assert equihpc("submit", "job.yaml", "--wait").returncode == 0
    for path in (toy / "runs").rglob("*"):
        assert path.lstat().st_mode & 0o077 == 0 or path.is_symlink(), path
    assert len(list(next((toy / "runs/job/a").iterdir()).rglob("*"))) < 15


def test_no_rank_outlives_a_killed_supervisor(toy: Path, equihpc: Run) -> None:
    write(toy, [{"value": 1}], steps=500, seconds=0.05)
    assert equihpc("submit", "job.yaml").returncode == 0
    wait_for_step(toy, 2)
    os.kill(int((toy / "runs/job/.equihpc/local.lock").read_text()), signal.SIGKILL)
    deadline = time.monotonic() + 10
    while subprocess.run(["pgrep", "-f", f"hpc.rank {toy}"], capture_output=True).returncode == 0:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert next(iter(states(equihpc).values()))["state"] == "planned"


def test_a_runner_whose_folders_are_deleted_ends(toy: Path, equihpc: Run) -> None:
    import shutil

    from hpc import local

    write(toy, [{"value": 1}], steps=40, seconds=0.05)
    assert equihpc("submit", "job.yaml").returncode == 0
    wait_for_step(toy, 2)
    runner = int((toy / "runs/job/.equihpc/local.lock").read_text())
    for stage in ("a", "b"):
        shutil.rmtree(toy / "runs/job" / stage)
    deadline = time.monotonic() + 20
    while local.alive(toy / "runs/job"):
        assert time.monotonic() < deadline, f"runner {runner} goes on without its runs"
        time.sleep(0.1)


@pytest.mark.parametrize("answer", ["sbatch", "unconfigured"])
def test_a_login_node_refuses_local_training(toy: Path, equihpc: Run, answer: str) -> None:
    write(toy, [{"value": 1}])
    tools = toy / "bin"
    tools.mkdir()
    (tools / "sbatch").write_text("#!/bin/sh\necho slurm 22.05\n")
    message = "SlurmctldHost=x" if answer == "sbatch" else "error: Could not establish a configuration source"
    (tools / "scontrol").write_text(f"#!/bin/sh\necho '{message}' >&2\nexit {int(answer != 'sbatch')}\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    path = {"PATH": f"{tools}:{os.environ['PATH']}"}
    for options in ([], ["--cluster", "local"]):
        done = equihpc("submit", "job.yaml", *options, env=path)
        if answer == "sbatch":
            assert done.returncode == 2
            assert "--cluster" in done.stderr
            assert not (toy / "runs").exists()
        else:
            assert done.returncode == 0, done.stderr
    if answer == "sbatch":
        assert "login node" in done.stderr
        assert equihpc("submit", "job.yaml", "--cluster", "local", "--wait", env={**path, "SLURM_JOB_ID": "1"}).returncode == 0
