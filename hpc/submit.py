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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpc import batch, budget, local, nodes, reconcile, slurm, snapshot
from hpc import cluster as clusters
from hpc.cancel import BUSY, cancel
from hpc.cluster import Cluster
from hpc.errors import EquiHPCError, UserError
from hpc.files import append_json, locked, read_lines, write_json
from hpc.journal import Journal, new_uid
from hpc.messages import choices_text
from hpc.plan import Array, Plan, Run, arrays
from hpc.runs import Ledger, RunFolder, reset_budgets
from hpc.spec import REFERENCE
from hpc.status import GUESTS, JobRecord, Record, RunStatus, collect, job_names
from hpc.supervisor import snapshot_environment

START = ("planned", "failed", "skipped", "stale")  # states that a submission starts
ALIVE = ("complete", *BUSY)  # states of an upstream run that a dependent can wait for
MAX_CHAIN = 10


RETRY = ("cancelled", "purged", "failed")  # states that a submission starts when asked


@dataclass(frozen=True)
class Options:
    """What a person may ask of a submission besides the file."""

    retry: tuple[str, ...] = ()
    prune: Callable[[list[RunStatus]], bool] | None = None  # asked before runs that left the file are cancelled
    reidentify: bool = False  # go on although complete runs get another identity
    only_new: bool = False  # only runs that never started: the rest of an earlier submission
    chain: int | None = None  # segments submitted ahead; None: as estimated where nodes may not requeue, otherwise 1
    command: str = ""  # with which the same was asked for: recorded with the job and its runs


@dataclass(frozen=True)
class Submission:
    """What a submission did: which runs start now, and the state of those that it left alone."""

    job_dir: Path
    started: list[Run]
    left: list[RunStatus]
    job_ids: list[str]
    notes: list[str]
    waiting: int = 0  # runs that the site's limit keeps for a later submission
    pruned: list[RunStatus] = field(default_factory=list)


def ledger_of(cluster: Cluster, runs_dir: Path) -> Ledger:
    return Ledger(Path(cluster.ledger).expanduser() if cluster.ledger else runs_dir / ".ledger")


def records(plan: Plan) -> list[Record]:
    return [
        Record(run.id, run.hash, run.stage, run.params, run.after, run.cost.num_steps, run.num_segments, run.given, run.blocked)
        for run in plan.runs
    ]


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


def submit(plan: Plan, cluster_name: str, runs_dir: Path, missing_variables: list[str], options: Options = Options()) -> Submission:
    """Raises UserError before anything is written when something is missing."""
    cluster = plan.cluster
    for state in options.retry:
        if state not in RETRY:
            raise UserError(f"--retry {state}: {choices_text(state, RETRY)}")
    if options.chain is not None and cluster.scheduler == "local":
        raise UserError("--chain is for Slurm: the local runner goes on by itself")
    if plan.job.job.notify and plan.job.job.notify.mail and cluster.scheduler == "local":
        raise UserError(f"{plan.job.document.file}: notify.mail is sent by Slurm; on the local profile give notify.command")
    check_place(cluster_name, cluster)
    if missing_variables:
        raise UserError(f"--cluster {cluster_name}: environment variable {missing_variables[0]} is not set; export it and submit again")
    for warning in plan.warnings:
        raise UserError(f"{plan.job.document.file}: {warning}")
    if any(character in str(runs_dir) for character in "%:\n\r"):
        raise UserError(f"--runs {str(runs_dir)!r}: the path must not contain '%', ':' or line breaks (Slurm and PYTHONPATH split there)")
    job_dir = runs_dir / plan.job.name
    os.umask(batch.umask(cluster))
    with locked(runs_dir / ".lock"), locked(job_dir / ".equihpc" / "lock"):  # two jobs may contain the same run
        _share(job_dir, cluster)
        return _submit(plan, cluster_name, job_dir, options)


