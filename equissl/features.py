"""Frozen features of chosen images of a split: each exactly once, shared over the ranks, in order on rank 0.

An image that cannot be decoded has a row of NaN: what is done on features leaves it out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from equissl import draws
from equissl.data.loader import TRIES, BadSample, crop_box, decode, in_order, resized_crop
from equissl.data.shards import Images
from equissl.photometry import normalise

if TYPE_CHECKING:
    from equissl.distributed import World
    from equissl.encoder import Backbone, Encoder, Features

Geometry = Callable[[Tensor, int], Tensor]  # a decoded image, uint8 (3, H, W), its index -> uint8 (3, S, S); must pickle
Compute = Callable[[Tensor, NDArray[np.int64]], dict[str, Tensor]]  # uint8 (b, 3, S, S) on the device, their indices -> (b, ·) each
Tick = Callable[[str, int, int, int], None]  # stage, step, of, images so far; raises Stopped on all ranks together


class CentreCrop:
    """Resize the short side to `resize` pixels (bicubic, antialiased), then cut the middle `side` pixels."""

    def __init__(self, resize: int, side: int) -> None:
        assert resize >= side
        self.resize, self.side = resize, side

    def __call__(self, image: Tensor, index: int = 0) -> Tensor:
        height, width = image.shape[1:]
        short = min(height, width)
        size = (round(height * self.resize / short), round(width * self.resize / short))
        resized = F.interpolate(image[None], size, mode="bicubic", antialias=True)[0]
        top, left = (size[0] - self.side) // 2, (size[1] - self.side) // 2
        return resized[:, top : top + self.side, left : left + self.side]

    def __str__(self) -> str:
        return f"centre {self.resize} {self.side}"


class RandomCrop:
    """A random box of 8 % to 100 % of the image's area, resized to `side` (bicubic, antialiased), mirrored half of the time: a function
    of (seed, number, the image's index)."""

    def __init__(self, side: int, seed: int, number: int) -> None:
        self.side, self.seed, self.number = side, seed, number

    def __call__(self, image: Tensor, index: int) -> Tensor:
        unit = draws.uniform(self.seed, self.number, [index], draws.Stream.PROBE + 3, 4 * TRIES + 1)[0]
        out = torch.empty(3, self.side, self.side, dtype=torch.uint8)
        resized_crop(image, crop_box(image.shape[1], image.shape[2], (0.08, 1.0), 1.0, unit[1:]), out, flip=bool(unit[0] < 0.5))
        return out

    def __str__(self) -> str:
        return f"random {self.side} {self.seed} {self.number}"


def extract(
    data: Images,
    indices: Sequence[int] | NDArray[np.int64],
    geometry: Geometry,
    compute: Compute,
    world: World,
    batch: int,
    num_workers: int,
    tick: Tick,
    stage: str,
) -> dict[str, Tensor]:
    """What `compute` yields for these images, float32 on the CPU, rows in the order of `indices`; on other ranks than 0 empty.

    Raises what `stream` does.
    """
    parts: dict[str, list[Tensor]] = {}
    for found in stream(data, indices, geometry, compute, world, batch, num_workers, tick, stage):
        for name in list(found):
            parts.setdefault(name, []).append(found.pop(name))
    return {name: torch.cat(parts.pop(name)) for name in list(parts)}  # one by one: not all of them twice in memory


def stream(
    data: Images,
    indices: Sequence[int] | NDArray[np.int64],
    geometry: Geometry,
    compute: Compute,
    world: World,
    batch: int,
    num_workers: int,
    tick: Tick,
    stage: str,
) -> Iterator[dict[str, Tensor]]:
    """As `extract`, batch after batch: on rank 0 the next rows in the order of `indices`, on other ranks nothing.

    Rank r of w takes the rows r, r + w, …; batches of one rank never hold another's. Of an image that cannot be decoded all values are
    NaN. Raises ValueError where those of another one are not finite, and what `tick` raises between two batches.
    """
    indices = np.asarray(indices, dtype=np.int64)
    mine = indices[world.rank :: world.world_size]
    per_rank = -(-len(indices) // world.world_size)
    num_batches = -(-per_rank // batch)  # the same on all ranks: `tick` may be a collective
    images = _on_device(in_order(_Images(data, mine, geometry, batch), range(num_batches), num_workers), world.device)
    gather = _Gather(world)
    ahead: _Fetched | None = None  # on its way from the device, which has the next batch to do meanwhile
    for step in range(num_batches):
        tick(stage, step, num_batches, min(step * batch * world.world_size, len(indices)))
        chosen = mine[step * batch : (step + 1) * batch]
        (pixels, is_bad), found = next(images), {}
        if len(chosen):
            with torch.inference_mode():
                found = compute(pixels, chosen)
        num_rows = min(batch * world.world_size, len(indices) - step * batch * world.world_size)
        before, ahead = ahead, _Fetched(found, num_rows, data, chosen, is_bad)
        del pixels, found
        if before is not None:
            yield gather(before)
        before = None
    if ahead is not None:
        yield gather(ahead)
    tick(stage, num_batches, num_batches, len(indices))


def _on_device(batches: Iterator[tuple[Tensor, Tensor]], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """The pixels of each on the device; on a GPU one ahead, copied on a stream of its own while another is computed with."""
    if device.type != "cuda":
        yield from batches
        return
    copies = torch.cuda.Stream(device)
    ahead: tuple[Tensor, Tensor] | None = None
    for pixels, is_bad in batches:
        with torch.cuda.stream(copies):
            moved = pixels.to(device, non_blocking=True)
        if ahead is not None:
            yield ahead
        torch.cuda.current_stream(device).wait_stream(copies)
        moved.record_stream(torch.cuda.current_stream(device))
        ahead = moved, is_bad
    if ahead is not None:
        yield ahead


class _Fetched:
    """Features of the `chosen` images of a batch on their way to the CPU, float32; `num_rows` of all ranks together."""

    def __init__(self, found: dict[str, Tensor], num_rows: int, data: Images, chosen: NDArray[np.int64], is_bad: Tensor) -> None:
        self.num_rows, self._data, self._chosen, self._is_bad = num_rows, data, chosen, is_bad
        self._parts = {name: _to_cpu(values.float().contiguous()) for name, values in found.items()}  # no view, which would keep all tokens
        devices = {values.device for values in found.values() if values.is_cuda}
        self._done = [torch.cuda.current_stream(device).record_event() for device in devices]

    def wait(self) -> dict[str, Tensor]:
        """Handed over: nothing is held here any more. Raises ValueError for features that are not finite."""
        for event in self._done:
            event.synchronize()
        parts, self._parts = self._parts, {}
        with torch.inference_mode():
            for name, values in parts.items():
                if not (finite := values.isfinite().all(dim=1) | self._is_bad).all():
                    first = self._data.key(int(self._chosen[int(finite.int().argmin())]))
                    raise ValueError(
                        f"the features {name} of the image {first} of {self._data.folder} are not finite: are the weights whole?"
                    )
                values[self._is_bad] = torch.nan
        return parts


def _to_cpu(values: Tensor) -> Tensor:
    if not values.is_cuda:
        return values
    target = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)  # pages are kept and used again
    return target.copy_(values, non_blocking=True)


def undecodable(found: dict[str, Tensor]) -> Tensor:
    """Which rows are of images that cannot be decoded, bool `(n,)`."""
    return next(iter(found.values()))[:, 0].isnan()


class Normed:
    """CLS and mean patch token of an encoder's backbone, after its last norm; of a ResNet its pooled feature only. The forward pass is
    in `precision`."""

    def __init__(self, encoder: Encoder, precision: torch.dtype = torch.float32) -> None:
        self.encoder, self.precision = encoder.eval(), precision

    def cls_and_mean(self, images: Tensor) -> Tensor:
        """uint8, or float in [0, 1], `(b, 3, S, S)` -> `(b, 2 D)`; `(b, D)` where there are no patches."""
        features = self._features(images)
        return _with_mean(features.cls, features.patches)

    def part(self, images: Tensor, part: str) -> Tensor:
        """As `cls_and_mean` of "backbone" or of "inv", z_inv: `(b, 2 d_inv)`; of "equi", z_equi, the mean patch: `(b, d_equi)`.

        Raises ValueError where the encoder has no such part.
        """
        if part == "backbone":
            return self.cls_and_mean(images)
        features = self._features(images)
        if features.split is None:
            raise ValueError(f"task.part is {part}, but the encoder's representation is not split: give part backbone")
        if part == "inv":
            return _with_mean(features.inv_cls, features.inv_patches)
        assert features.equi is not None
        return features.equi.mean(dim=1)

    def last_blocks(self, images: Tensor, num_blocks: int) -> dict[str, Tensor]:
        """uint8, or float in [0, 1], `(b, 3, S, S)` -> CLS `(b, D)` of each of the last blocks, all through the last norm: `cls` is the
        last one's, `cls-1` that of the block before, …; and `mean`, the last one's mean patch, where there are patches."""
        if num_blocks == 1:
            features = self._features(images)
            found, patches = {"cls": features.cls}, features.patches
        else:
            backbone: Backbone = self.encoder.backbone  # type: ignore[assignment]  # a ResNet has no other tokens than the last ones
            with self._autocast(images):
                tokens = backbone.last_blocks(_normalised(images), num_blocks)
            found = {f"cls-{back}" if back else "cls": each[:, 0] for back, each in enumerate(reversed(tokens))}
            patches = tokens[-1][:, 1:]
        return found | {"mean": patches.mean(dim=1)} if patches.shape[1] else found

    def _features(self, images: Tensor) -> Features:
        with self._autocast(images):
            features: Features = self.encoder(_normalised(images), None)
        return features

    def _autocast(self, images: Tensor) -> torch.autocast:
        return torch.autocast(images.device.type, self.precision, enabled=self.precision != torch.float32)


def _with_mean(cls: Tensor, patches: Tensor) -> Tensor:
    return torch.cat([cls, patches.mean(dim=1)], dim=1) if patches.shape[1] else cls


def _normalised(images: Tensor) -> Tensor:
    return normalise(images.float() / 255 if images.dtype == torch.uint8 else images)


class _Images(Dataset[tuple[Tensor, Tensor]]):
    """Batch number -> uint8 `(b, 3, S, S)`, black where an image cannot be decoded; bool `(b,)`, where that is so."""

    def __init__(self, data: Images, indices: NDArray[np.int64], geometry: Geometry, batch: int) -> None:
        self.data, self.indices, self.geometry, self.batch = data, indices, geometry, batch

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        chosen = self.indices[number * self.batch : (number + 1) * self.batch].tolist()
        pixels, bad = [], []
        for i in chosen:
            try:
                image = decode(self.data, i)
            except BadSample:
                image = None
            bad.append(image is None)
            pixels.append(self.geometry(torch.zeros(3, 64, 64, dtype=torch.uint8) if image is None else image, i))
        return (torch.stack(pixels) if pixels else torch.empty(0)), torch.tensor(bad, dtype=torch.bool)


class _Gather:
    """Joins the ranks' rows of a batch on rank 0. A rank without rows still takes part: rank 0, which has some, says what is coming."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.widths: list[tuple[str, int]] | None = None

    def __call__(self, fetched: _Fetched) -> dict[str, Tensor]:
        own, world = fetched.wait(), self.world
        if world.world_size == 1:
            return own
        if self.widths is None:
            widths: list[object] = [[(name, values.shape[1]) for name, values in own.items()]]
            dist.broadcast_object_list(widths, src=0, group=world.cpu_group)
            self.widths = widths[0]  # type: ignore[assignment]
            assert self.widths is not None
        joined: dict[str, Tensor] = {}
        for name, width in self.widths:
            padded = torch.zeros(-(-fetched.num_rows // world.world_size), width)
            values = own.pop(name, None)
            if values is not None:
                padded[: len(values)] = values
            received = [torch.empty_like(padded) for _ in range(world.world_size)] if world.rank == 0 else None
            dist.gather(padded, received, dst=0, group=world.cpu_group)
            if received is not None:  # row i of rank r is row i · w + r of all
                joined[name] = torch.stack(received, dim=1).flatten(0, 1)[: fetched.num_rows]
        return joined
