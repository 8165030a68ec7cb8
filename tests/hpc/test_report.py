"""Paired differences in the table: seed by seed, and what is said where there are no pairs."""

from __future__ import annotations

import csv
import io
import json
import re
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hpc import frozen, page, report, report_formats, spec
from hpc.frozen import ResultSet
from hpc.status import JobRecord, Record, RunStatus
from hpc.view import result_table

# of each arm: seed -> value; seeds differ far more than arms
VALUES = {"base": {0: 0.10, 1: 0.50, 2: 0.90}, "aux": {0: 0.21, 1: 0.59, 2: 1.00}, "late": {1: 0.70}}


def table(folder: Path, values: dict[str, dict[int, float]], baseline: str = "base", written: bool = False) -> report.Table:
    """Of a job whose trainings are arms × seeds, each with a test that comes after it. `written`: its folders are there."""
    statuses = []
    for arm, of_seeds in values.items():
        for seed, value in of_seeds.items():
            params = {"train.arm": arm, "train.seed": seed}
            for stage, after in (("train", []), ("test", [f"train-{arm}-{seed}"])):
                record = Record(f"{stage}-{arm}-{seed}", "", stage, dict(params), after, 1)
                path = folder / record.id
                if not written:
                    path.mkdir()
                    (path / "spec.json").write_text(json.dumps({"config": {"arm": arm}}))
                    (path / "result.json").write_text(json.dumps({"metrics": {"t/x": value} if stage == "test" else {}}))
                statuses.append(RunStatus(record, path, "complete"))
    shown: dict[str, Any] = {"rows": ["train.arm"], "columns": ["t/x"], "baseline": {"train.arm": baseline}}
    job = JobRecord("job", "job.yaml", "local", None, str(folder), shown, [status.record for status in statuses])
    return report.build(job, statuses)


def test_differences_are_of_the_same_seeds(tmp_path: Path) -> None:
    found = table(tmp_path, VALUES)
    base, aux, late = found.rows
    assert found.difference(base, "t/x") is None
    paired = found.difference(aux, "t/x")
    assert paired is not None
    differences = [0.11, 0.09, 0.10]
    assert paired.values == pytest.approx(differences)
    assert paired.std == pytest.approx(statistics.stdev(differences))
    assert aux.cells["t/x"].std == pytest.approx(statistics.stdev(VALUES["aux"].values()))
    one = found.difference(late, "t/x")
    assert one is not None
    assert one.values == pytest.approx([0.20]), "to the same seed of the baseline, not to its mean"
    assert [row["metrics"]["t/x"].get("difference") for row in found.to_json()["rows"]] == [
        None,
        {"mean": pytest.approx(0.10), "std": pytest.approx(0.01), "n": 3, "paired": True},
        {"mean": pytest.approx(0.20), "std": None, "n": 1, "paired": True},
    ]
    assert found.to_json()["rows"][1]["metrics"]["t/x"]["values"] == [0.21, 0.59, 1.00]
    assert "+0.100 ± 0.010" in page.render(ResultSet(found, {}, []))
    header, *lines = found.to_csv().splitlines()
    assert header == "train.arm,t/x,t/x std,t/x n,t/x difference,t/x difference std,t/x difference n,code"
    assert [line.split(",")[3:6] for line in lines] == [["3", "", ""], ["3", *lines[1].split(",")[4:6]], ["1", *lines[2].split(",")[4:6]]]
    assert [float(number) for number in lines[1].split(",")[4:6]] == pytest.approx([0.10, 0.01])
    column = list(result_table(found).columns[1].cells)  # type: ignore[union-attr]
    assert column[1] == "0.600 ± 0.395 (3) [dim](+0.100 ± 0.010)[/dim]"


def test_without_pairs_it_is_the_difference_of_the_means(tmp_path: Path) -> None:
    found = table(tmp_path, {"base": {0: 0.1, 1: 0.3}, "aux": {2: 0.5, 3: 0.9}})
    difference = found.difference(found.rows[1], "t/x")
    assert difference is not None
    assert difference.values == pytest.approx([0.5])
    assert difference.std is None


