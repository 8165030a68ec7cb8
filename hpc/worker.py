"""What runs on the nodes of a Slurm job: an array's element under submitit, and the batch script's last word.

Exit codes never decide alone: the supervisors leave the outcome of every run in its folder, and `epilogue`, called by the
batch script after all nodes have ended, requeues the job where work is left.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from hpc import slurm
from hpc.files import read_json
from hpc.journal import dependents
from hpc.runs import Attempt, RunFolder, end_attempt, start_attempt
from hpc.supervisor import Place, Signals, Supervisor

MAX_RESTARTS_WITHOUT_PROGRESS = 3


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
                if allocation is not None and _failed_here(RunFolder(path), allocation):
                    outcomes[path] = "failed"  # it was requeued for its neighbours' sake
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


def _failed_here(run: RunFolder, allocation: slurm.Allocation) -> bool:
    attempts = run.read_attempts()
    return bool(attempts) and attempts[-1].outcome == "failed" and attempts[-1].start.get("job") == allocation.name


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


def give_up(run: RunFolder) -> str | None:
    """Marks a run as failed that was restarted too often without a new checkpoint, and says why; None where another try is due.

    Preemptions do not count: they are nobody's fault.
    """
    attempts = run.read_attempts()
    furthest = max((attempt.start["step"] for attempt in attempts), default=0)
    first = next((index for index, attempt in enumerate(attempts) if attempt.start["step"] == furthest), 0)
    counted = [a for a in attempts[first:] if a.outcome in ("crashed", "") or a.cause == "time limit"]
    if len(counted) < MAX_RESTARTS_WITHOUT_PROGRESS or run.saved_step > furthest:
        return None
    reason = f"{len(counted)} restarts without a new checkpoint; the last one: {counted[-1].cause or 'ended without a word'}"
    end_attempt(run, attempts[-1].number, "failed", reason)
    return reason


def epilogue(array_file: Path, exit_code: int) -> int:
    """Called by the batch script when all nodes have ended. Requeues the job where work is left; returns its exit code.

    0 also where some packed run failed: Slurm's dependents start, and the marker decides for each of them.
    """
    allocation = slurm.allocation()
    assert allocation is not None
    array = read_json(array_file)
    runs = [RunFolder(Path(path)) for path in array["elements"][allocation.index or 0]]
    facts = slurm.job_facts(allocation.name)
    preempted = facts.get("PreemptTime", "None") not in ("None", "", "Unknown")
    here = {run.path: [a for a in run.read_attempts() if _is_here(a, allocation)] for run in runs}
    if not any(here.values()):
        for run in runs:
            if not run.is_complete and not run.cancel_mark.exists() and not _failed_here(run, allocation):
                _record_no_start(run, allocation, exit_code, preempted)
    again = False
    for run in runs:
        last = run.read_attempts()[-1:]
        settled = bool(last) and _is_here(last[0], allocation) and last[0].outcome in ("failed", "waiting", "cancelled")
        if run.is_complete or run.cancel_mark.exists() or settled or _failed_here(run, allocation):
            continue
        again = give_up(run) is None or again
    if not again:
        return 0 if any(run.is_complete for run in runs) else exit_code or 1
    if facts.get("JobState") not in ("RUNNING", "CONFIGURING"):
        return exit_code or 1  # cancelled: a requeue would resurrect it
    print(f"equihpc: requeue {allocation.name}", flush=True)
    slurm.requeue(allocation.name)
    time.sleep(600)  # Slurm ends this script now; an exit code of its own would compete with the requeue
    return 1


def _is_here(attempt: Attempt, allocation: slurm.Allocation) -> bool:
    return attempt.start.get("job") == allocation.name and attempt.start.get("restarts") == allocation.restarts


def _record_no_start(run: RunFolder, allocation: slurm.Allocation, exit_code: int, preempted: bool) -> None:
    """An execution that never came to the supervisor counts too, or it would be repeated for ever."""
    record = {"host": os.uname().nodename, "job": allocation.name, "restarts": allocation.restarts, "step": run.saved_step}
    number = start_attempt(run, record)
    if preempted:
        end_attempt(run, number, "stopped", "preempted")
    else:
        end_attempt(run, number, "crashed", f"the task did not start, exit code {exit_code}", "see the batch job's own log")


if __name__ == "__main__":
    sys.exit(epilogue(Path(sys.argv[1]), int(sys.argv[2])))
