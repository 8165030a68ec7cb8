"""Batches of crops: decoded once per image, cropped and resized as uint8; photometry follows on the device, in batch.

Every crop is a pure function of (seed, epoch, position in the epoch, crop): the global batches are the same for any number of
ranks and workers, and after a resume.
"""

from __future__ import annotations

import io
import logging
import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, TypeVar

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from equissl import draws, transforms
from equissl.config import PretrainConfig
from equissl.data.order import GROUPS, Order
from equissl.data.parallel import HANDLED_BY_PARENT, init_worker, usable_cores
from equissl.data.reader import Encoded, Reader
from equissl.data.shards import DataError, Images, ShardSet
from equissl.transforms.base import centre

T = TypeVar("T")

log = logging.getLogger(__name__)

TRIES = 10  # boxes drawn for a crop until one lies in the image, as torchvision's RandomResizedCrop
MAX_REPLACEMENTS = 100  # bad samples in a row


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch: b samples. Images are uint8, or float in [0, 1] where they are coloured already."""

    step: int
    epoch: int
    index: Tensor  # (b,) int64, image in the data set; of a bad sample: that of its replacement
    position: Tensor  # (b,) int64, in the epoch
    label: Tensor  # (b,) int64
    view1: Tensor  # (b, 3, S, S)
    source2: Tensor  # (b, 3, S2, S2), S2 >= S: what g warps; the second view before g is its centre
    local: Tensor  # (L, b, 3, s, s); L may be 0
    plain: Tensor | None = None  # (b, 3, S, S): the largest square in the image's middle; where the method sees it
    boxes: Tensor | None = None  # (b, 2, 5) float32, where there is `plain`: `PlainImages.boxes`
    bad: tuple[str, ...] = ()  # keys of samples that could not be decoded and were replaced

    def to(self, device: torch.device | str) -> Batch:
        """On `device`; from pinned memory without waiting."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return self._each(Tensor.pin_memory)

    def _each(self, function: Any) -> Batch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Batch(**{name: function(value) if isinstance(value, Tensor) else value for name, value in values.items()})


class BadSamples(DataError):
    """Too many samples of a data set are no images."""


class Loader(Iterator[Batch]):
    """This rank's batches in order, two ahead of the training. `bad_keys` are the samples replaced so far.

    A batch that cannot be had is known two steps early (`has_failed`): the ranks can agree to stop, and save, before they need it.
    """

    def __init__(self, batches: Iterator[Batch | DataError], max_bad: float, release: Callable[[], None]) -> None:
        """`max_bad`: the fraction of the samples that may be bad; ten always may. `release` is called by `close`."""
        self._release = release
        self._batches: Iterator[Batch | DataError] | None = batches
        self._ahead: deque[Batch] = deque()
        self._error: Exception | None = None
        self._max_bad, self._num_seen, self._num_bad = max_bad, 0, 0
        self.bad_keys: set[str] = set()
        self.waited_s = 0.0  # for batches so far

    def __next__(self) -> Batch:
        """Raises StopIteration at the end and after `close`, else what kept the batch from being made."""
        if not self._ahead:
            self._fetch()
        if not self._ahead:
            self.raise_error()
            raise StopIteration
        return self._ahead.popleft()

    def has_failed(self) -> bool:
        """Whether one of the next two batches cannot be had; waits for them."""
        while len(self._ahead) < 2 and self._fetch():
            pass
        return self._error is not None

    def raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _fetch(self) -> bool:
        if self._batches is None or self._error is not None:
            return False
        begin = time.monotonic()
        try:
            batch = next(self._batches)
            if isinstance(batch, DataError):  # raised in a worker it would come with a traceback for a message
                raise batch
            self._count(batch)
        except StopIteration:
            return False
        except Exception as error:  # kept, and raised when all ranks have saved
            self._error = error
            return False
        finally:
            self.waited_s += time.monotonic() - begin
        self._ahead.append(batch)
        return True

    def _count(self, batch: Batch) -> None:
        for key in batch.bad:
            if key not in self.bad_keys:
                self.bad_keys.add(key)
                log.warning("the sample %s cannot be decoded; the next one takes its place (%d so far)", key, len(self.bad_keys))
        self._num_bad += len(batch.bad)
        self._num_seen += len(batch.index)
        if self._num_bad > max(10, self._max_bad * self._num_seen):
            raise BadSamples(
                f"{self._num_bad} of {self._num_seen} samples could not be decoded, more than max_bad_samples {self._max_bad:g}, such as"
                f" {', '.join(sorted(self.bad_keys)[:3])}: equihpc data verify --decode lists all; mend the data set or raise the limit"
            )

    def close(self) -> None:
        batches, self._batches = self._batches, None
        self._ahead.clear()
        for worker in getattr(batches, "_workers", ()):  # they ignore the signals that torch would send; nothing of theirs is needed
            worker.kill()
        shutdown = getattr(batches, "_shutdown_workers", None)  # otherwise only garbage collection would end them
        if shutdown is not None:
            shutdown()
        self._release()


