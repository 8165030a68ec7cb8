"""How far a run is, for whoever watches it: `progress.json` in the run folder, which is often on a shared file system."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from equissl.files import write_json

QUICK_SECONDS, QUICK_PERIOD_SECONDS = 60.0, 1.0  # people watch the beginning
PERIOD_SECONDS = 30.0


class Stopped(Exception):
    """`stop()` said so; nothing half-written is left behind."""


class ProgressFile:
    """Replaced at most once per second in the first minute of a stage, then every 30 s. Its first and last step are always written."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / "progress.json"
        self.begin()

    def begin(self) -> None:
        """A stage begins."""
        self._began = self._next = time.monotonic()

    def is_due(self, is_last: bool) -> bool:
        return is_last or time.monotonic() >= self._next

    def write(self, values: Mapping[str, Any]) -> None:
        start = time.monotonic()
        write_json(self._path, {**values, "time": time.time()})
        now = time.monotonic()
        period = QUICK_PERIOD_SECONDS if now - self._began < QUICK_SECONDS else PERIOD_SECONDS
        self._next = now + max(period, 50 * (now - start))  # a slow file system must not slow the run down


class Progress:
    """Writes `{"step", "num_steps", "stage", "images_per_s", "time"}`; the rate is null where none is known.

    Without a folder (ranks other than 0) it writes nothing.
    """

    def __init__(self, run_dir: Path | None) -> None:
        self._file = None if run_dir is None else ProgressFile(run_dir)
        self._stage = ""
        self._began = (0.0, 0)  # time and images at the beginning of the stage

    def show(self, stage: str, step: int, num_steps: int, images: int = 0) -> None:
        """`images`: read so far in this stage."""
        if self._file is None:
            return
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._began = stage, (now, images)
            self._file.begin()
        if self._file.is_due(is_last=step >= num_steps):
            since, before = self._began
            rate = round((images - before) / (now - since), 1) if images > before and now > since else None
            self._file.write({"step": step, "num_steps": num_steps, "stage": stage, "images_per_s": rate})
