"""The first profile of a cluster, from what Slurm says of itself. Every guess is named in `unconfirmed`."""

from __future__ import annotations

import getpass
import json
import os
import re
import shlex
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpc import cluster as clusters
from hpc import site, slurm
from hpc.errors import UserError
from hpc.files import write_atomic
from hpc.site import NodeType, Partition, Site
from hpc.spec import NAME

GPUS = (  # in a type's or a feature's name -> name, dense bf16 peak in TFLOP/s, memory in GiB; the first match counts
    ("gh200", "GH200", 989.0, 96.0),
    ("gb200", "GB200", 2500.0, 186.0),
    ("b200", "B200", 2250.0, 180.0),
    ("h200", "H200", 989.0, 141.0),
    ("h100", "H100", 989.0, 80.0),
    ("a100.*80g", "A100-80GB", 312.0, 80.0),
    ("a100", "A100-40GB", 312.0, 40.0),
    (r"a40(?!\d)", "A40", 149.7, 48.0),
    (r"a30(?!\d)", "A30", 165.0, 24.0),
    ("l40s", "L40S", 362.0, 48.0),
    (r"l40(?!\d)", "L40", 181.0, 48.0),
    ("v100", "V100", 15.7, 32.0),  # no bf16 units: float32's peak
    ("mi300a", "MI300A", 981.0, 128.0),
    ("mi300", "MI300X", 1307.0, 192.0),
    ("mi250", "MI250X-GCD", 191.5, 64.0),
)
UNKNOWN_GPU_MEMORY_GIB = 16.0
DEVELOPMENT = re.compile(r"dev|debug|test|interactive")


def flow(value: Any) -> str:
    """A value as YAML on one line; words stay plain, everything else in a text is escaped."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{flow(name)}: {flow(inner)}" for name, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(flow, value)) + "]"
    if isinstance(value, str):
        is_word = re.fullmatch(r"[A-Za-z/][A-Za-z0-9_./-]*", value) and value.lower() not in ("true", "false", "null")
        return value if is_word else '"' + "".join(c if " " <= c <= "~" and c not in '"\\' else f"\\U{ord(c):08x}" for c in value) + '"'
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return json.dumps(value)


@dataclass
class Draft:
    """Lines of a profile in order."""

    lines: list[str]
    unconfirmed: list[str] = field(default_factory=list)

    def add(self, key: str, value: Any, why: str = "", guesses: tuple[str, ...] = ()) -> None:
        """`guesses`: the dotted names below `key` (or itself) that are not Slurm's own word."""
        if isinstance(value, dict) and value and all(isinstance(inner, dict) for inner in value.values()):
            text = "\n".join([f"{key}:", *(f"  {flow(name)}: {flow(entry)}" for name, entry in value.items())])
        else:
            text = f"{key}: {flow(value)}"
        self.lines += [f"# {why}"] * bool(why) + [text]
        self.unconfirmed += guesses

    def text(self) -> str:
        return "\n".join([*self.lines, f"unconfirmed: {flow(self.unconfirmed)}", ""])


@dataclass(frozen=True)
class Written:
    """The profile's file, the caches' places (none where they may stay in the home) and why the home is no place for them."""

    path: Path
    caches: dict[str, str]
    reason: str
    unconfirmed: list[str]


def write(name: str | None, runs_dir: Path, cache_dir: Path | None, force: bool) -> Written:
    """`slurm/NAME.yaml` in this folder. Raises UserError without Slurm and where the profile exists, unless `force`."""
    if not slurm.found_here():
        raise UserError("there is no Slurm on this machine to write a profile from; work here with --cluster local")
    conf = os.environ.get("SLURM_CONF")
    found = site.read(conf)
    name = name or re.sub(r"[^a-z0-9-]+", "-", found.config.get("ClusterName", "").lower()).strip("-")
    if not NAME.match(name):
        raise UserError(f"profile {name!r}: a name is letters, digits, '_' and '-', starting with a letter; give one: equihpc init NAME")
    path = Path("slurm") / f"{name}.yaml"
    if path.exists() and not force:
        raise UserError(f"{path} exists; --force writes it anew, another NAME writes a second one")
    reason = site.small_home(Path.home(), runs_dir)
    if cache_dir is None and reason and site.device(runs_dir) != site.device(Path.home()):
        cache_dir = runs_dir / ".caches"
    caches = site.cache_folders(cache_dir.absolute()) if cache_dir else {}
    drafted = draft(name, found, conf, default_account(conf), caches, reason)
    if cache_dir:
        cache_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.parent.mkdir(exist_ok=True)
    write_atomic(path, drafted.text())
    clusters.load(name)  # what was written can be read
    return Written(path, caches, reason, drafted.unconfirmed)


def default_account(conf: str | None) -> str | None:
    try:
        text = slurm.call(["sacctmgr", "--noheader", "--parsable2", "show", "user", getpass.getuser(), "format=DefaultAccount"], conf)
    except (slurm.SlurmError, OSError, KeyError):
        return None
    return text.strip() or None