def make_loader(data: ShardSet, config: PretrainConfig, rank: int, world_size: int, start_step: int, num_steps: int) -> Loader:
    """Batches of the steps `start_step` to `num_steps - 1`: of each global batch the slice of `batch / world_size` of this rank.

    Raises ValueError for fewer images than one batch.
    """
    assert config.batch % world_size == 0
    steps = _Steps(data, config, rank, config.batch // world_size)
    return Loader(in_order(steps, range(start_step, num_steps), config.num_workers), config.max_bad_samples, steps.close)


def in_order(items: Dataset[T], keys: range, num_workers: int) -> Iterator[T]:
    """`items[key]` for each key in order, computed ahead by `num_workers` processes, in page-locked memory where there is a GPU."""
    return _load(items, num_workers, sampler=keys)


def in_turn(items: IterableDataset[T], num_workers: int) -> Iterator[T]:
    """As `in_order`, of what each worker's iterator yields: one item of each worker in turn."""
    return _load(items, num_workers)


def _load(items: Dataset[T], num_workers: int, **options: Any) -> Iterator[T]:
    if num_workers:  # more than cores would only take turns; the order is made for numbers that divide its groups
        num_workers = max(n for n in range(1, GROUPS + 1) if GROUPS % n == 0 and n <= max(1, min(num_workers, usable_cores())))
    if num_workers:
        # forkserver: no fork of a process with threads and a GPU; torch is imported once for all workers, timm never
        context = torch.multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        options |= {"multiprocessing_context": context, "worker_init_fn": _init_worker, "prefetch_factor": 2}
    loader = DataLoader(items, batch_size=None, num_workers=num_workers, pin_memory=torch.cuda.is_available(), **options)
    # workers inherit the blocked signals: one that arrives before their first line does not end them either
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED_BY_PARENT)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _init_worker(worker: int) -> None:
    init_worker()  # torch's own watch is on the fork server, which does not end as long as a worker lives


class Crop(NamedTuple):
    """One kind of crop."""

    draw: int  # the substream of its box and its flip
    side: int  # as it is stored
    seen: int  # side of the middle that is seen
    scale: tuple[float, float]  # fractions of the image's area that this shows
    max_aspect: float

    def box(self, height: int, width: int, unit: NDArray[np.float64]) -> tuple[int, int, int, int]:
        """`crop_box` of an image with these `crop_numbers` `(4 · TRIES + 1,)`."""
        return crop_box(height, width, self.scale, self.side / self.seen, unit[1:], self.max_aspect)

    def seen_box(self, height: int, width: int, unit: NDArray[np.float64]) -> tuple[float, float, float, float]:
        """Of `box` the middle that is seen: top, left, height and width as parts of the image's height and width."""
        top, left, h, w = self.box(height, width, unit)
        part = self.seen / self.side
        margin = (1 - part) / 2
        return (top + margin * h) / height, (left + margin * w) / width, part * h / height, part * w / width


def crops(config: PretrainConfig) -> list[Crop]:
    """First view, source of the second view, local crops. With `one_crop` the first view is the source's middle."""
    views, side = config.method.views, config.side
    source_side = transforms.get(config.transformation).source_side(side) if config.transformation else side
    first, source = (Crop(draw, of, side, views.global_scale, views.max_aspect) for draw, of in enumerate((side, source_side)))
    local = (Crop(2 + n, views.local_size, views.local_size, views.local_scale, views.max_aspect) for n in range(views.num_local))
    return [source if views.one_crop else first, source, *local]


def crop_numbers(config: PretrainConfig, epoch: int, positions: NDArray[np.int64], crop: Crop) -> NDArray[np.float64]:
    """`(b, 4 · TRIES + 1)`: whether to mirror (below `flip`), then what `crop_box` takes."""
    return draws.uniform(config.seed, epoch, positions, draws.Stream.CROP + crop.draw, 4 * TRIES + 1)