def _share(job_dir: Path, cluster: Cluster) -> None:
    """With the profile's `group` its members may read the job's folders; what is made below inherits the group."""
    if cluster.group:
        try:
            shutil.chown(job_dir, group=cluster.group)
        except (LookupError, PermissionError):
            raise UserError(f"profile: group {cluster.group!r} is not a group that you are in; see the command id") from None
        job_dir.chmod(0o2750)


def _submit(plan: Plan, cluster_name: str, job_dir: Path, options: Options) -> Submission:
    cluster, runs_dir = plan.cluster, job_dir.parent
    ledger = ledger_of(cluster, runs_dir)
    old = reconcile.before(job_dir)
    if (changed := reconcile.reidentified(old, plan, job_dir)) and not options.reidentify:
        raise UserError(
            f"{len(changed)} complete runs would be re-identified and run again, for example {changed[0].id}: the code's defaults or the"
            " data changed, the file did not. Go back to the earlier version, or submit with --reidentify"
        )
    _link_shared(plan, job_dir, ledger)
    former = reconcile.former(old, plan, job_dir)
    everything, note = collect(job_dir, [*records(plan), *former], ledger)
    if note:
        raise UserError(f"{note}; nothing was submitted, try again later")
    Journal.of_job(job_dir).adopt()
    by_id = {status.record.id: status for status in everything}
    gone = [by_id[record.id] for record in former if by_id[record.id].state in BUSY]
    notes, pruned = _prune(gone, plan, cluster, job_dir, options)
    used = budget.used_hours(job_dir, [*records(plan), *former])
    ready, waiting = _choose(plan, by_id, options, used, notes)
    left = [by_id[run.id] for run in plan.runs if run.id not in {run.id for run in ready}]
    _write_record(plan, cluster_name, job_dir, ledger, former, options.command)
    blocked = [status for status in left if status.state == "blocked"]
    if blocked and len(blocked) == len(plan.runs):
        raise UserError(f"{plan.job.document.file}: {blocked[0].cause}")
    if not ready:
        return Submission(job_dir, [], left, [], notes, waiting, pruned)
    code = snapshot.take(snapshot.packages_of({run.entry for run in ready}), job_dir / ".equihpc" / "code")
    for run in ready:
        if by_id[run.id].state == "failed" and "failed" in options.retry:
            reset_budgets(RunFolder(by_id[run.id].path))
        _create(run, plan, cluster_name, job_dir, code, ledger, options.command, is_stale=by_id[run.id].state == "stale")
    journal = Journal.of_job(job_dir)
    in_flight = {status.record.hash: status.slurm_last for status in everything if status.slurm_last and status.state in BUSY}
    start_arrays = arrays(ready, cluster, in_flight)
    if cluster.scheduler == "local":
        _start_local(start_arrays, job_dir, journal, cluster, str(code["path"]))
        return Submission(job_dir, ready, left, [], notes, waiting, pruned)
    job_ids = _start_slurm(start_arrays, plan, cluster_name, job_dir, journal, code, options)
    _wait_for_restarted(plan, by_id, ready, job_dir, ledger, notes)
    return Submission(job_dir, ready, left, job_ids, notes, waiting, pruned)


def _wait_for_restarted(
    plan: Plan, before: Mapping[str, RunStatus], ready: list[Run], job_dir: Path, ledger: Ledger, notes: list[str]
) -> None:
    """Runs that are packed into a job of an earlier submission, which waits for others, wait for what was started again too."""
    started = {run.id for run in ready}
    names = {before[run.id].slurm_name for run in plan.runs if before[run.id].state == "pending" and not started.isdisjoint(run.after)}
    if not names - {None}:
        return
    now = {status.record.id: status for status in collect(job_dir, records(plan), ledger)[0]}
    for name in sorted(names - {None}, key=str):
        there = [run for run in plan.runs if now[run.id].slurm_name == name]
        upstream = {now[other].slurm_last for run in there for other in run.after if now[other].state in BUSY} - {None}
        try:
            slurm.set_dependency(str(name), f"afterany:{':'.join(sorted(map(str, upstream)))}", plan.cluster.slurm_conf)
        except slurm.SlurmError as error:
            notes.append(f"{name} may start before what it waits for: {error}; submit again when it has ended")


