"""What classifiers on frozen features share: what they read, which training images are held out, and their figures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from equissl import cache, draws
from equissl.config import OnFeatures
from equissl.data.labelled import Sets
from equissl.data.shards import Images
from equissl.evals import Context
from equissl.features import CentreCrop, Geometry, Normed, undecodable

CHUNK = 8192  # rows scored at a time
IGNORED = -100  # the label of an image that cannot be decoded; what torch's cross entropy leaves out


class Variant(NamedTuple):
    """What a classifier reads: the CLS tokens of so many last blocks, and the last one's mean patch."""

    blocks: int
    mean_patch: bool

    @property
    def name(self) -> str:
        return ("cls" if self.blocks == 1 else f"cls{self.blocks}") + ("_mean" if self.mean_patch else "")

    def of(self, x: Tensor, width: int) -> Tensor:
        """Columns of `Reader`'s `(b, ·)`, tokens of `width` each -> `(b, F)`."""
        tokens = x[:, : self.blocks * width]
        return torch.cat([tokens, x[:, -width:]], dim=1) if self.mean_patch else tokens


class Reader:
    """Frozen features of images, all that some variants need in one forward pass: CLS of the last blocks, last one first, and the mean
    patch, beside each other.

    Raises ValueError for more blocks than there are, for z_inv where the representation is not split, and for images without a label.
    """

    def __init__(self, context: Context, task: OnFeatures, variants: list[Variant]) -> None:
        facts, self.context, self.task = context.pretraining.backbone.facts, context, task
        if task.part == "inv" and context.encoder.split is None:
            raise ValueError("task.part is inv, but the pretraining's representation is not split: z_inv is all of it, give part backbone")
        if facts.kind == "resnet":  # its pooled feature is all there is
            variants = [Variant(1, False)]
        facts.require_blocks(variant.blocks for variant in variants)
        self.variants, self.num_blocks = list(dict.fromkeys(variants)), max(variant.blocks for variant in variants)
        self.width = facts.dim if task.part == "backbone" else context.pretraining.d_inv  # of a token
        self.encoder, self.side = Normed(context.encoder, context.precision), context.pretraining.side
        for data in (context.data.train, context.data.test):
            data.require_labels()
        self.middle = CentreCrop(round(self.side * 256 / 224), self.side)

    def read(self, data: Images, indices: NDArray[np.int64], geometry: Geometry, stage: str, keep: bool = True) -> tuple[Tensor, Tensor]:
        """`(n, blocks · width [+ width])` on rank 0, on the device where it takes at most half of what is free there, and classes `(n,)`
        on the device; elsewhere empty. `keep`: in the cache. Of images that cannot be decoded 0 and `IGNORED`."""
        found = cache.features(
            self.context,
            data,
            indices,
            geometry,
            f"last {self.num_blocks}",
            lambda images, _: self.encoder.last_blocks(images, self.num_blocks),
            stage,
            self.task.dtype,
            keep,
        )
        if not found:
            return torch.empty(0), torch.empty(0)
        bad, labels = undecodable(found), torch.from_numpy(data.require_labels()[indices])
        labels[bad] = IGNORED
        names = ["cls", *(f"cls-{back}" for back in range(1, self.num_blocks))]
        names += ["mean"] * any(variant.mean_patch for variant in self.variants)
        x = torch.cat([self._part(found.pop(name)) for name in names], dim=1)
        x[bad] = 0.0
        device = self.context.device
        if device.type == "cuda" and x.nbytes > torch.cuda.mem_get_info(device)[0] / 2:
            return x, labels.to(device)
        return x.to(device), labels.to(device)

    def _part(self, tokens: Tensor) -> Tensor:
        if self.task.part == "backbone":
            return tokens
        split = self.context.encoder.split
        assert split is not None
        with torch.no_grad():  # z_inv is linear: of the mean patch it is the mean of the patches'
            parts = [split.inv(rows.float().to(self.context.device)).to(tokens) for rows in torch.split(tokens, CHUNK)]
        return torch.cat(parts)


def to_choose_on(data: Sets, fraction: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of the training images: of those that are trained on until all is chosen, and of those that it is chosen on: the data
    set's own split for this, or as `held_out`."""
    if not data.num_tune:
        return held_out(data.train.num_images, fraction, seed)
    every = np.arange(data.train.num_images)
    return every[: -data.num_tune], every[-data.num_tune :]


def held_out(num_images: int, fraction: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of the training images that are kept and of those that are held out, ascending.

    Raises ValueError where a fraction above 0 is no image, or leaves none.
    """
    order, num_held = draws.permutation(num_images, seed, 0, draws.Stream.PROBE + 4), round(fraction * num_images)
    if fraction > 0 and not 0 < num_held < num_images:
        raise ValueError(f"task.held_out {fraction} of {num_images} training images is {num_held}: both parts need at least one")
    return np.sort(order[num_held:]), np.sort(order[:num_held])


def chunks(x: Tensor, device: torch.device) -> Iterator[Tensor]:
    for rows in torch.split(x, CHUNK):
        yield rows.to(device).float()


class Tally:
    """Counts of correct classifications of several classifiers `(K,)`, by class."""

    def __init__(self, num_classifiers: int, num_classes: int, device: torch.device) -> None:
        self.hits = torch.zeros(num_classifiers, num_classes, dtype=torch.float64, device=device)
        self.present = torch.zeros(num_classes, dtype=torch.float64, device=device)

    def add(self, predicted: Tensor, truth: Tensor) -> None:
        """Classes `(b, K)` and `(b,)`; those that are `IGNORED` do not count."""
        counted = truth != IGNORED
        predicted, truth = predicted[counted], truth[counted]
        self.hits.index_add_(1, truth, (predicted == truth[:, None]).T.double())
        self.present.index_add_(0, truth, torch.ones_like(truth, dtype=torch.float64))

    def of(self, metric: str) -> Tensor:
        """`(K,)`, "top1" or "mean_per_class"."""
        return self.mean_per_class() if metric == "mean_per_class" else self.top1()

    def top1(self) -> Tensor:
        """`(K,)`."""
        return self.hits.sum(dim=1) / self.present.sum()

    def mean_per_class(self) -> Tensor:
        """`(K,)`, over the classes that have an image."""
        there = self.present > 0
        return (self.hits[:, there] / self.present[there]).mean(dim=1)
