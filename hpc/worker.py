"""What runs on the nodes of a Slurm job: an array's element under submitit, and the batch script's last word.

Exit codes never decide alone: the supervisors leave the outcome of every run in its folder, and `epilogue`, called by the
batch script after all nodes have ended, requeues the job where work is left.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from hpc import budget, nodes, notify, slurm
from hpc.budget import NODE_FAILURE, Rules, Verdict
from hpc.files import locked, read_json
from hpc.journal import Journal, dependents
from hpc.runs import Attempt, RunFolder, start_attempt
from hpc.supervisor import Place, Signals, Supervisor
from hpc.verdict import why_stopped

SETTLED = ("failed", "waiting", "cancelled")  # outcomes after which this job does not run it again
# Slurm's states of a job that ends or has ended; a running one can have others than RUNNING: CONFIGURING, SIGNALING, …
OVER = (
    "COMPLET",
    "CANCELLED",
    "FAILED",
    "TIMEOUT",
    "PREEMPTED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
    "REVOKED",
    "PENDING",
)
PATIENCE_SECONDS = 900.0  # with a Slurm that does not answer
T = TypeVar("T")


@dataclass(frozen=True)
class Element:
    """What submitit pickles: where the array's list stands and which element this is."""

    array_file: str
    index: int | None  # None: as Slurm says

    def __call__(self) -> list[str]:
        """Outcomes of the element's runs; side by side as far as the node has room."""
        signals = Signals().install()  # instead of submitit's handlers
        array = read_json(Path(self.array_file))
        allocation = slurm.allocation()
        index = self.index if self.index is not None else (allocation and allocation.index) or 0
        run_dirs = [Path(path) for path in array["elements"][index]]
        names = _names_here(Path(self.array_file), array, allocation) if allocation else set()
        slots = array["slots"]
        cores = sorted(os.sched_getaffinity(0))
        visible = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
        outcomes: dict[Path, str] = {}
        waiting = list(run_dirs)
        lock = threading.Lock()

        def work(slot: int) -> None:
            while True:
                with lock:
                    if not waiting or signals.first is not None:
                        return
                    path = waiting.pop(0)
                if _failed_here(RunFolder(path), names):
                    outcomes[path] = "failed"  # requeued for its neighbours' sake, or an earlier segment of the chain
                    continue
                gpus = array["gpus"]
                mine = tuple(visible[slot * gpus : (slot + 1) * gpus]) if slots > 1 else tuple(visible[:gpus])
                share = tuple(cores[slot::slots]) if slots > 1 else tuple(cores)
                outcomes[path] = Supervisor(RunFolder(path), Place(allocation, share, mine), signals)()

        threads = [threading.Thread(target=work, args=(slot,)) for slot in range(min(slots, len(run_dirs)))]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(timeout=0.2)  # signals are handled between two joins
        if allocation is not None and allocation.node == 0 and (signals.first is not None or array.get("chain_of")):
            _release_dependents(Path(self.array_file), allocation, run_dirs)
        return [outcomes.get(path, "not started") for path in run_dirs]


def _names_here(array_file: Path, array: dict[str, Any], allocation: slurm.Allocation) -> set[str]:
    """Slurm's names of this element in all segments of its chain; its own alone where there is none."""
    names = {allocation.name}
    if array.get("chain_of"):
        segments = (found for found in Journal(array_file.parent.parent).submitted() if found.chain_of == array["chain_of"])
        names |= {segment.name(allocation.index or 0) for segment in segments}
    return names


def _failed_here(run: RunFolder, names: set[str]) -> bool:
    last = run.read_attempts()[-1:]
    return bool(last) and last[0].outcome == "failed" and not last[0].forgiven and last[0].start.get("job") in names


def _release_dependents(array_file: Path, allocation: slurm.Allocation, run_dirs: list[Path]) -> None:
    """A run that completed inside a grace time is TIMEOUT or PREEMPTED to Slurm; its evaluations start all the same."""
    if not all(RunFolder(path).is_complete for path in run_dirs):
        return
    waiting, later_segments = dependents(array_file.parent.parent, allocation)
    for name in waiting:
        try:
            slurm.release_dependency(name)
        except slurm.SlurmError as error:
            print(f"equihpc: could not release {name}: {error}; the next submit starts it", flush=True)
    with contextlib.suppress(slurm.SlurmError):  # they would only find the work done
        slurm.cancel(later_segments)


