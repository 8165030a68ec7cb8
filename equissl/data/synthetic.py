"""Noise instead of images, to measure the model's speed without the input's: one batch, drawn on the device once and used in every step.

Only the draws of colours, transformations, masks and drop path go on from step to step, as for images.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from equissl.config import SYNTHETIC, PretrainConfig
from equissl.data.loader import Batch, Loader, crops
from equissl.data.shards import NO_LABEL
from equissl.transforms.base import centre


class Synthetic:
    """A `Source` whose only epoch is the run."""

    def __init__(self, config: PretrainConfig, device: torch.device) -> None:
        assert config.num_steps is not None
        self.config, self.device = config, device
        self.name, self.num_images, self.manifest_sha256, self.num_classes = SYNTHETIC, config.num_steps * config.batch, None, 0

    def keys(self, index: Tensor) -> list[str]:
        return []

    def loader(self, rank: int, world_size: int, start_step: int, num_steps: int) -> Loader:
        return Loader(self._batches(rank, self.config.batch // world_size, range(start_step, num_steps)), 0.0, lambda: None)

    def _batches(self, rank: int, size: int, steps: range) -> Iterator[Batch]:
        generator = torch.Generator(self.device).manual_seed((self.config.seed + rank) % 2**63)

        def noise(side: int) -> Tensor:
            """Channels last in memory, as crops of images are."""
            shape = (size, side, side, 3)
            return torch.randint(256, shape, dtype=torch.uint8, device=self.device, generator=generator).permute(0, 3, 1, 2)

        view1, source2, *local = (noise(crop.side) for crop in crops(self.config))
        view1 = centre(view1, self.config.side)
        none = torch.empty(0, size, 3, self.config.method.views.local_size, self.config.method.views.local_size, dtype=torch.uint8)
        label = torch.full((size,), NO_LABEL)
        plain, boxes = None, None
        if self.config.method.sees_plain:  # every view shows all of the image that there is not
            plain, boxes = noise(self.config.side), torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0]).expand(size, 2, 5).clone()
        first = Batch(0, 0, label, label, label, view1, source2, torch.stack(local) if local else none, plain, boxes)
        for step in steps:
            position = torch.arange(size) + step * self.config.batch + rank * size
            yield replace(first, step=step, index=position, position=position)
