"""Rotation and translation as one warp, then blur, then colour, as in a camera: it moves, is out of focus, and its sensor colours."""

from __future__ import annotations

from torch import Tensor

from equissl import config
from equissl.transforms.base import Ranged
from equissl.transforms.blur import Blur
from equissl.transforms.color import Color
from equissl.transforms.se2 import SE2


class All(Ranged):
    """The parts as they are alone, each at the same fraction of its path.

    Colour comes last: its contrast is about the mean of the pixels that are seen, not of a source's margin. With the border
    inside the warp yields the margin that the blur needs, from a source that is larger by as much.
    """

    def __init__(self, settings: config.All) -> None:
        self.warp, self.blur, self.color = SE2(settings), Blur(settings), Color(settings)
        self.names = (*self.warp.names, *self.blur.names, *self.color.names)

    def ranges(self, side: int) -> list[tuple[float, float]]:
        return [*self.warp.ranges(side), *self.blur.ranges(side), *self.color.ranges(side)]

    def source_side(self, side: int) -> int:
        return self.warp.source_side(self.blur.source_side(side))

    def apply(self, source: Tensor, parameters: Tensor, fraction: float, side: int) -> Tensor:
        motion, sigma, colours = parameters.split([len(part.names) for part in (self.warp, self.blur, self.color)], dim=1)
        moved = self.warp.apply(source, motion, fraction, self.blur.source_side(side))
        return self.color.apply(self.blur.apply(moved, sigma, fraction, side), colours, fraction, side)


TRANSFORM = All
