"""A profile of a few steps: `profile/steps_M_to_N.pt.trace.json.gz` in the run folder.

Chrome (chrome://tracing), Perfetto and TensorBoard's profile plug-in (`--logdir RUN/profile`) show it. Steps are traced on rank 0.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import profiler

log = logging.getLogger(__name__)

FOLDER = "profile"


@contextmanager
def traced(steps: tuple[int, int] | None, run_dir: Path, start: int) -> Iterator[Callable[[], object]]:
    """Yields what is called after each step; `steps`: first and last to trace, the first of this attempt is 1; None: no trace.

    `start`: updates before this attempt, for the file's name. Ended within the trace, it holds the steps until then.
    """
    if steps is None:
        yield lambda: None
        return
    first, last = steps

    def write(trace: profiler.profile) -> None:
        until = max(first, min(last, trace.step_num))
        path = run_dir / FOLDER / f"steps_{start + first}_to_{start + until}.pt.trace.json.gz"
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_name(f".writing.{path.name}")  # the ending decides on the compression
        trace.export_chrome_trace(str(temporary))
        temporary.replace(path)

    gpus = [profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    schedule = profiler.schedule(wait=first - 2, warmup=1, active=last - first + 1, repeat=1)
    with profiler.profile(activities=[profiler.ProfilerActivity.CPU, *gpus], schedule=schedule, on_trace_ready=write) as trace:
        yield trace.step
        if trace.step_num < first:
            log.warning("no profile: this attempt ended after %d steps, and profile_steps begins with %d", trace.step_num, first)
