"""Staging: one copy a node, however many ask; checked while it is copied; removed by the last, and by the next where all were killed."""

from __future__ import annotations

import errno
import fcntl
import functools
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from equissl.data import stage
from equissl.data.__main__ import main
from equissl.data.index import index
from equissl.data.shards import Sample, ShardSet, manifest_sha256, write_manifest, write_shards
from equissl.data.stage import staged, sweep
from equissl.files import DiskFull


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    splits = {}
    for split in ("train", "val"):
        samples = [Sample(f"{split}{i}", os.urandom(3000), "png", i % 2) for i in range(9)]
        splits[split] = write_shards(samples, folder, split, 3)
    write_manifest(folder, "test", ["a", "b"], splits, {})
    return folder


@pytest.fixture
def dest(tmp_path: Path) -> Path:
    folder = tmp_path / "node"
    folder.mkdir()
    return folder


def contents(folder: Path, split: str = "train") -> list[tuple[str, bytes, int]]:
    data = ShardSet(folder, split)
    return [(data.key(i), data.read(i), data.label(i)) for i in range(len(data))]


def copied(place: Path) -> list[str]:
    return sorted(str(path.relative_to(place)) for path in place.rglob("*") if path.is_file() and not path.is_symlink())


def linked(place: Path) -> list[str]:
    return sorted(str(path.relative_to(place)) for path in place.rglob("*") if path.is_symlink())


TRAIN = ["train-000000.tar", "train-000001.tar", "train-000002.tar", "train.index.npy", "train.keys.npy"]
VAL = [name.replace("train", "val") for name in TRAIN]


def test_a_copy_that_is_the_same_data_set(data: Path, dest: Path) -> None:
    with staged(data, ("train",), dest) as place:
        assert place.parent == dest / f"equihpc-{os.getuid()}"
        assert copied(place) == ["manifest.json", *TRAIN]
        assert linked(place) == VAL
        assert manifest_sha256(place) == manifest_sha256(data)
        for split in ("train", "val"):
            assert contents(place, split) == contents(data, split)
        assert [path.stat().st_mode & 0o777 for path in (place, place.parent)] == [0o700, 0o700]
    assert os.listdir(dest) == []


def test_the_last_user_removes(data: Path, dest: Path) -> None:
    with staged(data, ("train",), dest) as place:
        inode = (place / TRAIN[0]).stat().st_ino
        with staged(data, ("train",), dest) as again, staged(data, ("val",), dest) as other:
            assert again == place != other
            assert (again / TRAIN[0]).stat().st_ino == inode
        assert contents(place) == contents(data)
        assert list(place.parent.iterdir()) == [place]
    assert os.listdir(dest) == []


def test_an_error_of_the_user_removes_too(data: Path, dest: Path) -> None:
    with pytest.raises(KeyboardInterrupt), staged(data, ("train",), dest):
        raise KeyboardInterrupt
    assert os.listdir(dest) == []


def test_a_small_budget_gives_links(data: Path, dest: Path) -> None:
    sizes = {name: (data / name).stat().st_size for name in TRAIN}
    for budget in (0, sizes[TRAIN[3]], sum(sizes.values()) - 1, sum(sizes.values())):
        with staged(data, ("train",), dest, budget) as place:
            names = [name for name in copied(place) if name != "manifest.json"]
            assert sum(sizes[name] for name in names) <= budget
            assert contents(place) == contents(data)
            assert len(names) == {0: 0, sizes[TRAIN[3]]: 1, sum(sizes.values()) - 1: 4, sum(sizes.values()): 5}[budget]


