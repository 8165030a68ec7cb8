"""`equihpc rehearse`: a job's small variant twice, once undisturbed and once with faults, and whether both came to the same.

All is done with the commands that people use, and seen in the files that scripts may read.
"""

from __future__ import annotations

import bisect
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hpc import faults, slurm, testbed
from hpc.cluster import Cluster
from hpc.errors import EquiHPCError, UserError
from hpc.faults import LOCAL, SITE, TESTBED, Fault, Missed, Target
from hpc.files import read_json, read_lines, write_json

BUSY = ("pending", "running", "requeued")
SIGNALLED = re.compile("preempted|time limit|interrupted|requeued")  # causes of which the run was told
HITS_WITHOUT_PROGRESS = 2  # one less than a run may be restarted without a new checkpoint, by default
MEND_SECONDS = 5.0  # between two looks at the testbed's daemons
HANG_SECONDS = 15.0  # patience with a silent rank, where ranks are stopped on purpose
GONE_SECONDS = 60.0  # for what is left over to go away by itself
DIED = "failed|without a word|killed|no word|did not start"  # what a run may say when a daemon of Slurm crashed
MEASURED = re.compile(r"_per_s$|_s$|_seconds$|_gb$|^mfu$|^time$")  # of the machine: differs between two equal runs
Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    file: Path
    cluster_name: str
    cluster: Cluster
    runs_dir: Path
    sets: tuple[str, ...]
    variant: str | None
    num_faults: int
    seed: int
    node_hours: float | None  # ceiling of both passes together
    only: tuple[str, ...]
    hang_seconds: float | None
    rtol: float


@dataclass
class Hit:
    """A fault that was injected."""

    fault: str
    cause: str  # what the run must say of it
    run: str  # id; of a submission the job's name
    time: float
    attempt: int = 0  # that was under way, or the next one
    step: int = 0
    said: str = ""  # the cause of the attempt that it ended
    lost_steps: int | None = None
    seconds_to_next_step: float | None = None
    seconds_from_end: float | None = None  # from the attempt's end to the next step
    problem: str = ""

    @property
    def survived(self) -> bool:
        return not self.problem


@dataclass
class Verdict:
    folder: Path
    seed: int
    hits: list[Hit]
    not_injected: list[str]
    accidents: list[str]  # faults that nobody injected
    differences: list[str]
    undisturbed_seconds: float
    disturbed_seconds: float
    num_runs: int

    @property
    def ok(self) -> bool:
        return not self.differences and all(hit.survived for hit in self.hits)

    def to_json(self) -> dict[str, Any]:
        hits = [{**asdict(hit), "survived": hit.survived} for hit in self.hits]
        return {**asdict(self), "folder": str(self.folder), "ok": self.ok, "hits": hits}


def place_of(cluster: Cluster) -> str:
    if cluster.scheduler == "local":
        return LOCAL
    return TESTBED if cluster.slurm_conf == str(testbed.slurm_conf()) else SITE


def profile_of(options: Options) -> Cluster:
    """The profile with its development partition, short patience with silent ranks, and a ledger and bad nodes of its own."""
    cluster, place = options.cluster, place_of(options.cluster)
    changes: dict[str, Any] = {"ledger": None}
    if place == SITE:
        if cluster.development is None and cluster.development_qos is None:
            where = "development or development_qos"
            raise UserError(f"--cluster {options.cluster_name}: the profile names no {where}; a rehearsal runs nowhere else")
        changes |= {"partition": cluster.development or cluster.partition, "qos": cluster.development_qos or cluster.qos}
    else:
        changes["hang_seconds"] = options.hang_seconds or min(cluster.hang_seconds, HANG_SECONDS)
    return cluster.model_copy(update=changes)


