"""VICReg's and SIE's losses against their formulae in float64 and loops; the predictor; what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
import torch
from numpy.typing import NDArray

from equissl import config as panel
from equissl import distributed, transforms
from equissl.config import PretrainConfig
from equissl.distributed import World, full
from equissl.encoder import Encoder
from equissl.initialise import materialise
from equissl.methods.sie import SIE, Predictor
from equissl.methods.vicreg import VICReg

Array = NDArray[np.float64]


def tokens(method: VICReg | SIE, settings: PretrainConfig, images: torch.Tensor) -> tuple[Array, Array, Array]:
    """CLS token, its invariant and its equivariant part in float64, by the encoder's own float32 weights; parts where there is a split."""
    plain = Encoder(settings)
    materialise(plain, torch.device("cpu"))
    with torch.no_grad():
        for mine, theirs in zip(plain.parameters(), method.student.encoder.parameters(), strict=True):
            mine.copy_(full(theirs))
        features = plain.double()(images.double())
        equi = features.cls if plain.split is None else plain.split(None, features.cls)[1]
    return features.cls.numpy(), features.inv_cls.detach().numpy(), equi.detach().numpy()


def values(method: VICReg | SIE, prefix: str) -> dict[str, Array]:
    return {
        name.removeprefix(f"student.{prefix}."): full(tensor).double().numpy()
        for name, tensor in method.parameters_by_name().items()
        if name.startswith(f"student.{prefix}.")
    }


def expanded(x: Array, of: dict[str, Array]) -> Array:
    """Linear, batch norm, ReLU, twice; linear."""
    for linear, norm in ((0, 1), (3, 4)):
        x = x @ of[f"mlp.{linear}.weight"].T
        x = (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + 1e-5)
        x = np.maximum(0, x * of[f"mlp.{norm}.weight"] + of[f"mlp.{norm}.bias"])
    return x @ of["mlp.6.weight"].T


def missing(z: Array) -> float:
    return float(np.mean([max(0.0, 1 - np.sqrt(np.var(z[:, j], ddof=1) + 1e-4)) for j in range(z.shape[1])]))


def off_diagonal(z: Array) -> float:
    cov, d = np.cov(z.T), z.shape[1]
    return sum(cov[i, j] ** 2 for i in range(d) for j in range(d) if i != j) / d


