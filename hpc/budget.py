"""Ceilings of a run and of a job (helper A replaces this file; the founder's submit.py calls these two with these arguments)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hpc.runs import Attempt, RunFolder


def reached(attempts: Sequence[Attempt], saved_step: int, budgets: Mapping[str, Any]) -> str | None:
    """TODO helper A. `code_errors: None` in `budgets` means: no ceiling."""
    return None


def used_hours(job_dir: Path, records: Iterable[Any]) -> float:
    """GPU hours (process hours) of all attempts of these status.Record so far; TODO helper A: running ones too."""
    total = 0.0
    for record in records:
        run = RunFolder(job_dir / record.stage / record.id)
        total += sum(a.end["time"] - a.start["time"] for a in run.read_attempts() if a.end) / 3600
    return total