def rehearse(options: Options, say: Say) -> Verdict:
    """Raises UserError before anything is started where the job, the faults or the ceiling do not fit."""
    place, rng = place_of(options.cluster), random.Random(options.seed)
    if place == LOCAL and options.node_hours is not None:
        raise UserError("--node-hours is for Slurm: the local profile has no nodes to count")
    if place == SITE and options.hang_seconds is not None:
        raise UserError("--hang-seconds is for ranks that are stopped, which is not done on a site")
    drawn = faults.draw(place, options.num_faults, rng, options.only)
    profile = profile_of(options)
    rehearsals = options.runs_dir.resolve() / "rehearsals"
    rehearsals.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder = Path(tempfile.mkdtemp(prefix=f"{options.file.stem}-{time.strftime('%Y%m%d-%H%M%S')}-", dir=rehearsals))
    place_file = folder / "config" / "equihpc" / "slurm" / f"rehearsal-{options.cluster_name}.yaml"
    place_file.parent.mkdir(parents=True, mode=0o700)
    write_json(place_file, profile.model_dump(mode="json"))  # JSON is YAML
    ceiling = None if place == LOCAL else options.node_hours if options.node_hours is not None else 1.0
    first = Pass(options, profile, folder / "undisturbed", place, [], random.Random(0), ceiling, say)
    hours = first.estimated_node_hours()
    if ceiling is not None and hours is not None and 2 * hours > ceiling:
        raise UserError(f"--node-hours {ceiling:g}: the two passes are estimated at {2 * hours:.2f} node hours")
    if ceiling is not None and hours is None:
        say("the entries give no estimate of node hours; the queue is watched for the ceiling alone")
    say(f"undisturbed, {len(first.plan['runs'])} runs in {folder}")
    first.play()
    if first.problems:
        raise EquiHPCError(f"the undisturbed runs did not complete: {'; '.join(first.problems)}")
    left = None if ceiling is None else ceiling - first.node_hours
    second = Pass(options, profile, folder / "disturbed", place, drawn, rng, left, say)
    say(f"undisturbed: all complete after {first.seconds:.0f} s; now with {', '.join(fault.name for fault in drawn)}")
    second.play(patience_seconds=3 * first.seconds + 240 * len(drawn) + 300)
    second.account()
    differences = [*second.problems, *compare(first, second, options.rtol), *early_or_twice(second), *second.leftovers()]
    missing = list((Counter(fault.name for fault in drawn) - Counter(hit.fault for hit in second.hits)).elements())
    if drawn and not second.hits:
        differences.append("no fault could be injected: the runs are too short, or have no checkpoints")
    accidents = [name for each in (first, second) for _, name in each.accidents]
    seconds = first.seconds, second.seconds
    verdict = Verdict(folder, options.seed, second.hits, missing, accidents, differences, *seconds, len(first.plan["runs"]))
    write_json(folder / "verdict.json", verdict.to_json())
    return verdict


# --- one pass ----------------------------------------------------------------------------------------------------------


