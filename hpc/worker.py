"""What runs on the nodes of a Slurm job: an array's element under submitit, and the batch script's last word.

Exit codes never decide alone: the supervisors leave the outcome of every run in its folder, and `epilogue`, called by the
batch script after all nodes have ended, requeues the job where work is left.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from hpc import slurm
from hpc.files import read_json
from hpc.journal import dependents
from hpc.runs import RunFolder, end_attempt
from hpc.supervisor import Place, Signals, Supervisor

MAX_CRASHES_WITHOUT_PROGRESS = 3


@dataclass(frozen=True)
class Element:
    """What submitit pickles: where the array's list stands and which element this is."""

    array_file: str
    index: int

    def __call__(self) -> list[str]:
        """Outcomes of the element's runs; side by side as far as the node has room."""
        signals = Signals().install()  # instead of submitit's handlers
        array = read_json(Path(self.array_file))
        run_dirs = [Path(path) for path in array["elements"][self.index]]
        allocation = slurm.allocation()
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
        if allocation is not None and allocation.node == 0 and signals.first is not None:
            _release_dependents(Path(self.array_file), allocation, run_dirs)
        return [outcomes.get(path, "not started") for path in run_dirs]


def _release_dependents(array_file: Path, allocation: slurm.Allocation, run_dirs: list[Path]) -> None:
    """A run that completed inside a grace time is TIMEOUT or PREEMPTED to Slurm; its evaluations start all the same."""
    if not all(RunFolder(path).is_complete for path in run_dirs):
        return
    for name in dependents(array_file.parent.parent, allocation):
        try:
            slurm.release_dependency(name)
        except slurm.SlurmError as error:
            print(f"equihpc: could not release {name}: {error}; the next submit starts it", flush=True)


def give_up(run: RunFolder) -> str | None:
    """Marks a run as failed that crashed too often without getting on, and says why; None where another try is due."""
    attempts = run.read_attempts()
    crashes = 0
    for attempt in reversed(attempts):
        if attempt.outcome not in ("crashed", "") or attempt.start["step"] != attempts[-1].start["step"]:
            break
        crashes += 1
    if crashes < MAX_CRASHES_WITHOUT_PROGRESS:
        return None
    reason = f"{crashes} restarts without progress; the last one: {attempts[-1].cause or 'ended without a word'}"
    end_attempt(run, attempts[-1].number, "failed", reason)
    return reason


def epilogue(array_file: Path, exit_code: int) -> int:
    """Called by the batch script when all nodes have ended. Requeues the job where work is left; returns its exit code."""
    allocation = slurm.allocation()
    assert allocation is not None
    array = read_json(array_file)
    run_dirs = [Path(path) for path in array["elements"][allocation.index or 0]]
    runs = [RunFolder(path) for path in run_dirs]
    if all(run.is_complete for run in runs):
        return 0
    again = False
    for run in runs:
        attempts = [a for a in run.read_attempts() if a.start.get("job") == allocation.name]
        mine = [a for a in attempts if a.start.get("restarts") == allocation.restarts]
        last = mine[-1] if mine else None
        if run.is_complete or run.cancel_mark.exists() or (last and last.outcome in ("failed", "waiting", "cancelled")):
            continue
        again = give_up(run) is None or again
    if not again:
        return exit_code or 1
    facts = slurm.job_facts(allocation.name)
    if facts.get("JobState") not in ("RUNNING", "CONFIGURING"):
        return exit_code or 1  # cancelled: a requeue would resurrect it
    print(f"equihpc: requeue {allocation.name}", flush=True)
    slurm.requeue(allocation.name)
    time.sleep(600)  # Slurm ends this script now; an exit code of its own would compete with the requeue
    return 1


if __name__ == "__main__":
    sys.exit(epilogue(Path(sys.argv[1]), int(sys.argv[2])))
