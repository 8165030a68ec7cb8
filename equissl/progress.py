"""How far a run is, for whoever watches it: `progress.json` in the run folder, replaced at most once per second."""

from __future__ import annotations

import time
from pathlib import Path

from equissl.files import write_json

PERIOD_S = 1.0


class Stopped(Exception):
    """`stop()` said so; nothing half-written is left behind."""


class Progress:
    """Writes `{"step", "num_steps", "stage", "images_per_s", "time"}`; the rate is null where none is known.

    Without a folder (ranks other than 0) it writes nothing.
    """

    def __init__(self, run_dir: Path | None) -> None:
        self.path = None if run_dir is None else run_dir / "progress.json"
        self._written = -PERIOD_S
        self._stage = ""
        self._began = (0.0, 0)  # time and images at the beginning of the stage

    def show(self, stage: str, step: int, num_steps: int, images: int = 0) -> None:
        """`images`: read so far in this stage. The first and the last step of a stage are always written."""
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._began = stage, (now, images)
        elif now - self._written < PERIOD_S and step < num_steps:
            return
        self._written = now
        if self.path is not None:
            since, before = self._began
            rate = round((images - before) / (now - since), 1) if images > before and now > since else None
            write_json(self.path, {"step": step, "num_steps": num_steps, "stage": stage, "images_per_s": rate, "time": time.time()})
