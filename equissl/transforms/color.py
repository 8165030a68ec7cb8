"""Colour jitter in a fixed order: brightness, contrast, saturation, hue; the operations are those of `photometry`."""

from __future__ import annotations

from torch import Tensor

from equissl import config
from equissl.photometry import JITTER
from equissl.transforms.base import Ranged, check_source


class Color(Ranged):
    """Factors 1 + fraction · parameter, and a shift of the hue by fraction · parameter, on values in [0, 1]."""

    names = ("brightness", "contrast", "saturation", "hue")

    def __init__(self, settings: config.Coloured) -> None:
        self.limits = (settings.max_brightness, settings.max_contrast, settings.max_saturation, settings.max_hue)

    def ranges(self, side: int) -> list[tuple[float, float]]:
        return [(-limit, limit) for limit in self.limits]

    def source_side(self, side: int) -> int:
        return side

    def apply(self, source: Tensor, parameters: Tensor, fraction: float, side: int) -> Tensor:
        assert parameters.shape == (len(source), len(self.names))
        check_source(source, side, side, border=None)
        if fraction == 0:
            return source.clone()
        images = source
        for operation, name, value in zip(JITTER, self.names, (parameters.to(source) * fraction).unbind(1), strict=True):
            images = operation(images, value if name == "hue" else 1 + value)
        return images


TRANSFORM = Color
