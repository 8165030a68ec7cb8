"""Transformations g: one file each, found by name; a file defines `TRANSFORM`, a class taking its settings.

Used alike by pretraining (the second view and the targets on the way to it) and by the R² evaluation.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, Protocol

from numpy.typing import ArrayLike

if TYPE_CHECKING:
    from torch import Tensor

    from equissl.config import Transformation


SHARED = ("base", "warp")  # files of this folder that are no transformations


class Transform(Protocol):
    """A transformation with parameters, which can be evaluated at any fraction of its path.

    All images are floats in [0, 1], not normalised yet: factors of colour mean something there, and 0 is the black of a border.
    The caller normalises what comes out.
    """

    @property
    def names(self) -> tuple[str, ...]:
        """Of the p parameters, each 0 where it changes nothing.

        `rotation` in degrees; `translation_x`, `translation_y` and `sigma` (of a blur) in pixels of the output; `brightness`,
        `contrast`, `saturation`: the factor less 1; `hue` in turns.
        """

    def ranges(self, side: int) -> list[tuple[float, float]]:
        """(low, high) of each parameter for an output of `side` pixels."""

    def source_side(self, side: int) -> int:
        """Side S2 of the source that an output of `side` pixels needs; larger than `side` only for the border "inside"."""

    def draw(self, seed: int, epoch: int, positions: ArrayLike, side: int) -> Tensor:
        """`(b, p)` float32 on the CPU, uniform in `ranges`: a pure function of the arguments, one row per position."""

    def apply(self, source: Tensor, parameters: Tensor, fraction: float, side: int) -> Tensor:
        """`(b, 3, S2, S2)`, `(b, p)` -> `(b, 3, side, side)`: what fraction · parameters does.

        0 is the source's centre, bit for bit; 1 the transformed view. Raises ValueError for a source of another side.
        """


def names() -> list[str]:
    """The transformations in this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in SHARED)


def get(settings: Transformation) -> Transform:
    """The transformation of the file named `settings.name`. Raises ValueError for a name without a file."""
    name: str = getattr(settings, "name", "")
    if name not in names():
        raise ValueError(f"unknown transformation {name!r}; choose from {', '.join(names())}")
    module = importlib.import_module(f"{__name__}.{name}")  # an ImportError inside the file is shown as it is
    transform: Transform = module.TRANSFORM(settings)
    return transform
