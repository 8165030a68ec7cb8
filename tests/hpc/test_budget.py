"""Ceilings against a simple model, the verdict on an attempt, bad-node memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc import budget, nodes
from hpc.budget import Verdict
from hpc.files import append_json, write_json
from hpc.rank import EXIT_DISK_FULL, EXIT_DONE, EXIT_FAILED, EXIT_STOPPED
from hpc.runs import RunFolder, ask_attempt, end_attempt, reset_budgets, start_attempt
from hpc.spec import Budgets
from hpc.verdict import conclude, empty_report, kernel_facts

# what happened -> (outcome, cause, the budget that counts it)
ENDS = {
    "limit": ("stopped", "time limit", "time_limits"),
    "preempted": ("stopped", "preempted", "preemptions"),
    "killed": ("crashed", "rank 0 was killed by SIGKILL", "node_failures"),
    "silent": (None, "", "node_failures"),
    "raised": ("failed", "rank 0: RuntimeError: boom", "code_errors"),
    "interrupted": ("stopped", "interrupted", None),
    "waiting": ("waiting", "upstream is not complete", None),
}
CEILING = st.one_of(st.none(), st.integers(1, 4))
BUDGETS = st.fixed_dictionaries(
    {
        "attempts": CEILING,
        "time_limits": CEILING,
        "preemptions": CEILING,
        "node_failures": st.one_of(st.none(), st.integers(0, 4)),
        "code_errors": st.one_of(st.none(), st.integers(0, 4)),
        "without_progress": st.integers(1, 4),
    }
)
HISTORY = st.lists(st.tuples(st.sampled_from([*ENDS, "reset"]), st.integers(0, 2)), max_size=12)  # what, and checkpoints written since


def written(run: RunFolder, history: list[tuple[str, int]]) -> int:
    """Writes the attempts as the supervisors do; returns the saved step."""
    step = 0
    for what, progress in history:
        if what == "reset":
            append_json(run.attempts, {"event": "reset", "time": 0.0})
            continue
        number = start_attempt(run, {"step": step})
        outcome, cause, _ = ENDS[what]
        if what != "waiting":
            step += progress
        if outcome is not None:
            end_attempt(run, number, outcome, cause)
    return step


def exceeded(history: list[tuple[str, int]], budgets: dict[str, Any]) -> set[str]:
    """The model: counters that are set back, instead of a search through the attempts."""
    counts: dict[str, int] = {}
    in_a_row = 0
    for what, progress in history:
        if what == "reset":
            counts, in_a_row = {}, 0
        elif what != "waiting":
            name = ENDS[what][2]
            for key in ("attempts", name):
                if key:
                    counts[key] = counts.get(key, 0) + 1
            in_a_row += name in ("time_limits", "node_failures")
            if progress:
                in_a_row = 0
    found = {"without_progress"} if in_a_row >= budgets["without_progress"] else set()
    for name in ("attempts", "time_limits", "preemptions"):
        if budgets[name] is not None and counts.get(name, 0) >= budgets[name]:
            found.add(name)
    for name in ("node_failures", "code_errors"):
        if budgets[name] is not None and counts.get(name, 0) > budgets[name]:
            found.add(name)
    return found


@given(HISTORY, BUDGETS)
def test_reached_agrees_with_counting(history: list[tuple[str, int]], budgets: dict[str, Any]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(Path(folder))
        step = written(run, history)
        reason = budget.reached(run.read_attempts(), step, budgets)
    expected = exceeded(history, budgets)
    assert (reason is not None) == bool(expected), (reason, expected)
    if reason is not None:
        assert reason.startswith("budget: ")
        assert any(name in reason or (name == "without_progress" and "without a new checkpoint" in reason) for name in expected)


def job(folder: Path, **rules: Any) -> RunFolder:
    """A run's folder inside a job with these rules."""
    run = RunFolder(folder / "job" / "a" / "one")
    run.path.mkdir(parents=True, exist_ok=True)
    (folder / "job" / ".equihpc").mkdir(exist_ok=True)
    record = {"name": "job", "file": "job.yaml", "cluster": "c", "slurm_conf": None, "ledger": str(folder / "ledger"), "report": {}}
    runs = [{"id": f"{name}", "hash": name, "stage": "a", "params": {}, "after": [], "num_steps": 1} for name in ("one", "two")]
    write_json(folder / "job" / ".equihpc" / "job.json", {**record, "records": runs, "rules": rules})
    return run


