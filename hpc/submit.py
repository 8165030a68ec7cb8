"""Submission: create what is missing, tell Slurm (the only importer of submitit) or the local runner, keep the journal.

Submitting again is the resume: what is complete or in flight is left alone.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc import cluster as clusters
from hpc import local, slurm, snapshot
from hpc.cluster import Cluster
from hpc.errors import EquiHPCError, UserError
from hpc.files import locked, write_json
from hpc.journal import Journal
from hpc.messages import choices_text
from hpc.plan import Array, Plan, Run, arrays
from hpc.runs import Ledger, RunFolder
from hpc.spec import REFERENCE
from hpc.status import JobRecord, Record, RunStatus, collect, job_names
from hpc.supervisor import snapshot_environment

START = ("planned", "failed", "skipped", "stale")  # states that a submission starts
ALIVE = ("complete", "pending", "running", "requeued")  # states of an upstream run that a dependent can wait for


@dataclass(frozen=True)
class Submission:
    """What a submission did: which runs start now, and the state of those that it left alone."""

    job_dir: Path
    started: list[Run]
    left: list[RunStatus]
    job_ids: list[str]
    note: str


def ledger_of(cluster: Cluster, runs_dir: Path) -> Ledger:
    return Ledger(Path(cluster.ledger).expanduser() if cluster.ledger else runs_dir / ".ledger")


def records(plan: Plan) -> list[Record]:
    return [Record(run.id, run.hash, run.stage, run.params, run.after, run.cost.num_steps) for run in plan.runs]


def check_place(cluster_name: str, cluster: Cluster) -> None:
    """Local training on a login node is refused; a Slurm profile needs Slurm at hand. Raises UserError."""
    if cluster.scheduler == "local" and not slurm.inside_allocation() and slurm.found_here():
        raise UserError(
            "this is a login node (sbatch is here and no allocation): local training would run on it."
            f" Submit to Slurm with --cluster NAME (profiles: {', '.join(n for n in clusters.names() if n != 'local')}),"
            " or get a node first: salloc --nodes=1 --time=1:00:00"
        )
    if cluster.scheduler == "slurm":
        if shutil.which("sbatch") is None:
            raise UserError(
                f"--cluster {cluster_name} needs Slurm, but sbatch is not on this machine;"
                " run this on the cluster's login node, or use --cluster local, or start a test Slurm: equihpc testbed up"
            )
        if cluster.slurm_conf is not None and not Path(cluster.slurm_conf).is_file():
            raise UserError(
                f"--cluster {cluster_name}: its slurm_conf {cluster.slurm_conf} does not exist; for the testbed: equihpc testbed up"
            )


RETRY = ("cancelled", "purged")  # states that a submission starts when asked


def submit(plan: Plan, cluster_name: str, runs_dir: Path, missing_variables: list[str], retry: list[str]) -> Submission:
    """Raises UserError before anything is written when something is missing."""
    cluster = plan.cluster
    for state in retry:
        if state not in RETRY:
            raise UserError(f"--retry {state}: {choices_text(state, RETRY)} (failed runs start with every submit)")
    check_place(cluster_name, cluster)
    if missing_variables:
        raise UserError(f"--cluster {cluster_name}: environment variable {missing_variables[0]} is not set; export it and submit again")
    for warning in plan.warnings:
        raise UserError(f"{plan.job.document.file}: {warning}")
    if any(character in str(runs_dir) for character in "%:\n\r"):
        raise UserError(f"--runs {str(runs_dir)!r}: the path must not contain '%', ':' or line breaks (Slurm and PYTHONPATH split there)")
    job_dir = runs_dir / plan.job.name
    with locked(job_dir / ".equihpc" / "lock"):
        return _submit(plan, cluster_name, job_dir, (*START, *retry))


def _submit(plan: Plan, cluster_name: str, job_dir: Path, start_states: tuple[str, ...]) -> Submission:
    cluster, runs_dir = plan.cluster, job_dir.parent
    ledger = ledger_of(cluster, runs_dir)
    _link_shared(plan, job_dir, ledger)
    statuses, note = collect(job_dir, records(plan), ledger)
    if note:
        raise UserError(f"{note}; nothing was submitted, try again later")
    by_id = {status.record.id: status for status in statuses}
    start: dict[str, Run] = {}
    for run in plan.runs:  # upstream first
        upstream = [run.upstream[stage].id for stage in run.direct]
        status = by_id[run.id]
        if status.state == "cancelled" and "cancelled" in start_states and status.slurm_name is not None:
            RunFolder(status.path).cancel_mark.unlink(missing_ok=True)  # its job is still queued: it goes on there
        elif status.state in start_states and all(other in start or by_id[other].state in ALIVE for other in upstream):
            start[run.id] = run
    ready = list(start.values())
    left = [status for status in statuses if status.record.id not in start]
    _write_record(plan, cluster_name, job_dir, ledger)
    if not ready:
        return Submission(job_dir, [], left, [], note)
    code = snapshot.take(snapshot.packages_of({run.entry for run in ready}), job_dir / ".equihpc" / "code")
    for run in ready:
        _create(run, plan, cluster_name, job_dir, code, ledger, is_stale=by_id[run.id].state == "stale")
    journal = Journal.of_job(job_dir)
    in_flight = {status.record.hash: status.slurm_name for status in statuses if status.slurm_name and status.state in ALIVE[1:]}
    start_arrays = arrays(ready, cluster, in_flight)
    if cluster.scheduler == "local":
        _start_local(start_arrays, job_dir, journal, cluster, str(code["path"]))
        return Submission(job_dir, ready, left, [], note)
    return Submission(job_dir, ready, left, _start_slurm(start_arrays, plan, cluster_name, job_dir, journal, code), note)


def _write_record(plan: Plan, cluster_name: str, job_dir: Path, ledger: Ledger) -> None:
    report = plan.job.job.report.model_dump()
    file, conf = plan.job.document.file, plan.cluster.slurm_conf
    rules = {
        "budgets": plan.job.job.budgets.model_dump(),
        "notify": plan.job.job.notify.model_dump(mode="json") if plan.job.job.notify else None,
        "requeue": plan.cluster.requeue,
        "node_memory_hours": plan.cluster.node_memory_hours,
    }
    record = JobRecord(plan.job.name, file, cluster_name, conf, str(ledger.folder), report, records(plan), [], rules)
    write_json(job_dir / ".equihpc" / "job.json", record.to_json())


def _link_shared(plan: Plan, job_dir: Path, ledger: Ledger) -> None:
    """A run that another job (or this one, under another name) already has is linked, so that it is neither run nor kept twice."""
    owners: dict[str, Path] = {}
    for name in job_names(job_dir.parent):
        other = job_dir.parent / name
        for record in JobRecord.read(other).records:
            path = other / record.stage / record.id
            if (path / "spec.json").exists() and not path.is_symlink():
                owners[record.hash] = path
    for run in plan.runs:
        mine = folder_of(run, job_dir)
        if mine.is_symlink() and not mine.exists():
            mine.unlink()  # what it pointed to is gone
        known = Path(ledger.read(run.hash).get("path", "")) if run.hash in ledger and run.hash not in owners else None
        owner = owners.get(run.hash) or known
        if owner is not None and owner != mine and (owner / "spec.json").exists() and not mine.exists():
            mine.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with contextlib.suppress(FileExistsError):
                os.symlink(os.path.relpath(owner.resolve(), mine.parent.resolve()), mine)


def folder_of(run: Run, job_dir: Path) -> Path:
    return job_dir / run.stage / run.id


def resolved(config: Any, run: Run, job_dir: Path) -> Any:
    """The config with `${stage}` replaced by that run's folder."""
    if isinstance(config, dict):
        return {key: resolved(value, run, job_dir) for key, value in config.items()}
    if isinstance(config, list):
        return [resolved(value, run, job_dir) for value in config]
    if isinstance(config, str) and (match := REFERENCE.match(config)):
        return str(folder_of(run.upstream[match[1]], job_dir))
    return config


