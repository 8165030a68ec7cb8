"""What people look at: tables of plans, states and results, and the live view of `--wait`."""

from __future__ import annotations

import contextlib
import math
import os
import select
import sys
import termios
import time
import tty
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table as RichTable
from rich.text import Text

from hpc.cluster import Cluster
from hpc.forecast import parallelism, recipes, reported
from hpc.plan import Array, Plan
from hpc.report import Table, labels, plain
from hpc.report_formats import is_partial, runs_text, short_name
from hpc.runs import RunFolder
from hpc.status import RunStatus, eta_seconds

COLOURS = {
    "complete": "green",
    "running": "cyan",
    "requeued": "yellow",
    "failed": "red",
    "skipped": "red",
    "cancelled": "red",
    "stale": "yellow",
    "blocked": "yellow",
    "purged": "yellow",
}
# what needs attention comes first
ATTENTION = ("failed", "blocked", "purged", "stale", "skipped", "cancelled", "requeued", "running", "pending", "planned", "complete")
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


def saved_age_seconds(status: RunStatus) -> float | None:
    """Since the newest checkpoint of a run that is under way; None without one."""
    run = RunFolder(status.path)
    if status.state not in ("running", "requeued") or not (step := run.saved_step):
        return None
    try:
        return max(0.0, time.time() - (status.path / "checkpoints" / f"step_{step}").stat().st_mtime)
    except FileNotFoundError:  # replaced by a newer one just now
        return 0.0


def _cells(status: RunStatus) -> dict[str, RenderableType]:
    """Heading -> what stands there; nothing where there is nothing to say."""
    loss, rate = status.progress.get("loss"), status.progress.get("images_per_s")
    total, planned = status.num_steps, status.record.num_segments
    says_why = status.state not in ("complete", "running", "pending")
    return {
        "stage": status.record.stage,
        "run": params_text(status) or status.record.id,
        "state": Text(status.state, style=COLOURS.get(status.state, "")),
        "Slurm": f"{status.slurm_name} {status.slurm_state}" if status.slurm_name else "",
        "segment": f"{status.segment}/{max(planned, status.segment)}" if status.segment and status.state != "complete" else "",
        "step": f"{status.step}/{total}" if total else "",
        "": ProgressBar(total=total, completed=status.step, width=16) if total else "",
        "loss": f"{loss:.4f}" if isinstance(loss, int | float) else "",
        "images/s": f"{rate:.0f}" if isinstance(rate, int | float) else "",
        "left": duration(eta_seconds(status)) if status.state == "running" else "",
        "saved": f"{duration(age)} ago" if (age := saved_age_seconds(status)) is not None else "",
        "tries": str(status.attempts or ""),
        "why": Text(status.cause.partition("\n")[0], no_wrap=True, overflow="ellipsis") if says_why and status.cause else "",
    }


LEFT = ("stage", "run", "state", "Slurm", "", "why")


def status_table(statuses: Sequence[RunStatus], limit: int | None = MAX_ROWS, first: int = 0, hours: float | None = None) -> RenderableType:
    """A line per run, and one of totals. Where there are more than `limit`, those that need attention are shown first."""
    rows = list(statuses)
    if limit is not None and len(rows) > limit:
        rows = sorted(rows, key=lambda status: ATTENTION.index(status.state))[first : first + limit]
    cells = [_cells(status) for status in rows]
    table = RichTable(box=None, pad_edge=False, header_style="bold")
    shown = [heading for heading in (cells[0] if cells else ()) if any(row[heading] for row in cells)]
    for heading in shown:  # causes are cut where there is no room
        table.add_column(heading, justify="left" if heading in LEFT else "right", no_wrap=heading != "why", overflow="ellipsis")
    for row in cells:
        table.add_row(*(row[heading] for heading in shown))
    counts = Counter(status.state for status in statuses)
    summary = ", ".join(f"{counts[state]} {state}" for state in ATTENTION if counts[state])
    if hours is not None:
        summary += f"; {hours:,.1f} GPU hours used"
    if len(rows) < len(statuses):
        summary += f" (showing {first + 1} to {first + len(rows)} of {len(statuses)})"
    return Group(table, Text(f"\n{summary}", style="dim"))


