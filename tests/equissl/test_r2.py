"""R²: known answers from encoders that know the angle, or nothing; the leak through the border and its controls."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import io
import math
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import r2_score
from tiny import config as pretraining_config
from torch import Tensor, nn

from equissl import evals
from equissl.config import PRESETS, R2, RANGES_OF, EvaluateConfig, Predicted, PretrainConfig
from equissl.data.labelled import pair
from equissl.data.loader import decode
from equissl.data.shards import Sample, ShardSet, write_manifest, write_shards
from equissl.encoder import build_encoder, load_random
from equissl.evals import r2
from equissl.features import CentreCrop
from equissl.photometry import denormalise, normalise
from equissl.rows import Rows
from equissl.transforms.base import centre

VARIANTS = {"inside", "reflect", "zero", "second_view_only", "random_encoder"}
NAMES = {"rotation", "translation", "translation/x", "translation/y"} | {
    f"{name}/{variant}" for name in ("rotation", "translation") for variant in VARIANTS
}


def dataset(folder: Path, images: dict[str, np.ndarray]) -> Path:
    """`(n, side, side, 3)` uint8 of each split."""
    folder.mkdir(exist_ok=True)
    splits = {}
    for split, pixels in images.items():
        samples = []
        for number, each in enumerate(pixels):
            encoded = io.BytesIO()
            Image.fromarray(each).save(encoded, "PNG", compress_level=0)
            samples.append(Sample(f"{split}_{number}", encoded.getvalue(), "png", 0))
        splits[split] = write_shards(samples, folder, split, 1000)
    write_manifest(folder, "made", ["any"], splits, {})
    return folder


@pytest.fixture(scope="module")
def ramps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Linear ramps of brightness in random directions of ±40 degrees: the angle between two views of one is known exactly."""
    generator = np.random.default_rng(0)
    axis = np.arange(64) - 31.5

    def make(n: int) -> np.ndarray:
        direction = np.radians(generator.uniform(-40, 40, (n, 1, 1)))
        ramp = 128 + 2.5 * (np.cos(direction) * axis[None, None, :] + np.sin(direction) * axis[None, :, None])
        return np.repeat(ramp[..., None].round(), 3, axis=-1).clip(0, 255).astype(np.uint8)

    return dataset(tmp_path_factory.mktemp("ramps"), {"train": make(400), "val": make(200)})


class Direction(nn.Module):
    """Knows the direction of the ramp, in units of 45 degrees, and (with less precision) nothing else."""

    def forward(self, images: Tensor, masks: Tensor | None) -> Any:
        grey = images.mean(dim=1)[:, 8:-8, 8:-8]  # far from any border
        x, y = grey.diff(dim=2).mean(dim=(1, 2)), grey.diff(dim=1).mean(dim=(1, 2))
        angle = torch.rad2deg(torch.atan2(y, x))[:, None] / 45
        return SimpleNamespace(cls=angle, patches=torch.zeros(len(images), 4, 1))


class Nothing(nn.Module):
    """Features that change with every bit of the image and say nothing about the transformation."""

    def forward(self, images: Tensor, masks: Tensor | None) -> Any:
        seed = (images.double().sum(dim=(1, 2, 3), keepdim=True) * 1e4)[:, :, 0, 0]
        noise = torch.sin(seed * torch.arange(1, 17, dtype=torch.float64)).float()
        return SimpleNamespace(cls=noise, patches=noise[:, None])


def context(folder: Path, encoder: nn.Module, pretraining: PretrainConfig, **task: Any) -> evals.Context:
    values = {"checkpoint": "unused", "task": {"name": "r2", **task}, "preset": "smoke", "num_workers": 0, "batch": 64}
    world: Any = SimpleNamespace(rank=0, world_size=1, device=torch.device("cpu"))
    settings = EvaluateConfig.model_validate(values)
    return evals.Context(settings, pretraining, encoder, pair(folder), world, world.device, lambda *_: None)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def known(ramps: Path) -> dict[str, float]:
    return r2.run(context(ramps, Direction(), pretraining_config(backbone__depth=1)))


def test_every_figure_is_there(known: dict[str, float]) -> None:
    assert set(known) == NAMES
    assert known["rotation"] == known["rotation/inside"]
    assert known["translation"] == known["translation/inside"]
    # both parameters have the same range, so the pooled figure is about their mean
    assert known["translation"] == pytest.approx((known["translation/x"] + known["translation/y"]) / 2, abs=0.02)


