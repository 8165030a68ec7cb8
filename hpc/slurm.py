"""The few Slurm commands that are needed, each once per question and never once per job."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from hpc.errors import EquiHPCError
from hpc.files import locked, read_json, write_json

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

    `held_seconds`: for how long it has been waiting for its earliest start after a requeue, or for somebody to release it
    after a failed launch; 0: it is not. `reason`: why it does not run yet, in Slurm's word.
    """

    state: Literal["pending", "running", "ended"]
    slurm_state: str
    job_name: str = ""
    held_seconds: float = 0.0
    reason: str = ""

    @property
    def launch_failed(self) -> bool:
        """A node could not start it (its prolog failed, or it had not yet got rid of the job's last execution): it is held for good."""
        return self.reason.replace("_", " ") == LAUNCH_FAILED


class Queue(dict[str, QueueEntry]):
    """ "123" or "123_4" -> entry, as it was at `asked` (Unix time; 0: Slurm never answered).

    What was submitted or has started since is not in it. `is_new`: this call asked, not an earlier one of any process.
    """

    asked: float = 0.0
    is_new: bool = False


_PENDING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
_RUNNING = {"RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"}
LAUNCH_FAILED = "launch failed requeued held"
CHUNK = 100  # names in one call of scontrol
JITTER_SECONDS = (0.2, 1.0)  # between two calls


def query(slurm_conf: str | None = None, max_age_seconds: float = 0.0) -> tuple[Queue, str]:
    """One question about all of the user's jobs: (entries of those still in the queue, a note when there is no answer).

    squeue knows everything that can still run, is answered from slurmctld's memory and needs no accounting; what it does
    not list has ended, and how it ended stands in the run's folder. The user's processes share the answer: one that is at
    most `max_age_seconds` old is not asked for again, and of several that need one only one asks.
    """
    known, is_new = _answer(slurm_conf, time.time() - max_age_seconds)
    queue = _parse(known["text"], known["asked"])
    queue.is_new = is_new
    if not known["problem"]:
        return queue, ""
    since = f"as it was at {datetime.fromtimestamp(known['asked']):%H:%M:%S}" if known["asked"] else "unknown"
    return queue, f"Slurm does not answer ({known['problem']}); states are those of the run folders, the queue is {since}"


def _answer(slurm_conf: str | None, oldest: float) -> tuple[dict[str, Any], bool]:
    """The cache's content, not older than `oldest`, and whether it was this call that asked."""
    path = _cache(slurm_conf)
    give_up = time.monotonic() + TIMEOUT_SECONDS
    while (known := _read_cache(path))["tried"] < oldest:
        try:
            with locked(path.with_suffix(".lock"), wait=False) as mine:
                if mine and (known := _read_cache(path))["tried"] >= oldest:
                    return known, False
                if mine or time.monotonic() > give_up:  # who asks was stopped (Ctrl-Z)
                    known = {**known, **_ask(slurm_conf)}
                    write_json(path, known, durable=False)
                    return known, not known["problem"]
        except OSError:  # no room for a cache: everybody asks
            known = {**known, **_ask(slurm_conf)} if known["tried"] < oldest else known
            return known, not known["problem"]
        time.sleep(0.1)
    return known, False


_UNKNOWN: dict[str, Any] = {"asked": 0.0, "tried": 0.0, "text": "", "problem": ""}


def _ask(slurm_conf: str | None) -> dict[str, Any]:
    """What changes in the cache: the answer, or only the problem, and the last answer stays."""
    now = time.time()
    try:
        text = call(["squeue", "--me", "--noheader", "--array", "--format=%F|%K|%V|%T|%r|%j"], slurm_conf)
    except SlurmError as error:
        return {"tried": time.time(), "problem": " ".join(str(error).split())}  # after what may have been half a minute
    return {"tried": now, "asked": now, "text": text, "problem": ""}