def result_table(table: Table) -> RenderableType:
    rich = RichTable(title=table.job, title_justify="left", header_style="bold")
    for name in table.parameters:
        rich.add_column(short_name(name), overflow="fold")
    for name in table.metrics:
        rich.add_column(name, justify="right", overflow="fold")
    with_runs = any(is_partial(table, row) for row in table.rows)
    if with_runs:
        rich.add_column("runs")
    if table.notes:
        rich.add_column("code")
    for row in table.rows:
        cells = []
        for name in table.metrics:
            text, difference = row.cells[name].text(table.digits), table.difference(row, name)
            if difference is not None:
                text += f" [dim]({difference.beside(row.cells[name], table.digits)})[/dim]"
            if name in row.reported:
                text += f" [dim]reported {row.reported[name][0]:.{table.digits}f}[/dim]"
            cells.append(text)
        code = [", ".join(row.code)] if table.notes else []
        runs = [runs_text(table, row) if row.runs else ""] if with_runs else []
        texts = [*map(escape, labels(table, row))]
        if row.is_baseline and texts:
            texts[-1] += " [dim](baseline)[/dim]"
        rich.add_row(*texts, *cells, *runs, *code)
    return rich


def plan_text(
    plan: Plan, arrays: Sequence[Array], cluster_name: str, states: Mapping[str, int], scripts: Sequence[str], console: Console
) -> None:
    """The plan as people read it."""
    cluster = plan.cluster
    about = f": {cluster.description}" if cluster.description else ""
    table = RichTable(title=f"{plan.job.name} on {cluster_name}{about}", title_justify="left", header_style="bold")
    hours_heading = "GPU h" if cluster.gpu else "CPU h"
    for heading in (
        "stage",
        "runs",
        "elements",
        "arrays",
        "nodes",
        "processes",
        "h/segment",
        "segments",
        hours_heading,
        "core h",
        "waits for",
    ):
        table.add_column(heading, justify="left" if heading in ("stage", "waits for") else "right")
    alike: dict[tuple[str, str], list[Array]] = {}  # arrays of a stage that wait for the same
    for array in arrays:
        alike.setdefault((array.stage, _waits(array)), []).append(array)
    for (stage, waits), group in alike.items():
        layout, runs = group[0].layout, [run for array in group for run in array.runs]
        hours = [run.cost.gpu_hours for run in runs]
        known_hours = [hour for hour in hours if hour is not None]
        is_known = len(known_hours) == len(hours)
        table.add_row(
            stage,
            str(len(runs)),
            str(sum(len(array.elements) for array in group)),
            str(len(group)),
            str(layout.nodes),
            str(layout.world_size),
            f"{group[0].hours:g}",
            str(max(run.num_segments for run in runs)) if is_known else "?",
            f"{sum(known_hours):,.0f}" if is_known else "?",
            f"{sum(core_hours(array, cluster) or 0 for array in group):,.0f}" if is_known else "?",
            waits,
        )
    console.print(table)
    bytes_, inodes = footprint(arrays)
    known = ", ".join(f"{count} {state}" for state, count in states.items())
    console.print(f"{len(plan.runs)} runs ({known}), {sum(len(array.runs) for array in arrays)} to start")
    console.print(f"disk: about {size(bytes_)} of checkpoints and weights, {inodes:,} inodes")
    for line in parallelism(plan):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for line in (*recipes(plan), *reported(plan)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    notes = {run.cost.note for run in plan.runs if run.cost.note}
    if notes:
        console.print(f"GPU hours are estimated {', '.join(sorted(notes))}; '?': the entry gives no estimate", style="dim")
    if cluster.unconfirmed:
        console.print(
            f"facts of the profile that the site's pages did not confirm: {', '.join(cluster.unconfirmed)}", style="dim", soft_wrap=True
        )
    for warning in plan.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)
    by_array = dict(zip(map(id, arrays), scripts, strict=bool(scripts)))
    for (stage, _), group in alike.items():
        if by_array:
            more = f" and {len(group) - 1} more like it" if len(group) > 1 else ""
            console.rule(f"sbatch {stage}{more}", style="dim")
            console.print(by_array[id(group[0])], markup=False, highlight=False, soft_wrap=True)


