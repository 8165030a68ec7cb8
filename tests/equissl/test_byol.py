"""BYOL's loss against its formula in float64; what its teacher is; the recipe."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
import torch
from numpy.typing import NDArray
from test_vicreg import tokens, trained, values

from equissl.config import PretrainConfig
from equissl.distributed import World, full
from equissl.encoder import Encoder
from equissl.initialise import materialise
from equissl.losses import cross_prediction

Array = NDArray[np.float64]


def headed(x: Array, of: dict[str, Array]) -> Array:
    """Linear, batch norm over all rows, ReLU, linear with bias."""
    x = x @ of["mlp.0.weight"].T
    x = (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + 1e-5)
    x = np.maximum(0, x * of["mlp.1.weight"] + of["mlp.1.bias"])
    return x @ of["mlp.3.weight"].T + of["mlp.3.bias"]


def unit(x: Array) -> Array:
    return x / np.sqrt((x**2).sum(axis=1, keepdims=True))


def of_teacher(run: tiny.Run) -> tuple[Encoder, dict[str, Array]]:
    """Its encoder in float64, and the projector's values."""
    state = {name: full(tensor) for name, tensor in run.method.state().items()}
    plain = Encoder(run.settings)
    materialise(plain, torch.device("cpu"))
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(state[f"teacher.encoder.{name}"])
    projector = {name.removeprefix("teacher.projector."): value.double().numpy() for name, value in state.items()}
    return plain.double(), projector


@pytest.mark.parametrize("changes", [{}, {"auxiliary": None}])
def test_byols_loss_is_the_formula(changes: dict[str, Any], world: World) -> None:
    run, views = trained(world, "byol", **changes)
    output = run.method.step(views, 1)
    images = torch.cat([views.global1, views.global2])
    projected = headed(tokens(run.method, run.settings, images)[1], values(run.method, "projector"))
    q1, q2 = np.split(unit(headed(projected, values(run.method, "predictor"))), 2)
    encoder, projector = of_teacher(run)
    with torch.no_grad():
        features = encoder(images.double())
        z1, z2 = np.split(unit(headed(features.inv_cls.numpy(), projector)), 2)
    expected = np.mean(((q1 - z2) ** 2).sum(axis=1) + ((q2 - z1) ** 2).sum(axis=1))
    assert 0.1 < expected < 7.9
    assert output.terms["prediction"].item() == pytest.approx(expected, rel=2e-5)
    assert (output.equi is None) == (run.auxiliary is None)
    torch.testing.assert_close(output.watched.features.double(), features.cls[: len(views.global1)], rtol=1e-4, atol=1e-4)


def test_the_loss_does_not_see_lengths_and_its_ends_are_0_and_8() -> None:
    generator = torch.Generator().manual_seed(0)
    q, z = (torch.randn(2, 5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    by_hand = sum((q[i, s] / q[i, s].norm() - z[1 - i, s] / z[1 - i, s].norm()).square().sum() for i in range(2) for s in range(5)) / 5
    assert cross_prediction(q, z).item() == pytest.approx(float(by_hand), rel=1e-12)
    lengths = torch.logspace(-2, 2, 10, dtype=torch.float64).view(2, 5, 1)
    torch.testing.assert_close(cross_prediction(q * lengths, z / lengths), cross_prediction(q, z))
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(cross_prediction(q[:, order], z[:, order]), cross_prediction(q, z))
    assert cross_prediction(z.flip(0), z).item() == pytest.approx(0, abs=1e-12)
    assert cross_prediction(-z.flip(0), z).item() == pytest.approx(8)


def test_the_teacher_has_no_predictor_moves_with_the_student_and_gets_no_gradient(world: World) -> None:
    run = tiny.Run(tiny.config(method="byol"), world)
    before = run.values()
    parts = {name.split(".")[1] for name in before if name.startswith("teacher.")}
    assert parts == {"encoder", "projector"}
    run.update(0, lr=1e-2)
    after = run.values()
    kept = 0.9
    for name in (name for name in after if name.startswith("teacher.") and "running" not in name):
        student = after[name.replace("teacher.", "student.", 1)]
        torch.testing.assert_close(after[name], kept * before[name] + (1 - kept) * student)
    assert run.method.numbers(0) == {"ema": 0.9}
    assert run.method.numbers(tiny.TIMELINE.num_steps) == {"ema": 1.0}
    assert not any(name.startswith("teacher.") for name in run.parameters)


def test_the_recipe() -> None:
    settings = PretrainConfig.model_validate({"data": "imagenet1k", "method": "byol", "epochs": 1000.0, "batch": 4096})
    of = settings.method
    assert (of.widths(2048), of.widths(of.embedding), of.ema) == ((2048, 4096, 256), (256, 4096, 256), (0.996, 1.0))
    assert (of.optimizer.lr(4096), of.optimizer.weight_decay) == (pytest.approx(4.8), (1.5e-6, 1.5e-6))
    assert (of.views.global1.blur, of.views.global2.blur, of.views.global2.solarize) == (1.0, 0.1, 0.2)
    with pytest.raises(ValueError, match="batch is 1: method byol compares the samples of a batch"):
        tiny.config(method="byol", batch=1, group_size=1)