class Pass:
    """The job once, with faults or without."""

    def __init__(
        self,
        options: Options,
        profile: Cluster,
        runs_dir: Path,
        place: str,
        drawn: Sequence[Fault],
        rng: random.Random,
        node_hours: float | None,
        say: Say,
    ):
        self.options, self.profile, self.runs_dir, self.place = options, profile, runs_dir, place
        self.rng, self.ceiling, self.say = rng, node_hours, say
        self.todo = [(fault, rng.uniform(0.05, 0.6)) for fault in drawn]  # and the share of its run's steps that is done by then
        self.hits: list[Hit] = []
        self.problems: list[str] = []
        self.node_hours = 0.0
        self.seconds = 0.0
        self.accidents: list[tuple[float, str]] = []  # (when it was seen, the daemon of the testbed that died by itself)
        self.submissions = 1
        self._mended = time.time()
        self._crashes = faults.crashes() if place == TESTBED else Counter[str]()
        self._looked = 0.0
        self._running: set[str] = set()  # what Slurm calls the elements that run
        runs_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        variant = [] if options.variant is None else ["--variant", options.variant]
        self.job_arguments = [str(options.file), "--cluster", f"rehearsal-{options.cluster_name}", *variant]
        self.job_arguments += [word for text in options.sets for word in ("--set", text)]
        self.plan: dict[str, Any] = json.loads(self.equihpc("plan", *self.job_arguments, "--json"))
        self.job_dir = runs_dir / self.plan["job"]
        self.runs: dict[str, dict[str, Any]] = {run["id"]: run for run in self.plan["runs"]}
        upstream = {after for run in self.runs.values() for after in run["after"]}
        self.evaluations = {run_id for run_id, run in self.runs.items() if run["after"] and run_id not in upstream}
        self.seen = Recorder({run_id: self.job_dir / run["stage"] / run_id for run_id, run in self.runs.items()})

    # commands

    def start(self, *arguments: str, path: str | None = None) -> subprocess.Popen[str]:
        environment = {**os.environ, "XDG_CONFIG_HOME": str(self.runs_dir.parent / "config"), "EQUIHPC_RUNS": str(self.runs_dir)}
        if path is not None:
            environment["PATH"] = path
        command = [sys.executable, "-m", "hpc.cli", *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True)

    def equihpc(self, *arguments: str) -> str:
        """Raises UserError or EquiHPCError with what the command said."""
        process = self.start(*arguments)
        out, err = process.communicate()
        if process.returncode:
            error = UserError if process.returncode == 2 else EquiHPCError
            raise error(err.strip().removeprefix("equihpc: ") or f"equihpc {arguments[0]} ended with {process.returncode}")
        return out

    def submit(self, path: str | None = None) -> subprocess.Popen[str]:
        return self.start("submit", *self.job_arguments, "--json", path=path)

    def status(self) -> tuple[list[dict[str, Any]], str]:
        """The runs, and a note where Slurm did not answer."""
        found = json.loads(self.equihpc("status", self.plan["job"], "--json"))
        return found["runs"], found["note"]

    def attempts(self, run_id: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.equihpc("why", run_id, "--json"))["attempts"]
        return found

    # the course of it

    def play(self, patience_seconds: float = math.inf) -> None:
        """Submit, look, inject what is due, until all runs are complete or nothing can go on."""
        began = time.monotonic()
        poll = self.profile.poll_seconds if self.place == SITE else 0.5
        try:
            with self.seen.watching(0.1 if self.place != SITE else 2.0):
                self._first_submission()
                while not self._is_over(time.monotonic() - began > patience_seconds):
                    time.sleep(poll)
        except BaseException:  # Ctrl-C too: nothing goes on that nobody watches
            self.start("cancel", self.plan["job"], "--json").communicate()
            raise
        self.seconds = time.monotonic() - began

    def _is_over(self, is_late: bool) -> bool:
        statuses, note = self.status()
        if all(run["state"] == "complete" for run in statuses):
            return True
        self._look_at_queue()
        self._mend()
        if self.ceiling is not None and self.node_hours > self.ceiling:
            return self._give_up(f"the ceiling of node hours was reached: {self.node_hours:.3f} are used")
        if is_late:
            return self._give_up(f"not complete in time: {_states(statuses)}")
        if not note and not any(run["state"] in BUSY for run in statuses):
            to_mend = {fault.name for fault in faults.CATALOGUE if fault.submit_again}
            if self.profile.requeue == "self" and self.submissions > sum(hit.fault in to_mend for hit in self.hits):
                return self._give_up(f"nothing goes on: {_states(statuses)}")
            self.submissions += 1
            self.say("submitted again")
            self.equihpc("submit", *self.job_arguments, "--json")
            return False
        self._inject_due(statuses)
        return False

    def _mend(self) -> None:
        if self.place == TESTBED and time.time() - self._mended > MEND_SECONDS:
            self._mended = time.time()
            faults.mend_testbed()
            for name in (faults.crashes() - self._crashes).elements():
                self._crashes[name] += 1
                self.accidents.append((self._mended, name))
                self.say(f"{name} crashed by itself")

    def _give_up(self, why: str) -> bool:
        self.problems.append(why)
        self.equihpc("cancel", self.plan["job"], "--json")
        return True

    def _first_submission(self) -> None:
        planned = [(fault, share) for fault, share in self.todo if fault.when == "submission"]
        for fault, share in sorted(planned, key=lambda pair: faults.CATALOGUE.index(pair[0])):  # one that dies before two at once
            self._inject(fault, None)
            self.todo.remove((fault, share))
        process = self.submit()
        out, err = process.communicate()
        if process.returncode:
            raise EquiHPCError(f"submit ended with {process.returncode}: {err or out}")
        names = self._queued()
        planned_elements = sum(len(array["elements"]) for array in self.plan["arrays"])
        if planned and self.profile.requeue == "self" and len(names) > planned_elements:
            self.problems.append(f"submitted twice: {len(names)} elements are in the queue, {planned_elements} were planned")

    def _queued(self) -> list[str]:
        """Elements of this pass in Slurm's queue: state and nodes, in squeue's words."""
        if self.place == LOCAL:
            return []
        uids = {record["uid"] for record in read_lines(self.job_dir / ".equihpc" / "journal.jsonl") if record["event"] == "intent"}
        text = slurm.call(["squeue", "--me", "--noheader", "--array", "--format=%i|%T|%D|%j"], self.profile.slurm_conf)
        return [line for line in text.splitlines() if line.rpartition(".")[2] in uids]

    def _look_at_queue(self) -> None:
        if self.place == LOCAL:
            return
        try:
            lines = [line.split("|", 3) for line in self._queued()]
        except slurm.SlurmError:
            return
        now = time.monotonic()
        running = [(name, int(num_nodes)) for name, state, num_nodes, _ in lines if state == "RUNNING"]
        if self._looked:
            self.node_hours += sum(num_nodes for _, num_nodes in running) * (now - self._looked) / 3600
        self._looked = now
        self._running = {name for name, _ in running}

    def estimated_node_hours(self) -> float | None:
        billed = self.plan["billed_gpu_hours"]
        return None if billed is None else float(billed) / self.profile.processes_per_node

    # faults

    def _inject_due(self, statuses: Sequence[dict[str, Any]]) -> None:
        free = list(statuses)
        for fault, share in list(self.todo):
            if possible := [run for run in free if self._fits(fault, share, run)]:
                run = self.rng.choice(possible)
                free.remove(run)
                if self._inject(fault, run):
                    self.todo.remove((fault, share))

    def _fits(self, fault: Fault, share: float, run: dict[str, Any]) -> bool:
        run_id, history = run["id"], self.seen.of(run["id"])
        attempts, now = history.attempts(), history.current()
        mine = [hit for hit in self.hits if hit.run == run_id]
        if fault.when == "start":
            starts = run["slurm_job"] in self._running and (run["state"] != "running" or not history.steps_of(now))
            return starts and not mine and run_id not in self.evaluations
        if run["state"] != "running" or (run_id in self.evaluations) != (fault.when == "evaluation"):
            return False
        if history.num_checkpoints() < fault.num_checkpoints:
            return False
        last = [hit for hit in mine if hit.cause and hit.attempt >= now]
        stuck = [
            hit
            for hit in mine
            if hit.cause and hit.attempt and attempts[min(hit.attempt, len(attempts)) - 1]["step"] == attempts[-1]["step"]
        ]
        if last or len(stuck) >= HITS_WITHOUT_PROGRESS or not history.steps_of(now):
            return False
        total = run["num_steps"]
        return bool(share * total <= run["step"] < 0.9 * total) if total > 1 else True

    def _inject(self, fault: Fault, run: dict[str, Any] | None) -> bool:
        run_id = self.plan["job"] if run is None else run["id"]
        path = self.job_dir if run is None else Path(run["path"])
        job = None if run is None else run["slurm_job"]
        target = Target(path, job, self.profile.slurm_conf, self.runs_dir.parent, lambda found: self.submit(found), self.rng)
        hit = Hit(fault.name, fault.cause, run_id, time.time())
        if run is not None:
            history = self.seen.of(run_id)
            hit.attempt = history.current()
            hit.step = max(history.steps_of(hit.attempt), default=run["step"])
        try:
            fault.inject(target)
        except (Missed, slurm.SlurmError) as error:
            self.say(f"{fault.name} missed {run_id}: {error}")
            return False
        self.say(f"{fault.name} -> {run_id}" + (f", attempt {hit.attempt}, step {hit.step}" if run is not None else ""))
        self.hits.append(hit)
        return True

    def account(self) -> None:
        """What each fault did, from `why` and from the steps that were seen."""
        found = {run_id: self.attempts(run_id) for run_id in {hit.run for hit in self.hits} & self.runs.keys()}
        for hit in self.hits:
            if hit.run not in found:
                continue
            attempts, history = found[hit.run], self.seen.of(hit.run)
            if attempts[-1]["outcome"] != "complete":
                hit.problem = f"the run is not complete: {attempts[-1]['outcome'] or 'no end'} {attempts[-1]['cause']}"
                continue
            if not hit.cause:
                continue
            ended = [a for a in attempts if a["attempt"] >= hit.attempt and a["ended"] and a["outcome"] != "waiting"]
            victim = next((a for a in ended if re.search(hit.cause, a["cause"])), None)
            if victim is None and ended and ended[0]["outcome"] != "complete":  # a neighbour's fault, or an accident, was quicker
                others = [other.cause for other in self.hits if other.cause and other.time >= ended[0]["time"]]
                others += [DIED for when, _ in self.accidents if when >= ended[0]["time"]]
                victim = ended[0] if any(re.search(cause, ended[0]["cause"]) for cause in others) else None
            if victim is None and ended and ended[0]["outcome"] == "complete" and SIGNALLED.search(hit.cause):
                hit.said = "complete before it had to end"
                continue
            if victim is None:
                said = "; ".join(f"{a['outcome']} {a['cause']}".strip() for a in ended) or "nothing"
                hit.problem = f"why says {said!r}, not {hit.cause!r}"
                continue
            hit.said = victim["cause"]
            hit.lost_steps = history.lost_steps(victim["attempt"])
            resumed = history.next_step(victim["attempt"])
            if resumed is not None:
                ended_at = max(victim["ended"], hit.time)  # of an attempt without a word it is when it last gave a sign of life
                hit.seconds_to_next_step, hit.seconds_from_end = resumed - hit.time, resumed - ended_at
            allowed = self._may_lose(hit, victim)
            if hit.lost_steps is not None and hit.lost_steps > allowed:
                hit.problem = f"{hit.lost_steps} steps were lost, at most {allowed} may be"

    def _may_lose(self, hit: Hit, victim: dict[str, Any]) -> int:
        """Steps: one when the run had time for a checkpoint, else an interval and what the faults themselves take of checkpoints."""
        config, total = self.runs[hit.run]["config"], self.runs[hit.run]["num_steps"]
        if not self.seen.of(hit.run).saves:
            return int(total) or sys.maxsize
        by_name = {fault.name: fault for fault in faults.CATALOGUE}
        # `why` names what was first: a run that is preempted and killed before its last checkpoint is whole was "preempted"
        struck = [hit, *(other for other in self.hits if other.run == hit.run and other.attempt == victim["attempt"])]
        had_time = SIGNALLED.search(victim["cause"]) and all(SIGNALLED.search(one.cause) for one in struck if one.cause)
        interval = int(config.get("checkpoint_every") or total)
        return 1 if had_time else interval * (1 + max(by_name[one.fault].lost_checkpoints for one in struck))

    def leftovers(self) -> list[str]:
        """Processes and Slurm jobs of this pass that are still there when they had time to go."""
        deadline = time.monotonic() + GONE_SECONDS
        while True:
            text = str(self.job_dir)
            alive = [pid for pid, words in _own_processes() if any(text in word for word in words)]
            queued = self._queued()
            if not alive and not queued:
                return []
            if time.monotonic() > deadline:
                return [f"process {pid} is left over" for pid in alive] + [f"Slurm job {line} is left over" for line in queued]
            time.sleep(1)


