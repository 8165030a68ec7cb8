"""Masked patches, and which samples skip which branches (drop path): draws keyed by (seed, step), the same on any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from equissl import draws

ATTEMPTS = 32  # rectangles tried per crop; what is then missing to the ratio stays visible
MAX_LOG_ASPECT = math.log(1 / 0.3)


def most_masked(num_groups: int, group_size: int, grid: int, probability: float, ratio: tuple[float, float]) -> int:
    """The largest number of patches that `draw_masks` can mask in one view of so many groups: what shapes can be fixed to."""

    def in_group(num_masked: int) -> int:
        ends = ratio[0] + (ratio[1] - ratio[0]) * np.arange(num_masked + 1) / max(num_masked, 1)  # of the strata
        return int(np.rint(np.maximum(ends[:-1], ends[1:]) * grid**2).sum())

    return num_groups * in_group(math.ceil(group_size * probability))


def draw_masks(
    seed: int,
    step: int,
    view: int,
    groups: range,
    group_size: int,
    grid: int,
    probability: float,
    ratio: tuple[float, float],
    smallest: int | None = None,
) -> NDArray[np.bool_]:
    """Which patches of one global view are masked: `(groups · group_size, grid²)`.

    Rectangles as in BEiT (Bao et al. 2022): aspect ratio log-uniform within 0.3 and 1/0.3, until the crop's ratio is reached. For a
    single crop as in iBOT: masked with `probability`, ratio uniform in `ratio`. Within a group of samples both are
    stratified, so that every group, and with it every rank, has nearly the same number of masked patches. `smallest`: patches that a
    rectangle is to have at least, unless fewer are missing to the ratio; None: iBOT's (grid // 3)².
    """
    g, total = group_size, len(groups) * group_size
    unit = draws.uniform(seed, step, np.arange(groups.start, groups.stop), draws.Stream.MASK + view, 1 + 2 * g + ATTEMPTS * g * 4)
    place = np.argsort(np.argsort(unit[:, 1 : 1 + g], axis=1), axis=1)  # of a crop in its group's random order
    num_masked = np.floor(g * probability + unit[:, :1])  # mean: g · probability
    within = (place + unit[:, 1 + g : 1 + 2 * g]) / np.maximum(num_masked, 1)
    share = np.where(place < num_masked, ratio[0] + (ratio[1] - ratio[0]) * within, 0.0)
    wanted = np.rint(share * grid**2).reshape(total)
    smallest = max(1, (grid // 3) ** 2) if smallest is None else smallest
    return _rectangles(wanted, grid, smallest, unit[:, 1 + 2 * g :].reshape(total, ATTEMPTS, 4)).reshape(total, grid**2)


def _rectangles(wanted: NDArray[np.float64], grid: int, smallest: int, unit: NDArray[np.float64]) -> NDArray[np.bool_]:
    mask = np.zeros((len(wanted), grid, grid), dtype=bool)
    axis = np.arange(grid)
    for attempt in range(unit.shape[1]):
        missing = wanted - mask.sum(axis=(1, 2))
        if not (missing > 0).any():
            break
        area, aspect, y, x = unit[:, attempt].T
        area = np.minimum(smallest, missing) + np.maximum(0, missing - smallest) * area
        aspect = np.exp(MAX_LOG_ASPECT * (2 * aspect - 1))
        height, width = np.rint(np.sqrt(np.maximum(0, area * aspect))), np.rint(np.sqrt(np.maximum(0, area / aspect)))
        top, left = np.floor(y * (grid - height + 1)), np.floor(x * (grid - width + 1))
        rows = (axis >= top[:, None]) & (axis < (top + height)[:, None])
        columns = (axis >= left[:, None]) & (axis < (left + width)[:, None])
        new = rows[:, :, None] & columns[:, None, :] & ~mask
        fits = (height < grid) & (width < grid) & (new.sum(axis=(1, 2)) <= missing)
        mask |= new & fits[:, None, None]
    return mask


def drop_path_rows(seed: int, step: int, groups: range, group_size: int, kinds: Sequence[tuple[int, int]], depth: int) -> list[Tensor]:
    """The crops that go through each residual branch of each block: for each kind `(depth, 2, groups · kept)` int64, on the CPU.

    Stochastic depth on a subset of the batch (DINOv2): `kinds` has the number c of crops of a sample and how many of a group's
    c · group_size crops are kept, at random; the numbers are rows of `(c · b, …)`, crop by crop, for the b samples of `groups`.
    """
    g, b = group_size, len(groups) * group_size
    numbers = depth * 2 * g * sum(crops for crops, _ in kinds)
    unit = draws.uniform(seed, step, np.arange(groups.start, groups.stop), draws.Stream.DROP_PATH, numbers)
    start, rows = 0, []
    for crops, kept in kinds:
        mine = unit[:, start : start + depth * 2 * g * crops].reshape(len(groups), depth, 2, g * crops)
        start += depth * 2 * g * crops
        crop, sample = np.divmod(np.argsort(mine, axis=-1)[..., :kept], g)
        row = crop * b + np.arange(len(groups))[:, None, None, None] * g + sample
        rows.append(torch.from_numpy(np.sort(row.transpose(1, 2, 0, 3).reshape(depth, 2, len(groups) * kept), axis=-1)))
    return rows


def drop_path_scales(seed: int, step: int, positions: NDArray[np.int64], num_crops: int, depth: int, rate: float) -> Tensor | None:
    """What each residual branch is multiplied by: 0, or 1/(1 - rate) where kept; `(num_crops, depth, 2, b)` float32 on the CPU.

    Stochastic depth (Huang et al. 2016) per sample, the rate rising linearly from 0 at the first block to `rate` at the last.
    `positions` `(b,)`: in the global batch. None where nothing is dropped.
    """
    if rate == 0:
        return None
    unit = draws.uniform(seed, step, positions, draws.Stream.DROP_PATH, num_crops * depth * 2)
    rates = np.linspace(0, rate, depth)[None, :, None, None]
    unit = unit.reshape(len(positions), num_crops, depth, 2).transpose(1, 2, 3, 0)
    return torch.from_numpy(np.where(unit < rates, 0.0, 1 / (1 - rates)).astype(np.float32))
