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


class Transform(Protocol):
    """A transformation with parameters, which can be evaluated at any fraction of its path."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the p parameters: `rotation` in degrees, `translation_x`, `translation_y` in pixels of the output."""

    def limits(self, side: int) -> tuple[float, ...]:
        """Largest absolute value of each parameter, in its unit, for an output of `side` pixels."""

    def source_side(self, side: int) -> int:
        """Side S2 of the source that an output of `side` pixels needs; for other borders than "inside" it is `side`."""

    def draw(self, seed: int, epoch: int, positions: ArrayLike, side: int) -> Tensor:
        """`(b, p)` float32 on the CPU, a pure function of the arguments, one row per position."""

    def apply(self, source: Tensor, parameters: Tensor, fraction: float, side: int) -> Tensor:
        """`(b, c, S2, S2)`, `(b, p)` -> `(b, c, side, side)`: the image at `fraction` of the way; linear in the parameters.

        0 is the source's centre, bit for bit; 1 the transformed view.
        """


def names() -> list[str]:
    """The transformations in this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "warp")


def get(settings: Transformation) -> Transform:
    """The transformation of the file named `settings.name`. Raises ValueError for a name without a file."""
    name: str = getattr(settings, "name", "")
    if name not in names():
        raise ValueError(f"unknown transformation {name!r}; choose from {', '.join(names())}")
    module = importlib.import_module(f"{__name__}.{name}")  # an ImportError inside the file is shown as it is
    transform: Transform = module.TRANSFORM(settings)
    return transform
