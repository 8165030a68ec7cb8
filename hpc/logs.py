"""Printing a run's logs: one file per node, lines of several ranks carry `[rank]`."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

from hpc.errors import UserError

PAUSE_SECONDS = 0.5  # between two looks at the files
CHECK_SECONDS = 5.0  # between two questions whether the run goes on
OF_RANK = re.compile(r"\[(\d+)\] ")


def show(run_dir: Path, rank: int | None, follow: bool, is_over: Callable[[], bool]) -> None:
    """Print all nodes' logs, then what comes while `follow` and not `is_over()`: of further attempts and on other nodes too.

    Raises UserError when there is none.
    """
    offsets: dict[Path, int] = {}
    checked = time.monotonic()
    over = not follow
    while True:
        files = sorted(run_dir.glob("node_*.log"), key=lambda path: int(path.stem.partition("_")[2]))
        if not files and not follow:
            raise UserError(f"{run_dir.name} has no logs yet: it has not started")
        for path in files:
            _print_new(path, offsets, rank, to_the_end=over)
        if over:
            return
        if time.monotonic() - checked >= CHECK_SECONDS:
            checked = time.monotonic()
            over = is_over()  # what was written before is printed all the same
        if not over:
            time.sleep(PAUSE_SECONDS)


def _print_new(path: Path, offsets: dict[Path, int], rank: int | None, to_the_end: bool) -> None:
    """Whole lines; the rest of one that is being written only `to_the_end`."""
    with open(path, "rb") as file:
        start = offsets.get(path, 0)
        if path.stat().st_size < start:  # another folder has taken the run's place
            start = 0
        file.seek(start)
        content = file.read()
    whole = content if to_the_end else content[: content.rfind(b"\n") + 1]
    offsets[path] = start + len(whole)
    for line in whole.decode(errors="replace").split("\n")[: None if whole and not whole.endswith(b"\n") else -1]:
        # lines without a rank are of the only one, or of the supervisor
        if rank is None or rank == int(match[1] if (match := OF_RANK.match(line)) else 0):
            print(line, flush=True)
