"""Gaussian blur; the operation is that of `photometry`."""

from __future__ import annotations

from torch import Tensor

from equissl import config
from equissl.photometry import blur_radius, gaussian_blur
from equissl.transforms.base import Ranged, centre, check_source


class Blur(Ranged):
    """Sigma is fraction · parameter; the kernel covers ± 3 of the largest sigma that can be drawn, at every fraction."""

    names = ("sigma",)

    def __init__(self, settings: config.All | config.Blur) -> None:
        self.border, self.sigma = settings.border, settings.sigma

    def ranges(self, side: int) -> list[tuple[float, float]]:
        low, high = self.sigma
        return [(low * side / 224, high * side / 224)]

    def radius(self, side: int) -> int:
        return blur_radius(self.ranges(side)[0][1], side)

    def source_side(self, side: int) -> int:
        return side + 2 * self.radius(side) if self.border == "inside" else side

    def apply(self, source: Tensor, parameters: Tensor, fraction: float, side: int) -> Tensor:
        assert parameters.shape == (len(source), len(self.names))
        check_source(source, side, self.source_side(side), self.border)
        if fraction == 0:
            return centre(source, side).clone()
        return gaussian_blur(centre(source, self.source_side(side)), parameters[:, 0].to(source) * fraction, self.radius(side), self.border)


TRANSFORM = Blur