def _create(run: Run, plan: Plan, cluster_name: str, job_dir: Path, code: Mapping[str, Any], ledger: Ledger, is_stale: bool) -> None:
    """The run's folder with `spec.json`: everything that its supervisors need."""
    cluster = plan.cluster
    spec = {
        "id": run.id,
        "hash": run.hash,
        "job": plan.job.name,
        "stage": run.stage,
        "entry": run.entry,
        "params": run.params,
        "upstream": {stage: str(folder_of(run.upstream[stage], job_dir)) for stage in run.direct},
        "layout": {"nodes": run.layout.nodes, "processes": run.layout.processes, "gpus": run.layout.gpus},
        "hours": run.hours,
        "num_steps": run.cost.num_steps,
        "cluster": cluster_name,
        "slurm_conf": cluster.slurm_conf,
        "rendezvous": cluster.rendezvous.model_dump(),
        "environment": cluster.environment,
        "startup_seconds": cluster.startup_seconds,
        "hang_seconds": cluster.hang_seconds,
        "code": dict(code),
        "ledger": str(ledger.folder),
        "config": resolved(run.config, run, job_dir),
    }
    folder = RunFolder(folder_of(run, job_dir))
    if is_stale:
        folder.set_aside()
    folder.create(spec)


# --- the local runner --------------------------------------------------------------------------------------------------