def test_of_a_seed_that_stands_twice_no_pair_is_made(tmp_path: Path) -> None:
    """Runs of one row that differ in something else than the seed cannot be told apart."""
    found = table(tmp_path, {"base": {0: 0.1, 1: 0.3}, "aux": {0: 0.5, 1: 0.9}})
    base = found.rows[0].cells["t/x"]
    base.seeds = [base.seeds[0]] * 2
    difference = found.difference(found.rows[1], "t/x")
    assert difference is not None
    assert difference.values == pytest.approx([0.5])


def test_of_several_baselines_the_one_that_is_alike_in_the_rest(tmp_path: Path) -> None:
    """g × lambda with lambda 0 as the baseline: each g has its own."""
    cells = {("rot", 0): 0.1, ("rot", 1): 0.3, ("se2", 0): 0.7, ("se2", 1): 0.8}
    rows = [
        report.Row({"a.g": g, "a.lambda": weight}, {"t/x": report.Cell([value], ["0"])}, is_baseline=weight == 0)
        for (g, weight), value in cells.items()
    ]
    found = report.Table("job", ["a.g", "a.lambda"], ["t/x"], rows, [], [], {"a.lambda": 0})
    differences = [found.difference(row, "t/x") for row in rows]
    assert [each and each.mean for each in differences] == [None, pytest.approx(0.2), None, pytest.approx(0.1)]


def of_results(folder: Path, runs: list[tuple[dict[str, Any], dict[str, Any] | None]], **shown: Any) -> tuple[JobRecord, list[RunStatus]]:
    """A job of single runs with these parameters and results; one without a result has failed."""
    statuses = []
    for number, (params, result) in enumerate(runs):
        record = Record(f"run-{number}", "", "test", params, [], 1)
        path = folder / record.id
        path.mkdir()
        (path / "spec.json").write_text(json.dumps({"config": {}}))
        if result is not None:
            (path / "result.json").write_text(json.dumps(result))
        statuses.append(RunStatus(record, path, "failed" if result is None else "complete"))
    return JobRecord("job", "job.yaml", "local", None, str(folder), shown, [status.record for status in statuses]), statuses


def test_two_tasks_of_one_name_are_never_averaged(tmp_path: Path) -> None:
    """Of one name and other settings they measure something else under the same metric's name."""
    tasks: list[Any] = ["knn", {"name": "r2", "part": "inv"}, {"name": "r2", "part": "equi"}]
    values = [("knn/top1", 0.5), ("r2/rotation", 0.1), ("r2/rotation", 0.9)]
    runs = [
        ({"test.lambda": lam, "test.task": task}, {"metrics": {name: value + lam}})
        for lam in (0, 1)
        for task, (name, value) in zip(tasks, values, strict=True)
    ]
    found = report.build(
        *of_results(tmp_path, runs, rows=["test.lambda"], columns=["knn/top1", "r2/rotation"], baseline={"test.lambda": 0})
    )
    assert found.parameters == ["test.lambda", "test.task"]
    assert [report.labels(found, row) for row in found.rows[:3]] == [["0", "knn"], ["0", "r2 (part inv)"], ["0", "r2 (part equi)"]]
    assert [row.cells["r2/rotation"].values for row in found.rows] == [[], [0.1], [0.9], [], [1.1], [1.9]]
    differences = [found.difference(row, "r2/rotation") for row in found.rows[3:]]
    assert [each and each.mean for each in differences] == [None, pytest.approx(1.0), pytest.approx(1.0)]


@pytest.mark.parametrize("columns", [[], ["knn:cifar10/top1", "knn:pets/top1", "knn/top1"]])
def test_a_run_is_waited_for_where_its_data_set_stands(tmp_path: Path, columns: list[str]) -> None:
    runs: list[tuple[dict[str, Any], dict[str, Any] | None]] = [
        ({"test.task": "knn", "test.data": data, "test.seed": seed}, None if (data, seed) == ("pets", 1) else {"metrics": {metric: 0.5}})
        for data, metric in ((None, "knn/top1"), ("/data/cifar10", "knn:cifar10/top1"), ("pets", "knn:pets/top1"))
        for seed in (0, 1)
    ]
    (row,) = report.build(*of_results(tmp_path, runs, rows=[], columns=columns)).rows
    assert {name: cell.text(3) for name, cell in row.cells.items()} == {
        "knn/top1": "0.500 ± 0.000 (2)",
        "knn:cifar10/top1": "0.500 ± 0.000 (2)",
        "knn:pets/top1": "0.500 (1 of 2: failed)",
    }


