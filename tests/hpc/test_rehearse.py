"""Rehearsals on this machine: real processes, real faults, and a comparison that notices."""

from __future__ import annotations

import json
import random
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from hpc import faults, rehearse
from hpc.errors import UserError
from tests.benchmarks.faults import write_job

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_a_job_with_faults_comes_to_the_same(tmp_path: Path, equihpc: Run) -> None:
    write_job(tmp_path, num_runs=1, steps=120, evaluation_steps=5)
    only = ("checkpoint-flipped", "runner-killed", "rank-stopped")
    options = [word for name in only for word in ("--only", name)]
    done = equihpc("rehearse", "job.yaml", "--variant", "none", "--faults", "3", "--hang-seconds", "3", "--json", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["ok"] is True
    assert sorted(hit["fault"] for hit in found["hits"]) == sorted(only)
    for hit in found["hits"]:
        assert hit["said"]
        assert 0 <= hit["lost_steps"] <= (20 if hit["fault"] == "checkpoint-flipped" else 10)
        assert hit["seconds_to_next_step"] > 0
        assert hit["fault"] in done.stderr, "the live view names it"


def test_a_run_that_loses_a_step_is_noticed(tmp_path: Path, equihpc: Run) -> None:
    write_job(tmp_path, num_runs=1, steps=60, every=1, evaluation_steps=5)  # whenever it is killed there is a checkpoint to go on from
    options = ("--variant", "none", "--set", "train.careless=true", "--faults", "1", "--only", "rank-killed")
    done = equihpc("rehearse", "job.yaml", *options)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "metrics.jsonl has other steps; doubled: [], missing: [" in done.stdout
    assert "weights_sha256 is" in done.stdout
    assert "NOT the same as undisturbed" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "it has no variant 'smoke'"),
        (("--variant", "none", "--only", "rank-kiled"), "did you mean 'rank-killed'?"),
        (("--variant", "none", "--node-hours", "1"), "the local profile has no nodes"),
        (("--variant", "none", "--cluster", "juwels-booster", "--hang-seconds", "5"), "not done on a site"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_starts(
    tmp_path: Path, equihpc: Run, arguments: tuple[str, ...], message: str
) -> None:
    write_job(tmp_path)
    done = equihpc("rehearse", "job.yaml", *arguments, env={"EQUIHPC_ACCOUNT": "x", "EQUIHPC_DATA": "/x"})
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
    assert not (tmp_path / "runs").exists()


def test_every_fault_comes_before_any_comes_again() -> None:
    for place in (faults.LOCAL, faults.TESTBED, faults.SITE):
        possible = {fault.name for fault in faults.CATALOGUE if place in fault.places}
        names = [fault.name for fault in faults.draw(place, 3 * len(possible), random.Random(1))]
        assert set(names[: len(possible)]) == possible
        count = Counter(names)
        for fault in faults.CATALOGUE:
            if fault.name in possible:
                assert count[fault.name] == 1 if fault.when == "submission" else count[fault.name] >= 3
        assert names == [fault.name for fault in faults.draw(place, 3 * len(possible), random.Random(1))]
    with pytest.raises(UserError, match="choose from"):
        faults.draw(faults.LOCAL, 1, random.Random(0), ["preempted"])


@pytest.mark.parametrize(
    ("names", "attempts", "allowed"),
    [
        (["preempted"], [1], 1),
        (["preempted", "step-killed"], [1, 1], 10),  # it was killed while it wrote what the preemption gave it time for
        (["preempted", "step-killed"], [1, 2], 1),
        (["step-killed"], [1], 10),
        (["preempted", "checkpoint-flipped"], [1, 1], 20),
        (["preempted", "submitted-twice"], [1, 1], 1),
    ],
)
def test_what_may_be_lost_follows_from_all_that_struck_the_attempt(names: list[str], attempts: list[int], allowed: int) -> None:
    cause = {fault.name: fault.cause for fault in faults.CATALOGUE}
    hits = [rehearse.Hit(name, cause[name], "run", 0.0, attempt) for name, attempt in zip(names, attempts, strict=True)]
    runs = {"run": {"config": {"checkpoint_every": 10}, "num_steps": 240}}
    seen = SimpleNamespace(of=lambda _: SimpleNamespace(saves=True))
    judge = cast(rehearse.Pass, SimpleNamespace(runs=runs, seen=seen, hits=hits))
    assert rehearse.Pass._may_lose(judge, hits[0], {"attempt": 1, "cause": "preempted"}) == allowed


def test_differences_are_exact_or_within_the_tolerance_and_without_what_is_timed() -> None:
    one = {"metrics": {"loss": 1.0, "pretrain/images_per_s": 5.0}, "weights_sha256": "a", "steps": [1, 2]}
    other = {"metrics": {"loss": 1.0 + 1e-9, "pretrain/images_per_s": 6.0}, "weights_sha256": "b", "steps": [1, 2]}
    assert rehearse.differences(one, one, 0.0) == []
    assert [text.partition(" ")[0] for text in rehearse.differences(one, other, 0.0)] == ["metrics.loss", "weights_sha256"]
    assert rehearse.differences(one, other, 1e-6) == []
    assert rehearse.differences(one, {**other, "steps": [1]}, 1e-6) == ["steps is [1], undisturbed [1, 2]"]
    assert rehearse.differences({"x": 1.0}, {}, 1e-6) == ["x is None, undisturbed 1.0"]
