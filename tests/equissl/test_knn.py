"""k-NN: the votes are scikit-learn's, the figures follow from the votes, the features are the teacher's CLS tokens."""

from __future__ import annotations

import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

from equissl import evals
from equissl.config import EvaluateConfig
from equissl.data.labelled import pair
from equissl.data.shards import ShardSet
from equissl.evals import knn
from equissl.features import CentreCrop, extract


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_votes_are_those_of_scikit_learn(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    train, queries = torch.randn(400, 12, generator=generator), torch.randn(1500, 12, generator=generator)  # two chunks
    labels = torch.randint(0, 7, (400,), generator=generator)
    ks = (1, 5, 20)
    chunks = list(knn.votes(train, labels, queries, ks, temperature, 7))
    assert len(chunks) == 2
    for k in ks:
        ours = torch.cat([chunk[k] for chunk in chunks])
        theirs = KNeighborsClassifier(k, weights=lambda distance: np.exp((1 - distance) / temperature), metric="cosine", algorithm="brute")
        shares = theirs.fit(train.numpy(), labels.numpy()).predict_proba(queries.numpy())
        assert np.allclose(ours / ours.sum(dim=1, keepdim=True), shares, atol=1e-4)


def test_far_neighbours_do_not_overflow() -> None:
    train, labels = torch.eye(4), torch.arange(4)
    (votes,) = list(knn.votes(train, labels, train, (4,), 1e-3, 4))
    assert torch.equal(votes[4].argmax(dim=1), labels)
    assert torch.isfinite(votes[4]).all()


def test_figures() -> None:
    truth = torch.tensor([0, 0, 0, 0, 1, 1, 3])  # no image of class 2
    correct = {k: torch.rand(7, generator=torch.Generator().manual_seed(k)) < 0.5 for k in (5, 20, 100)}
    figures = knn.metrics(correct, truth, 4)
    assert figures["top1"] == figures["top1/k=20"] == correct[20].double().mean().item()
    per_class = [correct[20][truth == c].float().mean().item() for c in (0, 1, 3)]
    assert figures["mean_per_class"] == pytest.approx(np.mean(per_class))
    assert knn.metrics({k: correct[k] for k in (100, 5)}, truth, 4)["top1"] == correct[5].double().mean().item()


class MeanColour(nn.Module):
    """CLS: the mean colour of the image."""

    def forward(self, images: Tensor, masks: Tensor | None) -> Any:
        return SimpleNamespace(cls=images.mean(dim=(2, 3)), patches=images.flatten(2).transpose(1, 2))


def context(folder: Path, task: Any, encoder: nn.Module, **changes: Any) -> evals.Context:
    values = {"checkpoint": "unused", "task": task, "preset": "smoke", "num_workers": 0, "batch": 32, **changes}
    world: Any = SimpleNamespace(rank=0, world_size=1, device=torch.device("cpu"))
    pretraining: Any = SimpleNamespace(side=32)
    settings = EvaluateConfig.model_validate(values)
    return evals.Context(settings, pretraining, encoder, pair(folder), world, world.device, lambda *_: None)  # type: ignore[arg-type]


def test_colours_tell_the_photographs(photographs: Path) -> None:
    figures = knn.run(context(photographs, "knn", MeanColour()))
    assert set(figures) == {"top1", "mean_per_class", "top1/k=5", "top1/k=10", "top1/k=20"}
    assert 0.2 < figures["top1"] < 1  # chance: 0.06
    assert figures["mean_per_class"] == pytest.approx(figures["top1"])  # classes of equal size


def test_similarities_are_bounded(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 216 training images 7 of the 90 others at a time; the figures are the same."""
    whole, sizes = knn.run(context(photographs, "knn", MeanColour())), []
    votes = knn.votes

    def noted(*arguments: Any) -> Any:
        for chunk in votes(*arguments):
            sizes.append(len(chunk[5]))
            yield chunk

    monkeypatch.setattr(knn, "SIMILARITIES", 7 * 216)
    monkeypatch.setattr(knn, "votes", noted)
    assert knn.run(context(photographs, "knn", MeanColour())) == whole
    assert sizes == [7] * 12 + [6]


def test_features_are_not_held_twice(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts of a name are let go of before the next one's are joined."""
    parts: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    join = torch.cat

    def compute(images: Tensor, _: Any) -> dict[str, Tensor]:
        made = {name: images.float().mean(dim=(2, 3)) * factor for factor, name in enumerate("abc")}
        parts.extend(map(weakref.ref, made.values()))
        return made

    def counted(tensors: list[Tensor]) -> Tensor:
        alive.append(sum(part() is not None for part in parts))
        return join(tensors)

    monkeypatch.setattr(torch, "cat", counted)
    world: Any = SimpleNamespace(rank=0, world_size=1, device=torch.device("cpu"))
    found = extract(ShardSet(photographs, "val"), range(10), CentreCrop(32, 32), compute, world, 5, 0, lambda *_: None, "")
    assert alive == [6, 4, 2]
    assert torch.equal(found["c"], 2 * found["b"])
    assert len(found["a"]) == 10


def test_more_neighbours_than_images(photographs: Path) -> None:
    with pytest.raises(ValueError, match=r"task\.k is \[10, 300\]; 300 neighbours of 216 training images"):
        knn.run(context(photographs, {"name": "knn", "k": [10, 300]}, MeanColour()))


def test_every_file_has_its_settings_and_the_other_way_round() -> None:
    from typing import get_args

    from equissl.config import Task

    kinds = get_args(get_args(Task)[0])
    assert sorted(kind().name for kind in kinds) == evals.names()
    for name in evals.names():
        module = evals.get(name)
        assert isinstance(module.PROTOCOL, int)
        assert isinstance(module.MAIN, str)
        assert isinstance(module.HIGHER_IS_BETTER, bool)
    with pytest.raises(ValueError, match=r"unknown evaluation 'segment'; choose from equivariance, knn, linear, logistic, projector, r2"):
        evals.get("segment")