def _own_processes() -> Iterator[tuple[int, list[str]]]:
    for word in ("hpc.rank", "hpc.local", "hpc.worker", "submitit.core._submit"):
        yield from faults.processes(word).items()


def _states(statuses: Sequence[dict[str, Any]]) -> str:
    bad = [run for run in statuses if run["state"] != "complete"]
    return ", ".join(f"{run['id']} {run['state']} {run['cause']}".strip() for run in bad[:5])


# --- what happened, seen from outside ----------------------------------------------------------------------------------


@dataclass
class History:
    """What a run folder told over time."""

    path: Path
    samples: list[tuple[float, int, bool]] = field(default_factory=list)  # (when it was written, step, progress.json?) by time
    saves: bool = False  # it writes checkpoints
    _last: dict[str, int] = field(default_factory=dict)

    def look(self) -> None:
        for name in ("progress.json", "metrics.jsonl"):
            try:
                written = (self.path / name).stat().st_mtime_ns
            except FileNotFoundError:
                continue
            if written == self._last.get(name):
                continue
            self._last[name] = written
            records = [read_json(self.path / name)] if name == "progress.json" else read_lines(self.path / name)
            if records and records[-1]:
                bisect.insort(self.samples, (written / 1e9, int(records[-1]["step"]), name == "progress.json"))
        self.saves = self.saves or (self.path / "checkpoints").is_dir()

    def attempts(self) -> list[dict[str, Any]]:
        return [record for record in read_lines(self.path / "attempts.jsonl") if record["event"] == "start"]

    def current(self) -> int:
        """The number of the attempt that is under way, or else of the next one."""
        last = read_lines(self.path / "attempts.jsonl")[-1:]
        return len(self.attempts()) + (not last or last[0]["event"] == "end")

    def num_checkpoints(self) -> int:
        return sum(bool(faults.CHECKPOINT.fullmatch(path.name)) for path in self.path.glob("checkpoints/*"))

    def steps_of(self, number: int) -> list[int]:
        """The steps that an attempt was through with; not those of a log that it only cut to where it began."""
        starts = [float(record["time"]) for record in self.attempts()]
        if not 1 <= number <= len(starts):
            return []
        until = starts[number] if number < len(starts) else math.inf
        begun = next((when for when, _, is_progress in self.samples if is_progress and starts[number - 1] <= when < until), math.inf)
        return [step for when, step, _ in self.samples if begun <= when < until]

    def lost_steps(self, number: int) -> int | None:
        """Steps of an attempt that a later one did again; None where nothing was seen before or after."""
        before = self.steps_of(number)
        after = next((steps for later in range(number + 1, len(self.attempts()) + 1) if (steps := self.steps_of(later))), None)
        return max(0, max(before) - min(after) + 1) if before and after else None

    def next_step(self, number: int) -> float | None:
        """When a later attempt was through with its first step."""
        starts = [float(record["time"]) for record in self.attempts()]
        return next((when for when, _, is_progress in self.samples if is_progress and number < len(starts) and when > starts[number]), None)


