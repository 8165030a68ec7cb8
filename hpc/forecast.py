"""What a plan costs and what it will meet: hours as the site bills them, the job's cap, what blocks, what changed."""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence

from hpc.cluster import Cluster
from hpc.plan import Array, Plan, Run, described_by
from hpc.status import Record

QUOTA_TIMEOUT_SECONDS = 20.0
USABLE = 0.90  # of a GPU's memory: the rest is the libraries', and lost between blocks
GIB = 2**30


def billed_hours(arrays: Sequence[Array], cluster: Cluster, packed: bool = True) -> float | None:
    """GPU hours (process hours without GPUs) of whole nodes where the site bills those; `packed=False`: with each run on its own.

    None without an estimate.
    """
    total = 0.0
    for array in arrays:
        layout = array.layout
        per_node = cluster.processes_per_node if cluster.whole_nodes else layout.processes
        for element in array.elements:
            hours = [run.cost.gpu_hours for run in element]
            if any(hour is None for hour in hours):
                return None
            walls = [hour / layout.world_size for hour in hours if hour is not None]
            billed = max(walls, default=0.0) if packed and cluster.whole_nodes else sum(walls)
            total += billed * layout.nodes * per_node
    return total


def notes(
    plan: Plan, arrays: Sequence[Array], blocked: Sequence[str], changed: Sequence[Record], former: Sequence[Record], used_hours: float
) -> list[str]:
    """Sentences for people, the graver ones first."""
    cluster, found = plan.cluster, []
    if changed:
        found.append(
            f"{len(changed)} complete runs would be re-identified and run again, for example {changed[0].id}: the code's defaults or the"
            " data changed, the file did not; submit stops here without --reidentify"
        )
    for reason in dict.fromkeys(blocked):
        found.append(f"{blocked.count(reason)} runs are blocked: {reason}")
    if former:
        found.append(f"{len(former)} runs of earlier submissions are not in the file any more, for example {former[0].id}")
    for stage, run in dearest(plan).items():
        if cluster.gpu and run.layout.gpus and run.cost.memory_bytes > USABLE * cluster.gpu.memory_gib * GIB:
            found.append(
                f"stages.{stage} needs about {run.cost.memory_bytes / GIB:.1f} GiB of the {cluster.gpu.memory_gib:g} GiB of a GPU, for"
                f" example {run.id}, and may not fit: more nodes, smaller parts of a batch or less that is kept will help"
            )
    if (cap := plan.job.job.budgets.gpu_hours) is not None:
        estimate = _hours([run for array in arrays for run in array.runs])
        over = ", more than the cap: the last ones will not start" if used_hours + estimate > cap else ""
        found.append(f"budget: {used_hours:.1f} of {cap:g} GPU h are used, about {estimate:.0f} to come{over}")
    packed, alone = billed_hours(arrays, cluster), billed_hours(arrays, cluster, packed=False)
    if packed is not None and alone is not None and alone - packed > 0.5:
        found.append(f"whole nodes are billed: {packed:,.0f} GPU h with packing, {alone:,.0f} without ({1 - packed / alone:.0%} less)")
    if cluster.max_submitted is not None:
        count = sum(len(array.elements) for array in arrays)
        if count > cluster.max_submitted:
            found.append(
                f"{count} elements, of which the site admits {cluster.max_submitted} at once: submit --wait hands in the rest as room comes"
            )
    return [*found, *_unused_reports(plan)]


def _unused_reports(plan: Plan) -> Iterator[str]:
    """What publications report of no run, and values that no column shows."""
    report = plan.job.job.report
    for each in report.reported:
        if each.params and not described_by(each.params, plan.runs):
            yield f"report.reported: no run has {each.params} ({each.source})"
        for name in each.metrics:
            if report.columns and name not in report.columns:
                yield f"report.reported: {name!r} ({each.source}) is not among report.columns: it is not shown"


def dearest(plan: Plan) -> dict[str, Run]:
    """Of each stage that tells of its memory, the run that needs most."""
    found: dict[str, Run] = {}
    for run in plan.runs:
        if run.cost.memory and (run.stage not in found or run.cost.memory_bytes > found[run.stage].cost.memory_bytes):
            found[run.stage] = run
    return found


