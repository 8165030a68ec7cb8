"""Questions to Slurm: shared by a user's processes, never more often than wanted, never believed against what is newer."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpc import slurm
from hpc.files import locked, write_json
from hpc.journal import Journal
from hpc.runs import Ledger, RunFolder, start_attempt
from hpc.status import Record, RunStatus, collect, lift_holds

SQUEUE = """#!/bin/sh
echo "$0 $*" >> "{folder}/calls"
sleep 0.3
[ -e "{folder}/broken" ] && {{ echo "Unable to contact slurm controller" >&2; exit 1; }}
cat "{folder}/answer"
"""
SCONTROL = """#!/bin/sh
echo "$*" >> "{folder}/calls"
case "$2" in *7_100,*) echo "Invalid job id" >&2; exit 1;; esac
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `answer` (what squeue says) and `calls` (a line per call); squeue fails while `broken` is there."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("squeue", SQUEUE), ("scontrol", SCONTROL), ("scancel", SCONTROL)):
        (folder / name).write_text(text.format(folder=folder))
        (folder / name).chmod(0o755)
    (folder / "answer").write_text(
        "12|0|2026-01-01T00:00:00|RUNNING|None|job.stage.uid\n12|1|2026-01-01T00:00:00|PENDING|Resources|job.stage.uid\n"
    )
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def num_calls(fake: Path) -> int:
    return len((fake / "calls").read_text().splitlines()) if (fake / "calls").exists() else 0


def test_of_many_processes_one_asks(fake: Path) -> None:
    code = "from hpc import slurm; queue, note = slurm.query(None, 60); print(sorted(queue), repr(note), queue.is_new)"
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(6)]
    said = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert num_calls(fake) == 1
    assert sorted(said) == [*["['12_0', '12_1'] '' False"] * 5, "['12_0', '12_1'] '' True"]
    assert slurm.query(None, 60)[0]["12_1"] == slurm.QueueEntry("pending", "PENDING", "job.stage.uid", 0.0, "Resources")
    assert num_calls(fake) == 1
    slurm.query()  # a submission wants to know now
    assert num_calls(fake) == 2
    slurm.query("/another/slurm.conf", 60)
    assert num_calls(fake) == 3


def test_an_answer_that_others_could_have_written_is_not_believed(fake: Path, tmp_path: Path) -> None:
    slurm.query(None, 60)
    (path,) = (tmp_path / "cache" / "equihpc").glob("queue-*.json")
    assert path.parent.stat().st_mode & 0o077 == 0
    good = path.read_text()
    for content, mode in ((good, 0o662), ('{"asked": 1}', 0o600), ("[]", 0o600), (good.replace('"problem": ""', '"problem": 5'), 0o600)):
        before = num_calls(fake)
        path.write_text(content)
        path.chmod(mode)
        assert slurm.query(None, 60)[0].keys() == {"12_0", "12_1"}
        assert num_calls(fake) == before + 1
    write_json(path, {"asked": 0.0, "tried": time.time() + 1e6, "text": "", "problem": ""})  # a clock that was wrong
    assert "12_0" in slurm.query(None, 60)[0]


def test_no_answer_is_said_with_what_is_known_and_not_asked_again_at_once(fake: Path) -> None:
    (fake / "broken").touch()
    queue, note = slurm.query(None, 60)
    assert not queue
    assert "Unable to contact slurm controller" in note
    assert note.endswith("the queue is unknown")
    (fake / "broken").unlink()
    assert slurm.query(None, 0)[1] == ""
    (fake / "broken").touch()
    queue, note = slurm.query(None, 0)
    assert queue.keys() == {"12_0", "12_1"}
    assert "the queue is as it was at" in note
    before = num_calls(fake)
    assert slurm.query(None, 60)[1] == note
    assert num_calls(fake) == before


def test_a_process_that_was_stopped_while_it_asked_holds_up_nobody(fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "TIMEOUT_SECONDS", 1.0)
    with locked(slurm._cache(None).with_suffix(".lock")):
        assert slurm.query(None, 60)[0].keys() == {"12_0", "12_1"}
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")  # a home that is full or read-only
    assert slurm.query(None, 60)[0].keys() == {"12_0", "12_1"}


