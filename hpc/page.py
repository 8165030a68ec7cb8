"""One HTML page with everything of a result set: works from a file and without a network, and has a bounded size.

Table, heat map of two swept parameters, curves, pictures, the state of every run, the command and commit behind each number.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2

from hpc.files import write_atomic
from hpc.frozen import ResultSet
from hpc.report import Row, Table, labels
from hpc.report_formats import is_partial, runs_text, short_name
from hpc.runs import RunFolder
from hpc.status import RunStatus

MAX_RUNS = 200  # with curves
MAX_RECORDS = 1000  # that are read of a run
WHOLE_BYTES = 4 * 2**20  # a larger metrics.jsonl is read in places
TAIL_BYTES = 2**16
MAX_POINTS = 400  # of a curve
MIN_POINTS = 40
ALL_POINTS = 150_000  # of all curves together: about 2.5 MB
PICTURE_BYTES = 6 * 2**20  # of all pictures together
PICTURE_PIXELS = 1024  # the longer side
MAX_BARS = 40  # rows in a plot of differences
FROZEN_MARK = '<p class="note" id="frozen">'  # by which the page of a frozen set is known
NOT_CURVES = ("step", "epoch", "time")


def write(found: ResultSet, path: Path, live: bool = True) -> None:
    """The page; curves and pictures of the runs' folders where they are `live`."""
    statuses = found.table.statuses if live else []
    write_atomic(path, render(found, curves(statuses), pictures(statuses)))


