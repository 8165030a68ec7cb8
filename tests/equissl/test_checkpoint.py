"""Checkpoints by themselves, in one process: what is kept, what is refused."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from equissl import distributed
from equissl.checkpoint import MARKER, Checkpoints
from equissl.distributed import World


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.delenv("RANK", raising=False)
    yield distributed.init()
    distributed.close()


def state(value: float) -> dict[str, torch.Tensor]:
    return {"student.a": torch.full((3, 2), value), "centres": torch.full((5,), -value)}


def saved(folder: Path, world: World, *steps: int, keep: int = 2) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep, world)
    for step in steps:
        checkpoints.save(step, state(step))
    return checkpoints


def test_the_newest_is_found_and_the_last_ones_are_kept(world: World, tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "none", 2, world).newest() == 0
    checkpoints = saved(tmp_path, world, 5, 10, 100, 101)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_100", "step_101"]
    assert checkpoints.newest() == 101
    into = state(0)
    checkpoints.load(101, into)
    assert torch.equal(into["student.a"], torch.full((3, 2), 101.0))
    assert torch.equal(into["centres"], torch.full((5,), -101.0))
    assert sorted(path.name for path in (tmp_path / "step_101").iterdir()) == [".metadata", "__0_0.distcp", MARKER]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: (path / MARKER).unlink(), "it has no checksums.json, so it was not finished"),
        (lambda path: (path / MARKER).write_text("{"), "checksums.json cannot be read"),
        (lambda path: (path / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
        (lambda path: os.truncate(path / "__0_0.distcp", 100), "__0_0.distcp is not what checksums.json says"),
        (lambda path: (path / ".metadata").write_bytes(b"x" * (path / ".metadata").stat().st_size), ".metadata is not what"),
    ],
)
def test_a_damaged_one_is_passed_over(damage: object, said: str, world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = saved(tmp_path, world, 1, 2)
    assert callable(damage)
    damage(tmp_path / "step_2")
    with caplog.at_level(logging.WARNING):
        assert checkpoints.newest() == 1
    assert said in caplog.text
    assert "step_2 cannot be used" in caplog.text
    checkpoints.save(2, state(7))  # written anew in its place
    assert checkpoints.newest() == 2


def test_all_damaged_is_none(world: World, tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, world, 1)
    (tmp_path / "step_1" / MARKER).unlink()
    assert checkpoints.newest() == 0


def test_those_of_another_user_are_refused(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = saved(tmp_path, world, 1)
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    with pytest.raises(ValueError, match=f"belongs to user {owner}, not to you \\({owner + 1}\\); checkpoints hold a pickle"):
        checkpoints.newest()


def test_other_tensors_are_refused(world: World, tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, world, 1)
    with pytest.raises(ValueError, match=r"holds other tensors than this run has, for example student\.b"):
        checkpoints.load(1, {**state(0), "student.b": torch.zeros(1)})
    with pytest.raises(ValueError, match="for example centres"):
        checkpoints.load(1, {"student.a": torch.zeros(3, 2)})


def test_a_checkpoint_of_another_torch_says_so(world: World, tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, world, 1)
    marker = json.loads((tmp_path / "step_1" / MARKER).read_text())
    (tmp_path / "step_1" / MARKER).write_text(json.dumps({**marker, "torch": "9.9.9"}))
    (tmp_path / "step_1" / ".metadata").write_bytes(b"not a pickle")
    with pytest.raises(Exception) as caught:  # noqa: PT011 (whatever the pickle raises)
        checkpoints.load(1, state(0))
    assert "was written by torch 9.9.9" in caught.value.__notes__[0]