def end(run: RunFolder, verdict: Verdict) -> str:
    return budget.settle(run, start_attempt(run, {"step": run.saved_step}), verdict)


ERROR = Verdict("failed", budget.CODE_ERROR, "rank 0: RuntimeError: boom", "the traceback")
CRASH = Verdict("crashed", budget.NODE_FAILURE, "rank 0 on n1 was killed by SIGKILL", "", "n1")


def test_code_errors_fail_at_once_or_are_tried_again_so_often(tmp_path: Path) -> None:
    run = job(tmp_path)
    assert end(run, ERROR) == "failed"
    last = run.read_attempts()[-1]
    assert (last.cause, last.end and last.end["message"]) == ("rank 0: RuntimeError: boom", "the traceback")
    assert budget.may_start(run) is None, "it may be mended by now"
    run = job(tmp_path / "other", budgets={"code_errors": 2})
    assert [end(run, ERROR) for _ in range(3)] == ["crashed", "crashed", "failed"]
    assert run.read_attempts()[-1].cause == "budget: 3 code errors, code_errors is 2; the last one: rank 0: RuntimeError: boom"


def test_a_ceiling_holds_until_it_is_raised_or_somebody_asks_again(tmp_path: Path) -> None:
    run = job(tmp_path)
    assert [end(run, CRASH) for _ in range(3)] == ["crashed", "crashed", "failed"]
    reason = "budget: 3 restarts without a new checkpoint; the last one: rank 0 on n1 was killed by SIGKILL"
    assert budget.may_start(run) == run.read_attempts()[-1].cause == reason
    job(tmp_path, budgets={"without_progress": 4})
    assert budget.may_start(run) is None, "a later submission changes the rules"
    job(tmp_path)
    reset_budgets(run)
    assert budget.may_start(run) is None
    assert len(run.read_attempts()) == 3, "nothing is forgotten"
    assert end(run, CRASH) == "crashed"


def test_progress_and_preemptions_do_not_use_up_patience(tmp_path: Path) -> None:
    run = job(tmp_path)
    for step in range(1, 8):
        assert end(run, CRASH) == "crashed"
        assert end(run, Verdict("stopped", budget.PREEMPTION, "preempted")) == "stopped"
        (run.path / "checkpoints" / f"step_{step}").mkdir(parents=True)
    assert run.saved_step == 7


def test_the_hours_of_a_job_stop_what_has_not_started(tmp_path: Path) -> None:
    run = job(tmp_path, budgets={"gpu_hours": 10.0})
    two = RunFolder(run.path.with_name("two"))
    two.path.mkdir()
    now = time.time()
    append_json(run.attempts, {"event": "start", "attempt": 1, "time": now - 7200, "step": 0, "processes": 4})
    append_json(run.attempts, {"event": "end", "attempt": 1, "time": now - 3600, "outcome": "stopped", "cause": "preempted"})
    append_json(two.attempts, {"event": "start", "attempt": 1, "time": now - 5400, "step": 0, "processes": 4})
    two.lock.touch()
    os.utime(two.lock, (now - 1800, now - 1800))  # it was last seen alive then
    from hpc.status import JobRecord

    records = JobRecord.read(tmp_path / "job").records
    assert budget.used_hours(tmp_path / "job", records) == pytest.approx(8.0)
    assert budget.may_start(run) is None
    os.utime(two.lock)
    assert budget.used_hours(tmp_path / "job", records) == pytest.approx(10.0, abs=0.01)
    job(tmp_path, budgets={"gpu_hours": 9.9})
    assert str(budget.may_start(run)).startswith("budget: the job's 9.9 GPU hours are used up (10.0")
    budget.refuse(run, "budget: …", {"step": 0})
    assert budget.used_hours(tmp_path / "job", records) == pytest.approx(10.0, abs=0.01)