def test_a_data_set_of_which_nothing_is_complete_is_missing(tmp_path: Path) -> None:
    done = ({"test.task": "knn", "test.data": "cifar10"}, {"metrics": {"knn:cifar10/top1": 0.5}})
    failed = ({"test.task": "knn", "test.data": "pets"}, None)
    (tmp_path / "named").mkdir()
    (row,) = report.build(*of_results(tmp_path / "named", [done, failed], columns=["knn:cifar10/top1", "knn:pets/top1"])).rows
    assert [cell.text(3) for cell in row.cells.values()] == ["0.500", "failed"]
    found = frozen.collect(*of_results(tmp_path, [done, failed]))
    assert list(found.table.rows[0].cells) == ["knn:cifar10/top1"]
    assert not found.table.rows[0].cells["knn:cifar10/top1"].waiting
    assert [fill.text for fill in found.fills] == ["numbers that have no column yet wait for run-1 (failed)"]
    nothing = frozen.collect(*of_results(tmp_path / "named" / "run-0", [failed]))
    assert [fill.command for fill in nothing.fills] == ["equihpc submit job.yaml"]


def test_settings_stand_in_a_label_only_where_rows_would_read_alike() -> None:
    method = {"name": "vicreg", "views": {"flip": 0.5}, "weight": 1.0}
    heavy = {**method, "weight": 2.0}
    rows = [report.Row({"a.method": each, "a.g": g}, {}) for each, g in ((method, "rot"), (heavy, "rot"), (heavy, "se2"))]
    found = report.Table("job", ["a.method", "a.g"], [], rows, [])
    assert [report.labels(found, row)[0] for row in rows] == ["vicreg (weight 1)", "vicreg (weight 2)", "vicreg"]


def test_the_better_direction_is_the_results(tmp_path: Path) -> None:
    def result(x: float, higher: bool | None) -> dict[str, Any]:
        return {"metrics": {"e/error": x, "e/more": x}} | (
            {} if higher is None else {"main": {"metric": "e/error", "higher_is_better": higher}}
        )

    for folder, higher, colours in (("lower", False, ["down", "up"]), ("higher", True, ["up", "down"]), ("unknown", None, [])):
        (tmp_path / folder).mkdir()
        runs = [({"test.a": a}, result(x, higher)) for a, x in ((0, 0.5), (1, 0.7), (2, 0.3), (3, 0.5))]
        found = report.build(*of_results(tmp_path / folder, runs, columns=["e/error"], baseline={"test.a": 0}))
        html = page.render(ResultSet(found, {}, []))
        assert re.findall(r'<small class="(\w+)">[+-]0', html) == colours
        assert html.count("<small>+0.000") == 1, "no difference is neither"
        assert ("e/error ↓" in html) == (higher is False)
        assert found.to_json()["higher_is_better"] == ({} if higher is None else {"e/error": higher})


def test_a_metric_s_own_direction_goes_before_the_main_one_s(tmp_path: Path) -> None:
    own = {"main": {"metric": "e/r2", "higher_is_better": True}, "higher_is_better": {"e/error": False, "e/control": None}}
    metrics = {"e/r2": 0.5, "e/error": 0.5, "e/control": 0.5}
    runs = [({"test.a": a}, {"metrics": metrics, **own}) for a in range(2)]
    found = report.build(*of_results(tmp_path, runs, columns=list(metrics)))
    assert found.to_json()["higher_is_better"] == {"e/r2": True, "e/error": False}


def test_numbers_of_fake_data_sets_are_said(tmp_path: Path) -> None:
    runs = [({"test.a": a}, {"metrics": {"e/x": 0.5}, "dataset": {"name": "food101", "fake": a == 1}}) for a in range(3)]
    found = report.build(*of_results(tmp_path, runs, columns=["e/x"]))
    assert next(remark for remark in found.remarks if "fake" in remark).startswith("numbers of 1 runs are of fake data sets")


