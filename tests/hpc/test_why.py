"""`equihpc why`: every end has a cause, and what comes next is said."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpc import slurm, why
from hpc.journal import Journal
from hpc.runs import Ledger, RunFolder, ask_attempt, end_attempt, start_attempt
from hpc.status import JobRecord, Record, collect

Run = Callable[..., subprocess.CompletedProcess[str]]
CODE = {"hash": "abc123", "commit": "0123456789abcdef", "dirty": True}


class Job:
    """A job on disk as a submission and its nodes leave it; Slurm's commands are scripts."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.dir = folder, folder / "runs" / "job"
        self.records: dict[str, Record] = {}
        for command in ("squeue", "sacct"):
            self.say(command, "")
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))

    def say(self, command: str, text: str, code: int = 0) -> None:
        (self.folder / f"{command}.txt").write_text(text)
        (self.folder / command).write_text(
            f'#!/bin/sh\necho "$*" >> {self.folder}/{command}.calls\ncat {self.folder}/{command}.txt\nexit {code}\n'
        )
        (self.folder / command).chmod(0o755)

    def add(self, name: str, *after: str, job_id: str | None = None, **more: Any) -> RunFolder:
        self.records[name] = Record(name, name, "train", {}, list(after), 9, **more)
        run = RunFolder(self.dir / "train" / name)
        run.create({})
        if job_id:
            Journal.of_job(self.dir).write_array([[run.path]], 1, 0, name)
            Journal.of_job(self.dir).add("intent", uid=name, cluster="x", slurm_conf=None, mirrors=None, waits_for=[])
            Journal.of_job(self.dir).add("submitted", uid=name, job_id=job_id)
        return run

    def story(self, name: str) -> why.Story:
        job = JobRecord("job", "jobs/x.yaml", "x", None, str(self.dir / "ledger"), {}, list(self.records.values()))
        statuses, _ = collect(self.dir, job.records, Ledger(self.dir / "ledger"))
        return why.tell(next(status for status in statuses if status.record.id == name), statuses, job)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    return Job(tmp_path, monkeypatch)


def attempt(run: RunFolder, outcome: str = "", cause: str = "", job: str | None = None, message: str = "", step: int = 0) -> int:
    number = start_attempt(run, {"host": "n1", "job": job, "nodes": "n[1-2]", "step": step, "code": CODE})
    if outcome:
        end_attempt(run, number, outcome, cause, message)
    return number


def test_what_comes_next_in_every_state(job: Job) -> None:
    def complete(run: RunFolder) -> None:
        run.complete.touch()

    complete(job.add("good"))
    attempt(job.add("bug"), "failed", "rank 0: RuntimeError: boom", message="\n".join(f"line {i}" for i in range(40)))
    attempt(job.add("ceiling"), "failed", "budget: 3 restarts without a new checkpoint; the last one: killed")
    attempt(job.add("full"), "failed", "disk full: rank 0: No space left on device")
    attempt(job.add("lost"), "crashed", "rank 1 was killed by SIGKILL")
    job.add("after-bug", "bug")
    job.add("absent", blocked="data set x is not here")
    job.add("given-up").cancel_mark.touch()
    job.add("new")
    job.add("kept").hold_mark.touch()
    spoiled = job.add("spoiled")
    complete(spoiled)
    spoiled.invalid_mark.write_text("wrong labels\n")
    (job.add("saved").path / "checkpoints" / "step_7").mkdir(parents=True)
    attempt(RunFolder(job.dir / "train" / "saved"), "stopped", "interrupted")
    attempt(job.add("held", job_id="30"), "stopped", "preempted", job="30")
    attempt(job.add("runs", job_id="31"), job="31")
    job.add("queued", job_id="32")
    job.add("unlucky", job_id="34")
    job.add("waits", "runs", job_id="33")
    now = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() - 20))
    lines = ("30|N/A|%s|PENDING|BeginTime|a.held", "31|N/A|%s|RUNNING|None|a.runs", "32|N/A|%s|PENDING|Priority|a.queued")
    lines = (*lines, "34|N/A|%s|PENDING|launch failed requeued held|a.unlucky")
    job.say("squeue", "\n".join(line % now for line in (*lines, "33|N/A|%s|PENDING|Dependency|a.waits")))
    expected = {
        "good": "complete: nothing more",
        "bug": "failed: rank 0: RuntimeError: boom; an error of the code is not tried again: mend it, then equihpc submit jobs/x.yaml",
        "ceiling": "it is not tried again by itself, equihpc submit jobs/x.yaml --retry failed starts it anew",
        "full": "make room, for example with equihpc gc, then equihpc submit",
        "lost": "failed: rank 1 was killed by SIGKILL; no job carries it any more, equihpc submit jobs/x.yaml goes on from the beginning",
        "after-bug": "skipped: its upstream bug is failed",
        "absent": "blocked: data set x is not here; equihpc submit jobs/x.yaml starts it when that is there",
        "given-up": "--retry cancelled goes on from the beginning",
        "new": "not in the queue: equihpc submit jobs/x.yaml starts it",
        "kept": "held: equihpc release kept lets it start",
        "spoiled": "stale: invalidated: wrong labels; equihpc submit jobs/x.yaml runs it again",
        "saved": "no job carries it any more: equihpc submit jobs/x.yaml goes on from step 7",
        "held": "requeued, goes on from the beginning: waits for Slurm job 30, held about ",
        "runs": "runs in Slurm job 31: step 0 of 9",
        "queued": "pending: waits for Slurm job 32, PENDING (Priority)",
        "unlucky": "pending: Slurm holds job 34, its nodes could not start it (1 of 4 times); equihpc status lets it try again",
        "waits": "pending: Slurm job 33 waits for the run runs (running)",
    }
    assert expected.keys() == job.records.keys()
    for name, words in expected.items():
        assert words in job.story(name).next
    held = float(job.story("held").next.partition("held about ")[2].split()[0])
    assert 95 < held < 101
    story = job.story("bug")
    line = why.attempt_text(story, story.attempts[0])
    assert "on n[1-2], step 0 to 0, code abc123 (commit 0123456789ab with changes): failed after 0:00: rank 0: RuntimeError" in line
    error = why.error_text(story.attempts[0]).splitlines()
    assert error == ["…", *(f"line {i}" for i in range(28, 40))]
    assert not (job.folder / "sacct.calls").exists(), "nothing was open: the accounting need not be asked"


