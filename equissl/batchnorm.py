"""Batch normalisation over the joined batch of all ranks (Ioffe & Szegedy 2015), under FSDP and on CPUs, where torch's own refuses."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from equissl.distributed import World, gather

EPS, MOMENTUM = 1e-5, 0.1  # torch's


class BatchNorm(nn.Module):
    """Of the last dimension, with the statistics of the one before it. Their moving averages are state, used after `eval()` only.

    Statistics are float32 whatever the precision of the computation. Every rank has equally many rows.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, dim: int, world: World, affine: bool = True) -> None:
        super().__init__()
        self.world = world
        self.weight = nn.Parameter(torch.empty(dim)) if affine else None
        self.bias = nn.Parameter(torch.empty(dim)) if affine else None
        self.register_buffer("running_mean", torch.empty(dim))
        self.register_buffer("running_var", torch.empty(dim))
        self._seen: list[tuple[Tensor, Tensor]] = []  # mean and unbiased variance of the batches since `move`

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


def batch_norms(module: nn.Module) -> list[BatchNorm]:
    """All inside."""
    return [each for each in module.modules() if isinstance(each, BatchNorm)]