def test_an_encoder_that_knows_the_angle(known: dict[str, float]) -> None:
    assert known["rotation"] > 0.95
    assert known["rotation/zero"] > 0.95
    assert known["rotation/reflect"] > 0.95
    # without the original half of the angle's variance is the ramp's own: 45² / (45² + 40²)
    assert 0.3 < known["rotation/second_view_only"] < 0.75
    assert abs(known["translation"]) < 0.15  # a shifted ramp is the same ramp, brighter


def test_an_encoder_that_knows_nothing(ramps: Path) -> None:
    figures = r2.run(context(ramps, Nothing(), pretraining_config(backbone__depth=1)))
    assert all(abs(figures[name]) < 0.15 for name in NAMES if "random_encoder" not in name)


def test_black_corners_tell_the_angle_and_the_inside_border_does_not(tmp_path: Path) -> None:
    """Noise without any orientation, an untrained encoder, and only the transformed view: nothing can be known but the border."""
    generator = torch.Generator().manual_seed(0)

    def noise(n: int) -> np.ndarray:
        coarse = torch.rand(n, 3, 40, 40, generator=generator)
        smooth = torch.nn.functional.avg_pool2d(coarse, 3, stride=1)
        return ((smooth - 0.5) * 500 + 128).clamp(0, 255).permute(0, 2, 3, 1).byte().numpy()

    folder = dataset(tmp_path / "noise", {"train": noise(600), "val": noise(250)})
    pretraining = pretraining_config(backbone__depth=2)
    made = context(folder, load_random(pretraining, "cpu"), pretraining, num_train_images=None, num_val_images=None)
    task = made.settings.task
    assert isinstance(task, R2)
    encoders = {"trained": r2.Normed(made.encoder)}
    pairs = {split: r2._Pairs(made, task, split, encoders, tmp_path / "pairs") for split in ("train", "val")}
    found = {}
    for border in ("zero", "inside"):
        second = {split: rows_of(each)[f"trained/rotation/{border}"] for split, each in pairs.items()}
        angle = {split: each.parameters("rotation", each.indices, 0) for split, each in pairs.items()}
        predict = r2.fit(second["train"], angle["train"], task, 0, 1, lambda _: None)
        found[border] = r2.pooled_r2(predict(second["val"]), angle["val"])
    assert found["zero"] > 0.3
    assert abs(found["inside"]) < 0.1


def test_an_encoder_that_knows_the_colours(tmp_path: Path) -> None:
    """Mean brightness, saturation and fine contrast of images that are alike in all of them: these parameters are known exactly."""
    generator = np.random.default_rng(0)

    def make(n: int) -> np.ndarray:
        fine = np.indices((48, 48)).sum(axis=0) % 2 * 60.0 - 30  # a chequerboard, which a blur flattens
        return np.stack([fine + 128 + np.array([30, 0, -30])[:, None, None]] * n).transpose(0, 2, 3, 1).astype(
            np.uint8
        ) + generator.integers(0, 3, (n, 48, 48, 3), dtype=np.uint8)

    class Colours(nn.Module):
        def forward(self, images: Tensor, masks: Tensor | None) -> Any:
            x = denormalise(images)
            means = x.mean(dim=(2, 3))
            return SimpleNamespace(cls=torch.cat([means, x.std(dim=(2, 3))], dim=1) * 10, patches=torch.zeros(len(x), 4, 1))

    folder = dataset(tmp_path / "chequered", {"train": make(500), "val": make(200)})
    made = context(
        folder,
        Colours(),
        pretraining_config(backbone__depth=1),
        transformations=["colour", "blur"],
        sigma=[1.0, 6.0],
        epochs=150,
        base_lr=5e-3,
    )
    figures = r2.run(made)
    parameters = ("brightness", "contrast", "saturation", "hue")
    assert set(figures) == {
        *("colour", "colour/inside", "colour/second_view_only", "colour/random_encoder"),
        *(f"colour/{name}" for name in parameters),
        *("blur", *(f"blur/{variant}" for variant in VARIANTS)),
    }
    assert next(iter(figures)) == "colour"  # what is recorded as the main figure
    assert figures["colour"] == figures["colour/inside"] > 0.8
    assert all(figures[f"colour/{name}"] > 0.6 for name in parameters)
    assert all(figures[f"blur/{border}"] > 0.9 for border in r2.BORDERS)


