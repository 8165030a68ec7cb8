"""The entry behind `equihpc doctor --node`: what one rank of a run sees on its node, written to `probe/rank_N.json`.

It goes the way of every run, so that what it finds holds for them. In the first execution each rank looks around, runs
`python -m equissl.selftest` with its own variables (the only part with torch), and waits for the signal of the time limit;
then the run asks to be continued, and the second execution, after the requeue, completes it.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from hpc import slurm
from hpc.files import read_json, write_json

INTERFACES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
MEET_SECONDS = 60.0


class Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    began: str  # makes every probe a run of its own
    needs_gpu: bool = False
    awaits_signal: bool = True  # of the time limit
    requeues: bool = True
    selftest_seconds: float = Field(gt=0)

    def check(self, world_size: int, upstream_configs: dict[str, Any]) -> None:
        """Nothing depends on other fields or on the ranks."""


def main(config: dict[str, Any], run_dir: Path, stop: Callable[[], bool]) -> dict[str, Any] | None:
    """An empty result once everything was seen; None after the first execution where the run is to be requeued."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    allocation = slurm.allocation()
    folder = run_dir / "probe"
    folder.mkdir(exist_ok=True)
    mine = folder / f"rank_{rank}.json"
    seen = read_json(mine)
    if seen is None or "signal" not in seen:
        seen = {
            "rank": rank,
            **surroundings(),
            "connection": connection(folder, rank, world_size, allocation.restarts if allocation else 0),
        }
        write_json(mine, seen)
        seen["selftest"] = selftest(config["needs_gpu"], config["selftest_seconds"], stop)
        write_json(mine, seen)
        seen["signal"] = signal_of_limit(allocation, stop) if config["awaits_signal"] and allocation else None
        write_json(mine, seen)
        if seen["signal"] and config["requeues"]:
            return None
    return {"metrics": {}}


def surroundings() -> dict[str, Any]:
    """Host, Python, cores, GPUs and network interfaces of this rank."""
    present = [name for _, name in socket.if_nameindex()]
    gpus, driver = nvidia()
    return {
        "host": socket.gethostname(),
        "local_rank": int(os.environ["LOCAL_RANK"]),
        "python": f"{sys.version_info[0]}.{sys.version_info[1]}.{sys.version_info[2]}",
        "prefix": sys.prefix,
        "cores": sorted(os.sched_getaffinity(0)),
        "num_cores": os.cpu_count(),
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "num_gpus": gpus,
        "driver": driver,
        "interfaces": present,
        "missing_interfaces": {name: missing for name in INTERFACES if (missing := missing_interfaces(os.environ.get(name, ""), present))},
    }


def missing_interfaces(wanted: str, present: list[str]) -> list[str]:
    """Names in NCCL's and gloo's notation that no interface has; NCCL's are prefixes, `=` asks for the whole name, `^` excludes."""
    if wanted.startswith("^"):
        return []
    exact = wanted.startswith("=")
    names = [name for name in wanted.lstrip("=").split(",") if name]
    return [name for name in names if not any(other == name if exact else other.startswith(name) for other in present)]


def nvidia() -> tuple[int | None, str | None]:
    """Number of GPUs and the driver's version; None where there is no nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.split("\n")
    except (OSError, subprocess.SubprocessError):
        return None, None
    versions = [line.strip() for line in lines if line.strip()]
    return len(versions), versions[0] if versions else None


def connection(folder: Path, rank: int, world_size: int, restarts: int) -> dict[str, Any]:
    """A TCP connection to rank 0 at MASTER_ADDR, on a port of its own; rank 0 counts who came."""
    address = os.environ["MASTER_ADDR"]
    note = folder / f"listener_{restarts}.json"
    found: dict[str, Any] = {"address": address}
    try:
        found["resolved"] = sorted({str(entry[4][0]) for entry in socket.getaddrinfo(address, None)})
    except OSError as error:
        return {**found, "error": f"{address} does not resolve: {error}"}
    try:
        if rank == 0:
            found["num_connected"] = _listen(note, world_size - 1)
        else:
            deadline = time.monotonic() + MEET_SECONDS
            while (listener := read_json(note)) is None:
                if time.monotonic() > deadline:
                    return {**found, "error": f"rank 0 did not publish its port within {MEET_SECONDS:g} s"}
                time.sleep(0.1)
            began = time.perf_counter()
            socket.create_connection((address, listener["port"]), timeout=10).close()
            found["seconds"] = time.perf_counter() - began
    except OSError as error:
        found["error"] = f"no connection to {address}: {error}"
    return found


def _listen(note: Path, expected: int) -> int:
    """How many of the expected ranks connected within MEET_SECONDS."""
    count = 0
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    with socket.create_server(("", 0), family=family, backlog=max(expected, 1), dualstack_ipv6=both) as server:
        write_json(note, {"port": server.getsockname()[1]})
        deadline = time.monotonic() + MEET_SECONDS
        while count < expected and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                server.accept()[0].close()
            except TimeoutError:
                break
            count += 1
    return count


def selftest(needs_gpu: bool, seconds: float, stop: Callable[[], bool]) -> dict[str, Any]:
    """The JSON that `equissl.selftest` prints, or `{"problems": [why there is none]}`."""
    # Slurm sends the signal of the time limit to every process of the step: where torch is slow to import it comes before this has ended
    ignoring = ("/bin/sh", "-c", "trap '' USR2; exec \"$@\"", "sh")
    command = [*ignoring, sys.executable, "-m", "equissl.selftest", *(["--gpu"] if needs_gpu else [])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL)
    assert process.stdout is not None
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(process.stdout or []), daemon=True)
    reader.start()
    deadline = time.monotonic() + seconds
    while process.poll() is None:
        stop()  # a sign of life; what it says is asked again later
        if time.monotonic() > deadline:
            process.kill()
            process.wait()
            return {"problems": [f"python -m equissl.selftest did not end within {seconds:g} s"]}
        time.sleep(0.1)
    reader.join(timeout=10)
    process.stdout.close()
    for line in reversed(lines):
        try:
            found = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(found, dict):
            return found
    return {"problems": [f"python -m equissl.selftest ended with exit code {process.returncode} and said nothing"]}


def signal_of_limit(allocation: slurm.Allocation, stop: Callable[[], bool]) -> dict[str, Any]:
    """Wait until the run is asked to stop; when that was and when the job's time would have been up (seconds since 1970)."""
    while not stop():
        time.sleep(0.1)
    came = time.time()
    try:
        end = slurm.job_facts(allocation.name).get("EndTime", "")
        limit: float | None = datetime.fromisoformat(end).timestamp()
    except (slurm.SlurmError, ValueError):
        limit = None
    return {"came": came, "limit": limit}
