"""How an attempt ended, from what the supervisors of all its nodes saw. Pure, but for what the kernel says of a process."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hpc.budget import CODE_ERROR, NODE_FAILURE, OTHER, PREEMPTION, TIME_LIMIT, Verdict
from hpc.rank import EXIT_DISK_FULL, EXIT_DONE, EXIT_STOPPED

Report = Mapping[str, Any]
SEEN_LATE_SECONDS = 0.5  # a process's end is noticed so much later than it happened
SILENT_FIRST_SECONDS = 2.0  # ranks that wait for each other fall silent so close together
STATES = {
    "T": "it is stopped (state T) and could not print its stack",
    "t": "it is stopped by a debugger (state t) and could not print its stack",
    "D": "it waits for a disk or another device (state D) and may not have printed its stack",
    "Z": "it has ended already (state Z)",
}


def empty_report(node: str) -> dict[str, Any]:
    """Of a supervisor whose ranks did not come."""
    return {"node": node, "ends": {}, "errors": [], "asked": "", "silent": [], "outlived": "", "stopped_early": False, "bad": True}


def kernel_facts(pid: int) -> dict[str, str]:
    """State letter and, where it may be read, the kernel function in which the process sleeps."""
    facts = {"state": "?", "sleeps_in": ""}
    with contextlib.suppress(OSError, IndexError):
        facts["state"] = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        facts["sleeps_in"] = Path(f"/proc/{pid}/wchan").read_text().strip().removeprefix("0")
    return facts


def why_stopped(cause: str) -> Verdict:
    """Of an attempt that saved its state as asked, or was asked before it had begun."""
    kind = {"time limit": TIME_LIMIT, "preempted": PREEMPTION, NODE_FAILURE: NODE_FAILURE}.get(cause, OTHER)
    return Verdict("cancelled" if cause == "cancelled" else "stopped", kind, cause)


def disk_full(folder: Path, text: str) -> Verdict:
    """What is full, how much is free there, and what to do."""
    try:
        free, inodes = shutil.disk_usage(folder).free, os.statvfs(folder).f_favail
        room = f"the file system has {free / 2**30:.1f} GiB and {inodes} inodes free" + ("; is a quota used up?" if free > 2**30 else "")
    except OSError as error:
        room = str(error)
    todo = "make room (equihpc gc removes what is not needed), then submit again; the newest checkpoint is untouched"
    return Verdict("failed", OTHER, f"disk full: {text}", f"writing below {folder}: {room}; {todo}")


def conclude(folder: Path, reports: Sequence[Report], missing: Sequence[str] = ()) -> Verdict:
    """The verdict on an attempt that is not complete. `missing`: nodes whose supervisor did not report."""
    asked = next((report["asked"] for report in reports if report["asked"]), "")  # the leader's word first
    ends = sorted((when, int(rank), code, report["node"]) for report in reports for rank, (code, when) in report["ends"].items())
    codes = [code for _, _, code, _ in ends]
    errors = sorted((error for report in reports for error in report["errors"]), key=lambda error: error["time"])
    stopped_early = any(report["stopped_early"] for report in reports)  # the others' errors then only echo this
    vanished = bool(missing) and asked in ("", "terminated")  # srun ends all tasks when one died
    if asked and not vanished and (stopped_early or (EXIT_STOPPED in codes and not errors and EXIT_DISK_FULL not in codes)):
        return why_stopped(asked)
    if full := next((error for error in errors if error["disk_full"]), None):
        return disk_full(folder, f"rank {full['rank']}: {full['error']}")
    if EXIT_DISK_FULL in codes:
        return disk_full(folder, "a rank could not write, see the log")
    echo = "".join(error["traceback"] for error in errors[:1])
    if vanished:
        node = missing[0] if len(missing) == 1 else ""
        return Verdict("crashed", NODE_FAILURE, f"no word from {', '.join(missing)}: its supervisor vanished", echo, node)
    if silent := [rank for report in reports for rank in report["silent"]]:
        return _hang(silent)
    # what came first is the cause: a killed rank makes the others raise, and one that raised makes others abort
    killed = next((end for end in ends if end[2] < 0), None)
    if killed and not (errors and errors[0]["time"] < killed[0] - SEEN_LATE_SECONDS):
        _, rank, code, node = killed
        return Verdict("crashed", NODE_FAILURE, f"rank {rank} on {node} was killed by {signal.Signals(-code).name}", "", node)
    if errors:
        return Verdict("failed", CODE_ERROR, f"rank {errors[0]['rank']}: {errors[0]['error']}", echo)
    for _, rank, code, _ in ends:
        if code not in (EXIT_DONE, EXIT_STOPPED):
            return Verdict("failed", CODE_ERROR, f"rank {rank} ended with exit code {code}")
    if outlived := next((report["outlived"] for report in reports if report["outlived"]), ""):
        return Verdict("failed", CODE_ERROR, outlived, "ranks must end together: is there a barrier at the end of main?")
    if not ends:
        return Verdict("crashed", NODE_FAILURE, "no rank came to its end")
    if EXIT_STOPPED in codes:
        return Verdict("failed", CODE_ERROR, "main returned None although nobody asked it to stop", "return a dict when the work is done")
    return Verdict("failed", CODE_ERROR, "the ranks ended without a result", "rank 0's main must return a dict")


def _hang(silent: Sequence[Mapping[str, Any]]) -> Verdict:
    """The rank that holds up the others: one that the kernel says is stopped or waits for a disk, else the first to fall silent."""

    def suspicion(rank: Mapping[str, Any]) -> tuple[int, float]:
        return "DtT".find(rank["state"]), rank["seconds"]

    worst = max(silent, key=suspicion)
    others = [rank["seconds"] for rank in silent if rank["node"] != worst["node"]]
    is_sure = worst["state"] in "DtT" or not others or worst["seconds"] > max(others) + SILENT_FIRST_SECONDS
    about = STATES.get(worst["state"], "")
    cause = f"rank {worst['rank']} on {worst['node']} gave no sign of life for {worst['seconds']:.0f} s" + (about and f": {about}")
    lines = [
        f"rank {rank['rank']} on {rank['node']}: silent for {rank['seconds']:.0f} s, state {rank['state']}"
        + (f" in {rank['sleeps_in']}" if rank["sleeps_in"] else "")
        for rank in sorted(silent, key=lambda rank: int(rank["rank"]))
    ]
    lines.append("the stacks of all ranks are in the logs of their nodes, node_*.log")
    return Verdict("crashed", NODE_FAILURE, cause, "\n".join(lines), worst["node"] if is_sure else "")