def _cache(slurm_conf: str | None) -> Path:
    """One file per Slurm and user, in the user's cache folder."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    which = slurm_conf or os.environ.get("SLURM_CONF", "")
    return base / "equihpc" / f"queue-{os.getuid()}-{hashlib.sha256(which.encode()).hexdigest()[:12]}.json"


def _read_cache(path: Path) -> dict[str, Any]:
    """Nothing is believed of a file that somebody else could have written, or that says that it is of the future."""
    try:
        about = path.stat()
        known = read_json(path)
    except OSError:
        return _UNKNOWN
    ours = about.st_uid == os.getuid() and not about.st_mode & 0o022
    fits = isinstance(known, dict) and known.keys() == _UNKNOWN.keys() and all(type(known[k]) is type(v) for k, v in _UNKNOWN.items())
    return known if ours and fits and known["tried"] < time.time() + 1 else _UNKNOWN


def _parse(text: str, asked: float) -> Queue:
    queue = Queue()
    queue.asked = asked
    for line in text.splitlines():
        base, index, queued, state, reason, job_name = (*line.split("|", 5), "", "", "", "", "")[:6]
        kind: Literal["pending", "running", "ended"] = "pending" if state in _PENDING else "running" if state in _RUNNING else "ended"
        entry = QueueEntry(kind, state, job_name, reason="" if reason == "None" else reason)
        if kind == "pending" and (reason == "BeginTime" or entry.launch_failed):
            with contextlib.suppress(ValueError):
                entry = replace(entry, held_seconds=max(0.0, time.time() - datetime.fromisoformat(queued).timestamp()))
        queue[base if index in ("N/A", "") else f"{base}_{index}"] = entry
    return queue


def _spread(make: Callable[[str], Sequence[str]], names: Iterable[str], slurm_conf: str | None, size: int = CHUNK) -> None:
    """`make` gets up to `size` names, joined. Calls do not follow each other at once; one that fails does not keep the others back."""
    todo = list(names)
    problem: SlurmError | None = None
    for start in range(0, len(todo), size):
        if start:
            time.sleep(random.uniform(*JITTER_SECONDS))
        try:
            call(make(",".join(todo[start : start + size])), slurm_conf)
        except SlurmError as error:
            problem = problem or error
    if problem is not None:
        raise problem


def start_now(names: Iterable[str], slurm_conf: str | None = None) -> None:
    """Lift the hold that Slurm puts on requeued jobs (the lifetime of their credential, about two minutes)."""
    _spread(lambda some: ["scontrol", "update", f"jobid={some}", "starttime=now"], names, slurm_conf)


def requeue(name: str, slurm_conf: str | None = None) -> None:
    call(["scontrol", "requeue", name], slurm_conf)


def hold(names: Iterable[str], slurm_conf: str | None = None) -> None:
    """Pending jobs do not start; of running ones the next segment does not."""
    _spread(lambda some: ["scontrol", "hold", some], names, slurm_conf)


def release(names: Iterable[str], slurm_conf: str | None = None) -> None:
    _spread(lambda some: ["scontrol", "release", some], names, slurm_conf)


def throttle(arrays: Iterable[str], elements: int, slurm_conf: str | None = None) -> None:
    _spread(lambda array: ["scontrol", "update", f"jobid={array}", f"arraytaskthrottle={elements}"], arrays, slurm_conf, size=1)


def set_dependency(name: str, dependency: str, slurm_conf: str | None = None) -> None:
    call(["scontrol", "update", f"jobid={name}", f"dependency={dependency}"], slurm_conf)


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
class Account:
    """What the accounting says of one execution of a job; `start` in Unix time, None: it never began."""

    name: str
    state: str  # for example `CANCELLED by 1000`
    exit_code: str
    start: float | None
    nodes: str

    def is_of(self, name: str) -> bool:
        """Elements that ended before they began stand together: `12_[0-3,7%4]`."""
        base, _, index = name.partition("_")
        if not (match := re.fullmatch(r"(\d+)_\[([\d,-]+)(?:%\d+)?\]", self.name)):
            return self.name == name
        spans = (span.partition("-") for span in match[2].split(","))
        return match[1] == base and index.isdigit() and any(int(low) <= int(index) <= int(high or low) for low, _, high in spans)


def accounting(names: Iterable[str], since: float, slurm_conf: str | None = None) -> list[Account]:
    """Every execution of these jobs from `since` on (Unix time), oldest first. Raises SlurmError where slurmdbd does not answer."""
    day = datetime.fromtimestamp(since - 3600).strftime("%Y-%m-%dT%H:%M:%S")  # an hour: clocks, and the job begins before its run
    fields = "--format=JobID,State,ExitCode,Start,NodeList"
    command = ["sacct", "-X", "-D", "--noheader", "--parsable2", f"--starttime={day}", f"--jobs={','.join(sorted(names))}", fields]
    found = []
    for line in call(command, slurm_conf, timeout=20).splitlines():
        name, state, exit_code, start, nodes = line.split("|", 4)
        try:
            began = datetime.fromisoformat(start).timestamp()
        except ValueError:  # Unknown, None
            began = None
        found.append(Account(name, state, exit_code, began, nodes))
    return sorted(found, key=lambda account: account.start or float("inf"))


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
