"""Where a training's images come from: a data set of ours, perhaps staged to the node, or a stream that cannot be indexed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Protocol

from torch import Tensor

from equissl import distributed
from equissl.config import SYNTHETIC, PretrainConfig, is_stream
from equissl.data import verify
from equissl.data.loader import Loader, make_loader
from equissl.data.shards import ShardSet, find
from equissl.data.stage import staged
from equissl.data.synthetic import Synthetic
from equissl.distributed import World
from equissl.progress import Stopped

log = logging.getLogger(__name__)


class Source(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def num_images(self) -> int:
        """In an epoch."""

    @property
    def manifest_sha256(self) -> str | None:
        """Of a data set of ours."""

    @property
    def num_classes(self) -> int:
        """0 where that is unknown."""

    def keys(self, index: Tensor) -> list[str]:
        """Of the images of a batch; none where they have no names."""

    def loader(self, rank: int, world_size: int, start_step: int, num_steps: int) -> Loader:
        """This rank's batches of the steps `start_step` to `num_steps - 1`."""


class Indexed:
    """The training split of a data set of ours."""

    def __init__(self, data: ShardSet, config: PretrainConfig) -> None:
        self.data, self.config = data, config
        self.name, self.num_images, self.manifest_sha256 = data.name, data.num_images, data.manifest_sha256
        self.num_classes = len(data.classes)

    def keys(self, index: Tensor) -> list[str]:
        return [self.data.key(image) for image in index.tolist()]

    def loader(self, rank: int, world_size: int, start_step: int, num_steps: int) -> Loader:
        return make_loader(self.data, self.config, rank, world_size, start_step, num_steps)


def open_source(config: PretrainConfig, world: World, stop: Callable[[], bool], cleanup: ExitStack) -> Source:
    """Rank 0 checks the data set; where the config says so it is staged to each node, until `cleanup` closes.

    Raises ValueError for what is missing, damaged or changed; on all ranks Stopped where any was asked to stop while it staged.
    """
    if config.data == SYNTHETIC:
        return Synthetic(config, world.device)
    if is_stream(config.data):
        from equissl.data.stream import Stream  # webdataset: seconds

        return Stream(config)
    folder = origin = find(config.data)
    if world.rank == 0:
        verify.check(folder, ("train",))
    if config.stage is not None:
        budget, asked = int(config.stage.budget_gb * 1e9), False
        try:
            folder = cleanup.enter_context(staged(folder, ("train",), Path(config.stage.to), budget, waiting=partial(_beat, stop)))
        except Stopped:
            asked = True
        if distributed.any_of(asked, world, stop):  # the nodes are not ready at the same time
            raise Stopped
    data = ShardSet(folder, "train")
    data.origin = origin
    if world.rank == 0:
        steps = config.steps_per_epoch(data.num_images)
        left_out = data.num_images - steps * config.batch
        log.info("an epoch is %d steps; %d of %d images are left out of each, others every time", steps, left_out, data.num_images)
        if config.batch * 2 < data.num_images and (together := neighbours_alike(data)) > 0.5:
            log.warning(
                "%.0f %% of neighbours in the shards have the same class: batches of whole stretches of them are less mixed than they"
                " look; equihpc data build --kind shards writes them shuffled",
                100 * together,
            )
    return Indexed(data, config)


def _beat(stop: Callable[[], bool]) -> None:
    if stop():
        raise Stopped


def neighbours_alike(data: ShardSet) -> float:
    """Fraction of neighbours in the shards that have the same class; 0 where that says nothing."""
    labels = data.labels
    if len(labels) < 2 or labels.min() == labels.max():
        return 0.0
    return float((labels[1:] == labels[:-1]).mean())
