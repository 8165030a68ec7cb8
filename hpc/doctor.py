"""`equihpc doctor`: small checks of a profile on the spot. A new one is a function and its name in a list below."""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from hpc import site, slurm, yamlfile
from hpc.cluster import Cluster
from hpc.errors import EquiHPCError
from hpc.files import read_json
from hpc.messages import choices_text
from hpc.runs import RunFolder
from hpc.site import GIB, NodeType, Site

if TYPE_CHECKING:
    from rich.table import Table

    from hpc.plan import Plan

State = Literal["ok", "warning", "failed"]
MIN_PYTHON = (3, 11)
FEW_GIB, NO_GIB = 20, 1
FEW_INODES = 20_000
QUESTION_SECONDS = 60.0


class Finding(NamedTuple):
    check: str
    state: State
    found: str
    advice: str = ""


@dataclass(frozen=True)
class Subject:
    """What is checked. `missing`: environment variables that the profile names and nobody set."""

    name: str
    cluster: Cluster
    missing: list[str]
    runs_dir: Path

    @cached_property
    def site(self) -> Site:
        return site.read(self.cluster.slurm_conf)

    @property
    def ledger(self) -> Path:
        from hpc import submit

        return submit.ledger_of(self.cluster, self.runs_dir).folder


def failed(findings: list[Finding]) -> bool:
    return any(finding.state == "failed" for finding in findings)


def check(subject: Subject) -> list[Finding]:
    """All checks that need no job. One that cannot be made is a failed one; without Slurm's answer its checks are left out."""
    slurm_checks = [] if subject.cluster.scheduler == "local" else SLURM_CHECKS
    findings = _run(subject, CHECKS[:1])
    if slurm_checks:
        answers = _run(subject, slurm_checks[:1])
        findings += answers + ([] if failed(answers) else _run(subject, slurm_checks[1:]))
    return findings + _run(subject, CHECKS[1:])


def _run(subject: Subject, checks: list[Callable[[Subject], Iterator[Finding]]]) -> list[Finding]:
    findings: list[Finding] = []
    for one in checks:
        try:
            findings += one(subject)
        except (EquiHPCError, OSError) as error:
            findings.append(Finding(one.__name__.replace("_", " "), "failed", str(error)))
    return findings


def table(findings: list[Finding]) -> Table:
    from rich.table import Table
    from rich.text import Text

    styles = {"ok": "green", "warning": "yellow", "failed": "bold red"}
    result = Table("check", "", "found", "what to do", show_lines=False)
    for finding in findings:
        result.add_row(Text(finding.check), Text(finding.state, styles[finding.state]), Text(finding.found), Text(finding.advice))
    return result


# --- Slurm ---------------------------------------------------------------------------------------------------------------


def slurm_answers(subject: Subject) -> Iterator[Finding]:
    version = subject.site.version
    if subject.site.partitions:
        yield Finding("Slurm", "ok", f"version {version}, {len(subject.site.partitions)} partitions")
    else:
        yield Finding("Slurm", "failed", f"version {version} shows no partition", "ask the site which partitions you may use")


def partitions(subject: Subject) -> Iterator[Finding]:
    """Existence and limits of the profile's partitions."""
    cluster, known = subject.cluster, subject.site.partitions
    for name in dict.fromkeys(name for name in (cluster.partition, *cluster.partitions, cluster.development) if name):
        title = f"partition {name}"
        if name not in known:
            yield Finding(title, "failed", f"Slurm has no such partition; {choices_text(name, list(known))}", "correct the profile")
            continue
        real, limits = known[name], cluster.partitions.get(name)
        max_hours = "no time limit" if real.max_hours is None else f"{real.max_hours:g} hours"
        found = f"{max_hours}, {real.max_nodes} nodes per job of {real.num_nodes}, state {real.state}"
        wrong = []
        if limits and real.max_hours is not None and limits.max_hours > real.max_hours:
            wrong.append(f"max_hours {limits.max_hours:g} is more than {real.max_hours:g}")
        if limits and limits.max_nodes > real.max_nodes:
            wrong.append(f"max_nodes {limits.max_nodes} is more than {real.max_nodes}")
        if wrong:
            yield Finding(title, "failed", f"{found}; the profile's {' and '.join(wrong)}", f"correct partitions.{name}")
        elif real.state != "UP":
            yield Finding(title, "warning", found, "jobs wait until the site opens it")
        elif limits is None and cluster.partitions:
            yield Finding(title, "warning", found, f"add partitions.{name}, so that plan knows its limits")
        else:
            yield Finding(title, "ok", found)


