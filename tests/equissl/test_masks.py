"""Draws of masks and drop path."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from equissl.masks import draw_masks, drop_path_rows, drop_path_scales, most_masked


def masks(
    step: int = 0, view: int = 0, groups: range = range(64), grid: int = 14, probability: float = 0.5, **changes: object
) -> np.ndarray:
    values = {"seed": 3, "group_size": 8, "ratio": (0.1, 0.5), **changes}
    return draw_masks(step=step, view=view, groups=groups, grid=grid, probability=probability, **values)  # type: ignore[arg-type]


def test_half_of_each_group_is_masked_with_ratios_from_the_whole_range() -> None:
    drawn = masks().reshape(64, 8, 196)
    shares = drawn.mean(axis=2)
    assert ((shares > 0).sum(axis=1) == 4).all()
    chosen = np.sort(shares, axis=1)[:, 4:]  # the masked ones of each group, one from each quarter of the range
    wanted = np.array([0.15, 0.25, 0.35, 0.45])
    assert np.abs(chosen.mean(axis=0) - wanted).max() < 0.02
    assert (np.abs(chosen - wanted) < 0.05 + 0.03).all()
    often = drawn.mean(axis=(0, 1))  # rectangles inside of the grid reach its middle more often than its corners
    assert often.min() > 0.005
    assert often.max() < 0.35


def test_one_crop_by_itself_is_masked_as_in_ibot() -> None:
    """Over many steps: with the probability, at a ratio uniform over the range, wherever it stands in its group."""
    shares = np.stack([masks(step, groups=range(8), probability=0.3).mean(axis=1) for step in range(200)])
    first = shares[:, ::8].ravel()
    assert abs((first > 0).mean() - 0.3) < 0.04
    assert abs(first[first > 0].mean() - 0.3) < 0.02
    assert abs(first[first > 0].std() - 0.4 / 12**0.5) < 0.02


def test_masks_are_blocks_and_never_more_than_asked_for() -> None:
    alone = masks(ratio=(0.05, 0.05)).reshape(-1, 14, 14)
    assert alone.sum(axis=(1, 2)).max() <= round(0.05 * 196)
    for mask in alone[:50]:
        if mask.any():
            rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
            box = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
            assert mask.sum() >= 0.2 * box or mask.sum() <= 10
    many = masks()
    vertical = many.reshape(-1, 14, 14)
    neighbours = (vertical[:, 1:] & vertical[:, :-1]).sum() / max(1, vertical[:, 1:].sum())
    assert neighbours > 0.6  # scattered patches would have about their share of 0.3


def test_draws_do_not_depend_on_who_draws() -> None:
    assert np.array_equal(np.concatenate([masks(groups=range(3)), masks(groups=range(3, 8))]), masks(groups=range(8)))
    assert not np.array_equal(masks(), masks(step=1))
    assert not np.array_equal(masks(), masks(view=1))
    assert not np.array_equal(masks(), masks(seed=4))


@pytest.mark.parametrize("grid", [1, 2, 4])
def test_small_grids(grid: int) -> None:
    share = masks(grid=grid).mean()
    assert share == 0 if grid == 1 else 0.05 < share < 0.2
    assert masks(grid=grid, ratio=(0.0, 0.0)).sum() == 0
    assert masks(grid=grid, probability=0.0).sum() == 0


def test_drop_path() -> None:
    positions = np.arange(4000)
    scales = drop_path_scales(3, 7, positions, num_crops=2, depth=3, rate=0.5)
    assert scales is not None
    assert scales.shape == (2, 3, 2, 4000)
    rates = np.array([0.0, 0.25, 0.5])
    assert np.allclose((scales == 0).float().mean(dim=(0, 2, 3)), rates, atol=0.02)
    assert np.allclose(scales.mean(dim=(0, 2, 3)), 1, atol=0.03)
    for depth in range(3):
        values = scales[:, depth].unique()
        assert np.allclose(values[values > 0], 1 / (1 - rates[depth]))
    half = drop_path_scales(3, 7, positions[2000:], num_crops=2, depth=3, rate=0.5)
    assert half is not None
    assert (scales[..., 2000:] == half).all()
    other = drop_path_scales(3, 8, positions, num_crops=2, depth=3, rate=0.5)
    assert other is not None
    assert (other != scales).any()
    assert drop_path_scales(3, 7, positions, 2, 3, rate=0.0) is None


@pytest.mark.parametrize(
    ("group_size", "grid", "probability", "ratio"),
    [(8, 14, 0.5, (0.1, 0.5)), (4, 4, 0.3, (0.2, 0.2)), (1, 7, 0.9, (0.4, 0.1)), (8, 14, 0.0, (0.1, 0.5))],
)
def test_no_draw_masks_more_than_the_bound_and_some_come_near(
    group_size: int, grid: int, probability: float, ratio: tuple[float, float]
) -> None:
    drawn = [masks(step, groups=range(16), group_size=group_size, grid=grid, probability=probability, ratio=ratio) for step in range(60)]
    of_groups = np.stack(drawn).reshape(60 * 16, -1).sum(axis=1)
    most = most_masked(1, group_size, grid, probability, ratio)
    assert of_groups.max() <= most
    assert of_groups.max() >= 0.8 * most
    assert most_masked(5, group_size, grid, probability, ratio) == 5 * most


def test_subset_of_the_batch() -> None:
    """Each group keeps as many of its crops, each crop as often, whoever draws; the numbers are rows of the crops one after the other."""
    kinds, depth, b = [(2, 5), (3, 11)], 2, 16
    draws = [drop_path_rows(3, step, range(4), 4, kinds, depth) for step in range(300)]
    for (crops, kept), rows in zip(kinds, map(torch.stack, zip(*draws, strict=True)), strict=True):
        assert rows.shape == (300, depth, 2, 4 * kept)
        chosen = torch.zeros(300, depth, 2, crops * b).scatter_(-1, rows, 1.0)
        assert (chosen.view(300, depth, 2, crops, 4, 4).sum(dim=(3, 5)) == kept).all()  # none twice, the same number in all groups
        assert (chosen.mean(dim=0) - kept / (4 * crops)).abs().max() < 0.15
        assert not torch.equal(chosen[:, 0], chosen[:, 1])
        assert not torch.equal(chosen[:, :, 0], chosen[:, :, 1])
        assert (chosen[1:] != chosen[:-1]).flatten(1).any(dim=1).all()
    half = drop_path_rows(3, 7, range(2, 4), 4, kinds, depth)
    for (crops, _), whole, part in zip(kinds, draws[7], half, strict=True):
        of_part = torch.zeros(depth, 2, crops * 8).scatter_(-1, part, 1.0).view(depth, 2, crops, 8)
        of_whole = torch.zeros(depth, 2, crops * b).scatter_(-1, whole, 1.0).view(depth, 2, crops, b)
        assert torch.equal(of_part, of_whole[..., 8:])