def _start_local(start: list[Array], job_dir: Path, journal: Journal, cluster: Cluster, code: str) -> None:
    """Hand the runs to a runner of their own, which goes on when this process ends."""
    uids, paths = [], []
    for array in start:
        elements = [[folder_of(run, job_dir) for run in element] for element in array.elements]
        uid, path = journal.write_array(elements, array.slots, array.layout.gpus)
        uids.append(uid)
        paths.append(str(path))
    journal.add("local", uids=uids)
    gpus = cluster.processes_per_node if cluster.gpu else 0
    command = [sys.executable, "-m", "hpc.local", str(job_dir), str(cluster.cores_per_node), str(gpus), *paths]
    with open(journal.folder / "local.log", "ab") as log:
        environment = {**os.environ, **snapshot_environment(code)}
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    while not local.alive(job_dir):  # until it holds the lock, or was quick enough to be done
        if process.poll() is not None:
            if process.returncode:
                raise EquiHPCError(f"the local runner ended at once, see {journal.folder / 'local.log'}")
            return
        time.sleep(0.05)


# --- Slurm -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _slurm_environment(slurm_conf: str | None) -> Iterator[None]:
    """submitit calls sbatch with this process's environment."""
    before = dict(os.environ)
    wanted = slurm.environment(slurm_conf)
    for name in before.keys() - wanted.keys():
        del os.environ[name]
    os.environ.update(wanted)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _start_slurm(
    start: list[Array],
    plan: Plan,
    cluster_name: str,
    job_dir: Path,
    journal: Journal,
    code: Mapping[str, Any],
) -> list[str]:
    import submitit  # imported here: `plan` and `status` need it only for the text of a batch script

    from hpc.worker import Element

    cluster = plan.cluster
    job_ids: dict[int, str] = {}
    uids: dict[int, str] = {}
    for array in start:
        elements = [[folder_of(run, job_dir) for run in element] for element in array.elements]
        uid, array_file = journal.write_array(elements, array.slots, array.layout.gpus)
        uids[id(array)] = uid
        mirrors = uids[id(array.mirrors)] if array.mirrors else None
        waits_for = [uids[id(upstream)] for upstream in array.waits_for]
        journal.add(
            "intent", uid=uid, stage=array.stage, cluster=cluster_name, slurm_conf=cluster.slurm_conf, mirrors=mirrors, waits_for=waits_for
        )
        dependency = _dependency(array, lambda upstream: job_ids[id(upstream)])
        folder = journal.folder / "slurm" / uid
        with _slurm_environment(cluster.slurm_conf):
            executor = submitit.SlurmExecutor(folder=folder, max_num_timeout=1_000_000)
            executor.update_parameters(**parameters(array, plan, uid, array_file, str(code["path"]), dependency))
            try:
                jobs = executor.submit_array([Element(str(array_file), index) for index in range(len(elements))])
            except submitit.core.utils.FailedJobError as error:
                raise slurm.SlurmError(f"sbatch refused stage {array.stage}: {error}") from None
        job_id = str(jobs[0].job_id).partition("_")[0]
        job_ids[id(array)] = job_id
        journal.add("submitted", uid=uid, job_id=job_id)
    return list(job_ids.values())


