"""A full disk, on real small file systems: all ranks end with one message, nothing half-written is read, the same run goes on after.

Mounting needs root. Elsewhere a file that grows beyond a size fails in its place, in the same call of the same process.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import resource
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from harness import run_ranks
from test_launch import end, start
from test_loop import curve
from torch.distributed.tensor import Shard, distribute_tensor

from equissl import checkpoint, distributed, logs, pretrain
from equissl.checkpoint import Checkpoints
from equissl.files import DiskFull, append_line, write_atomic

MEGABYTE = 2**20


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A small file system of its own. Only root may mount one, and root must be able to: there nothing is left out."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path, leave_bytes: int) -> Path:
    """Use up all space but so much; others may write at the same time, and use some of it first."""
    room = os.statvfs(folder)
    ballast = folder / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        left = room.f_bavail * room.f_frsize - leave_bytes
        while left > 0:
            left -= file.write(bytes(min(left, MEGABYTE)))
    assert os.statvfs(folder).f_bavail * room.f_frsize <= leave_bytes + room.f_frsize
    return ballast


def saved(folder: Path, megabytes: dict[int, float]) -> list[str]:
    """On each rank: save one tensor of that size per step, sharded over the ranks; returns what was raised, and what is the newest."""
    world = distributed.init()
    try:
        checkpoints, said = Checkpoints(folder, 2, world), []
        for step, size in megabytes.items():
            whole = torch.full((int(size * MEGABYTE / 4),), float(step))
            sharded = distribute_tensor(whole, world.mesh, [Shard(0)])
            try:
                checkpoints.save(step, {"student.a": sharded, "student.b": torch.ones(3)})
            except DiskFull as error:
                said.append(f"{error.errno} {error}")
        return [*said, str(checkpoints.newest())]
    finally:
        distributed.close()


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_save_without_room_leaves_the_one_before(world_size: int, tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "size=4m") as folder:
        for said, newest in run_ranks(saved, world_size, folder / "checkpoints", {1: 1, 2: 6}):
            assert newest == "1"
            assert said.startswith(f"{errno.ENOSPC} ")
            assert "No space left on device: the checkpoint of step 2 needs 6,291,468 bytes in" in said
            assert f"{folder / 'checkpoints'}, where" in said
            assert "inodes are free. Make room there, then start the same run again" in said
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_1"]
        for answer in run_ranks(saved, world_size, folder / "checkpoints", {2: 1, 3: 1}):
            assert answer == ["3"]


def test_a_save_without_inodes_leaves_the_one_before(tmp_path: Path) -> None:
    """One more inode each time, so that each of the files of the second save is once the one that cannot be made."""
    for inodes in range(8, 20):
        with mounted(tmp_path / f"small_{inodes}", f"size=8m,nr_inodes={inodes}") as folder:
            mine, other = run_ranks(saved, 2, folder / "checkpoints", {1: 0.1, 2: 0.1})
            names = sorted(path.name for path in (folder / "checkpoints").iterdir())
        assert mine == other
        if mine == ["2"]:
            assert names == ["step_1", "step_2"]
            break
        assert "No space left on device: the checkpoint of step 2 needs" in mine[0]
        assert mine[1:] == ["1"]
        assert names == ["step_1"]
    assert inodes == 12, "a folder and four files: for two ranks, the metadata and the marker"


PLACES = {"write": (checkpoint._RawFile, "write"), "describe": (checkpoint, "_describe"), "marker": (checkpoint, "write_json")}


def failing(folder: Path, where: str, rank: int, number: int) -> tuple[str, int, list[str]]:
    """The second save fails on `rank` alone in `where`; needs no file system of its own."""
    world = distributed.init()
    try:
        checkpoints = Checkpoints(folder, 2, world)
        state = {"student.a": distribute_tensor(torch.ones(100_000), world.mesh, [Shard(0)])}
        checkpoints.save(1, state)

        def full(first: Any, *_: Any) -> Any:
            error = OSError(number, os.strerror(number), "some file")
            if isinstance(first, checkpoint._RawFile):
                first.error = error
            raise error

        with pytest.MonkeyPatch.context() as patch:
            if world.rank == rank:
                patch.setattr(*PLACES[where], full)
            with pytest.raises(OSError, match=re.escape(os.strerror(number))) as caught:
                checkpoints.save(2, state)
        return str(caught.value), checkpoints.newest(), sorted(path.name for path in folder.iterdir())
    finally:
        distributed.close()


@pytest.mark.parametrize(("where", "rank"), [("write", 0), ("write", 1), ("describe", 1), ("marker", 0)])
def test_where_one_rank_fails_all_do(where: str, rank: int, tmp_path: Path) -> None:
    answers = run_ranks(failing, 2, tmp_path / "checkpoints", where, rank, errno.EDQUOT)
    assert answers[0] == answers[1]
    said, newest, names = answers[0]
    assert "Disk quota exceeded: the checkpoint of step 2 needs 400,000 bytes" in said
    assert "your quota or your group's is used up" in said
    assert newest == 1
    assert names == ["step_1"]
    other = run_ranks(failing, 2, tmp_path / "other", where, rank, errno.EIO)[0]
    assert "needs" not in other[0]
    assert other[1:] == (1, ["step_1"])


def test_a_limit_on_the_size_of_files_leaves_the_one_before(tmp_path: Path) -> None:
    """Where nothing can be mounted: a real error of a real write, with another number."""
    for answer in run_ranks(limited, 2, tmp_path / "checkpoints"):
        assert answer == ("[Errno 27] File too large", 1, ["step_1"])


def limited(folder: Path) -> tuple[str, int, list[str]]:
    world = distributed.init()
    try:
        checkpoints = Checkpoints(folder, 2, world)
        checkpoints.save(1, {"a": torch.ones(10)})
        big = {"a": distribute_tensor(torch.ones(MEGABYTE), world.mesh, [Shard(0)])}
        resource.setrlimit(resource.RLIMIT_FSIZE, (MEGABYTE, resource.RLIM_INFINITY))
        with pytest.raises(OSError, match="File too large") as caught:
            checkpoints.save(2, big)
        return str(caught.value), checkpoints.newest(), sorted(path.name for path in folder.iterdir())
    finally:
        distributed.close()


# --- whole runs ----------------------------------------------------------------------------------------------------------


def attempt(config: dict[str, Any], run_dir: Path, stop_at: int = 0, fill_at: int = 0) -> Any:
    """The result, or what was raised on this rank. Rank 0 fills the disk after `fill_at` steps."""
    calls = 0

    def stop() -> bool:
        nonlocal calls
        calls += 1
        if calls == fill_at and os.environ["RANK"] == "0":
            fill(run_dir.parent, 0)
        return calls == stop_at

    try:
        return pretrain.main(config, run_dir, stop)
    except Exception as error:
        return error


@pytest.fixture(scope="module")
def config(photographs: Path) -> dict[str, Any]:
    return tiny.config(str(photographs), checkpoint_every=3, num_steps=24).model_dump(mode="json", by_alias=True)


@pytest.fixture(scope="module")
def whole(config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run with room."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    run_dir.mkdir()
    return run_dir, run_ranks(attempt, 2, config, run_dir)[0]


@pytest.mark.parametrize(("every", "first", "second"), [(3, 3, 6), (10, 9, 18)], ids=["before", "behind"])
def test_a_run_whose_save_finds_no_room_goes_on_when_there_is_some(
    every: int, first: int, second: int, config: dict[str, Any], whole: Any, tmp_path: Path
) -> None:
    config = {**config, "checkpoint_every": every}
    run_bytes = sum(path.stat().st_size for path in (whole[0] / "checkpoints" / "step_24").iterdir())
    with mounted(tmp_path / "small", f"size={int(1.5 * run_bytes)}") as folder:
        (run_dir := folder / "run").mkdir()
        for error in run_ranks(attempt, 2, config, run_dir):
            assert isinstance(error, DiskFull)
            assert f"No space left on device: the checkpoint of step {second} needs" in str(error)
        assert [path.name for path in (run_dir / "checkpoints").iterdir()] == [f"step_{first}"]
        logged = curve(run_dir)[-1]["step"]  # the step after it is read when the next one is through
        assert logged == second if every < 10 else second <= logged <= second + 1
        subprocess.run(["mount", "-o", f"remount,size={5 * run_bytes}", folder], check=True)
        result = run_ranks(attempt, 2, config, run_dir)[0]
        assert result["weights_sha256"] == whole[1]["weights_sha256"]
        assert curve(run_dir) == curve(whole[0])


def test_a_run_whose_log_finds_no_room_goes_on_when_there_is_some(config: dict[str, Any], whole: Any, tmp_path: Path) -> None:
    run_bytes = sum(path.stat().st_size for path in (whole[0] / "checkpoints" / "step_24").iterdir())
    with mounted(tmp_path / "small", f"size={5 * run_bytes}") as folder:
        (run_dir := folder / "run").mkdir()
        assert run_ranks(attempt, 2, config, run_dir, 3) == [None, None]
        mine, other = run_ranks(attempt, 2, {**config, "checkpoint_every": 100}, run_dir, 0, 2)
        assert isinstance(mine, DiskFull)
        assert isinstance(other, RuntimeError), "the other rank saw that the first went away"
        assert "No space left on device: " in str(mine)
        assert f"in {run_dir}, where 0 bytes" in str(mine)
        (folder / "ballast").unlink()
        result = run_ranks(attempt, 2, config, run_dir)[0]
        assert result["weights_sha256"] == whole[1]["weights_sha256"]
        assert curve(run_dir) == curve(whole[0])


def test_the_command_ends_with_one_message(config: dict[str, Any], tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "size=1m") as folder:
        (tmp_path / "config.json").write_text(json.dumps({**config, "checkpoint_every": 1}))
        code, output = end(start(tmp_path / "config.json", folder / "run"))
    assert code == 1
    assert output.splitlines()[-1].startswith("error: No space left on device: the checkpoint of step 1 needs ")
    assert "Traceback" not in output


# --- the logs by themselves ----------------------------------------------------------------------------------------------


def test_files_are_whole_or_old_and_the_last_line_is_repaired(tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "size=1m,nr_inodes=8") as folder:
        write_atomic(folder / "a.json", "old")
        append_line(folder / "metrics.jsonl", {"step": 1})
        ballast = fill(folder, 0)
        with pytest.raises(
            DiskFull, match=r"No space left on device: a\.json needs 5,000 bytes in .*, where 0 bytes and 4 inodes are free\. Make"
        ):
            write_atomic(folder / "a.json", "n" * 5000)
        with pytest.raises(DiskFull, match=r"metrics\.jsonl needs 5,\d+ bytes in"):
            append_line(folder / "metrics.jsonl", {"step": 2, "text": "x" * 5000})
        assert sorted(path.name for path in folder.iterdir()) == ["a.json", "ballast", "metrics.jsonl"]
        assert (folder / "a.json").read_text() == "old"
        assert not (folder / "metrics.jsonl").read_bytes().endswith(b"\n")
        ballast.unlink()
        assert logs.truncate(folder / "metrics.jsonl", 2) == [{"step": 1}]
        assert (folder / "metrics.jsonl").read_text() == '{"step": 1}\n'
        for name in range(5):
            (folder / f"{name}").touch()
        with pytest.raises(DiskFull, match=r"a\.json needs 3 bytes in .* and 0 inodes are free\. Make"):
            write_atomic(folder / "a.json", "new")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's thread
def test_tensorboard_without_room(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    with mounted(tmp_path / "small", "size=1m") as folder:
        log = logs.Logs(folder, 0, tiny.TIMELINE, tiny.config(), distributed.init(), lambda: 0.0)
        distributed.close()
        log.step(1, {"loss": 1.0})
        fill(folder, 4096)
        with pytest.raises(DiskFull, match="No space left on device: tensorboard cannot be written in"):
            write_much(log)
        with pytest.raises(DiskFull, match="tensorboard cannot be written"):
            log.close()
        with pytest.raises(ZeroDivisionError):
            close_after(log)
        for thread in set(threading.enumerate()) - before:  # what it dies of belongs to this test
            thread.join(20)


def write_much(log: logs.Logs) -> None:
    with log._told():
        for _ in range(100):
            log._board.add_text("long", "x" * 5000)
            log._board.flush()


def close_after(log: logs.Logs) -> None:
    """The error on its way out is the one that is told."""
    try:
        raise ZeroDivisionError
    finally:
        log.close()
