"""The supervisor: one per run and node, without torch. It spawns the ranks, watches them and says how the attempt ended.

On several nodes the first one's supervisor leads: it publishes the meeting point, collects what the others saw and writes
the attempt's record. They talk through small files in the run's folder, so that a verdict survives any of them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from hpc import slurm
from hpc.files import locked, read_json, write_json
from hpc.rank import EXIT_DONE, EXIT_STOPPED
from hpc.runs import Ledger, RunFolder, end_attempt, start_attempt
from hpc.snapshot import environment_hash

POLL_SECONDS = 0.1
PEER_POLL_SECONDS = 1.0
GRACE_AFTER_FAILURE_SECONDS = 3.0  # the other ranks' own errors are worth having
SEEN_LATE_SECONDS = 0.5  # a process's end is noticed so much later than it happened
GRACE_AFTER_END_SECONDS = 120.0  # between the first and the last rank's regular end


@dataclass
class Signals:
    """TERM (preemption, cancel), USR2 (time limit): remembered, nothing more. Installed in the main thread."""

    first: int | None = None
    when: float = 0.0

    def install(self) -> Signals:
        for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
            signal.signal(number, self._remember)
        return self

    def _remember(self, number: int, _: object) -> None:
        if self.first is None:
            self.first, self.when = number, time.time()


@dataclass(frozen=True)
class Place:
    """What one run has on this node."""

    allocation: slurm.Allocation | None = None  # None: the local runner
    cores: tuple[int, ...] = ()
    gpus: tuple[str, ...] = ()  # as CUDA_VISIBLE_DEVICES names them; empty: CPU processes

    @property
    def node(self) -> int:
        return self.allocation.node if self.allocation else 0


@dataclass
class _Rank:
    rank: int
    process: subprocess.Popen[bytes]
    reader: threading.Thread
    ended: float | None = None


@dataclass
class Supervisor:
    """One run on one node."""

    run: RunFolder
    place: Place
    signals: Signals
    _ranks: list[_Rank] = field(default_factory=list)
    _hung: str = ""
    _outlived: str = ""
    _ended_by_us: set[int] = field(default_factory=set)
    _cancelled: bool = False
    _cancel_looked: float = 0.0

    def __call__(self) -> str:
        """The outcome of this attempt, see `runs.end_attempt`; `complete` at once for a complete run."""
        if self.run.is_complete:
            return "complete"
        spec = read_json(self.run.spec)
        leader = self.place.node == 0
        if self.run.cancel_mark.exists():
            return "cancelled"
        if not leader:
            return self._attempt(spec, leader)
        with locked(self.run.lock, wait=False) as free:
            if not free:
                print(f"equihpc: {self.run.path} is being executed by somebody else; left to them", flush=True)
                return "waiting"
            return self._attempt(spec, leader)

    def _attempt(self, spec: Mapping[str, Any], leader: bool) -> str:
        missing = [path for path in spec["upstream"].values() if not RunFolder(Path(path)).is_complete]
        if leader:
            write_json(self.run.config, spec["config"])
        number = start_attempt(self.run, self._record(spec)) if leader else 0
        if missing:
            outcome, cause, message = "waiting", f"{Path(missing[0]).name} is not complete", ""
        else:
            scratch = Path(tempfile.mkdtemp(prefix="equihpc-"))
            try:
                outcome, cause, message = self._execute(spec, scratch, leader)
            except Exception as error:
                outcome, cause, message = "crashed", f"supervisor on {socket.gethostname()}", f"{type(error).__name__}: {error}"
                self._say_bad(spec)
            finally:
                self._kill()
                shutil.rmtree(scratch, ignore_errors=True)
        if leader:
            end_attempt(self.run, number, outcome, cause, message)
            self._remember(spec, outcome)
        return outcome

    def _record(self, spec: Mapping[str, Any]) -> dict[str, Any]:
        allocation = self.place.allocation
        environment = environment_hash()
        if environment != spec["code"]["environment"]:
            self._note(f"equihpc: installed packages differ from those at submission ({environment}, then {spec['code']['environment']})")
        return {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "job": allocation.name if allocation else None,
            "restarts": allocation.restarts if allocation else 0,
            "nodes": os.environ.get("SLURM_JOB_NODELIST") if allocation else None,
            "code": spec["code"],
            "step": self.run.saved_step,
            "environment": environment,
        }

    def _note(self, text: str) -> None:
        with open(self.run.log(self.place.node), "a", encoding="utf-8") as log:
            log.write(text + "\n")

    def _say_bad(self, spec: Mapping[str, Any]) -> None:
        """The other nodes need not wait for ranks that will not come."""
        if spec["layout"]["nodes"] > 1 and self._meeting.is_dir():
            report: dict[str, Any] = {
                "host": socket.gethostname(),
                "ends": {},
                "errors": [],
                "signal": self.signals.first,
                "hung": "",
                "bad": True,
            }
            with contextlib.suppress(OSError):
                write_json(self._meeting / f"node_{self.place.node}.json", {**report, "stopped_early": False, "outlived": ""})

    @property
    def _meeting(self) -> Path:
        return self.run.path / ".nodes" / (self.place.allocation.key if self.place.allocation else "local")

    def _remember(self, spec: Mapping[str, Any], outcome: str) -> None:
        """The ledger's record: state, hours, result."""
        ledger = Ledger(Path(spec["ledger"]))
        seconds = sum(a.end["time"] - a.start["time"] for a in self.run.read_attempts() if a.end)
        hours = seconds / 3600 * spec["layout"]["nodes"] * spec["layout"]["processes"]
        record = {"id": spec["id"], "path": str(self.run.path), "state": outcome, "hours": hours, "result": read_json(self.run.result)}
        ledger.write(spec["hash"], record)

    # --- ranks ---------------------------------------------------------------------------------------------------------

    def _execute(self, spec: Mapping[str, Any], scratch: Path, leader: bool) -> tuple[str, str, str]:
        layout = spec["layout"]
        several_nodes = layout["nodes"] > 1
        meeting = self._meeting
        address, port = self._meet(spec, meeting, leader) if several_nodes else ("127.0.0.1", _free_port())
        self._spawn(spec, scratch, address, port)
        peers_bad = self._watch(spec, scratch, meeting if several_nodes else None)
        report = self._report(scratch)
        if several_nodes:
            write_json(meeting / f"node_{self.place.node}.json", report)
            if not leader:
                return self._wait_for_leader(meeting)
            reports = self._collect(meeting, layout["nodes"], patience=10.0 if peers_bad else GRACE_AFTER_END_SECONDS)
        else:
            reports = [report]
        conclusion = self._conclude(reports)
        if several_nodes:
            write_json(meeting / "outcome.json", conclusion)
        return conclusion

    def _meet(self, spec: Mapping[str, Any], meeting: Path, leader: bool) -> tuple[str, int]:
        """The leader publishes its address and a free port in the run's folder; the others wait for it."""
        if leader:
            for old in meeting.parent.glob("*"):
                shutil.rmtree(old, ignore_errors=True)
            meeting.mkdir(parents=True, mode=0o700)
            rule = spec["rendezvous"]
            address = rule["address"] or slurm.first_host(slurm_conf=spec["slurm_conf"]) + rule["suffix"]
            found = {"address": address, "port": _free_port()}
            write_json(meeting / "leader.json", found)
        else:
            deadline = time.monotonic() + spec["startup_seconds"]
            while (found := read_json(meeting / "leader.json")) is None:
                if time.monotonic() > deadline or self.signals.first is not None:
                    raise TimeoutError(f"the first node did not publish its address in {meeting}")
                time.sleep(POLL_SECONDS)
        return found["address"], found["port"]

    def _spawn(self, spec: Mapping[str, Any], scratch: Path, address: str, port: int) -> None:
        layout = spec["layout"]
        per_node, world = layout["processes"], layout["nodes"] * layout["processes"]
        log = open(self.run.log(self.place.node), "ab", buffering=0)  # noqa: SIM115 (the readers' threads hold it)
        for local in range(per_node):
            rank = self.place.node * per_node + local
            cores = self.place.cores[local::per_node] or self.place.cores
            environment = {
                **os.environ,
                **spec["environment"],
                "RANK": str(rank),
                "LOCAL_RANK": str(local),
                "WORLD_SIZE": str(world),
                "LOCAL_WORLD_SIZE": str(per_node),
                "GROUP_RANK": str(self.place.node),
                "MASTER_ADDR": address,
                "MASTER_PORT": str(port),
                "EQUIHPC_SCRATCH": str(scratch),
                "PYTHONUNBUFFERED": "1",
                **snapshot_environment(spec["code"]["path"]),
            }
            environment.setdefault("OMP_NUM_THREADS", str(max(1, len(cores))))
            if self.place.gpus:
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(self.place.gpus)
            process = subprocess.Popen(
                [sys.executable, "-m", "hpc.rank", str(self.run.path)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            with contextlib.suppress(OSError):  # not on every system, and the process may be gone already
                os.sched_setaffinity(process.pid, cores)
            prefix = b"[%d] " % rank if world > 1 else b""
            assert process.stdout is not None
            reader = threading.Thread(target=_copy_lines, args=(process.stdout, log, prefix), daemon=True)
            reader.start()
            self._ranks.append(_Rank(rank, process, reader))

    def _watch(self, spec: Mapping[str, Any], scratch: Path, meeting: Path | None) -> bool:
        """Until all local ranks have ended. True when it was another node that went wrong."""
        forwarded, began = False, time.time()
        failed_at = peer_looked = 0.0
        peers_bad = False
        while any(rank.process.poll() is None for rank in self._ranks):
            now = time.monotonic()
            if not forwarded and (self.signals.first is not None or self._cancel_seen()):
                forwarded = True
                for rank in self._ranks:
                    self._send(rank, signal.SIGTERM)
            for rank in self._ranks:
                if rank.ended is None and rank.process.poll() is not None:
                    rank.ended = time.time()
            bad = any(rank.process.poll() not in (None, EXIT_DONE, EXIT_STOPPED) for rank in self._ranks)
            if meeting is not None and now - peer_looked > PEER_POLL_SECONDS:
                peer_looked = now
                peers_bad = any((read_json(path) or {}).get("bad") for path in meeting.glob("node_*.json"))
            if not failed_at and (bad or peers_bad):
                failed_at = now
            first_end = min((rank.ended for rank in self._ranks if rank.ended is not None), default=time.time())
            if failed_at and now - failed_at > GRACE_AFTER_FAILURE_SECONDS:
                self._kill()
            elif time.time() - first_end > GRACE_AFTER_END_SECONDS:
                alive = [rank.rank for rank in self._ranks if rank.process.poll() is None]
                self._outlived = f"ranks {alive} went on for {GRACE_AFTER_END_SECONDS:.0f} s after another rank had ended regularly"
                self._kill()
            elif not self._hung and not failed_at:
                self._look_for_hang(spec, scratch, began)
            time.sleep(POLL_SECONDS)
        for rank in self._ranks:
            rank.ended = rank.ended or time.time()
            rank.reader.join(timeout=5)
        return peers_bad

    def _cancel_seen(self) -> bool:
        now = time.monotonic()
        if not self._cancelled and now - self._cancel_looked > PEER_POLL_SECONDS:
            self._cancel_looked = now
            self._cancelled = self.run.cancel_mark.exists()
        return self._cancelled

    def _look_for_hang(self, spec: Mapping[str, Any], scratch: Path, began: float) -> None:
        """A rank without a sign of life is asked for its stacks and ended; its neighbours follow as after any failure."""
        for rank in self._ranks:
            try:
                since, allowed = (scratch / f"heartbeat_{rank.rank}").stat().st_mtime, spec["hang_seconds"]
            except FileNotFoundError:
                since, allowed = began, spec["startup_seconds"]
            silent = time.time() - since
            if rank.process.poll() is None and silent > allowed:
                self._hung = f"rank {rank.rank} on {socket.gethostname()} gave no sign of life for {silent:.0f} s"
                for other in self._ranks:
                    self._send(other, signal.SIGUSR1)
                time.sleep(1.0)  # the stacks go to the log
                rank.process.kill()
                return

    def _send(self, rank: _Rank, number: int) -> None:
        if rank.process.poll() is None:
            rank.process.send_signal(number)

    def _kill(self) -> None:
        for rank in self._ranks:
            if rank.process.poll() is None:
                self._ended_by_us.add(rank.rank)
                rank.process.kill()
        for rank in self._ranks:
            rank.process.wait()

    # --- the end -------------------------------------------------------------------------------------------------------

    def _report(self, scratch: Path) -> dict[str, Any]:
        codes = {rank.rank: rank.process.returncode for rank in self._ranks}
        ends = {rank.rank: (rank.process.returncode, rank.ended) for rank in self._ranks if rank.rank not in self._ended_by_us}
        errors = [found for rank in codes if (found := read_json(scratch / f"error_{rank}.json"))]
        asked = signal.SIGTERM if self._cancelled else self.signals.first
        stopped_early = asked is not None and any(code in (-signal.SIGTERM, -signal.SIGUSR2) for code in codes.values())
        return {
            "host": socket.gethostname(),
            "ends": ends,
            "errors": [{**error, "time": (scratch / f"error_{error['rank']}.json").stat().st_mtime} for error in errors],
            "signal": asked,
            "hung": self._hung,
            "outlived": self._outlived,
            "stopped_early": stopped_early,
            "bad": any(code not in (EXIT_DONE, EXIT_STOPPED) for code in codes.values()),
        }

    def _collect(self, meeting: Path, num_nodes: int, patience: float) -> list[dict[str, Any]]:
        deadline = time.monotonic() + patience
        while len(found := sorted(meeting.glob("node_*.json"))) < num_nodes and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        return [report for path in found if (report := read_json(path))]

    def _wait_for_leader(self, meeting: Path) -> tuple[str, str, str]:
        deadline = time.monotonic() + GRACE_AFTER_END_SECONDS
        while (found := read_json(meeting / "outcome.json")) is None:
            if time.monotonic() > deadline:
                return "crashed", "the first node gave no verdict", ""
            time.sleep(POLL_SECONDS)
        return found[0], found[1], found[2]

    def _conclude(self, reports: list[dict[str, Any]]) -> tuple[str, str, str]:
        """(outcome, cause, message) from what all nodes saw."""
        if self.run.is_complete:
            return "complete", "", ""
        asked = next((report["signal"] for report in reports if report["signal"] is not None), None)
        ends = sorted((when, int(rank), code) for report in reports for rank, (code, when) in report["ends"].items())
        codes = [code for _, _, code in ends]
        errors = sorted((error for report in reports for error in report["errors"]), key=lambda error: error["time"])
        stopped_early = any(report["stopped_early"] for report in reports)  # the others' errors then only echo this
        if asked is not None and (stopped_early or (EXIT_STOPPED in codes and not errors)):
            cause = self._why_stopped(asked)
            return ("cancelled" if cause == "cancelled" else "stopped"), cause, ""
        if hung := next((report["hung"] for report in reports if report["hung"]), ""):
            return "crashed", hung, "the stacks are in the log"
        # what came first is the cause: a killed rank makes the others raise, and one that raised makes others abort
        killed = next(((when, rank, code) for when, rank, code in ends if code < 0), None)
        if killed and not (errors and errors[0]["time"] < killed[0] - SEEN_LATE_SECONDS):
            return "crashed", f"rank {killed[1]} was killed by {signal.Signals(-killed[2]).name}", ""
        if errors:
            return "failed", f"rank {errors[0]['rank']}: {errors[0]['error']}", errors[0]["traceback"]
        for _, rank, code in ends:
            if code not in (EXIT_DONE, EXIT_STOPPED):
                return "failed", f"rank {rank} ended with exit code {code}", ""
        if outlived := next((report["outlived"] for report in reports if report["outlived"]), ""):
            return "failed", outlived, "ranks must end together: is there a barrier at the end of main?"
        if not ends:
            return "crashed", "a node ended without a word", ""
        if EXIT_STOPPED in codes:
            return "failed", "main returned None although nobody asked it to stop", "return a dict when the work is done"
        return "failed", "the ranks ended without a result", "rank 0's main must return a dict"

    def _why_stopped(self, asked: int) -> str:
        if self.run.cancel_mark.exists():
            return "cancelled"
        if asked == signal.SIGUSR2:
            return "time limit"
        if self.place.allocation is None:
            return "interrupted"
        with contextlib.suppress(slurm.SlurmError):
            facts = slurm.job_facts(self.place.allocation.name)
            if facts.get("PreemptTime", "None") not in ("None", "", "Unknown"):
                return "preempted"
            if facts.get("JobState") in ("COMPLETING", "CANCELLED"):
                return "cancelled"
        return "terminated"


def snapshot_environment(code: str) -> dict[str, str]:
    """Makes Python find the snapshot first, and never the folder that somebody happened to stand in."""
    paths = [code, *(path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path != code)]
    return {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _copy_lines(source: IO[bytes], log: IO[bytes], prefix: bytes) -> None:
    for line in source:
        log.write(prefix + line if line.endswith(b"\n") else prefix + line + b"\n")