def draft(name: str, found: Site, conf: str | None, account: str | None, caches: dict[str, str], reason: str) -> Draft:
    """Raises UserError where Slurm has no partition with nodes."""
    main, kind = choose_partition(found)
    result = Draft(
        [
            f"# Written by `equihpc init` on {_plain(socket.gethostname())} (Slurm {_plain(found.version)}).",
            "# Look at what `unconfirmed` names, correct it, take it off the list; `equihpc doctor` checks the rest.",
        ]
    )
    add = result.add
    add("scheduler", "slurm")
    add("description", f"{found.config.get('ClusterName', name)}: {kind.gpus or 'no'} GPUs and {kind.cores} cores per node")
    if kind.gpus:
        _add_gpus(result, kind)
    else:
        add("processes_per_node", min(kind.cores, 4), "CPU processes of a run on one node", ("processes_per_node",))
    several = len(found.nodes[main.name]) > 1
    add("cores_per_node", kind.cores, "the partition has nodes of several kinds; this is the most frequent" if several else "")
    add("partition", main.name)
    _add_partitions(result, found, kind)
    add("whole_nodes", main.gives_whole_nodes, f"OverSubscribe of {main.name}", ("whole_nodes",))
    if account:
        add("account", account, "your default account", ("account",))
    size = found.config.get("MaxArraySize", "")
    if size.isdigit() and int(size) > 1:
        add("max_array_size", int(size))
    _add_meeting(result, found, main)
    result.lines.append(
        f"# preemption of {main.name}: PreemptMode={main.preempt_mode}, GraceTime={main.grace_seconds} s;"
        f" KillWait={_plain(found.config.get('KillWait', '?'))}, JobRequeue={_plain(found.config.get('JobRequeue', '?'))}"
    )
    add("requeue", "self", "whether compute nodes may requeue their job: equihpc doctor --node", ("requeue",))
    if caches:
        add("environment", caches, f"caches are not in the home: {_plain(reason)}" if reason else "caches")
    if conf:
        add("slurm_conf", conf, "SLURM_CONF when this was written")
    return result


def choose_partition(found: Site) -> tuple[Partition, NodeType]:
    """The default partition where its nodes have GPUs or no node has; otherwise the largest with GPUs."""
    usable = [partition for name, partition in found.partitions.items() if found.nodes[name] and partition.state == "UP"]
    if not usable:
        raise UserError("Slurm shows no partition that is up and has nodes (scontrol show partition)")
    with_gpus = [partition for partition in usable if found.nodes[partition.name][0][0].gpus]
    best = max(with_gpus or usable, key=lambda partition: (partition.is_default, partition.num_nodes))
    return best, found.nodes[best.name][0][0]


def known_gpu(text: str) -> tuple[str, float, float] | None:
    """Name, peak and memory from Slurm's type and features, such as `a100` or `nvidia_h100_80gb_hbm3`."""
    return next((gpu[1:] for gpu in GPUS if re.search(gpu[0], text.lower())), None)


def _add_gpus(result: Draft, kind: NodeType) -> None:
    known = known_gpu(kind.gpu_type)
    if known:
        gpu = {"name": known[0], "tflops": known[1], "memory_gib": known[2]}
        result.add("gpu", gpu, f"Slurm says {_plain(kind.gpu_type)}", ("gpu.tflops", "gpu.memory_gib"))
    else:
        says = _plain(kind.gpu_type) or "no type"
        gpu = {"name": kind.gpu_type.split()[0] if kind.gpu_type else "GPU", "tflops": None, "memory_gib": UNKNOWN_GPU_MEMORY_GIB}
        result.add("gpu", gpu, f"Slurm says {says}: look the GPU up", ("gpu.name", "gpu.tflops", "gpu.memory_gib"))
    result.add("processes_per_node", kind.gpus)
    result.add("gpu_request", "gres")


def _add_partitions(result: Draft, found: Site, kind: NodeType) -> None:
    same = {
        name: partition
        for name, partition in found.partitions.items()
        if partition.state == "UP" and found.nodes[name] and found.nodes[name][0][0].gpus == kind.gpus
    }
    limits = {name: {"max_hours": one.max_hours or UNLIMITED_HOURS, "max_nodes": max(1, one.max_nodes)} for name, one in same.items()}
    endless = tuple(f"partitions.{name}.max_hours" for name, one in same.items() if one.max_hours is None)
    result.add("partitions", limits, "the account's and the qos' limits may be lower", endless)
    quick = sorted((one.max_hours or UNLIMITED_HOURS, name) for name, one in same.items() if DEVELOPMENT.search(name.lower()))
    if quick:
        result.add("development", quick[0][1], "for doctor and rehearse", ("development",))


UNLIMITED_HOURS = 168.0  # where Slurm sets no limit


def _add_meeting(result: Draft, found: Site, main: Partition) -> None:
    """Nodes whose names do not resolve meet at their address where that is one for all: they are emulated on one machine."""
    hosts = found.addresses[main.name]
    name, address = next(iter(hosts.items()))
    if set(hosts.values()) == {address} and address != name and not resolves(name):
        result.add("rendezvous", {"address": address}, f"{_plain(name)} does not resolve here", ("rendezvous.address",))
    else:
        result.unconfirmed.append("rendezvous.suffix")


def resolves(host: str) -> bool:
    try:
        return bool(socket.getaddrinfo(host, None))
    except OSError:
        return False


def _plain(text: str) -> str:
    """For a comment: one line."""
    return re.sub(r"[^ -~]+", " ", text).strip()


def shell_lines(caches: dict[str, str]) -> list[str]:
    """For the login shell, so that what is installed there lies there too."""
    lines = [f"export {name}={shlex.quote(value)}" for name, value in caches.items()]
    if caches and Path(sys.prefix).is_relative_to(Path.home()):
        place = Path(caches["UV_CACHE_DIR"]).parent / "venv"
        lines.append(f"export UV_PROJECT_ENVIRONMENT={shlex.quote(str(place))}  # then: uv sync")
    return lines