def _prune(gone: list[RunStatus], plan: Plan, cluster: Cluster, job_dir: Path, options: Options) -> tuple[list[str], list[RunStatus]]:
    """Runs that left the file: cancelled when asked and confirmed, otherwise named."""
    if not gone:
        return [], []
    if options.prune is None:
        return [f"{len(gone)} runs go on that are not in the file any more, for example {gone[0].record.id}; --prune cancels them"], []
    shared = reconcile.shared_with(job_dir)
    mine = [status for status in gone if status.record.hash not in shared]
    notes = [f"{len(gone) - len(mine)} runs that are not in the file any more are spared: other jobs contain them"] * (
        len(mine) < len(gone)
    )
    if mine and options.prune(mine):
        return notes, cancel(job_dir, cluster.slurm_conf, mine)
    return notes, []


def _choose(plan: Plan, by_id: Mapping[str, RunStatus], options: Options, used_hours: float, notes: list[str]) -> tuple[list[Run], int]:
    """(runs that start now, how many have to wait for the site's limit). What else is left alone is said in `notes`."""
    cluster, budgets = plan.cluster, plan.job.job.budgets
    start: dict[str, Run] = {}
    exhausted: list[str] = []
    for run in plan.runs:  # upstream first
        status = by_id[run.id]
        folder = RunFolder(status.path)
        if status.state == "cancelled" and "cancelled" in options.retry and status.slurm_name is not None:
            if status.slurm_state == "PENDING":
                folder.cancel_mark.unlink(missing_ok=True)  # it goes on in that job
            else:
                notes.append(f"{run.id} is cancelled and its job {status.slurm_name} still ends; submit again in a moment")
            continue
        if options.only_new and status.state not in ("planned", "stale"):
            continue
        if status.state not in (*START, *options.retry) or folder.hold_mark.exists() or run.blocked:
            continue
        if not all(by_id[run.upstream[stage].id].state in ALIVE or run.upstream[stage].id in start for stage in run.direct):
            continue
        if status.state == "failed" and "failed" not in options.retry:
            # an exception may be mended by now; a ceiling of the job file that is still reached is not
            rules = {**budgets.model_dump(), "code_errors": None}
            if reason := budget.reached(folder.read_attempts(), folder.saved_step, rules):
                exhausted.append(f"{run.id}: {reason}")
                continue
        start[run.id] = run
    if exhausted:
        notes.append(f"{len(exhausted)} failed runs are left alone, for example {exhausted[0]}; --retry failed starts them anew")
    ready, waiting = list(start.values()), 0
    if budgets.gpu_hours is not None:
        ready = _within_hours(ready, plan, by_id, budgets.gpu_hours, used_hours, notes)
    if cluster.max_submitted is not None and cluster.scheduler == "slurm":
        queue, _ = slurm.query(cluster.slurm_conf)
        room = cluster.max_submitted - sum(entry.state != "ended" for entry in queue.values())
        in_flight = {s.record.hash: s.slurm_last for s in by_id.values() if s.slurm_last and s.state in BUSY}
        fitting = reconcile.prefix(
            ready, lambda some: reconcile.num_elements(some, cluster, in_flight, lambda run: chain_of(run, cluster, options)) <= room
        )
        waiting = len(ready) - len(fitting)
        if waiting:
            notes.append(
                f"{waiting} runs wait: the profile's max_submitted is {cluster.max_submitted} elements; submit again, or use --wait"
            )
        ready = fitting
    return ready, waiting