def parallelism(plan: Plan) -> list[str]:
    """Of each stage, for its run that needs most memory: how its state is spread and what a process needs; what is sent between the
    processes, beside the time of computing; and the time for that at other numbers of nodes with the same share of a batch."""
    lines = []
    for stage, run in dearest(plan).items():
        cost, gpu = run.cost, plan.cluster.gpu if run.layout.gpus else None
        parts = ", ".join(f"{name} {num_bytes / GIB:.2f}" for name, num_bytes in cost.memory.items())
        of = f" of {gpu.memory_gib:g} GiB per GPU" if gpu else " GiB per process"
        lines.append(f"{stage}: sharding {cost.sharding} ({cost.reason}); about {cost.memory_bytes / GIB:.1f}{of}: {parts}")
        if cost.traffic is None or run.layout.world_size == 1:
            continue
        text = f"{cost.traffic.inside_bytes / 1e9:.2f} GB inside a node, {cost.traffic.across_bytes / 1e9:.2f} GB between nodes"
        if cost.traffic.seconds is not None:
            text += f", {_ms(cost.traffic.seconds)} ms"
        if cost.gpu_hours and cost.num_steps:
            text += f" beside {_ms(cost.gpu_hours * 3600 / run.layout.world_size / cost.num_steps)} ms of computing"
        lines.append(f"{stage}: a step brings each process {text}")
        if nodes := sorted({number for by_nodes in cost.scaling.values() for number in by_nodes}):
            table = "; ".join(f"{way} {' / '.join(_ms(by_nodes[n]) for n in nodes)}" for way, by_nodes in cost.scaling.items())
            lines.append(f"{stage}: at {' / '.join(map(str, nodes))} nodes of {run.layout.processes}: {table} ms, at the links' peak")
    return lines


def recipes(plan: Plan) -> list[str]:
    """Of each stage, what its entry makes of the learning rate and its like, and how many runs have it so."""
    counts: dict[tuple[str, str], int] = {}
    for run in plan.runs:
        if run.cost.recipe:
            counts[run.stage, run.cost.recipe] = counts.get((run.stage, run.cost.recipe), 0) + 1
    of_stage = Counter(stage for stage, _ in counts)
    lines = []
    for (stage, recipe), num in counts.items():
        which = f", {num} run{'s' * (num > 1)}" if of_stage[stage] > 1 else ""
        lines.append(f"{stage}{which}: {recipe}")
    return lines


def reported(plan: Plan) -> list[str]:
    """What publications used, beside the estimate for the same runs."""
    lines = []
    for each in plan.job.job.report.reported:
        runs = described_by(each.params, plan.runs)
        hours = [run.cost.gpu_hours for run in runs]
        if not hours or None in hours or not (each.nodes or each.gpu_hours):  # without GPUs there is nothing to stand beside
            continue
        used = [f"{each.nodes} nodes"] if each.nodes else []
        used += [f"{each.gpu_hours:,.0f} GPU hours a run"] if each.gpu_hours else []
        about = f"{runs[0].stage}, {len(runs)} run{'s' * (len(runs) > 1)}"
        nodes = runs[0].layout.nodes
        ours = f"{nodes} node{'s' * (nodes > 1)}, about {_hours(runs) / len(runs):,.0f}"
        lines.append(f"{about}: reported {', '.join(used)} ({each.source}); here {ours}")
    return lines


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f}" if seconds >= 0.01 else f"{seconds * 1e3:.1f}"


def _hours(runs: Sequence[Run]) -> float:
    return sum(run.cost.gpu_hours or 0.0 for run in runs)


def quota(command: str) -> str:
    """What the profile's quota command prints."""
    try:
        done = subprocess.run(
            ["bash", "-c", command], capture_output=True, text=True, timeout=QUOTA_TIMEOUT_SECONDS, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return f"no answer in {QUOTA_TIMEOUT_SECONDS:g} s"
    text = (done.stdout + done.stderr).strip()
    return text if done.returncode == 0 else f"not known here: exit code {done.returncode}: {text.splitlines()[-1] if text else ''}"
