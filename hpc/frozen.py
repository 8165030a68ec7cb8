"""A result set: a job's table with everything behind its numbers. Frozen in a file, it stays for a paper while the runs go on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hpc.cancel import BUSY
from hpc.errors import UserError
from hpc.files import append_json, read_json, read_lines, write_json
from hpc.report import Cell, Row, Table, Version, build, code_of, labels
from hpc.runs import RunFolder
from hpc.status import JobRecord, Record, RunStatus

FORMAT, VERSION = "equihpc frozen report", 1
FROZEN = Path(".equihpc") / "frozen.jsonl"  # in the folder of a job: files that its result sets were frozen in
MOST_CHANGES = 20  # that are said one by one


@dataclass(slots=True)
class Fill:
    """What cells without a number wait for, and the command that fills them (of those in flight: that shows them)."""

    command: str
    state: str
    runs: dict[str, str] = field(default_factory=dict)  # id -> cause
    cells: int = 0

    @property
    def text(self) -> str:
        """`2 cells wait for train-1 (failed: rank 0: boom) and 3 runs more`, without the command."""
        run_id, cause = next(iter(self.runs.items()))
        more = f" and {len(self.runs) - 1} more" if len(self.runs) > 1 else ""
        about = f"{self.state}: {cause}" if cause else self.state
        if not self.cells:
            return f"numbers that have no column yet wait for {run_id} ({about}){more}"
        return f"{self.cells} {'cell waits' if self.cells == 1 else 'cells wait'} for {run_id} ({about}){more}"


@dataclass(slots=True)
class ResultSet:
    table: Table
    runs: dict[str, dict[str, Any]]  # id -> `origin`
    fills: list[Fill]
    frozen: str = ""  # when, for one that was read from a file
    changes: list[str] = field(default_factory=list)  # numbers that are not those of a frozen set of the same job

    @property
    def notes(self) -> list[str]:
        return [*self.table.notes, *self.table.remarks, *self.changes]

    def to_json(self) -> dict[str, Any]:
        found = self.table.to_json() | {"fill": [asdict(fill) for fill in self.fills], "changes": self.changes}
        return found | {"frozen": self.frozen} if self.frozen else found


def collect(job: JobRecord, statuses: Sequence[RunStatus]) -> ResultSet:
    """Of the newest submission, from what is on the disk now."""
    table = build(job, statuses)
    return ResultSet(table, {status.record.id: origin(status) for status in statuses}, fills(table, job, statuses))


def origin(status: RunStatus) -> dict[str, Any]:
    """What a run is and what it gave: enough to make it again, and to see whether it was."""
    spec, result = read_json(status.path / "spec.json") or {}, read_json(status.path / "result.json") or {}
    return {
        "record": asdict(status.record),
        "state": status.state,
        "cause": status.cause,
        "step": status.step,
        "num_steps": status.num_steps,
        "attempts": status.attempts,
        "path": str(status.path),
        "entry": spec.get("entry", ""),
        "command": spec.get("command", ""),
        "layout": spec.get("layout", {}),
        "config": spec.get("config", {}),
        "code": {key: value for key, value in code_of(status).items() if key != "path"},
        "metrics": result.get("metrics", {}),
        "weights_sha256": result.get("weights_sha256"),
        "upstream_sha256": result.get("upstream_sha256", {}),
    }


def fills(table: Table, job: JobRecord, statuses: Sequence[RunStatus]) -> list[Fill]:
    """For every cell that lacks numbers, the run that is in the way. Commands that start something come first."""
    by_id = {status.record.id: status for status in statuses}
    found: dict[tuple[str, str], Fill] = {}
    for cell in (cell for row in table.rows for cell in row.cells.values()):
        of_cell = set()
        for run_id in cell.waiting:
            status = _in_the_way(by_id[run_id], by_id)
            key = _command(status, job), status.state
            found.setdefault(key, Fill(*key)).runs.setdefault(status.record.id, status.cause)
            of_cell.add(key)
        for key in of_cell:
            found[key].cells += 1
    if not job.report.get("columns"):  # then runs make them, and those of which none is complete have none
        waited = {run_id for row in table.rows for cell in row.cells.values() for run_id in cell.waiting}
        needed = {after for record in job.records for after in record.after}
        given = {run_id for row in table.rows for cell in row.cells.values() for run_id in cell.runs}  # some of them of purged runs
        seen = waited | needed | given
        for status in statuses:
            if status.state != "complete" and status.record.id not in seen:
                other = _in_the_way(status, by_id)
                key = _command(other, job), other.state
                found.setdefault(key, Fill(*key)).runs.setdefault(other.record.id, other.cause)
    return sorted(found.values(), key=lambda fill: fill.state in BUSY)


def _in_the_way(status: RunStatus, by_id: Mapping[str, RunStatus]) -> RunStatus:
    """The run itself, or the one further up that has to be mended or waited for first."""
    for after in status.record.after:
        upstream = by_id.get(after)
        if upstream is not None and upstream.state != "complete":
            return _in_the_way(upstream, by_id)
    return status


def _command(status: RunStatus, job: JobRecord) -> str:
    if RunFolder(status.path).hold_mark.exists():
        return f"equihpc release {status.record.id}"
    if status.state in BUSY:
        return f"equihpc status {job.name} --watch"
    if status.state in ("cancelled", "purged") or (status.state == "failed" and status.cause.startswith("budget:")):
        return f"{job.command} --retry {status.state}"
    return job.command


# --- frozen ------------------------------------------------------------------------------------------------------------


def freeze(found: ResultSet, path: Path, job_dir: Path) -> str:
    """Write `found` to a new file and remember it in the job's folder; returns why that could not be done, or nothing.

    Raises UserError for a file that exists.
    """
    path = path.absolute()
    if path.suffix != ".json":
        raise UserError(f"{path} does not end in .json, by which equihpc report tells a frozen set from a job's name")
    if path.exists():
        raise UserError(f"{path} exists: what is frozen stays as it is; give another name, or remove the file first")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent} does not exist: a frozen set is written into a folder that is there")
    table = found.table
    content = {
        "frozen": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "table": {
            "job": table.job,
            "parameters": table.parameters,
            "metrics": table.metrics,
            "baseline": table.baseline,
            "directions": table.directions,
            "remarks": table.remarks,
            "digits": table.digits,
            "rows": [asdict(row) for row in table.rows],
            "versions": [{**asdict(version), "stages": dict(version.stages)} for version in table.versions],
        },
        "runs": found.runs,
        "fills": [asdict(fill) for fill in found.fills],
    }
    write_json(path, {"format": FORMAT, "version": VERSION, "sha256": _sha256(content), **content})
    try:
        append_json(job_dir / FROZEN, {"file": str(path), "sha256": _sha256(content)})
    except OSError as error:  # somebody else's job
        return f"the job's reports will not say what changes in it: {error}"
    return ""


def load(path: Path) -> ResultSet:
    """A frozen set as it was. Raises UserError for a file that is none, or that somebody changed."""
    if not path.is_file():
        raise UserError(f"there is no file {path}; equihpc report NAME --freeze {path} makes one")
    data = read_json(path)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise UserError(f"{path} is not a frozen report; equihpc report NAME --freeze FILE makes one")
    if data.get("version") != VERSION:
        raise UserError(f"{path} is a frozen report of version {data.get('version')}; this code reads version {VERSION}")
    content = {key: value for key, value in data.items() if key not in ("format", "version", "sha256")}
    if data.get("sha256") != _sha256(content):
        raise UserError(f"{path} was changed since it was frozen: its numbers do not belong to its checksum; restore it, or freeze again")
    runs = content["runs"]
    keys = ("state", "step", "num_steps", "attempts", "cause")
    statuses = [RunStatus(Record(**run["record"]), Path(run["path"]), **{key: run[key] for key in keys}) for run in runs.values()]
    about = content["table"]
    versions = [Version(**{**version, "stages": Counter(version["stages"])}) for version in about["versions"]]
    table = Table(**{**about, "rows": [_row(row) for row in about["rows"]], "statuses": statuses, "versions": versions})
    return ResultSet(table, runs, [Fill(**fill) for fill in content["fills"]], content["frozen"])


def _row(data: Mapping[str, Any]) -> Row:
    cells = {name: Cell(**cell) for name, cell in data["cells"].items()}
    reported = {name: (value, source) for name, (value, source) in data["reported"].items()}
    return Row(**{**data, "cells": cells, "reported": reported})


def _sha256(content: Mapping[str, Any]) -> str:
    """Of the content however it is laid out in the file."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()


