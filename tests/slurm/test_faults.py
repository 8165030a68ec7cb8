"""The fault matrix on a real Slurm: several runs of one job meet different faults, and each ends as if nothing had happened."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.harness import preempt, slurm
from tests.slurm.test_jobs import expected, profile

pytestmark = pytest.mark.slurm
Run = Callable[..., subprocess.CompletedProcess[str]]

ENTRY = '''
"""Counts steps like toy, and gets into trouble where it is told; `go` in the job's folder ends its waiting."""
import json, os, signal, time
from pathlib import Path
from pydantic import BaseModel, ConfigDict

class Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    name: str
    upstream: str | None = None
    steps: int = 60
    seconds: float = 0.1
    waits: str | None = None  # start: before its first sign of life; save: within its first save; end: without obeying; step: obeying
    kills: int = 0  # executions that end by SIGKILL, after `waits`
    freezes: bool = False  # rank 1 stops once
    murders: int | None = None  # the rank that kills its supervisor, once
    raises: bool = False
    def check(self, world_size, upstream_configs):
        pass

def main(config, run_dir, stop):
    rank, go = int(os.environ["RANK"]), run_dir.parent.parent / "go"
    saved = sorted(int(path.name.removeprefix("step_")) for path in run_dir.glob("checkpoints/step_*"))
    step = saved[-1] if saved else 0
    x = json.loads((run_dir / f"checkpoints/step_{step}/x.json").read_text()) if saved else 0
    with open(run_dir / f"executions_{rank}", "a+") as file:
        before = file.tell()
        file.write(".")
    def save():
        folder = run_dir / f"checkpoints/step_{step}"
        (folder.parent / "writing").mkdir(parents=True, exist_ok=True)
        while config["waits"] == "save" and not go.exists():
            time.sleep(0.05)
        (folder.parent / "writing/x.json").write_text(json.dumps(x))
        (folder.parent / "writing").rename(folder)
    while config["waits"] == "start" and not go.exists():
        time.sleep(0.05)
    while step < config["steps"]:
        time.sleep(config["seconds"])
        if config["waits"] != "step" or step < config["steps"] - 1 or go.exists():
            step, x = step + 1, x + step + 1
        if rank == 0:
            (run_dir / ".progress").write_text(json.dumps({"step": step, "num_steps": config["steps"]}))
            os.replace(run_dir / ".progress", run_dir / "progress.json")
        if config["raises"] and step == 2:
            raise ValueError("the same every time")
        if rank == 0 and before < config["kills"] and step >= 2 and (config["waits"] is None or go.exists()):
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == config["murders"] and before == 0 and step == 3:
            os.kill(os.getppid(), signal.SIGKILL)
        if config["freezes"] and rank == 1 and before == 0 and step == 3:
            os.kill(os.getpid(), signal.SIGSTOP)
        while config["waits"] == "end" and step == config["steps"] and not go.exists():
            time.sleep(0.05)
        if config["waits"] == "save" and step == 3 and not saved:
            save()
            step, x = step + 1, x + step + 1
        if stop() and config["waits"] != "end":
            if rank == 0:
                save()
            return None
    return {"metrics": {"toy/x": x}, "weights_sha256": str(x)}
