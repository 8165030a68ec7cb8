"""Runs × metrics: a row per value of the swept parameters, mean and spread over seeds; as CSV and JSON (else `report_formats`, `page`)."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from hpc.files import read_json
from hpc.messages import suggest
from hpc.runs import RunFolder
from hpc.spec import DIGITS, get_path, is_value
from hpc.status import JobRecord, Record, RunStatus

MISSING = object()
UNKNOWN = "?"  # a value of a run whose folder is gone, or not yet there


@dataclass(slots=True)
class Cell:
    values: list[float] = field(default_factory=list)
    seeds: list[str] = field(default_factory=list)  # of each value: those of its run and of the runs it was made from
    runs: list[str] = field(default_factory=list)  # ids, of each value
    waiting: dict[str, str] = field(default_factory=dict)  # id -> state, of runs that should give this number and have not
    incomplete: dict[str, str] = field(default_factory=dict)  # id -> "step 3 of 6", of runs on a training that was not finished

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

    def text(self, digits: int) -> str:
        states = "/".join(sorted(set(self.waiting.values())))
        if not self.values:
            return states or "–"
        n = f"{self.n} of {self.n + len(self.waiting)}: {states}" if self.waiting else str(self.n)
        spread = f" ± {self.std:.{digits}f}" if self.std is not None else ""
        return f"{self.mean:.{digits}f}{spread}" + (f" ({n})" if spread or self.waiting else "") + self.mark

    @property
    def mark(self) -> str:
        """What a number carries that is of an unfinished training."""
        return f" (incomplete: {', '.join(dict.fromkeys(self.incomplete.values()))})" if self.incomplete else ""

    def beside(self, value: Cell, digits: int) -> str:
        """As a difference is shown beside the value, with the number of pairs where it is not the value's number of seeds."""
        pairs = f" ({self.n})" if self.seeds and self.n != value.n else ""
        return f"{self.mean:+.{digits}f}" + (f" ± {self.std:.{digits}f}" if self.std is not None else "") + pairs

    @property
    def summary(self) -> dict[str, Any]:
        found = {"mean": self.mean, "std": self.std, "n": self.n}
        return found | {"incomplete": self.incomplete} if self.incomplete else found


@dataclass(slots=True)
class Row:
    params: dict[str, Any]
    cells: dict[str, Cell]
    is_baseline: bool = False
    code: list[str] = field(default_factory=list)  # hashes of the code that made its numbers, upstream runs' too
    reported: dict[str, tuple[float, str]] = field(default_factory=dict)  # metric -> value of a publication, and which
    name: str | None = None  # of a row that is of a publication alone
    runs: list[str] = field(default_factory=list)  # ids of all that belong to it, upstream runs too


@dataclass(slots=True)
class Version:
    """One state of the code, and how many complete runs of each stage it made that the numbers stand on."""

    hash: str
    commit: str | None
    dirty: bool
    stages: Counter[str] = field(default_factory=Counter)

    def text(self, stage: str) -> str:
        name = f"{self.hash} of commit {self.commit[:12]}" if self.commit else self.hash
        return f"{name} ({self.stages[stage]} runs{', with uncommitted changes' if self.dirty else ''})"


