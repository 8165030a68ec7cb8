"""Real processes on this machine: the local runner, the supervisor and its ranks."""

from __future__ import annotations

import functools
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
        1: {"mean": 3.0, "std": None, "n": 1, "values": [3.0]},
        2: {"mean": 3.0, "std": None, "n": 1, "values": [3.0]},
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
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGTERM):
        os.kill(int((toy / "runs/job/.equihpc/local.lock").read_text()), number)
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
    command = [sys.executable, "-m", "hpc.cli", "submit", "job.yaml", "--wait"]
    hear = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # the children of a background shell ignore it
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=hear)
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
    deadline = time.monotonic() + 20
    for stage in ("a", "b"):
        while (folder := toy / "runs/job" / stage).exists():  # the run may write into a folder that is just being emptied
            assert time.monotonic() < deadline, f"{folder} is made again and again"
            shutil.rmtree(folder, ignore_errors=True)
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


FAULTY = '''
"""An entry that cannot write."""
from pydantic import BaseModel, ConfigDict

class Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    wrapped: bool = False
    def check(self, world_size, upstream_configs):
        pass

def main(config, run_dir, stop):
    (run_dir / "checkpoints" / "step_7").mkdir(parents=True, exist_ok=True)
    for number in range(20000):
        print(f"line {number}: more than a pipe holds")
    try:
        with open("/dev/full", "w") as file:
            file.write("a checkpoint")
    except OSError as error:
        if config["wrapped"]:
            raise RuntimeError(f"the writer's thread failed: {error}") from None
        raise
'''


def test_a_full_disk_ends_the_run_with_that_message(toy: Path, equihpc: Run) -> None:
    (toy / "faulty.py").write_text(FAULTY)
    (toy / "job.yaml").write_text(
        "{budgets: {code_errors: 5}, stages: {a: {entry: faulty, resources: {gpus: 1}, sweep: {grid: {wrapped: [false, true]}}}}}"
    )
    assert equihpc("submit", "job.yaml", "--wait").returncode == 1
    for run in states(equihpc).values():
        assert (run["state"], run["attempts"]) == ("failed", 1), "not tried again, although exceptions are"
        assert run["cause"].startswith("disk full: rank 0:")
        assert "No space left on device" in run["cause"]
        message = json.loads(equihpc("why", run["id"], "--json").stdout)["attempts"][0]["message"]
        assert "inodes free" in message
        assert "equihpc gc" in message
        assert (Path(run["path"]) / "checkpoints" / "step_7").is_dir(), "the checkpoint before is untouched"


SUPERVISE = """
import sys
from pathlib import Path
from hpc.runs import RunFolder
from hpc.supervisor import Place, Signals, Supervisor
signals = Signals()
if sys.argv[2] == "full":
    import hpc.runs
    def full(path, record):
        raise OSError(28, "No space left on device", str(path))
    hpc.runs.append_json = full
else:
    signals.first = int(sys.argv[2]) or None
print(Supervisor(RunFolder(Path(sys.argv[1])), Place(None, (0,), ()), signals)())
"""


def supervise(run: Path, fault: str = "0") -> subprocess.CompletedProcess[str]:
    """One supervisor, without a runner. `fault`: the number of a signal that has already come, or `full`."""
    return subprocess.run([sys.executable, "-c", SUPERVISE, str(run), fault], capture_output=True, text=True, timeout=60)


def another_run(folder: Path, name: str) -> Path:
    """A run that was submitted and has not started: a copy of a complete one's spec."""
    done = next((folder / "runs" / "job" / "a").glob("value-*"))
    run = done.with_name(name)
    run.mkdir()
    (run / "spec.json").write_text(json.dumps({**json.loads((done / "spec.json").read_text()), "id": name, "hash": name}))
    return run


def test_supervisors_on_a_full_disk_and_before_the_ranks_listen(toy: Path, equihpc: Run) -> None:
    write(toy, [{"value": 1}])
    assert equihpc("submit", "job.yaml", "--wait").returncode == 0

    early = another_run(toy, "early")  # TERM comes before the ranks can hear it
    assert supervise(early, str(int(signal.SIGTERM))).stdout.split() == ["stopped"]
    assert supervise(early).stdout.split() == ["complete"]
    first, last = (json.loads(line) for line in (early / "attempts.jsonl").read_text().splitlines() if '"end"' in line)
    assert (first["outcome"], first["cause"], first["kind"], last["outcome"]) == ("stopped", "interrupted", "other", "complete")

    mute = another_run(toy, "mute")  # no log can be written: the work goes on
    (mute / "node_0.log").symlink_to("/dev/full")
    assert supervise(mute).stdout.split() == ["complete"]

    blind = another_run(toy, "blind")  # not even the record of the attempt can be written
    done = supervise(blind, "full")
    assert done.stdout.split() == ["failed"]
    assert "disk full" in done.stderr
    assert not (blind / "COMPLETE").exists()

    killed = another_run(toy, "killed")  # an attempt that left no end is closed by the next one
    start = {"event": "start", "attempt": 1, "time": time.time() - 60, "step": 0, "job": None}
    (killed / "attempts.jsonl").write_text(json.dumps(start) + "\n")
    assert supervise(killed).stdout.split() == ["complete"]
    closed = json.loads((killed / "attempts.jsonl").read_text().splitlines()[1])
    assert (closed["attempt"], closed["outcome"], closed["cause"]) == (1, "stopped", "the local runner was killed")


