"""The sweep in TensorBoard's HPARAMS tab: a session for each row and seed of the report's table, with its parameters and final metrics.

They stand in `_hparams/` of the job's folder, made anew from the results whenever they are asked for. A session of TensorBoard is a
folder; one event file in each, and one that describes the columns.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.plugins.hparams import api_pb2, metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo, SessionStartInfo
from tensorboard.summary.writer.record_writer import RecordWriter

from hpc.report import Row, Table, labels, plain
from hpc.report_formats import short_name
from hpc.status import RunStatus

FOLDER = "_hparams"  # no stage's name: they begin with a letter


def write(table: Table, job_dir: Path) -> int:
    """All sessions, and their number; what was there of other ones goes, and what is as it was is not written again."""
    by_id = {status.record.id: status for status in table.statuses}
    folder = job_dir / FOLDER
    names = _names(table, by_id.values())
    sessions = _sessions(table, by_id, names)
    values = {name: [session["params"].get(name) for session in sessions.values()] for name in names.values()}
    found = {folder: _events([_experiment(values, table.metrics)])}
    owners = Counter(session["of"] for session in sessions.values())
    for name, session in sessions.items():
        of = session["of"] if owners[session["of"]] == 1 else ""  # one that is of several rows is a line of its own
        start = SessionStartInfo(group_name=of)
        for key, value in session["params"].items():
            if _is_number(value):
                start.hparams[key].number_value = value
            else:
                start.hparams[key].string_value = value
        scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in session["metrics"].items()]
        end = SessionEndInfo(status=api_pb2.STATUS_SUCCESS)
        found[folder / name] = _events(
            [
                _plugin(metadata.SESSION_START_INFO_TAG, HParamsPluginData(session_start_info=start)),
                *scalars,
                _plugin(metadata.SESSION_END_INFO_TAG, HParamsPluginData(session_end_info=end)),
            ]
        )
    for path in folder.glob("*/"):
        if path not in found:
            shutil.rmtree(path)
    for path, events in found.items():
        _put(path, events)
    return len(sessions)


def _names(table: Table, statuses: Iterable[RunStatus]) -> dict[str, str]:
    """Parameters and seeds -> as columns: without the stage where that is no other's name too."""
    seeds = dict.fromkeys(key for status in statuses for key in status.record.params if key.partition(".")[2] == "seed")
    every = [*table.parameters, *(key for key in seeds if key not in table.parameters)]
    shorts = Counter(map(short_name, every))
    return {key: short_name(key) if shorts[short_name(key)] == 1 else key for key in every}


def _sessions(table: Table, by_id: Mapping[str, RunStatus], names: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Name -> params, metrics, and the folder of the run's own session (`of`), by row and seeds."""
    found: dict[tuple[int, str, int], dict[str, Any]] = {}
    for number, row in enumerate(table.rows):
        for metric, cell in row.cells.items():
            times: Counter[str] = Counter()
            for value, seeds, run in zip(cell.values, cell.seeds, cell.runs, strict=True):
                key = number, seeds, times[seeds]  # a second result of the same seeds is another session
                times[seeds] += 1
                session = found.setdefault(
                    key, {"params": _params(table, row, by_id[run], names), "metrics": {}, "of": _own(by_id[run], by_id)}
                )
                session["metrics"][metric] = value
    named: dict[str, dict[str, Any]] = {}
    for session in found.values():
        name = ",".join(f"{key}={plain(value)}" for key, value in session["params"].items()).replace("/", "|")[:150] or "run"
        named[name if name not in named else f"{name} ({len(named)})"] = session
    return named


def _params(table: Table, row: Row, status: RunStatus, names: Mapping[str, str]) -> dict[str, Any]:
    texts = dict(zip(table.parameters, labels(table, row), strict=True))
    values = {key: row.params[key] if _is_number(row.params[key]) else _as_told(row.params[key], texts[key]) for key in row.params}
    seeds = {key: value for key, value in status.record.params.items() if key in names and key not in values}
    return {names[key]: value for key, value in (values | seeds).items()}


def _own(status: RunStatus, by_id: Mapping[str, RunStatus]) -> str:
    """The run among those it was made from that may have told its settings itself, as TensorBoard calls it; "" for none."""
    for after in status.record.after:
        if after in by_id:
            other = by_id[after]
            if (other.path / "tensorboard").is_dir():
                return f"{other.path.parent.name}/{other.path.name}/tensorboard"
            if found := _own(other, by_id):
                return found
    return ""


def _as_told(value: Any, text: str) -> str:
    """As a run tells its own settings."""
    return "null" if value is None else text


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# --- events ------------------------------------------------------------------------------------------------------------


def _experiment(values: Mapping[str, Sequence[Any]], metrics: Iterable[str]) -> Summary.Value:
    """`values`: of each column, those of all sessions. Columns that are not numbers alone have no filter, which would hide runs."""
    columns = []
    for name, some in values.items():
        kind = api_pb2.DATA_TYPE_FLOAT64 if all(map(_is_number, some)) else api_pb2.DATA_TYPE_UNSET
        columns.append(api_pb2.HParamInfo(name=name, type=kind, differs=len(set(map(plain, some))) > 1))
    wanted = [api_pb2.MetricInfo(name=api_pb2.MetricName(tag=metric)) for metric in metrics]
    return _plugin(metadata.EXPERIMENT_TAG, HParamsPluginData(experiment=api_pb2.Experiment(hparam_infos=columns, metric_infos=wanted)))


def _plugin(tag: str, data: HParamsPluginData) -> Summary.Value:
    data.version = metadata.PLUGIN_DATA_VERSION
    about = SummaryMetadata.PluginData(plugin_name=metadata.PLUGIN_NAME, content=data.SerializeToString())
    return Summary.Value(tag=tag, metadata=SummaryMetadata(plugin_data=about), tensor=metadata.NULL_TENSOR)


def _events(values: Iterable[Summary.Value]) -> list[bytes]:
    return [value.SerializeToString(deterministic=True) for value in values]


def _put(path: Path, values: list[bytes]) -> None:
    """As the one event file in `path`; a new one replaces it where something is different, for TensorBoard does not read a file twice."""
    path.mkdir(parents=True, exist_ok=True)
    before = sorted(path.glob("events.out.tfevents.*"))
    digest = _digest(values)
    if [file.suffix for file in before] == [f".{digest}"]:
        return
    now = time.time()
    file = path / f"events.out.tfevents.{now:.6f}.{digest}"
    with contextlib.ExitStack() as stack:
        writer = RecordWriter(stack.enter_context(open(file, "xb")))
        writer.write(Event(wall_time=now, file_version="brain.Event:2").SerializeToString())
        for value in values:
            summary = Summary(value=[Summary.Value.FromString(value)])
            writer.write(Event(wall_time=now, step=0, summary=summary).SerializeToString())
        writer.flush()
    for old in before:
        old.unlink()


def _digest(values: list[bytes]) -> str:
    digest = hashlib.sha256()
    for value in values:
        digest.update(len(value).to_bytes(8, "little") + value)
    return digest.hexdigest()[:12]
