"""What was done to each global view, as one vector: what EquiMod predicts with (Devillers & Lefort, ICLR 2023).

Of each view p numbers: the box of what is seen in the image (top, left, height, width, as parts of the image's), mirrored or not,
jittered or not, which of the four operations each turn of the jitter applies, their four factors, grey or not; blurred or not and
sigma in pixels, where one of the views can be blurred; solarized or not, where one can be; and the parameters of g, where there is
one. What is not applied has the values of the identity: turns 0, 1, 2, 3, factors 1, 1, 1 and 0, sigma 0, and of the first view 0 for
all of g. p is 15, 17 with a blur (SimCLR), 18 with solarization too (BYOL), and g's.

The numbers are standardised with the means and standard deviations that the recipe itself has: of 8192 draws of each view, with a seed
of their own, on a square image. What images are like makes no difference that would last: a batch norm follows. (The authors' are
measured on their data, boxes in pixels; their constants for BYOL's blur and solarization are not those of their recipe.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from equissl import transforms
from equissl.config import PretrainConfig
from equissl.data.loader import crop_numbers, crops
from equissl.photometry import JITTER, Parameters, parameters_of

NUM_DRAWS, SEED, SIDE = 8192, 0, 1000  # of the statistics: samples, their seed, pixels of the square image
IDENTITY = (1.0, 1.0, 1.0, 0.0)  # factors of JITTER that change nothing


def names(config: PretrainConfig) -> tuple[str, ...]:
    """Of the p numbers."""
    both = (config.method.views.global1, config.method.views.global2)
    found = ["top", "left", "height", "width", "flip", "jitter", *(f"turn{turn}" for turn in range(1, 5))]
    found += [operation.__name__ for operation in JITTER] + ["grey"]
    found += ["blur", "sigma"] * any(view.blur > 0 for view in both) + ["solarize"] * any(view.solarize > 0 for view in both)
    if config.transformation is not None:
        found += [f"g_{name}" for name in transforms.get(config.transformation).names]
    return tuple(found)


def vectors(
    config: PretrainConfig, epoch: int, positions: NDArray[np.int64], boxes: NDArray[np.float32], motion: Tensor | None
) -> NDArray[np.float64]:
    """`(2, b, p)`, not standardised, of both views of the samples at `positions` `(b,)`.

    `boxes` `(b, 2, 5)`: as `PlainImages` has them. `motion` `(b, …)`: the parameters of g; None without it.
    """
    known = names(config)
    return np.stack(
        [
            described(
                known,
                boxes[:, view],
                parameters_of(config, epoch, positions, view),
                None if motion is None else motion.numpy() * view,
            )
            for view in range(2)
        ]
    )


def described(
    known: Sequence[str], boxes: NDArray[np.float32], drawn: Parameters, motion: NDArray[np.float32] | None
) -> NDArray[np.float64]:
    """`(b, p)` of one view, the numbers `known`, not standardised. `boxes` `(b, 5)`; `motion` `(b, …)`: what g did to it."""
    was_applied = (drawn.order[:, :, None] == np.arange(len(JITTER))).any(axis=1)
    columns = [
        boxes,
        drawn.jitter,
        np.where(drawn.jitter[:, None], drawn.order, np.arange(len(JITTER))),
        np.where(was_applied, drawn.factors, IDENTITY),
        drawn.grey,
    ]
    columns += [drawn.sigma > 0, drawn.sigma] if "sigma" in known else []
    columns += [drawn.solarize] if "solarize" in known else []
    columns += [motion] if motion is not None else []
    return np.column_stack(columns).astype(np.float64)


def statistics(config: PretrainConfig) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Means and standard deviations `(p,)` over both views; the latter 1 of what is always the same."""
    recipe, positions = config.model_copy(update={"seed": SEED}), np.arange(NUM_DRAWS)
    boxes = np.empty((NUM_DRAWS, 2, 5), dtype=np.float32)
    for view, kind in enumerate(crops(recipe)[:2]):
        numbers = crop_numbers(recipe, 0, positions, kind)
        boxes[:, view, :4] = [kind.seen_box(SIDE, SIDE, each) for each in numbers]
        boxes[:, view, 4] = numbers[:, 0] < recipe.method.views.flip
    motion = transforms.get(recipe.transformation).draw(SEED, 0, positions, recipe.side) if recipe.transformation else None
    drawn = vectors(recipe, 0, positions, boxes, motion).reshape(2 * NUM_DRAWS, -1)
    deviations = drawn.std(axis=0)
    return drawn.mean(axis=0), np.where(deviations > 1e-6, deviations, 1.0)


class Augmentation:
    """The vectors of a pretraining, standardised."""

    def __init__(self, config: PretrainConfig) -> None:
        self.config = config
        self.mean, self.deviation = statistics(config)

    def __call__(self, epoch: int, positions: NDArray[np.int64], boxes: NDArray[np.float32], motion: Tensor | None) -> Tensor:
        """`(2, b, p)` float32 on the CPU; arguments as of `vectors`."""
        return self.standardised(vectors(self.config, epoch, positions, boxes, motion))

    def standardised(self, described: NDArray[np.float64]) -> Tensor:
        """`(..., p)` float32 on the CPU."""
        return torch.from_numpy(((described - self.mean) / self.deviation).astype(np.float32))
