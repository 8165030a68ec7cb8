"""The fast pipeline's views against Pillow's and torchvision's, of real photographs; the reference as a pipeline of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from equissl.config import PretrainConfig
from equissl.data import reference
from equissl.data.loader import Batch, cut, make_loader
from equissl.data.photographs import load
from equissl.data.shards import ShardSet
from equissl.photometry import augment, normalise
from equissl.views import MakeViews

CPU = torch.device("cpu")
PLAIN = {"jitter": 0.0, "grey": 0.0, "blur": 0.0}
KINDS = ("view1", "source2", "local")
POSITIONS = np.arange(6)


def config(colour: bool = True, **changes: Any) -> PretrainConfig:
    views: dict[str, Any] = {"num_local": 2, "local_size": 32}
    if not colour:
        views |= {"global1": PLAIN, "global2": PLAIN, "local": PLAIN}
    values: dict[str, Any] = {
        "data": "photographs",
        "backbone": {"name": "vit_tiny_patch16_224", "patch_size": 8, "depth": 1},
        "image_size": 96,
        "method": {"name": "ibot", "views": views},
        "transformation": "se2",
        "batch": 6,
        "group_size": 2,
        "num_steps": 10,
        "num_workers": 0,
    }
    return PretrainConfig.model_validate({**values, **changes})


@pytest.fixture(scope="module")
def decoded() -> list[Tensor]:
    return [torch.from_numpy(load(name).copy()).permute(2, 0, 1) for name in ("astronaut", "cell", "chelsea", "china", "coffee", "retina")]


def both(images: list[Tensor], settings: PretrainConfig, epoch: int) -> dict[str, Tensor]:
    """Absolute differences in 1/255 of each kind of crop, `(samples, values)`."""
    theirs = reference.crops(iter(images), settings, epoch, POSITIONS)
    assert all(torch.allclose(255 * crops, (255 * crops).round(), atol=1e-3) for crops in theirs)
    where = torch.from_numpy(POSITIONS)
    ours = MakeViews(settings, CPU).coloured(Batch(0, epoch, where, where, where, *cut(images, settings, epoch, POSITIONS)))
    assert [crops.shape for crops in ours] == [crops.shape for crops in theirs]
    return {kind: 255 * (left - right).abs().flatten(-3).flatten(0, -2) for kind, left, right in zip(KINDS, ours, theirs, strict=True)}


@pytest.mark.parametrize("kind", KINDS)
def test_crops_agree_before_the_photometry(decoded: list[Tensor], kind: str) -> None:
    for epoch in range(2):
        difference = both(decoded, config(colour=False), epoch)[kind]
        assert difference.mean() < 0.05
        assert difference.mean(dim=1).max() < 0.3
        assert difference.max() <= 8


def test_views_agree_after_the_photometry(decoded: list[Tensor]) -> None:
    """Roundings add up, but no parameter, turn or box is another."""
    found: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    for epoch in range(3):
        for kind, difference in both(decoded, config(), epoch).items():
            found[kind].append(difference)
    for kind in KINDS:
        difference = torch.cat(found[kind])
        assert 0.1 < difference.mean() < 1.6
        assert difference.mean(dim=1).max() < 6
        assert difference.max() < 32


def test_views_of_one_crop_agree_after_the_photometry(decoded: list[Tensor]) -> None:
    """The first is coloured without the margin that g needs: the contrast is about the mean of what is seen."""
    contrast = {**PLAIN, "jitter": 1.0, "brightness": 0.0, "contrast": 0.8, "saturation": 0.0, "hue": 0.0}
    views = {"one_crop": True, "num_local": 0, "global1": contrast, "global2": PLAIN}
    for epoch in range(3):
        found = both(decoded, config(method={"name": "ibot", "views": views}), epoch)
        for kind in KINDS[:2]:
            assert found[kind].mean(dim=1).max() < 1.5
            assert found[kind].max() <= 4


def test_each_crop_is_coloured_by_its_own_number(photographs: Path) -> None:
    settings = config()
    batch = next(make_loader(ShardSet(photographs, "train"), settings, 0, 1, 3, 4))
    recipe, position = settings.method.views, batch.position.numpy()
    first, second, local = MakeViews(settings, CPU).coloured(batch)
    crops = [(first, batch.view1, recipe.global1, 96), (second, batch.source2, recipe.global2, 96)]
    crops += [(local[number], batch.local[number], recipe.local, 32) for number in range(2)]
    for number, (found, uint8, photometry, side) in enumerate(crops):
        expected = augment(uint8.float() / 255, photometry, 0, batch.epoch, position, number, side)
        assert torch.allclose(found, expected, rtol=0, atol=1e-6)


def test_as_a_pipeline(photographs: Path) -> None:
    """Its batches are float and not coloured a second time; without local crops too."""
    data = ShardSet(photographs, "train")
    for settings in (config(pipeline="reference"), config(pipeline="reference", method={"name": "ibot", "views": {"num_local": 0}})):
        (batch,) = list(make_loader(data, settings, 0, 1, 3, 4))
        fast = next(make_loader(data, settings.model_copy(update={"pipeline": "fast"}), 0, 1, 3, 4))
        assert torch.equal(batch.index, fast.index)
        assert torch.equal(batch.label, fast.label)
        for kind in KINDS:
            crops = getattr(batch, kind)
            assert crops.dtype == torch.float32
            assert crops.shape == getattr(fast, kind).shape
        make_views = MakeViews(settings, CPU)
        views = make_views(batch)
        assert torch.equal(views.global1, normalise(batch.view1))
        assert torch.equal(views.local, normalise(batch.local))
        assert torch.equal(make_views.coloured(batch)[1], batch.source2)
        assert (make_views.coloured(batch)[0] - make_views.coloured(fast)[0]).abs().mean() < 2 / 255
