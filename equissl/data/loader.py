"""Batches of crops: decoded once per image, cropped and resized as uint8; photometry follows on the device, in batch.

Every crop is a pure function of (seed, epoch, position in the epoch, crop): the global batches are the same for any number of
ranks and workers, and after a resume.
"""

from __future__ import annotations

import io
import logging
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from equissl import draws, transforms
from equissl.config import PretrainConfig
from equissl.data.order import batch_positions
from equissl.data.shards import ShardSet

T = TypeVar("T")

log = logging.getLogger(__name__)

HANDLED_BY_PARENT = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR2}
TRIES = 10  # boxes drawn for a crop until one lies in the image, as torchvision's RandomResizedCrop
LOG_RATIO = math.log(4 / 3)  # the logarithm of a box's width / height is uniform between ± this
MAX_REPLACEMENTS = 100  # bad samples in a row


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch: b samples. Images are uint8."""

    step: int
    epoch: int
    index: Tensor  # (b,) int64, image in the data set; of a bad sample: that of its replacement
    position: Tensor  # (b,) int64, in the epoch
    label: Tensor  # (b,) int64
    view1: Tensor  # (b, 3, S, S)
    source2: Tensor  # (b, 3, S2, S2), S2 >= S: what g warps; the second view before g is its centre
    local: Tensor  # (L, b, 3, s, s); L may be 0
    bad: tuple[str, ...] = ()  # keys of samples that could not be decoded and were replaced

    def to(self, device: torch.device | str) -> Batch:
        """On `device`; from pinned memory without waiting."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return self._each(Tensor.pin_memory)

    def _each(self, function: Any) -> Batch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Batch(**{name: function(value) if isinstance(value, Tensor) else value for name, value in values.items()})


class Loader(Iterator[Batch]):
    """This rank's batches in order. `close()` ends the workers; `bad_keys` are the samples replaced so far."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches: Iterator[Batch] | None = batches
        self.bad_keys: set[str] = set()

    def __next__(self) -> Batch:
        if self._batches is None:
            raise StopIteration
        batch = next(self._batches)
        for key in batch.bad:
            if key not in self.bad_keys:
                self.bad_keys.add(key)
                log.warning("the sample %s cannot be decoded; the next one takes its place (%d so far)", key, len(self.bad_keys))
        return batch

    def close(self) -> None:
        batches, self._batches = self._batches, None
        shutdown = getattr(batches, "_shutdown_workers", None)  # otherwise only garbage collection would end them
        if shutdown is not None:
            shutdown()


def make_loader(data: ShardSet, config: PretrainConfig, rank: int, world_size: int, start_step: int, num_steps: int) -> Loader:
    """Batches of the steps `start_step` to `num_steps - 1`: of each global batch the slice of `batch / world_size` of this rank.

    Raises ValueError for fewer images than one batch.
    """
    assert config.batch % world_size == 0
    steps = _Steps(data, config, rank, config.batch // world_size)
    steps.positions(start_step)  # fewer images than a batch: said here, not in a worker
    return Loader(in_order(steps, range(start_step, num_steps), config.num_workers))


def in_order(items: Dataset[T], keys: range, num_workers: int) -> Iterator[T]:
    """`items[key]` for each key in order, computed ahead by `num_workers` processes, in page-locked memory where there is a GPU."""
    workers: dict[str, Any] = {}
    if num_workers:
        # forkserver: no fork of a process with threads and a GPU; torch is imported once for all workers, timm never
        context = torch.multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        workers = {"multiprocessing_context": context, "worker_init_fn": _init_worker, "prefetch_factor": 2}
    loader = DataLoader(items, sampler=keys, batch_size=None, num_workers=num_workers, pin_memory=torch.cuda.is_available(), **workers)
    # workers inherit the blocked signals: one that arrives before their first line does not end them either
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED_BY_PARENT)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _init_worker(worker: int) -> None:
    """Signals are the parent's business; a worker ends with its parent, however that ends."""
    for number in HANDLED_BY_PARENT:
        signal.signal(number, signal.SIG_IGN)
    # torch's own watch is on the fork server, which does not end as long as a worker lives
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class _Steps(Dataset[Batch]):
    """This rank's batch of a step, as a map from the step: workers take steps in turn and share nothing."""

    def __init__(self, data: ShardSet, config: PretrainConfig, rank: int, size: int) -> None:
        self.data, self.config, self.rank, self.size = data, config, rank, size
        side = config.side
        self.source_side = transforms.get(config.transformation).source_side(side) if config.transformation else side

    def positions(self, step: int) -> tuple[int, NDArray[np.int64], NDArray[np.int64]]:
        epoch, position, index = batch_positions(self.data.num_images, self.config.batch, self.config.seed, step)
        mine = slice(self.rank * self.size, (self.rank + 1) * self.size)
        return epoch, position[mine], index[mine]

    def __getitem__(self, step: int) -> Batch:
        config, views = self.config, self.config.method.views
        epoch, position, index = self.positions(step)
        b, side, local_side = self.size, config.side, views.local_size
        crops = [(side, side, views.global_scale), (self.source_side, side, views.global_scale)]
        crops += [(local_side, local_side, views.local_scale)] * views.num_local
        view1 = torch.empty(b, 3, side, side, dtype=torch.uint8)
        source2 = torch.empty(b, 3, self.source_side, self.source_side, dtype=torch.uint8)
        local = torch.empty(views.num_local, b, 3, local_side, local_side, dtype=torch.uint8)
        targets = [view1, source2, *local]
        unit = [draws.uniform(config.seed, epoch, position, draws.Stream.CROP + crop, 4 * TRIES + 1) for crop in range(len(crops))]
        used, bad = index.copy(), []
        for row in range(b):
            image, used[row], failed = decode_or_next(self.data, int(index[row]))
            bad += failed
            for crop, (source, inner, scale) in enumerate(crops):
                numbers = unit[crop][row]
                box = crop_box(image.shape[1], image.shape[2], scale, source / inner, numbers[1:])
                targets[crop][row] = resized_crop(image, box, source, flip=numbers[0] < views.flip)
        label = torch.from_numpy(self.data.labels[used])
        return Batch(step, epoch, torch.from_numpy(used), torch.from_numpy(position), label, view1, source2, local, tuple(bad))


