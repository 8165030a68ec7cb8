"""`equihpc doctor`: small checks of a profile on the spot. A new one is a function and its name in a list below."""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from hpc import site, slurm
from hpc.cluster import Cluster
from hpc.errors import EquiHPCError
from hpc.files import read_json
from hpc.messages import choices_text
from hpc.site import GIB, NodeType, Site

if TYPE_CHECKING:
    from rich.table import Table

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
        except (LookupError, ValueError, TypeError) as error:  # a site's words or a manifest that nobody foresaw
            findings.append(Finding(one.__name__.replace("_", " "), "failed", f"not understood: {type(error).__name__}: {error}"))
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
    from hpc import submit

    submit.check_place(subject.name, subject.cluster)
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
    """What accounting allows the user: accounts, submitted jobs, the time limit of the qos (the profile's and the partition's)."""
    cluster, name = subject.cluster, _partition(subject) or ""
    partition = subject.site.partitions.get(name)
    names = dict.fromkeys(qos for qos in (cluster.qos, partition and partition.qos) if qos)
    show = ["sacctmgr", "--noheader", "--parsable2", "show"]
    try:
        rows = _rows([*show, "assoc", f"user={getpass.getuser()}", "format=Account,MaxSubmitJobs,MaxWall"], cluster.slurm_conf)
        accounts = sorted({row[0] for row in rows})
        rows = [row for row in rows if row[0] == (cluster.account or row[0])]
        if names:
            rows += _rows(
                [*show, "qos", "where", f"name={','.join(names)}", "format=Name,MaxSubmitJobsPerUser,MaxWall"], cluster.slurm_conf
            )
    except slurm.SlurmError as error:
        yield Finding("limits", "warning", f"not visible: {error}", "ask the site how many jobs you may submit; set max_submitted")
        return
    most_jobs = min((int(row[1]) for row in rows if row[1].isdigit()), default=None)
    longest = min((hours for row in rows if (hours := site.hours(row[2])) is not None), default=None)
    found = f"accounts {', '.join(accounts) or '(none shown)'}"
    found += f"; at most {most_jobs} submitted jobs" if most_jobs is not None else "; no limit of submitted jobs is shown"
    found += f"; at most {longest:g} hours" if longest is not None else ""
    wanted = cluster.partitions.get(name)
    if longest is not None and wanted is not None and wanted.max_hours > longest:
        yield Finding("limits", "failed", f"{found}; the profile says {wanted.max_hours:g}", f"correct partitions.{name}.max_hours, or qos")
    elif most_jobs is not None and (cluster.max_submitted is None or cluster.max_submitted > most_jobs):
        yield Finding("limits", "warning", found, f"max_submitted: {most_jobs}")
    elif accounts and cluster.account is not None and cluster.account not in accounts and not subject.missing:
        yield Finding("limits", "warning", f"{found}; {cluster.account} is not among them", "correct account")
    else:
        yield Finding("limits", "ok", found)


def _rows(command: list[str], slurm_conf: str | None) -> list[list[str]]:
    return [line.split("|") for line in slurm.call(command, slurm_conf).splitlines() if line.count("|") == 2]


def options_accepted(subject: Subject) -> Iterator[Finding]:
    """`sbatch --test-only` with a batch script as a submission writes it."""
    from hpc import doctor_job, submit
    from hpc import plan as plans

    if subject.missing:
        yield Finding("sbatch", "warning", "not tried: the profile is not complete", "see the variables above")
        return
    cluster = subject.cluster
    allowed = cluster.partitions.get(cluster.partition or "")
    hours = allowed.max_hours if allowed else 1.0
    plan = doctor_job.plan_of(cluster, min(2, allowed.max_nodes) if allowed else 1, hours)
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
    asked = f"{doctor_job.num_nodes(array.layout.nodes)} for {hours:g} hours"
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
    """Nodes that failed again and again, and those that failed at all."""
    from hpc import nodes

    place = (subject.ledger, subject.name, subject.cluster.node_memory_hours)
    bad, others = nodes.excluded(*place), {failure.node: failure for failure in nodes.listed(*place)}
    once = "; ".join(f"{node}: {failure.cause}" for node, failure in sorted(others.items()) if node not in bad)
    if bad:
        text = "; ".join(f"{node}: {why}" for node, why in sorted(bad.items())) + (f"; failed but not avoided: {once}" if once else "")
        yield Finding("avoided nodes", "warning", text, f"left out for {subject.cluster.node_memory_hours:g} hours; tell the site")
    else:
        yield Finding("avoided nodes", "ok", f"none; failed but not avoided: {once}" if once else "none")


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
            if not _locks_exclude(first):
                return Finding(title, "failed", f"{found}: locks are granted twice (flock)", "choose another place with --runs")
    except OSError as error:
        return Finding(title, "failed", f"{found}: {error}", f"{folder} must be writable and know flock: choose another place")
    if "localflock" in options:
        return Finding(title, "warning", f"{found}, mounted with localflock", "locks hold on one node only: submit from one login node")
    return Finding(title, "ok", f"{found}: locks and atomic renames work")


def _locks_exclude(path: Path) -> bool:
    with open(path) as one, open(path) as other:
        fcntl.flock(one, fcntl.LOCK_EX)
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


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
        if "${env:" in place:
            yield Finding(f"data set {name}", "warning", f"{place}: a variable is not set", "see the variables above")
        else:
            yield data_set(f"data set {name}", Path(place).expanduser())


def data_set(title: str, folder: Path) -> Finding:
    """The manifest, and every file that it names with its size; the first and the last one are read."""
    manifest = read_json(folder / "manifest.json")
    if not isinstance(manifest, dict) or not isinstance(manifest.get("splits"), dict):
        what = "its manifest.json cannot be read" if (folder / "manifest.json").exists() else "there is no manifest.json"
        remedy = "bring the data set there, runs that need it are blocked until then; one in its authors' format: equihpc data check"
        return Finding(title, "warning", f"{folder}: {what}", remedy)
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


def unconfirmed(subject: Subject) -> Iterator[Finding]:
    """What the profile itself calls a guess."""
    if names := subject.cluster.unconfirmed:
        yield Finding("guesses", "warning", f"unconfirmed in the profile: {', '.join(names)}", "correct them and take them off the list")


CHECKS: list[Callable[[Subject], Iterator[Finding]]] = [environment, places, data_sets, caches, container, unconfirmed]
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