def test_missing_rules_are_the_defaults(tmp_path: Path) -> None:
    rules = budget.Rules.read(tmp_path)
    assert (rules.budgets, rules.notify, rules.requeue, rules.node_memory_hours) == (Budgets(), None, "self", 24.0)


# --- the verdict -------------------------------------------------------------------------------------------------------


def report(node: str, **seen: Any) -> dict[str, Any]:
    return {**empty_report(node), "bad": False, **seen}


def error(rank: int, when: float, text: str = "RuntimeError: boom", disk_full: bool = False) -> dict[str, Any]:
    return {"rank": rank, "error": text, "traceback": f"Traceback\n{text}", "disk_full": disk_full, "time": when}


def silent(rank: int, node: str, seconds: float, state: str = "S") -> dict[str, Any]:
    return {"rank": rank, "node": node, "seconds": seconds, "state": state, "sleeps_in": "futex_wait"}


VERDICTS = [
    # a rank that is killed makes the others raise, and one that raises makes the others abort: the first is the cause
    (
        [report("n0", ends={0: (EXIT_FAILED, 10.2)}, errors=[error(0, 10.2)]), report("n1", ends={1: (-9, 10.0)})],
        [],
        "crashed",
        "rank 1 on n1",
    ),
    (
        [report("n0", ends={0: (EXIT_FAILED, 10.0)}, errors=[error(0, 10.0)]), report("n1", ends={1: (-6, 11.0)})],
        [],
        "failed",
        "rank 0: Runtime",
    ),
    # what the others say when a node is gone is only its echo
    (
        [report("n0", ends={0: (EXIT_FAILED, 10.0)}, errors=[error(0, 10.0, "RuntimeError: connection reset")])],
        ["n1"],
        "crashed",
        "no word from n1",
    ),
    ([report("n0", silent=[silent(0, "n0", 60)])], ["n1"], "crashed", "no word from n1"),
    ([report("n0", asked="terminated", ends={0: (EXIT_STOPPED, 9.0)})], ["n1"], "crashed", "no word from n1"),
    ([report("n0", asked="preempted", ends={0: (EXIT_STOPPED, 9.0)})], ["n1"], "stopped", "preempted"),
    # asked to end: saved, or not even begun
    ([report("n0", asked="preempted", ends={0: (EXIT_STOPPED, 9.0)})], [], "stopped", "preempted"),
    ([report("n0", asked="preempted", ends={0: (-15, 9.0)}, stopped_early=True)], [], "stopped", "preempted"),
    ([report("n0", asked="time limit", ends={0: (EXIT_FAILED, 9.0)}, errors=[error(0, 9.0)])], [], "failed", "rank 0: Runtime"),
    # no space: never a code error to try again, also while being preempted and when nothing could be written
    ([report("n0", ends={0: (EXIT_DISK_FULL, 9.0)}, errors=[error(0, 9.0, "OSError: full", True)])], [], "failed", "disk full: rank 0"),
    ([report("n0", asked="preempted", ends={0: (EXIT_DISK_FULL, 9.0), 1: (EXIT_STOPPED, 9.0)})], [], "failed", "disk full"),
    ([report("n0", ends={0: (EXIT_STOPPED, 9.0)})], [], "failed", "although nobody asked"),
    ([report("n0", ends={0: (EXIT_DONE, 9.0)})], [], "failed", "without a result"),
]


@pytest.mark.parametrize(("reports", "missing", "outcome", "cause"), VERDICTS)
def test_verdicts(tmp_path: Path, reports: list[dict[str, Any]], missing: list[str], outcome: str, cause: str) -> None:
    found = conclude(tmp_path, json.loads(json.dumps(reports)), missing)
    assert found.outcome == outcome
    assert cause in found.cause


