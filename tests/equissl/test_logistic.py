"""Logistic regression: the optimum is scikit-learn's."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import run_ranks
from pydantic import ValidationError
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from test_evaluate import counting, on_ranks, pretrained, settings

from equissl import evaluate
from equissl.config import EvaluateConfig
from equissl.evals import logistic

__all__ = ["pretrained"]  # a fixture


def objective(weight: Any, bias: Any, x: Any, labels: Any, c: float) -> float:
    """Scikit-learn's, in NumPy."""
    logits = x @ weight.T + bias
    top = logits.max(axis=1, keepdims=True)
    log_sum = top[:, 0] + np.log(np.exp(logits - top).sum(axis=1))
    return float(c * (log_sum - logits[np.arange(len(x)), labels]).sum() + 0.5 * (weight**2).sum())


@pytest.mark.parametrize("c", [1e-4, 1e-2, 1.0])
def test_the_optimum_is_that_of_scikit_learn(c: float) -> None:
    x, labels = load_digits(return_X_y=True)
    x = x / 16 + 3  # far from centred
    train, test = slice(0, 1200), slice(1200, None)
    beats = 0

    def beat() -> None:
        nonlocal beats
        beats += 1

    features, classes = torch.from_numpy(x[train]).float(), torch.from_numpy(labels[train])
    found, converged = logistic.fit(features, classes, 10, c, 2000, None, beat)
    assert converged
    assert beats > 5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = LogisticRegression(C=c, tol=1e-10, max_iter=5000).fit(features.numpy().astype(np.float64), labels[train])
    ours = found.numpy()
    exact = features.double().numpy()
    loss, reference = (
        objective(weight, bias, exact, labels[train], c)
        for weight, bias in ((ours[:, :-1], ours[:, -1]), (theirs.coef_, theirs.intercept_))
    )
    assert loss == pytest.approx(reference, rel=1e-6)
    accuracy = logistic.score(found, torch.from_numpy(x[test]), torch.from_numpy(labels[test])).top1().item()
    assert accuracy == pytest.approx(theirs.score(x[test], labels[test]), abs=1 / 597 + 1e-9)
    _, is_finished = logistic.fit(features / 100, classes, 10, 1.0, 3, None, beat)
    assert not is_finished, "its evaluations of the objective run out before its iterations do"
    shifted, _ = logistic.fit(features, classes, 10, c, 2000, found, beat)  # from the optimum: it stays
    assert torch.allclose(shifted[:, :-1], found[:, :-1], atol=1e-4)


def test_iterations_that_do_not_suffice_are_told() -> None:
    x, labels = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 3
    assert not logistic.fit(x, labels, 3, 1e3, 2, None, lambda: None)[1]


QUICK = {"name": "logistic", "num_c": 4, "max_iterations": 30}


@pytest.mark.parametrize("task", [QUICK, {**QUICK, "mean_patch": True}, {**QUICK, "part": "inv"}])
def test_ranks_share_the_images(pretrained: Path, tmp_path: Path, task: Any) -> None:
    config = settings(pretrained, task, batch=7)
    alone = evaluate.main(config, tmp_path, lambda: False)
    first, second = run_ranks(on_ranks, 2, config, str(tmp_path), None)
    assert alone is not None
    assert second["metrics"] == {}
    for name, value in alone["metrics"].items():
        assert first["metrics"][name] == pytest.approx(value, abs=0.012)  # one of 90 images
    assert alone["metrics"]["logistic/top1"] > 0.2  # chance: 0.06
    assert len(alone["chosen"]["held_out"]) == 4
    assert f"{alone['chosen']['c']:.3g}" in alone["chosen"]["held_out"]


def test_stopped(pretrained: Path, tmp_path: Path) -> None:
    assert evaluate.main(settings(pretrained, "logistic"), tmp_path, counting(60)) is None


def test_bad_input() -> None:
    with pytest.raises(ValidationError, match=r"log10_c is \[5\.0, -6\.0\]; the first must be smaller"):
        EvaluateConfig.model_validate({"checkpoint": "x", "task": {"name": "logistic", "log10_c": [5.0, -6.0]}})
    with pytest.raises(ValidationError, match="greater than 0"):
        EvaluateConfig.model_validate({"checkpoint": "x", "task": {"name": "logistic", "held_out": 0.0}})
