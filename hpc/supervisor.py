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

from hpc import budget, entries, nodes, slurm
from hpc.budget import NODE_FAILURE, NOTHING, OTHER, Verdict
from hpc.files import locked, read_json, write_json
from hpc.rank import EXIT_DONE, EXIT_STOPPED, is_disk_full
from hpc.runs import Ledger, RunFolder, ask_attempt, start_attempt
from hpc.snapshot import environment_hash
from hpc.verdict import conclude, disk_full, empty_report, kernel_facts, why_stopped

POLL_SECONDS = 0.1
PEER_POLL_SECONDS = 1.0
SIGN_SECONDS = 30.0  # between two signs of life of a run on the shared file system
GRACE_AFTER_FAILURE_SECONDS = 3.0  # the other ranks' own errors are worth having
GRACE_AFTER_END_SECONDS = 120.0  # between the first and the last rank's regular end
LATE_SIGNAL_SECONDS = 5.0  # for a signal that the ranks obeyed already
PATIENCE_WITH_PEERS_SECONDS = 30.0  # for the reports of the other nodes once something went wrong
PATIENCE_WHEN_ASKED_SECONDS = 3.0  # Slurm kills soon


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
    _number: int = 0  # of the attempt; the leader knows it
    _asked: str = ""  # why this attempt was asked to end
    _bad_node: str = ""  # by Slurm's word
    _silent: list[dict[str, Any]] = field(default_factory=list)  # the local ranks, looked at when one of all ranks hung
    _outlived: str = ""
    _ended_by_us: set[int] = field(default_factory=set)
    _cancel_looked: float = 0.0
    _signed: float = 0.0

    def __call__(self) -> str:
        """The outcome of this attempt, see `runs.end_attempt`; `complete` at once for a complete run."""
        if self.run.is_complete:
            return "complete"
        if self.run.cancel_mark.exists():
            return "cancelled"
        spec = read_json(self.run.spec)
        if self.place.node > 0:
            return self._attempt(spec).outcome
        with locked(self.run.lock, wait=False) as free:
            if not free:
                print(f"equihpc: {self.run.path} is being executed by somebody else; left to them", flush=True)
                return "waiting"
            try:
                return self._lead(spec)
            except OSError as error:
                if not is_disk_full(error):
                    raise
                verdict = disk_full(self.run.path, str(error))  # not even the record of the attempt could be written
                print(f"equihpc: {self.run.path}: {verdict.cause}; {verdict.message}", file=sys.stderr, flush=True)
                return "failed"

    def _lead(self, spec: Mapping[str, Any]) -> str:
        """The attempt with its record. The other nodes learn through the outcome's file that it did not begin."""
        attempts = self.run.read_attempts()
        if attempts and attempts[-1].end is None:
            last = attempts[-1]
            self._close(spec, last.number, nodes.post_mortem(last), max(last.start["time"], self.run.last_sign))
        os.utime(self.run.lock)
        if reason := budget.may_start(self.run):
            budget.refuse(self.run, reason, self._record(spec))
            self._publish(spec, Verdict("failed", NOTHING, reason))
            self._remember(spec, "failed")
            return "failed"
        write_json(self.run.config, spec["config"])
        self._number = start_attempt(self.run, self._record(spec))
        verdict = self._attempt(spec)
        self._publish(spec, verdict)
        return self._close(spec, self._number, verdict)

    def _close(self, spec: Mapping[str, Any], number: int, verdict: Verdict, when: float | None = None) -> str:
        outcome = budget.settle(self.run, number, verdict, when)
        if verdict.kind == NODE_FAILURE and verdict.node and self.place.allocation:
            nodes.note(Path(spec["ledger"]), spec["cluster"], verdict.node, spec["id"], number, verdict.cause)
        self._remember(spec, outcome)
        return outcome

    def _attempt(self, spec: Mapping[str, Any]) -> Verdict:
        for path in spec["upstream"].values():
            if not RunFolder(Path(path)).is_complete:
                return Verdict("waiting", NOTHING, f"{Path(path).name} is not complete")
        scratch = Path(tempfile.mkdtemp(prefix="equihpc-"))
        try:
            return self._execute(spec, scratch)
        except Exception as error:
            self._say_bad()
            text = f"{type(error).__name__}: {error}"
            if is_disk_full(error):
                return disk_full(self.run.path, text)
            return Verdict("crashed", NODE_FAILURE, f"supervisor on {nodes.this_node()}: {text}", "", nodes.this_node())
        finally:
            self._kill()
            self._tidy(spec)
            shutil.rmtree(scratch, ignore_errors=True)

    def _tidy(self, spec: Mapping[str, Any]) -> None:
        """What killed ranks leave on the node, such as data in its memory, is the entry's to remove: its `tidy(config)`."""
        try:
            tidy = getattr(entries.load(spec["entry"]), "tidy", None)
            if tidy is not None:
                tidy(spec["config"])
        except Exception as error:  # it must not change the outcome
            self._note(f"equihpc: tidying up after {spec['entry']} failed: {type(error).__name__}: {error}")

    def _record(self, spec: Mapping[str, Any]) -> dict[str, Any]:
        allocation = self.place.allocation
        environment = environment_hash()
        if environment != spec["code"]["environment"]:
            self._note(f"equihpc: installed packages differ from those at submission ({environment}, then {spec['code']['environment']})")
        return {
            "host": nodes.this_node(),
            "pid": os.getpid(),
            "job": allocation.name if allocation else None,
            "restarts": allocation.restarts if allocation else 0,
            "nodes": os.environ.get("SLURM_JOB_NODELIST") if allocation else None,
            "processes": spec["layout"]["nodes"] * spec["layout"]["processes"],
            "code": spec["code"],
            "step": self.run.saved_step,
            "environment": environment,
        }

    def _note(self, text: str) -> None:
        with contextlib.suppress(OSError), open(self.run.log(self.place.node), "a", encoding="utf-8") as log:
            log.write(text + "\n")

    @property
    def _meeting(self) -> Path:
        return self.run.path / ".nodes" / (self.place.allocation.key if self.place.allocation else "local")

    def _say_bad(self) -> None:
        """The other nodes need not wait for ranks that will not come."""
        if self._meeting.is_dir():
            with contextlib.suppress(OSError):
                write_json(self._meeting / f"node_{self.place.node}.json", empty_report(nodes.this_node()))

    def _publish(self, spec: Mapping[str, Any], verdict: Verdict) -> None:
        if spec["layout"]["nodes"] > 1:
            with contextlib.suppress(OSError):  # the others have their own patience
                self._meeting.mkdir(parents=True, exist_ok=True, mode=0o700)
                write_json(self._meeting / "outcome.json", verdict)

    def _remember(self, spec: Mapping[str, Any], outcome: str) -> None:
        """The ledger's record: state, hours, result."""
        seconds = sum(a.end["time"] - a.start["time"] for a in self.run.read_attempts() if a.end)
        hours = seconds / 3600 * spec["layout"]["nodes"] * spec["layout"]["processes"]
        record = {"id": spec["id"], "path": str(self.run.path), "state": outcome, "hours": hours}
        record |= {"config": spec["config"], "result": read_json(self.run.result)}
        try:
            Ledger(Path(spec["ledger"])).write(spec["hash"], record)
        except OSError as error:
            print(f"equihpc: {spec['id']}: the ledger was not written: {error}", file=sys.stderr, flush=True)

    # --- ranks ---------------------------------------------------------------------------------------------------------

    def _execute(self, spec: Mapping[str, Any], scratch: Path) -> Verdict:
        layout = spec["layout"]
        meeting = self._meeting if layout["nodes"] > 1 else None
        address, port = ("127.0.0.1", _free_port())
        if meeting:
            found = self._meet(spec, meeting)
            if isinstance(found, Verdict):
                return found
            address, port = found
        self._spawn(spec, scratch, address, port)
        peers_bad = self._watch(spec, scratch, meeting)
        report = self._report(scratch)
        if meeting:
            write_json(meeting / f"node_{self.place.node}.json", report)
            if self.place.node > 0:
                return self._wait_for_leader(meeting)
        if meeting:
            patience = PATIENCE_WITH_PEERS_SECONDS if report["bad"] or peers_bad else GRACE_AFTER_END_SECONDS
            reports, missing = self._collect(meeting, layout["nodes"], PATIENCE_WHEN_ASKED_SECONDS if self._asked else patience)
        if self.run.is_complete:
            return Verdict("complete", OTHER, "")
        verdict = conclude(self.run.path, reports, missing) if meeting else conclude(self.run.path, [report])
        if self._bad_node and verdict.cause == NODE_FAILURE:
            verdict = verdict._replace(cause=f"Slurm: {self._bad_node} failed")
        return verdict._replace(node=verdict.node or self._bad_node)

    def _meet(self, spec: Mapping[str, Any], meeting: Path) -> tuple[str, int] | Verdict:
        """The leader publishes its address and a free port in the run's folder; the others wait for it, or for its verdict."""
        if self.place.node == 0:
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
                if (said := read_json(meeting / "outcome.json")) is not None:
                    return Verdict(*said)
                if self.signals.first is not None:
                    return why_stopped("terminated")
                if time.monotonic() > deadline:
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
        began = time.time()
        failed_at = peer_looked = 0.0
        peers_bad = False
        while any(rank.process.poll() is None for rank in self._ranks):
            now = time.monotonic()
            self._sign(now)
            self._pass_on()
            for rank in self._ranks:
                if rank.ended is None and rank.process.poll() is not None:
                    rank.ended = time.time()
            bad = any(rank.process.poll() not in (None, EXIT_DONE, EXIT_STOPPED) for rank in self._ranks)
            hung = False
            if meeting is not None and now - peer_looked > PEER_POLL_SECONDS:
                peer_looked = now
                peers_bad = any((read_json(path) or {}).get("bad") for path in meeting.glob("node_*.json"))
                hung = (meeting / "hung").exists()
            if not failed_at and (bad or peers_bad):
                failed_at = now
            first_end = min((rank.ended for rank in self._ranks if rank.ended is not None), default=time.time())
            if failed_at and now - failed_at > GRACE_AFTER_FAILURE_SECONDS:
                self._kill()
            elif time.time() - first_end > GRACE_AFTER_END_SECONDS:
                alive = [rank.rank for rank in self._ranks if rank.process.poll() is None]
                self._outlived = f"ranks {alive} went on for {GRACE_AFTER_END_SECONDS:.0f} s after another rank had ended regularly"
                self._kill()
            elif hung or (not failed_at and self._is_hung(spec, scratch, began)):
                self._examine(scratch, began)
                if meeting is not None:
                    with contextlib.suppress(OSError):
                        (meeting / "hung").touch()  # the other nodes examine theirs
                self._kill()
            time.sleep(POLL_SECONDS)
        # ranks that Slurm signalled too may have been quicker than this loop, and than the signal's way to this process
        obeyed = any(rank.process.returncode in (EXIT_STOPPED, -signal.SIGTERM, -signal.SIGUSR2) for rank in self._ranks)
        deadline = time.monotonic() + LATE_SIGNAL_SECONDS
        while (
            obeyed and not self._asked and self.signals.first is None and not self.run.cancel_mark.exists() and time.monotonic() < deadline
        ):
            time.sleep(POLL_SECONDS)
        self._cancel_looked = 0.0
        self._pass_on()
        for rank in self._ranks:
            rank.ended = rank.ended or time.time()
            rank.reader.join(timeout=5)
        return peers_bad

    def _pass_on(self) -> None:
        """Once asked to end, the ranks are asked too, and the reason is written down: this attempt may be killed before its end."""
        if not self._asked and (self.signals.first is not None or self._cancel_seen()):
            for rank in self._ranks:
                self._send(rank, signal.SIGTERM)
            self._asked = self._why_asked()
            if self._number:
                with contextlib.suppress(OSError):
                    ask_attempt(self.run, self._number, self._asked)

    def _sign(self, now: float) -> None:
        """The run's sign of life on the shared file system: from it follows how long a killed attempt lasted."""
        if self._number and now - self._signed > SIGN_SECONDS:
            self._signed = now
            with contextlib.suppress(OSError):
                os.utime(self.run.lock)

    def _cancel_seen(self) -> bool:
        now = time.monotonic()
        if now - self._cancel_looked < PEER_POLL_SECONDS:
            return False
        self._cancel_looked = now
        return self.run.cancel_mark.exists()

    def _silence(self, rank: _Rank, scratch: Path, began: float) -> tuple[float, bool]:
        """(seconds since the rank's last sign of life, whether it ever gave one)."""
        try:
            return time.time() - (scratch / f"heartbeat_{rank.rank}").stat().st_mtime, True
        except FileNotFoundError:
            return time.time() - began, False

    def _is_hung(self, spec: Mapping[str, Any], scratch: Path, began: float) -> bool:
        for rank in self._ranks:
            seconds, begun = self._silence(rank, scratch, began)
            if rank.process.poll() is None and seconds > spec["hang_seconds" if begun else "startup_seconds"]:
                return True
        return False

    def _examine(self, scratch: Path, began: float) -> None:
        """Every local rank: for how long it has been silent, what the kernel says of it, and its stacks into the log."""
        for rank in self._ranks:
            if rank.process.poll() is None:
                seconds = self._silence(rank, scratch, began)[0]
                facts = kernel_facts(rank.process.pid)
                self._silent.append({"rank": rank.rank, "node": nodes.this_node(), "seconds": seconds, **facts})
                self._send(rank, signal.SIGUSR1)
        time.sleep(1.0)

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
        errors = [(path, read_json(path)) for rank in codes if (path := scratch / f"error_{rank}.json").exists()]
        return {
            "node": nodes.this_node(),
            "ends": {rank.rank: (rank.process.returncode, rank.ended) for rank in self._ranks if rank.rank not in self._ended_by_us},
            "errors": [{**error, "time": path.stat().st_mtime} for path, error in errors],
            "asked": self._asked,
            "silent": self._silent,
            "outlived": self._outlived,
            "stopped_early": bool(self._asked) and any(code in (-signal.SIGTERM, -signal.SIGUSR2) for code in codes.values()),
            "bad": any(code not in (EXIT_DONE, EXIT_STOPPED) for code in codes.values()),
        }

    def _collect(self, meeting: Path, num_nodes: int, patience: float) -> tuple[list[dict[str, Any]], list[str]]:
        """(the reports, the nodes that gave none)."""
        deadline = time.monotonic() + patience
        paths = [meeting / f"node_{node}.json" for node in range(num_nodes)]
        while not all(path.exists() for path in paths) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        missing = [node for node, path in enumerate(paths) if not path.exists()]
        names: list[str] = []
        if missing:
            with contextlib.suppress(slurm.SlurmError):
                names = nodes.hostnames(os.environ.get("SLURM_JOB_NODELIST", ""))
        reports = [report for path in paths if (report := read_json(path))]
        return reports, [names[node] if node < len(names) else f"node {node}" for node in missing]

    def _wait_for_leader(self, meeting: Path) -> Verdict:
        deadline = time.monotonic() + GRACE_AFTER_END_SECONDS + PATIENCE_WITH_PEERS_SECONDS
        while (found := read_json(meeting / "outcome.json")) is None:
            if time.monotonic() > deadline:
                return Verdict("crashed", NODE_FAILURE, "the first node gave no verdict")
            time.sleep(POLL_SECONDS)
        return Verdict(*found)

    def _why_asked(self) -> str:
        if self.run.cancel_mark.exists():
            return "cancelled"
        if self.place.allocation is None:
            return "interrupted"
        if self.signals.first == signal.SIGUSR2:
            return "time limit"
        if self.place.node > 0:
            return "terminated"  # the leader asks Slurm
        with contextlib.suppress(slurm.SlurmError):
            facts = slurm.job_facts(self.place.allocation.name)
            if facts.get("PreemptTime", "None") not in ("None", "", "Unknown"):
                return "preempted"
            state = facts.get("JobState")
            names = nodes.hostnames(os.environ.get("SLURM_JOB_NODELIST", ""))  # sacct's list can be incomplete for a moment
            is_requeued = int(facts.get("Restarts", "0")) > self.place.allocation.restarts  # Slurm has it in the queue again
            for pause_seconds in (0.0, 1.5) if is_requeued else (0.0,):  # the accounting lags
                time.sleep(pause_seconds)
                if (blamed := self._failed_node(state, names)) is not None:
                    self._bad_node = blamed
                    return NODE_FAILURE
            if is_requeued:
                return "requeued"
            if state in ("COMPLETING", "CANCELLED"):
                return "cancelled"
        return "terminated"

    def _failed_node(self, state: str | None, names: list[str]) -> str | None:
        """The node that Slurm says failed, empty where it is not clear which; None where none did. A failed one may be back at once."""
        assert self.place.allocation is not None
        noted = ""
        if state in ("COMPLETING", "PENDING"):  # it was cancelled, or Slurm has requeued it already: the accounting knows
            with contextlib.suppress(slurm.SlurmError):
                noted = nodes.noted(self.place.allocation.name, self.place.allocation.restarts)[0]
        down = nodes.down(names)
        if not down and noted != "NODE_FAIL":
            return None
        return down[0] if len(down) == 1 else names[0] if len(names) == 1 else ""


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
        with contextlib.suppress(OSError):  # a full disk must not fill the pipe too, or the rank would stand still
            log.write(prefix + line if line.endswith(b"\n") else prefix + line + b"\n")