def nodes(subject: Subject) -> Iterator[Finding]:
    """GPUs and cores of the nodes that jobs get."""
    cluster = subject.cluster
    partition = _partition(subject)
    if partition is None or not subject.site.nodes.get(partition):
        return
    kinds = subject.site.nodes[partition]
    kind = next((one for one, _ in kinds if _fits(cluster, one)), kinds[0][0])
    gpus = f"{kind.gpus} GPUs{f' ({kind.gpu_type})' if kind.gpu_type else ''}" if kind.gpus else "no GPUs"
    found = f"{gpus}, {kind.cores} cores ({kind.cpus} CPUs), {kind.memory_gib} GiB"
    if len(kinds) > 1:
        found += f"; {len(kinds)} kinds of nodes in {partition}"
    if cluster.gpu and kind.gpus != cluster.processes_per_node:
        yield Finding("nodes", "failed", f"{found}; the profile says {cluster.processes_per_node}", "correct processes_per_node")
    elif cluster.cores_per_node > kind.cpus:
        yield Finding("nodes", "failed", f"{found}; the profile's cores_per_node is {cluster.cores_per_node}", "correct cores_per_node")
    elif cluster.cores_per_node < kind.cores:
        advice = f"cores_per_node is {cluster.cores_per_node}: the others stay idle"
        yield Finding("nodes", "warning", found, advice)
    else:
        yield Finding("nodes", "ok", found)


def _fits(cluster: Cluster, kind: NodeType) -> bool:
    return cluster.cores_per_node <= kind.cpus and (cluster.gpu is None or kind.gpus == cluster.processes_per_node)


def _partition(subject: Subject) -> str | None:
    """The profile's, or Slurm's default."""
    default = next((name for name, one in subject.site.partitions.items() if one.is_default), None)
    return subject.cluster.partition or default


def arrays(subject: Subject) -> Iterator[Finding]:
    limit, wanted = subject.site.config.get("MaxArraySize", ""), subject.cluster.max_array_size
    if not limit.isdigit():
        return
    if wanted > int(limit):
        yield Finding("arrays", "failed", f"MaxArraySize {limit}, the profile's max_array_size is {wanted}", f"max_array_size: {limit}")
    else:
        yield Finding("arrays", "ok", f"MaxArraySize {limit}; arrays are split at {wanted}")


def preemption(subject: Subject) -> Iterator[Finding]:
    """What happens to a job that has to make room, and at its end."""
    config, name = subject.site.config, _partition(subject)
    real = subject.site.partitions.get(name or "")
    if real is None:
        return
    found = (
        f"PreemptMode {real.preempt_mode}, GraceTime {real.grace_seconds} s, KillWait {config.get('KillWait', '?')},"
        f" JobRequeue {config.get('JobRequeue', '?')}"
    )
    if real.preempt_mode.startswith("CANCEL"):
        yield Finding("preemption", "warning", found, "preempted jobs are not requeued by Slurm: the next submit continues their runs")
    else:
        yield Finding("preemption", "ok", found)


