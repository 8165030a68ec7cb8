"""One affine warp about the image's centre, shared by the transformations that are rigid motions."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

from equissl import draws
from equissl.config import Transformation

PADDING = {"inside": "border", "zero": "zeros", "reflect": "reflection"}  # of grid_sample; inside: nothing is padded
MARGIN = 1e-3  # pixels; float32 rounding of the sampling positions must not cross the source's edge


class Rigid:
    """Rotation about the centre (degrees, counter-clockwise), then translation (pixels; x to the right, y down).

    Signs as in torchvision's `rotate` and `affine`. Bilinear; every image is sampled once, directly from the source.
    The border "zero" is black only for images that are not normalised yet: warp first, normalise after.
    """

    names: tuple[str, ...] = ()

    def __init__(self, settings: Transformation) -> None:
        self.border = settings.border
        self.max_degrees: float = getattr(settings, "max_degrees", 0.0)
        self.max_pixels: float = getattr(settings, "max_pixels", 0.0)  # of a 224-pixel image

    def limits(self, side: int) -> tuple[float, ...]:
        shift = self.max_pixels * side / 224
        return tuple(self.max_degrees if name == "rotation" else shift for name in self.names)

    def source_side(self, side: int) -> int:
        if self.border != "inside":
            return side
        # an output pixel at (x, y) from the centre, moved back by the translation and turned, reaches
        # (|cos a| + |sin a|)·max(|x|, |y|) in either direction; the factor grows up to 45 degrees
        angle = math.radians(min(self.max_degrees, 45.0))
        reach = ((side - 1) / 2 + self.max_pixels * side / 224) * (math.cos(angle) + math.sin(angle))
        needed = math.ceil(2 * (reach + MARGIN)) + 1
        return needed + (needed - side) % 2  # same parity: the centre of the source is then a slice

    def draw(self, seed: int, epoch: int, positions: ArrayLike, side: int) -> Tensor:
        unit = 2 * draws.uniform(seed, epoch, positions, draws.Stream.TRANSFORMATION, len(self.names)) - 1
        return torch.from_numpy(unit * self.limits(side)).float()

    def apply(self, source: Tensor, parameters: Tensor, fraction: float, side: int) -> Tensor:
        assert parameters.shape == (len(source), len(self.names))
        margin, odd = divmod(source.shape[-1] - side, 2)
        if odd or source.shape[-2] != source.shape[-1] or source.shape[-1] < self.source_side(side):
            raise ValueError(
                f"the source is {tuple(source.shape[-2:])}; for {side} pixels with border {self.border!r} it must be square, of"
                f" at least {self.source_side(side)} pixels and as odd or even as {side}"
            )
        if margin and self.border != "inside":
            raise ValueError(f"the source has {source.shape[-1]} pixels; with border {self.border!r} it must have {side}: crop it first")
        if fraction == 0:
            return source[..., margin : margin + side, margin : margin + side].clone()
        return rigid_warp(source, *self._motion(parameters * fraction), side=side, padding=PADDING[self.border])

    def _motion(self, parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        zero = torch.zeros_like(parameters[:, 0])
        given = dict(zip(self.names, parameters.unbind(1), strict=True))
        return tuple(given.get(name, zero) for name in ("rotation", "translation_x", "translation_y"))  # type: ignore[return-value]


def rigid_warp(source: Tensor, degrees: Tensor, shift_x: Tensor, shift_y: Tensor, side: int, padding: str) -> Tensor:
    """`(b, c, S, S)`, three times `(b,)` -> `(b, c, side, side)`: turned about the centre, then shifted, bilinear."""
    grid = sampling_grid(degrees.to(source), shift_x.to(source), shift_y.to(source), side) * (2 / source.shape[-1])
    return F.grid_sample(source, grid, mode="bilinear", padding_mode=padding, align_corners=False)


def sampling_grid(degrees: Tensor, shift_x: Tensor, shift_y: Tensor, side: int) -> Tensor:
    """Where each output pixel reads: `(b, side, side, 2)`, (x, y) in pixels from the source's centre."""
    axis = torch.arange(side, dtype=degrees.dtype, device=degrees.device) - (side - 1) / 2
    x = axis[None, None, :] - shift_x[:, None, None]
    y = axis[None, :, None] - shift_y[:, None, None]
    cos, sin = torch.cos(torch.deg2rad(degrees))[:, None, None], torch.sin(torch.deg2rad(degrees))[:, None, None]
    # products, not a matrix product: autocast would round that to bfloat16, a quarter of a pixel at 224
    return torch.stack([cos * x - sin * y, sin * x + cos * y], dim=-1)
