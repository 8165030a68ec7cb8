"""EquiMod: its loss against the formula, the vector that describes an augmentation, the un-augmented image, the measures."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from numpy.typing import NDArray
from test_simclr import by_hand, projected
from test_vicreg import tokens, trained, values

from equissl import augmentation, draws
from equissl.config import SYNTHETIC, PretrainConfig
from equissl.data import sample
from equissl.data.loader import PlainImages, crops, decode, make_loader, middle_square, resized_crop
from equissl.data.shards import ShardSet
from equissl.data.stream import Stream
from equissl.data.synthetic import Synthetic
from equissl.distributed import World
from equissl.equimod import measures
from equissl.photometry import JITTER, normalise, parameters_of
from equissl.views import MakeViews

Array = NDArray[np.float64]
CPU = torch.device("cpu")
POSITIONS = np.arange(200)


def config(method: str = "simclr", data: str = "photographs", **changes: Any) -> PretrainConfig:
    return tiny.config(data, f"{method}_equimod", **changes)


@pytest.mark.parametrize("method", ["simclr", "byol"])
@pytest.mark.parametrize("changes", [{}, {"auxiliary": None, "transformation": None, "method__equimod": {**tiny.EQUIMOD, "weight": 3.0}}])
def test_the_term_is_the_formula(method: str, changes: dict[str, Any], world: World) -> None:
    run, views = trained(world, f"{method}_equimod", **changes)
    output = run.method.step(views, 1)
    assert views.plain is not None
    assert views.augmentations is not None
    features = np.concatenate([tokens(run.method, run.settings, images)[1] for images in (views.global1, views.global2, views.plain)])
    of = values(run.method, "equimod")
    b = len(views.global1)

    def part(name: str) -> dict[str, Array]:
        return {key.removeprefix(f"{name}."): value for key, value in of.items() if key.startswith(name)}

    y = projected(features, part("projector"), (0, 3, 6))
    y, y0 = y[: 2 * b], np.tile(y[2 * b :], (2, 1))
    p = views.augmentations.double().numpy().reshape(2 * b, -1) @ of["of_parameters.0.weight"].T
    p = (p - p.mean(axis=0)) / np.sqrt(p.var(axis=0) + 1e-5) * of["of_parameters.1.weight"] + of["of_parameters.1.bias"]
    predicted = projected(np.concatenate([y0, p], axis=1), part("predictor"), (0,))
    weight = 3.0 if "auxiliary" in changes else 1.0
    assert output.terms["equivariance"].item() == pytest.approx(weight * by_hand(predicted, y, 0.2), rel=2e-5)

    def cos(u: Array, v: Array) -> Array:
        found: Array = (u * v).sum(axis=1) / np.sqrt((u**2).sum(axis=1) * (v**2).sum(axis=1))
        return found

    expected = {
        "equivariance_absolute": (cos(y, predicted) - cos(y, y0)).mean(),
        "equivariance_relative": ((1 - cos(y, y0)) / (1 - cos(y, predicted))).mean(),
    }
    assert {name: value.item() for name, value in output.watched.measured.items()} == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("method", ["simclr", "byol"])
def test_the_methods_own_term_stays_what_it_is(method: str, world: World) -> None:
    with_, without = (tiny.Run(tiny.config(method=name, backbone__drop_path=0.0), world) for name in (f"{method}_equimod", method))
    views = with_.views(0)
    ours, theirs = with_.method.step(views, 0), without.method.step(views._replace(plain=None, augmentations=None), 0)
    (term,) = theirs.terms
    torch.testing.assert_close(ours.terms[term], theirs.terms[term])
    assert ours.equi is not None
    assert theirs.equi is not None
    torch.testing.assert_close(ours.equi[1], theirs.equi[1])
    assert not any("equimod" in name for name in with_.method.state() if name.startswith("teacher."))


def test_the_measures_of_invariance_are_0_and_1() -> None:
    generator = torch.Generator().manual_seed(0)
    y, y0 = torch.randn(2, 6, 5, generator=generator, dtype=torch.float64)
    absolute, relative = measures(y, 3 * y0, y0)
    torch.testing.assert_close(absolute, torch.zeros(6, dtype=torch.float64))
    torch.testing.assert_close(relative, torch.ones(6, dtype=torch.float64))
    absolute, relative = measures(y, y + 0.01 * y0, y0)
    assert absolute.min() > 0
    assert relative.min() > 1
    absolute, relative = measures(y, y0 - y, y0)
    assert absolute.max() < 0
    assert relative.max() < 1


# --- the vector ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "changes", "expected"),
    [
        ("simclr", {"transformation": None, "auxiliary": None}, 17),
        ("simclr", {"transformation": None, "auxiliary": None, "method__views": {"global1": {"blur": 0.0}, "global2": {"blur": 0.0}}}, 15),
        ("byol", {"transformation": None, "auxiliary": None}, 18),
        ("byol", {"transformation": "se2"}, 21),
        ("byol", {"transformation": "all"}, 26),
    ],
)
def test_how_many_numbers_there_are(method: str, changes: dict[str, Any], expected: int) -> None:
    settings = config(method, **changes)
    assert settings.num_augmentation_parameters == len(augmentation.names(settings)) == expected
    make_views = MakeViews(settings, CPU)
    batch = tiny.batch(settings, 0)
    found = make_views(batch).augmentations
    assert found is not None
    assert found.shape == (2, settings.batch, expected)


def vectors_of(settings: PretrainConfig, positions: NDArray[np.int64] = POSITIONS, epoch: int = 1) -> dict[str, Array]:
    """Each number of both views `(2, b)`, not standardised, of images of several sizes."""
    plain = PlainImages(settings, epoch, positions)
    images = [torch.zeros(20 + position % 13, 24 + position % 7, 3, dtype=torch.uint8).permute(2, 0, 1) for position in positions]
    assert len(list(plain.on_the_way(images))) == len(images)
    assert plain.boxes is not None
    motion = MakeViews(settings, CPU).transform
    drawn = motion.draw(settings.seed, epoch, positions, settings.side) if motion else None
    found = augmentation.vectors(settings, epoch, positions, plain.boxes.numpy(), drawn)
    return dict(zip(augmentation.names(settings), np.moveaxis(found, 2, 0), strict=True))


def test_what_is_not_applied_has_the_values_of_the_identity() -> None:
    nothing = {"jitter": 0.0, "grey": 0.0, "blur": 0.0, "solarize": 0.0}
    never = vectors_of(
        config("byol", method__views={"global1": nothing, "global2": {**nothing, "solarize": 1e-9, "blur": 1e-9}, "flip": 0.0})
    )
    for name, value in {"flip": 0, "jitter": 0, "grey": 0, "blur": 0, "sigma": 0, "solarize": 0, "hue": 0, "brightness": 1}.items():
        assert (never[name] == value).all(), name
    for turn in range(4):
        assert (never[f"turn{turn + 1}"] == turn).all()
    assert (never["contrast"] == 1).all()
    assert (never["saturation"] == 1).all()
    found = vectors_of(config("byol"))
    left = found["jitter"] == 0
    assert 0.1 < left.mean() < 0.3
    for turn in range(4):
        assert (found[f"turn{turn + 1}"][left] == turn).all()
    assert (found["hue"][left] == 0).all()
    assert (found["brightness"][left] == 1).all()
    assert ((found["brightness"] == 1) == left).all()
    assert ((found["sigma"] > 0) == found["blur"]).all()
    for name in ("rotation", "translation_x", "translation_y"):
        assert (found[f"g_{name}"][0] == 0).all(), "of the first view"
        assert (found[f"g_{name}"][1] != 0).all()


def test_a_factor_whose_operation_is_never_done_is_the_identitys() -> None:
    only = {"jitter": 1.0, "brightness": 0.4, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
    found = vectors_of(config(method__views={"global1": only, "global2": only}))
    assert (found["brightness"] != 1).all()
    assert (found["contrast"] == 1).all()
    assert (sum(found[f"turn{turn}"] == 0 for turn in range(1, 5)) == 1).all()
    assert (sum(found[f"turn{turn}"] == -1 for turn in range(1, 5)) == 3).all()


def test_the_vector_says_what_was_drawn() -> None:
    settings = config("byol")
    found = vectors_of(settings)
    for view in range(2):
        drawn = parameters_of(settings, 1, POSITIONS, view)
        assert (found["sigma"][view] == drawn.sigma).all()
        assert (found["solarize"][view] == drawn.solarize).all()
        assert (found["grey"][view] == drawn.grey).all()
        for row in np.flatnonzero(found["jitter"][view]):
            assert [found[f"turn{turn}"][view, row] for turn in range(1, 5)] == drawn.order[row].tolist()
            assert [found[operation.__name__][view, row] for operation in JITTER] == drawn.factors[row].tolist()
    motion = MakeViews(settings, CPU).transform
    assert motion is not None
    rotation = motion.draw(settings.seed, 1, POSITIONS, settings.side)[:, 0].numpy()
    np.testing.assert_array_equal(found["g_rotation"][1], rotation.astype(np.float64))


@pytest.mark.parametrize("method", ["simclr", "byol"])
@pytest.mark.parametrize("transformation", ["se2", "all", None])
def test_standardised_over_many_draws(method: str, transformation: str | None) -> None:
    """On square images, with another seed and epoch than those of the statistics."""
    settings = config(method, transformation=transformation, auxiliary=None, seed=7)
    num = 20_000
    positions = np.arange(num)
    boxes = np.empty((num, 2, 5), dtype=np.float32)
    for view, kind in enumerate(crops(settings)[:2]):
        unit = draws.uniform(7, 3, positions, draws.Stream.CROP + view, 41)
        boxes[:, view, :4] = [np.array(kind.seen_box(500, 500, each)) for each in unit]
        boxes[:, view, 4] = unit[:, 0] < settings.method.views.flip
    transform = MakeViews(settings, CPU).transform
    motion = transform.draw(7, 3, positions, settings.side) if transform else None
    found = augmentation.Augmentation(settings)(3, positions, boxes, motion).double().flatten(0, 1)
    assert found.mean(dim=0).abs().max() < 0.03
    assert (found.std(dim=0) - 1).abs().max() < 0.03
    other = augmentation.Augmentation(settings.model_copy(update={"seed": 1}))(
        3, positions[:9], boxes[:9], None if motion is None else motion[:9]
    )
    assert not torch.equal(other[:, :, 5:], found.view(2, num, -1)[:, :9, 5:].float()), "draws are the run's"
    np.testing.assert_array_equal(
        augmentation.statistics(settings)[0], augmentation.statistics(settings.model_copy(update={"seed": 1}))[0], "statistics are not"
    )


def test_what_is_always_the_same_stays_finite() -> None:
    settings = config("byol", augmentation="g")
    found = MakeViews(settings, CPU)(tiny.batch(settings, 0)).augmentations
    assert found is not None
    assert found.isfinite().all()
    assert found.abs().max() < 20


@pytest.mark.parametrize("transformation", [None, "se2"])
def test_the_box_of_the_vector_gives_the_view(transformation: str | None, photographs: Path) -> None:
    """Of a view without g the same pixels; of the source of g the middle that is seen, up to the half pixel of a resize."""
    data, settings = ShardSet(photographs, "train"), config(data=str(photographs), transformation=transformation, auxiliary=None)
    batch = next(make_loader(data, settings, 0, 1, 3, 4))
    assert batch.boxes is not None
    mirrored = 0
    for row, index in enumerate(batch.index.tolist()):
        image = decode(data, index)
        height, width = image.shape[1:]
        for view, seen in enumerate((batch.view1, batch.source2)):
            top, left, h, w, flip = batch.boxes[row, view].tolist()
            mirrored += flip == 1
            if seen.shape[-1] == settings.side:
                box = round(top * height), round(left * width), round(h * height), round(w * width)
                again = torch.empty(3, settings.side, settings.side, dtype=torch.uint8)
                resized_crop(image, box, again, flip=bool(flip))
                assert torch.equal(again, seen[row])
            else:
                ratio = seen.shape[-1] / settings.side
                middle = (top + h / 2) * height, (left + w / 2) * width
                whole = [round(at - ratio * size / 2) for at, size in zip(middle, (h * height, w * width), strict=True)]
                sides = round(ratio * h * height), round(ratio * w * width)
                again = torch.empty_like(seen[row])
                resized_crop(image, (*whole, *sides), again, flip=bool(flip))
                assert torch.equal(again, seen[row])
    assert 8 <= mirrored <= 24


# --- the un-augmented image ---------------------------------------------------------------------------------------------------


def test_the_square_in_the_middle() -> None:
    assert middle_square(10, 10) == (0, 0, 10, 10)
    assert middle_square(11, 20) == (0, 4, 11, 11)
    assert middle_square(21, 10) == (5, 0, 10, 10)


@pytest.mark.parametrize("pipeline", ["fast", "reference"])
def test_the_un_augmented_image(pipeline: str, photographs: Path) -> None:
    data, settings = ShardSet(photographs, "train"), config(data=str(photographs), pipeline=pipeline)
    batch = next(make_loader(data, settings, 0, 1, 3, 4))
    views = MakeViews(settings, CPU)(batch)
    assert batch.plain is not None
    assert views.plain is not None
    assert batch.plain.dtype == (torch.uint8 if pipeline == "fast" else torch.float32)
    for row, index in enumerate(batch.index.tolist()):
        image = decode(data, index)
        expected = torch.empty(3, settings.side, settings.side, dtype=torch.uint8)
        resized_crop(image, middle_square(image.shape[1], image.shape[2]), expected, flip=False)
        assert (views.plain[row] - normalise(expected.float() / 255)).abs().max() < (1e-6 if pipeline == "fast" else 0.05)


def test_the_views_are_those_of_the_method_alone(photographs: Path) -> None:
    """And the method alone has neither the third image nor the vector."""
    data = ShardSet(photographs, "train")
    settings, alone = config(data=str(photographs)), tiny.config(str(photographs), "simclr")
    mine, theirs = (next(make_loader(data, each, 0, 1, 3, 4)) for each in (settings, alone))
    for name in ("index", "view1", "source2"):
        assert torch.equal(getattr(mine, name), getattr(theirs, name))
    assert (theirs.plain, theirs.boxes) == (None, None)
    views = MakeViews(alone, CPU)(theirs)
    assert (views.plain, views.augmentations) == (None, None)
    assert torch.equal(MakeViews(settings, CPU)(mine).global2, views.global2)


def test_streams_and_noise_have_them_too(photographs: Path) -> None:
    settings = config(data=f"pipe:cat {shlex.quote(str(photographs))}/train-{{000000..000004}}.tar", stream_images=216)
    streamed = next(Stream(settings).loader(0, 1, 0, 1))
    noise = list(Synthetic(config(data=SYNTHETIC), CPU).loader(0, 1, 0, 2))
    for batch in (streamed, *noise):
        assert batch.plain is not None
        assert batch.boxes is not None
        assert batch.plain.shape == (16, 3, 32, 32)
        assert MakeViews(settings, CPU)(batch).augmentations is not None
    assert streamed.boxes is not None
    assert len({tuple(row) for row in streamed.boxes[:, 0].tolist()}) == 16


def test_the_contact_sheet_shows_it(photographs: Path, tmp_path: Path) -> None:
    data, settings = ShardSet(photographs, "train"), config(data=str(photographs))
    batch = sample.one_by_one(data, settings, 2, [3, 5])
    whole = next(make_loader(data, settings, 0, 1, 2, 3))
    for name in ("plain", "boxes"):
        assert torch.equal(getattr(batch, name), getattr(whole, name)[[3, 5]])
    said = [{"row": row, **each} for row, each in enumerate(sample.describe(data, settings, batch))]
    rows = sample.cells_of(data, settings, batch, said)
    for row, cells in enumerate(rows):
        (shown,) = (cell.image for cell in cells if cell.title == "un-augmented")
        assert batch.plain is not None
        assert np.array_equal(np.asarray(shown), np.asarray(sample.picture(batch.plain[row] / 255, sample.CELL // 32)))
        for view, crop in enumerate(said[row]["crops"][:2]):
            assert batch.boxes is not None
            assert bool(batch.boxes[row, view, 4]) == crop["flip"]
            height, width = said[row]["height"], said[row]["width"]
            part = crop["seen"] / crop["side"]
            middle = crop["box"]["top"] + crop["box"]["height"] / 2, crop["box"]["left"] + crop["box"]["width"] / 2
            top, left, h, w = (batch.boxes[row, view, :4] * torch.tensor([height, width, height, width])).tolist()
            assert (h, w) == pytest.approx((part * crop["box"]["height"], part * crop["box"]["width"]), rel=1e-5)
            assert (top + h / 2, left + w / 2) == pytest.approx(middle, rel=1e-5)


def test_parts_of_a_batch_keep_what_belongs_together() -> None:
    settings = config()
    views = MakeViews(settings, CPU)(tiny.batch(settings, 0))
    parts = views.split(4)
    assert views.plain is not None
    assert views.augmentations is not None
    assert torch.equal(torch.cat([part.plain for part in parts if part.plain is not None]), views.plain)
    assert torch.equal(torch.cat([part.augmentations for part in parts if part.augmentations is not None], dim=1), views.augmentations)


def test_the_recipe() -> None:
    settings = PretrainConfig.model_validate(
        {"data": "imagenet1k", "method": {"name": "byol", "equimod": {}}, "epochs": 1000.0, "batch": 4096}
    )
    of = settings.method.equimod
    assert (of.weight, of.temperature, of.hidden, of.embedding, of.parameter_width) == (1.0, 0.2, 2048, 128, 128)
    assert (settings.method.num_global, settings.num_augmentation_parameters) == (3, 18)
    assert not PretrainConfig.model_validate({"data": "imagenet1k", "method": "byol", "epochs": 1.0, "batch": 8}).method.sees_plain
