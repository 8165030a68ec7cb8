"""Colour augmentation of a batch on its device: jitter, grey, blur, solarize, with parameters of each sample's own.

Parameters are a pure function of (seed, epoch, position, crop), drawn on the CPU and sent in one piece: no waiting for the device.
Two ways of applying them give the same images: on a CPU each operation gathers the samples that need it; on a GPU every sample
goes through every operation and is chosen afterwards, with shapes that never change, compiled.

Operations follow `torchvision.transforms.v2.functional`: brightness, contrast and saturation as blends with black, the mean grey
and the grey image; hue through HSV; the four in a random order per sample. On float images they are torchvision's to 1e-5. The
differences from what is common are meant; in 1/255, on 54 crops of 18 photographs (tests hold them, `equissl.data.reference` does
it the common way):

- nothing is rounded. Torchvision rounds uint8 images after each operation, mostly down: per operation 0.5 in the mean and 1.4 at
  most (grey 0.7 and 1, blur 0.2 and 0.5, hue 0.06 and 1), a whole chain 1.3 and 6. On Pillow's images, whose hue has 256 steps:
  a chain 1.1 and 21;
- the blur's kernel covers ± 3 of the largest sigma. The 9 pixels that the dinov2 repository has for sigma up to 2: 0.03 and 5;
- sigma is in pixels of a 224-pixel crop and scaled with the side. In pixels of the image at hand, as torchvision has it, a
  96-pixel crop is blurred 2.3 times as wide: 3.9 and 99.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from equissl import draws
from equissl.config import Photometry, PretrainConfig
from equissl.distributed import send

log = logging.getLogger(__name__)

MEAN = (0.485, 0.456, 0.406)  # of ImageNet, RGB
STD = (0.229, 0.224, 0.225)
GREY = (0.2989, 0.587, 0.114)  # torchvision's luma weights
SOLARIZE_THRESHOLD = 0.5  # uint8 128
SMALLEST_SIGMA = 1e-3  # pixels; of a kernel this narrow all weights but the middle one are 0

_can_compile = True  # until a compilation failed in this process


def normalise(images: Tensor) -> Tensor:
    """`(..., 3, H, W)` in [0, 1] -> zero mean and unit variance over ImageNet."""
    return (images - _channels(MEAN, images.dtype, images.device)) / _channels(STD, images.dtype, images.device)


def denormalise(images: Tensor) -> Tensor:
    """The inverse of `normalise`; not clamped."""
    return images * _channels(STD, images.dtype, images.device) + _channels(MEAN, images.dtype, images.device)


# --- what is drawn --------------------------------------------------------------------------------------------------------


class Parameters(NamedTuple):
    """What happens to each of b samples, on the host."""

    order: NDArray[np.int64]  # (b, 4): which of JITTER each turn applies; NO_OPERATION: none
    factors: NDArray[np.float64]  # (b, 4), one for each of JITTER; a factor whose operation is not in `order` is not used
    grey: NDArray[np.bool_]  # (b,)
    sigma: NDArray[np.float64]  # (b,), of the blur, in pixels of the image at hand; 0: no blur
    solarize: NDArray[np.bool_]  # (b,)
    largest_sigma: float  # that can be drawn, in the same pixels: the kernel covers ± 3 of it; 0 where nothing is ever blurred

    @property
    def jitter(self) -> NDArray[np.bool_]:
        """`(b,)`"""
        return np.asarray((self.order != NO_OPERATION).any(axis=1))


def parameters(settings: Photometry, seed: int, epoch: int, positions: ArrayLike, crop: int, reference_side: int) -> Parameters:
    """Of the samples at `positions` `(b,)` in the epoch: a pure function of the arguments, each row of its own position.

    `reference_side`: pixels of the crop that the image (or its centre, for the larger source of a warp) is; sigma is scaled by
    reference_side / 224.
    """
    unit = draws.uniform(seed, epoch, positions, draws.Stream.PHOTOMETRY + crop, 16)
    strengths = (settings.brightness, settings.contrast, settings.saturation)
    lows = np.array([*(max(0.0, 1 - s) for s in strengths), -settings.hue])
    highs = np.array([*(1 + s for s in strengths), settings.hue])
    order = np.argsort(unit[:, 8:12], axis=1)
    used = np.array([*(s > 0 for s in strengths), settings.hue > 0])
    low, high = (sigma * reference_side / 224 for sigma in settings.sigma)
    return Parameters(
        order=np.where((unit[:, :1] < settings.jitter) & used[order], order, NO_OPERATION),
        factors=lows + (highs - lows) * unit[:, 4:8],
        grey=unit[:, 1] < settings.grey,
        sigma=np.where(unit[:, 2] < settings.blur, low + (high - low) * unit[:, 12], 0.0),
        solarize=unit[:, 3] < settings.solarize,
        largest_sigma=high if settings.blur else 0.0,
    )


def parameters_of(config: PretrainConfig, epoch: int, positions: ArrayLike, crop: int) -> Parameters:
    """Of a pretraining's crop: 0 is the first view, 1 the source of the second, 2 the first local one."""
    views = config.method.views
    settings = (views.global1, views.global2)[crop] if crop < 2 else views.local
    return parameters(settings, config.seed, epoch, positions, crop, config.side if crop < 2 else views.local_size)