def limits(subject: Subject) -> Iterator[Finding]:
    """The user's associations and qos, where the site shows them."""
    cluster = subject.cluster
    query = ["sacctmgr", "--noheader", "--parsable2", "show"]
    try:
        text = slurm.call([*query, "assoc", f"user={getpass.getuser()}", "format=Account,QOS,MaxSubmitJobs"], cluster.slurm_conf)
        rows = [line.split("|") for line in text.splitlines() if line.count("|") == 2]
        qos = {name for _, names, _ in rows for name in names.split(",") if name}
        if cluster.qos:
            format_ = "format=Name,MaxSubmitJobsPerUser"
            rows += [["", *line.split("|")] for line in slurm.call([*query, "qos", cluster.qos, format_], cluster.slurm_conf).splitlines()]
    except slurm.SlurmError as error:
        yield Finding("limits", "warning", f"not visible: {error}", "ask the site how many jobs you may submit; set max_submitted")
        return
    caps = [int(row[2]) for row in rows if row[2].isdigit() and row[0] in ("", cluster.account)]
    accounts = sorted({row[0] for row in rows if row[0]})
    found = f"accounts {', '.join(accounts) or '(none shown)'}; qos {', '.join(sorted(qos)) or '(none shown)'}"
    if not caps:
        yield Finding("limits", "ok", f"{found}; no limit of submitted jobs is shown")
    elif cluster.max_submitted is None or cluster.max_submitted > min(caps):
        yield Finding("limits", "warning", f"{found}; at most {min(caps)} submitted jobs", f"max_submitted: {min(caps)}")
    else:
        yield Finding("limits", "ok", f"{found}; at most {min(caps)} submitted jobs, max_submitted {cluster.max_submitted}")


def options_accepted(subject: Subject) -> Iterator[Finding]:
    """`sbatch --test-only` with a batch script as a submission writes it."""
    from hpc import plan as plans
    from hpc import submit

    if subject.missing:
        yield Finding("sbatch", "warning", "not tried: the profile is not complete", "see the variables above")
        return
    cluster = subject.cluster
    allowed = cluster.partitions.get(cluster.partition or "")
    hours = allowed.max_hours if allowed else 1.0
    plan = _plan(cluster, min(2, allowed.max_nodes) if allowed else 1, hours, {})
    (array,) = plans.arrays(plan.runs, cluster)
    with tempfile.TemporaryDirectory(prefix="equihpc-doctor-") as folder:
        script = Path(folder) / "job.sh"
        script.write_text(submit.sbatch_text(array, plan, subject.runs_dir / "doctor"))
        done = subprocess.run(
            ["sbatch", "--test-only", str(script)],
            env=slurm.environment(cluster.slurm_conf),
            capture_output=True,
            text=True,
            timeout=QUESTION_SECONDS,
            stdin=subprocess.DEVNULL,
        )
    said = (done.stderr or done.stdout).strip().replace("sbatch: ", "")
    asked = f"{array.layout.nodes} nodes for {hours:g} hours"
    if done.returncode:
        advice = "correct partition, account, qos, gpu_request or sbatch in the profile"
        yield Finding("sbatch", "failed", f"{asked} refused: {said}", advice)
    else:
        yield Finding("sbatch", "ok", f"{asked} accepted: {said.splitlines()[-1] if said else ''}")


def quota(subject: Subject) -> Iterator[Finding]:
    command = subject.cluster.quota_command
    if command is None:
        return
    try:
        done = subprocess.run(
            ["bash", "-c", command], capture_output=True, text=True, timeout=QUESTION_SECONDS, stdin=subprocess.DEVNULL, errors="replace"
        )
    except subprocess.TimeoutExpired:
        yield Finding("quota", "warning", f"{command} did not answer in {QUESTION_SECONDS:g} s", "correct quota_command")
        return
    if done.returncode:
        said = (done.stderr or done.stdout).strip() or "nothing said"
        yield Finding("quota", "warning", f"{command}: exit code {done.returncode}: {said}", "correct quota_command")
    else:
        yield Finding("quota", "ok", done.stdout.strip()[:2000])


def rendezvous(subject: Subject) -> Iterator[Finding]:
    """Whether the name under which the others look for the first node resolves, here at least."""
    import socket

    rule, name = subject.cluster.rendezvous, _partition(subject)
    hosts = subject.site.addresses.get(name or "", {})
    if not hosts:
        return
    address = rule.address or next(iter(hosts)) + rule.suffix
    try:
        found = sorted({str(entry[4][0]) for entry in socket.getaddrinfo(address, None)})
        yield Finding("rendezvous", "ok", f"{address} is {', '.join(found)}")
    except OSError as error:
        advice = "correct rendezvous.suffix or address; names may resolve on the nodes only: doctor --node"
        yield Finding("rendezvous", "warning", f"{address} does not resolve here: {error}", advice)