class Recorder:
    """Looks at the folders of all runs again and again; the only one who knows at which step an attempt was killed."""

    def __init__(self, folders: dict[str, Path]):
        self._histories = {run_id: History(path) for run_id, path in folders.items()}

    def of(self, run_id: str) -> History:
        return self._histories[run_id]

    @contextmanager
    def watching(self, every_seconds: float) -> Iterator[None]:
        over = threading.Event()

        def look() -> None:
            while not over.wait(every_seconds):
                for history in self._histories.values():
                    history.look()

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            for history in self._histories.values():
                history.look()


# --- the comparison ----------------------------------------------------------------------------------------------------


def compare(first: Pass, second: Pass, rtol: float) -> list[str]:
    """Where the results or the logged steps of the two passes differ. rtol 0: bit for bit, the weights too."""
    found = []
    for run_id, run in first.runs.items():
        name = f"{run['stage']}/{run_id}"
        one, other = (read_json(each.job_dir / run["stage"] / run_id / "result.json") for each in (first, second))
        if one is None or other is None:
            found.append(f"{name}: no result")
            continue
        found += [f"{name}: {text}" for text in differences(one, other, rtol)]
        logs = [read_lines(each.job_dir / run["stage"] / run_id / "metrics.jsonl") for each in (first, second)]
        steps = [[record["step"] for record in log] for log in logs]
        if steps[0] != steps[1]:
            doubled = sorted({step for step in steps[1] if steps[1].count(step) > 1})
            missing = sorted(set(steps[0]) - set(steps[1]))
            found.append(f"{name}: metrics.jsonl has other steps; doubled: {doubled[:5]}, missing: {missing[:5]}")
            continue
        for mine, theirs in zip(*logs, strict=True):
            if text := differences(mine, theirs, rtol):
                found.append(f"{name}: step {mine['step']}: {text[0]}")
                break
    return found


