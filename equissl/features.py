"""Frozen features of chosen images of a split: each exactly once, shared over the ranks, in order on rank 0.

An image that cannot be decoded has a row of NaN: what is done on features leaves it out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

    Rank r of w takes the rows r, r + w, …; batches of one rank never hold another's. Of an image that cannot be decoded all values are
    NaN. Raises ValueError where those of another one are not finite, and what `tick` raises between two batches.
    """
    indices = np.asarray(indices, dtype=np.int64)
    mine = indices[world.rank :: world.world_size]
    per_rank = -(-len(indices) // world.world_size)
    num_batches = -(-per_rank // batch)  # the same on all ranks: `tick` may be a collective
    images = in_order(_Images(data, mine, geometry, batch), range(num_batches), num_workers)
    parts: dict[str, list[Tensor]] = {}
    with torch.inference_mode():
        for step in range(num_batches):
            tick(stage, step, num_batches, min(step * batch * world.world_size, len(indices)))
            chosen = mine[step * batch : (step + 1) * batch]
            pixels, is_bad = next(images)
            if len(chosen):
                for name, values in compute(pixels.to(world.device, non_blocking=True), chosen).items():
                    own = values.float().cpu().contiguous()  # no view, which would keep all tokens
                    if not (finite := own.isfinite().all(dim=1) | is_bad).all():
                        first = data.key(int(chosen[int(finite.int().argmin())]))
                        raise ValueError(
                            f"the features {name} of the image {first} of {data.folder} are not finite: are the weights whole?"
                        )
                    own[is_bad] = torch.nan
                    parts.setdefault(name, []).append(own)
    tick(stage, num_batches, num_batches, len(indices))
    found = {name: torch.cat(parts.pop(name)) for name in list(parts)}  # one by one: not all of them twice in memory
    return found if world.world_size == 1 else _gather(found, len(indices), world)


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


def _gather(own: dict[str, Tensor], num_rows: int, world: World) -> dict[str, Tensor]:
    """Join the ranks' rows on rank 0. A rank without rows still takes part: rank 0, which has some, says what is coming."""
    names: list[object] = [[(name, values.shape[1]) for name, values in own.items()]]
    dist.broadcast_object_list(names, src=0, group=world.cpu_group)
    joined: dict[str, Tensor] = {}
    per_rank = -(-num_rows // world.world_size)
    for name, width in names[0]:  # type: ignore[attr-defined]
        padded = torch.zeros(per_rank, width)
        if name in own:
            padded[: len(own[name])] = own[name]
        received = [torch.empty_like(padded) for _ in range(world.world_size)] if world.rank == 0 else None
        dist.gather(padded, received, dst=0, group=world.cpu_group)
        if received is not None:  # row i of rank r is row i · w + r of all
            joined[name] = torch.stack(received, dim=1).flatten(0, 1)[:num_rows]
    return joined
