"""Printing a run's logs: one file per node, lines of several ranks carry `[rank]`."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from hpc.errors import UserError


def show(run_dir: Path, rank: int | None, follow: bool, is_over: Callable[[], bool]) -> None:
    """Print all nodes' logs, then what comes while `follow` and not `is_over()`. Raises UserError when there is none."""
    offsets: dict[Path, int] = {}
    last_check = time.monotonic()
    while True:
        files = sorted(run_dir.glob("node_*.log"), key=lambda path: int(path.stem.partition("_")[2]))
        if not files and not follow:
            raise UserError(f"{run_dir.name} has no logs yet: it has not started")
        for path in files:
            with open(path, "rb") as file:
                file.seek(offsets.get(path, 0))
                content = file.read()
            whole = content[: content.rfind(b"\n") + 1] if follow else content
            offsets[path] = offsets.get(path, 0) + len(whole)
            for line in whole.decode(errors="replace").splitlines():
                if rank is None or line.startswith(f"[{rank}] ") or (rank == 0 and not line.startswith("[")):
                    print(line, flush=follow)
        if not follow:
            return
        if time.monotonic() - last_check > 5:
            last_check = time.monotonic()
            if is_over():
                return
        time.sleep(0.5)
