"""Optimizers on local shards, refusing an update that is not finite without the host waiting for the device."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from equissl import config
from equissl.distributed import World, local, send

EPS = 1e-8
BEFORE_BLOCKS = ("pos_embed", "cls_token", "mask_token")


class Fetch:
    """A tensor on its way to the host, which does not wait for it before `read`. It must not be written to any more."""

    def __init__(self, tensor: Tensor) -> None:
        self._host, self._copied = tensor, None
        if tensor.device.type == "cuda":
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> Tensor:
        """On the CPU; waits until the device is through with what made it."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host


@dataclass(frozen=True)
class Numbers:
    """What a step reported, on the host."""

    terms: dict[str, float]  # means over the ranks
    by_rank: list[dict[str, float]]  # each rank's terms
    grad_norm: float  # L2, of all parameters, before clipping
    grad_norms: dict[str, float]  # the same of each module, as `module_of` names them
    refused: str | None  # why the update was not applied: rank and term, or the parameter, whose rank is not known


class Report:
    """The numbers of one step, on their way to the host; `applied` is 1 on the device where the update was, else 0."""

    def __init__(self, vector: Tensor, names: list[str], terms: list[str], applied: Tensor) -> None:
        self.applied = applied
        self._names, self._terms, self._vector = names, terms, Fetch(vector)

    def read(self) -> Numbers:
        """Waits for this step to be through on the device."""
        numbers = self._vector.read().tolist()
        squares, values, width = numbers[: len(self._names)], numbers[len(self._names) :], len(self._terms)
        by_rank = [dict(zip(self._terms, values[at : at + width], strict=True)) for at in range(0, len(values), width)]
        means = {term: sum(rank[term] for rank in by_rank) / len(by_rank) for term in self._terms}
        by_module: dict[str, float] = {}
        for name, square in zip(self._names, squares, strict=True):
            by_module[module_of(name)] = by_module.get(module_of(name), 0.0) + square
        norms = {module: math.sqrt(square) for module, square in by_module.items()}
        return Numbers(means, by_rank, math.sqrt(sum(squares)), norms, self._refusal(squares, by_rank))

    def _refusal(self, squares: list[float], by_rank: list[dict[str, float]]) -> str | None:
        for rank, values in enumerate(by_rank):
            for term, value in values.items():
                if not math.isfinite(value):
                    return f"the term {term} is {value} on rank {rank}"
        bad = [name for name, square in zip(self._names, squares, strict=True) if not math.isfinite(square)]
        if not bad:
            return None
        # the norms are summed over the ranks before anybody sees them
        return f"the gradient of {bad[0]} is not finite, on which rank is not known ({len(bad)} of {len(squares)} parameters)"


def module_of(name: str) -> str:
    """The part of the model that a parameter belongs to: `student.encoder.backbone.vit.blocks.3.attn.qkv.weight` -> `blocks`.

    The blocks together, what else the backbone has (embeddings, the stem, the last norm), the split; else the part's own name, such
    as head or decoders.
    """
    parts = name.split(".")
    if "resnet" in parts and _BLOCK.search(name):
        return "blocks"
    return next((part for part in ("blocks", "backbone", "split") if part in parts), parts[min(1, len(parts) - 1)])


def part_of(name: str) -> str:
    """The network part that a gradient is clipped with: `student.encoder.backbone.vit.norm.bias` -> `student.encoder`."""
    return ".".join(name.split(".")[:2])


_BLOCK = re.compile(r"\.(?:blocks|resnet\.layer(?P<stage>\d+))\.(?P<block>\d+)\.")


def lr_factors(names: Iterable[str], layer_decay: float, patch_embed_lr: float) -> dict[str, float]:
    """The part of the learning rate for each parameter (BEiT, Bao et al. 2022; DINOv2): of `depth` blocks number i, from 0 on,
    has `layer_decay ** (depth - i)`, the embeddings and a ResNet's stem as a block before the first, what comes after the blocks 1."""
    names = list(names)
    places = {name: (int(found["stage"] or 0), int(found["block"])) for name in names if (found := _BLOCK.search(name))}
    in_order = sorted(set(places.values()))  # a ResNet's begin with 0 in each stage
    blocks = {name: in_order.index(place) if place[0] else place[1] for name, place in places.items()}
    depth = 1 + max(blocks.values(), default=-1)
    factors = {}
    for name in names:
        is_before = name.endswith(BEFORE_BLOCKS) or ".patch_embed." in name or ".resnet." in name
        number = blocks.get(name, -1 if is_before else depth)
        factors[name] = layer_decay ** (depth - number) * (patch_embed_lr if ".patch_embed." in name else 1.0)
    return factors


