"""Cluster profiles: everything a site differs in. One YAML each; `./slurm`, then the user's folder, then the package's."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from hpc import yamlfile
from hpc.errors import UserError
from hpc.messages import choices_text
from hpc.spec import NAME, Frozen, Resources, validate

PLACEHOLDER = re.compile(r"\$\{env:([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


class Gpu(Frozen):
    name: str
    tflops: Annotated[float, Field(gt=0)] | None  # dense bf16 peak, TFLOP/s; None: unknown, hours are not estimated
    memory_gib: Annotated[float, Field(gt=0)]
    # peak bandwidths of one GPU in each direction, 10⁹ bytes/s: to the others of its node, and of its share of the network; None: unknown
    node_gb_s: Annotated[float, Field(gt=0)] | None = None
    network_gb_s: Annotated[float, Field(gt=0)] | None = None


class Limits(Frozen):
    max_hours: Annotated[float, Field(gt=0)]
    max_nodes: Annotated[int, Field(ge=1)]


class Rendezvous(Frozen):
    """How the first node is reached by the others: its host name plus `suffix`, or a fixed address."""

    suffix: str = ""
    address: str | None = None


class Container(Frozen):
    """The task command runs as `command IMAGE python …`."""

    image: str | None = None  # None: only jobs that name an image run in one
    command: str = "apptainer exec --nv"  # shell words
    binds: list[str] = []  # further paths, as `--bind` takes them; the runs' folder, the code and the data sets are bound anyway
    python: str = "python3"  # inside the image


class Cluster(Frozen):
    """A profile. Times are in the unit of their name."""

    scheduler: Literal["slurm", "local"]
    description: str = ""
    gpu: Gpu | None = None  # None: the processes run on CPUs
    processes_per_node: Annotated[int, Field(ge=1)]  # GPUs of a node, or CPU processes where there are none
    cores_per_node: Annotated[int, Field(ge=1)]
    partition: str | None = None
    partitions: dict[str, Limits] = {}
    account: str | None = None
    qos: str | None = None
    gpu_request: Literal["gres", "gpus-per-node", "none"] = "none"
    whole_nodes: bool = False  # the site gives and bills whole nodes only: smaller work is packed
    max_array_size: Annotated[int, Field(ge=1)] = 1001  # elements of one array (Slurm's MaxArraySize)
    array_parallelism: Annotated[int, Field(ge=1)] = 256  # elements that run at once
    max_submitted: Annotated[int, Field(ge=1)] | None = (
        None  # elements that one user may have in the queue; the rest waits for a later submit
    )
    requeue: Literal["self", "none"] = "self"  # none: compute nodes may not requeue; segments are submitted ahead as a chain
    signal_lead_seconds: Annotated[int, Field(ge=10)] = 300  # USR2 comes this long before the time limit
    startup_seconds: Annotated[float, Field(gt=0)] = 900.0  # until a rank's first sign of life; later it is hung
    hang_seconds: Annotated[float, Field(gt=0)] = 600.0  # between two signs of life of a rank
    rendezvous: Rendezvous = Rendezvous()
    container: Container | None = None
    node_memory_hours: Annotated[float, Field(gt=0)] = 24.0  # a node on which runs failed twice is avoided for so long
    quota_command: str | None = None  # shell line that prints the account's budget, for `plan` and `doctor`
    min_all_reduce_gb_s: Annotated[float, Field(gt=0)] | None = None  # bus bandwidth that `doctor` expects of the GPUs of a node
    development: str | None = None  # partition for `doctor` and `rehearse`
    development_qos: str | None = None  # and qos; sites have one, the other or both
    group: str | None = None  # Unix group that may read the runs; None: nobody else
    modules: list[str] = []
    setup: list[str] = []  # shell lines before the task
    environment: dict[str, str] = {}
    srun_args: list[str] = []
    sbatch: dict[str, str] = {}  # further sbatch options, for example {constraint: gpu}
    datasets: dict[str, str] = {}  # name -> folder: shards and manifest.json, or of an evaluation the authors' format
    ledger: str | None = None  # folder for the small records of runs; a place that is not purged. None: beside the runs
    slurm_conf: str | None = None  # SLURM_CONF for every Slurm command, for a Slurm that is not the machine's own
    poll_seconds: Annotated[float, Field(ge=0.2)] = 30.0  # Slurm is not asked more often than this by --wait
    unconfirmed: list[str] = []  # facts above that the site's own pages did not confirm

    @model_validator(mode="after")
    def _one_line_each(self) -> Self:
        """A line break in a value would be another line of the batch script."""
        for name, value in self.model_dump(exclude={"setup", "description"}).items():
            if any(ord(character) < 32 for text in _texts(value) for character in text):
                raise ValueError(f"{name} contains a line break or another control character: {value!r}")
        for name in self.environment:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"environment: {name!r} is not a variable's name")
        return self

    @model_validator(mode="after")
    def _partition_known(self) -> Self:
        if self.scheduler == "slurm" and self.partition is not None and self.partitions and self.partition not in self.partitions:
            raise ValueError(f"partition {self.partition!r} is not among partitions: {choices_text(self.partition, list(self.partitions))}")
        return self


def _texts(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for pair in value.items() for part in pair for text in _texts(part)]
    if isinstance(value, list):
        return [text for part in value for text in _texts(part)]
    return [value] if isinstance(value, str) else []


class Layout(NamedTuple):
    """Where the processes of one run are: `nodes` × `processes`, each with a GPU where `gpus` is set."""

    nodes: int
    processes: int  # per node
    gpus: int  # per node; 0: CPU processes
    fraction: float  # of a node's capacity that the run takes

    @property
    def world_size(self) -> int:
        return self.nodes * self.processes


def layout(resources: Resources, cluster: Cluster) -> Layout:
    """Raises ValueError when the request is above the profile's limits.

    On the local profile nodes are folded: all processes run on this machine.
    """
    limit, has_gpus = cluster.processes_per_node, cluster.gpu is not None
    per_node = resources.gpus if resources.gpus is not None else resources.gpus_per_node or limit
    nodes, processes = resources.nodes, max(per_node, 1)
    if cluster.scheduler == "local":
        nodes, processes = 1, processes * nodes
        if has_gpus and processes > limit:  # a laptop with one GPU: two ranks cannot share it
            has_gpus, limit = False, max(4, cluster.cores_per_node)
    if processes > limit:
        what = "GPUs per node" if has_gpus else "processes per node"
        raise ValueError(f"{processes} {what} are asked for, but the profile's nodes have {limit}")
    if cluster.scheduler == "slurm" and resources.hours * 3600 <= cluster.signal_lead_seconds:
        raise ValueError(
            f"{resources.hours:g} hours per segment are not longer than the profile's signal_lead_seconds"
            f" ({cluster.signal_lead_seconds}): the run would be asked to stop at once"
        )
    partition = cluster.partitions.get(cluster.partition or "")
    if partition:
        if nodes > partition.max_nodes:
            raise ValueError(f"{nodes} nodes are asked for, but partition {cluster.partition} allows {partition.max_nodes}")
        if resources.hours > partition.max_hours:
            raise ValueError(
                f"{resources.hours:g} hours per segment are asked for, but partition {cluster.partition} allows"
                f" {partition.max_hours:g}; give less: a longer run continues in further segments"
            )
    return Layout(nodes, processes, processes if has_gpus and resources.gpus != 0 else 0, processes / limit)


def folders() -> list[Path]:
    """Where profiles are looked for, first match wins."""
    user = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "equihpc" / "slurm"
    return [Path("slurm"), user, package_folder()]


def package_folder() -> Path:
    """`slurm/` of the checkout, or its copy inside the installed package."""
    installed = Path(__file__).parent / "_slurm"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "slurm"


def names() -> list[str]:
    return sorted({path.stem for folder in folders() if folder.is_dir() for path in folder.glob("*.yaml")})


def load(name: str) -> tuple[Cluster, list[str]]:
    """The profile and the names of environment variables in it that are not set. Raises UserError."""
    if not NAME.match(name):
        raise UserError(f"--cluster {name!r}: not a name; {choices_text(name, names())}")
    for folder in folders():
        path = folder / f"{name}.yaml"
        if path.is_file():
            break
    else:
        raise UserError(f"--cluster {name}: there is no such profile; {choices_text(name, names())}")
    document = yamlfile.load(path)
    missing: list[str] = []
    data = substitute(document.data, missing)
    if isinstance(data, dict) and data.get("scheduler") == "local":
        data = {**_this_machine(), **data}
    return validate(Cluster, data, document), missing


def substitute(value: Any, missing: list[str]) -> Any:
    """`${env:NAME}` and `${env:NAME:-default}` in texts; an unset one without default is noted and left."""
    if isinstance(value, dict):
        return {k: substitute(v, missing) for k, v in value.items()}
    if isinstance(value, list):
        return [substitute(v, missing) for v in value]
    if not isinstance(value, str):
        return value

    def one(match: re.Match[str]) -> str:
        found = os.environ.get(match[1], match[2])
        if found is None:
            missing.append(match[1])
            return match[0]
        return found

    return PLACEHOLDER.sub(one, value)


def _this_machine() -> dict[str, Any]:
    """Capacity of the machine at hand, for what the local profile leaves open."""
    cores = len(os.sched_getaffinity(0))
    gpus = _local_gpus()
    found: dict[str, Any] = {"cores_per_node": cores, "processes_per_node": len(gpus) or max(4, cores)}
    if gpus:
        name, memory_mib = gpus[0]
        found["gpu"] = {"name": name, "tflops": None, "memory_gib": memory_mib / 1024}
    return found


@lru_cache
def _local_gpus() -> list[tuple[str, float]]:
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        text = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    found = [(name.strip(), float(memory)) for name, memory in (line.rsplit(",", 1) for line in text.splitlines() if "," in line)]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return found if visible is None else found[: len([gpu for gpu in visible.split(",") if gpu.strip()])]


def minutes(hours: float) -> int:
    return max(1, math.ceil(hours * 60))
