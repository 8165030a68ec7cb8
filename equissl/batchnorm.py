"""Batch normalisation over the joined batch of all ranks (Ioffe & Szegedy 2015), under FSDP and on CPUs, where torch's own refuses."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from equissl import recompute
from equissl.distributed import World, gather

EPS, MOMENTUM = 1e-5, 0.1  # torch's


class Norm(nn.Module):
    """What batch norms share: parameters, and moving averages of the statistics, which are state and used after `eval()` only.

    Statistics are float32 whatever the precision of the computation. Every rank has equally many rows.
    """

    initial_weight: float = 1.0
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, dim: int, affine: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim)) if affine else None
        self.bias = nn.Parameter(torch.empty(dim)) if affine else None
        self.register_buffer("running_mean", torch.empty(dim))
        self.register_buffer("running_var", torch.empty(dim))
        self._seen: list[tuple[Tensor, Tensor]] = []  # mean and unbiased variance of the batches since `move`

    @torch.no_grad()
    def reset(self) -> None:
        self.running_mean.zero_()
        self.running_var.fill_(1.0)

    @torch.no_grad()
    def move(self, applied: Tensor) -> None:
        """Take the batches since the last call into the averages, unless `applied` is 0 on the device: then forget them."""
        for mean, var in self._seen:
            for average, new in ((self.running_mean, mean), (self.running_var, var)):
                average.copy_(torch.where(applied.bool(), average.lerp(new, MOMENTUM), average))
        self._seen.clear()


class BatchNorm(Norm):
    """Of the last dimension, with the statistics of the one before it."""

    def __init__(self, dim: int, world: World, affine: bool = True) -> None:
        super().__init__(dim, affine)
        self.world = world

    def forward(self, x: Tensor) -> Tensor:
        """`(b, dim)`, or several batches `(k, b, dim)`, each with its own statistics -> the same shape."""
        if not self.training:
            return self._normed(x.float(), self.running_mean, self.running_var).to(x.dtype)
        batches = x.float().view(-1, *x.shape[-2:])
        rows = batches.shape[1]
        local_mean = batches.mean(dim=1)
        local_var = (batches - local_mean[:, None]).square().mean(dim=1)
        of_ranks = gather(torch.stack([local_mean, local_var])[None], self.world)  # (ranks, 2, k, dim)
        mean = of_ranks[:, 0].mean(dim=0)
        var = (of_ranks[:, 1] + (of_ranks[:, 0] - mean).square()).mean(dim=0)  # of equal parts: no squares of large means cancel
        num = rows * len(of_ranks)
        self._seen += zip(mean.detach(), var.detach() * (num / max(num - 1, 1)), strict=True)
        if x.ndim == 2:  # one batch, which comes out as no view: FSDP warns of those
            return self._normed(x.float(), mean, var).to(x.dtype)
        return self._normed(batches, mean[:, None], var[:, None]).to(x.dtype)

    def _normed(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        x = (x - mean) * (var + EPS).rsqrt()
        return x if self.weight is None or self.bias is None else x * self.weight + self.bias


class BatchNorm2d(Norm):
    """Of channels, with the statistics of an image's rows and columns and of all images of a call, on all ranks of the process group.

    What is called twice has statistics of its own each time. The names of its state are torch's, but for `num_batches_tracked`, which
    torch does not ask for and uses with another momentum only. Between forward and backward pass only the input is kept.
    """

    def __init__(self, dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        """`device`, `dtype`: as timm gives them, which leaves them open."""
        assert device is None
        assert dtype is None
        super().__init__(dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(b, dim, H, W)` -> the same shape."""
        assert self.weight is not None
        assert self.bias is not None
        if not self.training:
            wide = _wide(x)
            weight, bias = self.weight.to(wide), self.bias.to(wide)
            return F.batch_norm(x, self.running_mean.to(wide), self.running_var.to(wide), weight, bias, False, 0.0, EPS)
        group = dist.group.WORLD
        assert group is not None, "training needs a process group"
        out, mean, var = _Normed2d.apply(x, self.weight, self.bias, group)
        if not recompute.is_under_way():  # or the batch would move the averages twice
            num = group.size() * x.numel() // x.shape[1]
            self._seen.append((mean.float(), var.float() * (num / max(num - 1, 1))))
        return out  # type: ignore[no-any-return]


def _wide(x: Tensor) -> torch.dtype:
    """What sums are computed in."""
    return torch.promote_types(x.dtype, torch.float32)


class _Normed2d(torch.autograd.Function):
    """Normalised images, and the mean and the biased variance of each channel over all ranks. Gradients are summed over the ranks as in
    `distributed.gather`; those of the statistics themselves are not asked for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
        wide = _wide(x)
        local_var, local_mean = torch.var_mean(x.to(wide), dim=(0, 2, 3), correction=0)
        mine = torch.stack([local_mean, local_var])
        rows = mine.new_empty(group.size() * len(mine), mine.shape[1])
        dist.all_gather_into_tensor(rows, mine, group=group)
        of_ranks = rows.view(-1, *mine.shape)
        mean = of_ranks[:, 0].mean(dim=0)
        var = (of_ranks[:, 1] + (of_ranks[:, 0] - mean).square()).mean(dim=0)  # of equal parts, as in BatchNorm
        ctx.group = group
        ctx.save_for_backward(x, weight, mean, var)
        ctx.mark_non_differentiable(mean, var)
        return F.batch_norm(x, mean, var, weight.to(wide), bias.to(wide), False, 0.0, EPS), mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, var = ctx.saved_tensors
        wide, of_out = mean.dtype, gradients[0]
        scale = (var + EPS).rsqrt()
        out = (x.to(wide) - mean.view(-1, 1, 1)).mul_(scale.view(-1, 1, 1))  # before weight and bias
        sums = torch.stack([of_out.sum(dim=(0, 2, 3), dtype=wide), (of_out * out).sum(dim=(0, 2, 3), dtype=wide)])
        of_bias, of_weight = sums.clone()
        dist.all_reduce(sums, group=ctx.group)
        means = (sums / (ctx.group.size() * x.numel() // x.shape[1])).view(2, -1, 1, 1)
        # weight · scale · (of_out - mean of it - out · mean of their product), in the memory of `out`
        of_x = out.mul_(-means[1]).add_(of_out).sub_(means[0]).mul_((weight.to(wide) * scale).view(-1, 1, 1))
        return of_x.to(x.dtype), of_weight.to(weight.dtype), of_bias.to(weight.dtype), None


def batch_norms(module: nn.Module) -> list[Norm]:
    """All inside."""
    return [each for each in module.modules() if isinstance(each, Norm)]
