"""Which image each position of each global batch holds: a pure function, the same on any number of ranks and workers.

A data set of at least 100 batches is read in *lanes*, so that an epoch of random order is read in long stretches:

1. shards are cut into *runs* of q consecutive images; each epoch permutes all runs and lays them end to end, the *row* of that
   epoch; what does not fill a batch at its end is left out, something else in each epoch;
2. the row is cut into K · B/q lanes, one for each group k < K and slot p < B/q; step t of an epoch takes the next q images of the
   lanes of group t mod K, slot p becoming the positions [p·q, (p+1)·q) of the batch;
3. within a lane, *windows* of WINDOW · q neighbours are permuted; their borders differ from slot to slot.

A worker that takes every n-th step meets only the lanes of its own groups (n divides K), holds one window of each and reads it
in a few large pieces. Smaller data sets are permuted as a whole: nothing is lost there by reading images one by one.
"""

from __future__ import annotations

import math
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from equissl import draws

MICROBATCH = 32  # q, at most: a batch is a whole number of microbatches
GROUPS = 12  # K: 1, 2, 3, 4, 6 or 12 workers share no lane
WINDOW = 3  # microbatches
FEW_BATCHES = 100  # fewer in an epoch: one permutation of all images
FEW_IMAGES = 8  # as well where a batch allows no longer microbatch: runs so short are no better than single images


class Place(NamedTuple):
    """Where a microbatch of an epoch is found: the lane of a group and slot, and how far along it."""

    epoch: int
    group: int
    slot: int
    number: int  # of the microbatch in its lane


class Window(NamedTuple):
    """Part of a lane: the microbatches [first, last) and where they are in the epoch's row."""

    first: int
    last: int
    start: int  # position in the row of the first image; the window has (last - first) · q images
    images: NDArray[np.int64]  # in the order of the row, ((last - first) · q,)
    order: NDArray[np.int64]  # microbatch m of the window holds images[order[m · q : (m + 1) · q]]