@dataclass(slots=True)
class Table:
    job: str
    parameters: list[str]
    metrics: list[str]
    rows: list[Row]
    statuses: list[RunStatus]
    versions: list[Version] = field(default_factory=list)
    baseline: dict[str, Any] = field(default_factory=dict)  # parameters and values of the rows that differences are taken to
    directions: dict[str, bool] = field(default_factory=dict)  # metric -> whether higher is better, as results say it
    remarks: list[str] = field(default_factory=list)  # what the job's `report` names and nothing is, and what numbers are not the usual
    digits: int = DIGITS  # after the point, in what people read

    def is_better(self, difference: Cell, metric: str) -> bool | None:
        """None where none is seen (it reads 0), or nobody says which direction is the better one."""
        higher = self.directions.get(metric)
        return None if higher is None or not round(difference.mean, self.digits) else (difference.mean > 0) == higher

    @property
    def sources(self) -> list[str]:
        """Of the values that are marked as reported."""
        return list(dict.fromkeys(source for row in self.rows for _, source in row.reported.values()))

    @property
    def notes(self) -> list[str]:
        """A stage whose runs were made by different code is never shown without saying so, nor is a training that was not finished."""
        unfinished = {run: step for row in self.rows for cell in row.cells.values() for run, step in cell.incomplete.items()}
        found = [f"{run} is of a training that was not finished: {step}" for run, step in unfinished.items()]
        for stage in dict.fromkeys(stage for version in self.versions for stage in version.stages):
            mixed = [version for version in self.versions if version.stages[stage]]
            if len(mixed) > 1:
                found.append(f"{stage}: rows of {len(mixed)} code versions: {', '.join(version.text(stage) for version in mixed)}")
        return found

    def difference(self, row: Row, metric: str) -> Cell | None:
        """To the baseline, seed by seed; None where there is no baseline or a number is missing.

        The spread of the paired differences says more than those of the two rows: what a seed does to both is not in it. Where no
        seed is in both rows, or one is twice in a row, there are no pairs and it is one number, the difference of the means.
        """
        base = self._baseline_of(row)
        if base is None or base is row:
            return None
        mine, theirs = row.cells[metric], base.cells[metric]
        if not mine.n or not theirs.n:
            return None
        of_mine, of_theirs = (dict(zip(cell.seeds, cell.values, strict=True)) for cell in (mine, theirs))
        pairs = [seed for seed in of_mine if seed in of_theirs]
        if not pairs or len(of_mine) < mine.n or len(of_theirs) < theirs.n:
            return Cell([mine.mean - theirs.mean])
        return Cell([of_mine[seed] - of_theirs[seed] for seed in pairs], pairs)

    def reported_difference(self, row: Row, metric: str) -> float | None:
        """Of what one publication says of the row and of its baseline."""
        base = self._baseline_of(row)
        if base is None or base is row or metric not in row.reported or metric not in base.reported:
            return None
        (mine, of_mine), (theirs, of_theirs) = row.reported[metric], base.reported[metric]
        return mine - theirs if of_mine == of_theirs else None

    def _baseline_of(self, row: Row) -> Row | None:
        """Where several rows are what the job calls its baseline, the one that is as this row in all that the baseline leaves open."""
        found = [other for other in self.rows if other.is_baseline]
        if len(found) > 1:
            named = tuple(self.baseline)
            free = [p for p in self.parameters if not any(p == key or p.startswith(f"{key}.") for key in named)]
            found = [other for other in found if not row.name and all(other.params[p] == row.params[p] for p in free)]
        return found[0] if len(found) == 1 else None

    def to_json(self) -> dict[str, Any]:
        def numbers(row: Row, metric: str) -> dict[str, Any]:
            cell, difference = row.cells[metric], self.difference(row, metric)
            found = cell.summary | {"values": cell.values}
            return found if difference is None else found | {"difference": difference.summary | {"paired": bool(difference.seeds)}}

        def reported(row: Row) -> dict[str, Any]:
            return {name: {"value": value, "source": source} for name, (value, source) in row.reported.items()}

        return {
            "rows": [
                {
                    "params": row.params,
                    "is_baseline": row.is_baseline,
                    "code": row.code,
                    "metrics": {name: numbers(row, name) for name, cell in row.cells.items() if cell.n},
                    "waiting": {name: cell.waiting for name, cell in row.cells.items() if cell.waiting},
                    "reported": reported(row),
                }
                for row in self.rows
                if not row.name
            ],
            "reported": [{"name": row.name, "metrics": reported(row)} for row in self.rows if row.name],
            "versions": [
                {"hash": v.hash, "commit": v.commit, "dirty": v.dirty, "runs": v.stages.total(), "stages": dict(v.stages)}
                for v in self.versions
            ],
            "higher_is_better": self.directions,
            "notes": [*self.notes, *self.remarks],
        }

    def to_csv(self) -> str:
        """One line per row; `metric`, `metric std` and `metric n` per metric; with a baseline `metric difference`, its `std` and its `n`
        (pairs; empty for a difference of means); empty where there is no number; `code` at the end.

        Where a publication reports values: `metric reported` for each metric and the `source`; rows of its own have its name first.
        Where not all runs of all rows are complete: their number, and which are not. Where a number is of a training that was not finished:
        `incomplete`.
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        has_baseline = any(row.is_baseline for row in self.rows)
        kinds = ["", " std", " n"] + [" difference", " difference std", " difference n"] * has_baseline
        more = [*(f"{m} reported" for m in self.metrics), "source"] if self.sources else []
        states = {status.record.id: status.state for status in self.statuses if status.state != "complete"}
        partial = ["runs", "runs not complete"] if any(run in states for row in self.rows for run in row.runs) else []
        unfinished = ["incomplete"] if any(cell.incomplete for row in self.rows for cell in row.cells.values()) else []
        names = [*self.parameters, *(metric + kind for metric in self.metrics for kind in kinds), "code", *more, *partial, *unfinished]
        writer.writerow(names)
        for row in self.rows:
            numbers: list[float | None] = []
            for metric in self.metrics:
                cell, difference = row.cells[metric], self.difference(row, metric)
                numbers += [cell.mean, cell.std, cell.n] if cell.n else [None, None, 0]
                if has_baseline:
                    numbers += [difference.mean, difference.std, len(difference.seeds) or None] if difference else [None] * 3
            line = [*map(_no_formula, labels(self, row)), *("" if v is None else v for v in numbers), "+".join(row.code)]
            if more:
                line += [row.reported[m][0] if m in row.reported else "" for m in self.metrics]
                line += [_no_formula("; ".join(dict.fromkeys(source for _, source in row.reported.values())))]
            if partial:
                line += [len(row.runs), "; ".join(f"{run}: {states[run]}" for run in row.runs if run in states)]
            if unfinished:
                line += ["; ".join(f"{m}: {run} {step}" for m in self.metrics for run, step in row.cells[m].incomplete.items())]
            writer.writerow(line)
        return text.getvalue()


def _no_formula(text: str) -> str:
    """A spreadsheet computes what begins like a formula; after an apostrophe it is a text. Numbers stay."""
    try:
        float(text)
    except ValueError:
        return f"'{text}" if text.lstrip()[:1] in ("=", "+", "-", "@") else text
    return text


def plain(value: Any) -> str:
    """A parameter as people read it."""
    if isinstance(value, dict):
        return str(value["name"]) if "name" in value else ", ".join(f"{key} {plain(each)}" for key, each in value.items()) or "as it is"
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return "–" if value is None else str(value)


def labels(table: Table, row: Row) -> list[str]:
    """The row's parameters as people read them; a publication's own row has its name in the first column.

    Rows that would read alike show the settings in which they differ: `r2 (part inv)`, `r2 (part equi)`.
    """
    texts = _plain(table, row)
    if row.name:
        return [row.name, *texts[1:]]
    alike = [other for other in table.rows if other is not row and not other.name and _plain(table, other) == texts]
    for number, parameter in enumerate(table.parameters if alike else ()):
        value = row.params[parameter]
        others = [other.params[parameter] for other in alike]
        if isinstance(value, dict) and all(isinstance(other, dict) for other in others):
            keys = [key for key in value if any(other.get(key) != value[key] for other in others)]
            if keys:
                texts[number] += f" ({', '.join(f'{key} {plain(value[key])}' for key in keys)})"
    return texts


def _plain(table: Table, row: Row) -> list[str]:
    return [plain(row.params[parameter]) if parameter in row.params else "" for parameter in table.parameters]


def build(job: JobRecord, statuses: Sequence[RunStatus]) -> Table:
    """The table of the newest submission, from the results that are there.

    Only seeds are averaged over: a parameter in which two runs of one cell differ becomes a column of its own.
    """
    by_id = {status.record.id: status for status in statuses}
    leaves = _leaves(job.records)
    stages = {record.stage for record in job.records if record.id in leaves}
    parameters = list(job.report.get("rows") or ())
    found = {status.record.id: _result(status) for status in statuses}
    results = {run_id: _numbers(result) for run_id, result in found.items()}
    for key in dict.fromkeys(key for record in job.records for key in record.params if not _is_seed(key)):
        is_wanted = not job.report.get("rows") and not _is_named(key, stages)
        if key not in parameters and (is_wanted or _mixes(key, parameters, statuses, by_id, leaves, results)):
            parameters.append(key)
    wanted = list(job.report.get("columns") or ())
    columns = wanted or list(dict.fromkeys(name for status in statuses if status.record.id in leaves for name in results[status.record.id]))
    means = job.report.get("means") or {}
    columns = [*columns, *(name for name in means if name not in columns)]
    measured: dict[tuple[str, str], set[str]] = {}
    for run_id in leaves & by_id.keys():
        of_data = measured.setdefault((by_id[run_id].record.stage, _data(by_id[run_id].record)), set())
        of_data |= {name.partition("/")[0].partition(":")[2] for name in results[run_id]}
    gives = {run_id: _gives(by_id[run_id].record, columns, measured) for run_id in leaves & by_id.keys()}
    of_leaves = {name for leaf in leaves for name in results.get(leaf, ())}
    baseline, reports = job.report.get("baseline") or {}, job.report.get("reported") or ()
    fitting: set[int] = set()  # of `reports`, those that some row is of
    rows: dict[str, Row] = {}
    versions: dict[str, Version] = {}
    made_by = {run_id: code for run_id, status in by_id.items() if status.state == "complete" and (code := code_of(status))}
    counted: set[str] = set()
    place = {run_id: number for number, run_id in enumerate(by_id)}
    for status in statuses:
        params = {parameter: _value(parameter, status, by_id) for parameter in parameters}
        if any(value is MISSING for value in params.values()):
            continue
        row = rows.setdefault(repr(params), Row(params, {name: Cell() for name in columns}))
        row.runs += sorted(_lineage(status, by_id) - {*row.runs})
        for number, each in enumerate(reports):
            params = each["params"]
            if params and status.record.id in leaves and all(_same(_value(key, status, by_id), value) for key, value in params.items()):
                row.reported |= {name: (value, each["source"]) for name, value in each["metrics"].items() if name in columns}
                fitting.add(number)
        if baseline and status.record.id in leaves:
            row.is_baseline = all(_same(_value(key, status, by_id), value) for key, value in baseline.items())
        for name in columns:
            if name in results[status.record.id] and (status.record.id in leaves or name not in of_leaves):
                row.cells[name].values.append(float(results[status.record.id][name]))
                row.cells[name].seeds.append(_seeds(status.record))
                row.cells[name].runs.append(status.record.id)
                if step := found[status.record.id].get("incomplete"):
                    row.cells[name].incomplete[status.record.id] = step
                lineage = _lineage(status, by_id)
                row.code = sorted({*row.code, *(made_by[run]["hash"] for run in lineage if run in made_by)})
                for run in sorted(lineage & made_by.keys() - counted, key=place.__getitem__):
                    code = made_by[run]
                    version = versions.setdefault(code["hash"], Version(code["hash"], code.get("commit"), bool(code.get("dirty"))))
                    version.stages[by_id[run].record.stage] += 1
                counted |= lineage
            elif status.state != "complete" and name in gives.get(status.record.id, ()):
                row.cells[name].waiting[status.record.id] = status.state
    for row in rows.values():
        row.cells |= {name: _mean([row.cells.get(part, Cell()) for part in parts], by_id) for name, parts in means.items()}
    of_runs = dict.fromkeys(name for name in (*columns, *(part for parts in means.values() for part in parts)) if name not in means)
    remarks = _remarks_on_columns(of_runs, rows.values(), results, found)
    for each in reports:
        if strange := [name for name in each["metrics"] if name not in columns]:
            remarks.append(f"{each['source']} reports {', '.join(strange)}: there is no such column")
    if baseline and rows and not any(row.is_baseline for row in rows.values()):
        remarks.append(f"no row is the baseline {_text(baseline)}: there are no differences")
    for number, each in enumerate(reports):
        if number not in fitting and not each["name"] and each["metrics"].keys() & set(columns):
            remarks.append(f"no row is what {each['source']} reports of {_text(each['params'])}")
    for each in reports:
        if each["name"] and (values := {name: (value, each["source"]) for name, value in each["metrics"].items() if name in columns}):
            parameters = parameters or ["name"]
            row = rows.setdefault(each["name"], Row({}, {name: Cell() for name in columns}, name=each["name"]))
            row.reported |= values
    shown = dict.fromkeys(run for row in rows.values() for cell in row.cells.values() for run in cell.runs)
    if fakes := [run for run in shown if (found[run].get("dataset") or {}).get("fake")]:
        remarks.append(f"numbers of {len(fakes)} runs are of fake data sets (equihpc data fake), for example {fakes[0]}")
    if purged := [run for run in shown if by_id[run].state == "purged"]:
        remarks.append(f"numbers of {len(purged)} runs are the ledger's, for their folders are gone: for example {purged[0]}")
    by_use = sorted(versions.values(), key=lambda version: -version.stages.total())
    directions = _directions(found.values(), columns)
    for name, parts in means.items():
        if parts[0] in directions and len({directions.get(part) for part in parts}) == 1:
            directions[name] = directions[parts[0]]
    digits = job.report.get("digits", DIGITS)
    return Table(job.name, parameters, columns, list(rows.values()), list(statuses), by_use, baseline, directions, remarks, digits)


def _mean(cells: Sequence[Cell], by_id: Mapping[str, RunStatus]) -> Cell:
    """Of each seed that has a number in all of `cells` their mean, as whose run that of the first stands. Another seed is waited for
    once, in the first run that it lacks."""
    found = Cell()
    by_seed = [dict(zip(cell.seeds, cell.values, strict=True)) for cell in cells]
    if all(len(some) == cell.n for some, cell in zip(by_seed, cells, strict=True)):
        for seed, run in zip(cells[0].seeds, cells[0].runs, strict=True):
            if all(seed in some for some in by_seed):
                found.values.append(statistics.fmean(some[seed] for some in by_seed))
                found.seeds.append(seed)
                found.runs.append(run)
    waiting: dict[str, tuple[str, str]] = {}
    for cell in cells:
        for run, state in cell.waiting.items():
            waiting.setdefault(_seeds(by_id[run].record), (run, state))
        found.incomplete |= cell.incomplete
    found.waiting = dict(waiting.values())
    return found


def _remarks_on_columns(
    columns: Iterable[str], rows: Iterable[Row], results: Mapping[str, Mapping[str, float]], found: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Columns that nothing will fill, and results without a number where one belongs."""
    remarks = []
    given = list(dict.fromkeys(name for numbers in results.values() for name in numbers))
    filled = {name for row in rows for name, cell in row.cells.items() if cell.n or cell.waiting}
    for name in columns:
        if given and name not in filled:
            remarks.append(f"no run gives the column {name}{suggest(name, given)}")
        if without := [run for run, result in found.items() if name in (result.get("metrics") or {}) and name not in results[run]]:
            remarks.append(f"{name} of {len(without)} complete runs is no number: {without[0]}")
    return remarks


