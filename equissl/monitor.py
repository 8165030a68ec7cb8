"""What the encoder that leaves the run is like while it learns: collapse, and a nearest-neighbour classification on the way.

Measured at the steps that are logged, on the whole batch: the same on any number of ranks, and after a resume. Nothing waits for the
device. The figures, each in [0, 1] but for the rank and what methods measure:

- `feature_std`: standard deviation of the L2-normalised features over the batch, mean over the dimensions, times sqrt(dim): 0 where
  all images have the same features, 1 where these fill the sphere;
- `target_entropy`: mean entropy of the teacher's targets, `mean_target_entropy`: entropy of their mean, both as parts of the largest
  possible, log(prototypes). The second near 0: one prototype for all images; the first near 1: targets that say nothing;
- what the method itself measures (`Watched.measured`), such as EquiMod's `equivariance_absolute` and `equivariance_relative`;
- `effective_rank`: exp of the entropy of the features' singular values (Roy & Vetterli, EUSIPCO 2007), of at most 512 images;
- `knn_top1`: accuracy of the weighted k-NN of `evals.knn` with k = 20. The neighbours are the newest views of a bank of images that
  earlier logged steps have seen, those of the batch's own images left out; features are of augmented views, under the teacher of
  their step. Only for data with classes.

The last two are dearer, and measured every `monitor_every` steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from equissl.config import BANK, PretrainConfig
from equissl.data.loader import Batch
from equissl.distributed import World, send
from equissl.evals.knn import votes
from equissl.methods import Watched
from equissl.optim import Fetch

NEIGHBOURS, TEMPERATURE = 20, 0.07
RANK_IMAGES = 512  # the eigenvalues of a matrix of this size: 20 ms on the host


def is_due(step: int, every: int, num_steps: int) -> bool:
    """Whether the numbers of this step are logged."""
    return step == num_steps or step % every == 0


class Observed(NamedTuple):
    """The figures of one step, on their way to the host."""

    names: list[str]
    values: Fetch  # (names,)
    products: Fetch | None  # (n, n) float64, symmetric: its eigenvalues are the features' squared singular values

    def read(self) -> dict[str, float]:
        """Those that there are: no images with neighbours, no accuracy."""
        found = dict(zip(self.names, self.values.read().tolist(), strict=True))
        if self.products is not None:
            found["effective_rank"] = effective_rank(self.products.read())
        return {name: value for name, value in found.items() if math.isfinite(value)}


class Monitor:
    """One per rank; `observe` is collective. The bank is the same on all ranks and part of the run's state."""

    def __init__(self, config: PretrainConfig, world: World, num_steps: int, num_images: int, num_classes: int) -> None:
        """`num_classes`: 0 where there are no labels."""
        self.config, self.world, self.num_steps, self.num_classes = config, world, num_steps, num_classes
        self._bank: dict[str, Tensor] = {}
        if num_classes > 1:
            size, device = min(BANK, num_images), world.device
            self._bank = {
                "features": torch.zeros(size, config.backbone.facts.dim, dtype=torch.float16, device=device),
                "image": torch.full((size,), -1, device=device),
                "label": torch.full((size,), -1, device=device),
            }

    def state(self) -> dict[str, Tensor]:
        """Tensors to save and to load into, by name."""
        return {f"monitor.{name}": tensor for name, tensor in self._bank.items()}

    @torch.no_grad()
    def observe(self, step: int, parts: Sequence[Watched], batch: Batch) -> Observed | None:
        """On rank 0 the figures of the batch with these parts; None on the others and where nothing is logged."""
        config, every = self.config, self.config.log_every
        if not is_due(step, every, self.num_steps):
            return None
        dear = step == self.num_steps or step // config.monitor_every > (step - every) // config.monitor_every
        features = F.normalize(self._of_all_ranks(torch.cat([part.features for part in parts]).float()), dim=1)
        found = {"feature_std": features.std(dim=0, correction=0).mean() * math.sqrt(features.shape[1])}
        targets = [part.targets for part in parts if part.targets is not None]
        if targets:
            found |= self._entropies(torch.cat(targets))
        if measured := {name: torch.stack([part.measured[name] for part in parts]).mean() for name in parts[0].measured}:
            means = torch.stack(list(measured.values())) / self.world.world_size
            dist.all_reduce(means, group=self.world.group)
            found |= dict(zip(measured, means.unbind(), strict=True))
        if self._bank:
            image, label = self._of_all_ranks(send(torch.stack([batch.index, batch.label], dim=1), self.world.device)).unbind(1)
            if dear and self.world.rank == 0:
                found["knn_top1"] = self._accuracy(features, image, label)
            for name, new in (("features", features), ("image", image), ("label", label)):
                old = self._bank[name]
                old.copy_(torch.cat([new.to(old.dtype), old])[: len(old)])
        if self.world.rank != 0:
            return None
        return Observed(list(found), Fetch(torch.stack(list(found.values()))), Fetch(_products(features)) if dear else None)

    def _of_all_ranks(self, mine: Tensor) -> Tensor:
        """Rows in the order of the global batch."""
        rows = mine.new_empty(self.world.world_size * len(mine), *mine.shape[1:])
        dist.all_gather_into_tensor(rows, mine, group=self.world.group)
        return rows

    def _entropies(self, targets: Tensor) -> dict[str, Tensor]:
        """Of probabilities `(t, prototypes)`."""
        each = torch.special.entr(targets).sum(dim=1).mean()
        means = torch.cat([targets.mean(dim=0), each[None]]) / self.world.world_size
        dist.all_reduce(means, group=self.world.group)
        largest = math.log(targets.shape[1])
        return {"target_entropy": means[-1] / largest, "mean_target_entropy": torch.special.entr(means[:-1]).sum() / largest}

    def _accuracy(self, features: Tensor, image: Tensor, label: Tensor) -> Tensor:
        """NaN where no image has a label and a neighbour."""
        bank = self._bank
        unseen = (bank["label"] >= 0) & ~(bank["image"][:, None] == image[None]).any(dim=1)
        others = bank["features"].float() * unseen[:, None]
        classes = torch.where(unseen, bank["label"], self.num_classes)  # one class more, whose votes are not counted
        k = min(NEIGHBOURS, len(others))
        chunks = votes(others, classes, features, [k], TEMPERATURE, self.num_classes + 1)
        scores = torch.cat([chunk[k] for chunk in chunks])[:, :-1]
        counted = (label >= 0) & (scores.sum(dim=1) > 0)
        return ((scores.argmax(dim=1) == label) & counted).sum() / counted.sum()


def _products(features: Tensor) -> Tensor:
    """Of rows or of columns, whichever are fewer; in double precision, for squares lose half of the digits."""
    some = features[:RANK_IMAGES].double()
    return some @ some.T if len(some) < some.shape[1] else some.T @ some


def effective_rank(products: Tensor) -> float:
    """Of a matrix with these products of its rows, or of its columns, `(n, n)`; NaN for a matrix of zeros."""
    if not products.isfinite().all():
        return math.nan
    singular = torch.linalg.eigvalsh(products).clamp(min=0).sqrt()
    return float(torch.special.entr(singular / singular.sum()).sum().exp())