def test_what_is_no_number_is_no_value(tmp_path: Path) -> None:
    runs = [({"test.a": a}, {"metrics": {"e/x": value}}) for a, value in enumerate((0.5, None, "0.7", float("nan")))]
    found = report.build(*of_results(tmp_path, runs, columns=["e/x"]))
    assert [row.cells["e/x"].text(3) for row in found.rows] == ["0.500", "–", "–", "–"]


def test_what_the_report_names_and_no_row_is_is_said(tmp_path: Path) -> None:
    said = {"source": "Somebody", "params": {"test.a": 7}, "name": None, "metrics": {"e/x": 0.9}}
    job, statuses = of_results(tmp_path, [({"test.a": 1}, {"metrics": {"e/x": 0.5}})], baseline={"test.a": 3}, reported=[said])
    found = frozen.collect(job, statuses)
    assert found.notes == ["no row is the baseline test.a 3: there are no differences", "no row is what Somebody reports of test.a 7"]
    (statuses[0].path / "spec.json").unlink()
    job.report["rows"] = ["test.b"]
    (row,) = report.build(job, [replace(statuses[0], state="purged")]).rows
    assert row.params == {"test.b": report.UNKNOWN}, "and not the value none"


def test_the_number_of_pairs_is_shown_where_it_is_another() -> None:
    assert report.Cell([0.1, 0.3], ["0", "1"]).beside(report.Cell([1.0, 2.0, 3.0]), 3) == "+0.200 ± 0.141 (2)"
    assert report.Cell([0.1, 0.3], ["0", "1"]).beside(report.Cell([1.0, 2.0]), 3) == "+0.200 ± 0.141"
    assert report.Cell([0.1]).beside(report.Cell([1.0, 2.0]), 3) == "+0.100"


def test_without_a_baseline_there_are_no_columns_for_differences(tmp_path: Path) -> None:
    found = table(tmp_path, VALUES, baseline="none")
    assert found.to_csv().splitlines()[0] == "train.arm,t/x,t/x std,t/x n,code"
    assert all("difference" not in row["metrics"]["t/x"] for row in found.to_json()["rows"])


def test_numbers_of_an_unfinished_training_are_marked_everywhere(tmp_path: Path) -> None:
    """In the table, in every format, and in a note."""
    table(tmp_path, VALUES)
    path = tmp_path / "test-aux-1" / "result.json"
    path.write_text(json.dumps({"metrics": {"t/x": 0.59}, "incomplete": "step 3 of 6"}))
    found = table(tmp_path, VALUES, written=True)
    cell = found.rows[1].cells["t/x"]
    assert cell.incomplete == {"test-aux-1": "step 3 of 6"}
    mark = "(incomplete: step 3 of 6)"
    assert cell.text(3).endswith(mark)
    assert found.notes == ["test-aux-1 is of a training that was not finished: step 3 of 6"]
    assert found.to_json()["rows"][1]["metrics"]["t/x"]["incomplete"] == {"test-aux-1": "step 3 of 6"}
    header, base, aux, _ = found.to_csv().splitlines()
    assert header.endswith(",incomplete")
    assert base.endswith(",")
    assert aux.endswith("t/x: test-aux-1 step 3 of 6")
    for text in (page.render(ResultSet(found, {}, [])), report_formats.markdown(ResultSet(found, {}, []))):
        assert mark in text
    assert mark in report_formats.latex(ResultSet(found, {}, []))
    assert "incomplete" not in json.dumps(found.to_json()["rows"][0])


# --- more than the three digits of every metric ------------------------------------------------------------------------------


def of_seeds(folder: Path, values: dict[str, dict[int, dict[str, float]]], **shown: Any) -> tuple[JobRecord, list[RunStatus]]:
    """arm -> seed -> metrics."""
    runs = [
        ({"test.arm": arm, "test.seed": seed}, {"metrics": metrics, "main": {"metric": "e/x", "higher_is_better": True}})
        for arm, seeds in values.items()
        for seed, metrics in seeds.items()
    ]
    return of_results(folder, runs, rows=["test.arm"], **shown)