def _result(status: RunStatus) -> dict[str, Any]:
    """Of a complete run, or what the ledger has of a purged one; empty for others, and where what was written is no result."""
    result = read_json(status.path / "result.json") if status.state == "complete" else status.remembered.get("result")
    return result if isinstance(result, dict) else {}


def _numbers(result: Mapping[str, Any]) -> dict[str, float]:
    """Its metrics; one that is no finite number is as if it was not there."""
    metrics = result.get("metrics")
    every = metrics.items() if isinstance(metrics, dict) else ()
    return {name: float(value) for name, value in every if isinstance(value, int | float) and math.isfinite(value)}


def _directions(results: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> dict[str, bool]:
    """Of each metric its own, or else that of the main one of its result; where results disagree, or say null, it has none."""
    said: dict[str, set[bool | None]] = {}
    for result in results:
        of_main, own = (result.get("main") or {}).get("higher_is_better"), result.get("higher_is_better") or {}
        for name in _numbers(result):
            if name in own or isinstance(of_main, bool):
                said.setdefault(name, set()).add(own.get(name, of_main))
    return {name: higher for name in columns for higher in said.get(name, ()) if len(said[name]) == 1 and isinstance(higher, bool)}


def _text(params: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {plain(value)}" for key, value in params.items())


def code_of(status: RunStatus) -> dict[str, Any]:
    """The code of the attempt that completed the run."""
    attempts = [attempt for attempt in RunFolder(status.path).read_attempts() if attempt.outcome == "complete"]
    spec = read_json(status.path / "spec.json") or {}
    code = attempts[-1].start.get("code") if attempts else spec.get("code")
    return code if isinstance(code, dict) and "hash" in code else {}


def _lineage(status: RunStatus, by_id: Mapping[str, RunStatus]) -> set[str]:
    """Ids of the run and of everything that it was made from."""
    found, current = set(), [status]
    while current:
        found |= {each.record.id for each in current}
        current = [by_id[after] for each in current for after in each.record.after if after in by_id and after not in found]
    return found


def _seeds(record: Record) -> str:
    """A run's own and those of the runs it was made from."""
    return repr(sorted((key, value) for key, value in record.params.items() if _is_seed(key)))


def _is_seed(key: str) -> bool:
    return key.partition(".")[2] == "seed"


def _is_named(key: str, leaf_stages: set[str]) -> bool:
    """The task and its data set stand in the metric's name."""
    stage, _, path = key.partition(".")
    return stage in leaf_stages and path in ("task", "task.name", "data", "data_set")


def _mixes(
    key: str,
    parameters: Sequence[str],
    statuses: Sequence[RunStatus],
    by_id: Mapping[str, RunStatus],
    leaves: set[str],
    results: Mapping[str, Mapping[str, float]],
) -> bool:
    """Whether two runs that would share a cell differ in `key`."""
    seen: dict[str, str] = {}
    waiting = {_work(status.record) for status in statuses if status.record.id in leaves and not results[status.record.id]}
    for status in statuses:
        if status.record.id in leaves:
            record = status.record
            row = repr([_value(parameter, status, by_id) for parameter in parameters])
            value = repr(record.params.get(key))
            is_data = key in (f"{record.stage}.data", f"{record.stage}.data_set")
            names = [*results[record.id], *([] if is_data or _work(record) not in waiting else [_work(record)])]
            if any(seen.setdefault(f"{row} {name}", value) != value for name in names):
                return True
    return False


def _work(record: Record) -> str:
    return f"{record.stage} {_task(record)} {_data(record)}"


def _gives(record: Record, columns: Sequence[str], measured: Mapping[tuple[str, str], set[str]]) -> set[str]:
    """Those of the columns that a run which has no result yet is waited for in: of its task, and of its data set, whose name stands in
    the metric's (`knn:cifar10/top1`) where it is another than the pretraining's. `measured`: names that results have, by stage and data.
    """
    sets = {column: column.partition("/")[0].partition(":")[::2] for column in columns}
    fitting = {column: name for column, (task, name) in sets.items() if _task(record) in (None, task)}
    if (named := record.params.get(f"{record.stage}.data_set")) is not None:
        return {column for column, name in fitting.items() if name == named}
    if mine := measured.get((record.stage, _data(record))):
        return {column for column, name in fitting.items() if name in mine}
    if (own := PurePath(str(record.params.get(f"{record.stage}.data"))).name) in fitting.values():
        return {column for column, name in fitting.items() if name == own}
    others = {name for (stage, _), names in measured.items() if stage == record.stage for name in names}
    return {column for column, name in fitting.items() if name not in others}


def _data(record: Record) -> str:
    return repr([record.params.get(f"{record.stage}.{key}") for key in ("data_set", "data")])


def _same(value: Any, wanted: Any) -> bool:
    return value is not MISSING and is_value(value, wanted)


def _task(record: Record) -> str | None:
    """The name of the evaluation that a run does, where its parameters say so."""
    value = record.params.get(f"{record.stage}.task")
    return value.get("name") if isinstance(value, dict) else value if isinstance(value, str) else None


def _leaves(records: Iterable[Record]) -> set[str]:
    """Runs that nothing comes after: those whose metrics make the table."""
    records = list(records)
    used = {after for record in records for after in record.after}
    return {record.id for record in records if record.id not in used}


def _value(parameter: str, status: RunStatus, by_id: Mapping[str, RunStatus]) -> Any:
    """A parameter's value for a run: of its sweep, or else of the config of the run (or ancestor) of that stage."""
    if parameter in status.record.params:
        return status.record.params[parameter]
    stage, _, path = parameter.partition(".")
    current: list[RunStatus] = [status]
    while current:
        for candidate in current:
            if candidate.record.stage == stage:
                spec = read_json(candidate.path / "spec.json") or candidate.remembered
                return get_path(spec["config"], path, None) if isinstance(spec, dict) and "config" in spec else UNKNOWN
        current = [by_id[after] for candidate in current for after in candidate.record.after if after in by_id]
    return MISSING
