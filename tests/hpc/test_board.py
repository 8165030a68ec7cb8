"""The sweep as TensorBoard reads it: through its own reader of events and its own HParams plugin."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2, list_session_groups
from tensorboard.plugins.hparams.backend_context import Context

from hpc import board, report
from hpc.report import Cell, Row, Table
from hpc.status import Record, RunStatus
from tests.hpc import results

Run = Callable[..., subprocess.CompletedProcess[str]]


def read(job_dir: Path) -> tuple[Any, list[Any]]:
    """The experiment and the lines of the HPARAMS tab."""
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(job_dir)).Reload()
    context = Context(TBContext(data_provider=MultiplexerDataProvider(multiplexer, str(job_dir)), multiplexer=multiplexer))
    ctx = RequestContext()
    told = context.hparams_metadata(ctx, "")
    experiment = context.experiment_from_metadata(ctx, "", True, told, context.hparams_from_data_provider(ctx, "", None))
    request = api_pb2.ListSessionGroupsRequest(
        allowed_statuses=[api_pb2.STATUS_SUCCESS, api_pb2.STATUS_UNKNOWN],
        slice_size=1000,
        include_metrics=True,
        col_params=[api_pb2.ColParams(hparam=each.name, include_in_result=True) for each in experiment.hparam_infos]
        + [api_pb2.ColParams(metric=each.name, include_in_result=True) for each in experiment.metric_infos],
    )
    return experiment, list(list_session_groups.Handler(ctx, context, "", request).run().session_groups)


def values(group: Any) -> dict[str, Any]:
    told = {name: value.number_value if value.HasField("number_value") else value.string_value for name, value in group.hparams.items()}
    return told | {each.name.tag: each.value for each in group.metric_values}


def test_every_row_and_seed_has_its_parameters_and_metrics(tmp_path: Path) -> None:
    table = report.build(*results.make(tmp_path))
    folder = tmp_path / "job"
    assert board.write(table, folder) == 12
    experiment, groups = read(folder)
    assert {each.name: each.type for each in experiment.hparam_infos} == {
        "lambda": api_pb2.DATA_TYPE_UNSET,  # the baseline has none
        "d": api_pb2.DATA_TYPE_UNSET,
        "seed": api_pb2.DATA_TYPE_FLOAT64,
    }
    assert [each.name.tag for each in experiment.metric_infos] == ["t/x", "t/y"]
    found = {(line["lambda"], line["d"], line["seed"]): line for line in map(values, groups)}
    assert len(found) == 12
    assert found["null", "null", 1.0]["t/x"] == pytest.approx(results.value_of(None, None, 1))
    assert found[0.1, 512.0, 0.0]["t/x"] == pytest.approx(results.value_of(0.1, 512, 0))
    assert found[0.1, 512.0, 0.0]["t/y"] == pytest.approx(1 - results.value_of(0.1, 512, 0))


def test_a_runs_own_settings_and_its_line_are_one(tmp_path: Path) -> None:
    """A training tells its settings itself: the metrics come to the same line."""
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    job, statuses = results.make(tmp_path)
    run = next(status for status in statuses if status.record.id == "train-0.1-256-0")
    with SummaryWriter(str(run.path / "tensorboard")) as writer:
        for summary in hparams({"lambda": 0.1, "d": 256, "lr": 7.0}, {})[1:]:
            writer._get_file_writer().add_summary(summary)
    board.write(report.build(job, statuses), tmp_path / "job")
    groups = read(tmp_path / "job")[1]
    (line,) = (group for group in groups if group.name == "train/train-0.1-256-0/tensorboard")
    assert len(groups) == 12
    assert len(line.sessions) == 2
    assert values(line)["t/x"] == pytest.approx(results.value_of(0.1, 256, 0))


def test_what_is_as_it_was_is_not_written_again_and_what_is_gone_goes(tmp_path: Path) -> None:
    job, statuses = results.make(tmp_path)
    folder = tmp_path / "job"

    def files() -> set[Path]:
        return set((folder / board.FOLDER).rglob("events.*"))

    board.write(report.build(job, statuses), folder)
    before = files()
    assert len(before) == 13
    board.write(report.build(job, statuses), folder)
    assert files() == before
    path = next(status.path for status in statuses if status.record.id == "test-0.1-256-0")
    (path / "result.json").write_text('{"metrics": {"t/x": 9.0}}')
    job.records[:] = [record for record in job.records if "-0.1-512-1" not in record.id]
    statuses = [status for status in statuses if "-0.1-512-1" not in status.record.id]
    board.write(report.build(job, statuses), folder)
    assert len(files() - before) == 1
    assert len(before - files()) == 2
    (changed,) = files() - before
    assert EventAccumulator(str(changed.parent)).Reload().Scalars("t/x")[0].value == 9.0


def test_two_results_of_one_row_and_seed_are_two_lines(tmp_path: Path) -> None:
    statuses = [RunStatus(Record(f"r{number}", "", "s", {"s.seed": 0}, [], 1), tmp_path, "complete") for number in range(2)]
    cell = Cell([0.1, 0.2], ["0", "0"], ["r0", "r1"])
    rows = [Row({"s.a/b": "x"}, {"m": cell}), Row({}, {"m": Cell()}, name="of a publication")]
    assert board.write(Table("job", ["s.a/b"], ["m"], rows, statuses), tmp_path) == 2
    lines = [values(group) for group in read(tmp_path)[1]]
    assert sorted(line["m"] for line in lines) == pytest.approx([0.1, 0.2])
    assert {line["a/b"] for line in lines} == {"x"}


def test_the_command_writes_them(toy: Path, equihpc: Run) -> None:
    (toy / "job.yaml").write_text("stages: {train: {entry: toy, config: {steps: 1}, sweep: {grid: {value: [1.0, 2.0]}}}}\nseeds: [0, 1]\n")
    assert equihpc("submit", "job.yaml", "--cluster", "local", "--wait").returncode == 0
    assert "_hparams: 4 sessions; tensorboard --logdir" in equihpc("tensorboard", "job", "--write").stdout.replace("\n", " ")
    lines = [values(group) for group in read(toy / "runs" / "job")[1]]
    assert sorted((line["value"], line["seed"], line["toy/x"]) for line in lines) == [(1, 0, 1), (1, 1, 2), (2, 0, 2), (2, 1, 3)]
