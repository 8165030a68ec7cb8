"""Bad-node memory: failures of the machine are noted per node beside the ledger, and a node that fails again is avoided.

A run that dies wherever it goes is the run's fault, not the nodes': one that failed on a single node testifies against it
with each of its attempts, one that failed on two nodes once against each, one that failed on more against none. Two
testimonies within the profile's `node_memory_hours` exclude a node from everybody's next submission and requeue; a run
itself also avoids a node on which it failed twice.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc import slurm
from hpc.budget import NODE_FAILURE, OTHER, Verdict
from hpc.files import append_json, read_lines
from hpc.runs import Attempt
from hpc.verdict import why_stopped

ENOUGH = 2  # testimonies that exclude a node
MAX_SUSPECTS = 2  # a run that failed on more nodes testifies against none


@dataclass(frozen=True, slots=True)
class Failure:
    """One attempt that a node ended."""

    node: str
    time: float
    run: str
    attempt: int
    cause: str


def this_node() -> str:
    """As Slurm calls it; several emulated nodes may share a host."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename


def _file(folder: Path, cluster: str) -> Path:
    return folder / f"nodes-{cluster}.jsonl"


def note(folder: Path, cluster: str, node: str, run: str, attempt: int, cause: str) -> None:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    record = {"node": node, "time": time.time(), "run": run, "attempt": attempt, "cause": cause}
    append_json(_file(folder, cluster), record)


def listed(folder: Path, cluster: str, hours: float, now: float | None = None) -> list[Failure]:
    """The failures of the last `hours`, oldest first."""
    since = (time.time() if now is None else now) - hours * 3600
    found = [Failure(r["node"], r["time"], r["run"], r["attempt"], r["cause"]) for r in read_lines(_file(folder, cluster))]
    return [failure for failure in found if failure.time >= since]


def excluded(folder: Path, cluster: str, hours: float, now: float | None = None, run: str | None = None) -> dict[str, str]:
    """Node -> why it is avoided; with `run` also what that run alone avoids. The worst come last: those of this run, then the newest."""
    failures = listed(folder, cluster, hours, now)
    visited: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))  # run -> node -> attempts
    for failure in failures:
        visited[failure.run][failure.node].add(failure.attempt)
    testimonies: dict[str, int] = defaultdict(int)
    for nodes in visited.values():
        for node, attempts in nodes.items():
            testimonies[node] += len(attempts) if len(nodes) == 1 else int(len(nodes) <= MAX_SUSPECTS)
    own = visited[run] if run is not None else {}
    latest = {failure.node: failure for failure in failures}
    count = Counter(failure.node for failure in failures)
    return {
        node: f"{count[node]} failures in {hours:g} h, the last one: {latest[node].cause}"
        for node in sorted(latest, key=lambda node: (node in own, latest[node].time))
        if testimonies[node] >= ENOUGH or len(own.get(node, ())) >= ENOUGH
    }


def spare(bad: Iterable[str], partition: str | None, num_nodes: int, slurm_conf: str | None = None) -> list[str]:
    """The nodes of `bad` (the last ones weigh most) that can be left out so that the partition can still run a job of `num_nodes`."""
    command = ["sinfo", "--noheader", "--Node", "--format=%N %t", *([f"--partition={partition}"] if partition else [])]
    states = dict(line.split()[:2] for line in slurm.call(command, slurm_conf).splitlines() if line.strip())
    usable = {node for node, state in states.items() if not state.startswith(("down", "drain", "drng", "fail", "maint"))}
    chosen: list[str] = []
    for node in reversed(list(bad)):
        if node in states and len(usable - {node}) >= num_nodes:
            usable.discard(node)
            chosen.append(node)
    return sorted(chosen)


def hostnames(nodelist: str, slurm_conf: str | None = None) -> list[str]:
    """`a[1-2]` -> a1, a2."""
    return slurm.call(["scontrol", "show", "hostnames", nodelist], slurm_conf).split() if nodelist not in ("", "(null)") else []


def exclude_from(name: str, bad: Iterable[str], num_nodes: int) -> list[str]:
    """Leave these nodes out of a requeued job of `num_nodes`, as far as it can still run; returns the nodes.

    Slurm refuses it before the requeue.
    """
    facts = slurm.job_facts(name)
    before = hostnames(facts.get("ExcNodeList", ""))
    chosen = spare(dict.fromkeys([*before, *bad]), facts.get("Partition"), num_nodes)
    if set(chosen) - set(before):
        slurm.call(["scontrol", "update", f"jobid={name}", f"excnodelist={','.join(chosen)}"])
    return chosen


def noted(name: str, restarts: int) -> tuple[str, list[str]]:
    """(Slurm's state of one execution of a job, its nodes). Raises SlurmError where the accounting does not answer or does not know it."""
    command = ["sacct", "-D", "-X", "--noheader", "--parsable2", f"--jobs={name}", "--format=state,nodelist"]
    rows = [line.split("|") for line in slurm.call(command, timeout=20).splitlines()]
    if restarts >= len(rows):
        raise slurm.SlurmError(f"sacct knows {len(rows)} executions of {name}, not number {restarts + 1}")
    return rows[restarts][0], hostnames(rows[restarts][1])


def down(names: Sequence[str]) -> list[str]:
    """Those of the nodes that are down. Raises SlurmError."""
    text = slurm.call(["sinfo", "--noheader", "--Node", f"--nodes={','.join(names)}", "--format=%N %t"]) if names else ""
    return sorted({line.split()[0] for line in text.splitlines() if line.split()[1].startswith("down")})


def to_blame(names: Sequence[str]) -> str:
    """The one of a failed job's nodes that is down; empty where that is not clear."""
    found = list(names)
    if len(names) > 1:
        with contextlib.suppress(slurm.SlurmError):
            found = down(names)
    return found[0] if len(found) == 1 else ""


def post_mortem(attempt: Attempt) -> Verdict:
    """On an attempt that left no end: from what it was asked before, else from what Slurm noted of that execution."""
    if attempt.asked in ("preempted", "time limit", "cancelled"):
        return why_stopped(attempt.asked)
    name = attempt.start.get("job")
    if name is None:
        return Verdict("stopped", OTHER, "the local runner was killed")
    with contextlib.suppress(slurm.SlurmError):
        state, names = noted(name, attempt.start.get("restarts", 0))
        if state == "NODE_FAIL":
            node = to_blame(names)
            return Verdict("crashed", NODE_FAILURE, f"Slurm: {node or 'one of ' + ', '.join(names)} failed", "", node)
        for begin, cause in (("PREEMPTED", "preempted"), ("TIMEOUT", "time limit"), ("CANCELLED", "cancelled")):
            if state.startswith(begin):
                return why_stopped(cause)
    return Verdict("crashed", NODE_FAILURE, "ended without a word: killed, or its node went down")