def avoided_nodes(subject: Subject) -> Iterator[Finding]:
    """Nodes on which runs failed twice."""
    from hpc import nodes

    bad = nodes.excluded(subject.ledger, subject.name, subject.cluster.node_memory_hours, time.time())
    if bad:
        text = "; ".join(f"{node}: {why}" for node, why in sorted(bad.items()))
        yield Finding("avoided nodes", "warning", text, f"they are excluded for {subject.cluster.node_memory_hours:g} hours; tell the site")
    else:
        yield Finding("avoided nodes", "ok", "none")


# --- places --------------------------------------------------------------------------------------------------------------


def environment(subject: Subject) -> Iterator[Finding]:
    """Python, its place, and the variables that the profile names."""
    version = ".".join(map(str, sys.version_info[:3]))
    prefix = Path(sys.prefix)
    local = next((folder for folder in ("/tmp", "/var/tmp", "/dev/shm", "/run") if prefix.is_relative_to(folder)), None)
    if sys.version_info < MIN_PYTHON:
        yield Finding("Python", "failed", f"{version} in {prefix}", f"at least {'.'.join(map(str, MIN_PYTHON))} is needed")
    elif local and subject.cluster.scheduler == "slurm":
        yield Finding("Python", "warning", f"{version} in {prefix}", f"{local} is another place on each node: install in a shared folder")
    else:
        yield Finding("Python", "ok", f"{version} in {prefix}")
    for name in dict.fromkeys(subject.missing):
        yield Finding("variables", "failed", f"{name} is not set", f"export {name}=…")


def places(subject: Subject) -> Iterator[Finding]:
    """The folders that jobs write to: space, inodes, locks, atomic renames."""
    folders = {"runs": subject.runs_dir}
    if subject.ledger.parent != subject.runs_dir:
        folders["ledger"] = subject.ledger
    for name, folder in folders.items():
        there = site.nearest(folder)
        yield _space(f"space of {name}", folder, there)
        yield _behaviour(f"file system of {name}", folder, there)


def _space(title: str, folder: Path, there: Path) -> Finding:
    place = os.statvfs(there)
    free_gib = place.f_bavail * place.f_frsize / GIB
    inodes = f"{place.f_favail:,} inodes" if place.f_files else "inodes not counted"
    found = f"{folder}: {free_gib:,.0f} GiB and {inodes} free (the site's quota may be lower)"
    if free_gib < NO_GIB:
        return Finding(title, "failed", found, "make room, or choose another place with --runs or the profile's ledger")
    if free_gib < FEW_GIB or (place.f_files and place.f_favail < FEW_INODES):
        return Finding(title, "warning", found, "a checkpoint of every run must fit: see the estimate of equihpc plan")
    return Finding(title, "ok", found)


def _behaviour(title: str, folder: Path, there: Path) -> Finding:
    """Tries what submissions and supervisors rely on, in a temporary folder."""
    kind, options = mount_of(there)
    found = f"{kind} at {there}"
    try:
        with tempfile.TemporaryDirectory(prefix=".equihpc-doctor-", dir=there) as name:
            first, second = Path(name) / "a", Path(name) / "b"
            first.write_text("old")
            second.write_text("new")
            os.replace(second, first)
            if first.read_text() != "new" or second.exists():
                return Finding(title, "failed", f"{found}: a rename does not replace the old file", "choose another place with --runs")
            with open(first) as one, open(first) as other:
                fcntl.flock(one, fcntl.LOCK_EX)
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return Finding(title, "failed", f"{found}: locks are granted twice (flock)", "choose another place with --runs")
    except OSError as error:
        return Finding(title, "failed", f"{found}: {error}", f"{folder} must be writable and know flock: choose another place")
    if "localflock" in options:
        return Finding(title, "warning", f"{found}, mounted with localflock", "locks hold on one node only: submit from one login node")
    return Finding(title, "ok", f"{found}: locks and atomic renames work")


def mount_of(path: Path) -> tuple[str, list[str]]:
    """Kind and options of the mount that holds `path`; unknown where /proc/mounts is not there."""
    best = (0, "unknown file system", [""])
    with contextlib.suppress(OSError):
        for line in Path("/proc/mounts").read_text(errors="replace").splitlines():
            _, point, kind, options, *_ = line.split(" ")
            point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), point)
            if path.resolve().is_relative_to(point) and len(point) >= best[0]:
                best = (len(point), kind, options.split(","))
    return best[1], best[2]


