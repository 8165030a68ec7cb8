"""Linear classification on frozen features: a grid of heads trained together (Oquab et al., 2023).

One forward pass feeds all heads: every learning rate × number of last blocks × with or without the mean patch. Heads that read the same
features are one product. Each begins with normal weights of deviation 0.01 and no bias, the same for every learning rate, and follows a
cosine from base_lr · batch / 256 to 0; so each is what it would be alone. An epoch is floor(N/B) batches. Features have no
batch norm: the backbone is in eval mode. Of a ResNet the pooled feature is all that is read.

`top1`              of the head chosen on held-out training images, scored on the validation split. It is chosen among heads that were
                    not trained on these; the same grid trained on all training images, in the same passes, has the one that is scored
`top1/best_on_val`  of the best head on the validation split itself: what public code reports. Optimistic by construction
`top1/cls`, …       as `top1`, among the heads that read the same
`mean_per_class`    of the same heads as `top1`

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
from equissl.classify import Reader, Tally, Variant, chunks, held_out
from equissl.config import Linear
from equissl.data.shards import ShardSet
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


def run(context: Context) -> dict[str, float]:
    """Raises ValueError for features that the encoder does not have, and for images without a label."""
    settings, task = context.settings, context.settings.task
    assert isinstance(task, Linear)
    train, val = (ShardSet(context.folder, split) for split in ("train", "val"))
    labels, truth = (torch.from_numpy(data.require_labels().copy()).to(context.device) for data in (train, val))
    reader = Reader(context, task, [Variant(*each) for each in product(task.blocks, task.mean_patch)])
    everything = np.arange(train.num_images)
    kept, held = held_out(train.num_images, task.held_out, settings.seed)
    grids = {"all": everything, "kept": kept} if len(held) else {"all": everything}
    x_val = reader.read(val, np.arange(val.num_images), reader.middle, "features of val")
    x_held = reader.read(train, held, reader.middle, "features of held-out train") if task.augment and len(held) else None
    x = None if task.augment else reader.read(train, everything, reader.middle, "features of train")
    heads = {
        name: Heads(reader.variants, reader.width, task, len(train.classes), len(rows), settings.seed, context.device)
        for name, rows in grids.items()
    }
    state = _State(context, heads)
    for epoch in range(context.of_rank_0(state.load()), task.epochs):
        if task.augment:
            crop = RandomCrop(reader.side, settings.seed, epoch)
            x = reader.read(train, everything, crop, f"features of train, epoch {epoch}", keep=False)
        if context.world.rank == 0:
            assert x is not None
            for name, rows in grids.items():
                _train(heads[name], x, labels, rows, epoch, context, f"heads on {name}")
            state.save(epoch + 1)
        if task.augment:
            context.rejoin()
    if context.world.rank != 0:
        return {}
    on_val = heads["all"].score(x_val, truth)
    on_held = None
    if len(held):
        where = torch.from_numpy(held)
        assert x is not None
        on_held = heads["kept"].score(x[where.to(x.device)] if x_held is None else x_held, labels[where.to(context.device)])
    state.remove()
    return _figures(context, heads["all"], on_val, on_held)


def _figures(context: Context, heads: Heads, on_val: Tally, on_held: Tally | None) -> dict[str, float]:
    top1, per_class, described = on_val.top1(), on_val.mean_per_class(), heads.described()
    best = int(top1.argmax())
    context.chosen.update(best_on_val=described[best], heads=[each | {"val": top1[i].item()} for i, each in enumerate(described)])
    at_best = {"top1/best_on_val": top1[best].item(), "mean_per_class/best_on_val": per_class[best].item()}
    if on_held is None:
        return at_best
    guide = on_held.top1()
    chosen = int(guide.argmax())
    context.chosen["held_out"] = described[chosen]
    for i, each in enumerate(context.chosen["heads"]):
        each["held_out"] = guide[i].item()
    result = {"top1": top1[chosen].item(), "mean_per_class": per_class[chosen].item()} | at_best
    size = len(heads.lrs)
    for number, variant in enumerate(heads.variants):
        first = number * size
        result[f"top1/{variant.name}"] = top1[first + int(guide[first : first + size].argmax())].item()
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
            for rows in chunks(x, self.device):
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
        stands_on = [PROTOCOL, context.weights_sha256, ShardSet(context.folder, "train").manifest_sha256, settings.seed]
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