def test_what_is_newer_than_the_answer_counts(fake: Path, tmp_path: Path) -> None:
    """A job that was just submitted is not lost, one that has just started is not pending."""
    job_dir = tmp_path / "runs" / "job"
    records = [Record(name, name, "stage", {}, [], 5) for name in ("new", "old")]
    runs = {record.id: RunFolder(job_dir / "stage" / record.id) for record in records}
    journal, ledger = Journal.of_job(job_dir), Ledger(tmp_path / "ledger")
    for run in runs.values():
        run.create({})

    def states(max_age_seconds: float) -> dict[str, str]:
        return {status.record.id: status.state for status in collect(job_dir, records, ledger, max_age_seconds=max_age_seconds)[0]}

    def submit(run: RunFolder, uid: str, job_id: str) -> None:
        journal.write_array([[run.path]], 1, 0, uid)
        journal.add("intent", uid=uid, cluster="x", slurm_conf=None, mirrors=None, waits_for=[])
        journal.add("submitted", uid=uid, job_id=job_id)

    (fake / "answer").write_text("20|N/A|2026-01-01T00:00:00|PENDING|Priority|job.stage.a\n")
    submit(runs["old"], "a", "20")
    assert states(0) == {"new": "planned", "old": "pending"}
    submit(runs["new"], "b", "21")
    start_attempt(runs["old"], {"host": "h", "job": "20", "step": 0})
    assert states(60) == {"new": "pending", "old": "running"}
    assert num_calls(fake) == 1
    (fake / "answer").write_text("20|N/A|2026-01-01T00:00:00|RUNNING|None|job.stage.a\n")
    assert states(0) == {"new": "planned", "old": "running"}  # Slurm does not know 21 any more: it has ended


def test_only_who_asked_lifts_the_hold(fake: Path, tmp_path: Path) -> None:
    job_dir = tmp_path / "runs" / "job"
    record, run = Record("r", "r", "stage", {}, [], 5), RunFolder(job_dir / "stage" / "r")
    run.create({})
    start_attempt(run, {"host": "h", "job": "20", "step": 0})
    journal = Journal.of_job(job_dir)
    journal.write_array([[run.path]], 1, 0, "a")
    journal.add("intent", uid="a", cluster="x", slurm_conf=None, mirrors=None, waits_for=[])
    journal.add("submitted", uid="a", job_id="20")
    (fake / "answer").write_text("20|N/A|2026-01-01T00:00:00|PENDING|BeginTime|job.stage.a\n")
    for _ in range(3):
        lift_holds(collect(job_dir, [record], Ledger(tmp_path / "ledger"), max_age_seconds=60)[0], None)
    assert [line.split()[0] for line in (fake / "calls").read_text().splitlines()] == [str(fake / "squeue"), "update"]


def test_what_a_node_could_not_start_is_tried_again_and_given_up_at_last(fake: Path, tmp_path: Path) -> None:
    """Slurm holds it for good. A launch that succeeds lets the counting begin anew; the user's own hold is respected."""
    job_dir = tmp_path / "runs" / "job"
    record, run = Record("r", "r", "stage", {}, [], 5), RunFolder(job_dir / "stage" / "r")
    run.create({})
    journal = Journal.of_job(job_dir)
    journal.write_array([[run.path]], 1, 0, "a")
    journal.add("intent", uid="a", cluster="x", slurm_conf=None, mirrors=None, waits_for=[])
    journal.add("submitted", uid="a", job_id="20")
    (fake / "answer").write_text("20|N/A|2026-01-01T00:00:00|PENDING|launch_failed_requeued_held|job.stage.a\n")

    def look() -> RunStatus:
        (status,), _ = collect(job_dir, [record], Ledger(tmp_path / "ledger"), max_age_seconds=0)
        lift_holds([status], None)
        return status

    def calls() -> list[str]:
        found = [line.split()[0] for line in (fake / "calls").read_text().splitlines()]
        return [call for call in found if not call.endswith("squeue")]

    run.hold_mark.touch()
    assert (look().failed_launches, calls()) == (1, [])
    run.hold_mark.unlink()
    assert [look().failed_launches for _ in range(2)] == [1, 2]
    start_attempt(run, {"host": "h", "job": "20", "step": 0})
    assert [look().failed_launches for _ in range(4)] == [1, 2, 3, 4]
    assert calls() == ["release"] * 5 + ["20"], "scancel 20"
    (fake / "answer").write_text("")
    assert look().cause == "its nodes could not start job 20, 4 times in a row"


def test_many_names_go_in_few_calls_and_a_refused_one_does_not_keep_the_others(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[tuple[float, float]] = []

    def pause(low: float, high: float) -> float:
        pauses.append((low, high))
        return 0.0

    monkeypatch.setattr(slurm.random, "uniform", pause)
    with pytest.raises(slurm.SlurmError, match="Invalid job id"):
        slurm.start_now([f"7_{index}" for index in range(250)])
    calls = [line.split()[1].removeprefix("jobid=").split(",") for line in (fake / "calls").read_text().splitlines()]
    assert [len(names) for names in calls] == [100, 100, 50]
    assert [name for names in calls for name in names] == [f"7_{index}" for index in range(250)]
    assert pauses == [slurm.JITTER_SECONDS] * 2