def test_a_mean_of_columns_is_taken_seed_by_seed(tmp_path: Path) -> None:
    values = {
        "base": {0: {"e/x": 0.1, "e/y": 0.3}, 1: {"e/x": 0.5, "e/y": 0.9}},
        "aux": {0: {"e/x": 0.2, "e/y": 0.5}, 1: {"e/x": 0.6, "e/y": 0.8}, 2: {"e/x": 0.9}},
    }
    job, statuses = of_seeds(
        tmp_path, values, columns=["e/x", "mean", "e/y"], means={"mean": ["e/x", "e/y"]}, baseline={"test.arm": "base"}, digits=4
    )
    found = report.build(job, statuses)
    assert found.metrics == ["e/x", "mean", "e/y"]
    base, aux = found.rows
    assert base.cells["mean"].values == pytest.approx([0.2, 0.7])
    assert base.cells["mean"].std == pytest.approx(statistics.stdev([0.2, 0.7]))
    assert aux.cells["mean"].values == pytest.approx([0.35, 0.7]), "of seed 2 there is no e/y"
    assert (difference := found.difference(aux, "mean")) is not None
    assert difference.values == pytest.approx([0.15, 0.0])
    assert found.is_better(difference, "mean") is True
    assert "0.5250 ± 0.2475 (2) (+0.0750 ± 0.1061)" in report_formats.markdown(ResultSet(found, {}, []))
    with pytest.raises(ValueError, match=r"means\.both has 'e/y', which is none of the columns that runs give: e/x"):
        spec.Report(columns=("e/x",), means={"both": ("e/x", "e/y")})


def test_digits_are_those_of_the_job_everywhere(tmp_path: Path) -> None:
    values = {"base": {0: {"e/x": 0.99812}}, "aux": {0: {"e/x": 0.99831}}}
    said = {"source": "Somebody", "params": {"test.arm": "aux"}, "name": None, "metrics": {"e/x": 0.29154}}
    job, statuses = of_seeds(tmp_path, values, columns=["e/x"], baseline={"test.arm": "base"}, reported=[said], digits=5)
    found = frozen.collect(job, statuses)
    console = Console(width=200, file=io.StringIO())
    console.print(result_table(found.table))
    assert isinstance(console.file, io.StringIO)
    texts = [console.file.getvalue(), page.render(found), report_formats.markdown(found), report_formats.latex(found)]
    for text in texts:
        for number in ("0.99831", "+0.00019", "0.29154"):
            assert number in text
    difference = found.table.difference(found.table.rows[1], "e/x")
    assert difference is not None
    assert found.table.is_better(difference, "e/x") is True
    assert replace(found.table, digits=3).is_better(difference, "e/x") is None, "it reads 0.000"
    frozen.freeze(found, tmp_path / "paper.json", tmp_path)
    assert frozen.load(tmp_path / "paper.json").table.digits == 5


def test_what_no_run_gives_is_said(tmp_path: Path) -> None:
    said = {"source": "Somebody", "params": {}, "name": "Theirs", "metrics": {"e/z": 0.9}}
    runs = [({"test.a": a}, {"metrics": {"e/x": value, "e/y": 1.0}}) for a, value in enumerate((0.5, None))]
    found = report.build(*of_results(tmp_path, runs, columns=["e/x", "e/xx"], reported=[said]))
    assert found.remarks == [
        "e/x of 1 complete runs is no number: run-1",
        "no run gives the column e/xx; did you mean 'e/x'?",
        "Somebody reports e/z: there is no such column",
    ]


@pytest.mark.parametrize("sign", ["=", "+", "-", "@", "\t="])
def test_no_text_of_a_csv_is_a_formula(tmp_path: Path, sign: str) -> None:
    said = {"source": f"{sign}1+1", "params": {}, "name": f"{sign}SUM(1)", "metrics": {"e/x": 0.9}}
    runs = [({"test.a": a}, {"metrics": {"e/x": 0.5}}) for a in (f"{sign}A1", -3)]
    found = report.build(*of_results(tmp_path, runs, rows=["test.a"], columns=["e/x"], reported=[said]))
    lines = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert [line["test.a"] for line in lines] == [f"'{sign}A1", "-3", f"'{sign}SUM(1)"]
    assert lines[2]["source"] == f"'{sign}1+1"


