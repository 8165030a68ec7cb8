"""What people look at: tables of plans, states and results, and the live view of `--wait`."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table as RichTable
from rich.text import Text

from hpc.cluster import Cluster
from hpc.plan import Array, Plan
from hpc.report import Table, plain
from hpc.status import RunStatus, eta_seconds

COLOURS = {
    "complete": "green",
    "running": "cyan",
    "requeued": "yellow",
    "failed": "red",
    "skipped": "red",
    "cancelled": "red",
    "stale": "yellow",
}
MAX_ROWS = 40


def duration(seconds: float | None) -> str:
    """`1:05`, `2:03:10`; a dash for None."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if num_bytes < 1024 or unit == "TiB":
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    raise AssertionError


def params_text(status: RunStatus) -> str:
    return " ".join(f"{key.rpartition('.')[2]}={plain(value)}" for key, value in status.record.params.items())


def status_table(statuses: Sequence[RunStatus], limit: int | None = MAX_ROWS) -> RenderableType:
    table = RichTable(box=None, pad_edge=False, header_style="bold")
    for heading in ("stage", "run", "state", "step", "", "loss", "images/s", "left", "tries"):
        table.add_column(heading, justify="right" if heading in ("step", "loss", "images/s", "left", "tries") else "left", no_wrap=True)
    busy_first = sorted(statuses, key=lambda s: s.state not in ("running", "failed")) if limit and len(statuses) > limit else statuses
    for status in list(busy_first)[:limit]:
        progress = status.progress
        loss, rate = progress.get("loss"), progress.get("images_per_s")
        total = status.num_steps
        table.add_row(
            status.record.stage,
            params_text(status) or status.record.id,
            Text(status.state, style=COLOURS.get(status.state, "")),
            f"{status.step}/{total}" if total else "",
            ProgressBar(total=total, completed=status.step, width=16) if total else "",
            f"{loss:.4f}" if isinstance(loss, int | float) else "",
            f"{rate:.0f}" if isinstance(rate, int | float) else "",
            duration(eta_seconds(status)) if status.state == "running" else "",
            str(status.attempts or ""),
        )
    counts = Counter(status.state for status in statuses)
    summary = ", ".join(f"{count} {state}" for state, count in counts.most_common())
    hidden = f" (showing {limit} of {len(statuses)})" if limit and len(statuses) > limit else ""
    return Group(table, Text(f"\n{summary}{hidden}", style="dim"))


def result_table(table: Table) -> RenderableType:
    rich = RichTable(title=table.job, title_justify="left", header_style="bold")
    for name in table.parameters:
        rich.add_column(name.partition(".")[2] or name)
    for name in table.metrics:
        rich.add_column(name, justify="right")
    for row in table.rows:
        cells = []
        for name in table.metrics:
            text, difference = row.cells[name].text(), table.difference(row, name)
            cells.append(text if difference is None else f"{text} [dim]({difference:+.3f})[/dim]")
        rich.add_row(*(plain(row.params[p]) for p in table.parameters), *cells)
    return rich


