"""The few Slurm commands that are needed, each once per question and never once per job."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from hpc.errors import EquiHPCError

TIMEOUT_SECONDS = 60.0


class SlurmError(EquiHPCError):
    """A Slurm command failed; the text is Slurm's own with the command before it."""


_OVERRIDES = ("SBATCH_", "SQUEUE_", "SCONTROL_", "SCANCEL_", "SACCT_")


def environment(slurm_conf: str | None) -> dict[str, str]:
    """This process's, without the variables that silently override options: what the profile and `plan` say counts."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_OVERRIDES)}
    return {**kept, "SLURM_CONF": slurm_conf} if slurm_conf else kept


def call(command: Sequence[str], slurm_conf: str | None = None, timeout: float = TIMEOUT_SECONDS) -> str:
    """Standard output. Raises SlurmError with Slurm's message."""
    try:
        done = subprocess.run(
            command, env=environment(slurm_conf), capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError:
        raise SlurmError(f"{command[0]} is not on this machine: is this a login node of the cluster?") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{' '.join(command[:3])} did not answer in {timeout:g} s") from None
    if done.returncode:
        raise SlurmError(f"{' '.join(command[:3])}: {(done.stderr or done.stdout).strip() or f'exit code {done.returncode}'}")
    return done.stdout


def found_here() -> bool:
    """Whether this machine belongs to a Slurm cluster. Installed packages that were never configured do not count."""
    if shutil.which("sbatch") is None:
        return False
    try:
        call(["scontrol", "show", "config"], timeout=10)
    except SlurmError as error:
        return "configuration source" not in str(error)
    return True


def inside_allocation() -> bool:
    return "SLURM_JOB_ID" in os.environ


@dataclass(frozen=True, slots=True)
class QueueEntry:
    """What Slurm says of one job or array element. `job_name` ends with the journal's uid.

    `held_seconds`: for how long it has been waiting for its earliest start after a requeue; 0: it is not.
    """

    state: Literal["pending", "running", "ended"]
    slurm_state: str
    job_name: str = ""
    held_seconds: float = 0.0


_PENDING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
_RUNNING = {"RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"}
Queue = dict[str, QueueEntry]  # "123" or "123_4" -> entry


def query(slurm_conf: str | None = None) -> tuple[Queue, str]:
    """One question about all of the user's jobs: (entries of those still in the queue, a note when there is no answer).

    squeue knows everything that can still run, is answered from slurmctld's memory and needs no accounting; what it does
    not list has ended, and how it ended stands in the run's folder.
    """
    command = ["squeue", "--me", "--noheader", "--array", "--format=%F|%K|%V|%T|%r|%j"]
    try:
        text = call(command, slurm_conf)
    except SlurmError as error:
        return {}, f"Slurm does not answer ({error}); states are those of the run folders"
    queue: Queue = {}
    for line in text.splitlines():
        base, index, queued, state, reason, job_name = (*line.split("|", 5), "", "", "", "", "")[:6]
        kind: Literal["pending", "running", "ended"] = "pending" if state in _PENDING else "running" if state in _RUNNING else "ended"
        held = 0.0
        if kind == "pending" and reason == "BeginTime":
            with contextlib.suppress(ValueError):
                held = max(0.0, (datetime.now() - datetime.fromisoformat(queued)).total_seconds())
        queue[base if index in ("N/A", "") else f"{base}_{index}"] = QueueEntry(kind, state, job_name, held)
    return queue, ""


def start_now(names: Iterable[str], slurm_conf: str | None = None) -> None:
    """Lift the hold that Slurm puts on requeued jobs (the lifetime of their credential, about two minutes)."""
    call(["scontrol", "update", f"jobid={','.join(names)}", "starttime=now"], slurm_conf)


def requeue(name: str, slurm_conf: str | None = None) -> None:
    call(["scontrol", "requeue", name], slurm_conf)


def hold(names: Iterable[str], slurm_conf: str | None = None) -> None:
    """Pending jobs do not start; of running ones the next segment does not."""
    for name in names:
        call(["scontrol", "hold", name], slurm_conf)


def release(names: Iterable[str], slurm_conf: str | None = None) -> None:
    for name in names:
        call(["scontrol", "release", name], slurm_conf)


def throttle(arrays: Iterable[str], elements: int, slurm_conf: str | None = None) -> None:
    for array in arrays:
        call(["scontrol", "update", f"jobid={array}", f"arraytaskthrottle={elements}"], slurm_conf)


def release_dependency(name: str, slurm_conf: str | None = None) -> None:
    call(["scontrol", "update", f"jobid={name}", "dependency="], slurm_conf)


def cancel(names: Sequence[str], slurm_conf: str | None = None) -> None:
    """One scancel for all; the elements of an array go as ranges, which Slurm ends much faster than one by one."""
    arrays: dict[str, list[int]] = {}
    for name in names:
        base, _, index = name.partition("_")
        arrays.setdefault(base, []).extend([int(index)] if index else [])
    if arrays:
        call(["scancel", *(f"{base}_[{ranges(found)}]" if found else base for base, found in arrays.items())], slurm_conf, timeout=300)


def ranges(numbers: Iterable[int]) -> str:
    """`0-3,7` of 0, 1, 2, 3, 7."""
    groups: list[list[int]] = []
    for number in sorted(set(numbers)):
        if groups and number == groups[-1][-1] + 1:
            groups[-1][1:] = [number]
        else:
            groups.append([number])
    return ",".join("-".join(map(str, group)) for group in groups)


def job_facts(name: str, slurm_conf: str | None = None) -> dict[str, str]:
    """`scontrol show job` as a mapping: JobState, PreemptTime, Restarts and so on."""
    text = call(["scontrol", "--oneliner", "show", "job", name], slurm_conf)
    return dict(re.findall(r"(\S+?)=(\S*)", text.splitlines()[0] if text else ""))


@dataclass(frozen=True, slots=True)
class Allocation:
    """This process's place in a Slurm job, from the environment that srun sets."""

    name: str  # "123" or "123_4": what scontrol takes
    array: str  # "123": what dependents name
    index: int | None
    restarts: int
    node: int
    num_nodes: int

    @property
    def key(self) -> str:
        """One execution of the job: the same on all its nodes, another after a requeue."""
        return f"{self.name}-{self.restarts}"


def allocation(environ: Mapping[str, str] = os.environ) -> Allocation | None:
    """None outside a Slurm step."""
    if "SLURM_JOB_ID" not in environ:
        return None
    array, index = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
    job = environ["SLURM_JOB_ID"]
    return Allocation(
        name=f"{array}_{index}" if array and index else job,  # never the plain id of an array's element: the last one's is the array's
        array=array or job,
        index=int(index) if index else None,
        restarts=int(environ.get("SLURM_RESTART_COUNT", "0")),
        node=int(environ.get("SLURM_NODEID", "0")),
        num_nodes=int(environ.get("SLURM_JOB_NUM_NODES", environ.get("SLURM_NNODES", "1"))),
    )


def first_host(environ: Mapping[str, str] = os.environ, slurm_conf: str | None = None) -> str:
    return call(["scontrol", "show", "hostnames", environ["SLURM_JOB_NODELIST"]], slurm_conf).split()[0]