def _within_hours(
    ready: list[Run], plan: Plan, by_id: Mapping[str, RunStatus], cap: float, used_hours: float, notes: list[str]
) -> list[Run]:
    """The runs whose estimates fit under the job's cap, together with those in flight; the nodes stop at the cap itself."""

    def hours(runs: Sequence[Run]) -> float:
        """What is left to do of them: what is saved is paid."""
        left = (1 - RunFolder(by_id[run.id].path).saved_step / run.cost.num_steps if run.cost.num_steps else 1.0 for run in runs)
        return sum((run.cost.gpu_hours or 0.0) * max(0.0, share) for run, share in zip(runs, left, strict=True))

    busy = hours([run for run in plan.runs if by_id[run.id].state in BUSY])
    fitting = reconcile.prefix(ready, lambda some: used_hours < cap and used_hours + busy + hours(some) <= cap)
    if len(fitting) < len(ready):
        notes.append(
            f"{len(ready) - len(fitting)} runs are left alone: budgets.gpu_hours is {cap:g}, {used_hours:.3g} are used,"
            f" {busy:.3g} planned for runs in flight and {hours(fitting):.3g} for those that start now"
        )
    return fitting


def chain_of(run: Run, cluster: Cluster, options: Options) -> int:
    """Segments of this run that are submitted ahead."""
    most = min(MAX_CHAIN, cluster.max_submitted or MAX_CHAIN)
    wanted = options.chain if options.chain is not None else run.num_segments + 1 if cluster.requeue == "none" else 1
    return min(wanted, most)


def _write_record(plan: Plan, cluster_name: str, job_dir: Path, ledger: Ledger, former: list[Record], command: str) -> None:
    report = plan.job.job.report.model_dump()
    file, conf = plan.job.document.file, plan.cluster.slurm_conf
    rules = {
        "budgets": plan.job.job.budgets.model_dump(),
        "notify": plan.job.job.notify.model_dump(mode="json") if plan.job.job.notify else None,
        "requeue": plan.cluster.requeue,
        "node_memory_hours": plan.cluster.node_memory_hours,
        "poll_seconds": plan.cluster.poll_seconds,
        "command": command,
    }
    record = JobRecord(plan.job.name, file, cluster_name, conf, str(ledger.folder), report, records(plan), former, rules)
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


def real_folder(run: Run, job_dir: Path) -> Path:
    """Where the run is, also when another job has it."""
    path = folder_of(run, job_dir)
    return path.resolve() if path.is_symlink() else path


def resolved(config: Any, run: Run, job_dir: Path) -> Any:
    """The config with `${stage}` replaced by that run's folder."""
    if isinstance(config, dict):
        return {key: resolved(value, run, job_dir) for key, value in config.items()}
    if isinstance(config, list):
        return [resolved(value, run, job_dir) for value in config]
    if isinstance(config, str) and (match := REFERENCE.match(config)):
        return str(real_folder(run.upstream[match[1]], job_dir))
    return config


def _create(
    run: Run, plan: Plan, cluster_name: str, job_dir: Path, code: Mapping[str, Any], ledger: Ledger, command: str, is_stale: bool
) -> None:
    """The run's folder with `spec.json`: everything that its supervisors need."""
    cluster = plan.cluster
    spec = {
        "id": run.id,
        "hash": run.hash,
        "job": plan.job.name,
        "stage": run.stage,
        "entry": run.entry,
        "params": run.params,
        "upstream": {stage: str(real_folder(run.upstream[stage], job_dir)) for stage in run.direct},
        "layout": {"nodes": run.layout.nodes, "processes": run.layout.processes, "gpus": run.layout.gpus},
        "hours": run.hours,
        "num_steps": run.cost.num_steps,
        "cluster": cluster_name,
        "command": command,
        "slurm_conf": cluster.slurm_conf,
        "rendezvous": cluster.rendezvous.model_dump(),
        "environment": cluster.environment,
        "startup_seconds": cluster.startup_seconds,
        "hang_seconds": cluster.hang_seconds,
        "code": dict(code),
        "ledger": str(ledger.folder),
        "config": resolved(run.config, run, job_dir),
    }
    path = real_folder(run, job_dir)
    if (owner := path.parent.parent) != job_dir and {"job": job_dir.name} not in read_lines(owner / GUESTS):
        append_json(owner / GUESTS, {"job": job_dir.name})  # its states are looked up in this job's journal too
    if is_stale:
        RunFolder(path).set_aside(spec)
    else:
        RunFolder(path).create(spec)


