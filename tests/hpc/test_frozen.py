"""Result sets: what stands behind each number, what is missing and how it comes, and sets that are frozen in a file."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from hpc import frozen, report
from hpc.errors import UserError
from hpc.frozen import ResultSet
from hpc.status import JobRecord, RunStatus
from tests.hpc import results


@pytest.fixture
def made(tmp_path: Path) -> tuple[JobRecord, list[RunStatus]]:
    job, statuses = results.make(tmp_path)
    (tmp_path / "job" / ".equihpc").mkdir()
    return job, statuses


def give(statuses: list[RunStatus], run_id: str, metrics: dict[str, float]) -> None:
    """Another result of the run."""
    path = next(status.path for status in statuses if status.record.id == run_id)
    (path / "result.json").write_text(json.dumps({"metrics": metrics}))


def test_what_is_missing_is_said_with_the_run_in_the_way_and_the_command(made: tuple[JobRecord, list[RunStatus]]) -> None:
    job, statuses = made
    failed, busy = frozen.collect(job, statuses).fills
    assert (failed.state, failed.runs, failed.cells) == ("failed", {"train-5.0-512-1": results.BAD}, 2), "not the skipped test after it"
    assert failed.command == "equihpc submit jobs/job.yaml --set train.steps=100"
    assert failed.text == f"2 cells wait for train-5.0-512-1 (failed: {results.BAD})"
    assert (busy.text, busy.command) == ("2 cells wait for test-5.0-512-0 (running)", "equihpc status job --watch")


@pytest.mark.parametrize(
    ("state", "cause", "command"),
    [
        ("planned", "", "equihpc submit jobs/job.yaml --set train.steps=100"),
        ("stale", "invalidated: x", "equihpc submit jobs/job.yaml --set train.steps=100"),
        ("cancelled", "", "equihpc submit jobs/job.yaml --set train.steps=100 --retry cancelled"),
        ("purged", "", "equihpc submit jobs/job.yaml --set train.steps=100 --retry purged"),
        ("failed", "budget: 3 attempts", "equihpc submit jobs/job.yaml --set train.steps=100 --retry failed"),
        ("pending", "", "equihpc status job --watch"),
        ("held", "", "equihpc release test-0.1-256-0"),
    ],
)
def test_the_command_fits_the_state(made: tuple[JobRecord, list[RunStatus]], state: str, cause: str, command: str) -> None:
    job, statuses = made
    number = next(number for number, status in enumerate(statuses) if status.record.id == "test-0.1-256-0")
    if state == "held":
        (statuses[number].path / ".hold").touch()
        state = "planned"
    statuses[number] = replace(statuses[number], state=state, cause=cause)
    fill = next(fill for fill in frozen.collect(job, statuses).fills if "test-0.1-256-0" in fill.runs)
    assert (fill.command, fill.state) == (command, state)


def test_a_row_with_some_of_its_numbers_says_which_are_not_there(made: tuple[JobRecord, list[RunStatus]]) -> None:
    job, statuses = made
    statuses = [replace(status, state="failed") if status.record.id == "test-0.1-256-1" else status for status in statuses]
    table = frozen.collect(job, statuses).table
    row = next(row for row in table.rows if row.params == {"train.lambda": 0.1, "train.d": 256})
    assert row.cells["t/x"].text(3) == f"{results.value_of(0.1, 256, 0):.3f} (1 of 2: failed)"
    head, *lines = [line.split(",") for line in table.to_csv().splitlines()]
    assert lines[1][head.index("runs")] == "4"
    assert lines[1][head.index("runs not complete")] == "test-0.1-256-1: failed"
    assert lines[0][head.index("runs not complete")] == ""


def test_a_command_of_old_records_is_put_together() -> None:
    def command(name: str) -> str:
        return JobRecord(name, "jobs/table.yaml", "x", None, "", {}, []).command

    assert command("table") == "equihpc submit jobs/table.yaml"
    assert command("table-small") == "equihpc submit jobs/table.yaml --variant small"
    assert command("renamed") == "equihpc submit jobs/table.yaml"


def test_a_frozen_set_is_read_as_it_was(made: tuple[JobRecord, list[RunStatus]], tmp_path: Path) -> None:
    job, statuses = made
    before = frozen.collect(job, statuses)
    frozen.freeze(before, tmp_path / "paper.json", tmp_path / "job")
    give(statuses, "test-0.1-256-0", {"t/x": 9.0, "t/y": 9.0})
    found = frozen.load(tmp_path / "paper.json")
    assert found.frozen.startswith("20")
    assert found.table.to_json() == before.table.to_json()
    assert found.table.to_csv() == before.table.to_csv()
    assert [asdict(status.record) for status in found.table.statuses] == [asdict(status.record) for status in statuses]
    assert found.fills == before.fills
    origin = found.runs["test-0.1-256-0"]
    assert origin["metrics"]["t/x"] == results.value_of(0.1, 256, 0)
    assert origin["code"] == {"hash": "c0de", "commit": results.COMMIT, "dirty": True}
    assert (origin["command"], origin["config"]) == ("equihpc submit jobs/job.yaml", {"value": results.value_of(0.1, 256, 0)})


def changed(made: tuple[JobRecord, list[RunStatus]], folder: Path) -> list[str]:
    (before,) = frozen.known(folder).values()
    return frozen.changes(before, report.build(*made), "paper.json")


def test_a_number_that_is_another_one_since_is_said_and_a_new_one_is_not(made: tuple[JobRecord, list[RunStatus]], tmp_path: Path) -> None:
    job, statuses = made
    frozen.freeze(frozen.collect(job, statuses), tmp_path / "paper.json", tmp_path / "job")
    assert changed(made, tmp_path / "job") == []
    was = results.value_of(0.1, 256, 0)
    give(statuses, "test-0.1-256-0", {"t/x": was + 1e-12, "t/y": 1 - was})
    (text,) = changed(made, tmp_path / "job")
    assert text.startswith("changed since paper.json was frozen (20")
    assert text.endswith(f": t/x of lambda 0.1, d 256, seed 0: {was!r} then, {was + 1e-12!r} now")
    give(statuses, "test-0.1-256-0", {"t/y": 1 - was})
    assert changed(made, tmp_path / "job")[0].endswith(f"seed 0: {was!r} then, no number now")
    give(statuses, "test-0.1-256-0", {"t/x": was, "t/y": 1 - was})
    give(statuses, "test-5.0-512-0", {"t/x": 0.7, "t/y": 0.3})
    came = [replace(status, state="complete") if status.record.id == "test-5.0-512-0" else status for status in statuses]
    assert changed((job, came), tmp_path / "job") == []
    for status in statuses:
        give(statuses, status.record.id, {"t/x": 0.0, "t/y": 0.0})
    many = changed(made, tmp_path / "job")
    assert len(many) == frozen.MOST_CHANGES + 1
    assert many[-1].endswith("and 4 numbers more"), "of 12 runs with two numbers each"


def test_a_parameter_that_is_new_to_the_table_changes_no_number(made: tuple[JobRecord, list[RunStatus]], tmp_path: Path) -> None:
    frozen.freeze(frozen.collect(*made), tmp_path / "paper.json", tmp_path / "job")
    (before,) = frozen.known(tmp_path / "job").values()
    now = report.build(*made)
    rows = [replace(row, params={**row.params, "test.part": part}) for row in now.rows for part in ("inv", "equi")]
    assert frozen.changes(before, replace(now, parameters=[*now.parameters, "test.part"], rows=rows), "paper.json") == []


def test_the_same_seed_twice_is_compared_number_by_number(made: tuple[JobRecord, list[RunStatus]], tmp_path: Path) -> None:
    job, statuses = made
    cell = (before := frozen.collect(job, statuses)).table.rows[0].cells["t/x"]
    cell.seeds = [cell.seeds[0]] * 2
    now = frozen.collect(job, statuses).table
    now.rows[0].cells["t/x"].seeds = list(cell.seeds)
    now.rows[0].cells["t/x"].values.reverse()
    assert frozen.changes(before, now, "x") == []
    now.rows[0].cells["t/x"].values[0] = 7.0
    assert len(frozen.changes(before, now, "x")) == 1


def test_what_is_frozen_stays_and_is_checked(made: tuple[JobRecord, list[RunStatus]], tmp_path: Path) -> None:
    found: ResultSet = frozen.collect(*made)
    path = tmp_path / "paper.json"
    assert frozen.freeze(found, path, tmp_path / "job") == ""
    with pytest.raises(UserError, match=r"paper\.json exists: what is frozen stays as it is; give another name"):
        frozen.freeze(found, path, tmp_path / "job")
    with pytest.raises(UserError, match=r"paper does not end in \.json, by which equihpc report tells a frozen set"):
        frozen.freeze(found, tmp_path / "paper", tmp_path / "job")
    (tmp_path / "theirs").touch()  # a folder that nothing can be written to, also for root
    assert "will not say what changes in it" in frozen.freeze(found, tmp_path / "other.json", tmp_path / "theirs")
    assert frozen.load(tmp_path / "other.json").table.to_json() == found.table.to_json()
    with pytest.raises(UserError, match="nowhere does not exist"):
        frozen.freeze(found, tmp_path / "nowhere" / "x.json", tmp_path / "job")

    data: dict[str, Any] = json.loads(path.read_text())
    path.write_text(json.dumps(data))
    assert frozen.load(path).table.to_json() == found.table.to_json(), "another layout is no change"
    for edit, message in (
        ({"runs": {**data["runs"], "more": {}}}, "was changed since it was frozen"),
        ({"version": 2}, "is a frozen report of version 2; this code reads version 1"),
        ({"format": "x"}, "is not a frozen report; equihpc report NAME --freeze FILE makes one"),
    ):
        path.write_text(json.dumps({**data, **edit}))
        with pytest.raises(UserError, match=message):
            frozen.load(path)
        assert frozen.known(tmp_path / "job") == {}, "a set that was changed by hand is none of the job's, and no error of its report"
    with pytest.raises(UserError, match=r"there is no file .*none\.json"):
        frozen.load(tmp_path / "none.json")
    path.unlink()
    assert frozen.known(tmp_path / "job") == {}