def test_a_part_of_the_disk_stays_free(data: Path, dest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil.disk_usage(dest).free / shutil.disk_usage(dest).total
    monkeypatch.setattr(stage, "LEFT_FREE", free + 0.001)
    with staged(data, ("train",), dest) as place:
        assert copied(place) == ["manifest.json"]
        assert contents(place) == contents(data)


def test_shards_in_subfolders_and_behind_links(data: Path, dest: Path, tmp_path: Path) -> None:
    (data / "sub").mkdir()
    for path in list(data.glob("*.tar")):
        path.rename(data / "sub" / path.name)
    index(data, tmp_path / "index")
    for budget in (0, None):
        with staged(tmp_path / "index", ("train",), dest, budget) as place:
            assert contents(place) == contents(tmp_path / "index")
            assert ("sub/train-000001.tar" in copied(place)) == (budget is None)


def test_a_name_that_leads_out_of_the_folder(data: Path, dest: Path) -> None:
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"][0]["name"] = "../../evil.tar"
    (data / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"names '\.\./\.\./evil\.tar'"), staged(data, ("train",), dest):
        pass
    assert os.listdir(dest) == []


# --- faults -------------------------------------------------------------------------------------------------------------------


def test_a_shard_that_is_not_the_manifests(data: Path, dest: Path) -> None:
    content = (data / "train-000001.tar").read_bytes()
    for changed in (content[:2000] + b"?" + content[2001:], content[:-512], content + b"\0"):
        (data / "train-000001.tar").write_bytes(changed)
        with pytest.raises(ValueError, match=r"train-000001\.tar in .*data is not what the manifest says"), staged(data, ("train",), dest):
            pass
        assert os.listdir(dest) == []
    (data / "train-000001.tar").unlink()
    with pytest.raises(ValueError, match=r"train-000001\.tar is missing"), staged(data, ("train",), dest):
        pass
    with pytest.raises(ValueError, match="no split 'test'"), staged(data, ("test",), dest):
        pass
    assert os.listdir(dest) == []


def test_a_disk_that_gets_full(data: Path, dest: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    calls = []

    def full(source: Path, target: Path, entry: dict[str, Any], stopped: threading.Event) -> int:
        calls.append(target)
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stage, "_copy", full)
    with staged(data, ("train",), dest) as place:
        tried = len(calls)
        assert "got full" in caplog.text
        assert copied(place) == ["manifest.json"]
        assert contents(place) == contents(data)
        with staged(data, ("train",), dest) as again:
            assert again == place
            assert len(calls) == tried  # the others of the node do not try it once more
    assert os.listdir(dest) == []


def test_a_disk_that_is_full_to_the_last_byte(
    data: Path, dest: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise DiskFull(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(stage, "write_atomic", full)
    with staged(data, ("train",), dest) as place:
        assert place == data
        assert os.listdir(dest) == []
    assert f"the data set is read from {data}" in caplog.text


def test_other_errors_are_not_hidden(data: Path, dest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(stage, "_copy", broken)
    with pytest.raises(OSError, match="Input/output error"), staged(data, ("train",), dest):
        pass
    assert os.listdir(dest) == []


def test_a_source_that_vanishes(data: Path, dest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = stage._copy_all

    def vanishing(*arguments: Any) -> None:
        original(*arguments)
        shutil.rmtree(data)

    monkeypatch.setattr(stage, "_copy_all", vanishing)
    with pytest.raises(FileNotFoundError), staged(data, ("train",), dest):
        pass
    assert os.listdir(dest) == []


class Stop(Exception):
    pass


def stop() -> None:
    raise Stop


def test_what_waiting_raises_ends_the_copying(data: Path, dest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(source: Path, target: Path, entry: dict[str, Any], stopped: threading.Event) -> int:
        target.write_bytes(b"half")
        assert stopped.wait(20)
        return 0

    monkeypatch.setattr(stage, "_copy", endless)
    monkeypatch.setattr(stage, "BEAT_SECONDS", 0.01)
    with pytest.raises(Stop), staged(data, ("train",), dest, waiting=stop):
        pass
    assert os.listdir(dest) == []


def test_waiting_for_another_can_be_ended(data: Path, dest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "BEAT_SECONDS", 0.01)
    with staged(data, ("train",), dest) as place:
        name = place.name
    with locked(dest, name) as (place, _), pytest.raises(Stop), staged(data, ("train",), dest, waiting=stop):
        pass
    assert place.exists()


def test_of_those_that_are_stopped_none_leaves_anything_and_another_takes_over(
    data: Path, dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One copies, one waits, a third waits for longer: locks are of open files, so that threads stand for processes."""
    monkeypatch.setattr(stage, "BEAT_SECONDS", 0.01)
    copying, asked, whole = threading.Event(), threading.Event(), stage._copy

    def half(source: Path, target: Path, entry: dict[str, Any], stopped: threading.Event) -> int:
        if asked.is_set():
            return whole(source, target, entry, stopped)
        target.write_bytes(b"half")
        copying.set()
        assert stopped.wait(20)
        return 0

    def use(waiting: Callable[[], object]) -> list[tuple[str, bytes, int]]:
        with staged(data, ("train",), dest, waiting=waiting) as place:
            return contents(place)

    def beat() -> None:
        if asked.is_set():
            raise Stop

    monkeypatch.setattr(stage, "_copy", half)
    with ThreadPoolExecutor(3) as pool:
        copier = pool.submit(use, beat)
        assert copying.wait(20)
        waiter, follower = pool.submit(use, stop), pool.submit(use, lambda: None)
        assert isinstance(waiter.exception(20), Stop)
        assert not copier.done(), "the end of one that waits is not that of the copy"
        asked.set()
        assert isinstance(copier.exception(20), Stop)
        assert follower.result(20) == contents(data)
    assert os.listdir(dest) == []


def test_a_copy_that_is_stopped_reads_and_writes_no_more(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: pytest.fail("seconds for what is removed"))
    (stopped := threading.Event()).set()
    assert stage._copy(data / TRAIN[0], tmp_path / "half", {"name": TRAIN[0], "bytes": 1, "sha256": "x"}, stopped) == 0
    assert (tmp_path / "half").read_bytes() == b""


@contextmanager
def locked(dest: Path, name: str) -> Iterator[tuple[Path, int]]:
    """A folder that another process is filling."""
    place = dest / f"equihpc-{os.getuid()}" / name
    place.parent.mkdir(mode=0o700, exist_ok=True)
    place.mkdir(mode=0o700)
    handle = os.open(place, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    yield place, handle
    os.close(handle)


def test_a_folder_that_was_removed_while_its_lock_was_awaited(data: Path, dest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock that is then held is on nothing: the folder of this name is another."""
    opened = []

    def replaced(place: Path) -> int:
        handle = os.open(place, os.O_RDONLY)
        if not opened:
            shutil.rmtree(place)
            place.mkdir(mode=0o700)
        opened.append(place)
        return handle

    monkeypatch.setattr(stage, "_open", replaced)
    with staged(data, ("train",), dest) as place:
        assert len(opened) == 2
        assert sweep(dest) == []  # it is locked in truth
        assert contents(place) == contents(data)
    assert os.listdir(dest) == []


def test_a_kill_while_it_is_removed_leaves_nothing_that_looks_whole(data: Path, dest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(place: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), staged(data, ("train",), dest) as place:
        patch.setattr(shutil, "rmtree", killed)
    assert TRAIN[0] in copied(place)
    (place / TRAIN[0]).unlink()
    with staged(data, ("train",), dest) as again:
        assert again == place
        assert contents(again) == contents(data)
    assert os.listdir(dest) == []


@pytest.mark.parametrize("kind", ["mode", "link", "file", "owner"])
def test_a_folder_that_is_not_ours_alone(data: Path, dest: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = dest / f"equihpc-{os.getuid()}"
    if kind == "link":
        (dest / "elsewhere").mkdir(mode=0o700)
        base.symlink_to(dest / "elsewhere")
    elif kind == "file":
        base.touch(mode=0o600)
    else:
        base.mkdir()
        base.chmod(0o750 if kind == "mode" else 0o700)  # whatever the umask
    if kind == "owner":
        user = os.getuid()
        base.rename(dest / f"equihpc-{user + 1}")
        monkeypatch.setattr(os, "getuid", lambda: user + 1)
    before = sorted(dest.rglob("*"))
    with pytest.raises(ValueError, match=r"must be a folder of yours with mode 0700"), staged(data, ("train",), dest):
        pass
    assert sorted(dest.rglob("*")) == before


def test_a_place_without_locks(data: Path, dest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")  # NFS

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.raises(ValueError, match=r"cannot be locked .*: stage to /dev/shm"), staged(data, ("train",), dest):
        pass


def test_no_such_place(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere to stage to"), staged(data, ("train",), tmp_path / "nowhere"):
        pass


# --- several processes --------------------------------------------------------------------------------------------------------

USE = """
import logging, sys
from pathlib import Path
from equissl.data import stage
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
{before}
stage.BEAT_SECONDS = 0.02
with stage.staged(Path({data!r}), ("train",), Path({dest!r}), waiting=lambda: print("waiting", flush=True)) as place:
    print(place, flush=True)
    sys.stdin.read()
"""
HALF = """
import time
def copy(source, target, entry, stopped):
    target.write_bytes(source.read_bytes()[:1000])
    sys.stdout.write("half\\n" * (source.name == "train-000000.tar"))
    sys.stdout.flush()
    time.sleep(60)
stage._copy = copy
"""


@contextmanager
def users(data: Path, dest: Path, count: int, before: str = "") -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that use the staged data set until their standard input ends."""
    code = USE.format(data=str(data), dest=str(dest), before=before)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [subprocess.Popen([sys.executable, "-c", code], text=True, **pipes) for _ in range(count)]  # type: ignore[call-overload]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def line(process: subprocess.Popen[str]) -> str:
    """The first that says something else than that it waits."""
    assert process.stdout is not None
    return next(each.strip() for each in process.stdout if each != "waiting\n")


def test_several_processes_copy_once(data: Path, dest: Path) -> None:
    with users(data, dest, 3) as processes:
        places = {line(process) for process in processes}
        assert len(places) == 1
        assert contents(Path(places.pop())) == contents(data)
        ends = [process.communicate() for process in processes]
        assert [process.returncode for process in processes] == [0, 0, 0]
        assert sum("copying 5 files" in err for _, err in ends) == 1
    assert os.listdir(dest) == []


def test_a_copier_that_was_killed(data: Path, dest: Path) -> None:
    with users(data, dest, 1, HALF) as (copier,):
        assert line(copier).startswith("half")  # several threads may be there
        (place,) = (dest / f"equihpc-{os.getuid()}").iterdir()
        assert not (place / "manifest.json").exists()
        with users(data, dest, 1) as (waiter,):
            assert waiter.stdout is not None
            assert waiter.stdout.readline() == "waiting\n"
            copier.send_signal(signal.SIGKILL)
            assert line(waiter) == str(place)
            assert contents(place) == contents(data)
            waiter.communicate()
    assert os.listdir(dest) == []


def test_what_killed_users_leave_is_swept(data: Path, dest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with users(data, dest, 2) as (first, second):
        place = Path(line(first))
        assert line(second) == str(place)
        first.kill()
        first.wait()
        assert sweep(dest) == []
        assert contents(place) == contents(data)
        second.kill()
    assert place.exists()
    other = tmp_path / "other"
    shutil.copytree(data, other)
    with staged(other, ("train",), dest) as kept:  # the next that comes, for something else
        assert list(place.parent.iterdir()) == [kept]
    place.mkdir(parents=True, mode=0o700)
    place.parent.chmod(0o700)
    (place / "train-000000.tar").touch()
    assert main(["stage", "--sweep", str(dest)]) == 0
    assert capsys.readouterr().out.strip() == str(place)
    assert os.listdir(dest) == []
    assert main(["stage", "--sweep", str(dest), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"removed": []}


def test_a_whole_copy_that_killed_users_left_is_used(data: Path, dest: Path, caplog: pytest.LogCaptureFixture) -> None:
    with users(data, dest, 1) as (process,):
        place = Path(line(process))
    assert place.exists()
    with caplog.at_level(logging.INFO), staged(data, ("train",), dest) as again:
        assert again == place
        assert contents(again) == contents(data)
        assert "copying" not in caplog.text
    assert os.listdir(dest) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_command(data: Path, dest: Path, number: int) -> None:
    words = [sys.executable, "-m", "equissl.data", "stage", str(data), str(dest), "--budget-gb", "1", "--split", "val"]
    hear = functools.partial(signal.signal, number, signal.SIG_DFL)  # the children of a background shell ignore Ctrl-C
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, preexec_fn=hear) as process:
        try:
            place = Path(line(process))
            assert copied(place) == ["manifest.json", *VAL]
            process.send_signal(number)
            assert process.wait(20) == 0
        finally:
            process.kill()
    assert os.listdir(dest) == []


def test_bad_words(data: Path, dest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["stage"], "which data set"),
        (["stage", str(dest)], "no manifest.json"),
        (["stage", str(data), str(dest / "none")], "there is no folder"),
        (["stage", str(data), str(dest), "--budget-gb", "-1"], "must not be negative"),
        (["stage", str(data), str(dest), "--split", "test"], "no split 'test'"),
    ):
        assert main(words) == 2
        assert message in capsys.readouterr().err
    assert os.listdir(dest) == []