# --- the local runner --------------------------------------------------------------------------------------------------


def _start_local(start: list[Array], job_dir: Path, journal: Journal, cluster: Cluster, code: str) -> None:
    """Hand the runs to a runner of their own, which goes on when this process ends."""
    uids, paths = [], []
    for array in start:
        elements = [[real_folder(run, job_dir) for run in element] for element in array.elements]
        uids.append(new_uid())
        paths.append(str(journal.write_array(elements, array.slots, array.layout.gpus, uids[-1])))
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
    options: Options,
) -> list[str]:
    import submitit  # imported here: `plan` and `status` need it only for the text of a batch script

    from hpc.worker import Element

    cluster = plan.cluster
    chains: set[int] = set()
    last: dict[int, str] = {}  # id(array) -> job id of its last segment
    uids: dict[int, str] = {}
    job_ids = []
    bad_nodes = nodes.excluded(Path(ledger_of(cluster, job_dir.parent).folder), cluster_name, cluster.node_memory_hours)
    for array in start:
        elements = [[real_folder(run, job_dir) for run in element] for element in array.elements]
        mirrors = uids[id(array.mirrors)] if array.mirrors else None
        waits_for = [uids[id(upstream)] for upstream in array.waits_for]
        dependency = batch.dependency(array, lambda upstream: last[id(upstream)], lambda upstream: id(upstream) in chains)
        avoided = nodes.spare(bad_nodes, cluster.partition, array.layout.nodes, cluster.slurm_conf) if bad_nodes else []
        num_segments = max(chain_of(run, cluster, options) for run in array.runs)
        for _ in range(num_segments):
            uid = new_uid()
            first = uids.setdefault(id(array), uid)
            if num_segments > 1:
                chains.add(id(array))
            chain = first if num_segments > 1 else None
            array_file = journal.write_array(elements, array.slots, array.layout.gpus, uid, chain)
            journal.add(
                "intent",
                uid=uid,
                stage=array.stage,
                cluster=cluster_name,
                slurm_conf=cluster.slurm_conf,
                mirrors=mirrors,
                waits_for=waits_for,
                chain_of=chain,
            )
            folder = journal.folder / "slurm" / uid
            folder.mkdir(parents=True)
            submitit.core.utils.DelayedSubmission(Element(str(array_file), None)).dump(folder / "element.pkl")
            with _slurm_environment(cluster.slurm_conf):
                executor = submitit.SlurmExecutor(folder=folder, max_num_timeout=1_000_000, python=batch.python_command(plan, job_dir))
                executor.update_parameters(**batch.parameters(array, plan, uid, array_file, str(code["path"]), dependency, avoided))
                try:
                    jobs = executor.submit_array([Element(str(array_file), index) for index in range(len(elements))])
                except submitit.core.utils.FailedJobError as error:
                    raise slurm.SlurmError(f"sbatch refused stage {array.stage}: {error}") from None
            last[id(array)] = str(jobs[0].job_id).partition("_")[0]
            journal.add("submitted", uid=uid, job_id=last[id(array)])
            job_ids.append(last[id(array)])
            dependency = f"afterany:{last[id(array)]}"
    return job_ids


def sbatch_text(array: Array, plan: Plan, job_dir: Path) -> str:
    """The batch script as it would be submitted, for `plan`; needs no Slurm. `UID` and job ids stand for what is not known yet."""
    from submitit.slurm.slurm import _make_sbatch_string

    folder = job_dir / ".equihpc" / "slurm" / "UID"
    array_file = job_dir / ".equihpc" / "arrays" / "UID.json"
    dependency = batch.dependency(array, lambda upstream: f"JOB_ID_OF_{upstream.stage}")
    count = len(array.elements) if len(array.elements) > 1 else None
    command = f"{batch.python_command(plan, job_dir)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    text: str = _make_sbatch_string(
        command,
        folder,
        map_count=count,
        **batch.parameters(array, plan, "UID", array_file, str(job_dir / ".equihpc" / "code" / "HASH"), dependency),
    )
    return text