def test_what_is_evaluated() -> None:
    """The paper's four; as before where nothing is said; nothing twice."""
    assert R2().transformations == ("rotation", "translation")
    paper, smoke = (
        EvaluateConfig.model_validate({"checkpoint": "x", "task": "r2", "preset": preset}).task for preset in ("paper", "smoke")
    )
    assert isinstance(paper, R2)
    assert isinstance(smoke, R2)
    assert paper.transformations == ("rotation", "colour", "blur", "translation")
    assert smoke.transformations == R2().transformations
    assert set(get_args(Predicted)) == set(paper.transformations)
    for wrong in ([], ["blur", "blur"], ["shear"]):
        with pytest.raises(ValueError, match="transformations"):
            R2.model_validate({"transformations": wrong})


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"max_hue": 0.2}, r"max_hue is 0\.2, but colour is not among the transformations \['rotation', 'translation'\].*add colour"),
        ({"sigma": [0.1, 3.0]}, r"sigma is \(0\.1, 3\.0\), but blur is not .* leave sigma at \(0\.1, 2\.0\)"),
        ({"max_degrees": 90.0, "transformations": ["translation"]}, "max_degrees is 90.0, but rotation is not"),
        ({"max_pixels": 5.0, "transformations": ["colour"]}, "max_pixels is 5.0, but translation is not"),
    ],
)
def test_a_range_that_nothing_would_use_is_refused(task: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        R2.model_validate(task)
    R2.model_validate({**task, "transformations": get_args(Predicted)})


def test_a_range_at_its_default_is_not_refused() -> None:
    """As every config that was resolved and stored has them, and those of all presets."""
    assert set(RANGES_OF) == set(get_args(Predicted))
    only = R2(transformations=("colour",), max_hue=0.2)
    assert R2.model_validate_json(only.model_dump_json()) == only
    for preset in (name for name, tasks in PRESETS.items() if "r2" in tasks):
        EvaluateConfig.model_validate({"checkpoint": "x", "task": {"name": "r2", "transformations": ["blur"]}, "preset": preset})


# --- pairs -----------------------------------------------------------------------------------------------------------------


def rows_of(pairs: r2._Pairs) -> Rows:
    assert pairs.features is not None
    return pairs.features


def test_pairs_are_keyed_by_seed_image_and_split(ramps: Path, tmp_path: Path) -> None:
    pretraining = pretraining_config(backbone__depth=1)

    def pairs(split: str, seed: int = 0, **task: Any) -> r2._Pairs:
        made = context(ramps, Direction(), pretraining, **task)
        made = evals.Context(made.settings.model_copy(update={"seed": seed}), *list(vars(made).values())[1:])
        assert isinstance(made.settings.task, R2)
        return r2._Pairs(made, made.settings.task, split, {"trained": r2.Normed(made.encoder)}, Path(tempfile.mkdtemp(dir=tmp_path)))

    few, many = pairs("train", num_train_images=50), pairs("train", pairs_per_image=2)
    assert len(few.indices) == 50 < len(many.indices) == 400
    where = np.searchsorted(many.indices, few.indices)
    few_x, few_y = few.of("rotation", "inside")
    many_inputs, many_y = many.of("rotation", "inside")
    many_x = many_inputs[torch.arange(800)]
    assert many_x.shape == (800, 4)  # two pairs; two views of CLS and mean patch, one number each
    assert torch.allclose(few_x[torch.arange(50)], many_x[where], atol=1e-6)
    assert torch.equal(few_y, many_y[where])
    assert not torch.equal(many_y[:400], many_y[400:])
    assert torch.equal(many_x[:400, 0], many_x[400:, 0])  # the same original
    assert few.of("rotation", "second_view_only")[0].shape == (50, 2)
    assert torch.equal(few.of("rotation", "zero")[1], few_y)  # the same parameters for every border
    assert few.of("translation", "inside")[1].shape == (50, 2)
    assert few_y.abs().max() <= 45
    assert few.of("translation", "inside")[1].abs().max() <= 10 * 32 / 224
    assert not torch.equal(pairs("train", seed=1).of("rotation", "inside")[1], pairs("train").of("rotation", "inside")[1])
    validation = pairs("val", pairs_per_image=2)
    assert len(validation.of("rotation", "inside")[0]) == 200  # one pair per image, whatever the training has
    assert not torch.equal(validation.of("rotation", "inside")[1][:50], many_y[:50])


@pytest.mark.parametrize("asked", [["colour"], ["blur", "translation"], ["rotation", "translation"]])
def test_the_original_does_not_depend_on_what_is_asked(ramps: Path, tmp_path: Path, asked: list[str]) -> None:
    """The middle 32 pixels of the 46 that a rotation by 45 degrees needs."""
    made = context(ramps, Nothing(), pretraining_config(backbone__depth=1), transformations=asked, num_val_images=64)
    assert isinstance(made.settings.task, R2)
    encoder = r2.Normed(made.encoder)
    pairs = r2._Pairs(made, made.settings.task, "val", {"trained": encoder}, tmp_path)
    assert {name for name, _ in pairs.transforms} == set(asked)
    data = ShardSet(ramps, "val")
    seen = torch.stack([centre(CentreCrop(46, 46)(decode(data, int(index))), 32) for index in pairs.indices])
    assert torch.equal(rows_of(pairs)["trained/1"], encoder.cls_and_mean(seen))


@pytest.mark.parametrize(("part", "width"), [("backbone", 2 * 192), ("inv", 2 * 32), ("equi", 16)])
def test_what_is_read(ramps: Path, tmp_path: Path, part: str, width: int) -> None:
    pretraining = pretraining_config(backbone__depth=1)
    encoder = r2.Normed(build_encoder(pretraining))
    made = context(ramps, encoder.encoder, pretraining, num_val_images=5, part=part)
    assert isinstance(made.settings.task, R2)
    pairs = r2._Pairs(made, made.settings.task, "val", {"trained": encoder}, tmp_path)
    data = ShardSet(ramps, "val")
    seen = torch.stack([centre(CentreCrop(46, 46)(decode(data, int(index))), 32) for index in pairs.indices])
    with torch.no_grad():
        found = encoder.encoder(normalise(seen.float() / 255), None)
        inv = [found.split(found.tokens, None)[0]] if found.split else []
        expected = {
            "backbone": torch.cat([found.tokens[:, 0], found.tokens[:, 1:].mean(dim=1)], dim=1),
            "inv": torch.cat([inv[0][:, 0], inv[0][:, 1:].mean(dim=1)], dim=1),
            "equi": found.equi.mean(dim=1),
        }[part]
    assert rows_of(pairs)["trained/1"].shape == (5, width)
    torch.testing.assert_close(rows_of(pairs)["trained/1"], expected)


def test_an_encoder_without_the_part(ramps: Path) -> None:
    pretraining = pretraining_config(backbone__depth=1, auxiliary=None)
    made = context(ramps, build_encoder(pretraining), pretraining, part="equi")
    with pytest.raises(ValueError, match=r"task\.part is equi, but the encoder's representation is not split"):
        r2.run(made)


class Wide(nn.Module):
    """Features of 64 KiB."""

    def forward(self, images: Tensor, masks: Tensor | None) -> Any:
        cls = images.flatten(1).repeat(1, 6)[:, :16384]
        return SimpleNamespace(cls=cls, patches=torch.zeros(len(images), 0, 16384))


def anonymous_bytes() -> int:
    """Of this process: what is no page of a file. Without what earlier tests left to be collected, and free memory that the allocator
    keeps."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


def test_memory_does_not_grow_with_the_number_of_pairs(
    ramps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Of four times as many pairs: 85 MB of features, of which no twentieth is ever in memory."""
    from equissl import encoder

    monkeypatch.setattr(encoder, "load_random", lambda *_: Wide())
    monkeypatch.setattr(r2, "CHUNK", 32)
    peaks, on_disk = [], []
    gc.collect()
    gc.freeze()  # what is there already is not looked through again at every tick
    request.addfinalizer(gc.unfreeze)
    for n in (80, 20, 80):  # the first one warms up
        made = context(ramps, Wide(), pretraining_config(backbone__depth=1), num_train_images=n, num_val_images=n, epochs=2, hidden=8)
        settings = made.settings.model_copy(update={"batch": 4, "task": made.settings.task.model_copy(update={"batch": 16})})
        peak, size = 0, 0

        def tick(*_: Any) -> None:
            nonlocal peak, size
            peak = max(peak, anonymous_bytes())
            size = max(size, sum(path.stat().st_size for path in tmp_path.rglob("*.float32")))

        r2.run(dataclasses.replace(made, settings=settings, tick=tick, run_dir=tmp_path))
        peaks.append(peak)
        on_disk.append(size)
    grown = on_disk[2] - on_disk[1]
    assert grown > 60e6
    assert peaks[2] - peaks[1] < grown / 20
    assert not list(tmp_path.iterdir())


# --- the probe ---------------------------------------------------------------------------------------------------------------


def task(**changes: Any) -> R2:
    return R2.model_validate({"hidden": 32, "batch": 32, "epochs": 40, **changes})


def linear_problem(n: int, noise: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=generator)
    y = x[:, :2] * torch.tensor([30.0, 2.0]) + torch.tensor([100.0, -5.0])
    return x, y + noise * torch.randn(n, 2, generator=generator)


def test_the_probe_learns_in_native_units_and_is_deterministic() -> None:
    x, y = linear_problem(500)
    new_x, new_y = linear_problem(200, seed=1)
    ticks: list[int] = []
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = r2.fit(x, y, task(), 0, 1, ticks.append)(new_x)
    assert torch.equal(before, torch.random.get_rng_state())
    assert ticks == list(range(40))
    assert min(r2_score(new_y, first, multioutput="raw_values")) > 0.95
    assert r2.pooled_r2(first, new_y) == pytest.approx(r2_score(new_y.flatten(), first.flatten()), abs=1e-5)
    torch.manual_seed(6)
    assert torch.equal(r2.fit(x, y, task(), 0, 1, ticks.append)(new_x), first)
    assert not torch.equal(r2.fit(x, y, task(), 1, 1, ticks.append)(new_x), first)


def test_pooling_is_one_mean_over_all_parameters() -> None:
    truth = torch.tensor([[100.0, 1.0], [110.0, -1.0]])
    prediction = torch.tensor([[105.0, 0.0], [105.0, 0.0]])  # knows the means only: 0 for each parameter, but almost 1 pooled
    assert r2_score(truth, prediction, multioutput="raw_values") == pytest.approx([0, 0])
    assert r2.pooled_r2(prediction, truth) == pytest.approx(1 - 52 / (truth - truth.mean()).square().sum().item())


def test_held_out_images_stop_the_probe_before_it_learns_noise() -> None:
    """Targets without any relation to many features: the paper's protocol overfits, early stopping answers with the mean."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(300, 200, generator=generator), torch.randn(300, 1, generator=generator)
    new_x, new_y = torch.randn(300, 200, generator=generator), torch.randn(300, 1, generator=generator)
    overfitted = r2.fit(x, y, task(hidden=64), 0, 1, lambda _: None)
    stopped = r2.fit(x, y, task(hidden=64, held_out=0.2), 0, 1, lambda _: None)
    assert r2.pooled_r2(overfitted(x), y) > 0.9
    assert r2.pooled_r2(overfitted(new_x), new_y) < -0.3
    assert -0.1 < r2.pooled_r2(stopped(new_x), new_y) < 0.05


def test_held_out_keeps_all_pairs_of_an_image_together() -> None:
    """Each image has the same features in both its pairs: were they apart, remembering images would look like understanding."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(200, 100, generator=generator), torch.randn(200, 1, generator=generator)
    predict = r2.fit(torch.cat([x, x]), torch.cat([y, y]), task(hidden=64, held_out=0.25), 0, 2, lambda _: None)
    assert r2.pooled_r2(predict(x), y) < 0.5


def test_weight_decay_is_used() -> None:
    x, y = linear_problem(300)
    free, decayed = (r2.fit(x, y, task(weight_decay=decay), 0, 1, lambda _: None)(x)[:, 0] for decay in (0.0, 50.0))
    assert decayed.std() < 0.8 * free.std()


def test_nothing_left_to_train_on() -> None:
    x, y = linear_problem(4)
    with pytest.raises(ValueError, match=r"held_out 0\.9 of 4 images leaves 0 to train on"):
        r2.fit(x, y, task(held_out=0.9), 0, 1, lambda _: None)


def test_the_papers_preset_is_the_papers_protocol() -> None:
    paper = EvaluateConfig.model_validate({"checkpoint": "x", "task": "r2"}).task
    assert isinstance(paper, R2)
    assert (paper.hidden, paper.base_lr, paper.batch, paper.epochs) == (1024, 1e-3, 256, 300)
    assert (paper.weight_decay, paper.held_out, paper.max_degrees, paper.max_pixels) == (0, 0, 45, 10)
    assert paper.num_train_images is paper.num_val_images is None
    assert math.isclose(r2.pooled_r2(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [2.0]])), 1)