def test_a_stopped_rank_is_named_and_its_neighbours_stacks_are_kept(toy: Path, equihpc: Run) -> None:
    (toy / "slurm").mkdir()
    (toy / "slurm" / "local.yaml").write_text("{scheduler: local, hang_seconds: 3}")
    write(toy, [{"value": 1}], steps=60, seconds=0.1)
    assert equihpc("submit", "job.yaml").returncode == 0
    wait_for_step(toy, 3)
    ranks = subprocess.run(["pgrep", "-f", f"hpc.rank {toy}"], capture_output=True, text=True).stdout.split()
    environments = {pid: Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0") for pid in ranks}
    victim, environment = next((pid, words) for pid, words in environments.items() if "RANK=1" in words)
    scratch = next(Path(word.partition("=")[2]) for word in environment if word.startswith("EQUIHPC_SCRATCH="))
    deadline = time.monotonic() + 30
    # these ranks do not wait for each other, and with one that gave no sign of life yet patience is longer
    while not (scratch / "heartbeat_1").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(int(victim), signal.SIGSTOP)
    assert equihpc("submit", "job.yaml", "--wait").returncode == 0
    stopped = next(iter(states(equihpc).values()))
    first, last = json.loads(equihpc("why", stopped["id"], "--json").stdout)["attempts"]
    assert (first["outcome"], last["outcome"]) == ("crashed", "complete")
    host = os.uname().nodename
    assert first["cause"].startswith(f"rank 1 on {host} gave no sign of life")
    assert "stopped (state T)" in first["cause"]
    assert f"rank 0 on {host}: silent for" in first["message"]
    assert "[0]   File" in (Path(stopped["path"]) / "node_0.log").read_text(), "the other rank's stack"
    assert set(metrics(toy).values()) == {sum(range(1, 61))}


def test_errors_are_tried_again_as_often_as_the_job_says_and_somebody_is_told_once(toy: Path, equihpc: Run) -> None:
    write(toy, [{"fail_at": 2}, {"value": 2}])
    told = toy / "told"
    command = f'echo "$EQUIHPC_JOB|$EQUIHPC_EVENT|$EQUIHPC_RUN|$EQUIHPC_TEXT" >> {told}; exit 3'
    head = {"budgets": {"code_errors": 1}, "notify": {"command": command}}
    (toy / "job.yaml").write_text(
        (toy / "job.yaml").read_text() + f"budgets: {json.dumps(head['budgets'])}\nnotify: {json.dumps(head['notify'])}\n"
    )
    assert equihpc("submit", "job.yaml", "--wait").returncode == 1
    failed, _, skipped, _ = states(equihpc).values()
    why = json.loads(equihpc("why", failed["id"], "--json").stdout)["attempts"]
    assert [attempt["outcome"] for attempt in why] == ["crashed", "failed"]
    assert why[1]["cause"].startswith("budget: 2 code errors, code_errors is 1; the last one: rank")
    assert "raise RuntimeError" in why[1]["message"]
    assert skipped["state"] == "skipped"
    deadline = time.monotonic() + 20
    while len(told.read_text().splitlines()) < 2:
        assert time.monotonic() < deadline, told.read_text()
        time.sleep(0.1)
    time.sleep(0.5)
    assert told.read_text().splitlines() == [
        f"job|fail|{failed['id']}|{failed['id']} failed: {why[1]['cause']}",
        "job|end||job: 2 complete, 1 failed, 1 skipped",
    ]


def test_the_hours_of_a_job_end_what_has_not_started(toy: Path, equihpc: Run) -> None:
    write(toy, [{"value": 1}])
    (toy / "job.yaml").write_text((toy / "job.yaml").read_text() + "budgets: {gpu_hours: 0.0001}\n")
    assert equihpc("submit", "job.yaml", "--wait").returncode == 1
    first, second = states(equihpc).values()
    assert (first["state"], second["state"]) == ("complete", "failed"), "what runs is not interrupted"
    assert second["cause"].startswith("budget: the job's 0.0001 GPU hours are used up")


def test_ranks_that_obey_a_signal_before_their_supervisor_has_it_were_asked(toy: Path, equihpc: Run) -> None:
    write(toy, [{"value": 1}], steps=2000, seconds=0.05)
    assert equihpc("submit", "job.yaml").returncode == 0
    wait_for_step(toy, 3)
    run = next(iter(states(equihpc).values()))
    ranks = subprocess.run(["pgrep", "-f", f"hpc.rank {run['path']}"], capture_output=True, text=True, check=True).stdout.split()
    assert len(ranks) == 2
    for rank in ranks:
        os.kill(int(rank), signal.SIGTERM)
    time.sleep(1)
    start = json.loads((Path(run["path"]) / "attempts.jsonl").read_text().splitlines()[0])
    os.kill(start["pid"], signal.SIGTERM)
    deadline = time.monotonic() + 20
    while not (found := json.loads(equihpc("why", run["id"], "--json").stdout)["attempts"])[0]["outcome"]:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert (found[0]["outcome"], found[0]["cause"]) == ("stopped", "interrupted")


def test_a_held_run_waits_in_the_runner(toy: Path, equihpc: Run) -> None:
    write(toy, [{"value": 1}], steps=30, seconds=0.05)
    assert equihpc("submit", "job.yaml").returncode == 0
    second = list(states(equihpc).values())[1]
    assert equihpc("hold", second["id"]).returncode == 0
    deadline = time.monotonic() + 20
    while (found := list(states(equihpc).values()))[0]["state"] != "complete":
        assert time.monotonic() < deadline, found
        time.sleep(0.1)
    time.sleep(1)
    assert list(states(equihpc).values())[1]["attempts"] == 0
    assert equihpc("release", second["id"]).returncode == 0
    assert equihpc("submit", "job.yaml", "--wait").returncode == 0
    assert list(states(equihpc).values())[1]["attempts"] == 1
