"""Checkpoints by themselves: what is kept, what is refused, what is written behind the loop; most of it in one process."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from harness import run_ranks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Shard, distribute_tensor

from equissl import checkpoint, distributed
from equissl.checkpoint import MARKER, Checkpoints, find_newest, read_whole
from equissl.distributed import World
from equissl.files import DiskFull, write_json


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
        if name == MARKER and is_of_another_format(bytes(content)):
            with pytest.raises(ValueError, match="has the format"):
                checkpoints.newest()
            return
        newest = checkpoints.newest()
        if name != MARKER and content != bytearray((two / "step_2" / name).read_bytes()):
            assert newest == 1
        into = state(0)
        checkpoints.load(newest, into)
        assert all(torch.equal(tensor, state(newest)[key]) for key, tensor in into.items())


def is_of_another_format(marker: bytes) -> bool:
    try:
        return json.loads(marker).get("format", 1) != 1
    except ValueError:
        return False


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
    into = {**state(0), "monitor.bank": torch.full((2,), 7.0)}  # earlier versions watched nothing
    checkpoints.load(1, into)
    assert torch.equal(into["centres"], state(1)["centres"])
    assert torch.equal(into["monitor.bank"], torch.full((2,), 7.0))


def test_a_checkpoint_of_another_torch_says_so(world: World, tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, world, 1)
    mark(tmp_path / "step_1", torch="9.9.9")
    (tmp_path / "step_1" / ".metadata").write_bytes(b"not a pickle")
    with pytest.raises(
        ValueError, match=r"step_1 was written by torch 9\.9\.9, and torch .* cannot read it .*: go on with torch 9\.9\.9\. "
    ):
        checkpoints.load(1, state(0))
    with pytest.raises(ValueError, match=r"torch 9\.9\.9"):
        read_whole(tmp_path / "step_1", lambda name: True)


def test_one_of_a_format_to_come_stops_everything(world: World, tmp_path: Path) -> None:
    """The one before is good, but to go on from it would lose what was done since, for no reason."""
    checkpoints = saved(tmp_path, world, 1, 2)
    assert json.loads((tmp_path / "step_2" / MARKER).read_text())["format"] == 1
    mark(tmp_path / "step_2", format=None)  # as before there were numbers
    assert checkpoints.newest() == 2
    mark(tmp_path / "step_2", format=2, step=None, files=None)
    with pytest.raises(ValueError, match=r"step_2 has the format 2, this version of equissl reads 1 only: go on with the version that"):
        checkpoints.newest()


def mark(path: Path, **changes: object) -> None:
    marker = {**json.loads((path / MARKER).read_text()), **changes}
    (path / MARKER).write_text(json.dumps({name: value for name, value in marker.items() if value is not None}))


def test_whole_tensors_are_read_without_a_group(two: Path) -> None:
    assert find_newest(two) == 2
    found = read_whole(two / "step_2", lambda name: name.startswith("student."))
    assert found.keys() == {"student.a"}
    assert torch.equal(found["student.a"], state(2)["student.a"])


def test_milestones_are_never_removed(world: World, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 1, world, milestone_every=4)
    for step in (2, 4, 6, 8, 10):
        assert checkpoints.is_milestone(step) == (step in (4, 8))
        checkpoints.save(step, state(step))
    assert find(tmp_path) == ["step_10", "step_4", "step_8"]
    (tmp_path / "step_4" / MARKER).write_text("{")  # nobody knows any more
    Checkpoints(tmp_path, 1, world).save(12, state(12))  # not even when the setting has changed
    assert find(tmp_path) == ["step_12", "step_8"]


def find(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- behind the loop -----------------------------------------------------------------------------------------------------


class Gate:
    """Writing does not get beyond a point until it is opened; `reached` tells that it is there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        describe = checkpoint._describe

        def wait(path: Path) -> checkpoint.Described:
            self.reached.set()
            assert self.opened.wait(30)
            return describe(path)

        monkeypatch.setattr(checkpoint, "_describe", wait)


