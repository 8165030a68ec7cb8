"""Faults as the real world makes them, each done to a run from outside: what `rehearse` draws from.

A fault may be too late, for its run has just ended: it then raises Missed and nothing was done.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from hpc import slurm, testbed
from hpc.errors import EquiHPCError, UserError
from hpc.messages import choices_text
from hpc.runs import RunFolder

LOCAL, TESTBED, SITE = "local", "testbed", "site"
DOWN_SECONDS = 4.0  # for how long a node or a daemon is away
repairing = threading.Lock()  # held from the end of a daemon of the testbed until it is back
CHECKPOINT = re.compile(r"step_(\d+)")


class Missed(EquiHPCError):
    """The target was gone before the fault came."""


@dataclass(frozen=True)
class Target:
    """The run that a fault is aimed at, and the submission that it belongs to."""

    path: Path  # the run's folder; of the job for faults of the submission itself
    slurm_job: str | None
    slurm_conf: str | None
    scratch: Path
    start_submit: Callable[[str], subprocess.Popen[str]]  # `equihpc submit` with this PATH
    rng: random.Random


@dataclass(frozen=True)
class Fault:
    name: str
    places: tuple[str, ...]
    inject: Callable[[Target], None]
    when: Literal["submission", "start", "training", "evaluation"] = "training"
    cause: str = ""  # what `why` must say of the attempt that it ended, as a regular expression; empty: it ends none
    num_checkpoints: int = 0  # that the run must have for it
    lost_checkpoints: int = 0  # beyond the work since the last one
    submit_again: bool = False  # somebody has to: nothing is left that could go on


# --- processes on this machine -----------------------------------------------------------------------------------------


def processes(word: str) -> dict[int, list[str]]:
    """pid -> command line of the own user's processes that have `word` among their words."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if folder.stat().st_uid == os.getuid():
                words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
                if word in words:
                    found[int(folder.name)] = words
        except OSError:  # it has just ended
            continue
    return found


def ranks(run: Path) -> list[int]:
    """The pids of a run's ranks on this machine, without what they forked."""
    mine = {pid for pid, words in processes(str(run)).items() if "hpc.rank" in words}

    def parent(pid: int) -> int:
        try:
            return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return 0

    return sorted(pid for pid in mine if parent(pid) not in mine)


def _send(pids: Sequence[int], number: int) -> None:
    try:
        for pid in pids:
            os.kill(pid, number)
    except ProcessLookupError:
        raise Missed("the process has ended") from None


def _a_rank(target: Target) -> int:
    found = ranks(target.path)
    if not found:
        raise Missed("no rank is alive")
    return target.rng.choice(found)


def _to_a_rank(number: int, target: Target) -> None:
    _send([_a_rank(target)], number)


def _to_the_runner(number: int, target: Target) -> None:
    attempts = RunFolder(target.path).read_attempts()
    if not attempts or attempts[-1].end is not None:
        raise Missed("no attempt is under way")
    _send([attempts[-1].start["pid"]], number)


def _flip(path: Path) -> None:
    with open(path, "r+b") as file:
        middle = path.stat().st_size // 2
        file.seek(middle)
        old = file.read(1)
        file.seek(middle)
        file.write(bytes(255 - byte for byte in old))


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _damage_checkpoint(how: Callable[[Path], None], which: Callable[[Path], float], target: Target) -> None:
    """The file of the newest checkpoint for which `which` is greatest, while the ranks stand still; then one is killed."""
    one = _a_rank(target)
    _send(ranks(target.path), signal.SIGSTOP)
    found = {int(match[1]): path for path in target.path.glob("checkpoints/*") if (match := CHECKPOINT.fullmatch(path.name))}
    files = [path for path in found[max(found)].iterdir() if path.is_file()] if found else []
    if files:
        how(max(files, key=which))
    _send([one], signal.SIGKILL)


# --- Slurm -------------------------------------------------------------------------------------------------------------


