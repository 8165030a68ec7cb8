"""Paired differences in the table: seed by seed, and what is said where there are no pairs."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from hpc import page, report, report_formats
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


def test_the_number_of_pairs_is_shown_where_it_is_another() -> None:
    assert report.Cell([0.1, 0.3], ["0", "1"]).beside(report.Cell([1.0, 2.0, 3.0])) == "+0.200 ± 0.141 (2)"
    assert report.Cell([0.1, 0.3], ["0", "1"]).beside(report.Cell([1.0, 2.0])) == "+0.200 ± 0.141"
    assert report.Cell([0.1]).beside(report.Cell([1.0, 2.0])) == "+0.100"


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
    assert cell.text().endswith(mark)
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