class Optimizer(ABC):
    """Of sharded parameters by name. No weight decay on biases, norms and what else has one dimension.

    The number of updates is the step, so there is no other state than one tensor of each kind in `state_names` per parameter.
    """

    state_names: tuple[str, ...] = ()

    def __init__(self, parameters: Mapping[str, nn.Parameter], settings: Any, world: World) -> None:
        """`settings`: as `config` has them for this optimizer."""
        self.settings, self.world = settings, world
        self.parameters = dict(parameters)
        self.moments = {
            kind: {name: torch.zeros_like(parameter.detach()) for name, parameter in parameters.items()} for kind in self.state_names
        }
        self._factors = lr_factors(parameters, settings.layer_decay, settings.patch_embed_lr)
        self._clipped_together: tuple[tuple[str, ...], Tensor] | None = None

    def state(self) -> dict[str, Tensor]:
        """Tensors to save and to load into, by name."""
        return {f"{kind}.{name}": moment for kind, by_name in self.moments.items() for name, moment in by_name.items()}

    @torch.no_grad()
    def step(self, step: int, lr: float, weight_decay: float, terms: Mapping[str, Tensor], frozen: Collection[str] = ()) -> Report:
        """Clip and update, unless a gradient or a term is not finite on any rank; gradients are freed.

        `terms`: this rank's scalars. `frozen`: parameters whose moments go on but which stay as they are. One all-reduce
        carries the norms and all ranks' terms; its result decides on the device.
        """
        names = [name for name, parameter in self.parameters.items() if parameter.grad is not None]
        gradients = {name: local(grad) for name in names if (grad := self.parameters[name].grad) is not None}
        decays = {name: weight_decay if self.parameters[name].ndim > 1 else 0.0 for name in names}
        of_gradients = torch._foreach_norm(list(gradients.values()))
        norms = torch.stack([*of_gradients, *self._more_norms(gradients, decays)]).float()
        by_rank = norms.new_zeros(self.world.world_size, len(terms))
        by_rank[self.world.rank] = torch.stack([term.detach().float() for term in terms.values()])
        vector = torch.cat([norms.square() / self.world.num_replicas, by_rank.flatten()])
        dist.all_reduce(vector, group=self.world.group)
        applied = vector.isfinite().all().float()
        squares, others, told = vector.split([len(names), len(norms) - len(names), by_rank.numel()])
        self._scale(gradients, squares, others)
        held = [name for name in names if gradients[name].numel()]  # a rank has no part of a parameter with fewer rows than ranks
        groups: dict[tuple[float, float], list[str]] = {}
        for name in held:
            # a frozen parameter is one without learning rate, its moments are warm when it is released
            groups.setdefault((0.0 if name in frozen else lr * self._factors[name], decays[name]), []).append(name)
        for (of_group, decay), group in groups.items():
            self._update(group, gradients, step, of_group, decay, applied)
        for parameter in self.parameters.values():
            parameter.grad = None
        return Report(torch.cat([squares, told]), names, list(terms), applied)

    def _more_norms(self, gradients: dict[str, Tensor], decays: dict[str, float]) -> list[Tensor]:
        """Norms of shards of which `_scale` needs those of the whole tensors, besides the gradients' own."""
        return []

    def _scale(self, gradients: dict[str, Tensor], squares: Tensor, others: Tensor) -> None:
        """Change the gradients by what is known of whole tensors: squared norms of the gradients, and those of `_more_norms`."""
        if self.settings.clip is None:
            return
        if self.settings.clip_by != "tensor":
            squares = torch.where(self._same_part(tuple(gradients)), squares, 0.0).sum(dim=1)
        factors = (self.settings.clip / (squares.sqrt() + 1e-6)).clamp(max=1)
        torch._foreach_mul_(list(gradients.values()), list(factors.unbind()))

    def _same_part(self, names: tuple[str, ...]) -> Tensor:
        """`(n, n)`: whose gradients are clipped together. The auxiliary's never with others: at lambda 0 it may not have influence."""
        if self._clipped_together is None or self._clipped_together[0] != names:
            whole = self.settings.clip_by == "global"
            parts = [name.startswith("auxiliary.") if whole else part_of(name) for name in names]
            same = torch.tensor([[mine == other for other in parts] for mine in parts])
            self._clipped_together = names, send(same, self.world.device)
        return self._clipped_together[1]

    @abstractmethod
    def _update(self, names: list[str], gradients: dict[str, Tensor], step: int, lr: float, weight_decay: float, applied: Tensor) -> None:
        """Of the shards of these parameters, of which there is at least one; nothing changes where `applied` is 0."""


