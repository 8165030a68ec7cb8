"""progress.json often lies on a shared file system: few writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from equissl import progress
from equissl.progress import Progress


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_once_per_second_in_the_first_minute_of_a_stage_then_every_30_seconds(clock: Clock, tmp_path: Path) -> None:
    shown, written = Progress(tmp_path), []
    for stage in ("train", "val"):
        began = clock.now
        for step in range(6001):  # ten minutes
            clock.now = began + step / 10
            (tmp_path / "progress.json").unlink(missing_ok=True)
            shown.show(stage, step, 6000, images=8 * step)
            if (tmp_path / "progress.json").exists():
                written.append(json.loads((tmp_path / "progress.json").read_text()))
    assert len(written) == 2 * (60 + 19)
    for stage in ("train", "val"):
        mine = [each for each in written if each["stage"] == stage]
        assert [each["step"] for each in mine] == [*range(0, 600, 10), *range(600, 6001, 300)]
        assert mine[-1] | {"time": 0} == {"step": 6000, "num_steps": 6000, "stage": stage, "images_per_s": 80.0, "time": 0}


def test_a_slow_file_system_is_left_alone_longer(clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(path: Path, value: Any) -> None:
        written.append(value["step"])
        clock.now += 2.0

    monkeypatch.setattr(progress, "write_json", slow)
    written: list[int] = []
    shown = Progress(tmp_path)
    for step in range(300):
        clock.now += 1.0
        shown.show("train", step, 1000)
    assert written == [0, 100, 200]