class _Steps(Dataset[Batch | DataError]):
    """This rank's batch of a step, as a map from the step: workers take steps in turn and share nothing."""

    def __init__(self, data: ShardSet, config: PretrainConfig, rank: int, size: int) -> None:
        self.data, self.config, self.rank, self.size = data, config, rank, size
        self.order = Order(data.shard_sizes, config.batch, config.seed)
        self.reader: Reader | None = None
        self.scratch = Scratch()

    def __getitem__(self, step: int) -> Batch | DataError:
        try:
            return self._batch(step)
        except DataError as error:
            return error

    def _batch(self, step: int) -> Batch:
        if self.reader is None:  # in the worker
            worker = get_worker_info()
            mine = self.rank * self.size, (self.rank + 1) * self.size
            self.reader = Reader(self.data, self.order, *mine, stride=worker.num_workers if worker else 1)
        epoch, position, index, encoded = self.reader.read(step)
        plain = PlainImages(self.config, epoch, position)
        used, bad = index.copy(), []

        def images() -> Iterator[Tensor]:
            for row, content in enumerate(encoded):
                image, used[row], failed = decode_or_next(self.data, int(index[row]), content, self.scratch)
                bad.extend(failed)
                yield image

        if self.config.pipeline == "reference":
            from equissl.data import reference  # and with it torchvision's transforms: seconds

            view1, source2, local = reference.crops(plain.on_the_way(images()), self.config, epoch, position)
        else:
            view1, source2, local = cut(plain.on_the_way(images()), self.config, epoch, position)
        label = torch.from_numpy(self.data.labels[used])
        where = torch.from_numpy(position)
        return Batch(step, epoch, torch.from_numpy(used), where, label, view1, source2, local, plain.images, plain.boxes, tuple(bad))

    def close(self) -> None:
        if self.reader is not None:
            self.reader.close()
            self.reader = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"reader": None}


class PlainImages:
    """Of b samples the un-augmented image and where the views lie in it, for a method that sees them; else None.

    Un-augmented is the largest square in the image's middle, resized to the side of a view. EquiMod's authors take the middle seven
    eighths of it of ImageNet's images (resize to 256, crop 224), and the whole of CIFAR's: ours leaves less out that views can show.
    """

    def __init__(self, config: PretrainConfig, epoch: int, positions: NDArray[np.int64]) -> None:
        self.images: Tensor | None = None  # (b, 3, S, S), as `Batch.plain`
        # (b, 2, 5) float32, of both global views: top, left, height and width of what is seen, before g, as parts of the image's height
        # and width; 1 where it is mirrored, else 0
        self.boxes: Tensor | None = None
        self.config = config
        if config.method.sees_plain:
            b, self.kinds = len(positions), crops(config)[:2]
            self.numbers = [crop_numbers(config, epoch, positions, kind) for kind in self.kinds]
            of_floats = config.pipeline == "reference"
            self.images = torch.empty(b, 3, config.side, config.side) if of_floats else _empty(b, config.side)
            self.boxes = torch.empty(b, 2, 5)

    def on_the_way(self, images: Iterable[Tensor]) -> Iterator[Tensor]:
        """The same decoded images, one for each position; what is to be known of one is taken before it goes on."""
        for row, image in enumerate(images):
            if self.images is not None and self.boxes is not None:
                self._take(image, self.images[row])
                for view, (kind, numbers) in enumerate(zip(self.kinds, self.numbers, strict=True)):
                    box = kind.seen_box(image.shape[1], image.shape[2], numbers[row])
                    self.boxes[row, view] = torch.tensor([*box, numbers[row, 0] < self.config.method.views.flip])
            yield image

    def _take(self, image: Tensor, target: Tensor) -> None:
        if self.config.pipeline == "reference":
            from equissl.data import reference

            reference.plain(image, target)
        else:
            resized_crop(image, middle_square(image.shape[1], image.shape[2]), target, flip=False)


def middle_square(height: int, width: int) -> tuple[int, int, int, int]:
    """Top, left, height and width of the largest square in the middle of an image."""
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def cut(images: Iterable[Tensor], config: PretrainConfig, epoch: int, positions: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor]:
    """Decoded images, one for each position, -> `Batch`'s view1, source2 and local."""
    kinds, b, views = crops(config), len(positions), config.method.views
    view1, source2 = _empty(b, config.side), _empty(b, kinds[1].side)
    local = _empty(views.num_local * b, views.local_size).unflatten(0, (views.num_local, b))
    targets = [view1, source2, *local]
    made = [(crop, crop_numbers(config, epoch, positions, crop), target) for crop, target in zip(kinds, targets, strict=True)]
    if views.one_crop:
        made = made[1:]
    for row, image in enumerate(images):  # decoded one at a time
        for crop, numbers, target in made:
            resized_crop(
                image, crop.box(image.shape[1], image.shape[2], numbers[row]), target[row], flip=bool(numbers[row, 0] < views.flip)
            )
    if views.one_crop:  # copied: a view would take the whole source along to the other process, and to the GPU
        view1.copy_(centre(source2, config.side))
    return view1, source2, local


