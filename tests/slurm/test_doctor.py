"""`doctor` and `init` on a real Slurm."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from hpc import cluster as clusters
from hpc import doctor, doctor_job, nodes
from tests.slurm.harness import slurm

pytestmark = pytest.mark.slurm
ROOT = Path(__file__).parent.parent.parent
Run = Callable[..., subprocess.CompletedProcess[str]]


def profile(folder: Path, name: str, more: str = "", **changes: str) -> str:
    """The testbed's profile under another name, with other values of its top-level keys and further lines."""
    (folder / "slurm").mkdir(exist_ok=True)
    kept, is_kept = [], True
    for line in (ROOT / "slurm" / "testbed.yaml").read_text().splitlines():
        is_kept = is_kept if line.startswith(" ") else line.partition(":")[0] not in changes
        kept += [line] * is_kept
    written = [*kept, *(f"{key}: {value}" for key, value in changes.items()), more, ""]
    (folder / "slurm" / f"{name}.yaml").write_text("\n".join(written))
    return name


def findings(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, str]]:
    assert done.stdout, done.stderr
    return {finding["check"]: finding for finding in json.loads(done.stdout)["findings"]}


def test_a_drawn_up_profile_passes(testbed: Any, tmp_path: Path, equihpc: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    done = equihpc("init", "mine", "--cache-dir", "caches of mine", env=testbed.env())
    assert done.returncode == 0, done.stderr
    assert f"export HF_HOME='{tmp_path}/caches of mine/hf'" in done.stdout
    monkeypatch.chdir(tmp_path)
    cluster, missing = clusters.load("mine")
    assert not missing
    assert (cluster.processes_per_node, cluster.cores_per_node, cluster.max_array_size) == (4, 8, 10001)
    assert (cluster.partition, set(cluster.partitions), cluster.whole_nodes) == ("booster", {"booster", "urgent"}, False)
    assert cluster.rendezvous.address == "127.0.0.1"
    assert cluster.slurm_conf == str(testbed.slurm_conf)
    checked = equihpc("doctor", "--cluster", "mine", "--json")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    found = findings(checked)
    assert "failed" not in {finding["state"] for finding in found.values()}
    assert "2 nodes for 24 hours accepted" in found["sbatch"]["found"]
    assert "PreemptMode REQUEUE, GraceTime 10 s" in found["preemption"]["found"]
    text = (tmp_path / "slurm" / "mine.yaml").read_text()
    again = equihpc("init", "mine", env=testbed.env())
    assert (again.returncode, "--force" in again.stderr) == (2, True)
    assert (tmp_path / "slurm" / "mine.yaml").read_text() == text
    assert equihpc("init", "mine", "--force", env=testbed.env()).returncode == 0
    assert "partition booster" in equihpc("doctor", "--cluster", "mine").stdout, "a table for people"


def test_every_wrong_fact_of_a_profile_is_named(testbed: Any, tmp_path: Path, equihpc: Run) -> None:
    limits = "{booster: {max_hours: 48, max_nodes: 4}, huge: {max_hours: 1, max_nodes: 1}}"
    wrong = profile(
        tmp_path,
        "wrong",
        "datasets: {here: ./nowhere}\nquota_command: echo gone >&2; exit 3\nrequeue: self",
        cores_per_node="64",
        max_array_size="20000",
        partitions=limits,
        account='"${env:EQUIHPC_TEST_UNSET}"',
    )
    for attempt in (1, 2):
        nodes.note(tmp_path / "runs" / ".ledger", wrong, "jwb0003", "some-run", attempt, "no GPU")
    done = equihpc("doctor", "--cluster", wrong, "--json")
    assert done.returncode == 1
    found = findings(done)
    assert "jwb0003: 2 failures in 24 h, the last one: no GPU" in found["avoided nodes"]["found"]
    assert "max_hours 48 is more than 24" in found["partition booster"]["found"]
    assert "no such partition" in found["partition huge"]["found"]
    assert "cores_per_node is 64" in found["nodes"]["found"]
    assert found["arrays"]["advice"] == "max_array_size: 10001"
    assert found["variables"]["advice"] == "export EQUIHPC_TEST_UNSET=…"
    assert found["sbatch"]["state"] == "warning", "not asked with an account that is none"
    assert "exit code 3: gone" in found["quota"]["found"]
    assert found["data set here"]["state"] == "warning"
    done = equihpc("doctor", "--cluster", wrong, "--json", env={"EQUIHPC_TEST_UNSET": "mine"})
    assert findings(done)["sbatch"]["state"] == "failed", "Slurm refuses 64 cores of a node"
    slurm(testbed, "sacctmgr", "-i", "add", "qos", "equihpc-test", "MaxWall=1:30:00", "MaxSubmitJobsPerUser=7")
    try:
        short = profile(tmp_path, "short", qos="equihpc-test")
        found = findings(equihpc("doctor", "--cluster", short, "--json"))
    finally:
        slurm(testbed, "sacctmgr", "-i", "delete", "qos", "equihpc-test")
    assert "at most 7 submitted jobs; at most 1.5 hours; the profile says 24" in found["limits"]["found"]
    away = profile(tmp_path, "away", slurm_conf="/nowhere/slurm.conf")
    done = equihpc("doctor", "--cluster", away, "--json")
    found = findings(done)
    assert (done.returncode, found["slurm answers"]["state"]) == (1, "failed")
    assert "file system of runs" in found, "what needs no Slurm is checked all the same"
    assert "arrays" not in found


def test_a_job_looks_around_on_the_nodes(testbed: Any, tmp_path: Path, equihpc: Run) -> None:
    """At once: on a profile that is right, on one with three faults, on one whose batch script fails."""
    right = profile(tmp_path, "right", "min_all_reduce_gb_s: 0.001")
    interfaces = "{GLOO_SOCKET_IFNAME: lo, NCCL_SOCKET_IFNAME: ib0}"
    wrong = profile(tmp_path, "wrong", min_all_reduce_gb_s="1000000", requeue="none", environment=interfaces)
    broken = profile(tmp_path, "broken", setup='["echo no module PyTorch/9 >&2; false"]')
    options = ("--node", "--yes", "--json")
    with ThreadPoolExecutor() as pool:
        runs = [
            pool.submit(equihpc, "doctor", "--cluster", name, "--runs", f"runs-{name}", *options, timeout=280)
            for name in (broken, right, wrong)
        ]
        stopped, good, bad = (run.result() for run in runs)
    assert stopped.returncode == 1
    assert "no module PyTorch/9" in findings(stopped)["job"]["found"]
    assert good.returncode == 0, good.stdout + good.stderr
    assert "submitted a job of 2 nodes" in good.stderr
    assert "running" in good.stderr, "says what it waits for"
    found = findings(good)
    assert "3 ranks connected" in found["connection"]["found"]
    assert "GB/s in a node" in found["all-reduce"]["found"]
    assert "GB/s over all ranks (gloo" in found["all-reduce"]["found"]
    assert "came 2" in found["time limit"]["found"], "seconds before the limit of five minutes"
    assert "SLURM_RESTART_COUNT 1" in found["requeue"]["found"]
    assert {found[check]["state"] for check in ("job", "torch", "interfaces", "Python on the nodes")} == {"ok"}
    assert bad.returncode == 1
    found = findings(bad)
    assert "NCCL_SOCKET_IFNAME=ib0 not among" in found["interfaces"]["found"]
    assert "min_all_reduce_gb_s is 1e+06" in found["all-reduce"]["advice"]
    assert "not tried" in found["requeue"]["found"]
    assert found["time limit"]["state"] == found["job"]["state"] == "ok"
    deadline = time.monotonic() + 30
    while "doctor.probe" in (queue := slurm(testbed, "squeue", "--noheader", "--format=%j %T")):
        assert time.monotonic() < deadline, f"nothing shall be left in the queue: {queue}"
        time.sleep(0.5)
    assert not list((tmp_path / "runs-right").glob("*/.equihpc")), "status does not show the probe as a job"


def test_a_job_that_does_not_start_is_given_up_and_cancelled(testbed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor_job, "WAIT_SECONDS", 2.0)
    cluster, missing = clusters.load(profile(tmp_path, "later", sbatch="{begin: now+1hour}"))
    subject = doctor.Subject("later", cluster, missing, tmp_path / "runs")
    said: list[str] = []
    (finding, *_) = doctor_job.check_nodes(doctor_job.probe_job(subject), said.append)
    assert finding.state == "failed"
    assert "never started; timeout: still pending after" in finding.found
    job = re.search(r"Slurm job (\d+)", said[0])
    assert job
    assert slurm(testbed, "squeue", "--noheader", "--states=all", f"--jobs={job[1]}", "--format=%T").strip() == "CANCELLED"
