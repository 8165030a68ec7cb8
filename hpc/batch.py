"""The batch script of one array: sbatch options, the lines around the task, srun's options. Pure; submitit puts them together."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from hpc import cluster as clusters
from hpc.cluster import Cluster, Container
from hpc.plan import Array, Plan

MAIL_TYPES = {"end": "END", "fail": "FAIL"}


def dependency(array: Array, job_id: Callable[[Array], str], is_chain: Callable[[Array], bool] = lambda _: False) -> str | None:
    """Slurm's view of what this array waits for; the worker checks the markers besides.

    `afterany` where some of several upstream runs may fail: those that complete shall still be evaluated; and after a chain,
    of which the segments that are not needed are cancelled.
    """
    parts = []
    if array.mirrors is not None:
        parts.append(f"aftercorr:{job_id(array.mirrors)}")
    elif array.indices and len(array.waits_for[0].elements) > 1:
        parts.append(":".join(["afterany", *(f"{job_id(array.waits_for[0])}_{index}" for index in array.indices)]))
    elif array.waits_for:
        is_single = all(len(upstream.elements) == 1 and not is_chain(upstream) for upstream in array.waits_for)
        kind = "afterok" if is_single else "afterany"
        parts.append(":".join([kind, *map(job_id, array.waits_for)]))
    if array.in_flight:
        parts.append(":".join(["afterany", *array.in_flight]))
    return ",".join(parts) or None


def container_of(plan: Plan) -> Container | None:
    """The profile's container with the job's image, None where the task runs on the bare node."""
    found = plan.cluster.container
    image = plan.job.job.container or (found.image if found else None)
    return (found or Container()).model_copy(update={"image": image}) if image else None


def python_command(plan: Plan, job_dir: Path) -> str:
    """The shell words before `-m`: this Python, or the one in the container that sees the runs and the data sets."""
    container = container_of(plan)
    if container is None:
        return shlex.quote(sys.executable)
    assert container.image is not None
    places = [str(job_dir.parent), *plan.cluster.datasets.values(), *([plan.cluster.ledger] if plan.cluster.ledger else [])]
    binds = [*(place for place in dict.fromkeys(places) if Path(place).is_dir()), *container.binds]
    words = [*shlex.split(container.command), *(word for bind in binds for word in ("--bind", bind)), container.image, container.python]
    return shlex.join(words)


def parameters(
    array: Array,
    plan: Plan,
    uid: str,
    array_file: Path,
    code: str,
    waits_for: str | None,
    excluded_nodes: Iterable[str] = (),
) -> dict[str, Any]:
    """submitit's parameters for one array."""
    cluster, layout = plan.cluster, array.layout
    share = 1.0 if cluster.whole_nodes else min(1.0, layout.fraction * array.slots)
    cores = max(layout.processes, int(cluster.cores_per_node * share))
    exports = {**cluster.environment, "SRUN_CPUS_PER_TASK": str(cores)}
    if cluster.slurm_conf:
        exports["SLURM_CONF"] = cluster.slurm_conf
    pickles = shlex.quote(str(array_file.parent.parent / "slurm" / uid))
    ours = f"PYTHONPATH={shlex.quote(code)}${{PYTHONPATH:+:$PYTHONPATH}} PYTHONSAFEPATH=1"
    epilogue = shlex.join([sys.executable, "-m", "hpc.worker", str(array_file)])
    fail = "|| equihpc_failed"
    setup = [
        "trap : TERM USR2  # the supervisors act on signals; this shell lives on to call the epilogue",
        f"[ -O {pickles} ] || {{ echo 'equihpc: '{pickles}' is not yours; nothing in it is read' >&2; exit 1; }}",
        f"equihpc_failed() {{ echo 'equihpc: a line of the profile failed' >&2; {ours} {epilogue} 1; exit $?; }}",
        # the submitting process may have died before it gave the element's file its name
        "own=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}_submitted.pkl",
        f'[ -e {pickles}/"$own" ] || cp {pickles}/element.pkl {pickles}/"$own"',
        f"umask {umask(cluster):03o}",
        *(f"module load {' '.join(shlex.quote(module) for module in cluster.modules)} {fail}" for _ in [0] if cluster.modules),
        *(f"{line} {fail}" for line in cluster.setup),
        *(f"export {name}={shlex.quote(value)}" for name, value in exports.items()),
        f"export {ours}",
    ]
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
        "additional_parameters": _options(array, plan, waits_for, excluded_nodes),
    }


def umask(cluster: Cluster) -> int:
    """Runs are private; with the profile's `group` its members may read them."""
    return 0o027 if cluster.group else 0o077


def _options(array: Array, plan: Plan, waits_for: str | None, excluded_nodes: Iterable[str]) -> Mapping[str, Any]:
    cluster, layout, notify = plan.cluster, array.layout, plan.job.job.notify
    gpus = cluster.processes_per_node if cluster.whole_nodes else layout.gpus * array.slots
    options: dict[str, Any] = {"requeue": True} if cluster.requeue == "self" else {"no-requeue": True}
    options |= cluster.sbatch
    if cluster.gpu and layout.gpus and cluster.gpu_request != "none":
        options |= {"gres": f"gpu:{gpus}"} if cluster.gpu_request == "gres" else {"gpus-per-node": gpus}
    if waits_for:
        options |= {"dependency": waits_for, "kill-on-invalid-dep": "yes"}
    if nodes := ",".join(excluded_nodes):
        options |= {"exclude": nodes}
    if notify and notify.mail:
        options |= {"mail-user": notify.mail, "mail-type": ",".join(MAIL_TYPES[event] for event in notify.when)}
    return options
