"""What a run tells while it runs: `metrics.jsonl`, `progress.json`, `tensorboard/`. Rank 0 writes."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from equissl.files import append_line, told_when_full, write_atomic
from equissl.methods import Timeline
from equissl.optim import Report
from equissl.photometry import denormalise
from equissl.progress import ProgressFile
from equissl.views import Views

PICTURE_ROWS = 8
PICTURE_PIXELS = 96  # smaller views are enlarged to about this side


class Logs:
    """The logs from step `start` on; what an earlier attempt wrote of later steps is removed. Steps count finished updates.

    All methods raise DiskFull.
    """

    def __init__(self, run_dir: Path, start: int, timeline: Timeline, batch: int) -> None:
        self._metrics, self._board_dir, self._progress = run_dir / "metrics.jsonl", run_dir / "tensorboard", ProgressFile(run_dir)
        self.timeline, self.batch = timeline, batch
        self.last: dict[str, Any] = truncate(self._metrics, start)  # the last logged record, {} where there is none
        with self._told():
            self._board = SummaryWriter(str(self._board_dir), purge_step=start + 1)
        self._first: tuple[int, float] | None = None  # the first step of this attempt and when it was through: start-up is no speed
        self._logged: tuple[int, float] | None = None

    def step(self, step: int, values: Mapping[str, float], every: int) -> None:
        """`step` is through; its `values` go to the metrics where it is a multiple of `every`, or the last."""
        now = time.monotonic()
        if self._first is None:
            self._first = self._logged = step, now
        epoch, is_last = round(step / self.timeline.steps_per_epoch, 4), step == self.timeline.num_steps
        if is_last or step % every == 0:
            speed = self._speed(self._logged, step, now)
            self._logged = step, now
            self.last = {"step": step, "epoch": epoch, **values, "images_per_s": speed}
            append_line(self._metrics, self.last)
            with self._told():
                for name, value in self.last.items():
                    if name != "step" and value is not None:
                        self._board.add_scalar(f"pretrain/{name}", value, step)
        if self._progress.is_due(is_last):
            speed = self._speed(self._first, step, now)
            eta = (self.timeline.num_steps - step) * self.batch / speed if speed else None
            progress = {"step": step, "num_steps": self.timeline.num_steps, "epoch": epoch, "loss": values["loss"]}
            self._progress.write({**progress, "images_per_s": speed, "eta_s": eta and round(eta, 1)})

    def pictures(self, step: int, views: Views, reconstructions: Sequence[Tensor]) -> None:
        """One row per sample: the first view, each reconstruction beside its target, the second view."""
        pairs = zip(reconstructions, views.targets, strict=True) if views.targets is not None else ()
        columns = [views.global1, *(image for pair in pairs for image in pair), views.global2]
        images = [denormalise(column[:PICTURE_ROWS].detach().float().cpu()).clamp(0, 1) for column in columns]
        grid = F.pad(torch.stack(images, dim=1), (0, 1, 0, 1), value=1.0)  # (rows, columns, 3, S + 1, S + 1)
        picture = grid.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
        times = max(1, round(PICTURE_PIXELS / grid.shape[-1]))
        with self._told():
            self._board.add_image("views", picture.repeat_interleave(times, 1).repeat_interleave(times, 2), step)

    def images_per_s(self) -> float | None:
        """Over all steps of this attempt but the first; None where there were no more."""
        return None if self._first is None or self._logged is None else self._speed(self._first, *self._logged)

    def close(self) -> None:
        with contextlib.suppress(OSError) if sys.exception() else self._told():  # the error on its way out is the one to be told
            self._board.close()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """The board writes in a thread of its own: its errors arrive at a later call."""
        with told_when_full(self._board_dir, None):
            yield

    def _speed(self, since: tuple[int, float] | None, step: int, now: float) -> float | None:
        if since is None or step == since[0]:
            return None
        return round((step - since[0]) * self.batch / max(1e-9, now - since[1]), 2)


class Late:
    """Reads each step's numbers one step late, when the device has them ready: on every rank, to stop at what was refused."""

    def __init__(self, logs: Logs | None, weights: Mapping[str, float], every: int) -> None:
        """`weights` of terms in the loss, where not 1; `every`: steps between two records."""
        self._logs, self._weights, self._every = logs, weights, every
        self._unread: tuple[int, Report, dict[str, float]] | None = None

    def put(self, step: int, report: Report, scheduled: dict[str, float]) -> None:
        """Keep this step's report and read the one before. Raises FloatingPointError where its update was refused."""
        self.flush()
        self._unread = step, report, scheduled

    def flush(self) -> None:
        """Read what is unread. Raises FloatingPointError where the update was refused."""
        if self._unread is None:
            return
        (step, report, scheduled), self._unread = self._unread, None
        numbers = report.read()
        if numbers.refused:
            raise FloatingPointError(f"step {step}: {numbers.refused}; the update was not applied")
        if self._logs:
            loss = sum(self._weights.get(name, 1.0) * term for name, term in numbers.terms.items())
            self._logs.step(step, {"loss": loss, **numbers.terms, **scheduled, "grad_norm": numbers.grad_norm}, self._every)


def truncate(path: Path, start: int) -> dict[str, Any]:
    """Remove records of steps after `start` and a last line that is not whole; returns the last record left, or {}."""
    if not path.exists():
        return {}
    lines = path.read_text().splitlines(keepends=True)
    records = [(line, json.loads(line)) for line in lines if line.endswith("\n")]
    kept = [(line, record) for line, record in records if record["step"] <= start]
    if len(kept) < len(lines):
        write_atomic(path, "".join(line for line, _ in kept))
    return kept[-1][1] if kept else {}