def _job(target: Target) -> str:
    if target.slurm_job is None:
        raise Missed("it has no Slurm job")
    return target.slurm_job


def _hosts(target: Target) -> list[str]:
    listed = slurm.call(["squeue", "--noheader", "--states=running", f"--jobs={_job(target)}", "--format=%N"], target.slurm_conf)
    if not listed.strip():
        raise Missed("it does not run")
    return slurm.call(["scontrol", "show", "hostnames", listed.strip()], target.slurm_conf).split()


def _preempt(target: Target) -> None:
    """An urgent job takes the run's nodes."""
    options = [f"--partition={testbed.PARTITIONS[1]}", f"--nodelist={','.join(_hosts(target))}", "--exclusive", "--time=1"]
    slurm.call(["sbatch", "--job-name=urgent", *options, "--output=/dev/null", "--wrap=sleep 1"], target.slurm_conf)


def _limit_time(target: Target) -> None:
    """The end comes within a minute, and Slurm's own USR2 before it. It is the limit of later segments too."""
    hours, minutes, _ = slurm.job_facts(_job(target), target.slurm_conf)["RunTime"].rpartition("-")[2].split(":")
    limit = 60 * int(hours) + int(minutes) + 1
    slurm.call(["scontrol", "update", f"jobid={_job(target)}", f"timelimit={limit}"], target.slurm_conf)


def _signal_job(number: str, step: str, target: Target) -> None:
    _hosts(target)
    slurm.call(["scancel", f"--signal={number}", _job(target) + step], target.slurm_conf)


def _requeue(target: Target) -> None:
    _hosts(target)
    slurm.requeue(_job(target), target.slurm_conf)


def _node_down(target: Target) -> None:
    update = ["scontrol", "update", f"nodename={target.rng.choice(_hosts(target))}"]
    slurm.call([*update, "state=down", "reason=rehearsal"], target.slurm_conf)

    def come_back() -> None:
        with contextlib.suppress(slurm.SlurmError):  # with ReturnToService it may have done so by itself
            slurm.call([*update, "state=resume"], target.slurm_conf)

    threading.Timer(DOWN_SECONDS, come_back).start()


def _restart(daemon: str, target: Target) -> None:
    """Ended in good order; what is asked of it meanwhile goes unanswered."""
    pid = testbed.status()["daemons"][daemon]["pid"]
    if pid is None or not repairing.acquire(blocking=False):
        raise Missed(f"{daemon} does not run, or the testbed is being mended")
    os.kill(pid, signal.SIGTERM)

    def come_back() -> None:
        try:
            while testbed.status()["daemons"][daemon]["alive"]:
                time.sleep(0.5)
            time.sleep(DOWN_SECONDS)
            testbed.up()
        finally:
            repairing.release()

    threading.Thread(target=come_back).start()


def mend_testbed() -> None:
    """Start daemons that had died by themselves; not while a fault keeps one away."""
    if repairing.acquire(blocking=False):
        try:
            if not all(daemon["alive"] for daemon in testbed.status()["daemons"].values()):
                testbed.up()
        finally:
            repairing.release()


def crashes() -> Counter[str]:
    """How often each node's daemon crashed and was started again since the testbed is up: slurmd 22.05 now and then does."""
    logs = (Path(testbed.status()["state_dir"]) / "log").glob("slurmd-*.out")
    return Counter({path.stem: path.read_text(errors="replace").count(testbed.CRASHED) for path in logs})


# --- the submission ----------------------------------------------------------------------------------------------------


def _kill_submitter(target: Target) -> None:
    """It dies after Slurm took the first job and before its journal says so."""
    real = shutil.which("sbatch")
    assert real is not None
    tools = target.scratch / "deadly"
    tools.mkdir(exist_ok=True)
    (tools / "sbatch").write_text(f'#!/bin/sh\n{shlex.quote(real)} "$@"\nkill -KILL $PPID\n')
    (tools / "sbatch").chmod(0o700)
    killed = target.start_submit(f"{tools}{os.pathsep}{os.environ['PATH']}")
    killed.communicate()
    if killed.returncode != -signal.SIGKILL:
        raise Missed(f"the submission ended with {killed.returncode} before it came to sbatch")


