"""From a batch of crops to what methods see: photometry, transformation, targets on the way to it, normalisation; on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from equissl import transforms
from equissl.augmentation import Augmentation
from equissl.config import PretrainConfig
from equissl.data.loader import Batch
from equissl.distributed import send
from equissl.photometry import apply, join, normalise, parameters_of


class Views(NamedTuple):
    """Normalised images of b samples on the device."""

    global1: Tensor  # (b, 3, S, S)
    global2: Tensor  # (b, 3, S, S), transformed
    local: Tensor  # (L, b, 3, s, s); L may be 0
    targets: Tensor | None  # (K, b, 3, S, S): the second view on its way, u_k; None without auxiliary
    parameters: Tensor | None  # (b, p): of g, in the units of the transformation's `names`; None without one
    plain: Tensor | None = None  # (b, 3, S, S): the image's middle, not augmented; None where the method does not see it
    augmentations: Tensor | None = None  # (2, b, p): what was done to each global view, see `augmentation`; None as `plain`

    def split(self, num_parts: int) -> list[Views]:
        """The samples in order, in equal parts."""
        b = len(self.global1) // num_parts
        parts = [slice(b * part, b * (part + 1)) for part in range(num_parts)]
        return [
            Views(
                self.global1[p],
                self.global2[p],
                self.local[:, p],
                None if self.targets is None else self.targets[:, p],
                None if self.parameters is None else self.parameters[p],
                None if self.plain is None else self.plain[p],
                None if self.augmentations is None else self.augmentations[:, p],
            )
            for p in parts
        ]


def fractions(config: PretrainConfig) -> list[float]:
    """Where on the path from the untransformed second view (0) to the transformed one (1) the targets lie."""
    return config.auxiliary.fractions if config.auxiliary else []


class MakeViews:
    def __init__(self, config: PretrainConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.transform = transforms.get(config.transformation) if config.transformation else None
        self.augmentation = Augmentation(config) if config.method.sees_plain else None

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Views:
        """g moves the second view only; every target is warped directly from the augmented source (METHODS: one resampling)."""
        global1, source, local = self.coloured(batch)
        motion = None if self.transform is None else self.parameters(batch)
        parameters = None if motion is None else send(motion, self.device)

        def at(fraction: float) -> Tensor:
            if self.transform is None or parameters is None:
                return source
            return self.transform.apply(source, parameters, fraction, self.config.side)

        global2 = at(1.0)
        on_the_way = [global2 if fraction == 1 else at(fraction) for fraction in fractions(self.config)]
        targets = normalise(torch.stack(on_the_way)) if on_the_way else None
        plain, augmentations = None, None
        if self.augmentation is not None:
            assert batch.plain is not None
            assert batch.boxes is not None
            plain = normalise(_in_unit_range(batch.plain.to(self.device, non_blocking=True)))
            augmentations = send(self.augmentation(batch.epoch, batch.position.numpy(), batch.boxes.numpy(), motion), self.device)
        return Views(normalise(global1), normalise(global2), normalise(local), targets, parameters, plain, augmentations)

    @torch.no_grad()
    def coloured(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """First view, source of the second and local crops after photometry: shapes of `Batch`, in [0, 1] on the device."""
        images = replace(batch, plain=None, boxes=None).to(self.device)
        local = self._colour(images.local.flatten(0, 1), batch, range(2, 2 + len(images.local)))
        return self._colour(images.view1, batch, [0]), self._colour(images.source2, batch, [1]), local.view(images.local.shape)

    def parameters(self, batch: Batch) -> Tensor:
        """Of g: `(b, p)` on the CPU."""
        assert self.transform is not None
        return self.transform.draw(self.config.seed, batch.epoch, batch.position.numpy(), self.config.side)

    def _colour(self, images: Tensor, batch: Batch, crops: Sequence[int]) -> Tensor:
        """Of each of `crops` all samples of the batch, `(len(crops) · b, 3, H, W)`."""
        if images.is_floating_point() or not crops:  # the reference pipeline's are coloured already
            return images.float()
        position = batch.position.numpy()
        return apply(_in_unit_range(images), join([parameters_of(self.config, batch.epoch, position, crop) for crop in crops]))


def _in_unit_range(images: Tensor) -> Tensor:
    """uint8, or floats in [0, 1] -> the latter."""
    return images if images.is_floating_point() else images.float() / 255