def _dependency(array: Array, job_id: Callable[[Array], str]) -> str | None:
    """Slurm's view of what this array waits for; the worker checks the markers besides.

    `afterany` where some of several upstream runs may fail: those that complete shall still be evaluated.
    """
    parts = []
    if array.mirrors is not None:
        parts.append(f"aftercorr:{job_id(array.mirrors)}")
    elif array.waits_for:
        kind = "afterok" if all(len(upstream.elements) == 1 for upstream in array.waits_for) else "afterany"
        parts.append(":".join([kind, *map(job_id, array.waits_for)]))
    if array.in_flight:
        parts.append(":".join(["afterany", *array.in_flight]))
    return ",".join(parts) or None


def parameters(array: Array, plan: Plan, uid: str, array_file: Path, code: str, dependency: str | None) -> dict[str, Any]:
    """submitit's parameters for one array: sbatch options, the lines around the task, srun's options."""
    cluster, layout = plan.cluster, array.layout
    share = 1.0 if cluster.whole_nodes else min(1.0, layout.fraction * array.slots)
    cores = max(layout.processes, int(cluster.cores_per_node * share))
    gpus = cluster.processes_per_node if cluster.whole_nodes else layout.gpus * array.slots
    more: dict[str, Any] = {"requeue": True, **cluster.sbatch}
    if cluster.gpu and layout.gpus and cluster.gpu_request != "none":
        more |= {"gres": f"gpu:{gpus}"} if cluster.gpu_request == "gres" else {"gpus-per-node": gpus}
    if dependency:
        more |= {"dependency": dependency, "kill-on-invalid-dep": "yes"}
    exports = {**cluster.environment, "SRUN_CPUS_PER_TASK": str(cores)}
    if cluster.slurm_conf:
        exports["SLURM_CONF"] = cluster.slurm_conf
    fail = "|| { echo 'equihpc: this line of the profile failed; the job ends' >&2; exit 1; }"
    setup = [
        "trap : TERM USR2  # the supervisors act on signals; this shell lives on to call the epilogue",
        *(f"module load {' '.join(shlex.quote(module) for module in cluster.modules)} {fail}" for _ in [0] if cluster.modules),
        *(f"{line} {fail}" for line in cluster.setup),
        *(f"export {name}={shlex.quote(value)}" for name, value in exports.items()),
        f"export PYTHONPATH={shlex.quote(code)}${{PYTHONPATH:+:$PYTHONPATH}} PYTHONSAFEPATH=1",
    ]
    epilogue = shlex.join([sys.executable, "-m", "hpc.worker", str(array_file)])
    return {
        "job_name": f"{plan.job.name}.{array.stage}.{uid}",
        "time": clusters.minutes(array.hours),
        "nodes": layout.nodes,
        "ntasks_per_node": 1,
        "cpus_per_task": cores,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "signal_delay_s": cluster.signal_lead_seconds,
        "array_parallelism": cluster.array_parallelism,
        "stderr_to_stdout": True,
        "wckey": None,
        "setup": setup,
        "teardown": ["code=$?", f'{epilogue} "$code"', "exit $?"],
        "srun_args": ["--kill-on-bad-exit=1", "--wait=150", *cluster.srun_args],
        "additional_parameters": more,
    }


def sbatch_text(array: Array, plan: Plan, job_dir: Path) -> str:
    """The batch script as it would be submitted, for `plan`; needs no Slurm. `UID` and job ids stand for what is not known yet."""
    from submitit.slurm.slurm import _make_sbatch_string

    folder = job_dir / ".equihpc" / "slurm" / "UID"
    array_file = job_dir / ".equihpc" / "arrays" / "UID.json"
    dependency = _dependency(array, lambda upstream: f"JOB_ID_OF_{upstream.stage}")
    count = len(array.elements) if len(array.elements) > 1 else None
    command = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    text: str = _make_sbatch_string(
        command,
        folder,
        map_count=count,
        **parameters(array, plan, "UID", array_file, str(job_dir / ".equihpc" / "code" / "HASH"), dependency),
    )
    return text