def join(parts: Sequence[Parameters]) -> Parameters:
    """One batch after the other; all drawn with the same settings and side."""
    assert len({part.largest_sigma for part in parts}) == 1
    order, factors, grey, sigma, solarize = (np.concatenate(arrays) for arrays in list(zip(*parts, strict=True))[:5])
    return Parameters(order, factors, grey, sigma, solarize, parts[0].largest_sigma)


# --- the two ways of doing it ---------------------------------------------------------------------------------------------


def augment(images: Tensor, settings: Photometry, seed: int, epoch: int, positions: ArrayLike, crop: int, reference_side: int) -> Tensor:
    """`apply` with the `parameters` of these arguments."""
    return apply(images, parameters(settings, seed, epoch, positions, crop, reference_side))


def apply(images: Tensor, drawn: Parameters) -> Tensor:
    """`(b, 3, H, W)` in [0, 1] -> the same shape, augmented; what becomes of a sample does not depend on its batch."""
    assert images.is_floating_point()
    assert len(images) == len(drawn.grey)
    if images.device.type == "cuda":
        result = _compiled(images, drawn)
        if result is not None:
            return result
    return gathered(images, drawn)


def gathered(images: Tensor, drawn: Parameters) -> Tensor:
    """Each operation on the samples that need it: least work, but shapes change from batch to batch."""
    images = images.clone()
    radius = blur_radius(drawn.largest_sigma, min(images.shape[-2:]))
    for turn in range(len(JITTER)):
        for number, operation in enumerate(JITTER):
            images = _on(images, drawn.order[:, turn] == number, operation, drawn.factors[:, number])
    images = _on(images, drawn.grey, lambda some, _: to_grey(some).expand_as(some))
    images = _on(images, drawn.sigma > 0, lambda some, sigma: gaussian_blur(some, sigma, radius), drawn.sigma)
    return _on(images, drawn.solarize, lambda some, _: solarized(some))


def _on(
    images: Tensor, which: NDArray[np.bool_], operation: Callable[[Tensor, Tensor], Tensor], values: NDArray[np.float64] | None = None
) -> Tensor:
    """Replace these samples of `images` by `operation(samples, their values)`, in place. Which ones is known on the host."""
    rows = np.flatnonzero(which)
    if len(rows) == 0:
        return images
    where = send(torch.from_numpy(rows), images.device)
    chosen = np.zeros(len(rows)) if values is None else values[rows]
    some = operation(images.index_select(0, where), send(torch.from_numpy(chosen).to(images.dtype), images.device))
    return images.index_copy_(0, where, some)


def everywhere(images: Tensor, table: Tensor, largest_sigma: float) -> Tensor:
    """Each operation on every sample, then a choice by the `as_table` of the parameters: shapes never change, nothing waits."""
    order, factors, (grey, sigma, solarize) = table[:, :4], table[:, 4:8], table[:, 8:].unbind(1)
    for turn in range(len(JITTER)):
        chosen = images
        for number, operation in enumerate(JITTER):
            chosen = torch.where(_per_sample(order[:, turn] == number), operation(images, factors[:, number]), chosen)
        images = chosen
    images = torch.where(_per_sample(grey > 0), to_grey(images), images)
    if largest_sigma:
        blurred = gaussian_blur(images, sigma, blur_radius(largest_sigma, min(images.shape[-2:])))
        images = torch.where(_per_sample(sigma > 0), blurred, images)
    return torch.where(_per_sample(solarize > 0), solarized(images), images)


def as_table(drawn: Parameters) -> NDArray[np.float64]:
    """`(b, 11)`: what `everywhere` reads, in one piece."""
    return np.column_stack([drawn.order, drawn.factors, drawn.grey, drawn.sigma, drawn.solarize])


