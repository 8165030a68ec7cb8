"""What the transformations share: parameters drawn from ranges, sources and their middle."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from equissl import draws


class Ranged(ABC):
    """Parameters that are drawn uniformly, each from its own range."""

    names: tuple[str, ...] = ()

    @abstractmethod
    def ranges(self, side: int) -> list[tuple[float, float]]:
        """(low, high) of each of `names`, in its unit, for an output of `side` pixels."""

    def draw(self, seed: int, epoch: int, positions: ArrayLike, side: int) -> Tensor:
        unit = 2 * draws.uniform(seed, epoch, positions, draws.Stream.TRANSFORMATION, len(self.names)) - 1
        low, high = np.array(self.ranges(side)).T
        return torch.from_numpy((low + high) / 2 + unit * ((high - low) / 2)).float()


def centre(images: Tensor, side: int) -> Tensor:
    """`(..., S, S)` -> its exact middle `(..., side, side)`, a view; S is as odd or even as `side`."""
    margin, odd = divmod(images.shape[-1] - side, 2)
    assert not odd
    assert margin >= 0
    return images[..., margin : margin + side, margin : margin + side]


def as_odd_or_even(needed: int, side: int) -> int:
    """`needed`, or one pixel more, so that the middle `side` pixels of such a source are a slice."""
    return needed + (needed - side) % 2


def check_source(source: Tensor, side: int, needed: int, border: str | None) -> None:
    """Raises ValueError for a source `(..., S, S)` of another side than `needed`; with the border inside it may be larger."""
    height, width = source.shape[-2:]
    if border == "inside":
        if height != width or width < needed or (width - side) % 2:
            raise ValueError(
                f"the source is {(height, width)}; for {side} pixels with border 'inside' it must be square, of at least {needed} pixels"
                f" and as odd or even as {side}"
            )
    elif height != needed or width != needed:
        rule = "without a border" if border is None else f"with border {border!r}"
        raise ValueError(f"the source is {(height, width)}; {rule} it must have {needed} pixels a side: crop it first")