'''


def write(folder: Path, points: list[dict[str, Any]], resources: str = "{nodes: 1, gpus_per_node: 1}", budgets: str = "{}") -> None:
    (folder / "trouble.py").write_text(ENTRY)
    (folder / "job.yaml").write_text(f"""
budgets: {budgets}
stages:
  a:
    entry: trouble
    resources: {resources}
    config: {{}}
    sweep: {{list: {json.dumps(points)}}}
  b:
    entry: trouble
    after: a
    resources: {{gpus: 1}}
    config: {{name: evaluation, upstream: "${{a}}"}}
""")


class Job:
    """The job in a test's folder, its runs by the name in their config."""

    def __init__(self, folder: Path):
        self.folder = folder / "runs" / "job"

    def runs(self, stage: str = "a") -> dict[str, Path]:
        found = {}
        for path in self.folder.glob(f"{stage}/*/spec.json"):
            config = json.loads(path.read_text())["config"]
            upstream = config["upstream"]
            name = json.loads((Path(upstream) / "spec.json").read_text())["config"]["name"] if upstream else config["name"]
            found[name] = path.parent
        return found

    def records(self, name: str, stage: str = "a") -> list[dict[str, Any]]:
        path = self.runs(stage).get(name, self.folder) / "attempts.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def attempts(self, name: str, stage: str = "a") -> list[tuple[str, str]]:
        """(outcome, cause), without those that Slurm itself could not start: its daemons crash now and then."""
        ends = [record for record in self.records(name, stage) if record["event"] == "end"]
        return [(end["outcome"], end["cause"]) for end in ends if "the task did not start" not in end["cause"]]

    def outcome(self, name: str) -> str:
        """Of the last attempt that ended."""
        return (self.attempts(name) or [("", "")])[-1][0]

    def step(self, name: str, stage: str = "a") -> int:
        with contextlib.suppress(OSError, KeyError):
            return int(json.loads((self.runs(stage)[name] / "progress.json").read_text())["step"])
        return 0

    def wait(self, what: str, until: Callable[[], bool], seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < deadline, (what, {name: self.records(name) for name in self.runs()})
            time.sleep(0.1)

    def check(self, name: str, steps: int) -> None:
        """The run's result is the undisturbed one; its evaluation completed once, and began after the run's end."""
        result = json.loads((self.runs()[name] / "result.json").read_text())
        assert result["metrics"]["toy/x"] == expected(steps, 1), name
        assert [outcome for outcome, _ in self.attempts(name, "b")].count("complete") == 1, name
        ended = max(record["time"] for record in self.records(name) if record["event"] == "end")
        assert min(record["time"] for record in self.records(name, "b") if record["event"] == "start") >= ended, name


@contextlib.contextmanager
def submitted(equihpc: Run, folder: Path) -> Iterator[Job]:
    """Submits, and keeps a `status --watch` beside the test: it lifts Slurm's hold on what is requeued."""
    done = equihpc("submit", "job.yaml", "--cluster", "testbed")
    assert done.returncode == 0, done.stdout + done.stderr
    command = [sys.executable, "-m", "hpc.cli", "status", "job", "--watch"]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield Job(folder)
    finally:
        process.kill()
        process.wait()
    equihpc("status", "job", "--watch", timeout=180)


def test_preempted_at_awkward_moments(testbed: Any, toy: Path, equihpc: Run) -> None:
    """Before the first sign of life, within a save, while an evaluation runs, at the end of training; again while everything starts."""
    points = [{"name": "start", "waits": "start"}, {"name": "end", "waits": "end", "steps": 5}, {"name": "short", "steps": 2}]
    write(toy, [*points, {"name": "save", "waits": "save", "steps": 30}])
    with submitted(equihpc, toy) as job:
        job.wait("evaluation", lambda: job.step("short", "b") >= 2 and job.step("end") == 5 and bool(job.records("start")))
        job.wait("saving", lambda: (job.runs()["save"] / "checkpoints/writing").exists())
        preempt(testbed)
        job.wait("preempted", lambda: any(record["event"] == "asked" for record in job.records("start")))
        (job.folder / "go").touch()
        job.wait("saved", lambda: job.attempts("start") == [("stopped", "preempted")])
        name = job.records("start")[0]["job"]
        job.wait("next start", lambda: slurm(testbed, "squeue", "--noheader", "--format=%T", f"--jobs={name}").strip() == "RUNNING")
        preempt(testbed)
    for name, steps in (("start", 60), ("end", 5), ("short", 2), ("save", 30)):
        job.check(name, steps)
    assert (job.runs()["save"] / "checkpoints/step_3").exists(), "the signal came within this save"
    assert job.attempts("save")[0] == ("stopped", "preempted")
    assert [record["step"] for record in job.records("start") if record["event"] == "start"][-1] >= 1, "the first step was saved"
    assert job.attempts("end") == [("complete", "")], "it ended inside the grace time"
    for name, stage in (("start", "a"), ("save", "a"), ("short", "b")):
        *before, last = job.attempts(name, stage)
        assert last == ("complete", "")
        assert before
        assert set(before) == {("stopped", "preempted")}, (name, before)
        assert len({record["job"] for record in job.records(name, stage) if record["event"] == "start"}) == 1


def test_machines_that_fail(testbed: Any, toy: Path, equihpc: Run) -> None:
    """A stopped rank on another node, a node that failed before, a run that dies everywhere, killed supervisors, a node that goes down."""
    profile(toy, ("poll_seconds: 1", "poll_seconds: 1\nhang_seconds: 4"))
    from hpc import nodes

    for node in ("jwb0001", "jwb0002", "jwb0003", "jwb0004"):  # each failed once before: the next time is the second
        nodes.note(toy / "runs" / ".ledger", "testbed", node, f"an earlier run on {node}", 1, "killed")
    points = [
        {"name": "frozen", "freezes": True, "steps": 200},
        {"name": "killed", "kills": 1},
        {"name": "dying", "kills": 99},
        {"name": "first", "murders": 0},
        {"name": "second", "murders": 1},
        {"name": "down", "waits": "step"},
    ]
    ends = ["complete", "complete", "failed", "complete", "complete"]
    write(toy, points, "{nodes: 2, gpus_per_node: 1}", budgets="{node_failures: 2, without_progress: 9}")
    with submitted(equihpc, toy) as job:
        job.wait("others", lambda: [job.outcome(str(point["name"])) for point in points[:5]] == ends)
        start = job.records("down")[-1]
        lost = start["nodes"] and slurm(testbed, "scontrol", "show", "hostnames", start["nodes"]).split()[1]
        slurm(testbed, "scontrol", "update", f"nodename={lost}", "state=down", "reason=test")
        job.wait("node down", lambda: len(job.attempts("down")) == 1)
        slurm(testbed, "scontrol", "update", f"nodename={lost}", "state=idle")
        (job.folder / "go").touch()
    for name, steps in (("frozen", 200), ("killed", 60), ("first", 60), ("second", 60), ("down", 60)):
        job.check(name, steps)
        assert [outcome for outcome, _ in job.attempts(name)][1:] == ["complete"], name
    outcome, cause = job.attempts("frozen")[0]
    assert outcome == "crashed"
    assert cause.startswith("rank 1 on jwb")
    assert "stopped (state T)" in cause
    first = next(record for record in job.records("frozen") if record["event"] == "end")
    assert "rank 0 on jwb" in first["message"], "what the kernel says of the rank on the other node"
    assert "in main" in (job.runs()["frozen"] / "node_0.log").read_text(), "the stacks of the rank on the other node"
    assert job.attempts("first")[0][1].startswith("the supervisor on jwb")
    assert job.attempts("second")[0][1].startswith("no word from jwb")
    bad = next(record for record in job.records("killed") if record["event"] == "end")["node"]
    again = [record for record in job.records("killed") if record["event"] == "start"][1]
    assert bad.startswith("jwb")
    assert bad not in slurm(testbed, "scontrol", "show", "hostnames", again["nodes"]).split(), "it went elsewhere"
    assert [outcome for outcome, _ in job.attempts("dying")] == ["crashed", "crashed", "failed"]
    assert job.attempts("dying")[-1][1].startswith("budget: 3 node failures, node_failures is 2; the last one: rank 0 on jwb")
    assert job.attempts("dying", "b") == []
    outcome, cause = job.attempts("down")[0]
    assert outcome in ("stopped", "crashed")
    assert cause in ("node failure", f"Slurm: {lost} failed"), "it depends on how soon the node is back whether it can be named"


def kill_daemon(testbed: Any, name: str) -> None:
    """Asked to end, as by an administrator; `testbed.up` starts it again."""
    from hpc import testbed as module

    pid = module.status()["daemons"][name]["pid"]
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 30
    while module.status()["daemons"][name]["alive"]:
        assert time.monotonic() < deadline, name
        time.sleep(0.1)


def test_a_node_that_cannot_start_what_it_is_given(testbed: Any, toy: Path, equihpc: Run) -> None:
    """Its prolog fails: Slurm drains the node and holds the job until somebody releases it."""
    prolog = testbed.state_dir / "prolog.d" / "broken"
    prolog.write_text('#!/bin/sh\nrm "$0"\nexit 1\n')
    prolog.chmod(0o755)
    write(toy, [{"name": "unlucky", "steps": 3}])
    try:
        with submitted(equihpc, toy) as job:
            job.wait("failed launch", lambda: not prolog.exists())
            job.wait("another try", lambda: (job.runs()["unlucky"] / ".launches.jsonl").exists())
            job.wait("start", lambda: bool(job.records("unlucky")))
    finally:
        drained = slurm(testbed, "sinfo", "--noheader", "--states=drain", "--format=%n").split()
        for node in drained:
            slurm(testbed, "scontrol", "update", f"nodename={node}", "state=resume")
    assert len(drained) == 1
    job.check("unlucky", 3)
    assert job.attempts("unlucky") == [("complete", "")]
    assert len((job.runs()["unlucky"] / ".launches.jsonl").read_text().splitlines()) == 1


def test_slurm_itself_is_away_for_a_while(testbed: Any, toy: Path, equihpc: Run) -> None:
    """slurmdbd is down from before the submission on, slurmctld while one run goes on, one ends and one crashes."""
    from hpc import testbed as module

    write(
        toy, [{"name": "on", "steps": 150}, {"name": "ends", "waits": "step", "steps": 5}, {"name": "killed", "waits": "step", "kills": 1}]
    )
    kill_daemon(testbed, "slurmdbd")
    try:
        with submitted(equihpc, toy) as job:
            job.wait("running", lambda: all(job.step(name) >= 3 for name in ("on", "ends", "killed")))
            kill_daemon(testbed, "slurmctld")
            (job.folder / "go").touch()
            job.wait("ends", lambda: (job.runs()["ends"] / "COMPLETE").exists() and bool(job.attempts("killed")))
            time.sleep(2)
            module.up()
    finally:
        module.up()
    for name, steps in (("on", 150), ("ends", 5), ("killed", 60)):
        job.check(name, steps)
    assert job.attempts("on") == job.attempts("ends") == [("complete", "")]
    assert [outcome for outcome, _ in job.attempts("killed")] == ["crashed", "complete"]


def test_a_chain_where_nodes_may_not_requeue(testbed: Any, toy: Path, equihpc: Run) -> None:
    """The next segment continues what was stopped, and leaves alone what failed in the one before."""
    profile(toy, ("poll_seconds: 1", "poll_seconds: 1\nrequeue: none"))
    write(toy, [{"name": "long", "steps": 80}, {"name": "raises", "raises": True}])
    notify = {"command": 'echo "$EQUIHPC_EVENT $EQUIHPC_RUN" >> "$EQUIHPC_JOB".told'}
    (toy / "job.yaml").write_text((toy / "job.yaml").read_text() + f"notify: {json.dumps(notify)}\n")
    with submitted(equihpc, toy) as job:
        job.wait("running", lambda: job.step("long") >= 5 and bool(job.attempts("raises")))
        slurm(testbed, "scancel", "--signal=USR2", job.records("long")[0]["job"])
    job.check("long", 80)
    assert job.attempts("long") == [("stopped", "time limit"), ("complete", "")]
    jobs = [record["job"] for record in job.records("long") if record["event"] == "start"]
    assert len(set(jobs)) == 2, "two Slurm jobs"
    assert [outcome for outcome, _ in job.attempts("raises")] == ["failed"]
    assert {outcome for outcome, _ in job.attempts("raises", "b")} <= {"waiting"}, "its evaluation did not execute"
    told = toy / "job.told"
    job.wait("told", lambda: told.exists() and len(told.read_text().splitlines()) >= 2, 30)
    assert told.read_text().split() == ["fail", job.runs()["raises"].name, "end"], "each event once, in the folder of the submission"
