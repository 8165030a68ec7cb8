"""From a batch of crops to what methods see: photometry, transformation, targets on the way to it, normalisation; on the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from equissl import transforms
from equissl.config import PretrainConfig
from equissl.data.loader import Batch
from equissl.distributed import World, send
from equissl.photometry import augment, normalise


class Views(NamedTuple):
    """Normalised images of b samples on the device."""

    global1: Tensor  # (b, 3, S, S)
    global2: Tensor  # (b, 3, S, S), transformed
    local: Tensor  # (L, b, 3, s, s); L may be 0
    targets: Tensor | None  # (K, b, 3, S, S): the second view on its way, u_k; None without auxiliary


def fractions(config: PretrainConfig) -> list[float]:
    """Where on the path from the untransformed second view (0) to the transformed one (1) the targets lie."""
    if config.auxiliary is None:
        return []
    num = config.auxiliary.num_images
    return [k / (num + 1) for k in range(1, num + 1)] + [1.0] * config.auxiliary.include_final


class MakeViews:
    def __init__(self, config: PretrainConfig, world: World) -> None:
        self.config, self.device = config, world.device
        self.transform = transforms.get(config.transformation) if config.transformation else None

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Views:
        """g moves the second view only; every target is warped directly from the augmented source (METHODS: one resampling)."""
        config, recipe = self.config, self.config.method.views
        positions, epoch = batch.position.numpy(), batch.epoch
        images = batch.to(self.device)

        def coloured(crops: Tensor, crop: int) -> Tensor:
            settings = (recipe.global1, recipe.global2)[crop] if crop < 2 else recipe.local
            side = config.side if crop < 2 else recipe.local_size
            return augment(crops.float() / 255, settings, config.seed, epoch, positions, crop, side)

        global1, source = coloured(images.view1, 0), coloured(images.source2, 1)
        local = [coloured(crops, 2 + number) for number, crops in enumerate(images.local)]
        global2, targets = source, None
        if self.transform is not None:
            parameters = send(self.transform.draw(config.seed, epoch, positions, config.side), self.device)
            global2 = self.transform.apply(source, parameters, 1.0, config.side)
            on_the_way = [self.transform.apply(source, parameters, fraction, config.side) for fraction in fractions(config)]
            targets = normalise(torch.stack(on_the_way)) if on_the_way else None
        return Views(normalise(global1), normalise(global2), normalise(torch.stack(local)) if local else images.local.float(), targets)
