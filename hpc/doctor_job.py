"""`equihpc doctor --node`: a small job that goes the way of every run, and what is made of what its ranks saw (see `probe`)."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc import local, plan, slurm, spec, status, submit, yamlfile
from hpc.cluster import Cluster
from hpc.doctor import Finding, Subject
from hpc.files import read_json
from hpc.plan import Plan
from hpc.runs import RunFolder

WAIT_SECONDS = 3600.0  # for the job to start and to end
MINUTES = 5
LEAD_SECONDS = MINUTES * 60 - 45  # the signal comes after 45 s, give or take what Slurm takes its time for
SELFTEST_SECONDS = 200.0


@dataclass(frozen=True)
class Probe:
    """The job that looks around on the nodes."""

    subject: Subject
    plan: Plan

    @property
    def description(self) -> str:
        run, cluster = self.plan.runs[0], self.plan.cluster
        where = f" in partition {cluster.partition}" if cluster.partition else f" on {self.subject.name}"
        return f"a job of {num_nodes(run.layout.nodes)} for at most {MINUTES} minutes{where}"


def num_nodes(count: int) -> str:
    return f"{count} node{'s' * (count > 1)}"


def plan_of(cluster: Cluster, nodes: int, hours: float, **config: Any) -> Plan:
    """One run of `hpc.probe` with as many processes as a node has GPUs, or two."""
    processes = cluster.processes_per_node if cluster.gpu else min(2, cluster.processes_per_node)
    stage = {
        "entry": "hpc.probe",
        "resources": {"nodes": nodes, "gpus_per_node": processes, "hours": hours},
        "config": {"began": time.strftime("%Y-%m-%dT%H:%M:%S"), "selftest_seconds": SELFTEST_SECONDS, **config},
    }
    document = yamlfile.parse(json.dumps({"stages": {"probe": stage}}), "doctor.yaml")
    job = spec.validate(spec.Job, document.data, document)
    return plan.expand(spec.JobFile("doctor", job, document, ("probe",)), cluster)


def probe_job(subject: Subject, partition: str | None = None, qos: str | None = None) -> Probe:
    """Two nodes where the profile has them, in its partition for development. Raises UserError where the profile forbids it."""
    cluster = subject.cluster
    partition = partition or cluster.development or cluster.partition
    changes = {
        "partition": partition,
        "qos": qos or cluster.development_qos or cluster.qos,
        "signal_lead_seconds": LEAD_SECONDS,
        "ledger": None,  # probes are not worth remembering
    }
    allowed = cluster.partitions.get(partition or "")
    on_slurm = cluster.scheduler == "slurm"
    nodes = min(2, allowed.max_nodes if allowed else 2) if on_slurm else 1
    config = {"needs_gpu": cluster.gpu is not None, "awaits_signal": on_slurm, "requeues": cluster.requeue == "self"}
    return Probe(subject, plan_of(cluster.model_copy(update=changes), nodes, MINUTES / 60, **config))


def check_nodes(probe: Probe, say: Callable[[str], None]) -> list[Finding]:
    """Submit the job, wait for its end, and judge what its ranks saw. Raises UserError where it cannot be submitted."""
    subject = probe.subject
    runs_dir = subject.runs_dir / ".doctor"
    for old in runs_dir.glob("doctor/probe/*/COMPLETE"):
        shutil.rmtree(old.parent)
    done = submit.submit(probe.plan, subject.name, runs_dir, subject.missing)
    run = RunFolder(submit.folder_of(probe.plan.runs[0], done.job_dir))
    say(f"submitted {probe.description}" + (f", Slurm job {', '.join(done.job_ids)}" if done.job_ids else "") + f"; its folder: {run.path}")
    state, cause = "interrupted", ""
    try:
        state, cause = _wait(probe, done.job_dir, say)
    finally:
        if state in ("interrupted", "timeout"):
            slurm.cancel(done.job_ids, subject.cluster.slurm_conf)
            if subject.cluster.scheduler == "local":
                local.stop(done.job_dir)
    return [_ended(run, state, cause), *judge(probe, run)]


def _wait(probe: Probe, job_dir: Path, say: Callable[[str], None]) -> tuple[str, str]:
    """The run's last state and its cause; says every change."""
    cluster = probe.plan.cluster
    ledger = submit.ledger_of(cluster, job_dir.parent)
    began, said = time.monotonic(), ""
    while True:
        statuses, note = status.collect(job_dir, submit.records(probe.plan), ledger)
        state, seconds = statuses[0].state, time.monotonic() - began
        if not note:
            status.lift_holds(statuses, cluster.slurm_conf)
            if state not in ("pending", "running", "requeued"):
                return state, statuses[0].cause
        if seconds > WAIT_SECONDS:
            return "timeout", f"still {state} after {WAIT_SECONDS / 60:g} minutes; the job was cancelled"
        if (text := note or state) != said:
            say(f"{seconds:4.0f} s: {text}")
            said = text
        time.sleep(min(2.0, cluster.poll_seconds) if cluster.scheduler == "local" else cluster.poll_seconds)