def _empty(b: int, side: int) -> Tensor:
    """Channels last in memory: the order in which images are decoded and in which the resize is vectorised."""
    return torch.empty(b, side, side, 3, dtype=torch.uint8).permute(0, 3, 1, 2)


class BadSample(ValueError):
    """A sample that is no image, or only a part of one."""


class Scratch:
    """Memory that images are decoded into, each over the one before: fresh memory can cost page faults, as the allocator decides."""

    def __init__(self) -> None:
        self._memory = np.empty(0, dtype=np.uint8)

    def of(self, num_bytes: int) -> NDArray[np.uint8]:
        """At least so many."""
        if num_bytes > len(self._memory):
            self._memory = np.empty(num_bytes, dtype=np.uint8)
        return self._memory


def decode(data: Images, index: int, content: Encoded | None = None, scratch: Scratch | None = None) -> Tensor:
    """uint8 `(3, height, width)`, RGB, channels last in memory. Raises BadSample.

    `content`: where it was read already. `scratch`: where the image may be decoded into, if it is done with before the next one.
    """
    content = data.read(index) if content is None else content
    try:
        return torch.from_numpy(decode_image(content, scratch)).permute(2, 0, 1)
    except Exception as error:  # Pillow's readers raise what they like
        raise BadSample(f"the sample {data.key(index)} of {data.folder} cannot be decoded: {error}") from None


def decode_image(content: Encoded, scratch: Scratch | None = None) -> NDArray[np.uint8]:
    """`(height, width, 3)`. A JPEG by libjpeg-turbo directly: Pillow gives the same pixels in 1.6 times the time."""
    if content[:2] == b"\xff\xd8":
        try:
            memory = None if scratch is None else scratch.of(3 * math.prod(simplejpeg.decode_jpeg_header(content)[:2]))
            pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(content, buffer=memory)
            return pixels
        except ValueError:  # truncated or CMYK: Pillow says what is wrong, or converts
            pass
    with Image.open(io.BytesIO(content)) as image:
        return np.array(image.convert("RGB"))


def decode_or_next(
    data: Images, index: int, content: Encoded | None = None, scratch: Scratch | None = None
) -> tuple[Tensor, int, list[str]]:
    """The image or, where it cannot be decoded, the next that can; its index; the keys of the bad ones.

    Raises BadSamples where a hundred in a row are bad.
    """
    bad: list[str] = []
    for shift in range(MAX_REPLACEMENTS):
        candidate = (index + shift) % data.num_images
        try:
            return decode(data, candidate, None if shift else content, scratch), candidate, bad
        except BadSample:
            bad.append(data.key(candidate))
    raise BadSamples(f"{len(bad)} samples in a row of {data.folder} cannot be decoded, the first is {bad[0]}: write the data set anew")


def crop_box(
    height: int, width: int, scale: tuple[float, float], margin: float, unit: NDArray[np.float64], max_aspect: float = 4 / 3
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random box with an area of `scale` of the image, enlarged by `margin` on each side.

    `margin` (S2 / S) is for a source that is warped and cropped inside: what is seen has the scale asked for, drawn from the part
    of the range for which a larger square box fits into the image. As torchvision's RandomResizedCrop: width / height between
    1 / `max_aspect` and `max_aspect`, uniform in the logarithm, ten tries, then the largest box with a permitted aspect ratio in the
    middle. `unit`: (4 · TRIES,) in (0, 1).
    """
    low, high = scale
    if margin > 1:
        high = max(low, min(high, (min(height, width) / margin) ** 2 / (height * width)))
    for area, ratio, y, x in unit.reshape(TRIES, 4).tolist():
        pixels = height * width * (low + (high - low) * area)
        aspect = math.exp(math.log(max_aspect) * (2 * ratio - 1))
        h, w = round(math.sqrt(pixels / aspect) * margin), round(math.sqrt(pixels * aspect) * margin)
        if 0 < h <= height and 0 < w <= width:
            return int(y * (height - h + 1)), int(x * (width - w + 1)), h, w
    h, w = min(height, round(width * max_aspect)), min(width, round(height * max_aspect))
    return (height - h) // 2, (width - w) // 2, h, w


def resized_crop(image: Tensor, box: tuple[int, int, int, int], out: Tensor, flip: bool) -> None:
    """uint8 `(3, H, W)` -> `out` `(3, side, side)`: bicubic with antialiasing, then mirrored where `flip`."""
    top, left, height, width = box
    part, side = image[None, :, top : top + height, left : left + width], out.shape[-1]
    # what F.interpolate calls, into the batch: a third faster than through a tensor of its own
    torch.ops.aten._upsample_bicubic2d_aa.out(part, [side, side], False, None, None, out=out[None])
    if flip:
        out.copy_(out.flip(-1))
