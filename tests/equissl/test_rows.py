"""Rows in files: what is read is what was appended, after any interruption; what is of something else is not read."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from equissl import rows
from equissl.files import DiskFull
from equissl.rows import Rows

N = 20
ARRAYS = {"a/1": torch.arange(N * 3.0).view(N, 3), "b": -torch.arange(N * 5.0).view(N, 5)}


def part(first: int, last: int) -> dict[str, Tensor]:
    return {name: values[first:last] for name, values in ARRAYS.items()}


def finish(made: Rows) -> None:
    while made.num_done < N:
        made.append(part(made.num_done, min(made.num_done + 7, N)))
    made.record()
    made.close()
    assert all(torch.equal(made[name], values) for name, values in ARRAYS.items())


def test_rows_come_back(tmp_path: Path) -> None:
    made = Rows(tmp_path / "x", "key", N)
    assert made.num_done == 0
    finish(made)
    again = Rows(tmp_path / "x", "key", N)
    assert again.num_done == N
    assert torch.equal(again["b"][torch.tensor([3, 19, 0])], ARRAYS["b"][torch.tensor([3, 19, 0])])


@pytest.mark.parametrize("ending", ["recorded", "killed", "torn", "lost"])
def test_an_interruption(tmp_path: Path, ending: str) -> None:
    """Rows after the last record do not count, though they may be in the files."""
    made = Rows(tmp_path, "key", N)
    made.append(part(0, 4))
    made.record()
    made.append(part(4, 9))
    if ending == "recorded":
        made.record()
    made.close()
    if ending == "torn":
        with (tmp_path / "b.float32").open("ab") as file:
            file.write(b"xyz")
    if ending == "lost":  # a file system that has lost what it had said was written
        (tmp_path / "b.float32").write_bytes(b"")
    again = Rows(tmp_path, "key", N)
    assert again.num_done == {"recorded": 9, "lost": 0}.get(ending, 4)
    finish(again)


@pytest.mark.parametrize(
    "record", ["", "[]", '{"key": "key"}', '{"key": "key", "rows": 4, "widths": 5}', '{"key": "other", "rows": 4, "widths": {}}']
)
def test_what_is_damaged_or_of_something_else_goes(tmp_path: Path, record: str) -> None:
    made = Rows(tmp_path, "key", N)
    made.append(part(0, 4))
    made.record()
    made.close()
    (tmp_path / rows.RECORD).write_text(record)
    (tmp_path / "old.float32").touch()
    again = Rows(tmp_path, "key", N)
    assert again.num_done == 0
    assert not list(tmp_path.iterdir())
    finish(again)


def test_a_disk_that_is_too_small_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=8 * N * 4 - 1))
    with pytest.raises(DiskFull, match="the features of all pairs needs 640 bytes"):
        Rows(tmp_path, "key", N).append(part(0, 4))


def test_records_are_written_while_rows_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "SECONDS", 0.0)
    made = Rows(tmp_path, "key", N)
    made.append(part(0, 4))
    assert Rows(tmp_path, "key", N).num_done == 4
    made.close()