def differences(one: Any, other: Any, rtol: float, at: str = "") -> list[str]:
    """Of two JSON values, without what is measured of the machine; with a tolerance also without the hashes of what may differ a little."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [key for key in {**one, **other} if not MEASURED.search(key) and not (rtol and key in ("weights_sha256", "upstream_sha256"))]
        return [text for key in keys for text in differences(one.get(key), other.get(key), rtol, f"{at}.{key}".lstrip("."))]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [text for i, pair in enumerate(zip(one, other, strict=True)) for text in differences(*pair, rtol, f"{at}[{i}]")]
    if one == other or (isinstance(one, float) and isinstance(other, float) and math.isclose(one, other, rel_tol=rtol)):
        return []
    return [f"{at} is {other!r}, undisturbed {one!r}"]


def early_or_twice(done: Pass) -> list[str]:
    """Runs that came to their end more than once, or began before what they wait for was complete."""
    found = []
    for run_id, run in done.runs.items():
        folder = done.job_dir / run["stage"] / run_id
        records = read_lines(folder / "attempts.jsonl")
        ends = [record for record in records if record["event"] == "end"]
        completed = sum(record["outcome"] == "complete" for record in ends)
        if completed > 1:
            found.append(f"{run['stage']}/{run_id}: came to its end {completed} times")
        idle = {record["attempt"] for record in ends if record["outcome"] == "waiting"}
        began = min((r["time"] for r in records if r["event"] == "start" and r["attempt"] not in idle), default=math.inf)
        for after in run["after"]:
            complete = read_json(done.job_dir / done.runs[after]["stage"] / after / "COMPLETE")
            if began < (math.inf if complete is None else complete["time"]):
                found.append(f"{run['stage']}/{run_id}: began before {after} was complete")
    return found


def summary(hits: Sequence[Hit]) -> list[tuple[str, int, int, int | None, float | None, float | None]]:
    """Per fault: (name, injected, survived, most steps lost, median seconds to the next step, and of those from the attempt's end)."""
    rows = []
    for name in dict.fromkeys(hit.fault for hit in hits):
        mine = [hit for hit in hits if hit.fault == name]
        lost = [hit.lost_steps for hit in mine if hit.lost_steps is not None]
        seconds = [hit.seconds_to_next_step for hit in mine if hit.seconds_to_next_step is not None]
        from_end = [hit.seconds_from_end for hit in mine if hit.seconds_from_end is not None]
        survived = sum(hit.survived for hit in mine)
        middle = statistics.median(seconds) if seconds else None
        rows.append((name, len(mine), survived, max(lost, default=None), middle, statistics.median(from_end) if from_end else None))
    return rows