def data_sets(subject: Subject) -> Iterator[Finding]:
    for name, place in subject.cluster.datasets.items():
        yield (
            data_set(f"data set {name}", Path(place).expanduser())
            if "${env:" not in place
            else Finding(f"data set {name}", "warning", f"{place}: a variable is not set", "see the variables above")
        )


def data_set(title: str, folder: Path) -> Finding:
    """The manifest, and every file that it names with its size; the first and the last one are read."""
    manifest = read_json(folder / "manifest.json")
    if not isinstance(manifest, dict) or not isinstance(manifest.get("splits"), dict):
        what = "its manifest.json cannot be read" if (folder / "manifest.json").exists() else "there is no manifest.json"
        return Finding(title, "warning", f"{folder}: {what}", "bring the data set there; runs that need it are blocked until then")
    files = [file for split in manifest["splits"].values() for file in (split["index"], *split["shards"])]
    for file in files:
        try:
            size = (folder / file["name"]).stat().st_size
        except OSError as error:
            return Finding(title, "failed", f"{folder / file['name']}: {error.strerror}", "copy the data set anew")
        if size != file["bytes"]:
            found = f"{folder / file['name']} has {size} bytes instead of {file['bytes']}"
            return Finding(title, "failed", found, "copy the data set anew")
    for file in files[:1] + files[-1:]:
        try:
            with open(folder / file["name"], "rb") as opened:
                opened.read(2**16)
        except OSError as error:
            return Finding(title, "failed", f"{folder / file['name']}: {error.strerror}", "look at its permissions")
    images = sum(split["num_images"] for split in manifest["splits"].values())
    return Finding(title, "ok", f"{folder}: {images:,} images in {len(files)} files")


def caches(subject: Subject) -> Iterator[Finding]:
    """Caches of a few GB and many files do not belong into a small home; jobs have the profile's environment."""
    home = Path.home()
    reason = site.small_home(home, subject.runs_dir)
    values = {name: subject.cluster.environment.get(name) or os.environ.get(name) for name in site.CACHES}
    places = {name: Path(value) if value else home / site.CACHES[name] for name, value in values.items() if value or site.CACHES[name]}
    inside = [name for name, place in places.items() if place.is_relative_to(home)]
    if not reason or not inside:
        yield Finding("caches", "ok", "not in the home" if not inside else f"in the home, which is large enough: {home}")
        return
    better = site.cache_folders(subject.runs_dir / ".caches")
    lines = "\n".join(f"export {name}={shlex.quote(better[name])}" for name in inside)
    yield Finding(
        "caches", "warning", f"{', '.join(inside)} in the home; {reason}", f"in the profile's environment and your shell:\n{lines}"
    )


def container(subject: Subject) -> Iterator[Finding]:
    found = subject.cluster.container
    if found is None or found.image is None:
        return
    program = shlex.split(found.command)[0]
    if not Path(found.image).expanduser().exists() and "://" not in found.image:
        yield Finding("container", "failed", f"the image {found.image} does not exist", "build it, or correct container.image")
    elif shutil.which(program) is None:
        yield Finding("container", "warning", f"{program} is not on this machine", "it may be on the nodes: doctor --node")
    else:
        yield Finding("container", "ok", f"{found.image}, run by {program}")


CHECKS: list[Callable[[Subject], Iterator[Finding]]] = [environment, places, data_sets, caches, container]
SLURM_CHECKS: list[Callable[[Subject], Iterator[Finding]]] = [
    slurm_answers,
    partitions,
    nodes,
    arrays,
    preemption,
    limits,
    options_accepted,
    quota,
    rendezvous,
    avoided_nodes,
]


# --- from inside a job ---------------------------------------------------------------------------------------------------

WAIT_SECONDS = 3600.0  # for the job to start and to end


