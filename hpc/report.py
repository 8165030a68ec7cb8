"""Runs × metrics: a row per value of the swept parameters, mean and spread over seeds, in the terminal, CSV, JSON and HTML."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from hpc.files import read_json, write_atomic
from hpc.spec import get_path
from hpc.status import JobRecord, Record, RunStatus

MISSING = object()


@dataclass(slots=True)
class Cell:
    values: list[float] = field(default_factory=list)
    states: set[str] = field(default_factory=set)  # of runs that should give this number and have not

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def std(self) -> float | None:
        """Sample standard deviation; None for fewer than two values."""
        return statistics.stdev(self.values) if self.n > 1 else None

    def text(self) -> str:
        if not self.values:
            return "/".join(sorted(self.states)) or "–"
        spread = f" ± {self.std:.3f} ({self.n})" if self.std is not None else ""
        return f"{self.mean:.3f}{spread}"


@dataclass(slots=True)
class Row:
    params: dict[str, Any]
    cells: dict[str, Cell]
    is_baseline: bool = False


@dataclass(slots=True)
class Table:
    job: str
    parameters: list[str]
    metrics: list[str]
    rows: list[Row]
    statuses: list[RunStatus]

    def difference(self, row: Row, metric: str) -> float | None:
        """To the baseline's mean; None where there is no baseline or a number is missing."""
        base = next((other for other in self.rows if other.is_baseline), None)
        if base is None or base is row or not row.cells[metric].n or not base.cells[metric].n:
            return None
        return row.cells[metric].mean - base.cells[metric].mean

    def to_json(self) -> dict[str, Any]:
        return {
            "rows": [
                {
                    "params": row.params,
                    "metrics": {name: {"mean": cell.mean, "std": cell.std, "n": cell.n} for name, cell in row.cells.items() if cell.n},
                }
                for row in self.rows
            ]
        }

    def to_csv(self) -> str:
        """One line per row; `metric`, `metric std` and `metric n` per metric; empty where there is no number."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([*self.parameters, *(column for m in self.metrics for column in (m, f"{m} std", f"{m} n"))])
        for row in self.rows:
            cells = [row.cells[metric] for metric in self.metrics]
            numbers = [value for c in cells for value in ((c.mean, c.std, c.n) if c.n else (None, None, 0))]
            writer.writerow([*(plain(row.params[p]) for p in self.parameters), *("" if v is None else v for v in numbers)])
        return text.getvalue()

    def to_html(self) -> str:
        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("hpc", "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
        )
        return environment.get_template("report.html").render(table=self, plain=plain)


def plain(value: Any) -> str:
    """A parameter as people read it."""
    if isinstance(value, dict):
        return str(value.get("name", value))
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def build(job: JobRecord, statuses: Sequence[RunStatus]) -> Table:
    """The table of the newest submission, from the results that are there."""
    by_id = {status.record.id: status for status in statuses}
    parameters = list(job.report.get("rows") or _default_rows(job.records))
    wanted = list(job.report.get("columns") or [])
    rows: dict[str, Row] = {}
    found_metrics: dict[str, None] = {}
    leaves = _leaves(job.records)
    for status in statuses:
        if status.record.id not in leaves and not any(r.split(".")[0] == status.record.stage for r in parameters):
            continue
        params = {parameter: _value(parameter, status, by_id) for parameter in parameters}
        if any(value is MISSING for value in params.values()):
            continue
        row = rows.setdefault(repr(params), Row(params, {}))
        metrics = (read_json(status.path / "result.json") or {}).get("metrics", {}) if status.state in ("complete", "stale") else {}
        for name, value in metrics.items():
            row.cells.setdefault(name, Cell()).values.append(float(value))
            if status.record.id in leaves:
                found_metrics[name] = None
        if not metrics and status.record.id in leaves:
            for name in wanted:
                if _task(status.record) in (None, name.split("/")[0].split(":")[0]):
                    row.cells.setdefault(name, Cell()).states.add(status.state)
    columns = wanted or list(found_metrics)
    table = Table(job.name, parameters, columns, list(rows.values()), list(statuses))
    baseline = job.report.get("baseline") or {}
    for row in table.rows:
        row.cells = {name: row.cells.get(name, Cell()) for name in columns}
        row.is_baseline = bool(baseline) and all(_same(row.params.get(key, MISSING), value) for key, value in baseline.items())
    return table


def _same(value: Any, wanted: Any) -> bool:
    return value is not MISSING and (value == wanted or (isinstance(value, dict) and value.get("name") == wanted))


def _task(record: Record) -> str | None:
    """The name of the evaluation that a run does, where its parameters say so."""
    value = record.params.get(f"{record.stage}.task")
    return value.get("name") if isinstance(value, dict) else value if isinstance(value, str) else None


def _leaves(records: Iterable[Record]) -> set[str]:
    """Runs that nothing comes after: those whose metrics make the table."""
    records = list(records)
    used = {after for record in records for after in record.after}
    return {record.id for record in records if record.id not in used}


def _default_rows(records: Sequence[Record]) -> list[str]:
    """What is swept before the last stage (its own sweep makes the columns), seeds apart."""
    leaves = _leaves(records)
    stages = {record.stage for record in records if record.id in leaves}
    multi = any(record.after for record in records)
    keys = {key: None for record in records for key in record.params if not (multi and key.split(".")[0] in stages)}
    return [key for key in keys if not key.endswith(".seed")]


def _value(parameter: str, status: RunStatus, by_id: Mapping[str, RunStatus]) -> Any:
    """A parameter's value for a run: of its sweep, or else of the config of the run (or ancestor) of that stage."""
    if parameter in status.record.params:
        return status.record.params[parameter]
    stage, _, path = parameter.partition(".")
    current: list[RunStatus] = [status]
    while current:
        for candidate in current:
            if candidate.record.stage == stage:
                config = read_json(candidate.path / "config.json") or {}
                return get_path(config, path, None)
        current = [by_id[after] for candidate in current for after in candidate.record.after if after in by_id]
    return MISSING


def write(table: Table, job_dir: Path) -> tuple[Path, Path]:
    """`report.csv` and `report.html` in the job's folder."""
    csv_path, html_path = job_dir / "report.csv", job_dir / "report.html"
    write_atomic(csv_path, table.to_csv())
    write_atomic(html_path, table.to_html())
    return csv_path, html_path
