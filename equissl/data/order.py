"""Which image each position of each global batch holds: a pure function, the same on any number of ranks and workers."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from equissl import draws


def batch_positions(num_images: int, batch: int, seed: int, step: int) -> tuple[int, NDArray[np.int64], NDArray[np.int64]]:
    """Epoch, positions in the epoch `(batch,)` and image indices `(batch,)` of the global batch of `step`.

    An epoch is floor(N/B) steps of a permutation keyed by (seed, epoch); the remainder is left out, another one each epoch.
    Raises ValueError for fewer images than one batch.
    """
    if num_images < batch:
        raise ValueError(f"the data set has {num_images} images, fewer than one batch of {batch}")
    epoch, step_in_epoch = divmod(step, num_images // batch)
    positions = np.arange(step_in_epoch * batch, (step_in_epoch + 1) * batch)
    return epoch, positions, _epoch_order(num_images, seed, epoch)[positions]


@lru_cache(maxsize=2)  # a loader's workers may still be in one epoch when another begins
def _epoch_order(num_images: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return draws.permutation(num_images, seed, epoch)