def _submit_twice(target: Target) -> None:
    both = [target.start_submit(os.environ["PATH"]) for _ in range(2)]
    for one in both:
        text = one.communicate()[0]
        if one.returncode:
            raise EquiHPCError(f"of two submissions at once one failed: {text}")


_HERE = (LOCAL, TESTBED)
_KILLED = "SIGKILL"
_SIZE, _AGE = (lambda path: path.stat().st_size), (lambda path: path.stat().st_mtime_ns)
CATALOGUE = (
    Fault("rank-killed", _HERE, partial(_to_a_rank, signal.SIGKILL), cause=_KILLED),
    Fault("rank-stopped", _HERE, partial(_to_a_rank, signal.SIGSTOP), cause="no sign of life"),
    Fault("evaluation-killed", _HERE, partial(_to_a_rank, signal.SIGKILL), "evaluation", cause=_KILLED),
    Fault("checkpoint-flipped", _HERE, partial(_damage_checkpoint, _flip, _SIZE), cause=_KILLED, num_checkpoints=1, lost_checkpoints=1),
    Fault(
        "checkpoint-truncated", _HERE, partial(_damage_checkpoint, _truncate, _SIZE), cause=_KILLED, num_checkpoints=1, lost_checkpoints=1
    ),
    Fault(
        "checkpoint-unfinished", _HERE, partial(_damage_checkpoint, Path.unlink, _AGE), cause=_KILLED, num_checkpoints=1, lost_checkpoints=1
    ),
    Fault("runner-asked", (LOCAL,), partial(_to_the_runner, signal.SIGTERM), cause="interrupted", submit_again=True),
    Fault("runner-killed", (LOCAL,), partial(_to_the_runner, signal.SIGKILL), cause="runner was killed", submit_again=True),
    Fault("preempted", (TESTBED,), _preempt, cause="preempted"),
    Fault("preempted-at-start", (TESTBED,), _preempt, "start", cause="preempted"),
    Fault("preempted-evaluation", (TESTBED,), _preempt, "evaluation", cause="preempted"),
    Fault("time-limit", (TESTBED,), _limit_time, cause="time limit"),
    Fault("warned", (TESTBED, SITE), partial(_signal_job, "USR2", ""), cause="time limit"),
    Fault("step-killed", (TESTBED, SITE), partial(_signal_job, "KILL", ".0"), cause="killed|without a word"),
    Fault("requeued", (TESTBED, SITE), _requeue, cause="requeued"),
    Fault("node-down", (TESTBED,), _node_down, cause="failed|node failure|without a word|requeued"),
    Fault("controller-restarted", (TESTBED,), partial(_restart, "slurmctld")),
    Fault("accounting-down", (TESTBED,), partial(_restart, "slurmdbd")),
    Fault("submitter-killed", (TESTBED, SITE), _kill_submitter, "submission"),
    Fault("submitted-twice", (LOCAL, TESTBED, SITE), _submit_twice, "submission"),
)


def draw(place: str, count: int, rng: random.Random, only: Sequence[str] = ()) -> list[Fault]:
    """`count` faults of those that can be made at this place: every one before any comes again. Raises UserError."""
    possible = {fault.name: fault for fault in CATALOGUE if place in fault.places}
    for name in only:
        if name not in possible:
            raise UserError(f"--only {name}: on {place} {choices_text(name, list(possible))}")
    deck: list[Fault] = []
    drawn: list[Fault] = []
    while len(drawn) < count:
        if not deck:  # a job is submitted for the first time only once
            deck = [fault for name, fault in possible.items() if name in (only or possible) and not (drawn and fault.when == "submission")]
            if not deck:
                break
            rng.shuffle(deck)
        drawn.append(deck.pop())
    return drawn