def render(found: ResultSet, of_curves: dict[str, Any] | None = None, of_pictures: dict[str, Any] | None = None) -> str:
    environment = jinja2.Environment(loader=jinja2.PackageLoader("hpc", "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    table = found.table
    after = {status.record.id: status.record.after for status in table.statuses}
    data: dict[str, Any] = {"cells": _cells(table), "after": after, "points": points(table), "differences": differences(table)}
    data["digits"] = table.digits
    data["curves"] = of_curves or {"runs": [], "names": []}
    return environment.get_template("report.html").render(
        table=table,
        found=found,
        labels=labels,
        partial=any(is_partial(table, row) for row in table.rows),
        runs_text=runs_text,
        curves=of_curves,
        pictures=of_pictures,
        data=_inline(data),
    )


def _inline(data: Any) -> str:
    """JSON that cannot end the script element that it stands in."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c").replace("\u2028", "\\u2028")


def _cells(table: Table) -> list[list[list[list[Any]]]]:
    """Of each row and metric: [run, value] of each number, then [run, state] of those that are waited for."""
    return [
        [
            [*map(list, zip(cell.runs, cell.values, strict=True)), *map(list, cell.waiting.items())]
            for cell in (row.cells[metric] for metric in table.metrics)
        ]
        for row in table.rows
    ]


# --- heat map ----------------------------------------------------------------------------------------------------------


def points(table: Table) -> dict[str, Any]:
    """For the heat map: swept parameters with two or more numbers, the other ones, and what each row has of both and of the metrics.

    A row that lacks a number of an axis (a baseline without the auxiliary) is in no map; baselines are listed with their means.
    """

    def means(row: Row) -> list[float | None]:
        return [row.cells[metric].mean if row.cells[metric].n else None for metric in table.metrics]

    values = {name: [row.params[name] for row in table.rows if name in row.params] for name in table.parameters}
    axes = [name for name, some in values.items() if len({value for value in some if _is_number(value)}) > 1]
    rows = [
        {
            "row": number,
            "at": {name: row.params[name] for name in axes},
            "others": " · ".join(
                f"{short_name(name)} {text}" for name, text in zip(table.parameters, labels(table, row), strict=True) if name not in axes
            ),
            "means": means(row),
            "reported": [row.reported[metric][0] if metric in row.reported else None for metric in table.metrics],
        }
        for number, row in enumerate(table.rows)
        if row.params and all(_is_number(row.params[name]) for name in axes)
    ]
    in_maps = {each["row"] for each in rows}
    baselines = [
        {"label": _label(table, row), "means": means(row)}
        for number, row in enumerate(table.rows)
        if row.is_baseline and number not in in_maps
    ]
    return {"axes": axes, "metrics": table.metrics, "rows": rows if len(axes) > 1 else [], "baselines": baselines}


def _label(table: Table, row: Row) -> str:
    """`lambda 0.1 · d 256`; of a single parameter its value alone."""
    texts = list(zip(map(short_name, table.parameters), labels(table, row), strict=True))
    return texts[0][1] if len(texts) == 1 else " · ".join(f"{name} {text}" for name, text in texts)


def differences(table: Table) -> list[dict[str, Any]]:
    """Of each metric the bars of the rows that have a difference to the baseline, at most `MAX_BARS`, and how many were left out."""
    found = []
    for metric in table.metrics:
        bars: list[dict[str, Any]] = []
        for row in table.rows:
            difference = table.difference(row, metric)
            if difference is not None:
                bars.append(
                    {
                        "label": _label(table, row),
                        "mean": difference.mean,
                        "std": difference.std,
                        "better": table.is_better(difference, metric),
                        "text": difference.beside(row.cells[metric], table.digits),
                        "reported": table.reported_difference(row, metric),
                    }
                )
        if bars:
            found.append({"metric": metric, "bars": bars[:MAX_BARS], "left_out": len(bars[MAX_BARS:])})
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# --- curves ------------------------------------------------------------------------------------------------------------


def curves(statuses: Iterable[RunStatus]) -> dict[str, Any]:
    """What the runs' `metrics.jsonl` say, thinned: `names`, per run a list of [steps, values] or null for each, and what was left out."""
    records = {}
    with_curves = [status for status in statuses if RunFolder(status.path).metrics.is_file()]
    for status in with_curves[:MAX_RUNS]:
        if lines := sample(RunFolder(status.path).metrics):
            records[status.record.id] = lines
    names = dict.fromkeys(
        name for lines in records.values() for line in lines for name, value in line.items() if name not in NOT_CURVES and _is_number(value)
    )
    left_out = []
    if len(with_curves) > MAX_RUNS:
        left_out.append(f"of {len(with_curves)} runs with curves the first {MAX_RUNS} are shown")
    if records and len(names) > (most := max(1, ALL_POINTS // (MIN_POINTS * len(records)))):
        left_out.append(f"of {len(names)} quantities the first {most} are shown")
        names = dict.fromkeys([*names][:most])
    num_points = max(MIN_POINTS, min(MAX_POINTS, ALL_POINTS // max(1, len(records) * len(names))))
    runs = []
    for run_id, lines in records.items():
        series = []
        for name in names:
            steps = [(line["step"], line[name]) for line in lines if _is_number(line.get(name)) and "step" in line]
            some = thin(steps, num_points)
            series.append([[step for step, _ in some], [float(f"{value:.5g}") for _, value in some]] if some else None)
        runs.append({"id": run_id, "series": series})
    return {"names": [*names], "runs": runs, "left_out": left_out}


def sample(path: Path) -> list[dict[str, Any]]:
    """At most `MAX_RECORDS` records, evenly over the file, with the first and the last; without reading all of a large one."""
    size = path.stat().st_size
    lines: dict[int, bytes] = {}  # by where they end
    with open(path, "rb") as file:
        if size <= WHOLE_BYTES:
            every_line = list(file)
            by_size: dict[int, list[int]] = {}  # number of values -> lines: some are not measured at every step
            for number, line in enumerate(every_line):
                by_size.setdefault(line.count(b":"), []).append(number)
            share = max(1, (MAX_RECORDS - 2) // max(1, len(by_size)))
            wanted = {number for numbers in by_size.values() for number in numbers[:: -(-len(numbers) // share)]}
            lines = {number: every_line[number] for number in wanted | {*range(len(every_line))[-2:]}}
        else:
            lines[0] = file.readline()
            for number in range(1, MAX_RECORDS - 1):
                file.seek(number * size // MAX_RECORDS)
                file.readline()
                line = file.readline()
                lines[file.tell()] = line
            file.seek(size - TAIL_BYTES)
            file.readline()
            while line := file.readline():
                if line.endswith(b"\n"):
                    end, last = file.tell(), line
            lines[end] = last
    records = []
    for _, line in sorted(lines.items()):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # the last one is being written
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def thin(series: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most `most` points, first and last among them: of each stretch the lowest and the highest, so that no spike is lost."""
    if len(series) <= most:
        return list(series)
    inner, num_stretches = series[1:-1], (most - 2) // 2
    kept = [series[0]]
    for number in range(num_stretches):
        stretch = inner[number * len(inner) // num_stretches : (number + 1) * len(inner) // num_stretches]
        low, high = min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])
        kept += sorted({low, high})
    return [*kept, series[-1]]


# --- pictures ----------------------------------------------------------------------------------------------------------


def pictures(statuses: Iterable[RunStatus]) -> dict[str, Any]:
    """The runs' `pictures/*.png` as JPEG inside of the page; once the bytes are used up the rest is named."""
    from PIL import Image, UnidentifiedImageError

    shown: list[dict[str, str]] = []
    left_out: list[str] = []
    num_bytes = 0
    for status in statuses:
        for path in sorted((status.path / "pictures").glob("*.png")):
            if num_bytes >= PICTURE_BYTES:
                left_out.append(str(path))
                continue
            try:
                with Image.open(path) as image:
                    small = image.convert("RGB")
            except (OSError, UnidentifiedImageError):
                left_out.append(f"{path} (cannot be read)")
                continue
            small.thumbnail((PICTURE_PIXELS, PICTURE_PIXELS))
            buffer = io.BytesIO()
            small.save(buffer, "JPEG", quality=85)
            num_bytes += buffer.tell()
            source = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
            shown.append({"run": status.record.id, "name": path.stem, "source": source})
    return {"shown": shown, "left_out": left_out}
