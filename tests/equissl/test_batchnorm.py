"""Sums and rows of all ranks, and batch norm over them: against torch on the joined batch, values and gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from harness import run_ranks
from torch import Tensor, nn

from equissl import distributed
from equissl.batchnorm import BatchNorm
from equissl.distributed import World, gather, shard, total
from equissl.initialise import initialise, materialise
from equissl.losses import covariances, variances

RANKS = 3


def data(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_rank(rank: int) -> Tensor:
    return data(4, 5, seed=rank)


def losses(mine: Tensor, world: World) -> dict[str, Tensor]:
    """One that is the same on all ranks, and ones that differ: what a rank's own rows have to do with all rows."""
    rows, weight = gather(mine, world), float(world.rank + 1)
    return {
        "joint": (rows.mT @ rows).square().sum(),
        "own": weight * torch.logsumexp(mine @ rows.T, dim=1).mean(),
        "sum": weight * total(mine.sin().sum(dim=0), world).square().sum(),
    }


def gradients() -> dict[str, Any]:
    world, found = distributed.init(), {}
    for name in ("joint", "own", "sum"):
        mine = of_rank(world.rank).requires_grad_()
        loss = losses(mine, world)[name]
        loss.backward()
        found[name] = loss.item(), mine.grad
    found["rows"] = gather(of_rank(world.rank), world)
    z = torch.stack([of_rank(world.rank), of_rank(world.rank + 7)])
    found["covariances"], found["variances"] = covariances(z, world), variances(z, world)
    distributed.close()
    return found


def test_gradients_are_those_of_the_mean_loss_of_the_joined_batch() -> None:
    """The loop takes the mean over ranks of gradients: each rank's must be `ranks` times that of the mean loss, all others at rest."""
    ranks = run_ranks(gradients, RANKS)
    parts = [of_rank(rank).requires_grad_() for rank in range(RANKS)]
    rows, weights = torch.cat(parts), [rank + 1.0 for rank in range(RANKS)]
    expected = {
        "joint": [(rows.mT @ rows).square().sum()] * RANKS,
        "own": [weight * torch.logsumexp(part @ rows.T, dim=1).mean() for weight, part in zip(weights, parts, strict=True)],
        "sum": [weight * torch.stack([part.sin().sum(dim=0) for part in parts]).sum(dim=0).square().sum() for weight in weights],
    }
    for name, of_ranks in expected.items():
        of_mean = torch.autograd.grad(torch.stack(of_ranks).mean(), parts, retain_graph=True)
        for rank, found in enumerate(ranks):
            loss, gradient = found[name]
            assert loss == pytest.approx(of_ranks[rank].item(), rel=1e-12)
            torch.testing.assert_close(gradient / RANKS, of_mean[rank])
    for found in ranks:
        assert torch.equal(found["rows"], rows.detach())
        for view, first in enumerate((0, 7)):
            joined = np.concatenate([of_rank(rank + first).numpy() for rank in range(RANKS)])
            np.testing.assert_allclose(found["covariances"][view], np.cov(joined.T), atol=1e-12)
            np.testing.assert_allclose(found["variances"][view], joined.var(axis=0, ddof=1), atol=1e-12)


class Head(nn.Module):
    def __init__(self, world: World, affine: bool) -> None:
        super().__init__()
        self.norm = BatchNorm(5, world, affine)
        self.linear = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(self.norm(x))
        return out


def sharded(affine: bool) -> dict[str, Any]:
    """Two updates of two batches at once, of which the second is refused; values, gradients and averages."""
    world = distributed.init()
    with torch.device("meta"):
        head = Head(world, affine)
    shard([head], world)
    materialise(head, world.device)
    initialise(head, 0)
    x = (3 + 2 * torch.stack([of_rank(world.rank), of_rank(world.rank + 7)]).float()).requires_grad_()
    out = head(x)
    out.square().mean().backward()
    head.norm.move(torch.ones(()))
    averages = head.norm.running_mean.clone(), head.norm.running_var.clone()
    head(10 * x)
    head.norm.move(torch.zeros(()))
    head(x)
    again = head.norm.running_mean.clone()
    head.norm.move(torch.ones(()))
    found = {
        "out": out.detach(),
        "of_x": x.grad,
        "gradients": {name: distributed.full(parameter.grad) for name, parameter in head.named_parameters()},
        "averages": averages,
        "refused": torch.equal(again, averages[0]),
        "moved": not torch.equal(head.norm.running_mean, averages[0]),
        "evaluated": head.eval()(x[:, :1]).detach(),
    }
    distributed.close()
    return found


@pytest.mark.parametrize("affine", [True, False])
def test_ranks_together_are_torchs_batch_norm_on_the_joined_batch(affine: bool, world: World) -> None:
    linear, norm = nn.Linear(5, 3).double(), nn.BatchNorm1d(5, affine=affine).double()
    template = Head(world, affine)
    initialise(template, 0)
    linear.load_state_dict(template.linear.state_dict())
    batches = [[(3 + 2 * of_rank(rank + first)).requires_grad_() for rank in range(RANKS)] for first in (0, 7)]
    outs = [linear(norm(torch.cat(parts))) for parts in batches]
    torch.stack(outs).square().mean().backward()
    named = {f"norm.{name}": p.grad for name, p in norm.named_parameters()} | {f"linear.{n}": p.grad for n, p in linear.named_parameters()}
    for rank, found in enumerate(run_ranks(sharded, RANKS, affine)):
        mine = slice(4 * rank, 4 * rank + 4)
        torch.testing.assert_close(found["out"].double(), torch.stack([out[mine] for out in outs]), rtol=1e-5, atol=1e-6)
        of_x = torch.stack([parts[rank].grad for parts in batches])
        torch.testing.assert_close(found["of_x"].double() / RANKS, of_x, rtol=1e-4, atol=1e-7)
        assert found["gradients"].keys() == named.keys()
        for name, gradient in named.items():
            torch.testing.assert_close(found["gradients"][name].double(), gradient, rtol=1e-4, atol=1e-6)
        for average, expected in zip(found["averages"], (norm.running_mean, norm.running_var), strict=True):
            torch.testing.assert_close(average.double(), expected, rtol=1e-5, atol=1e-6)
        assert found["refused"]
        assert found["moved"]
        assert found["evaluated"].isfinite().all(), "a batch of one"


def test_large_means_do_not_swallow_the_variance(world: World) -> None:
    norm = BatchNorm(5, world, affine=False)
    x = 1000 + data(64, 5)
    expected = (x - x.mean(dim=0)) / (x.var(dim=0, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(norm(x.float()).double(), expected, rtol=1e-2, atol=1e-3)


def test_averages_are_torchs_before_and_after(world: World) -> None:
    mine, theirs = BatchNorm(5, world), nn.BatchNorm1d(5)
    initialise(mine, 0)
    for seed in range(3):
        x = data(8, 5, seed=seed).float()
        torch.testing.assert_close(mine(x), theirs(x))
        mine.move(torch.ones(()))
    torch.testing.assert_close(mine.eval()(x), theirs.eval()(x))