def _ended(run: RunFolder, state: str, cause: str) -> Finding:
    """How the job ended; where it went wrong with the last lines of its log."""
    attempts = run.read_attempts()
    hosts = ", ".join(dict.fromkeys(str(attempt.start.get("nodes") or attempt.start["host"]) for attempt in attempts))
    if state == "complete":
        return Finding("job", "ok", f"ran on {hosts}")
    logs = [run.log(0), *(run.path.parent.parent / ".equihpc" / "slurm").glob("*/*.out")]
    log = max((path for path in logs if path.exists()), key=lambda path: path.stat().st_mtime, default=None)
    lines = log.read_text(errors="replace").splitlines()[-8:] if log else []
    started = f"started on {hosts}" if attempts else "never started"
    text = "\n".join([f"{started}; {state}{f': {cause}' if cause else ''}", *lines])
    return Finding("job", "failed", text, f"see {log or run.path}")


def judge(probe: Probe, run: RunFolder) -> list[Finding]:
    """Findings from what the ranks wrote down."""
    cluster, expected = probe.subject.cluster, probe.plan.runs[0].layout.world_size
    ranks = [found for path in (run.path / "probe").glob("rank_*.json") if (found := read_json(path))]
    ranks.sort(key=lambda rank: int(rank["rank"]))
    if not ranks:
        return []
    findings = []
    if len(ranks) != expected:
        findings.append(Finding("ranks", "failed", f"{len(ranks)} of {expected} ranks wrote what they saw", "see the job's log"))
    findings += [one for judgement in NODE_CHECKS for one in judgement(cluster, ranks)]
    if cluster.scheduler == "slurm":
        findings += [_signal(cluster, ranks, run), _requeue(cluster, run)]
    return findings


def _rank_python(cluster: Cluster, ranks: list[dict[str, Any]]) -> Iterator[Finding]:
    found = sorted({f"{rank['python']} in {rank['prefix']}" for rank in ranks})
    here = f"{'.'.join(map(str, sys.version_info[:3]))} in {sys.prefix}"
    if found == [here] or cluster.container is not None:
        yield Finding("Python on the nodes", "ok", "; ".join(found))
    else:
        yield Finding("Python on the nodes", "warning", "; ".join(found), f"here it is {here}: install one that all nodes see")


def _rank_connection(cluster: Cluster, ranks: list[dict[str, Any]]) -> Iterator[Finding]:
    errors = sorted({f"{rank['host']}: {rank['connection']['error']}" for rank in ranks if "error" in rank["connection"]})
    first = ranks[0]["connection"]
    times = [rank["connection"]["seconds"] for rank in ranks if "seconds" in rank["connection"]]
    if errors:
        yield Finding("connection", "failed", "; ".join(errors), "correct rendezvous.suffix or rendezvous.address")
    elif times:
        slowest = max(times) * 1000
        text = f"{first['address']} ({', '.join(first['resolved'])}): {len(times)} ranks connected, the slowest in {slowest:.1f} ms"
        yield Finding("connection", "ok", text)
    else:
        yield Finding("connection", "ok", f"{first['address']} ({', '.join(first['resolved'])}); one rank only")


def _rank_interfaces(cluster: Cluster, ranks: list[dict[str, Any]]) -> Iterator[Finding]:
    missing = sorted({f"{rank['host']}: {name}={','.join(names)}" for rank in ranks for name, names in rank["missing_interfaces"].items()})
    present = ", ".join(ranks[0]["interfaces"])
    if missing:
        yield Finding("interfaces", "failed", f"{'; '.join(missing)} not among {present}", "correct the profile's environment")
    else:
        yield Finding("interfaces", "ok", present)


def _rank_gpus(cluster: Cluster, ranks: list[dict[str, Any]]) -> Iterator[Finding]:
    if cluster.gpu is None:
        return
    seen = sorted({(rank["visible"], rank["num_gpus"], rank["selftest"].get("num_gpus")) for rank in ranks if "selftest" in rank}, key=str)
    text = "; ".join(f"CUDA_VISIBLE_DEVICES {visible}, nvidia-smi {smi}, torch {usable}" for visible, smi, usable in seen)
    wanted = cluster.processes_per_node
    if all(usable == wanted and smi in (None, wanted) for _, smi, usable in seen):
        yield Finding("GPUs", "ok", text)
    else:
        yield Finding("GPUs", "failed", f"{text}; {wanted} are expected", "correct gpu_request, processes_per_node or CUDA_VISIBLE_DEVICES")


