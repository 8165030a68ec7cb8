"""What keeps a long run from going wrong unnoticed: spikes, no progress, collapse, ranks that wait in vain, garbage collection."""

from __future__ import annotations

import gc
import math
import os
import statistics
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import torch.distributed as dist

from equissl.distributed import World

WINDOW, FEWEST = 100, 10  # logged steps whose median loss is the usual one; with fewer none is
COLLAPSE = {
    # name in the metrics -> (sign, threshold, what it means), see `monitor`
    "feature_std": (-1, 0.02, "all images have nearly the same features"),
    "mean_target_entropy": (-1, 0.01, "nearly all images have the same target"),
    "target_entropy": (1, 0.999, "the targets are nearly uniform"),
}
ALIKE = {"effective_rank": 1.5, "feature_std": 0.1}  # lower medians are suspicious where the loss stands still, see `monitor`
COLLECT_EVERY = 1000  # steps
ON_ERROR = "TORCH_NCCL_ASYNC_ERROR_HANDLING"


class Watch:
    """Warns of loss spikes, of no progress and of collapse, once per episode. Its state is a function of the records, so a resumed run
    replays them.

    No progress: the loss of a part of the run is not lower than that of the part before, by more than noise, and the features are
    nearly alike. The loss alone says nothing: of self-supervised runs that learn it stands still for long, and rises. Parts that begin
    in the warm-up are not judged.
    """

    def __init__(self, spike_factor: float | None, part_steps: float | None = None, warmup_steps: float = 0.0) -> None:
        """`part_steps`: how long a part of the run is; None: progress is not watched."""
        self.spike_factor, self.part_steps, self.warmup_steps = spike_factor, part_steps, warmup_steps
        self.loss_spikes = 0  # episodes so far
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._under_way: set[str] = set()
        self._part = 0  # the one under way
        self._of_part: dict[str, list[float]] = {}
        self._before: list[float] = []  # the losses of the one before

    def see(self, step: int, values: Mapping[str, float]) -> list[str]:
        """The numbers of a logged step -> what there is to warn of."""
        found = []
        loss, usual = values["loss"], statistics.median(self._losses) if len(self._losses) >= FEWEST else None
        if usual is not None and self.spike_factor is not None:
            limit = usual + (self.spike_factor - 1) * abs(usual)  # spike_factor times a positive one
            if self._begins("loss", loss > limit):
                self.loss_spikes += 1
                found.append(f"step {step}: the loss is {loss:.5g}, over {self.spike_factor:g} times the usual {usual:.5g}")
        self._losses.append(loss)
        if self.part_steps is not None:
            found += self._progress(step, values, self.part_steps)
        for name, (sign, threshold, meaning) in COLLAPSE.items():
            if name in values and self._begins(name, sign * values[name] > sign * threshold):
                found.append(f"step {step}: {name} is {values[name]:.3g}: {meaning}; the representation collapses")
        return found

    def _progress(self, step: int, values: Mapping[str, float], part_steps: float) -> list[str]:
        found, part = [], int((step - 1) // part_steps)
        if part > self._part:
            losses, before = self._of_part.get("loss", []), self._before
            if min(len(losses), len(before)) >= FEWEST and self._part * part_steps >= self.warmup_steps:
                medians = {name: statistics.median(figures) for name, figures in self._of_part.items()}
                stands = medians["loss"] >= statistics.median(before) - 3 * math.hypot(_error(losses), _error(before))
                alike = [name for name, threshold in ALIKE.items() if medians.get(name, math.inf) < threshold]
                if self._begins("progress", stands and bool(alike)):
                    found.append(
                        f"step {step}: no progress: the loss of the last {part_steps:.0f} steps was {medians['loss']:.5g}, of those before"
                        f" {statistics.median(before):.5g}, and {alike[0]} {medians[alike[0]]:.3g}: the features are nearly alike"
                    )
            self._part, self._before, self._of_part = part, losses, {}
        for name in ("loss", *ALIKE):
            if name in values:
                self._of_part.setdefault(name, []).append(values[name])
        return found

    def _begins(self, what: str, is_so: bool) -> bool:
        begins = is_so and what not in self._under_way
        (self._under_way.add if is_so else self._under_way.discard)(what)
        return begins


def _error(losses: Sequence[float]) -> float:
    """Standard error of the median of noise, by the differences between neighbours: a trend is none."""
    sigma = statistics.median(abs(b - a) for a, b in pairwise(losses)) / 0.954
    return 1.253 * sigma / math.sqrt(len(losses))


# --- waiting -----------------------------------------------------------------------------------------------------------------


def record_collectives(run_dir: Path) -> None:
    """Ask NCCL, before it starts, for a record of the last collectives, and to leave it in `flight_RANK` when one never ends.

    What is set already stays, but for torchrun's own default.
    """
    if dist.is_torchelastic_launched() and os.environ.get(ON_ERROR) == "1":
        del os.environ[ON_ERROR]  # what torchrun sets where the user has set nothing
    for name, value in {
        "TORCH_FR_BUFFER_SIZE": "2000",  # collectives
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        ON_ERROR: "3",  # end the process; 1 aborts the communicators first, which may wait for ever for the ranks that are lost
        "TORCH_FR_DUMP_TEMP_FILE": f"{run_dir}/flight_",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": f"{run_dir}/flight_",  # its name in earlier versions
    }.items():
        os.environ.setdefault(name, value)


def limit_waiting(seconds: float, world: World) -> None:
    """From now on a collective between GPUs that takes longer ends the process. On CPUs there is no limit but gloo's half an hour.

    There the one that waits would raise, which looks like an error of the code; `hang_seconds` of the supervisor finds the one that
    is waited for. Nor is there one in the groups that are gloo's on every machine: in them ranks wait for files, too.
    """
    if world.device.type == "cuda":
        for group in {world.group, *world.mesh.get_all_groups()}:
            group._get_backend(world.device)._set_default_timeout(timedelta(seconds=seconds))


# --- garbage -----------------------------------------------------------------------------------------------------------------


@contextmanager
def garbage_collected_by_hand() -> Iterator[Callable[[int, bool], None]]:
    """Python's collection, which each rank would start at moments of its own for all others to wait, is off inside.

    Yields what is called after each step with the steps done and whether ranks wait anyway (a save): it collects every
    1000 steps and then.
    """
    was_on = gc.isenabled()
    gc.collect()
    gc.freeze()  # what is here now stays: it need not be looked through again
    gc.disable()

    def collect(step: int, waiting: bool) -> None:
        if waiting or step % COLLECT_EVERY == 0:
            gc.collect()

    try:
        yield collect
    finally:
        gc.unfreeze()
        if was_on:
            gc.enable()