def _waits(array: Array) -> str:
    if array.mirrors:
        return f"{array.mirrors.stage}, element by element"
    some = ", a few elements each" if array.indices else ""
    return ", ".join(dict.fromkeys(upstream.stage for upstream in array.waits_for)) + some


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
    """(bytes, inodes) of the runs when they are complete: checkpoints and the exported weights, half as much as one of them.

    A checkpoint has a file per process, the metadata, a marker and its folder; a run folder about a dozen more, and per node
    a log, a meeting file and submitit's log and result.
    """
    runs = [run for array in arrays for run in array.runs]
    num_bytes = sum((run.cost.num_checkpoints + 0.5) * run.cost.checkpoint_bytes for run in runs)
    per_run = ((run, run.cost.num_checkpoints if run.cost.checkpoint_bytes else 0) for run in runs)
    inodes = sum(15 + checkpoints * (run.layout.world_size + 3) + 4 * run.layout.nodes for run, checkpoints in per_run)
    return num_bytes, inodes + sum(2 * len(array.elements) for array in arrays)


@contextlib.contextmanager
def _keyboard() -> Iterator[Callable[[float], str]]:
    """Yields a function that waits so many seconds for a key; `up` and `down` are names, others themselves, none is empty."""

    def no_key(seconds: float) -> str:
        time.sleep(seconds)
        return ""

    try:
        descriptor = sys.stdin.fileno()
        before = termios.tcgetattr(descriptor)
    except (OSError, ValueError, termios.error):  # no keyboard
        yield no_key
        return

    def key(seconds: float) -> str:
        if not select.select([descriptor], [], [], seconds)[0]:
            return ""
        pressed = os.read(descriptor, 16).decode(errors="replace")
        return {"\x1b[A": "up", "\x1b[B": "down", "k": "up", "j": "down"}.get(pressed, pressed[:1])

    try:
        tty.setcbreak(descriptor)
        yield key
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


Collect = Callable[[], tuple[list[RunStatus], str, float]]  # statuses, a note where Slurm does not answer, GPU hours used


def _busy(statuses: Sequence[RunStatus]) -> bool:
    return any(status.state in ("pending", "running", "requeued") for status in statuses)


def watch(collect: Collect, pause_seconds: float, console: Console, goes_on: Callable[[], bool] = lambda: False) -> list[RunStatus]:
    """Show the states until nothing is pending or running and `goes_on` says no. A terminal gets one live screen, a pipe a line per change.

    Raises KeyboardInterrupt for Ctrl-C and q. Folders are not read more than a tenth of the time.
    """
    if not console.is_terminal:
        return _watch_lines(collect, pause_seconds, console, goes_on)
    first, due = 0, 0.0
    with Live(console=console, screen=True, auto_refresh=False) as live, _keyboard() as key:
        while True:
            if time.monotonic() >= due:
                began = time.monotonic()
                statuses, note, hours = collect()
                urgent_first = sorted(statuses, key=lambda status: ATTENTION.index(status.state))
                due = time.monotonic() + _pause(pause_seconds, time.monotonic() - began)
                if not _busy(statuses) and not goes_on():
                    return statuses
            room = max(1, console.height - 5)  # heading, empty line, totals, note, keys
            first = max(0, min(first, len(statuses) - room))
            lines = [status_table(urgent_first, room, first, hours), Text(note, style="yellow", no_wrap=True, overflow="ellipsis")]
            live.update(Group(*lines, Text("q or Ctrl-C leaves, up and down scroll", style="dim")), refresh=True)
            pressed = key(max(0.0, min(1.0, due - time.monotonic())))
            if pressed == "q":
                raise KeyboardInterrupt
            first += {"up": -1, "down": 1, " ": room}.get(pressed, 0)


def _pause(seconds: float, looked_seconds: float) -> float:
    """Longer after a slow look (many runs, a busy file system), but not for the minutes that a silent Slurm takes."""
    return max(seconds, min(10 * looked_seconds, 30.0))


def _watch_lines(collect: Collect, pause_seconds: float, console: Console, goes_on: Callable[[], bool]) -> list[RunStatus]:
    seen: dict[str, str] = {}
    said, noted = time.monotonic(), ""
    while True:
        began = time.monotonic()
        statuses, note, _ = collect()
        if bool(note) != bool(noted):
            console.print(f"note: {note}" if note else "Slurm answers again", highlight=False, markup=False)
        noted = note
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
        if not _busy(statuses) and not goes_on():
            return statuses
        time.sleep(_pause(pause_seconds, time.monotonic() - began))