def _compiled(images: Tensor, drawn: Parameters) -> Tensor | None:
    """`everywhere`, compiled once for each kind of crop; None where it cannot be compiled."""
    global _can_compile
    if not _can_compile:
        return None
    table = send(torch.from_numpy(as_table(drawn)).to(images.dtype), images.device)
    try:
        return _compile(drawn.largest_sigma)(images, table)
    except Exception as error:  # of the compiler, of what it calls and of its caches: no list of them would be complete
        _can_compile = False
        log.warning("photometry cannot be compiled and runs slower: %s: %s", type(error).__name__, str(error).strip().partition("\n")[0])
        return None


@cache
def _compile(largest_sigma: float) -> Callable[[Tensor, Tensor], Tensor]:
    def function(images: Tensor, table: Tensor) -> Tensor:
        return everywhere(images, table, largest_sigma)

    # the layout: channels last would send the blur to another library's kernels, which may round to TF32
    compiled: Callable[[Tensor, Tensor], Tensor] = torch.compile(
        function, dynamic=False, fullgraph=True, options={"layout_optimization": False}
    )
    return compiled


# --- the operations: images (b, 3, H, W) in [0, 1], one factor per sample (b,) ------------------------------------------------


def to_grey(images: Tensor) -> Tensor:
    """`(b, 3, H, W)` -> `(b, 1, H, W)`."""
    red, green, blue = images.unbind(-3)
    return (red * GREY[0] + green * GREY[1] + blue * GREY[2]).unsqueeze(-3)


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    return (images * _per_sample(factor)).clamp(0, 1)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    # in double: the sum's rounding must not depend on how the batch is split over threads
    mean = to_grey(images).mean(dim=(-3, -2, -1), keepdim=True, dtype=torch.float64).to(images.dtype)
    return _blend(images, mean, factor)


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    return _blend(images, to_grey(images), factor)


def hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by `shift` of a full circle, in [-0.5, 0.5]."""
    red, green, blue = images.unbind(-3)
    low, high = torch.aminmax(images, dim=-3)
    spread = high - low
    scale = 1 / torch.where(spread == 0, 1.0, spread)  # of grey: any hue will do
    is_red, is_green = high == red, high == green
    sextant = torch.where(is_red, green - blue, torch.where(is_green, blue - red, red - green)) * scale
    sextant += torch.where(is_red, 0.0, torch.where(is_green, 2.0, 4.0)) + 6 * shift[:, None, None]
    sextant -= 6 * torch.floor(sextant / 6)  # `remainder` takes ten times as long on a CPU
    # HSV to RGB: low + spread · a trapezium of the hue for each channel
    channels = ((sextant - 3).abs() - 1, 2 - (sextant - 2).abs(), 2 - (sextant - 4).abs())
    return torch.stack([low + spread * channel.clamp(0, 1) for channel in channels], dim=-3)


def gaussian_blur(images: Tensor, sigma: Tensor, radius: int, border: str = "reflect") -> Tensor:
    """Each sample with its own `sigma` `(b,)` >= 0 in pixels; the kernel covers ± `radius` pixels.

    `border`: reflect, zero, or inside: nothing is padded, and the result is smaller by `radius` on each side.
    """
    taps = torch.arange(-radius, radius + 1, dtype=images.dtype, device=images.device)
    weights = torch.softmax(-((taps / sigma[:, None].clamp(min=SMALLEST_SIGMA)) ** 2) / 2, dim=1)  # (b, taps)
    if border != "inside":
        images = F.pad(images, [radius] * 4, mode="reflect" if border == "reflect" else "constant")
    b, c, height, width = images.shape
    # a group per sample and channel: one call for the whole batch
    per_channel = weights.repeat_interleave(c, dim=0)
    rows = F.conv2d(images.reshape(1, b * c, height, width), per_channel[:, None, None, :], groups=b * c)
    blurred = F.conv2d(rows, per_channel[:, None, :, None], groups=b * c)
    return blurred.reshape(b, c, *blurred.shape[-2:])


def blur_radius(largest: float, side: int) -> int:
    """Pixels on each side of the kernel's middle; no more than reflection can fill."""
    return min(max(1, math.ceil(3 * largest)), side - 1)


def solarized(images: Tensor) -> Tensor:
    """Values of at least one half are inverted."""
    return torch.where(images >= SOLARIZE_THRESHOLD, 1 - images, images)


JITTER = (brightness, contrast, saturation, hue)
NO_OPERATION = -1


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    ratio = _per_sample(factor)
    return (images * ratio + other * (1 - ratio)).clamp(0, 1)


def _per_sample(values: Tensor) -> Tensor:
    return values[:, None, None, None]


@cache
def _channels(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`(3, 1, 1)`; kept: sending it anew would wait for the device."""
    return torch.tensor(values, dtype=dtype, device=device)[:, None, None]
