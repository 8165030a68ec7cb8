"""NT-Xent and SimCLR's loss against their formulae in float64 and loops; what does not change them; what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from harness import run_ranks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from test_vicreg import tokens, trained, values

from equissl import distributed
from equissl.config import PretrainConfig
from equissl.distributed import World
from equissl.losses import nt_xent

Array = NDArray[np.float64]


def by_hand(x: Array, y: Array, temperature: float) -> float:
    """Chen et al. 2020, eq. 1, over all ordered pairs of partners."""
    z = [v / np.sqrt(v @ v) for v in (*x, *y)]
    n, terms = len(x), []
    for i in range(2 * n):
        j = (i + n) % (2 * n)
        others = sum(np.exp(z[i] @ z[k] / temperature) for k in range(2 * n) if k != i)
        terms.append(-np.log(np.exp(z[i] @ z[j] / temperature) / others))
    return float(np.mean(terms))


def projected(x: Array, of: dict[str, Array], numbers: tuple[int, int, int]) -> Array:
    """Linear, batch norm, ReLU, twice; linear, batch norm without parameters. `numbers`: of the linear layers."""
    for linear in numbers:
        x = x @ of[f"mlp.{linear}.weight"].T
        x = (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + 1e-5)
        if linear != numbers[-1]:
            x = np.maximum(0, x * of[f"mlp.{linear + 1}.weight"] + of[f"mlp.{linear + 1}.bias"])
    return x


def pairs(n: int, seed: int, d: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return x, x + torch.randn(n, d, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("n", "temperature"), [(1, 0.5), (2, 0.07), (7, 0.2), (16, 1.0)])
def test_nt_xent_is_the_formula(n: int, temperature: float, world: World) -> None:
    x, y = pairs(n, n)
    found = nt_xent(x, y, temperature, world).item()
    assert found == pytest.approx(by_hand(x.numpy(), y.numpy(), temperature), rel=1e-12, abs=1e-12)
    assert (found == 0) == (n == 1), "of one pair there is nothing to be told apart"


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])  # one world for all examples
@given(n=st.integers(2, 9), seed=st.integers(0, 999), scale=st.floats(1e-3, 1e3), temperature=st.floats(0.05, 2))
def test_nt_xent_does_not_see_lengths_order_and_which_is_first(n: int, seed: int, scale: float, temperature: float, world: World) -> None:
    x, y = pairs(n, seed)
    loss = nt_xent(x, y, temperature, world).item()
    lengths = torch.logspace(-1, 1, n, dtype=torch.float64)[:, None] * scale
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    turn = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]
    for name, (one, other) in {
        "lengths": (x * lengths, y / lengths),
        "order": (x[order], y[order]),
        "first": (y, x),
        "rotation": (x @ turn, y @ turn),
    }.items():
        assert nt_xent(one, other, temperature, world).item() == pytest.approx(loss, rel=1e-9), name
    if n > 2:
        assert nt_xent(x, y.roll(1, 0), temperature, world).item() != pytest.approx(loss, rel=1e-9), "partners do matter"


def test_a_large_similarity_does_not_overflow(world: World) -> None:
    x = torch.eye(4)
    assert nt_xent(x * 1e6, x, 1e-3, world).item() == 0
    assert nt_xent(x * 1e6, x.roll(1, 0), 1e-3, world).isfinite()


def of_a_rank(n: int) -> tuple[float, torch.Tensor, torch.Tensor]:
    world = distributed.init()
    x, y = (v.requires_grad_() for v in (part.chunk(world.world_size)[world.rank].clone() for part in pairs(n, 3)))
    loss = nt_xent(x, y, 0.2, world)
    loss.backward()
    assert x.grad is not None
    assert y.grad is not None
    distributed.close()
    return loss.item(), x.grad / world.world_size, y.grad / world.world_size  # the loop's mean


@pytest.mark.parametrize("ranks", [2, 4])
def test_loss_and_gradients_on_several_ranks_are_those_of_the_joined_batch(ranks: int) -> None:
    ((loss, dx, dy),) = run_ranks(of_a_rank, 1, 8)
    found = run_ranks(of_a_rank, ranks, 8)
    assert np.mean([each[0] for each in found]) == pytest.approx(loss, rel=1e-12)
    assert len({round(each[0], 9) for each in found}) == ranks, "each rank has its own anchors"
    torch.testing.assert_close(torch.cat([each[1] for each in found]), dx, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.cat([each[2] for each in found]), dy, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("changes", [{}, {"auxiliary": None, "method__temperature": 0.5}])
def test_simclrs_loss_is_the_formula(changes: dict[str, object], world: World) -> None:
    run, views = trained(world, "simclr", **changes)
    output = run.method.step(views, 1)
    both = np.concatenate([tokens(run.method, run.settings, images)[1] for images in (views.global1, views.global2)])
    z = projected(both, values(run.method, "projector"), (0, 3, 6))
    temperature = 0.5 if "method__temperature" in changes else 0.2
    x, y = np.split(z, 2)
    assert output.terms["contrast"].item() == pytest.approx(by_hand(x, y, temperature), rel=2e-5)
    assert (output.equi is None) == (run.auxiliary is None)


def test_the_recipe() -> None:
    recipe = PretrainConfig.model_validate({"data": "imagenet1k", "method": "simclr", "epochs": 800.0, "batch": 4096})
    of = recipe.method
    assert (of.temperature, of.widths(2048)) == (0.2, (2048, 2048, 2048, 128))
    assert (of.optimizer.name, of.optimizer.lr(4096), of.optimizer.weight_decay) == ("lars", pytest.approx(2.4), (1e-6, 1e-6))
    assert (of.optimizer.momentum, of.optimizer.trust, of.optimizer.warmup_epochs) == (0.9, 1e-3, 10.0)
    assert of.views.global1 == of.views.global2
    assert of.views.global_scale == (0.08, 1.0)


def test_a_batch_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match="batch is 1: method simclr compares the samples of a batch, and needs 2 at least"):
        tiny.config(method="simclr", batch=1, group_size=1)
    with pytest.raises(ValueError, match="accumulate is 2, but the loss of simclr couples a batch: it must be 1"):
        tiny.config(method="simclr", accumulate=2).check(1, {})