def test_the_accounting_names_the_cause_where_the_folder_does_not(job: Job) -> None:
    run = job.add("lost", job_id="40")
    start = time.time()
    for step in (0, 5, 8):
        attempt(run, job="40", step=step)
    attempt(run, "stopped", "preempted", job="40", step=8)
    ask_attempt(run, attempt(run, job="40", step=9), "preempted")
    job.add("never", job_id="41")

    def at(seconds: float) -> str:
        return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(start + seconds))

    uid = os.getuid()
    job.say("sacct", f"40|NODE_FAIL|1:0|{at(-100)}|n1\n40|OUT_OF_MEMORY|0:125|{at(-2)}|n2\n40|PREEMPTED|0:0|{at(500)}|n3\n")
    story = job.story("lost")
    assert [story.cause(a) for a in story.attempts][:4] == [*["out of memory (Slurm: OUT_OF_MEMORY on n2)"] * 3, "preempted"]
    assert [story.to_step(a) for a in story.attempts] == [5, 8, 8, 9, 0]
    job.say("sacct", f"41|CANCELLED by {uid}|0:0|None|None assigned\n")
    assert job.story("lost").cause(job.story("lost").attempts[-1]) == "asked to end: preempted"
    story = job.story("never")
    assert story.jobs == {"41": f"cancelled by {why._user(str(uid))} (Slurm: CANCELLED)"}
    assert story.next == "not in the queue: equihpc submit jobs/x.yaml starts it"
    asked = (job.folder / "sacct.calls").read_text().splitlines()
    assert all("--starttime=2" in line and ("--jobs=40 " in line or "--jobs=41 " in line) for line in asked)
    job.say("sacct", "Unable to contact slurmdbd", code=1)
    story = job.story("lost")
    assert story.note.startswith("accounting does not answer (sacct ")
    assert [story.cause(a) for a in story.attempts][:4] == ["", "", "", "preempted"]


@pytest.mark.parametrize(
    ("row", "name", "expected"),
    [
        ("12", "12", True),
        ("12_3", "12_3", True),
        ("12_[0-3,5-9]", "12_7", True),
        ("12_[0-3,5-9%4]", "12_3", True),
        ("12_[5]", "12_5", True),
        ("12_[0-3,5-9]", "12_4", False),
        ("12_[0-3]", "13_2", False),
        ("12_[0-3]", "12", False),
        ("12_3", "12_33", False),
    ],
)
def test_elements_that_ended_together_before_they_began(row: str, name: str, expected: bool) -> None:
    assert slurm.Account(row, "CANCELLED", "0:0", None, "").is_of(name) == expected


def test_words_for_every_end_that_slurm_knows() -> None:
    def text(state: str, code: str = "0:0") -> str:
        return why.account_text(slurm.Account("1", state, code, None, "n1"))

    assert text("FAILED", "7:0") == "ended with exit code 7 (Slurm: FAILED on n1)"
    assert text("CANCELLED by 0") == "cancelled by root (Slurm: CANCELLED on n1)"
    assert text("CANCELLED by 987654321") == "cancelled by user 987654321 (Slurm: CANCELLED on n1)"
    assert text("REVOKED") == "Slurm: REVOKED on n1"
    for state, words in why.WORDS.items():
        assert text(state) == f"{words} (Slurm: {state} on n1)"


def test_the_command(toy: Path, equihpc: Run) -> None:
    (toy / "job.yaml").write_text("stages:\n  train: {entry: toy, resources: {gpus: 1}, config: {steps: 4, fail_at: 3}}\n")
    assert equihpc("submit", "job.yaml", "--cluster", "local", "--wait").returncode == 1
    found = json.loads(equihpc("why", "train", "--json").stdout)
    assert {"id", "state", "attempts", "next"} <= found.keys()
    (only,) = found["attempts"]
    assert only["outcome"] == "failed"
    assert only["cause"] == "rank 0: RuntimeError: boom at step 3"
    assert only["code"]["hash"]
    assert found["next"].startswith("failed: rank 0: RuntimeError: boom at step 3; an error of the code")
    shown = equihpc("why", "train").stdout
    assert shown.splitlines()[-1] == f"next: {found['next']}"
    assert "raise RuntimeError" in shown
    assert str(toy / "runs" / "job" / "train" / found["id"] / "node_0.log") in shown