class BadSample(ValueError):
    """A sample that is no image, or only a part of one."""


def decode(data: ShardSet, index: int) -> Tensor:
    """uint8 `(3, height, width)`, RGB. Raises BadSample."""
    try:
        # Pillow: torchvision.io gives the same pixels of a JPEG 1.4 times as fast (500 x 334: 0.58 ms, 0.80 ms), but it ends the
        # process at a truncated PNG (0.29), is deprecated since 0.29, and makes a worker's start take 7 s instead of 3
        with Image.open(io.BytesIO(data.read(index))) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # whatever Pillow's readers raise
        raise BadSample(f"the sample {data.key(index)} of {data.folder} cannot be decoded: {error}") from None


def decode_or_next(data: ShardSet, index: int) -> tuple[Tensor, int, list[str]]:
    """The image or, where it cannot be decoded, the next that can; its index; the keys of the bad ones.

    Raises ValueError where a hundred in a row are bad.
    """
    bad: list[str] = []
    for shift in range(MAX_REPLACEMENTS):
        candidate = (index + shift) % data.num_images
        try:
            return decode(data, candidate), candidate, bad
        except BadSample:
            bad.append(data.key(candidate))
    raise ValueError(f"{len(bad)} samples in a row of {data.folder} cannot be decoded, the first is {bad[0]}: write the data set anew")


def crop_box(height: int, width: int, scale: tuple[float, float], margin: float, unit: NDArray[np.float64]) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random box with an area of `scale` of the image, enlarged by `margin` on each side.

    `margin` (S2 / S) is for a source that is warped and cropped inside: what is seen has the scale asked for, as long as the
    larger box fits into the image. As torchvision's RandomResizedCrop: aspect ratios between 3/4 and 4/3, uniform in the
    logarithm, ten tries, then the largest box with a permitted aspect ratio in the middle. `unit`: (4 · TRIES,) in (0, 1).
    """
    low, high = scale
    for area, ratio, y, x in unit.reshape(TRIES, 4).tolist():
        pixels = height * width * (low + (high - low) * area)
        aspect = math.exp(LOG_RATIO * (2 * ratio - 1))
        h, w = round(math.sqrt(pixels / aspect) * margin), round(math.sqrt(pixels * aspect) * margin)
        if 0 < h <= height and 0 < w <= width:
            return int(y * (height - h + 1)), int(x * (width - w + 1)), h, w
    h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def resized_crop(image: Tensor, box: tuple[int, int, int, int], side: int, flip: bool) -> Tensor:
    """uint8 `(3, H, W)` -> `(3, side, side)`: bicubic with antialiasing, then mirrored where `flip`."""
    top, left, height, width = box
    crop = image[None, :, top : top + height, left : left + width]
    resized = F.interpolate(crop, (side, side), mode="bicubic", antialias=True)[0]
    return resized.flip(-1) if flip else resized