def test_results_of_purged_runs_are_the_ledgers(tmp_path: Path) -> None:
    """And what they were, where it is not swept."""
    statuses = []
    for seed in (0, 1):
        record = Record(f"run-{seed}", "", "test", {"test.seed": seed}, [], 1)
        remembered = {"config": {"arm": "aux"}, "result": {"metrics": {"t/x": 0.25 + seed}}}
        if seed == 0:
            (tmp_path / record.id).mkdir()
            (tmp_path / record.id / "spec.json").write_text(json.dumps({"config": remembered["config"]}))
            (tmp_path / record.id / "result.json").write_text(json.dumps(remembered["result"]))
        statuses.append(RunStatus(record, tmp_path / record.id, "purged" if seed else "complete", remembered=remembered if seed else {}))
    shown = {"columns": ["t/x"], "rows": ["test.arm"]}
    found = frozen.collect(JobRecord("job", "job.yaml", "local", None, str(tmp_path), shown, [each.record for each in statuses]), statuses)
    assert [(row.params, row.cells["t/x"].values) for row in found.table.rows] == [({"test.arm": "aux"}, [0.25, 1.25])]
    assert found.notes == ["numbers of 1 runs are the ledger's, for their folders are gone: for example run-1"]
    assert found.fills == []


def test_a_mean_waits_for_each_seed_once_and_takes_what_is_reported(tmp_path: Path) -> None:
    said = {"source": "Somebody", "params": {"test.a": 1}, "name": None, "metrics": {"both": 0.6}}
    runs = [
        ({"test.a": 1, "test.task": task, "test.seed": seed}, None if seed else {"metrics": {f"{task}/x": 0.5}})
        for task in ("knn", "r2")
        for seed in (0, 1, 2)
    ]
    job, statuses = of_results(
        tmp_path, runs, rows=["test.a"], columns=["knn/x", "r2/x"], means={"both": ["knn/x", "r2/x"]}, reported=[said]
    )
    (row,) = report.build(job, statuses).rows
    assert {name: cell.text(3) for name, cell in row.cells.items()} == dict.fromkeys(("knn/x", "r2/x", "both"), "0.500 (1 of 3: failed)")
    assert row.reported == {"both": (0.6, "Somebody")}


def test_means_that_cannot_be_are_said(tmp_path: Path) -> None:
    runs = [({"test.a": a}, {"metrics": {"e/x": 0.5, "e/y": 1.0}}) for a in (0, 1)]
    found = report.build(*of_results(tmp_path, runs, means={"both": ["e/x", "e/yy"]}))
    assert found.remarks == ["no run gives the column e/yy; did you mean 'e/y'?"]
    with pytest.raises(ValueError, match="means has 'e/x', which is the name of a metric: call the mean by a word without /"):
        spec.Report(means={"e/x": ("e/y",)})


def test_a_json_row_says_what_it_is_and_waits_for(tmp_path: Path) -> None:
    runs: list[tuple[dict[str, Any], dict[str, Any] | None]] = [({"test.a": 0}, {"metrics": {"e/x": 0.5}}), ({"test.a": 1}, None)]
    rows = report.build(*of_results(tmp_path, runs, rows=["test.a"], columns=["e/x"], baseline={"test.a": 0})).to_json()["rows"]
    assert [(row["is_baseline"], row["waiting"]) for row in rows] == [(True, {}), (False, {"e/x": {"run-1": "failed"}})]


def test_a_label_is_no_python() -> None:
    assert report.plain({"weight": 1.0, "temperature": 0.2}) == "weight 1, temperature 0.2"
    assert report.plain({"name": "ibot", "weight": 1.0}) == "ibot"
    assert report.plain({}) == "as it is"


def test_labels_keep_digits_that_tell_values_apart() -> None:
    assert [report.plain(value) for value in (0.1, 1e-5, 0.12345678, 0.12345679)] == ["0.1", "1e-05", "0.12345678", "0.12345679"]
