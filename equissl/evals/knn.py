"""Weighted k-nearest-neighbour classification on frozen features (Wu et al., CVPR 2018; as evaluated by DINO and iBOT).

Feature: the teacher's CLS token after the backbone's last norm, of a ResNet the pooled feature, `(D,)`, L2-normalised; D is the
backbone's width whatever the split of the pretraining was. Images: short side resized to 256/224 of the pretraining's side, middle cut
out. A training image among the k nearest (cosine) votes for its class with exp(similarity / T). The training images are those of the
official tuning split too, where there is one: nothing is chosen on it here.

`top1` and `mean_per_class` are those of k = 20, or of the smallest k where 20 is not among them: a fixed rule, no choice on the
images that are reported. `top1/k=…` gives every k.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from equissl import cache
from equissl.board import PrecisionRecall
from equissl.config import KNN
from equissl.evals import Context
from equissl.features import CentreCrop, Normed, undecodable

PROTOCOL = 1
MAIN = "top1"
HIGHER_IS_BETTER = True

HEADLINE_K = 20
CHUNK = 1024  # images compared at a time, fewer where there are many training images
SIMILARITIES = 2**28  # at a time: 1 GiB


def run(context: Context) -> dict[str, float]:
    """Raises ValueError where a k exceeds the number of training images, and for images without a label."""
    task = context.settings.task
    assert isinstance(task, KNN)
    sets = {"train": context.data.train, "test": context.data.test}
    if max(task.k) > sets["train"].num_images:
        raise ValueError(
            f"task.k is {list(task.k)}; {max(task.k)} neighbours of {sets['train'].num_images} training images cannot be found"
        )
    true_labels = {role: torch.tensor(data.require_labels()) for role, data in sets.items()}
    side = context.pretraining.side
    geometry, encoder = CentreCrop(round(side * 256 / 224), side), Normed(context.encoder, context.precision)
    features, labels = {}, {}
    for role, data in sets.items():
        found = cache.features(
            context,
            data,
            np.arange(data.num_images),
            geometry,
            "last 1",
            lambda images, _: encoder.last_blocks(images, 1),
            f"features of {data.split}",
        )
        if context.world.rank == 0:
            there = ~undecodable(found)
            features[role], labels[role] = (values[there].to(context.device) for values in (found["cls"], true_labels[role]))
    if context.world.rank != 0:
        return {}
    if max(task.k) > len(features["train"]):
        raise ValueError(f"task.k is {list(task.k)}, but only {len(features['train'])} training images can be decoded")
    num_classes = len(sets["train"].classes)
    correct: dict[int, list[Tensor]] = {k: [] for k in task.k}
    num_test = len(labels["test"])
    chunks = votes(features["train"], labels["train"], features["test"], task.k, task.temperature, num_classes)
    decisions, headline, done = PrecisionRecall(), _headline(task.k), 0
    for chunk in chunks:
        context.tick("neighbours", done, num_test, done)
        size = len(chunk[headline])
        truth = labels["test"][done : done + size]
        for k, scores in chunk.items():
            correct[k].append(scores.argmax(dim=1) == truth)
        decisions.add(chunk[headline] / chunk[headline].sum(dim=1, keepdim=True), truth)
        done += size
    decisions.write(context.run_dir)
    return metrics({k: torch.cat(parts) for k, parts in correct.items()}, labels["test"], num_classes)


def votes(
    train: Tensor, labels: Tensor, queries: Tensor, ks: Sequence[int], temperature: float, num_classes: int
) -> Iterator[dict[int, Tensor]]:
    """Train features `(N, D)` with labels `(N,)`, queries `(M, D)`: per chunk of queries the votes `(chunk, classes)` of each k."""
    train = F.normalize(train, dim=1)
    for chunk in torch.split(F.normalize(queries, dim=1), max(1, min(CHUNK, SIMILARITIES // len(train)))):
        similarity, neighbour = (chunk @ train.T).topk(max(ks), dim=1)  # sorted
        # relative to the nearest: exp(1 / 0.07) is 1.6 million, exp(1 / 0.01) would overflow
        weight = ((similarity - similarity[:, :1]) / temperature).exp()
        classes = labels[neighbour]
        yield {
            k: torch.zeros(len(chunk), num_classes, dtype=weight.dtype, device=weight.device).scatter_add_(1, classes[:, :k], weight[:, :k])
            for k in ks
        }


def metrics(correct: dict[int, Tensor], truth: Tensor, num_classes: int) -> dict[str, float]:
    """Per k whether each image `(M,)` is classified correctly -> the named figures, in [0, 1]."""
    headline = _headline(correct)
    present = torch.bincount(truth, minlength=num_classes)
    hits = torch.bincount(truth, weights=correct[headline].double(), minlength=num_classes)
    result = {
        "top1": correct[headline].double().mean().item(),
        "mean_per_class": (hits[present > 0] / present[present > 0]).mean().item(),
    }
    return result | {f"top1/k={k}": right.double().mean().item() for k, right in correct.items()}


def _headline(ks: Collection[int]) -> int:
    return HEADLINE_K if HEADLINE_K in ks else min(ks)