def test_the_loop_goes_on_with_the_copy_made(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints, gate, values = Checkpoints(tmp_path, 2, world), Gate(monkeypatch), state(1)
    checkpoints.save(1, values, behind=True)
    for tensor in values.values():
        tensor.fill_(99)
    assert gate.reached.wait(30)
    assert find(tmp_path) == [".writing_1"]
    assert not checkpoints.has_failed()
    kept = {name: copy.data_ptr() for name, copy in checkpoints._copies.items()}
    before = checkpoints.waited_s
    threading.Timer(0.2, gate.opened.set).start()
    checkpoints.save(2, state(2), behind=True)  # waits for the first: their copies are in the same memory
    assert find(tmp_path)[-1] == "step_1"
    assert checkpoints.waited_s - before > 0.15
    assert kept == {name: copy.data_ptr() for name, copy in checkpoints._copies.items()}
    checkpoints.wait()
    assert find(tmp_path) == ["step_1", "step_2"]
    for step in (1, 2):
        into = state(0)
        checkpoints.load(step, into)
        assert all(torch.equal(into[name], tensor) for name, tensor in state(step).items())


def test_what_goes_wrong_behind_is_raised_once_and_never_lost(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path) -> checkpoint.Described:
        raise OSError(28, "No space left on device", str(path))

    checkpoints = saved(tmp_path, world, 1)
    monkeypatch.setattr(checkpoint, "_describe", full)
    for at_the_end in (checkpoints.wait, lambda: checkpoints.save(3, state(3)), checkpoints.newest):
        checkpoints.save(2, state(2), behind=True)
        while not checkpoints.has_failed():
            time.sleep(0.01)
        with pytest.raises(DiskFull, match="the checkpoint of step 2 needs 88 bytes"):
            at_the_end()
        assert not checkpoints.has_failed()
        assert find(tmp_path) == ["step_1"]
    checkpoints.save(2, state(2), behind=True)
    checkpoints.close()
    assert "a checkpoint could not be written: [Errno 28] No space left on device: the checkpoint of step 2" in caplog.text


def test_two_ranks_save_behind_their_own_collectives_fail_together_and_are_killed(tmp_path: Path) -> None:
    run_ranks(behind, 2, tmp_path / "checkpoints", killed=True)
    assert find(tmp_path / "checkpoints") == [".writing_4", "step_1", "step_2"]
    assert find_newest(tmp_path / "checkpoints") == 2
    for step in (1, 2):
        found = read_whole(tmp_path / "checkpoints" / f"step_{step}", lambda name: True)
        assert torch.equal(found["student.a"], torch.arange(9.0) + step)
        assert torch.equal(found["student.b"], torch.full((3,), float(step)))


def behind(folder: Path) -> None:
    """The loop of one rank; it ends in the middle of the save of step 4."""
    world = distributed.init()
    checkpoints = Checkpoints(folder, 2, world)
    sharded, replicated = distribute_tensor(torch.arange(9.0), world.mesh, [Shard(0)]), torch.zeros(3)  # 5 and 4 rows

    def update() -> None:
        distributed.local(sharded).add_(1)
        replicated.add_(1)

    def collectives(number: int) -> None:
        for i in range(number):
            values = torch.full((100,), float(i + world.rank))
            dist.all_reduce(values, group=world.cpu_group)
            assert values.eq(2 * i + 1).all()

    def full(path: Path) -> checkpoint.Described:
        raise OSError(28, "No space left on device", str(path))

    def die(path: Path) -> checkpoint.Described:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    for step in (1, 2):
        update()
        checkpoints.save(step, {"student.a": sharded, "student.b": replicated}, behind=True)
        collectives(100)
    checkpoints.wait()
    if world.rank == 1:
        checkpoint._describe = full
    update()
    checkpoints.save(3, {"student.a": sharded, "student.b": replicated}, behind=True)
    collectives(20)
    with pytest.raises(DiskFull, match="the checkpoint of step 3 needs 48 bytes"):
        checkpoints.save(4, {"student.a": sharded, "student.b": replicated}, behind=True)
    checkpoint._describe = die
    checkpoints.save(4, {"student.a": sharded, "student.b": replicated}, behind=True)
    try:
        checkpoints.wait()
    finally:
        os.kill(os.getpid(), signal.SIGKILL)
