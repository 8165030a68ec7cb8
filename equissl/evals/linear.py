"""Linear classification on frozen features: a grid of heads trained together (Oquab et al., 2023).

One forward pass feeds all heads: every learning rate × number of last blocks × with or without the mean patch. Heads that read the same
features are one product. Each begins with normal weights of deviation 0.01 and no bias, the same for every learning rate, and follows a
cosine from base_lr · batch / 256 to 0; so each is what it would be alone. An epoch is floor(N/B) batches. Features have no
batch norm: the backbone is in eval mode. Of a ResNet the pooled feature is all that is read.

A head is chosen by the data set's main metric on its tuning split, or on held-out training images where it has none, among heads that
were not trained on these; the same grid trained on all training images and these, in the same passes, has the one that is scored.

`top1`, `mean_per_class`   of the head so chosen, on the reported split
`top1/best_on_REPORTED`    (val or test), `mean_per_class/…`: of the best head on the reported split itself, which is what public code
                           reports. Optimistic by construction
`top1/cls`, …              of the main metric: as above, among the heads that read the same

With `augment` each epoch is a forward pass over the training images as random crops, which is not cached; without, features of the
middle of each image are. After an epoch the heads are saved, at most once a minute, and a stopped evaluation goes on from there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from equissl import draws
from equissl.classify import Reader, Tally, Variant, chunks, to_choose_on
from equissl.config import Linear
from equissl.evals import Context
from equissl.features import RandomCrop
from equissl.files import write_atomic

log = logging.getLogger(__name__)

PROTOCOL = 1
MAIN = "top1"
HIGHER_IS_BETTER = True

STATE = "probe.safetensors"
SAVE_SECONDS = 60.0
MOMENTUM, BETAS, EPSILON = 0.9, (0.9, 0.999), 1e-8
INIT_STD = 0.01
LOGITS = 2**28  # scored at a time: 1 GiB


def run(context: Context) -> dict[str, float]:
    """Raises ValueError for features that the encoder does not have, and for images without a label."""
    settings, task = context.settings, context.settings.task
    assert isinstance(task, Linear)
    train, test = context.data.train, context.data.test
    reader = Reader(context, task, [Variant(*each) for each in product(task.blocks, task.mean_patch)])
    everything = np.arange(train.num_images)
    kept, held = to_choose_on(context.data, task.held_out, settings.seed)
    grids = {"all": everything, "kept": kept} if len(held) else {"all": everything}
    x_test, truth = reader.read(test, np.arange(test.num_images), reader.middle, f"features of {test.split}")
    x_held = labels_held = x = labels = torch.empty(0)
    if task.augment and len(held):
        x_held, labels_held = reader.read(train, held, reader.middle, f"features of {train.split}, to choose on")
    if not task.augment:
        x, labels = reader.read(train, everything, reader.middle, f"features of {train.split}")
    heads = {
        name: Heads(reader.variants, reader.width, task, len(train.classes), len(rows), settings.seed, context.device)
        for name, rows in grids.items()
    }
    state = _State(context, heads)
    for epoch in range(context.of_rank_0(state.load()), task.epochs):
        if task.augment:
            crop = RandomCrop(reader.side, settings.seed, epoch)
            x, labels = reader.read(train, everything, crop, f"features of {train.split}, epoch {epoch}", keep=False)
        if context.world.rank == 0:
            for name, rows in grids.items():
                _train(heads[name], x, labels, rows, epoch, context, f"heads on {name}")
            state.save(epoch + 1)
        if task.augment:
            context.rejoin()
    if context.world.rank != 0:
        return {}
    on_test = heads["all"].score(x_test, truth)
    on_held = None
    if len(held):
        if not task.augment:
            where = torch.from_numpy(held)
            x_held, labels_held = x[where.to(x.device)], labels[where.to(labels.device)]
        on_held = heads["kept"].score(x_held, labels_held)
    state.remove()
    return _figures(context, heads["all"], on_test, on_held)


def _figures(context: Context, heads: Heads, on_test: Tally, on_held: Tally | None) -> dict[str, float]:
    main, reported, described = context.data.main, context.data.reported, heads.described()
    scores = on_test.of(main)
    figures = {"top1": on_test.top1(), "mean_per_class": on_test.mean_per_class()}
    best = int(scores.argmax())
    context.chosen[f"best_on_{reported}"] = described[best]
    context.chosen["heads"] = [each | {reported: scores[i].item()} for i, each in enumerate(described)]
    at_best = {f"{metric}/best_on_{reported}": figures[metric][best].item() for metric in sorted(figures, key=lambda each: each != main)}
    if on_held is None:
        return at_best
    guide = on_held.of(main)
    chosen = int(guide.argmax())
    context.chosen["held_out"] = described[chosen]
    for i, each in enumerate(context.chosen["heads"]):
        each["held_out"] = guide[i].item()
    result = {metric: values[chosen].item() for metric, values in figures.items()} | at_best
    size = len(heads.lrs)
    for number, variant in enumerate(heads.variants):
        first = number * size
        result[f"{main}/{variant.name}"] = scores[first + int(guide[first : first + size].argmax())].item()
    return result


class Heads:
    """The grid: for each variant all learning rates. Trained on `num_rows` images."""

    def __init__(
        self, variants: list[Variant], width: int, task: Linear, num_classes: int, num_rows: int, seed: int, device: torch.device
    ) -> None:
        self.variants, self.width, self.task, self.num_classes, self.device = variants, width, task, num_classes, device
        self.batch = min(task.batch, num_rows)
        self.steps_per_epoch = num_rows // self.batch
        self.lrs = torch.tensor([lr * self.batch / 256 for lr in task.base_lrs], device=device)[:, None, None]
        self.parameters: list[tuple[Tensor, Tensor]] = []  # of each variant, (learning rates, classes, F) and (learning rates, classes, 1)
        for variant in variants:
            inputs = (variant.blocks + variant.mean_patch) * width
            weight = INIT_STD * torch.randn(num_classes, inputs, generator=torch.Generator().manual_seed(seed))
            weight = weight.to(device).repeat(len(task.base_lrs), 1, 1).requires_grad_()
            self.parameters.append((weight, torch.zeros(*weight.shape[:2], 1, device=device, requires_grad=True)))
        num_moments = 1 if task.optimizer == "sgd" else 2
        self.moments = [[torch.zeros_like(each) for _ in range(num_moments)] for pair in self.parameters for each in pair]

    def logits(self, x: Tensor) -> list[Tensor]:
        """`(b, ·)` -> of each variant `(b, learning rates, classes)`."""
        products = []
        for variant, (weight, bias) in zip(self.variants, self.parameters, strict=True):
            flat = F.linear(variant.of(x, self.width), weight.flatten(0, 1), bias.flatten())
            products.append(flat.view(len(x), *weight.shape[:2]))
        return products

    def step(self, x: Tensor, labels: Tensor, step: int) -> None:
        """One batch `(b, ·)`, `(b,)`."""
        size = len(self.lrs)
        loss = torch.zeros((), device=x.device)
        for logits in self.logits(x):  # a sum over heads: none sees another's gradient
            loss = loss + F.cross_entropy(logits.flatten(0, 1), labels.repeat_interleave(size), reduction="sum") / len(x)
        flat = [each for pair in self.parameters for each in pair]
        gradients = torch.autograd.grad(loss, flat)
        lrs = self.lrs * (1 + math.cos(math.pi * step / (self.task.epochs * self.steps_per_epoch))) / 2
        with torch.no_grad():
            for number, (value, gradient, moments) in enumerate(zip(flat, gradients, self.moments, strict=True)):
                weight_decay = 0.0 if number % 2 else self.task.weight_decay
                if self.task.optimizer == "sgd":
                    if weight_decay:
                        gradient.add_(value, alpha=weight_decay)
                    update = moments[0].mul_(MOMENTUM).add_(gradient)
                else:
                    moments[0].lerp_(gradient, 1 - BETAS[0])
                    moments[1].mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
                    corrections = [1 - beta ** (step + 1) for beta in BETAS]
                    root = torch.sqrt(moments[1], out=gradient).div_(math.sqrt(corrections[1])).add_(EPSILON)
                    update = torch.div(moments[0], root, out=gradient).div_(corrections[0])
                    if weight_decay:
                        update.add_(value, alpha=weight_decay)
                value.addcmul_(update, lrs, value=-1)

    def score(self, x: Tensor, truth: Tensor) -> Tally:
        tally = Tally(len(self.variants) * len(self.lrs), self.num_classes, self.device)
        with torch.no_grad():
            start = 0
            size = max(1, LOGITS // (len(self.variants) * len(self.lrs) * self.num_classes))
            for rows in (part for chunk in chunks(x, self.device) for part in torch.split(chunk, size)):
                predicted = torch.cat([logits.argmax(dim=2) for logits in self.logits(rows)], dim=1)
                tally.add(predicted, truth[start : start + len(rows)])
                start += len(rows)
        return tally

    def described(self) -> list[dict[str, Any]]:
        """Of each head, in the order of `score`."""
        return [
            {"blocks": variant.blocks, "mean_patch": variant.mean_patch, "base_lr": lr}
            for variant in self.variants
            for lr in self.task.base_lrs
        ]

    def state(self) -> dict[str, Tensor]:
        """By name; shared, not copied."""
        flat = [each.detach() for pair in self.parameters for each in pair]
        return {f"{i}": each for i, each in enumerate(flat)} | {
            f"{i}.{j}": each for i, moments in enumerate(self.moments) for j, each in enumerate(moments)
        }


def _train(heads: Heads, x: Tensor, labels: Tensor, rows: NDArray[np.int64], epoch: int, context: Context, stage: str) -> None:
    """One epoch on these rows of `x`."""
    order = rows[draws.permutation(len(rows), context.settings.seed, epoch, draws.Stream.PROBE + 5)]
    order_on_device = torch.from_numpy(order).to(context.device)
    num_steps = heads.steps_per_epoch
    for number in range(num_steps):
        step = epoch * num_steps + number
        context.tick(stage, step, heads.task.epochs * num_steps, step * heads.batch)
        chosen = order_on_device[number * heads.batch : (number + 1) * heads.batch]
        heads.step(x[chosen.to(x.device)].to(context.device).float(), labels[chosen], step)


class _State:
    """What a stopped evaluation goes on from: the heads after an epoch, on rank 0."""

    def __init__(self, context: Context, heads: dict[str, Heads]) -> None:
        self.heads = heads
        self.path = None if context.run_dir is None or context.world.rank != 0 else context.run_dir / STATE
        settings = context.settings
        stands_on = [PROTOCOL, context.weights_sha256, context.data.train.manifest_sha256, str(context.precision), settings.seed]
        self.key = hashlib.sha256(json.dumps([*stands_on, settings.task.model_dump_json()]).encode()).hexdigest()
        self.saved = time.monotonic()

    def load(self) -> int:
        """The epochs that are done; 0 where there is nothing, or something else."""
        if self.path is None or not self.path.is_file():
            return 0
        tensors = self._tensors()
        try:
            with safe_open(self.path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("key") != self.key:
                    return 0
                found = {name: file.get_tensor(name) for name in tensors}
            if _digest(found) != metadata["sha256"]:
                raise ValueError("it is not what was written")
            epochs = int(metadata["epochs"])
        except (SafetensorError, OSError, LookupError, ValueError) as error:
            log.warning("%s cannot be read: %s; the heads are trained from the start", self.path, error)
            return 0
        for name, tensor in tensors.items():
            tensor.copy_(found[name])
        return epochs

    def save(self, epochs: int) -> None:
        """What cannot be written is not kept: the evaluation goes on."""
        if self.path is None or time.monotonic() - self.saved < SAVE_SECONDS:
            return
        tensors = {name: tensor.cpu() for name, tensor in self._tensors().items()}
        try:
            write_atomic(self.path, save(tensors, {"key": self.key, "epochs": str(epochs), "sha256": _digest(tensors)}))
        except OSError as error:
            log.warning("the heads are not kept for an attempt that goes on: %s", error)
        self.saved = time.monotonic()

    def _tensors(self) -> dict[str, Tensor]:
        return {f"{name}/{part}": tensor for name, heads in self.heads.items() for part, tensor in heads.state().items()}

    def remove(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().numpy().data)
    return digest.hexdigest()