@pytest.mark.parametrize(
    ("ranks", "rank", "node"),
    [
        ([silent(0, "n0", 61), silent(1, "n1", 60, "T")], 1, "n1"),
        ([silent(0, "n0", 61), silent(1, "n1", 60, "D"), silent(2, "n1", 59)], 1, "n1"),
        ([silent(0, "n0", 61), silent(1, "n1", 90)], 1, "n1"),
        ([silent(0, "n0", 60.4), silent(1, "n1", 60)], 0, ""),  # they wait for each other: no node is to blame
        ([silent(0, "n0", 60), silent(1, "n0", 60.3)], 1, "n0"),
    ],
)
def test_a_hang_names_the_rank_that_the_others_wait_for(tmp_path: Path, ranks: list[dict[str, Any]], rank: int, node: str) -> None:
    reports = [report(name, silent=[r for r in ranks if r["node"] == name]) for name in ("n0", "n1")]
    found = conclude(tmp_path, reports)
    assert (found.outcome, found.kind, found.node) == ("crashed", budget.NODE_FAILURE, node)
    assert found.cause.startswith(f"rank {rank} on ")
    assert all(f"rank {r['rank']} on {r['node']}" in found.message for r in ranks)


def test_the_kernel_says_that_a_process_is_stopped() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        process.send_signal(19)
        deadline = time.monotonic() + 10
        while kernel_facts(process.pid)["state"] != "T":
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()


# --- bad nodes ---------------------------------------------------------------------------------------------------------


def bad(folder: Path, *failures: tuple[str, str], run: str | None = None) -> set[str]:
    """Excluded nodes after these (run, node), each another attempt."""
    for attempt, (name, node) in enumerate(failures):
        nodes.note(folder, "c", node, name, attempt, "killed")
    return set(nodes.excluded(folder, "c", 24.0, time.time(), run))


def test_two_runs_or_one_that_failed_nowhere_else_exclude_a_node(tmp_path: Path) -> None:
    assert bad(tmp_path / "a", ("r", "n1"), ("s", "n2")) == set()
    assert bad(tmp_path / "b", ("r", "n1"), ("s", "n1")) == {"n1"}
    assert bad(tmp_path / "c", ("r", "n1"), ("r", "n1")) == {"n1"}
    assert nodes.excluded(tmp_path / "c", "elsewhere", 24.0, time.time()) == {}
    assert nodes.excluded(tmp_path / "c", "c", 24.0, time.time() + 25 * 3600) == {}, "it is forgotten"
    assert [failure.node for failure in nodes.listed(tmp_path / "c", "c", 24.0)] == ["n1", "n1"]


def test_one_attempt_counts_once(tmp_path: Path) -> None:
    for _ in range(3):
        nodes.note(tmp_path, "c", "n1", "r", 1, "killed")
    assert nodes.excluded(tmp_path, "c", 24.0) == {}


def test_a_run_that_dies_everywhere_poisons_no_node_for_others(tmp_path: Path) -> None:
    everywhere = [(name, node) for name in ("r", "s", "t") for node in ("n1", "n2", "n3") for _ in range(3)]
    assert bad(tmp_path, *everywhere) == set()
    assert bad(tmp_path, run="r") == {"n1", "n2", "n3"}, "but it does not go there again while there are others"


# --- records -----------------------------------------------------------------------------------------------------------


def test_why_it_was_asked_outlives_a_kill(tmp_path: Path) -> None:
    run = job(tmp_path)
    number = start_attempt(run, {"step": 0, "job": "1"})
    ask_attempt(run, number, "preempted")
    attempt = run.read_attempts()[-1]
    assert attempt.end is None
    assert budget.kind_of(attempt) == budget.PREEMPTION
    assert nodes.post_mortem(attempt) == Verdict("stopped", budget.PREEMPTION, "preempted")