@dataclass(frozen=True)
class Probe:
    """The job that looks around on the nodes."""

    subject: Subject
    plan: Plan

    @property
    def description(self) -> str:
        run, cluster = self.plan.runs[0], self.plan.cluster
        where = f" in partition {cluster.partition}" if cluster.partition else f" on {self.subject.name}"
        return f"a job of {run.layout.nodes} nodes for at most {run.hours * 60:g} minutes{where}"


def _plan(cluster: Cluster, nodes: int, hours: float, config: dict[str, Any]) -> Plan:
    from hpc import plan, spec

    processes = cluster.processes_per_node if cluster.gpu else min(2, cluster.processes_per_node)
    stage = {
        "entry": "hpc.probe",
        "resources": {"nodes": nodes, "gpus_per_node": processes, "hours": hours},
        "config": {"began": time.strftime("%Y-%m-%dT%H:%M:%S"), "selftest_seconds": 240.0, **config},
    }
    document = yamlfile.parse(json.dumps({"stages": {"probe": stage}}), "doctor.yaml")
    job = spec.validate(spec.Job, document.data, document)
    return plan.expand(spec.JobFile("doctor", job, document, ("probe",)), cluster)


def probe_job(subject: Subject, partition: str | None = None, qos: str | None = None) -> Probe:
    """Two nodes for two minutes, five where GPUs are set up, of which all but the first 45 s are the signal's lead."""
    cluster = subject.cluster
    minutes = 5 if cluster.gpu else 2
    changes: dict[str, Any] = {
        "partition": partition or cluster.development or cluster.partition,
        "qos": qos or cluster.qos,
        "signal_lead_seconds": minutes * 60 - 45,
        "ledger": None,  # probes are not worth remembering
        "datasets": {},
    }
    probing = cluster.model_copy(update=changes)
    allowed = cluster.partitions.get(changes["partition"] or "")
    is_local = cluster.scheduler == "local"
    nodes = 1 if is_local else min(2, allowed.max_nodes) if allowed else 2
    config = {
        "needs_gpu": cluster.gpu is not None,
        "awaits_signal": not is_local,
        "requeues": cluster.requeue == "self",
    }
    return Probe(subject, _plan(probing, nodes, minutes / 60, config))


def check_nodes(probe: Probe, say: Callable[[str], None]) -> list[Finding]:
    """Submit the job, wait for its end, and judge what its ranks saw. Raises UserError where it cannot be submitted."""
    from hpc import submit

    subject, plan = probe.subject, probe.plan
    runs_dir = subject.runs_dir / ".doctor"
    for old in runs_dir.glob("doctor/probe/*/COMPLETE"):
        shutil.rmtree(old.parent)
    done = submit.submit(plan, subject.name, runs_dir, subject.missing)
    run = RunFolder(submit.folder_of(plan.runs[0], done.job_dir))
    say(f"submitted {probe.description}" + (f", Slurm job {', '.join(done.job_ids)}" if done.job_ids else "") + f"; its folder: {run.path}")
    try:
        state, cause = _wait(probe, done.job_dir, say)
    except BaseException:
        slurm.cancel(done.job_ids, subject.cluster.slurm_conf)
        raise
    if state == "timeout":
        slurm.cancel(done.job_ids, subject.cluster.slurm_conf)
    return [_ended(run, state, cause), *judge(subject.cluster, run, plan)]


def _wait(probe: Probe, job_dir: Path, say: Callable[[str], None]) -> tuple[str, str]:
    """The run's last state and its cause; says every change."""
    from hpc import status, submit

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
    attempts = run.read_attempts()
    hosts = ", ".join(dict.fromkeys(str(attempt.start.get("nodes") or attempt.start["host"]) for attempt in attempts))
    if state == "complete":
        return Finding("job", "ok", f"ran on {hosts}")
    log = run.log(0)
    lines = log.read_text(errors="replace").splitlines()[-5:] if log.exists() else []
    started = f"ran on {hosts}" if attempts else "never started"
    text = "\n".join([f"{started}; {state}{f': {cause}' if cause else ''}", *lines])
    return Finding("job", "failed", text, f"see {run.path} and, where nothing started, the log in {run.path.parent.parent / '.equihpc'}")


