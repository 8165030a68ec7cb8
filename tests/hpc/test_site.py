"""Profiles, and what `doctor` and `init` read from the words of other sites' Slurm. The rest is in tests/slurm/test_doctor.py."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc import cluster as clusters
from hpc import doctor, doctor_job, init, plan, probe, site, spec, submit, yamlfile
from hpc.cluster import Cluster
from hpc.errors import UserError

ROOT = Path(__file__).parent.parent.parent
PROFILES = sorted(path.stem for path in (ROOT / "slurm").glob("*.yaml"))
Run = Callable[..., subprocess.CompletedProcess[str]]


# --- profiles ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_plans_the_sweep_within_its_limits(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("EQUIHPC_ACCOUNT", "project")
    monkeypatch.setenv("EQUIHPC_DATA", "/data")
    cluster, missing = clusters.load(name)
    assert not missing
    sets = ["pretrain.resources.nodes=1"] if cluster.scheduler == "local" else []
    limits = cluster.partitions.get(cluster.partition or "")
    if limits and limits.max_hours < 24:
        sets.append(f"pretrain.resources.hours={limits.max_hours:g}")
    expanded = plan.expand(spec.load(Path("jobs/sweep_lambda_d.yaml"), sets), cluster)
    arrays = plan.arrays(expanded.runs, cluster)
    assert sum(len(array.runs) for array in arrays) == len(expanded.runs) == 209
    for array in arrays if cluster.scheduler == "slurm" else []:
        text = submit.sbatch_text(array, expanded, tmp_path / "runs")
        options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, re.MULTILINE))
        assert int(options["nodes"]) <= (limits.max_nodes if limits else 10**6)
        assert int(options["time"]) <= (limits.max_hours * 60 if limits else 10**6)
        assert int(options["cpus-per-task"]) <= cluster.cores_per_node
        assert len(array.elements) <= cluster.max_array_size
        gpus = {"gres": options.get("gres", ""), "gpus-per-node": options.get("gpus-per-node", "")}.get(cluster.gpu_request, "")
        if cluster.gpu_request != "none":
            assert 0 < int(gpus.removeprefix("gpu:")) <= cluster.processes_per_node
        for option, value in cluster.sbatch.items():
            assert options[option] == value


@pytest.mark.parametrize("name", PROFILES)
def test_what_a_profile_calls_unconfirmed_is_a_field_of_it(name: str) -> None:
    raw = yamlfile.load(ROOT / "slurm" / f"{name}.yaml").data
    complete = Cluster.model_validate({"cores_per_node": 1, "processes_per_node": 1, **raw})
    assert_fields(complete, complete.unconfirmed)


def assert_fields(cluster: Cluster, names: list[str]) -> None:
    assert len(set(names)) == len(names)
    for name in names:
        value: Any = cluster.model_dump()
        for part in name.split("."):
            assert part in value, name
            value = value[part]


# --- what other sites say ------------------------------------------------------------------------------------------------

CONFIG = """Configuration data as of 2026-05-04T10:00:00
ClusterName             = {cluster}
JobRequeue              = 1
KillWait                = 30 sec
MaxArraySize            = {array}
SLURM_VERSION           = 23.02.7
"""
PARTITION = (
    "PartitionName={name} AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL AllocNodes=ALL Default={default} QoS=N/A DefaultTime=01:00:00"
    " DisableRootJobs=NO ExclusiveUser=NO GraceTime=0 Hidden=NO MaxNodes={nodes} MaxTime={time} MinNodes=0 LLN=NO MaxCPUsPerNode=UNLIMITED"
    " Nodes=n[0001-0936] PriorityJobFactor=1 PriorityTier=1 RootOnly=NO ReqResv=NO OverSubscribe={share} OverTimeLimit=NONE"
    " PreemptMode=OFF State=UP TotalCPUs=89856 TotalNodes={total} SelectTypeParameters=NONE JobDefaults=(null)"
    " DefMemPerNode=UNLIMITED MaxMemPerNode=UNLIMITED TRES=cpu=89856,mem=471744000M,node=936,billing=89856,gres/gpu=3744\n"
)
NODE = (
    "NodeName={name} Arch=x86_64 CoresPerSocket={cores} CPUAlloc=0 {cpus} CPULoad=0.04 AvailableFeatures={features}"
    " ActiveFeatures={features} Gres={gres} NodeAddr={name} NodeHostName={name} Version=23.02.7 OS=Linux 5.14.0-427.el9 #1 SMP"
    " PREEMPT_DYNAMIC Thu May 4 RealMemory={memory} AllocMem=0 FreeMem=401230 Sockets={sockets} Boards=1 {special}State=IDLE"
    " ThreadsPerCore=2 TmpDisk=0 Weight=1 Owner=N/A MCS_label=N/A Partitions={partitions} BootTime=2026-04-01T08:00:00"
    " CfgTRES=cpu=96,mem=503G,billing=96,gres/gpu=4 AllocTRES= CapWatts=n/a Reason=kernel Gres=gpu:9 update [root@2026-04-29T03:06:18]\n"
)


def whole_nodes_without_gpu_type() -> site.Site:
    """Like JUWELS Booster: whole nodes, a small partition for development, no type in Gres."""
    partitions = [("cluster", "YES", "UNLIMITED", "1-00:00:00", 100), ("booster", "NO", "384", "1-00:00:00", 936)]
    partitions += [("develbooster", "NO", "4", "02:00:00", 10)]
    text = "".join(
        PARTITION.format(name=name, default=default, nodes=nodes, time=time, total=total, share="EXCLUSIVE")
        for name, default, nodes, time, total in partitions
    )
    values = {"cores": 24, "sockets": 2, "memory": 514000, "cpus": "CPUTot=96", "features": "(null)", "special": ""}
    nodes = NODE.format(name="jwc1", partitions="cluster", gres="mem96:1", **values)
    nodes += NODE.format(name="jwb1", partitions="booster,develbooster", gres="mem512:1,gpu:4(S:1,3)", **values)
    return site.parse(CONFIG.format(cluster="JUWELS", array=1001), text, nodes)


def shared_nodes_with_reserved_cores() -> site.Site:
    """Like LUMI-G: cores kept by the system, types in Gres, several kinds of nodes."""
    text = PARTITION.format(name="small-g", default="YES", nodes="4", time="3-00:00:00", total=198, share="NO")
    text += PARTITION.format(name="endless", default="NO", nodes="UNLIMITED", time="UNLIMITED", total=7, share="NO")
    values = {"cores": 64, "sockets": 1, "memory": 491520, "features": "AMD_EPYC_7A53,x1203", "partitions": "small-g,endless"}
    nodes = NODE.format(name="n1", gres="gpu:mi250:8(S:0-3)", cpus="CPUTot=128", special="CoreSpecCount=8 CPUSpecList=0 ", **values)
    nodes += NODE.format(name="n2", gres="gpu:mi250:8,nvme:1", cpus="CPUEfctv=112 CPUTot=128", special="CoreSpecCount=8 ", **values)
    nodes += NODE.format(name="n3", gres="gpu:mi250:4", cpus="CPUEfctv=112 CPUTot=128", special="", **values)
    return site.parse(CONFIG.format(cluster="lumi g", array=100), text, nodes)


def test_a_profile_is_drawn_up_from_whole_nodes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(init, "resolves", lambda host: True)
    text = init.draft("juwels", whole_nodes_without_gpu_type(), None, "training", {}, "").text()
    cluster = load(tmp_path, monkeypatch, text)
    assert cluster.partition == "booster", "the largest with GPUs, although another is the default"
    assert set(cluster.partitions) == {"booster", "develbooster"}, "partitions without GPUs are of no use here"
    assert cluster.partitions["booster"].max_nodes == 384
    assert (cluster.development, cluster.partitions["develbooster"].max_hours) == ("develbooster", 2)
    assert (cluster.whole_nodes, cluster.gpu_request, cluster.account) == (True, "gres", "training")
    assert (cluster.processes_per_node, cluster.cores_per_node, cluster.max_array_size) == (4, 48, 1001)
    assert cluster.gpu is not None
    assert cluster.gpu.tflops is None, "Slurm does not say which GPU it is"
    assert {"gpu.name", "whole_nodes", "development", "requeue"} <= set(cluster.unconfirmed)


def test_a_profile_is_drawn_up_from_shared_nodes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(init, "resolves", lambda host: False)
    caches = site.cache_folders(Path("/scratch/it's mine: #1"))
    text = init.draft("lumi", shared_nodes_with_reserved_cores(), "/etc/slurm.conf", None, caches, "small\nhome").text()
    cluster = load(tmp_path, monkeypatch, text)
    assert cluster.gpu is not None
    assert (cluster.gpu.name, cluster.gpu.tflops, cluster.gpu.memory_gib) == ("MI250X-GCD", 191.5, 64)
    assert (cluster.processes_per_node, cluster.cores_per_node, cluster.whole_nodes) == (8, 56, False)
    assert cluster.partitions["endless"].max_nodes == 7
    assert "partitions.endless.max_hours" in cluster.unconfirmed, "Slurm gives no limit"
    assert cluster.environment == caches
    assert cluster.slurm_conf == "/etc/slurm.conf"
    assert cluster.rendezvous.address is None, "every node has an address of its own"


def load(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> Cluster:
    (folder / "slurm").mkdir()
    (folder / "slurm" / "drafted.yaml").write_text(text)
    monkeypatch.chdir(folder)
    cluster, _ = clusters.load("drafted")
    assert_fields(cluster, cluster.unconfirmed)
    return cluster


SCALARS = st.none() | st.booleans() | st.integers() | st.text()
NAMES = st.text(max_size=90)  # YAML wants keys of at most 1024 characters, and escapes count


@given(st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(NAMES, inner)))
def test_written_values_are_read_as_they_were(value: Any) -> None:
    assert yamlfile.parse(f"key: {init.flow(value)}", "profile.yaml").data == {"key": value}


@pytest.mark.parametrize(
    ("gres", "expected"),
    [
        ("gpu:4", (4, "")),
        ("gpu:a100:4(S:0-3),lscratch:3200", (4, "a100")),
        ("cpu:amd:1,gpu:nvidia_a100-sxm4-40gb:4(S:0-1)", (4, "nvidia_a100-sxm4-40gb")),
        ("gpu:h100:2,gpu:a100:2", (4, "h100")),
        ("gpu:a100:3,shard:9,mps:100", (3, "a100")),
        ("(null)", (0, "")),
    ],
)
def test_gpus_of_a_gres_line(gres: str, expected: tuple[int, str]) -> None:
    assert site.gres_gpus(gres) == expected


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("nvidia_gh200_120gb", "GH200"),
        ("gb200", "GB200"),
        ("nvidia_h200", "H200"),
        ("location=local,H100,GPU", "H100"),
        ("a100 hbm80g", "A100-80GB"),
        ("nvidia_a100-sxm4-40gb", "A100-40GB"),
        ("a40", "A40"),
        ("rtx_a4000", None),
        ("nvidia_l40s", "L40S"),
        ("tesla_v100-sxm2-32gb", "V100"),
        ("", None),
    ],
)
def test_known_gpus(text: str, name: str | None) -> None:
    found = init.known_gpu(text)
    assert (found[0] if found else None) == name


def test_hours_of_slurm() -> None:
    found = {
        text: site.hours(text) for text in ("1-00:00:00", "2-12", "1-06:30", "12:00:00", "30:00", "90", "UNLIMITED", "INFINITE", "N/A")
    }
    assert list(found.values()) == [24, 60, 30.5, 12, 0.5, 1.5, None, None, None]


def subject(tmp_path: Path, found: site.Site, **changes: Any) -> doctor.Subject:
    fields: dict[str, Any] = {"scheduler": "slurm", "processes_per_node": 4, "cores_per_node": 48, "partition": "booster", **changes}
    result = doctor.Subject("here", Cluster.model_validate(fields), [], tmp_path / "runs")
    result.__dict__["site"] = found  # as if Slurm had been asked
    return result


def test_doctor_compares_a_profile_with_another_sites_words(tmp_path: Path) -> None:
    found = whole_nodes_without_gpu_type()
    gpu = {"name": "A100", "tflops": 312, "memory_gib": 40}
    limits = {"booster": {"max_hours": 24, "max_nodes": 936}, "devlbooster": {"max_hours": 2, "max_nodes": 4}}
    wrong = subject(tmp_path, found, gpu=gpu, processes_per_node=8, partitions=limits, max_array_size=5000)
    findings = {finding.check: finding for one in (doctor.partitions, doctor.nodes, doctor.arrays) for finding in one(wrong)}
    assert "max_nodes 936 is more than 384" in findings["partition booster"].found
    assert "did you mean 'develbooster'?" in findings["partition devlbooster"].found
    assert "the profile says 8" in findings["nodes"].found
    assert "max_array_size: 1001" in findings["arrays"].advice
    assert {finding.state for finding in findings.values()} == {"failed"}
    right = subject(tmp_path, found, gpu=gpu, partitions={"booster": {"max_hours": 24, "max_nodes": 384}}, max_array_size=1001)
    for one in (doctor.partitions, doctor.nodes, doctor.arrays, doctor.preemption):
        assert [finding.state for finding in one(right)] == ["ok"]


# --- places --------------------------------------------------------------------------------------------------------------


def test_doctor_reads_data_sets(tmp_path: Path) -> None:
    def state() -> str:
        return doctor.data_set("x", tmp_path).state

    assert state() == "warning", "not there: other runs may go on"
    (tmp_path / "train-000000.tar").write_bytes(b"12345")
    (tmp_path / "train.index.npy").write_bytes(b"123")
    shards = [{"name": "train-000000.tar", "bytes": 5}]
    split = {"num_images": 2, "index": {"name": "train.index.npy", "bytes": 3}, "shards": shards}
    (tmp_path / "manifest.json").write_text(json.dumps({"splits": {"train": split}}))
    assert doctor.data_set("x", tmp_path) == ("x", "ok", f"{tmp_path}: 2 images in 2 files", "")
    (tmp_path / "train-000000.tar").write_bytes(b"1234")
    assert "has 4 bytes instead of 5" in doctor.data_set("x", tmp_path).found
    (tmp_path / "train-000000.tar").unlink()
    assert state() == "failed"
    (tmp_path / "manifest.json").write_text(json.dumps({"splits": {"train": []}}))
    here = subject(tmp_path, whole_nodes_without_gpu_type(), scheduler="local", partition=None, datasets={"x": str(tmp_path)})
    (finding,) = [one for one in doctor.check(here) if one.check == "data sets"]
    assert (finding.state, "not understood" in finding.found) == ("failed", True), "a finding, no traceback"


def test_caches_in_a_small_home_get_lines_to_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in site.CACHES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    (tmp_path / "home").mkdir()
    monkeypatch.setattr(site, "SMALL_HOME_GIB", 10**9)
    here = subject(tmp_path, whole_nodes_without_gpu_type(), environment={"HF_HOME": "/scratch/hf"})
    (finding,) = doctor.caches(here)
    assert finding.state == "warning"
    assert f"export TRITON_CACHE_DIR={tmp_path}/runs/.caches/triton" in finding.advice
    assert "HF_HOME" not in finding.found, "the profile places it"
    monkeypatch.setattr(site, "SMALL_HOME_GIB", 0)
    assert [one.state for one in doctor.caches(here)] == ["ok"], "a large home on the runs' file system"


def test_a_folder_that_cannot_be_written_is_a_failure(tmp_path: Path) -> None:
    findings = list(doctor.places(subject(tmp_path, whole_nodes_without_gpu_type())))
    assert [finding.check for finding in findings] == ["space of runs", "file system of runs"]
    assert findings[1].state == "ok"
    proc = doctor.Subject("here", Cluster(scheduler="slurm", processes_per_node=1, cores_per_node=1), [], Path("/proc/nowhere"))
    assert [finding.state for finding in doctor.places(proc)][1] == "failed"


@pytest.mark.parametrize(
    ("wanted", "missing"),
    [("ib0", ["ib0"]), ("lo", []), ("eth", []), ("=eth", ["eth"]), ("=eth0,lo", []), ("^docker", []), ("", []), ("lo,hsn1", ["hsn1"])],
)
def test_interfaces_in_nccls_notation(wanted: str, missing: list[str]) -> None:
    assert probe.missing_interfaces(wanted, ["lo", "eth0"]) == missing


# --- commands without Slurm ----------------------------------------------------------------------------------------------


def test_init_without_slurm_points_at_the_local_profile(tmp_path: Path, equihpc: Run) -> None:
    done = equihpc("init", "mine", env={"PATH": "/nowhere"})
    assert done.returncode == 2
    assert "--cluster local" in done.stderr
    assert not (tmp_path / "slurm").exists()


def test_doctor_runs_torch_on_this_machine(tmp_path: Path, equihpc: Run) -> None:
    """The job of --node on the local runner: two ranks meet, sum and multiply."""
    refused = equihpc("doctor", "--cluster", "local", "--node", env={"PATH": "/nowhere"})
    assert refused.returncode == 1, "it asks first"
    assert not (tmp_path / "runs").exists()
    done = equihpc("doctor", "--cluster", "local", "--node", "--yes", "--json", env={"PATH": "/nowhere"})
    assert done.returncode == 0, done.stdout + done.stderr
    findings = {finding["check"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert "1 ranks connected" in findings["connection"]["found"]
    assert "GB/s over all ranks (gloo" in findings["all-reduce"]["found"]
    assert findings["torch"]["state"] == findings["job"]["state"] == "ok"


def test_the_signal_of_the_time_limit_does_not_end_the_selftest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch takes longer to import than Slurm waits with it."""
    slow = tmp_path / "python"
    slow.write_text('#!/bin/sh\nkill -USR2 $$\necho \'{"torch": "2.9"}\'\n')
    slow.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(slow))
    assert probe.selftest(False, 20, lambda: False) == {"torch": "2.9"}


def test_a_probe_that_the_profile_forbids_is_refused(tmp_path: Path) -> None:
    limits = {"booster": {"max_hours": 24, "max_nodes": 8}, "tiny": {"max_hours": 0.05, "max_nodes": 1}}
    here = subject(tmp_path, whole_nodes_without_gpu_type(), partitions=limits)
    assert doctor_job.probe_job(here).plan.runs[0].layout.nodes == 2
    with pytest.raises(UserError, match="partition tiny allows"):
        doctor_job.probe_job(here, partition="tiny")
