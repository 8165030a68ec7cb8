"""The testbed itself, on the real thing: run with `pytest --slurm` as root."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hpc import testbed as tb

on_slurm = [pytest.mark.slurm, pytest.mark.usefixtures("testbed")]


def slurm(*command: str) -> str:
    env = {**os.environ, "SLURM_CONF": str(tb.slurm_conf())}
    return subprocess.run(command, env=env, check=True, capture_output=True, text=True, timeout=60).stdout.strip()


def wait_for(condition: Callable[[], Any], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not true within {seconds} s"
        time.sleep(0.1)


def pids() -> dict[str, int | None]:
    return {name: daemon["pid"] for name, daemon in tb.status()["daemons"].items()}


def states(*job_ids: str) -> list[str]:
    """Of every array element, in accounting, which lags behind Slurm by a second or so."""
    return slurm("sacct", "-X", "-n", "-P", "-o", "state", "-j", ",".join(job_ids)).split()


def sbatch(script: str, *options: str) -> str:
    return slurm("sbatch", "--parsable", "--output=/dev/null", *options, "--wrap", script)


@pytest.fixture
def folder() -> Iterator[Path]:
    """Like tmp_path, but short, and open to other accounts: what a state folder should be."""
    path = Path(tempfile.mkdtemp(prefix="tb-", dir="/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


class TestOnSlurm:
    pytestmark = on_slurm

    def test_up_again_changes_nothing_and_is_quick(self) -> None:
        before, written = pids(), tb.slurm_conf().stat().st_mtime_ns
        messages: list[str] = []
        start = time.monotonic()
        bed = tb.up(messages.append)
        assert time.monotonic() - start < 1
        assert messages == []
        assert pids() == before
        assert tb.slurm_conf().stat().st_mtime_ns == written
        assert bed.env() == {"SLURM_CONF": str(tb.slurm_conf())}

    def test_status_is_plain_data(self) -> None:
        status = json.loads(json.dumps(tb.status()))
        assert status["up"] is True
        assert status["slurm_conf"] == str(tb.slurm_conf())
        assert [node["name"] for node in status["nodes"]] == list(tb.NODES)
        assert {p["name"]: p["priority_tier"] for p in status["partitions"]} == {"booster": "10", "urgent": "100"}
        assert set(status["versions"]) == {"slurm", "munge", "mariadb"}
        assert all(daemon["alive"] and daemon["pid"] > 1 for daemon in status["daemons"].values())

    def test_arrays_with_aftercorr_complete_and_are_accounted(self, folder: Path) -> None:
        script = f"echo $CUDA_VISIBLE_DEVICES > {folder}/$SLURM_ARRAY_TASK_ID"
        first = sbatch(f"srun sh -c '{script}'", "--array=0-7", "--gres=gpu:2")
        check = f"srun test -s {folder}/$SLURM_ARRAY_TASK_ID"
        second = sbatch(check, "--array=0-7", f"--dependency=aftercorr:{first}")
        wait_for(lambda: states(first, second) == ["COMPLETED"] * 16)
        devices = {(folder / str(i)).read_text().strip() for i in range(8)}
        assert devices <= {"0,1", "2,3"}

    def test_urgent_job_preempts_with_term(self, folder: Path) -> None:
        script = f"trap 'touch {folder}/term' TERM; touch {folder}/started; while :; do sleep 0.1; done"
        (folder / "script").write_text(script)
        victim = sbatch(f"srun --ntasks=1 --nodes=1 sh {folder}/script", "--nodes=4", "--exclusive")
        wait_for((folder / "started").exists)
        urgent = sbatch("true", "--partition=urgent", "--nodes=1")
        wait_for((folder / "term").exists)
        assert "PreemptTime" in slurm("scontrol", "show", "job", victim)
        slurm("scontrol", "requeue", victim)
        wait_for(lambda: states(urgent) == ["COMPLETED"])
        assert "Restarts=1" in slurm("scontrol", "show", "job", victim)
        slurm("scancel", victim)
        wait_for(lambda: victim not in slurm("squeue", "-h", "-o", "%i").split())

    def test_killed_daemons_come_back_and_hold_nothing_of_the_caller(self) -> None:
        before = pids()
        # slurmctld may save: with KILL it forgets the last five seconds, and jobs that other tests cancelled come back.
        for name, kind in (("slurmctld", signal.SIGTERM), ("slurmd-jwb0002", signal.SIGKILL)):
            os.kill(before[name] or 0, kind)
        wait_for(lambda: not any(tb._process(before[name] or 0) for name in ("slurmctld", "slurmd-jwb0002")))
        # Two callers at once; both return, and their pipes close, which they do not while a daemon holds them.
        command = [sys.executable, "-c", "import hpc.testbed as tb; tb.up(print)"]
        callers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        printed = "".join(caller.communicate(timeout=60)[0] for caller in callers)
        assert [caller.returncode for caller in callers] == [0, 0]
        assert sorted(printed.splitlines()) == ["starting slurmctld", "starting slurmd-jwb0002"]
        after = pids()
        assert {name for name in after if after[name] != before[name]} == {"slurmctld", "slurmd-jwb0002"}
        assert tb.status()["up"] is True

    def test_a_slurmd_that_crashes_is_back_at_once_and_its_jobs_go_on(self, folder: Path) -> None:
        job = sbatch(f"srun sh -c 'sleep 5; touch {folder}/done'", "--nodelist=jwb0003")
        wait_for(lambda: slurm("squeue", "-h", "-o", "%T", "-j", job) == "RUNNING")
        time.sleep(1)  # the step is there
        before = pids()["slurmd-jwb0003"] or 0
        os.kill(before, signal.SIGSEGV)
        wait_for(lambda: pids()["slurmd-jwb0003"] not in (None, before))
        wait_for(lambda: states(job) == ["COMPLETED"], 40)
        assert (folder / "done").exists()

    def test_drills_are_undone(self) -> None:
        slurm("scontrol", "update", "nodename=jwb0001", "state=down", "reason=drill")
        slurm("scontrol", "update", "nodename=jwb[0002-0003]", "state=drain", "reason=drill")
        slurm("scontrol", "update", "partitionname=urgent", "state=down")
        assert tb.status()["up"] is False
        messages: list[str] = []
        tb.up(messages.append)
        assert len([message for message in messages if message.startswith("resuming jwb")]) == 3
        assert "opening partition urgent (down)" in messages
        assert tb.status()["up"] is True

    def test_secrets_and_ports_are_private(self) -> None:
        etc = tb.slurm_conf().parent
        password = (etc / "password").read_text()
        for path in etc.iterdir():
            assert path.name == "munge.key" or (password in path.read_text()) == (path.stat().st_mode & 0o077 == 0)
        assert (etc / "munge.key").stat().st_mode & 0o777 == 0o600
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        first = tb.status()["ports"]["mariadbd"]
        ours = [row[1].split(":") for row in rows if row[3] == "0A" and 0 <= int(row[1].split(":")[1], 16) - first < 7]
        assert len(ours) == 7
        assert {address for address, _ in ours} == {"0100007F"}  # 127.0.0.1

    def test_second_testbed_lives_beside_the_first_and_leaves_nothing(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first = pids()
        with monkeypatch.context() as patch:
            patch.setenv("EQUIHPC_TESTBED", str(folder / "state"))
            assert tb.up(requeue_hold_seconds=5).requeue_hold_seconds == 5
            own = pids()
            assert not set(own.values()) & set(first.values())
            # The command's own number: a job that ignores TERM must not survive either.
            sbatch(f"trap '' TERM; echo $$ > {folder}/pid; while :; do sleep 0.1; done")
            wait_for((folder / "pid").exists)
            job = int((folder / "pid").read_text())
            shutil.rmtree(folder / "state" / "run")  # lost records: the daemons are found all the same
            tb.down()
            assert tb.status()["up"] is False
            assert [path.name for path in folder.iterdir()] == ["pid"]
            assert [pid for pid in (job, *own.values()) if pid and tb._process(pid)] == []
            tb.down()  # nothing to do
        assert pids() == first
        assert tb.status()["up"] is True

    def test_foreign_folder_is_refused(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (folder / "precious").touch()
        monkeypatch.setenv("EQUIHPC_TESTBED", str(folder))
        with pytest.raises(tb.TestbedError, match="is no testbed"):
            tb.up()
        tb.down()
        assert (folder / "precious").exists()
        Path(f"{folder}.lock").unlink()


@pytest.mark.parametrize("place", ["relative", "/with space", "/a/../b", "/" + "long" * 20])
def test_state_folder_that_slurm_cannot_use_is_refused(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EQUIHPC_TESTBED", place)
    with pytest.raises(tb.TestbedError, match="EQUIHPC_TESTBED"):
        tb.slurm_conf()


def test_status_of_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tb, "_state_dir", lambda: tmp_path / "none")
    status = json.loads(json.dumps(tb.status()))
    assert status["up"] is False
    assert not any(daemon["alive"] for daemon in status["daemons"].values())


def test_a_recycled_process_number_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    record = tmp_path / "run" / "slurmctld.pid"
    line = Path("/proc/self/stat").read_text()
    record.write_text(f"{tb._boot_id()} {line}")
    assert tb._pid(tmp_path, "slurmctld") == os.getpid()
    head, _, tail = line.rpartition(")")
    fields = tail.split()
    fields[19] = str(int(fields[19]) - 1)  # the same number, born a moment before
    record.write_text(f"{tb._boot_id()} {head}) {' '.join(fields)}\n")
    assert tb._pid(tmp_path, "slurmctld") is None
    record.write_text(f"another-boot {line}")
    assert tb._pid(tmp_path, "slurmctld") is None


def test_process_names_may_contain_anything() -> None:
    line = "7 (a) b (c) S 3 7 7 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 4711 0 0"
    assert tb._parse_stat(line) == tb._Process(pid=7, parent=3, start_ticks="4711", state="S")
    assert tb._parse_stat(line.replace(" S ", " Z ")) is None


@pytest.mark.parametrize(
    ("version", "plugin"),
    [("22.05.8", "cgroup/v1"), ("23.11.4", "cgroup/v1"), ("24.05.2", "disabled"), ("25.11.0", "disabled")],
)
def test_cgroup_plugin(version: str, plugin: str) -> None:
    assert tb._cgroup_plugin(version) == plugin