def judge(cluster: Cluster, run: RunFolder, plan: Plan) -> list[Finding]:
    """Findings from what the ranks wrote down."""
    ranks = [found for path in sorted((run.path / "probe").glob("rank_*.json")) if (found := read_json(path))]
    ranks.sort(key=lambda rank: int(rank["rank"]))
    if not ranks:
        return []
    expected = plan.runs[0].layout.world_size
    findings = [one for judgement in NODE_CHECKS for one in judgement(cluster, ranks)]
    if len(ranks) != expected:
        findings.insert(0, Finding("ranks", "failed", f"{len(ranks)} of {expected} ranks wrote what they saw", "see the job's log"))
    if cluster.scheduler == "slurm":
        findings += [_signal(ranks, run, plan), *_requeue(cluster, run)]
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
    """Ranks of one node should not share cores; a site that binds the task to few cores starves them."""
    by_host: dict[str, list[set[int]]] = {}
    for rank in ranks:  # emulated nodes share a host name: the local rank tells them apart
        by_host.setdefault(rank["host"], []).append(set(rank["cores"])) if rank["local_rank"] < cluster.processes_per_node else None
    counts = sorted({len(rank["cores"]) for rank in ranks})
    text = f"{counts[0]} cores per rank" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} cores per rank"
    per_node = max(rank["local_rank"] for rank in ranks) + 1
    first = [set(rank["cores"]) for rank in ranks[:per_node]]
    total = len(set().union(*first))
    if total >= per_node and sum(map(len, first)) > total:
        yield Finding("binding", "warning", f"{text}; ranks of a node share cores", "see srun_args: --cpu-bind=none lets equihpc pin them")
    elif total < min(cluster.cores_per_node, (os.cpu_count() or 1)) and total < per_node * 2:
        yield Finding("binding", "warning", f"{text}, {total} cores in all", "see srun_args: --cpu-bind=none, or cores_per_node")
    else:
        yield Finding("binding", "ok", f"{text}, {total} cores of the first node")


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


def _signal(ranks: list[dict[str, Any]], run: RunFolder, plan: Plan) -> Finding:
    """When USR2 came before the time limit, against what was asked for."""
    asked = plan.cluster.signal_lead_seconds
    signals = [rank["signal"] for rank in ranks if rank.get("signal")]
    attempts = run.read_attempts()
    cause = attempts[0].cause if attempts else ""
    if len(signals) < len(ranks):
        advice = "without the signal a run loses what it did since its last checkpoint: ask the site about sbatch --signal"
        return Finding(
            "time limit", "failed", f"the signal reached {len(signals)} of {len(ranks)} ranks ({cause or 'no end seen'})", advice
        )
    leads = [signal["limit"] - signal["came"] for signal in signals if signal["limit"] is not None]
    if not leads:
        return Finding("time limit", "warning", "the signal came, but scontrol on the nodes does not say when the time is up", "")
    late = asked - min(leads)
    found = f"USR2 asked for {asked} s before the limit came {min(leads):.0f} s before it"
    if min(leads) < asked / 2 or late > plan.cluster.signal_lead_seconds:
        return Finding("time limit", "failed", found, "raise signal_lead_seconds")
    return Finding("time limit", "warning" if late > 90 else "ok", found, "raise signal_lead_seconds by that much" if late > 90 else "")


def _requeue(cluster: Cluster, run: RunFolder) -> Iterator[Finding]:
    """Whether the job started again under its id after `scontrol requeue` on a node."""
    attempts = run.read_attempts()
    if cluster.requeue != "self":
        yield Finding("requeue", "ok", "not tried: the profile says that nodes may not requeue")
    elif len(attempts) > 1 and attempts[-1].start.get("restarts", 0) >= 1 and attempts[0].end:
        waited = attempts[-1].start["time"] - attempts[0].end["time"]
        same = attempts[-1].start.get("job") == attempts[0].start.get("job")
        found = f"started again {waited:.0f} s later, SLURM_RESTART_COUNT {attempts[-1].start['restarts']}"
        yield Finding("requeue", "ok" if same else "failed", found + ("" if same else ", under another id"))
    else:
        yield Finding("requeue", "failed", "the job did not start again after its time was up", "requeue: none, if nodes may not requeue")
