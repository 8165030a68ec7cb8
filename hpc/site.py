"""What a Slurm cluster says of itself, and where caches lie: what `doctor` compares profiles with and `init` writes them from."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from hpc import slurm

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Partition:
    name: str
    is_default: bool
    state: str
    max_hours: float | None  # None: no limit
    max_nodes: int
    num_nodes: int
    gives_whole_nodes: bool
    preempt_mode: str
    grace_seconds: int
    qos: str  # its own, whose limits hold for every job; empty: none


class NodeType(NamedTuple):
    """What nodes of one kind offer to jobs. `cores` are physical, `cpus` what Slurm counts."""

    cpus: int
    cores: int
    gpus: int
    gpu_type: str  # as Gres names it, with the node's features behind it
    memory_gib: int


@dataclass(frozen=True, slots=True)
class Site:
    config: dict[str, str]  # `scontrol show config`
    partitions: dict[str, Partition]
    nodes: dict[str, list[tuple[NodeType, int]]]  # partition -> kinds and their numbers, the most frequent first
    addresses: dict[str, dict[str, str]]  # partition -> node -> address

    @property
    def version(self) -> str:
        return self.config.get("SLURM_VERSION", "")


def read(slurm_conf: str | None) -> Site:
    """Three questions to slurmctld. Raises SlurmError."""
    config, partitions, nodes = (
        slurm.call(["scontrol", "--oneliner", "show", what], slurm_conf, timeout=120) for what in ("config", "partition", "node")
    )
    return parse(config, partitions, nodes)


def parse(config: str, partitions: str, nodes: str) -> Site:
    """From the texts that `scontrol --oneliner show …` prints."""
    settings = {match[1]: match[2] for line in config.splitlines() if (match := re.match(r"(\S+)\s*= ?(.*?)\s*$", line))}
    found = {facts["PartitionName"]: _partition(facts) for facts in _records(partitions)}
    kinds: dict[str, Counter[NodeType]] = {name: Counter() for name in found}
    addresses: dict[str, dict[str, str]] = {name: {} for name in found}
    for facts in _records(nodes):
        kind = _node_type(facts)
        for name in facts.get("Partitions", "").split(","):
            if name in kinds:
                kinds[name][kind] += 1
                addresses[name][facts["NodeName"]] = facts.get("NodeAddr", "")
    return Site(settings, found, {name: counts.most_common() for name, counts in kinds.items()}, addresses)


def _records(text: str) -> Iterator[dict[str, str]]:
    for line in text.splitlines():
        facts: dict[str, str] = {}
        for key, value in re.findall(r"(\w[\w:/]*)=(\S*)", line):
            facts.setdefault(key, value)  # people's remarks come last and may look like facts
        if facts:
            yield facts


def _partition(facts: Mapping[str, str]) -> Partition:
    num_nodes = int(facts.get("TotalNodes", "0"))
    limit = facts.get("MaxNodes", "UNLIMITED")
    return Partition(
        name=facts["PartitionName"],
        is_default=facts.get("Default") == "YES",
        state=facts.get("State", ""),
        max_hours=hours(facts.get("MaxTime", "UNLIMITED")),
        max_nodes=min(int(limit), num_nodes) if limit.isdigit() else num_nodes,
        num_nodes=num_nodes,
        gives_whole_nodes=facts.get("OverSubscribe") == "EXCLUSIVE",
        preempt_mode=facts.get("PreemptMode", "OFF"),
        grace_seconds=int(facts.get("GraceTime", "0")),
        qos=facts.get("QoS", "N/A").replace("N/A", ""),
    )


def _node_type(facts: Mapping[str, str]) -> NodeType:
    """Cores that the system keeps for itself (core specialisation) do not count."""
    threads = int(facts.get("ThreadsPerCore", "1"))
    total = int(facts.get("CPUTot", "1"))
    cpus = int(facts.get("CPUEfctv", total - threads * int(facts.get("CoreSpecCount", "0"))))
    gpus, kind = gres_gpus(facts.get("Gres", ""))
    features = facts.get("ActiveFeatures", facts.get("Features", "")).replace("(null)", "")
    return NodeType(cpus, cpus // threads, gpus, f"{kind} {features}".strip() if gpus else "", int(facts.get("RealMemory", "0")) // 1024)


def gres_gpus(gres: str) -> tuple[int, str]:
    """Number and type of GPUs in `gpu:a100:4(S:0-1),nvme:1`; (0, "") where there are none."""
    found = re.findall(r"(?:^|,)gpu(?::([^:,()]+))??:(\d+)", gres)
    return sum(int(count) for _, count in found), next((kind for kind, _ in found if kind), "")


def hours(text: str) -> float | None:
    """Of Slurm's `days-hours:minutes:seconds`, `minutes:seconds` or `minutes`; None for no limit."""
    if not text[:1].isdigit():
        return None
    days, dash, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        parts += [0] * (3 - len(parts))
    elif len(parts) == 1:
        parts = [0, *parts, 0]
    elif len(parts) == 2:
        parts = [0, *parts]
    return int(days or 0) * 24 + parts[0] + parts[1] / 60 + parts[2] / 3600


# --- caches --------------------------------------------------------------------------------------------------------------

SMALL_HOME_GIB = 50
CACHES = {  # variable -> folder below the home that is used without it
    "XDG_CACHE_HOME": ".cache",
    "UV_CACHE_DIR": ".cache/uv",
    "HF_HOME": ".cache/huggingface",
    "TRITON_CACHE_DIR": ".triton/cache",
    "TORCHINDUCTOR_CACHE_DIR": "",  # the node's /tmp: lost after each job, but not in the home
    "MPLCONFIGDIR": ".config/matplotlib",
}


def nearest(path: Path) -> Path:
    """The path itself or the closest folder above it that exists."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def device(path: Path) -> int:
    """The file system's number."""
    return nearest(path.absolute()).stat().st_dev


def small_home(home: Path, runs_dir: Path) -> str:
    """Why caches should not lie in this home; empty where nothing speaks against it."""
    place = os.statvfs(home)
    size_gib = place.f_blocks * place.f_frsize / GIB
    if size_gib < SMALL_HOME_GIB:
        return f"{home} has {size_gib:.0f} GiB in all"
    if device(home) != device(runs_dir):
        return f"{home} is another file system than the runs' (homes of clusters are small and slow)"
    return ""


def cache_folders(folder: Path) -> dict[str, str]:
    """Every cache's variable with its own folder below `folder`."""
    names = {name: name.lower().removesuffix("_dir").removesuffix("_home").removesuffix("_cache") for name in CACHES}
    return {name: str(folder / short) for name, short in names.items()}