def epilogue(array_file: Path, exit_code: int) -> int:
    """Called by the batch script when all nodes have ended. Requeues the job where work is left; returns its exit code.

    0 also where some packed run failed: Slurm's dependents start, and the marker decides for each of them.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it comes with the requeue that is asked for here
    allocation = slurm.allocation()
    assert allocation is not None
    job_dir, array = array_file.parent.parent.parent, read_json(array_file)
    runs = [RunFolder(Path(path)) for path in array["elements"][allocation.index or 0]]
    if not runs:
        return 0  # of a mirrored array: nothing is left to do after that element
    names = _names_here(array_file, array, allocation)
    rules = Rules.read(job_dir)
    time.sleep(random.uniform(0, min(5.0, 0.01 * len(array["elements"]))))  # not all elements of an array at once
    facts = _patiently(lambda: slurm.job_facts(allocation.name))
    again = []
    for run in runs:
        if run.is_complete or run.cancel_mark.exists() or _failed_here(run, names):
            continue
        try:
            outcome = _settled(run, runs, allocation, exit_code, facts)
        except OSError as error:  # without a record it could be repeated for ever
            print(f"equihpc: {run.path} is not tried again, its record cannot be written: {error}", file=sys.stderr, flush=True)
            continue
        if outcome not in SETTLED:
            again.append((run, outcome))
    is_over = facts.get("JobState", "").startswith(OVER)  # a cancelled job would be resurrected
    if again and rules.requeue == "self" and is_over:
        print(f"equihpc: {allocation.name} is {facts['JobState']}: not requeued from here, although work is left", flush=True)
    if again and rules.requeue == "self" and not is_over:
        print(f"equihpc: requeue {allocation.name}", flush=True)
        _patiently(lambda: slurm.requeue(allocation.name))
        _avoid_bad_nodes(allocation, [run for run, _ in again], rules)
        time.sleep(600)  # Slurm ends this script now; an exit code of its own would compete with the requeue
        return 1
    if array.get("chain_of") and all(run.is_complete or run.cancel_mark.exists() or _failed_here(run, names) for run in runs):
        with contextlib.suppress(slurm.SlurmError):  # later segments would find nothing to do
            slurm.cancel(dependents(array_file.parent.parent, allocation)[1])
    notify.after_end(job_dir, [run.path for run in runs])
    is_saved = bool(again) and rules.requeue == "none" and all(outcome == "stopped" for _, outcome in again)
    return 0 if is_saved or (not again and any(run.is_complete for run in runs)) else exit_code or 1


def _settled(run: RunFolder, neighbours: list[RunFolder], allocation: slurm.Allocation, exit_code: int, facts: dict[str, str]) -> str:
    """The outcome of this execution, written here where the supervisor could not. Raises OSError where that is not possible."""

    def here(other: RunFolder) -> list[Attempt]:
        return [
            a for a in other.read_attempts() if a.start.get("job") == allocation.name and a.start.get("restarts") == allocation.restarts
        ]

    found = here(run)[-1:]
    if found and found[0].end is not None:
        return found[0].outcome
    if not found and any(here(other) for other in neighbours):
        return "stopped"  # its turn on this node did not come
    with locked(run.lock, wait=False) as free:
        if not free:
            return "waiting"  # somebody else executes it
    preempted = facts.get("PreemptTime", "None") not in ("None", "", "Unknown")
    node = nodes.this_node()  # the first one of the job, whose supervisor keeps the records
    asked = "preempted" if preempted else found[0].asked if found else ""
    if asked in ("preempted", "time limit", "cancelled"):
        verdict = why_stopped(asked)
    elif asked:
        verdict = Verdict("crashed", NODE_FAILURE, f"killed after it was asked to end ({asked}), exit code {exit_code}")
    elif found:
        verdict = Verdict("crashed", NODE_FAILURE, f"the supervisor on {node} was killed, exit code {exit_code}", "", node)
    else:
        message = "see the batch job's own log"
        verdict = Verdict("crashed", NODE_FAILURE, f"the task did not start, exit code {exit_code}", message)
    record = {"host": node, "job": allocation.name, "restarts": allocation.restarts, "step": run.saved_step}
    number = found[0].number if found else start_attempt(run, record)
    if verdict.node:
        spec = read_json(run.spec)
        nodes.note(Path(spec["ledger"]), spec["cluster"], node, spec["id"], number, verdict.cause)
    return budget.settle(run, number, verdict)


def _avoid_bad_nodes(allocation: slurm.Allocation, runs: list[RunFolder], rules: Rules) -> None:
    """Slurm takes this only after the requeue."""
    bad: dict[str, str] = {}
    for run in runs:
        spec = read_json(run.spec)
        bad |= nodes.excluded(Path(spec["ledger"]), spec["cluster"], rules.node_memory_hours, run=spec["id"])
    try:
        if bad and (avoided := nodes.exclude_from(allocation.name, bad, allocation.num_nodes)):
            print(f"equihpc: {allocation.name} avoids {', '.join(avoided)}", flush=True)
    except slurm.SlurmError as error:
        print(f"equihpc: {', '.join(bad)} could not be excluded: {error}", flush=True)


def _patiently(ask: Callable[[], T]) -> T:
    """Slurm's controller may be restarting. Raises SlurmError at once where it answers with a refusal."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return ask()
        except slurm.SlurmError as error:
            is_away = any(text in str(error) for text in ("ontact slurm", "did not answer", "timed out", "onnection refused"))
            if not is_away or time.monotonic() > deadline:
                raise
            print(f"equihpc: {error}; asked again", flush=True)
            time.sleep(random.uniform(5, 15))


if __name__ == "__main__":
    sys.exit(epilogue(Path(sys.argv[1]), int(sys.argv[2])))
