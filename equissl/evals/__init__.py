"""Evaluations: one file each, found by name. A file defines

PROTOCOL   version of what is computed; raised when the same features would give other figures
MAIN       its main metric
HIGHER_IS_BETTER
direction(metric) -> bool | None    only where not all its metrics have that one; None: neither is better
run(context) -> {metric: value} on rank 0, {} on the others; metric names without the task's
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from equissl.data.labelled import Sets, few

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from equissl.config import EvaluateConfig, PretrainConfig
    from equissl.data.shards import Images
    from equissl.distributed import World
    from equissl.encoder import Encoder
    from equissl.features import Tick

log = logging.getLogger(__name__)

MAX_UNDECODABLE = 0.01  # of the images that are asked for: with more of them missing a figure is another one


@dataclass(frozen=True)
class Context:
    """What an evaluation works on."""

    settings: EvaluateConfig
    pretraining: PretrainConfig
    encoder: Encoder  # the teacher's, frozen
    data: Sets
    world: World
    device: torch.device
    tick: Tick  # call between two batches: progress, heartbeat, and Stopped on all ranks
    weights_sha256: str = ""  # of the encoder; features without one are not cached
    run_dir: Path | None = None  # for a state that a stopped evaluation goes on from; removed at the end
    rejoin: Callable[[], None] = lambda: None  # returns on all ranks when rank 0, which alone ticked meanwhile, is here
    chosen: dict[str, Any] = field(default_factory=dict)  # what was chosen and from what, besides the figures; for the result
    precision: torch.dtype = torch.float32  # of forward passes
    undecodable: dict[str, dict[str, None]] = field(default_factory=dict)  # split -> keys of images that were left out, in order

    def note_undecodable(self, data: Images, indices: NDArray[np.int64], num_images: int) -> None:
        """Those of `num_images` that were asked for. Raises ValueError where they are more than `MAX_UNDECODABLE`."""
        if not len(indices):
            return
        noted = self.undecodable.setdefault(data.split, {})
        if new := [key for key in map(data.key, indices.tolist()) if key not in noted]:
            log.warning("%d images of %s of %s cannot be decoded and are left out: %s", len(new), data.split, data.folder, few(new))
        noted.update(dict.fromkeys(new))
        if len(indices) > MAX_UNDECODABLE * num_images:
            raise ValueError(
                f"{len(indices)} of {num_images} images of {data.split} of {data.folder} cannot be decoded, more than"
                f" {100 * MAX_UNDECODABLE:g} %: {few(list(noted))}; get them anew"
            )

    def of_rank_0(self, value: int) -> int:
        """Rank 0's value on all ranks, which call it together."""
        if self.world.world_size == 1:
            return value
        import torch
        import torch.distributed as dist

        shared = torch.tensor([value])
        dist.broadcast(shared, src=0, group=self.world.cpu_group)
        return int(shared)


class Evaluation(Protocol):
    PROTOCOL: int
    MAIN: str
    HIGHER_IS_BETTER: bool

    def run(self, context: Context) -> dict[str, float]: ...


def names() -> list[str]:
    """The evaluations in this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def get(name: str) -> Any:
    """The module of this name, an `Evaluation`. Raises ValueError for a name without a file."""
    if name not in names():
        raise ValueError(f"unknown evaluation {name!r}; choose from {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}")  # an ImportError inside the file is shown as it is
