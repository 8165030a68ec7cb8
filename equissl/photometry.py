"""Colour augmentation of a batch on its device: jitter, grey, blur, solarize, with parameters of each sample's own.

Operations follow `torchvision.transforms.v2.functional` (tests compare them sample by sample, to 1e-5): brightness, contrast and
saturation as blends with black, the mean grey and the grey image; hue through HSV; the four in a random order per sample.
Differences, all meant: the blur's kernel covers ± 3 of the largest sigma, and sigma is given in pixels of a 224-pixel crop and
scaled with the side (torchvision: a fixed kernel and pixels of the image at hand); images are float, nothing is rounded to 1/255.

Parameters are a pure function of (seed, epoch, position, crop), drawn on the CPU and sent in one piece: no waiting for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from equissl import draws
from equissl.config import Photometry
from equissl.distributed import send

MEAN = (0.485, 0.456, 0.406)  # of ImageNet, RGB
STD = (0.229, 0.224, 0.225)
GREY = (0.2989, 0.587, 0.114)  # torchvision's luma weights
SOLARIZE_THRESHOLD = 0.5  # uint8 128


def normalise(images: Tensor) -> Tensor:
    """`(..., 3, H, W)` in [0, 1] -> zero mean and unit variance over ImageNet."""
    return (images - _channels(MEAN, images)) / _channels(STD, images)


def denormalise(images: Tensor) -> Tensor:
    """The inverse of `normalise`; not clamped."""
    return images * _channels(STD, images) + _channels(MEAN, images)


def augment(images: Tensor, settings: Photometry, seed: int, epoch: int, positions: ArrayLike, crop: int, reference_side: int) -> Tensor:
    """`(b, 3, H, W)` in [0, 1] -> the same shape, augmented; what becomes of a sample does not depend on its batch.

    `positions` `(b,)`: in the epoch. `reference_side`: pixels of the crop that the image (or its centre, for the larger source
    of a warp) is; sigma is scaled by reference_side / 224.
    """
    assert images.is_floating_point()
    unit = draws.uniform(seed, epoch, positions, draws.Stream.PHOTOMETRY + crop, 16)
    assert len(unit) == len(images)
    jitter, grey, blur, solarize = unit[:, 0], unit[:, 1], unit[:, 2], unit[:, 3]
    images = images.clone()
    images = _jitter(images, settings, np.flatnonzero(jitter < settings.jitter), unit[:, 4:12])
    images = _on(images, np.flatnonzero(grey < settings.grey), lambda some, _: to_grey(some).expand_as(some))
    low, high = (sigma * reference_side / 224 for sigma in settings.sigma)
    images = _on(
        images, np.flatnonzero(blur < settings.blur), lambda some, sigma: gaussian_blur(some, sigma, high), low + (high - low) * unit[:, 12]
    )
    return _on(images, np.flatnonzero(solarize < settings.solarize), lambda some, _: solarized(some))


def _jitter(images: Tensor, settings: Photometry, rows: NDArray[np.int64], unit: NDArray[np.float64]) -> Tensor:
    """`unit` `(b, 8)`: four numbers for the factors, four whose order is the order of the operations."""
    strengths = (settings.brightness, settings.contrast, settings.saturation)
    lows, highs = [max(0.0, 1 - s) for s in strengths] + [-settings.hue], [1 + s for s in strengths] + [settings.hue]
    factors = np.array(lows) + (np.array(highs) - np.array(lows)) * unit[:, :4]
    order = np.argsort(unit[:, 4:], axis=1)
    used = [*(s > 0 for s in strengths), settings.hue > 0]
    for turn in range(4):
        for number, operation in enumerate((brightness, contrast, saturation, hue)):
            if used[number]:
                images = _on(images, rows[order[rows, turn] == number], operation, factors[:, number])
    return images


def _on(
    images: Tensor, rows: NDArray[np.int64], operation: Callable[[Tensor, Tensor], Tensor], values: NDArray[np.float64] | None = None
) -> Tensor:
    """Replace these rows of `images` by `operation(rows, their values)`, in place. Which rows is known on the host."""
    if len(rows) == 0:
        return images
    where = send(torch.from_numpy(rows), images.device)
    chosen = np.zeros(len(rows)) if values is None else values[rows]
    some = operation(images.index_select(0, where), send(torch.from_numpy(chosen).to(images.dtype), images.device))
    return images.index_copy_(0, where, some)


# --- the operations: images (b, 3, H, W) in [0, 1], one factor per sample (b,) ------------------------------------------------


def to_grey(images: Tensor) -> Tensor:
    """`(b, 3, H, W)` -> `(b, 1, H, W)`."""
    return (images * _channels(GREY, images)).sum(dim=-3, keepdim=True)


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


def gaussian_blur(images: Tensor, sigma: Tensor, largest: float) -> Tensor:
    """Each sample with its own `sigma` `(b,)` > 0 in pixels; the kernel covers ± 3 · `largest`, borders are reflected."""
    radius = min(max(1, math.ceil(3 * largest)), min(images.shape[-2:]) - 1)
    taps = torch.arange(-radius, radius + 1, dtype=images.dtype, device=images.device)
    weights = torch.softmax(-((taps / sigma[:, None]) ** 2) / 2, dim=1)  # (b, taps)
    b, c, height, width = images.shape
    padded = F.pad(images, (radius, radius, radius, radius), mode="reflect")
    # a group per sample and channel: one call for the whole batch
    per_channel = weights.repeat_interleave(c, dim=0)
    rows = F.conv2d(padded.reshape(1, b * c, *padded.shape[-2:]), per_channel[:, None, None, :], groups=b * c)
    return F.conv2d(rows, per_channel[:, None, :, None], groups=b * c).reshape(b, c, height, width)


def solarized(images: Tensor) -> Tensor:
    """Values of at least one half are inverted."""
    return torch.where(images >= SOLARIZE_THRESHOLD, 1 - images, images)


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    ratio = _per_sample(factor)
    return (images * ratio + other * (1 - ratio)).clamp(0, 1)


def _per_sample(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _channels(values: tuple[float, ...], images: Tensor) -> Tensor:
    return torch.tensor(values, dtype=images.dtype, device=images.device)[:, None, None]