def plan_text(
    plan: Plan, arrays: Sequence[Array], cluster_name: str, states: Mapping[str, int], scripts: Sequence[str], console: Console
) -> None:
    """The plan as people read it."""
    cluster = plan.cluster
    about = f": {cluster.description}" if cluster.description else ""
    table = RichTable(title=f"{plan.job.name} on {cluster_name}{about}", title_justify="left", header_style="bold")
    headings = (
        "stage",
        "runs",
        "elements",
        "nodes",
        "processes",
        "h/segment",
        "segments",
        "GPU h" if cluster.gpu else "CPU h",
        "core h",
        "waits for",
    )
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("stage", "waits for") else "right")
    for array in arrays:
        layout = array.layout
        hours = [run.cost.gpu_hours for run in array.runs]
        total = None if any(hour is None for hour in hours) else sum(hour for hour in hours if hour is not None)
        segments = None if total is None else max(math.ceil(h / layout.world_size / array.hours) for h in hours if h is not None)
        waits = f"{array.mirrors.stage}, element by element" if array.mirrors else ", ".join(upstream.stage for upstream in array.waits_for)
        table.add_row(
            array.stage,
            str(len(array.runs)),
            str(len(array.elements)),
            str(layout.nodes),
            str(layout.world_size),
            f"{array.hours:g}",
            "?" if segments is None else str(segments),
            "?" if total is None else f"{total:,.0f}",
            "?" if total is None else f"{core_hours(array, cluster) or 0:,.0f}",
            waits,
        )
    console.print(table)
    bytes_, inodes = footprint(arrays)
    known = ", ".join(f"{count} {state}" for state, count in states.items())
    console.print(f"{len(plan.runs)} runs ({known}), {sum(len(array.runs) for array in arrays)} to start")
    console.print(f"disk: about {size(bytes_)} of checkpoints and weights, {inodes:,} inodes")
    notes = {run.cost.note for run in plan.runs if run.cost.note}
    if notes:
        console.print(f"GPU hours are estimated {', '.join(sorted(notes))}; '?': the entry gives no estimate", style="dim")
    if cluster.unconfirmed:
        console.print(
            f"facts of the profile that the site's pages did not confirm: {', '.join(cluster.unconfirmed)}", style="dim", soft_wrap=True
        )
    for warning in plan.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)
    for array, script in zip(arrays, scripts, strict=bool(scripts)):
        console.rule(f"sbatch {array.stage}", style="dim")
        console.print(script, markup=False, highlight=False, soft_wrap=True)


def core_hours(array: Array, cluster: Cluster) -> float | None:
    """Cores that the site bills: of whole nodes where it gives whole nodes only. None without an estimate."""
    if any(run.cost.gpu_hours is None for run in array.runs):
        return None
    layout = array.layout
    share = 1.0 if cluster.whole_nodes else layout.fraction
    return sum(
        max(run.cost.gpu_hours or 0 for run in element) / layout.world_size * layout.nodes * cluster.cores_per_node * share
        for element in array.elements
        if element
    )


def footprint(arrays: Sequence[Array]) -> tuple[float, int]:
    """(bytes, inodes) of the runs when they are complete: two checkpoints and the exported weights each.

    A checkpoint has a file per process, the metadata, a marker and its folder; a run folder about a dozen more, and per node
    a log, a meeting file and submitit's log and result.
    """
    runs = [run for array in arrays for run in array.runs]
    num_bytes = sum(2.5 * run.cost.checkpoint_bytes for run in runs)
    inodes = sum(14 + (2 * (run.layout.world_size + 3) if run.cost.checkpoint_bytes else 0) + 4 * run.layout.nodes for run in runs)
    return num_bytes, inodes + sum(2 * len(array.elements) for array in arrays)


def watch(collect: Callable[[], list[RunStatus]], poll_seconds: float, console: Console) -> list[RunStatus]:
    """Show the states until nothing is pending or running. A terminal gets one live screen, a pipe a line per change."""

    def busy(statuses: Sequence[RunStatus]) -> bool:
        return any(status.state in ("pending", "running", "requeued") for status in statuses)

    statuses = collect()
    if console.is_terminal:
        with Live(status_table(statuses), console=console, refresh_per_second=4) as live:
            while busy(statuses):
                time.sleep(poll_seconds)
                statuses = collect()
                live.update(status_table(statuses))
        return statuses
    seen: dict[str, str] = {}
    said = time.monotonic()
    while True:
        for status in statuses:
            if seen.get(status.record.id) != status.state:
                seen[status.record.id] = status.state
                cause = f": {status.cause}" if status.cause else ""
                console.print(f"{status.record.stage} {params_text(status)} {status.state}{cause}", highlight=False, markup=False)
        if time.monotonic() - said > 5:
            said = time.monotonic()
            for status in (s for s in statuses if s.state == "running" and s.step):
                loss, rate, eta = status.progress.get("loss"), status.progress.get("images_per_s"), eta_seconds(status)
                console.print(
                    f"  {status.record.stage} {params_text(status)} step {status.step}/{status.num_steps}"
                    + (f" loss {loss:.4f}" if isinstance(loss, int | float) else "")
                    + (f" {rate:.0f} images/s" if rate else "")
                    + (f", {duration(eta)} left" if eta is not None else ""),
                    highlight=False,
                    markup=False,
                )
        if not busy(statuses):
            return statuses
        time.sleep(poll_seconds)
        statuses = collect()