def _rank_binding(cluster: Cluster, ranks: list[dict[str, Any]]) -> Iterator[Finding]:
    """Cores of the first node's ranks: they should not share any, and a site that binds a task to few cores starves them."""
    per_node = max(rank["local_rank"] for rank in ranks) + 1
    shares = [set(rank["cores"]) for rank in ranks if rank["rank"] < per_node]
    together = set().union(*shares)
    counts = sorted({len(share) for share in shares})
    text = f"{' to '.join(map(str, counts[:1] + counts[1:][-1:]))} cores per rank, {len(together)} of the node's {ranks[0]['num_cores']}"
    advice = "see srun_args (--cpu-bind=none lets equihpc pin the ranks) and cores_per_node"
    if sum(map(len, shares)) > len(together) >= per_node:
        yield Finding("binding", "warning", f"{text}; ranks share cores", advice)
    elif len(together) < min(cluster.cores_per_node, ranks[0]["num_cores"]) // 2:
        yield Finding("binding", "warning", f"{text}; cores_per_node is {cluster.cores_per_node}", advice)
    else:
        yield Finding("binding", "ok", text)


def _rank_torch(cluster: Cluster, ranks: list[dict[str, Any]]) -> Iterator[Finding]:
    tests = [rank["selftest"] for rank in ranks if "selftest" in rank]
    problems = sorted({problem for test in tests for problem in test["problems"]})
    kinds = sorted({f"{test['torch']} on {test['device']}" for test in tests if "torch" in test})
    drivers = sorted({str(rank["driver"]) for rank in ranks if rank["driver"]})
    error = max((test["product_error"] for test in tests if "product_error" in test), default=None)
    found = "; ".join(kinds) + (f", driver {', '.join(drivers)}" if drivers else "")
    found += f", bfloat16 product within {error:.2g}" if error is not None else ""
    if problems or not kinds:
        yield Finding(
            "torch", "failed", "; ".join([*problems, found]), "install the torch build that the driver supports; see the job's log"
        )
    else:
        yield Finding("torch", "ok", found)


def _rank_all_reduce(cluster: Cluster, ranks: list[dict[str, Any]]) -> Iterator[Finding]:
    bandwidths = [rank["selftest"]["all_reduce_gb_s"] for rank in ranks if "all_reduce_gb_s" in rank.get("selftest", {})]
    slowest = {part: min((found[part] for found in bandwidths if found[part]), default=None) for part in ("node", "world")}
    if slowest["world"] is None:
        return
    backend = ranks[0]["selftest"]["backend"]
    text = ", ".join(
        f"{value:.2f} GB/s {part}" for part, value in (("in a node", slowest["node"]), ("over all ranks", slowest["world"])) if value
    )
    floor = cluster.min_all_reduce_gb_s
    if floor is not None and slowest["node"] is not None and slowest["node"] < floor:
        advice = f"min_all_reduce_gb_s is {floor:g}: look for a busy or broken GPU or link, or correct the floor"
        yield Finding("all-reduce", "failed", f"{text} ({backend})", advice)
    else:
        yield Finding("all-reduce", "ok", f"{text} ({backend}; floor in a node: {floor if floor is not None else 'none'})")


NODE_CHECKS: list[Callable[[Cluster, list[dict[str, Any]]], Iterator[Finding]]] = [
    _rank_python,
    _rank_connection,
    _rank_interfaces,
    _rank_gpus,
    _rank_binding,
    _rank_torch,
    _rank_all_reduce,
]


def _signal(cluster: Cluster, ranks: list[dict[str, Any]], run: RunFolder) -> Finding:
    """How long before the time limit USR2 came. Slurm may send it a minute early or late, whatever the lead."""
    signals = [rank["signal"] for rank in ranks if rank.get("signal")]
    attempts = run.read_attempts()
    cause = attempts[0].cause if attempts else ""
    if len(signals) < len(ranks) or (cause and cause != "time limit"):
        found = f"the signal reached {len(signals)} of {len(ranks)} ranks" + (f"; the job ended by: {cause}" if cause else "")
        return Finding(
            "time limit", "failed", found, "without it a run loses what came after its last checkpoint: try again, or ask the site"
        )
    leads = [signal["limit"] - signal["came"] for signal in signals if signal["limit"] is not None]
    if not leads:
        return Finding("time limit", "warning", "the signal came, but scontrol on the nodes does not say when the time is up")
    late = LEAD_SECONDS - min(leads)
    found = f"USR2, asked for {LEAD_SECONDS} s before the limit, came {min(leads):.0f} s before it"
    if late > cluster.signal_lead_seconds / 2:
        return Finding(
            "time limit", "failed", f"{found}; signal_lead_seconds is {cluster.signal_lead_seconds}", "raise signal_lead_seconds"
        )
    return Finding("time limit", "ok", found)


def _requeue(cluster: Cluster, run: RunFolder) -> Finding:
    """Whether the job started again under its id after `scontrol requeue` on a node."""
    attempts = run.read_attempts()
    if cluster.requeue != "self":
        return Finding("requeue", "ok", "not tried: the profile says that nodes may not requeue")
    first, last = attempts[0], attempts[-1]
    if not last.start.get("restarts") or first.end is None or first.start.get("job") != last.start.get("job"):
        return Finding("requeue", "failed", "the job did not start again after its time was up", "requeue: none, if nodes may not requeue")
    waited = last.start["time"] - first.end["time"]
    return Finding("requeue", "ok", f"started again {waited:.0f} s later, SLURM_RESTART_COUNT {last.start['restarts']}")