def known(job_dir: Path) -> dict[Path, ResultSet]:
    """The job's frozen sets that are still where they were written and as they were."""
    found = {}
    for path, digest in {Path(line["file"]): line["sha256"] for line in read_lines(job_dir / FROZEN)}.items():
        with contextlib.suppress(OSError, UserError):  # on a file system that is away; changed by hand
            data = read_json(path)
            if isinstance(data, dict) and data.get("sha256") == digest:
                found[path] = load(path)
    return found


def changes(before: ResultSet, now: Table, name: str) -> list[str]:
    """Numbers of the frozen set `name` that are others or gone today. New ones are no change."""
    found = []
    for row in before.table.rows:
        rows = [other for other in now.rows if _is_of(other, row)]  # of a parameter that is new today with all its values
        where = ", ".join(f"{path.partition('.')[2] or path} {text}" for path, text in _labelled(before.table, row)) or "the one row"
        for metric, cell in row.cells.items():
            today = [other.cells[metric] for other in rows if metric in other.cells]
            left = Counter(pair for each in today for pair in zip(each.seeds, each.values, strict=True))
            for pair in zip(cell.seeds, cell.values, strict=True):
                if left[pair]:
                    left[pair] -= 1
                    continue
                other = next((value for (seed, value), count in left.items() if seed == pair[0] and count), None)
                if other is not None:
                    left[pair[0], other] -= 1
                number = f"{metric} of {where}{_seed_text(pair[0])}: {pair[1]!r} then, "
                found.append(number + ("no number now" if other is None else f"{other!r} now"))
    if len(found) > MOST_CHANGES:
        found[MOST_CHANGES:] = [f"and {len(found) - MOST_CHANGES} numbers more"]
    return [f"changed since {name} was frozen ({before.frozen}): {text}" for text in found]


def _is_of(now: Row, before: Row) -> bool:
    """The same in all parameters that both have."""
    shared = before.params.keys() & now.params.keys()
    return now.name == before.name and all(repr(now.params[key]) == repr(before.params[key]) for key in shared)


def _labelled(table: Table, row: Row) -> list[tuple[str, str]]:
    return list(zip(table.parameters, labels(table, row), strict=True))


def _seed_text(seeds: str) -> str:
    """`, seed 3` of what `report` keeps with a value."""
    values = dict.fromkeys(text.rpartition(",")[2].strip(" )]") for text in seeds.split("), ") if "," in text)
    return f", seed {'/'.join(values)}" if values else ""
