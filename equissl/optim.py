"""AdamW on local shards, refusing an update that is not finite without the host waiting for the device."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.adamw import adamw

from equissl.config import AdamW as Settings
from equissl.distributed import World, local

EPS = 1e-8


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

    The blocks together, what else the backbone has (embeddings, the last norm), the split; else the part's own name, such as
    head or decoders.
    """
    parts = name.split(".")
    return next((part for part in ("blocks", "backbone", "split") if part in parts), parts[min(1, len(parts) - 1)])


class AdamW:
    """Loshchilov & Hutter 2019, for sharded parameters by name.

    No weight decay on biases, norms and what else has one dimension; gradients are clipped per parameter tensor. The number
    of updates is the step, so there is no other state than the two moments.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], settings: Settings, world: World) -> None:
        self.settings, self.world = settings, world
        self.parameters = dict(parameters)
        self.exp_avg = {name: torch.zeros_like(parameter.detach()) for name, parameter in parameters.items()}
        self.exp_avg_sq = {name: torch.zeros_like(parameter.detach()) for name, parameter in parameters.items()}

    def state(self) -> dict[str, Tensor]:
        """Tensors to save and to load into, by name."""
        moments = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        return {f"{kind}.{name}": moment for kind, by_name in moments.items() for name, moment in by_name.items()}

    @torch.no_grad()
    def step(self, step: int, lr: float, weight_decay: float, terms: Mapping[str, Tensor], frozen: Collection[str] = ()) -> Report:
        """Clip and update, unless a gradient or a term is not finite on any rank; gradients are freed.

        `terms`: this rank's scalars. `frozen`: parameters whose moments go on but which stay as they are. One all-reduce
        carries the norms and all ranks' terms; its result decides on the device.
        """
        names = [name for name, parameter in self.parameters.items() if parameter.grad is not None]
        gradients = {name: local(grad) for name in names if (grad := self.parameters[name].grad) is not None}
        norms = torch.stack(torch._foreach_norm(list(gradients.values()))).float()
        by_rank = norms.new_zeros(self.world.world_size, len(terms))
        by_rank[self.world.rank] = torch.stack([term.detach().float() for term in terms.values()])
        vector = torch.cat([norms.square() / self.world.num_replicas, by_rank.flatten()])
        dist.all_reduce(vector, group=self.world.group)
        applied = vector.isfinite().all().float()
        if self.settings.clip is not None:
            factors = (self.settings.clip / (vector[: len(names)].sqrt() + 1e-6)).clamp(max=1)
            torch._foreach_mul_(list(gradients.values()), list(factors.unbind()))
        held = [name for name in names if gradients[name].numel()]  # a rank has no part of a parameter with fewer rows than ranks
        for decays in (True, False):
            for is_frozen in (True, False):
                group = [name for name in held if (self._decays(name), name in frozen) == (decays, is_frozen)]
                # a frozen parameter is one without learning rate, its moments are warm when it is released
                self._update(group, gradients, step, 0.0 if is_frozen else lr, weight_decay if decays else 0.0, applied)
        for parameter in self.parameters.values():
            parameter.grad = None
        return Report(vector, names, list(terms), applied)

    def _decays(self, name: str) -> bool:
        return self.parameters[name].ndim > 1

    def _update(self, names: list[str], gradients: dict[str, Tensor], step: int, lr: float, weight_decay: float, applied: Tensor) -> None:
        if not names:
            return
        beta1, beta2 = self.settings.betas
        adamw(
            [local(self.parameters[name]) for name in names],
            [gradients[name] for name in names],
            [local(self.exp_avg[name]) for name in names],
            [local(self.exp_avg_sq[name]) for name in names],
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


@torch.no_grad()
def move_towards(targets: list[Tensor], sources: list[Tensor], part: Tensor) -> None:
    """targets += part · (sources - targets), on local shards; `part` is a scalar on the device."""
    moves = torch._foreach_sub([local(tensor) for tensor in sources], [local(tensor) for tensor in targets])
    torch._foreach_mul_(moves, part)
    torch._foreach_add_([local(tensor) for tensor in targets], moves)