def trained(world: World, method: str, **changes: Any) -> tuple[tiny.Run, Any]:
    """After a step with random values where initial ones hide mistakes."""
    settings = tiny.config(method=method, backbone__drop_path=0.0, **changes)
    run = tiny.Run(settings, world)
    run.update(0, lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in run.method.parameters_by_name().values():
            if parameter.ndim == 1:
                distributed.local(parameter).add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return run, run.views(1)


@pytest.mark.parametrize("changes", [{}, {"auxiliary": None, "method__covariance": 3.0, "method__invariance": 25.0}])
def test_vicregs_loss_is_the_formula(changes: dict[str, Any], world: World) -> None:
    run, views = trained(world, "vicreg", **changes)
    output = run.method.step(views, 1)
    x, y = (
        expanded(tokens(run.method, run.settings, images)[1], values(run.method, "expander")) for images in (views.global1, views.global2)
    )
    of = run.settings.method
    expected = {
        "invariance": of.invariance * ((x - y) ** 2).mean(),
        "variance": 10 * (missing(x) + missing(y)) / 2,
        "covariance": of.covariance * (off_diagonal(x) + off_diagonal(y)),
    }
    assert all(value > 0.01 for value in expected.values())
    assert {name: term.item() for name, term in output.terms.items()} == pytest.approx(expected, rel=2e-5)
    assert (output.equi is None) == (run.auxiliary is None)


@pytest.mark.parametrize("changes", [{}, {"auxiliary": None, "transformation": "rot", "method__equivariance": 2.0}])
def test_sies_loss_is_the_formula(changes: dict[str, Any], world: World) -> None:
    run, views = trained(world, "sie", **changes)
    output = run.method.step(views, 1)
    parts = [tokens(run.method, run.settings, images)[1:] for images in (views.global1, views.global2)]
    x_inv, y_inv = (expanded(inv, values(run.method, "inv")) for inv, _ in parts)
    x_equi, y_equi = (expanded(equi, values(run.method, "equi")) for _, equi in parts)
    given, side = run.settings.transformation, run.settings.side
    assert given is not None
    limits = {"rotation": 45.0, "translation_x": 10 * side / 224, "translation_y": 10 * side / 224}
    drawn = run.make_views.parameters(tiny.batch(run.settings, 1)).double().numpy()
    matrices = values(run.method, "predictor")["matrices.weight"].reshape(given.num_parameters, 24, 24)
    predicted = []
    for sample, theta in enumerate(drawn):
        w = sum(value / limits[name] * matrix for value, name, matrix in zip(theta, transforms.get(given).names, matrices, strict=True))
        predicted.append(w @ x_equi[sample])
    x, y = np.concatenate([x_inv, x_equi], axis=1), np.concatenate([y_inv, y_equi], axis=1)
    factor = changes.get("method__equivariance", 0.45)
    expected = {
        "invariance": 10 * ((x_inv - y_inv) ** 2).mean(),
        "equivariance": factor * 10 * ((np.array(predicted) - y_equi) ** 2).mean(),
        "variance": 10 * (missing(x) + missing(y)) / 2,
        "predicted_variance": 10 * missing(np.array(predicted)) / 2,
        "covariance": off_diagonal(x) + off_diagonal(y),
    }
    assert all(value > 0.01 for value in expected.values())
    assert {name: term.item() for name, term in output.terms.items()} == pytest.approx(expected, rel=2e-5)
    if run.auxiliary:
        features = tokens(run.method, run.settings, views.global2)
        assert output.equi is not None
        assert output.equi[1].shape == (len(features[0]), 16, 16)


def test_the_recipes() -> None:
    vicreg, sie = (
        PretrainConfig.model_validate(
            {"data": "imagenet1k", "method": name, "epochs": 800.0, "batch": 2048, "transformation": "rot", "auxiliary": "reconstruction"}
        )
        for name in ("vicreg", "sie")
    )
    assert sie.method.equivariance == 0.45
    for settings in (vicreg, sie):
        assert (settings.d_inv, settings.d_equi) == (256, 256)
        assert settings.method.optimizer.lr(2048) == pytest.approx(8e-4)
        assert settings.method.views.num_local == 0
    plain = PretrainConfig.model_validate({"data": "imagenet1k", "method": "vicreg", "epochs": 800.0, "batch": 2048})
    assert (plain.d_inv, plain.d_equi) == (384, 0), "without an auxiliary VICReg has no split"


def test_what_is_given_changes_the_methods_own_recipe() -> None:
    changed = tiny.config(method="vicreg", method__views={"flip": 0.0}, method__optimizer={"clip": 1.0})
    assert changed.method.views.global_scale == (0.08, 1.0)
    assert (changed.method.optimizer.base_lr, changed.method.optimizer.clip) == (1e-4, 1.0)
    deeper = tiny.config(method="vicreg", method__views={"global2": {"blur": 0.5}, "global1": panel.Photometry(blur=0.3)})
    assert deeper.method.views.global2 == panel.Photometry(blur=0.5, solarize=0.2), "what is not given is the method's, not the class's"
    assert deeper.method.views.global1 == panel.Photometry(blur=0.3), "an instance is meant whole"
    assert deeper.method.views.global_scale == (0.08, 1.0)
    with pytest.raises(ValueError, match=r"views\.global2\.blurr"):
        tiny.config(method="vicreg", method__views={"global2": {"blurr": 0.5}})
    other = tiny.config(method="vicreg", method__optimizer="lars")
    assert (other.method.optimizer.name, other.method.optimizer.base_lr) == ("lars", 0.3)
    assert PretrainConfig.model_validate(other.model_dump(mode="json", by_alias=True)) == other


# --- the predictor ---------------------------------------------------------------------------------------------------------


def test_the_predictor_is_linear_in_x_at_given_parameters() -> None:
    generator = torch.Generator().manual_seed(0)
    predictor = Predictor(3, 8).double()
    x, y, theta = (torch.randn(5, width, generator=generator, dtype=torch.float64) for width in (8, 8, 3))
    torch.testing.assert_close(predictor(2 * x - 3 * y, theta), 2 * predictor(x, theta) - 3 * predictor(y, theta))
    torch.testing.assert_close(predictor(x, 2 * theta), 2 * predictor(x, theta))
    assert predictor(x, torch.zeros_like(theta)).abs().max() == 0, "the identity's parameters: a hypernetwork without bias gives 0"
    matrices = predictor.matrices.weight.view(3, 8, 8)
    torch.testing.assert_close(predictor(x, theta), torch.einsum("bp,pij,bj->bi", theta, matrices, x))


# --- refused ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"transformation": None, "auxiliary": None}, "method sie predicts .* give transformation, one of rot, trans, se2.* method vicreg"),
        ({"auxiliary__d": 17}, "auxiliary.d is 17 and method.d 16: they are the width of the same part"),
        ({"auxiliary__d": 48, "method__d": 48}, r"(auxiliary|method)\.d 48 must be smaller than method.representation 48"),
        ({"auxiliary": None, "method__d": 50}, "method.d 50 must be smaller than method.representation 48"),
        ({"method__views": {"num_local": 2}}, "num_local"),
    ],
)
def test_what_sie_cannot_do_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tiny.config(method="sie", **changes)


@pytest.mark.parametrize("method", ["vicreg", "sie"])
def test_a_batch_is_not_worked_through_in_parts(method: str) -> None:
    with pytest.raises(ValueError, match=f"accumulate is 2, but the loss of {method} couples a batch: it must be 1"):
        tiny.config(method=method, accumulate=2).check(1, {})
    tiny.config(method=method).check(1, {})


def test_an_auxiliary_on_what_has_no_tokens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(panel.VICReg, "token_objective", False)
    with pytest.raises(ValueError, match="auxiliary needs patch tokens of two global views, which method vicreg does not have"):
        tiny.config(method="vicreg")
