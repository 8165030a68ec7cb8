"""Checkpoints by themselves, in one process: what is kept, what is refused."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from equissl import checkpoint, distributed
from equissl.checkpoint import MARKER, Checkpoints
from equissl.distributed import World
from equissl.files import write_json


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


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: (path / MARKER).unlink(), "checksums.json is missing"),
        (lambda path: (path / MARKER).write_text("{"), "checksums.json cannot be read"),
        (lambda path: (path / MARKER).write_text("[1, 2]"), "checksums.json cannot be read"),
        (lambda path: (path / MARKER).write_text('{"step": 2, "files": {}}'), "checksums.json cannot be read: Field required"),
        (lambda path: (path / MARKER).write_bytes(b"\xff\xfe"), "checksums.json cannot be read"),
        (lambda path: (path / MARKER).write_bytes((path.parent / "step_1" / MARKER).read_bytes()), "checksums.json is not that of step 2"),
        (lambda path: (path / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
        (lambda path: os.truncate(path / "__0_0.distcp", 100), "__0_0.distcp is not what checksums.json says"),
        (lambda path: flip(path / ".metadata", 7), ".metadata is not what checksums.json says"),
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


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of steps 1 and 2. Not to be written into."""
    folder = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RANK", raising=False)
        saved(folder, distributed.init(), 1, 2)
    distributed.close()
    return folder


@given(
    name=st.sampled_from([".metadata", "__0_0.distcp", MARKER]),
    position=st.floats(0, 1, exclude_max=True),
    how=st.sampled_from(["flip", "truncate", "remove", "zeros"]),
    bit=st.integers(0, 7),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_damage_never_reaches_the_tensors(name: str, position: float, how: str, bit: int, two: Path, world: World) -> None:
    """Either the one before is used, or the damage touched nothing that is read (a name of a torch version, a space)."""
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(two, Path(folder) / "checkpoints")
        file = copy / "step_2" / name
        content = bytearray(file.read_bytes())
        at = int(position * len(content))
        if how == "flip":
            content[at] ^= 1 << bit
        elif how == "truncate":
            del content[at:]
        elif how == "zeros":
            content[at:] = bytes(len(content) - at)
        file.write_bytes(content)
        if how == "remove":
            file.unlink()
        checkpoints = Checkpoints(copy, 2, world)
        newest = checkpoints.newest()
        if name != MARKER and content != bytearray((two / "step_2" / name).read_bytes()):
            assert newest == 1
        into = state(0)
        checkpoints.load(newest, into)
        assert all(torch.equal(tensor, state(newest)[key]) for key, tensor in into.items())


def test_where_all_are_damaged_people_decide(world: World, tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, world, 1, 2)
    (tmp_path / "step_1" / MARKER).unlink()
    flip(tmp_path / "step_2" / "__0_0.distcp", 500)
    with pytest.raises(ValueError, match="does not begin again from step 0 by itself") as caught:
        checkpoints.newest()
    assert (
        f"no checkpoint in {tmp_path} can be used: step_2: __0_0.distcp is not what checksums.json says; step_1: checksums.json is missing"
        in str(caught.value)
    )
    assert "delete that folder to start anew" in str(caught.value)
    shutil.rmtree(tmp_path)
    assert checkpoints.newest() == 0


def test_a_first_save_that_was_killed_is_no_damage(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However far it came, its folder is called step_N only when all is in it."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2, world)
    assert checkpoints.newest() == 0

    class Killed(BaseException):
        pass

    def killed(*_: object, **__: object) -> None:
        raise Killed

    def killed_after_the_marker(path: Path, value: object) -> None:
        write_json(path, value)
        raise Killed

    for module, name, kill in (
        (dcp, "save", killed),
        (checkpoint, "write_json", killed),
        (checkpoint, "write_json", killed_after_the_marker),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, kill)
            with pytest.raises(Killed):
                checkpoints.save(1, state(1))
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [".writing_1"]
        assert checkpoints.newest() == 0
    checkpoints.save(1, state(1))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_1"]


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