class Order:
    """The order of a data set with these images per shard. Raises ValueError for fewer images than one batch."""

    def __init__(self, shard_sizes: tuple[int, ...], batch: int, seed: int) -> None:
        self.shard_sizes, self.batch, self.seed = shard_sizes, batch, seed
        self.num_images = sum(shard_sizes)
        if self.num_images < batch:
            raise ValueError(f"the data set has {self.num_images} images, fewer than one batch of {batch}")
        self.steps_per_epoch = self.num_images // batch
        self.microbatch = next(q for q in range(min(MICROBATCH, batch), 0, -1) if batch % q == 0)
        self.in_lanes = self.steps_per_epoch >= FEW_BATCHES and self.microbatch >= FEW_IMAGES

    def indices(self, step: int, start: int = 0, stop: int | None = None) -> tuple[int, NDArray[np.int64], NDArray[np.int64]]:
        """Epoch, positions in the epoch and images, both `(stop - start,)`, of this part of the global batch of `step`."""
        stop = self.batch if stop is None else stop
        epoch, positions = self.positions(step, start, stop)
        if not self.in_lanes:
            return epoch, positions, _permutation(self.num_images, self.seed, epoch)[positions]
        q, parts = self.microbatch, []
        for place in self.places(step, start, stop):
            window = self.window(place)
            at = (place.number - window.first) * q
            parts.append(window.images[window.order[at : at + q]])
        images = np.concatenate(parts)
        skipped = start - start // q * q
        return epoch, positions, images[skipped : skipped + stop - start]

    def positions(self, step: int, start: int, stop: int) -> tuple[int, NDArray[np.int64]]:
        """Epoch and positions in the epoch of this part of the global batch of `step`."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        return epoch, np.arange(start, stop) + step_in_epoch * self.batch

    def places(self, step: int, start: int, stop: int) -> list[Place]:
        """Of the microbatches that hold the positions [start, stop) of the batch of `step`."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        number, group = divmod(step_in_epoch, GROUPS)
        return [Place(epoch, group, slot, number) for slot in range(start // self.microbatch, -(-stop // self.microbatch))]

    def window(self, place: Place) -> Window:
        """The window of the lane in which the microbatch lies."""
        first, last, start = self._extent(place)
        row = np.arange(start, start + (last - first) * self.microbatch)
        images = self._images(place.epoch, row)
        words = draws.words(self.seed, place.epoch, row, draws.Stream.ORDER, 1)[:, 0]
        return Window(first, last, start, images, np.argsort(words, kind="stable"))

    def lane_length(self, group: int) -> int:
        """Microbatches in a lane of this group: the first groups have one more where K does not divide the steps of an epoch."""
        steps, longer = divmod(self.steps_per_epoch, GROUPS)
        return steps + (group < longer)

    def held_images(self, world_size: int, num_workers: int) -> int:
        """The most encoded images that one of a rank's workers holds: of each of its lanes a window and the microbatch handed out."""
        share = -(-self.batch // world_size)
        if not self.in_lanes:
            return share
        groups = GROUPS // math.gcd(GROUPS, max(1, num_workers))
        return groups * -(-share // self.microbatch) * (WINDOW + 1) * self.microbatch

    def _extent(self, place: Place) -> tuple[int, int, int]:
        num = self.lane_length(place.group)
        before = sum(map(self.lane_length, range(place.group))) * self.batch + place.slot * num * self.microbatch
        shift = place.slot % WINDOW
        number = (place.number + shift) // WINDOW
        first, last = max(0, number * WINDOW - shift), min(num, (number + 1) * WINDOW - shift)
        return first, last, before + first * self.microbatch

    @cached_property
    def _runs(self) -> NDArray[np.int64]:
        """First image and length of every run, `(2, R)`."""
        borders = np.cumsum([0, *self.shard_sizes])
        starts = np.concatenate([np.arange(a, b, self.microbatch) for a, b in pairwise(borders)])
        ends = np.minimum(starts + self.microbatch, borders[np.searchsorted(borders, starts, side="right")])
        return np.stack([starts, ends - starts])

    def _images(self, epoch: int, row: NDArray[np.int64]) -> NDArray[np.int64]:
        starts, ends = _row(self, epoch)
        run = np.searchsorted(ends, row, side="right")
        return starts[run] + row - np.where(run > 0, ends[run - 1], 0)

    def __getstate__(self) -> tuple[tuple[int, ...], int, int]:
        return self.shard_sizes, self.batch, self.seed

    def __setstate__(self, state: tuple[tuple[int, ...], int, int]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def __hash__(self) -> int:
        return hash((self.num_images, len(self.shard_sizes), self.batch, self.seed))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Order) and self.__getstate__() == other.__getstate__()


@lru_cache(maxsize=2)  # a loader's workers may still be in one epoch when another begins
def _row(order: Order, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First image of each run and where in the row it ends, in the epoch's order of the runs."""
    starts, lengths = order._runs[:, draws.permutation(order._runs.shape[1], order.seed, epoch)]
    return starts, np.cumsum(lengths)


@lru_cache(maxsize=2)
def _permutation(num_images: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return draws.permutation(num_images, seed, epoch)


def describe(shard_sizes: tuple[int, ...], batch: int, world_size: int = 1, num_workers: int = 1) -> dict[str, int | str]:
    """The parameters that a data set and a batch lead to, for people. Raises ValueError for fewer images than one batch."""
    order = Order(shard_sizes, batch, 0)
    left_out = order.num_images - order.steps_per_epoch * batch
    common: dict[str, int | str] = {
        "steps_per_epoch": order.steps_per_epoch,
        "left_out_per_epoch": left_out,
        "images_held_per_worker": order.held_images(world_size, num_workers),
    }
    if not order.in_lanes:
        return {"order": "permutation", **common}
    q = order.microbatch
    return {
        "order": "lanes",
        **common,
        "microbatch": q,
        "lanes": GROUPS * (batch // q),
        "window_images": WINDOW * q,
        "runs": order._runs.shape[1],
    }
