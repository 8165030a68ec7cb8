"""Schedules: pure functions of the step, so that a resumed run needs no state to go on with them."""

from __future__ import annotations

import math


def cosine(step: int, num_steps: float, start: float, end: float) -> float:
    """From `start` at step 0 to `end` at `num_steps` along half a cosine; `end` after that."""
    progress = min(1.0, step / num_steps) if num_steps > 0 else 1.0
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def linear(step: int, num_steps: float, start: float, end: float) -> float:
    """From `start` at step 0 to `end` at `num_steps`; `end` after that."""
    progress = min(1.0, step / num_steps) if num_steps > 0 else 1.0
    return start + (end - start) * progress


def warmup_cosine(step: int, num_steps: int, warmup_steps: float, peak: float, end: float) -> float:
    """Up to `peak` in equal parts over `warmup_steps`, the first step included, then along half a cosine to `end`.

    A warm-up longer than the run is cut off by the run's end.
    """
    if step < warmup_steps:
        return peak * min(1.0, (step + 1) / warmup_steps)
    return cosine(step - math.ceil(warmup_steps), num_steps - warmup_steps, peak, end)
