"""Submitting is declarative: what a changed file, changed code or changed data do to the runs that are there."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc.reconcile import prefix

Run = Callable[..., subprocess.CompletedProcess[str]]


def job(points: list[dict[str, Any]], more: str = "", steps: int = 5, seconds: float = 0.02, first: str = "[]") -> str:
    return f"""
stages:
  a:
    entry: toy
    resources: {{gpus: 0}}
    config: {{steps: {steps}, seconds: {seconds}}}
    sweep: {{list: {json.dumps(points)}, first: {first}}}
  b:
    entry: toy
    after: a
    resources: {{gpus: 0}}
    config: {{steps: 2, upstream: "${{a}}"}}
{more}
"""


def submit(equihpc: Run, *arguments: str, code: int = 0, name: str = "job.yaml") -> str:
    done = equihpc("submit", name, *arguments)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def states(equihpc: Run, name: str = "job") -> dict[str, str]:
    runs = json.loads(equihpc("status", name, "--json").stdout)["runs"]
    return {f"{run['stage']}{run['params'].get('a.value', '')}": run["state"] for run in runs}


def wait_for(condition: Callable[[], Any], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_what_leaves_the_file_goes_on_until_it_is_pruned(toy: Path, equihpc: Run) -> None:
    long = {"steps": 3000, "seconds": 0.05}
    (toy / "job.yaml").write_text(job([{"value": 1}, {"value": 2}, {"value": 3}], **long))
    (toy / "other.yaml").write_text(job([{"value": 3}], **long))
    submit(equihpc)
    submit(equihpc, name="other.yaml")
    wait_for(lambda: list(states(equihpc).values()).count("running") >= 1)
    (toy / "job.yaml").write_text(job([{"value": 1}], **long))
    said = submit(equihpc)
    assert "4 runs go on that are not in the file any more" in said
    assert "0 runs started" in said
    assert len(json.loads(equihpc("status", "job", "--json").stdout)["former"]) == 4
    assert "and 4 runs in flight that left the job's file" in equihpc("status", "job").stdout
    assert equihpc("submit", "job.yaml", "--prune").returncode == 1, "asked, and nobody answered"
    assert set(states(equihpc).values()) <= {"running", "pending"}
    said = submit(equihpc, "--prune", "--yes")
    assert "cancelled 2 runs that are not in the file any more" in said
    assert "2 runs that are not in the file any more are spared" in said
    cancelled = [path.parent.name for path in toy.glob("runs/job/*/*/.cancel")]
    assert sorted(name.partition("-")[2].partition("-")[0] for name in cancelled) == ["2", "2"]
    assert states(equihpc)["a1"] in ("running", "pending")
    done = equihpc("cancel", "job")
    assert "cancelled 2 runs" in done.stdout, done.stdout + done.stderr
    assert "spared 2" in done.stdout, "other.yaml has them"
    equihpc("cancel", next(toy.glob("runs/job/a/value-3-*")).name)
    wait_for(lambda: states(equihpc, "other")["a3"] == "cancelled")


def test_a_new_point_starts_alone_and_the_important_ones_first(toy: Path, equihpc: Run) -> None:
    (toy / "job.yaml").write_text(job([{"value": 1}]))
    submit(equihpc, "--wait")
    (toy / "job.yaml").write_text(job([{"value": value} for value in (1, 2, 3, 4)], first="[{value: 4}]"))
    assert "6 runs started" in submit(equihpc, "--wait")
    planned = json.loads(equihpc("plan", "job.yaml", "--json").stdout)["runs"]
    assert [run["params"]["a.value"] for run in planned if run["stage"] == "a"] == [4, 1, 2, 3]


def test_an_upgrade_that_would_run_everything_again_is_stopped(toy: Path, equihpc: Run) -> None:
    (toy / "job.yaml").write_text(job([{"value": 1}, {"value": 2}]))
    submit(equihpc, "--wait")
    code = (toy / "toy.py").read_text()
    (toy / "toy.py").write_text(code.replace("later: int = Field(7,", "newer: int = 9\n    later: int = Field(7,"))
    assert "4 complete runs would be re-identified" in equihpc("plan", "job.yaml").stdout
    assert "4 complete runs would be re-identified" in submit(equihpc, code=2)
    neutral = code.replace("later: int = Field(7,", 'newer: int = Field(9, json_schema_extra={"neutral": 9})\n    later: int = Field(7,')
    (toy / "toy.py").write_text(neutral)
    assert "0 runs started" in submit(equihpc)
    (toy / "toy.py").write_text(code.replace("later: int = Field(7,", "newer: int = 9\n    later: int = Field(7,"))
    assert "4 runs started" in submit(equihpc, "--reidentify", "--wait")
    (toy / "job.yaml").write_text(job([{"value": 1}, {"value": 2}], steps=6))
    assert "4 runs started" in submit(equihpc), "a changed file is nobody's upgrade"


def test_a_spoiled_result_and_what_was_made_from_it_run_again(toy: Path, equihpc: Run) -> None:
    (toy / "job.yaml").write_text(job([{"value": 1}, {"value": 2}]))
    submit(equihpc, "--wait")
    spoiled = next(toy.glob("runs/job/a/value-1-*"))
    assert equihpc("invalidate", spoiled.name, "--because", "the learning rate was wrong").returncode == 0
    assert states(equihpc) == {"a1": "stale", "b1": "stale", "a2": "complete", "b2": "complete"}
    assert "the learning rate was wrong" in equihpc("status", "job", "--json").stdout
    numbers = json.loads(equihpc("report", "job", "--json").stdout)["rows"]
    assert [row["params"]["a.value"] for row in numbers if row["metrics"]] == [2], "spoiled numbers are in no table"
    assert equihpc("invalidate", spoiled.name, "--because", "x", "--undo").returncode == 0
    assert set(states(equihpc).values()) == {"complete"}
    equihpc("invalidate", spoiled.name, "--because", "again")
    assert "2 runs started" in submit(equihpc, "--wait")
    assert set(states(equihpc).values()) == {"complete"}
    assert equihpc("invalidate", "nothing-like-it", "--because", "x").returncode == 2

    # the scratch is purged: results stand in the ledger, and so does that one is spoiled
    equihpc("invalidate", spoiled.name, "--because", "the labels")
    shutil.rmtree(spoiled)
    assert states(equihpc) == {"a1": "stale", "b1": "stale", "a2": "complete", "b2": "complete"}
    assert "invalidated: the labels" in equihpc("status", "job", "--json").stdout
    shutil.rmtree(next(path for path in toy.glob("runs/job/b/[!.]*") if spoiled.name in path.joinpath("spec.json").read_text()))
    shutil.rmtree(next(toy.glob("runs/job/a/value-2-*")))
    assert states(equihpc) == {"a1": "stale", "b1": "stale", "a2": "purged", "b2": "complete"}
    numbers = json.loads(equihpc("report", "job", "--json").stdout)["rows"]
    assert [bool(row["metrics"]) for row in numbers] == [False, True]
    assert equihpc("invalidate", spoiled.name, "--because", "x", "--undo").returncode == 0
    assert states(equihpc) == {"a1": "purged", "b1": "purged", "a2": "purged", "b2": "complete"}
    numbers = json.loads(equihpc("report", "job", "--json").stdout)["rows"]
    assert [bool(row["metrics"]) for row in numbers] == [True, True]
    assert "0 runs started" in submit(equihpc)
    assert equihpc("invalidate", spoiled.name, "--because", "the labels").returncode == 0, "also of what is purged"
    assert "2 runs started" in submit(equihpc, "--wait")
    assert states(equihpc) == {"a1": "complete", "b1": "complete", "a2": "purged", "b2": "complete"}


def test_a_run_under_another_name_or_in_another_job_is_the_same_run(toy: Path, equihpc: Run) -> None:
    """Linked folders: found while they run, cancelled by either id, started anew once, also after an invalidation."""
    (toy / "ja.yaml").write_text(job([{"value": 1}]))
    submit(equihpc, "--wait", name="ja.yaml")
    (toy / "jb.yaml").write_text(job([{"value": 1}]))
    assert "0 runs started" in submit(equihpc, name="jb.yaml")
    mine = next(toy.glob("runs/ja/a/value-1-*"))
    equihpc("invalidate", mine.name, "--because", "x")
    assert "2 runs started" in submit(equihpc, "--wait", name="jb.yaml")
    assert set(states(equihpc, "ja").values()) == set(states(equihpc, "jb").values()) == {"complete"}

    long = {"steps": 2000, "seconds": 0.05}
    (toy / "job.yaml").write_text(job([{"value": 7}], **long))
    submit(equihpc)
    wait_for(lambda: states(equihpc)["a7"] == "running")
    (toy / "job.yaml").write_text(job([{"value": 7, "seed": 0}], **long))  # a default, named: another id
    assert "left alone: 1 running, 1 pending" in submit(equihpc)
    assert "cancelled 2 runs" in equihpc("cancel", "job").stdout
    wait_for(lambda: states(equihpc)["a7"] == "cancelled")
    (toy / "zz.yaml").write_text(job([{"value": 7}], **long))
    assert "0 runs started" in submit(equihpc, name="zz.yaml")
    assert "2 runs started" in submit(equihpc, "--retry", "cancelled", name="zz.yaml")
    wait_for(lambda: states(equihpc, "zz")["a7"] == "running")
    assert states(equihpc)["a7"] == "running", "the owner sees what the other job started"
    assert "0 runs started" in submit(equihpc, name="zz.yaml")
    assert "0 runs started" in submit(equihpc)
    assert "spared 2 that another job contains too" in equihpc("cancel", "zz").stdout
    assert "cancelled 1 runs" in equihpc("cancel", next(toy.glob("runs/zz/a/value-7-*")).name).stdout, "by the name of the link"
    wait_for(lambda: states(equihpc, "zz")["a7"] == "cancelled")


def test_a_mended_bug_reaches_what_is_not_finished(toy: Path, equihpc: Run) -> None:
    code = (toy / "toy.py").read_text()
    (toy / "toy.py").write_text(code.replace('at["x"] +=', 'at["x"] -='))
    (toy / "job.yaml").write_text(job([{"value": 1}, {"value": 2}]))
    submit(equihpc, "--wait")
    (toy / "job.yaml").write_text(job([{"value": 3}], steps=1000, seconds=0.05))
    submit(equihpc)
    wait_for(lambda: list(toy.glob("runs/job/a/value-3-*/progress.json")))
    (toy / "toy.py").write_text(code)
    moved = equihpc("rebase", "job")
    assert "2 runs go on with code" in moved.stdout, moved.stdout + moved.stderr
    spec = json.loads(next(toy.glob("runs/job/a/value-3-*/spec.json")).read_text())
    assert "+=" in (Path(spec["code"]["path"]) / "toy.py").read_text()
    done = json.loads(next(toy.glob("runs/job/a/value-1-*/spec.json")).read_text())
    assert "-=" in (Path(done["code"]["path"]) / "toy.py").read_text(), "finished runs keep the code that made them"
    assert "0 runs go on" in equihpc("rebase", "job").stdout
    installed = (toy / "runs/job/.equihpc/code" / f"environment-{spec['code']['environment']}.txt").read_text()
    assert "pydantic==" in installed
    assert "submitit==" in installed
    equihpc("cancel", "job")


def test_held_runs_wait(toy: Path, equihpc: Run) -> None:
    (toy / "job.yaml").write_text(job([{"value": 1}, {"value": 2}]))
    submit(equihpc, "--wait")
    (toy / "job.yaml").write_text(job([{"value": 1}, {"value": 2}, {"value": 3}], steps=6))
    planned = json.loads(equihpc("plan", "job.yaml", "--json").stdout)["runs"]
    held = next(run["id"] for run in planned if run["params"].get("a.value") == 3)
    (toy / "runs/job/a" / held).mkdir(parents=True)
    (toy / "runs/job/a" / held / ".hold").touch()
    assert "4 runs started" in submit(equihpc, "--wait", code=1)
    assert states(equihpc)["a3"] == "planned"
    assert equihpc("release", "job").stdout.startswith("released 1 runs")
    assert "2 runs started" in submit(equihpc, "--wait")


def test_missing_data_block_a_run_and_not_the_others(toy: Path, equihpc: Run) -> None:
    (toy / "data").mkdir()
    (toy / "data/shard.tar").write_bytes(b"abc")
    manifest = {
        "name": "d",
        "splits": {"train": {"shards": [{"name": "shard.tar", "bytes": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}]}},
    }
    (toy / "data/manifest.json").write_text(json.dumps(manifest))
    (toy / "job.yaml").write_text(job([{"value": 1, "data": "./data"}, {"value": 2, "data": "unheard"}, {"value": 3}]))
    needed = equihpc("data", "needed", "job.yaml", "--json")
    assert needed.returncode == 1
    assert {name: bool(entry["problem"]) for name, entry in json.loads(needed.stdout)["data"].items()} == {"./data": False, "unheard": True}
    said = equihpc("submit", "job.yaml", "--wait")
    assert "blocked: data set 'unheard': the profile knows no place" in said.stdout
    assert states(equihpc) == {"a1": "complete", "b1": "complete", "a2": "blocked", "b2": "blocked", "a3": "complete", "b3": "complete"}
    (toy / "job.yaml").write_text(job([{"value": 2, "data": "unheard"}]))
    assert "the profile knows no place" in submit(equihpc, code=2), "nothing else is left to do"


def test_the_cap_on_hours_keeps_the_less_important_out(toy: Path, equihpc: Run) -> None:
    (toy / "job.yaml").write_text(job([{"value": 1}], more="budgets: {gpu_hours: 0.000000001}"))
    first = submit(equihpc, "--wait", code=1)
    assert "2 runs started" in first, "there is no estimate, and nothing was used"
    assert states(equihpc) == {"a1": "complete", "b1": "failed"}, "the first run used the hours up"
    assert "GPU hours are used up" in first
    (toy / "job.yaml").write_text(job([{"value": 1}, {"value": 2}], more="budgets: {gpu_hours: 0.000000001}"))
    said = submit(equihpc)
    assert "0 runs started" in said
    assert "3 runs are left alone: budgets.gpu_hours is 1e-09" in said
    (toy / "job.yaml").write_text(job([{"value": 1}, {"value": 2}], more="budgets: {gpu_hours: 5}"))
    assert "3 runs started" in submit(equihpc, "--wait")


def test_a_ceiling_holds_until_somebody_asks(toy: Path, equihpc: Run) -> None:
    (toy / "job.yaml").write_text(job([{"value": 1, "fail_at": 2}], more="budgets: {attempts: 2}"))
    assert equihpc("submit", "job.yaml", "--wait").returncode == 1
    assert "2 runs started" in submit(equihpc, "--wait", code=1), "an exception may be mended"
    said = submit(equihpc, "--wait", code=1)
    assert "0 runs started" in said
    assert "1 failed runs are left alone" in said
    assert "--retry failed" in said
    assert "2 runs started" in submit(equihpc, "--retry", "failed", "--wait", code=1)


class Node:
    """What `prefix` needs of a run."""

    def __init__(self, name: str, upstream: dict[str, Node]):
        self.hash, self.upstream = name, upstream


@given(st.lists(st.integers(0, 3), min_size=1, max_size=8), st.integers(0, 40))
def test_what_fits_is_closed_under_upstream_and_as_much_as_possible(children: list[int], room: int) -> None:
    roots = [Node(f"r{i}", {}) for i in range(len(children))]
    leaves = [Node(f"r{i}-{k}", {"a": roots[i]}) for i, count in enumerate(children) for k in range(count)]
    chosen = prefix([*roots, *leaves], lambda some: len(some) <= room)  # type: ignore[arg-type, list-item]
    names = [node.hash for node in chosen]
    assert len(names) == min(room, len(roots) + len(leaves))
    assert all(node.upstream["a"].hash in names for node in chosen if node.upstream)  # type: ignore[attr-defined]
    complete = [i for i in range(len(roots)) if f"r{i}" in names]
    assert complete == list(range(len(complete))), "the more important first"
    for before, after in itertools.pairwise(complete):
        if f"r{after}" in names:
            assert all(f"r{before}-{k}" in names for k in range(children[before]))


@pytest.mark.parametrize("option", [["--retry", "complete"], ["--chain", "2"]])
def test_options_that_make_no_sense_are_refused(toy: Path, equihpc: Run, option: list[str]) -> None:
    (toy / "job.yaml").write_text(job([{"value": 1}]))
    assert option[0] in submit(equihpc, *option, code=2)
    assert not (toy / "runs").exists()
