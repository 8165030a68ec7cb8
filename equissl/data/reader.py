"""One worker's share of the encoded images, read ahead in large pieces.

Memory: of each lane that the worker meets at most one window and the microbatch just handed out (`Order.held_images`). On 16 ranks
a global batch of 1024 has two slots per rank; 12 workers each meet one group, so two lanes: 2 · 128 images, about 29 MB of ImageNet.
"""

from __future__ import annotations

import copy
import math
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from equissl.data.order import GROUPS, Order, Place
from equissl.data.shards import ShardSet

Encoded = bytes | memoryview


class _Microbatch(NamedTuple):
    images: NDArray[np.int64]  # (q,)
    encoded: list[Encoded]


class Reader:
    """The encoded images at the positions [start, stop) of every `stride`-th batch, which is what one of `stride` workers takes.

    Any step may be asked for at any time; steps in order are read ahead, by a thread with open files of its own.
    """

    def __init__(self, data: ShardSet, order: Order, start: int, stop: int, stride: int = 1) -> None:
        self.data, self.order, self.start, self.stop = data, order, start, stop
        self._again = math.lcm(stride, GROUPS)  # steps until the worker meets a lane again
        self._held: dict[Place, Future[dict[int, _Microbatch]]] = {}  # lane -> the microbatches of its window that will be taken
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reader") if order.in_lanes else None
        self._files = copy.copy(data)

    def read(self, step: int) -> tuple[int, NDArray[np.int64], NDArray[np.int64], list[Encoded]]:
        """Epoch, positions `(n,)`, images `(n,)` and their bytes. Raises ShardLost."""
        if self._thread is None:
            epoch, positions, images = self.order.indices(step, self.start, self.stop)
            return epoch, positions, images, [self.data.read(int(i)) for i in images]
        epoch, positions = self.order.positions(step, self.start, self.stop)
        parts = [self._take(place) for place in self.order.places(step, self.start, self.stop)]
        skipped = self.start % self.order.microbatch
        mine = slice(skipped, skipped + len(positions))
        return epoch, positions, np.concatenate([part.images for part in parts])[mine], [e for part in parts for e in part.encoded][mine]

    def close(self) -> None:
        if self._thread is not None:
            self._files.abandon()
            self._thread.shutdown(cancel_futures=True)
        self._held.clear()
        self._files.close()

    def num_bytes(self) -> int:
        """Held at the moment; what is still being read is waited for."""
        return sum(len(encoded) for held in self._held.values() for part in held.result().values() for encoded in part.encoded)

    def _take(self, place: Place) -> _Microbatch:
        lane = place._replace(number=0)
        held = self._held.get(lane)
        if held is None or place.number not in held.result():  # the first visit, or a jump
            held = self._fetch(place)
        microbatches = held.result()
        taken = microbatches.pop(place.number)
        if not microbatches:
            del self._held[lane]
            later = place._replace(number=place.number + self._again // GROUPS)
            if later.number < self.order.lane_length(later.group):
                self._fetch(later)  # while what was taken is decoded
        return taken

    def _fetch(self, place: Place) -> Future[dict[int, _Microbatch]]:
        assert self._thread is not None
        held = self._held[place._replace(number=0)] = self._thread.submit(self._read_window, place)
        return held

    def _read_window(self, place: Place) -> dict[int, _Microbatch]:
        """The images of those microbatches of the window that this worker will still take."""
        q, window = self.order.microbatch, self.order.window(place)
        numbers = range(place.number, window.last, self._again // GROUPS)
        members = {m: window.order[(m - window.first) * q : (m - window.first + 1) * q] for m in numbers}
        wanted = np.zeros(len(window.images), dtype=bool)
        wanted[np.concatenate(list(members.values()))] = True
        borders = np.flatnonzero((np.diff(window.images) != 1) | (np.diff(self.data.shard_of(window.images)) != 0)) + 1
        encoded: list[Encoded] = [b""] * len(window.images)
        for first, last in pairwise([0, *borders.tolist(), len(window.images)]):
            mine = np.flatnonzero(wanted[first:last])
            if len(mine):  # one read from the first that is wanted to the last
                start, stop = first + int(mine[0]), first + int(mine[-1]) + 1
                image = int(window.images[start])
                encoded[start:stop] = self._files.read_range(image, image + stop - start)
        return {m: _Microbatch(window.images[at], [encoded[i] for i in at.tolist()]) for m, at in members.items()}
