"""The local runner: a process of its own that takes the runs of a job through this machine, as far as it has room.

Started by `submit`; holds the job's lock while it lives. TERM or INT: every run saves at its next step boundary, then it ends;
the next `submit` continues.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from hpc import notify
from hpc.files import locked, read_json
from hpc.runs import RunFolder
from hpc.supervisor import Place, Signals, Supervisor


@dataclass
class Room:
    """Cores and GPUs that nobody uses. A process takes `cores_per_process` cores, and a GPU where the run asks for GPUs."""

    cores: list[int]
    gpus: list[str]
    cores_per_process: int
    num_cores: int

    def take(self, processes: int, gpus: int) -> tuple[tuple[int, ...], tuple[str, ...]] | None:
        """None while there is no room. A run of more processes than the machine has cores shares them all."""
        wanted = min(processes * self.cores_per_process, self.num_cores)
        if len(self.cores) < wanted or len(self.gpus) < gpus:
            return None
        cores, self.cores = tuple(self.cores[:wanted]), self.cores[wanted:]
        taken, self.gpus = tuple(self.gpus[:gpus]), self.gpus[gpus:]
        return cores, taken

    def give(self, cores: tuple[int, ...], gpus: tuple[str, ...]) -> None:
        self.cores += cores
        self.gpus += gpus


LOCK = Path(".equihpc") / "local.lock"  # in the job's folder; held and filled with its pid by a living runner


@dataclass(frozen=True)
class Task:
    run: RunFolder
    upstream: tuple[Path, ...]
    processes: int
    gpus: int

    @classmethod
    def read(cls, path: Path) -> Task:
        spec = read_json(path / "spec.json")
        return cls(RunFolder(path), tuple(map(Path, spec["upstream"].values())), spec["layout"]["processes"], spec["layout"]["gpus"])


def held(run: RunFolder) -> bool:
    """A held run does not start; one that was also cancelled need not wait."""
    return run.hold_mark.exists() and not run.cancel_mark.exists()


def run_all(tasks: list[Task], room: Room, signals: Signals) -> dict[Path, str]:
    """Every run when its upstream is complete; one whose upstream failed is left out, a held one too; a crashed one is tried again.

    Returns the outcome per run folder.
    """
    waiting = list(tasks)
    active: dict[Path, threading.Thread] = {}
    ended: dict[Path, str] = {}
    lock = threading.Lock()

    def work(task: Task, cores: tuple[int, ...], gpus: tuple[str, ...]) -> None:
        outcome, again = "failed", False
        try:
            outcome = Supervisor(task.run, Place(None, cores, gpus), signals)()
            again = outcome == "crashed" and signals.first is None
        except OSError as error:  # the run's folder is gone or the disk is full: the others go on
            print(f"equihpc: {task.run.path}: {error}", file=sys.stderr, flush=True)
        with lock:
            if again:
                waiting.insert(0, task)
            else:
                ended[task.run.path] = outcome
            room.give(cores, gpus)
            del active[task.run.path]
        if outcome == "failed":
            notify.after_end(task.run.path.parent.parent, [task.run.path])

    while True:
        with lock:
            if signals.first is not None:
                waiting.clear()
            here = {task.run.path for task in waiting} | active.keys()
            changed = False
            for task in list(waiting):
                open_upstream = [path for path in task.upstream if not RunFolder(path).is_complete]
                if any(path not in here for path in open_upstream):
                    waiting.remove(task)
                    ended[task.run.path], changed = "skipped", True
                elif not open_upstream and not held(task.run) and (found := room.take(task.processes, task.gpus)):
                    waiting.remove(task)
                    active[task.run.path] = threading.Thread(target=work, args=(task, *found))
                    active[task.run.path].start()
            if not active and not changed:  # all is done, or what is left is held: the submit after its release starts it
                return ended
        time.sleep(0.1)


def alive(job_dir: Path) -> bool:
    """Whether a runner holds the job's lock."""
    if not (job_dir / LOCK).exists():
        return False
    with locked(job_dir / LOCK, wait=False) as free:
        return not free


def stop(job_dir: Path) -> None:
    """Ask the runner to end; returns when it has: every run has saved at a step boundary."""
    while alive(job_dir):
        text = (job_dir / LOCK).read_text()
        if text.isdigit():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(text), signal.SIGTERM)
        time.sleep(0.3)


def main(arguments: list[str]) -> int:
    job_dir, cores, num_gpus, *array_files = arguments
    signals = Signals().install()
    available = sorted(os.sched_getaffinity(0))[: int(cores)]
    visible = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu] or [str(i) for i in range(int(num_gpus))]
    run_dirs = [Path(path) for file in array_files for element in read_json(Path(file))["elements"] for path in element]
    tasks = [Task.read(path) for path in run_dirs]
    per_process = max(1, len(available) // max((task.processes for task in tasks), default=1))
    lock = Path(job_dir) / LOCK
    with locked(lock):
        lock.write_text(str(os.getpid()))
        run_all(tasks, Room(available, visible[: int(num_gpus)], per_process, len(available)), signals)
    notify.after_end(Path(job_dir), run_dirs)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