class AdamW(Optimizer):
    """Loshchilov & Hutter 2019."""

    state_names = ("exp_avg", "exp_avg_sq")

    def _update(self, names: list[str], gradients: dict[str, Tensor], step: int, lr: float, weight_decay: float, applied: Tensor) -> None:
        beta1, beta2 = self.settings.betas
        adamw(
            [local(self.parameters[name]) for name in names],
            [gradients[name] for name in names],
            [local(self.moments["exp_avg"][name]) for name in names],
            [local(self.moments["exp_avg_sq"][name]) for name in names],
            [],
            list(torch.full((len(names),), float(step), device=applied.device).unbind()),  # updates before this one
            fused=True,  # the one that takes `found_inf`
            found_inf=1 - applied,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=lr,
            weight_decay=weight_decay,
            eps=EPS,
            maximize=False,
        )


class SGD(Optimizer):
    """v <- momentum · v + g + weight decay · p; p <- p - lr · v; with Nesterov's momentum g + weight decay · p + momentum · v for v."""

    state_names = ("momentum",)

    def _update(self, names: list[str], gradients: dict[str, Tensor], step: int, lr: float, weight_decay: float, applied: Tensor) -> None:
        sgd(
            [local(self.parameters[name]) for name in names],
            [gradients[name] for name in names],
            [local(self.moments["momentum"][name]) for name in names],
            fused=True,  # the one that takes `found_inf`
            found_inf=1 - applied,
            momentum=self.settings.momentum,
            nesterov=isinstance(self.settings, config.SGD) and self.settings.nesterov,
            dampening=0.0,
            lr=lr,
            weight_decay=weight_decay,
            maximize=False,
        )


class LARS(SGD):
    """You et al. 2017, as SimCLR and BYOL use it: v <- momentum · v + trust · |p| / |u| · u with u = g + weight decay · p; p <- p - lr · v.

    Norms are of whole tensors. Biases, norms and what else has one dimension, and tensors with a |p| or |u| of 0: v <- momentum · v + u.
    """

    def _more_norms(self, gradients: dict[str, Tensor], decays: dict[str, float]) -> list[Tensor]:
        """Turns gradients into u."""
        tensors = [local(self.parameters[name]) for name in gradients if self.parameters[name].ndim > 1]
        if not tensors:
            return []
        moves = [gradients[name] for name in gradients if self.parameters[name].ndim > 1]
        torch._foreach_add_(moves, torch._foreach_mul(tensors, max(decays.values())))
        return [*torch._foreach_norm(moves), *torch._foreach_norm(tensors)]

    def _scale(self, gradients: dict[str, Tensor], squares: Tensor, others: Tensor) -> None:
        moves = [gradients[name] for name in gradients if self.parameters[name].ndim > 1]
        if moves:
            of_moves, of_tensors = others.sqrt().chunk(2)
            ratios = self.settings.trust * of_tensors / of_moves
            torch._foreach_mul_(moves, list(torch.where((of_moves > 0) & (of_tensors > 0), ratios, 1.0).unbind()))

    def _update(self, names: list[str], gradients: dict[str, Tensor], step: int, lr: float, weight_decay: float, applied: Tensor) -> None:
        super()._update(names, gradients, step, lr, 0.0, applied)  # it is in u


OPTIMIZERS: dict[type[config.Optimizer], type[Optimizer]] = {config.AdamW: AdamW, config.SGD: SGD, config.LARS: LARS}


def get(parameters: Mapping[str, nn.Parameter], settings: config.Optimizer, world: World) -> Optimizer:
    """The optimizer of these settings."""
    return OPTIMIZERS[type(settings)](parameters, settings, world)


@torch.no_grad()
def move_towards(targets: list[Tensor], sources: list[Tensor], part: Tensor) -> None:
    """targets += part · (sources - targets), on local shards; `part` is a scalar on the device."""
    moves = torch._foreach_sub([local(tensor) for tensor in sources], [local(tensor) for tensor in targets])
    torch._foreach_mul_(moves, part)
    torch._foreach_add_([local(tensor) for tensor in targets], moves)
