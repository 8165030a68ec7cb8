"""Measures of equivariance: formulae in float64 and loops, encoders that are known to be equivariant or invariant, EquiMod's own, images
between the trained fractions, and the entry from end to end."""

from __future__ import annotations

import json
import math
import shutil
from itertools import combinations_with_replacement
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from harness import run_ranks
from numpy.typing import NDArray
from PIL import Image
from sklearn.linear_model import Ridge
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_r2 import Direction, dataset
from torch import Tensor, nn

from equissl import augmentation, between, displacements, evals, evaluate, pretrain, transforms
from equissl.config import PRESETS, Equivariance, EvaluateConfig, PretrainConfig
from equissl.data.labelled import pair
from equissl.data.loader import Batch, PlainImages, crop_numbers, crops, cut, decode, middle_square, resized_crop
from equissl.data.shards import ShardSet
from equissl.distributed import World
from equissl.encoder import load_teacher
from equissl.estimates import estimate_evaluation
from equissl.evals import equivariance
from equissl.evals.equivariance import Basis, distance, explained
from equissl.features import CentreCrop
from equissl.files import write_json
from equissl.learnt import Student
from equissl.photometry import gaussian_blur, normalise, parameters_of, solarized, to_grey
from equissl.views import MakeViews

Array = NDArray[np.float64]
CPU = torch.device("cpu")


# --- the formulae ------------------------------------------------------------------------------------------------------------


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_distance_is_the_mean_over_pairs() -> None:
    z, moved = noise(9, 4), noise(9, 4, seed=1)
    among = np.mean([((z[i] - z[j]) ** 2).sum() for i in range(9) for j in range(9) if i != j])
    assert distance(z, moved) == pytest.approx(np.mean([((z[i] - moved[i]) ** 2).sum() for i in range(9)]) / among)
    assert distance(3 * z + 5, 3 * moved + 5) == pytest.approx(distance(z, moved))
    assert distance(z, z) == 0
    assert distance(torch.ones(9, 4), torch.ones(9, 4)) == 0


def test_the_prediction_is_sklearns_ridge_on_the_features_of_the_docstring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equivariance, "STRENGTHS", (0.01,))
    z = {"train": noise(80, 5) @ noise(5, 5, seed=3) + 7, "val": noise(30, 5, seed=4)}
    theta = {split: torch.rand(len(each), 2, generator=torch.Generator().manual_seed(5)) * 2 - 1 for split, each in z.items()}
    moved = {split: each + 0.3 * noise(len(each), 5, seed=6) + theta[split][:, :1] * each[:, :1] for split, each in z.items()}
    mean = z["train"].numpy().mean(axis=0)
    _, _, rows = np.linalg.svd(z["train"].numpy() - mean)
    components = rows[:3].T

    def inputs(split: str) -> Array:
        scores, found = (z[split].numpy() - mean) @ components, []
        for row, (a, b) in enumerate(theta[split].double().numpy()):
            monomials = [1, a, b, *(u * v for u, v in combinations_with_replacement([a, b], 2))]
            found.append([s * m for s in (1, *scores[row]) for m in monomials][1:])
        return np.array(found)

    change = {split: (moved[split] - z[split]).numpy() @ components for split in z}
    x = inputs("train")
    centre, deviation = x.mean(axis=0), x.std(axis=0)
    ridge = Ridge(alpha=0.01 * len(x)).fit((x - centre) / deviation, change["train"])
    error = change["val"] - ridge.predict((inputs("val") - centre) / deviation)
    expected = 1 - (error**2).sum() / ((change["val"] - change["val"].mean(axis=0)) ** 2).sum()
    assert explained(Basis(z["train"], 3), z, moved, theta, 0.2, 0) == pytest.approx(expected, rel=1e-9)


def turned(z: Tensor, theta: Tensor) -> Tensor:
    """The plane turned by up to half a radian."""
    angle = theta[:, 0].double() / 2
    x, y = z.unbind(1)
    return torch.stack([angle.cos() * x - angle.sin() * y, angle.sin() * x + angle.cos() * y], dim=1)


def test_a_representation_of_a_group_is_explained_and_noise_is_not() -> None:
    z = {"train": noise(200, 2), "val": noise(100, 2, seed=1)}
    theta = {split: torch.rand(len(each), 1, generator=torch.Generator().manual_seed(2)) * 2 - 1 for split, each in z.items()}
    moved = {split: turned(each, theta[split]) for split, each in z.items()}
    nothing = {split: each[:, :0] for split, each in theta.items()}
    assert explained(Basis(z["train"], 2), z, moved, theta, 0.2, 0) > 0.999
    assert explained(Basis(z["train"], 2), z, moved, nothing, 0.2, 0) < 0.2
    assert explained(Basis(3 * z["train"], 2), *({s: 3 * v for s, v in each.items()} for each in (z, moved)), theta, 0.2, 0) > 0.999
    random = {split: each + noise(len(each), 2, seed=9) for split, each in z.items()}
    assert explained(Basis(z["train"], 2), z, random, theta, 0.2, 0) < 0.1
    assert explained(Basis(z["train"], 2), z, z, theta, 0.2, 0) == 0


def test_the_strength_is_chosen_on_held_out_images() -> None:
    """Fifty inputs of noise on forty images: without a penalty the prediction would be far worse than the mean."""
    z = {"train": noise(40, 20), "val": noise(200, 20, seed=1)}
    theta = {split: torch.rand(len(each), 1, generator=torch.Generator().manual_seed(2)) * 2 - 1 for split, each in z.items()}
    moved = {split: each + noise(len(each), 20, seed=9) for split, each in z.items()}
    assert explained(Basis(z["train"], 20), z, moved, theta, 0.2, 0) > -0.1
    with pytest.raises(ValueError, match=r"task\.held_out 0\.99 of 40 training images"):
        explained(Basis(z["train"], 2), z, moved, theta, 0.99, 0)


# --- encoders of which it is known ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ramps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Linear ramps in random directions of ±40 degrees, of random steepness."""
    generator = np.random.default_rng(0)
    axis = np.arange(64) - 31.5

    def make(n: int) -> np.ndarray:
        direction, steepness = np.radians(generator.uniform(-40, 40, (n, 1, 1))), generator.uniform(1, 2.5, (n, 1, 1))
        ramp = 128 + steepness * (np.cos(direction) * axis[None, None, :] + np.sin(direction) * axis[None, :, None])
        return np.repeat(ramp[..., None].round(), 3, axis=-1).clip(0, 255).astype(np.uint8)

    return dataset(tmp_path_factory.mktemp("ramps"), {"train": make(150), "val": make(80)})


class Toy(nn.Module):
    """Direction or steepness of a ramp."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.direction = what, Direction()

    def forward(self, images: Tensor, masks: Tensor | None = None) -> Any:
        if self.what == "direction":
            found = self.direction(images, None).cls
        else:
            grey = images.mean(dim=1)[:, 8:-8, 8:-8]
            x, y = grey.diff(dim=2).mean(dim=(1, 2)), grey.diff(dim=1).mean(dim=(1, 2))
            found = torch.hypot(x, y)[:, None]
        return SimpleNamespace(cls=found, inv_cls=found, patches=torch.zeros(len(images), 0, 1), equi=None)


def context(folder: Path, encoder: nn.Module, pretraining: PretrainConfig, checkpoint: str = "unused", **task: Any) -> evals.Context:
    values = {"checkpoint": checkpoint, "task": {"name": "equivariance", **task}, "preset": "smoke", "num_workers": 0, "batch": 64}
    world: Any = SimpleNamespace(rank=0, world_size=1, device=CPU)
    settings = EvaluateConfig.model_validate(values)
    data: Any = pair(folder) if (folder / "manifest.json").is_file() else None
    return evals.Context(settings, pretraining, encoder, data, world, world.device, lambda *_: None)  # type: ignore[arg-type]


PLAIN = tiny.config(backbone__depth=1, auxiliary=None)


def test_an_equivariant_and_an_invariant_encoder(ramps: Path) -> None:
    task = {"transformations": ["rotation"], "num_train_images": None, "num_val_images": None}
    equivariant = equivariance.run(context(ramps, Toy("direction"), PLAIN, **task))
    invariant = equivariance.run(context(ramps, Toy("steepness"), PLAIN, **task))
    assert equivariant.keys() == invariant.keys()
    assert set(equivariant) == {
        *(f"rotation/backbone/{name}" for name in ("explained", "explained/without_parameters", "explained/random_encoder")),
        *(f"rotation/{part}/distance{control}" for part in ("inv", "backbone") for control in ("", "/random_encoder")),
        *(f"rotation/inv/cosine{control}" for control in ("", "/random_encoder")),
    }
    assert next(iter(equivariant)) == equivariance.MAIN
    assert equivariant["rotation/backbone/explained"] > 0.99
    assert equivariant["rotation/backbone/explained/without_parameters"] < 0.1
    # angles of ±40 and ±45 degrees, uniform: a third of the squares of these over twice those
    assert equivariant["rotation/inv/distance"] == pytest.approx((45**2 / 3) / (2 * 40**2 / 3), rel=0.25)
    assert invariant["rotation/inv/distance"] < 0.01
    assert invariant["rotation/inv/cosine"] == pytest.approx(1)
    assert equivariant["rotation/inv/cosine"] < 0.9
    # the control is the untrained architecture, whatever the encoder
    controls = [name for name in equivariant if name.endswith("random_encoder")]
    assert len(controls) == 4
    assert all(equivariant[name] == invariant[name] for name in controls)


def test_views_and_parameters_are_those_of_the_transformation(ramps: Path) -> None:
    made = context(ramps, Toy("direction"), PLAIN, max_pixels=20.0)
    task = made.settings.task
    assert isinstance(task, Equivariance)
    pairs = equivariance._Pairs(made, task, {"": made.encoder})
    indices = np.array([3, 8, 70])
    for name in task.transformations:
        for split in ("train", "val"):
            low, high = np.array(pairs.transforms[name].ranges(32)).T
            drawn = pairs.transforms[name].draw(0, int(split == "val"), indices, 32).numpy()
            np.testing.assert_allclose(low + (pairs.scaled(name, indices, split).numpy() + 1) / 2 * (high - low), drawn, atol=1e-5)
    assert not torch.equal(pairs.scaled("blur", indices, "train"), pairs.scaled("blur", indices, "val"))
    data = ShardSet(ramps, "val")
    found, left = pairs.features(data, indices, "val")
    assert (left == indices).all()
    source = torch.stack([CentreCrop(pairs.source, pairs.source)(decode(data, int(i))) for i in indices]).float() / 255
    margin = (pairs.source - 32) // 2
    torch.testing.assert_close(found["inv"], Toy("direction")(normalise(source[..., margin:-margin, margin:-margin])).cls)
    colours = pairs.transforms["colour"].draw(0, 1, indices, 32)
    coloured = pairs.transforms["colour"].apply(source[..., margin:-margin, margin:-margin].contiguous(), colours, 1.0, 32)
    torch.testing.assert_close(found["inv/colour"], Toy("direction")(normalise(coloured)).cls)
    alone = equivariance._Pairs(made, task.model_copy(update={"transformations": ("colour",)}), {"": made.encoder})
    assert alone.source == pairs.source, "what is seen does not depend on what else is asked for"


# --- complete runs -------------------------------------------------------------------------------------------------------------

RUNS = ("byol_equimod", "simclr_equimod", "vicreg_head", "ibot_head")


@pytest.fixture(scope="module")
def runs(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Complete runs of two steps. Not to be written into."""
    found = {}
    for method in RUNS:
        found[method] = tmp_path_factory.mktemp("runs") / method
        found[method].mkdir()
        config = tiny.config(str(photographs), method=method, num_steps=2).model_dump(mode="json", by_alias=True)
        result = pretrain.main(config, found[method], lambda: False)
        write_json(found[method] / "config.json", config)
        write_json(found[method] / "result.json", result)
        (found[method] / "COMPLETE").touch()
    return found


def student(run: Path, world: World) -> Student:
    teacher, config, _ = load_teacher(run)
    return Student(run, config, teacher, world)


def images(n: int, side: int = 32) -> Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(0))


def test_the_student_is_not_the_teacher_where_there_is_one(runs: dict[str, Path], world: World) -> None:
    x = images(2)
    for method, differs in (("byol_equimod", True), ("simclr_equimod", False)):
        found, (teacher, _, _) = student(runs[method], world), load_teacher(runs[method])
        assert torch.equal(found.inv(x), teacher(normalise(x)).inv_cls) is not differs


@pytest.mark.parametrize("method", RUNS)
def test_what_decoders_read_is_what_the_auxiliary_reads(method: str, runs: dict[str, Path], world: World) -> None:
    """By the weights in the files, in float64 and numpy."""
    found = student(runs[method], world)
    x = images(2)
    patches = found.encoder(normalise(x)).patches.double().numpy()
    if method.endswith("equimod"):
        assert found.encoder.split is not None
        layer = found.encoder.split.equi
        expected = patches @ layer.weight.double().numpy().T + layer.bias.double().numpy()
    else:
        of = {name: tensor.double().numpy() for name, tensor in found.head.state_dict().items()}  # type: ignore[union-attr]
        if method == "ibot_head":
            for number in (0, 2, 4):
                patches = patches @ of[f"mlp.{number}.weight"].T + of[f"mlp.{number}.bias"]
                erf = np.vectorize(math.erf)
                patches = patches if number == 4 else patches * (1 + erf(patches / math.sqrt(2))) / 2
            rows = of["equi_prototypes"]
            patches = patches / np.linalg.norm(patches, axis=-1, keepdims=True)
            expected = patches @ (rows / np.linalg.norm(rows, axis=1, keepdims=True)).T
        else:
            for linear, norm in ((0, 1), (3, 4)):
                patches = patches @ of[f"mlp.{linear}.weight"].T
                patches = (patches - of[f"mlp.{norm}.running_mean"]) / np.sqrt(of[f"mlp.{norm}.running_var"] + 1e-5)
                patches = np.maximum(0, patches * of[f"mlp.{norm}.weight"] + of[f"mlp.{norm}.bias"])
            expected = patches @ of["equi.weight"].T
    np.testing.assert_allclose(found.equi(x).numpy(), expected, rtol=1e-3, atol=1e-4)
    assert found.decoders is not None
    assert len(found.decoders) == 3


# --- EquiMod ---------------------------------------------------------------------------------------------------------------------


def packed(config: PretrainConfig, data: ShardSet, indices: NDArray[np.int64], seed: int) -> tuple[displacements.Augmented, Tensor]:
    augmented = displacements.Augmented(config, seed)
    return augmented, torch.stack([augmented(decode(data, int(i)), int(i)) for i in indices])


@pytest.mark.parametrize("method", ["simclr", "byol"])
@pytest.mark.parametrize("transformation", [None, "se2"])
def test_the_whole_augmentation_is_that_of_the_pretraining(method: str, transformation: str | None, photographs: Path) -> None:
    config = tiny.config(str(photographs), f"{method}_equimod", transformation=transformation, auxiliary=None, seed=5)
    data, indices = ShardSet(photographs, "val"), np.array([1, 4, 30, 31])
    augmented, content = packed(config.model_copy(update={"seed": 0}), data, indices, seed=5)
    plain, found = augmented.views(content, indices)
    of_loader = PlainImages(config, 0, indices)
    view1, source2, local = cut(of_loader.on_the_way([decode(data, int(i)) for i in indices]), config, 0, indices)
    where = torch.from_numpy(indices)
    views = MakeViews(config, CPU)(
        Batch(0, 0, where, where, 0 * where, view1, source2, local, of_loader.images, of_loader.boxes)  # as the loader's at epoch 0
    )
    torch.testing.assert_close(normalise(plain), views.plain)
    assert views.augmentations is not None
    for number, view in enumerate((views.global1, views.global2)):
        torch.testing.assert_close(normalise(found[f"all/{number + 1}"][0]), view)
        torch.testing.assert_close(found[f"all/{number + 1}"][1], views.augmentations[number])


def test_each_operation_alone(photographs: Path) -> None:
    config = tiny.config(str(photographs), "byol_equimod", transformation=None, auxiliary=None)
    data, indices = ShardSet(photographs, "val"), np.arange(6)
    augmented, content = packed(config, data, indices, seed=3)
    plain, found = augmented.views(content, indices)
    # the recipe of the first view has no solarization
    assert set(found) == {f"{name}/{view}" for name in ("all", "crop", "flip", "colour", "grey", "blur", "solarize") for view in (1, 2)} - {
        "solarize/1"
    }
    names, (mean, deviation) = augmentation.names(config), augmentation.statistics(config)
    known = {name: dict(zip(names, (v.double().numpy() * deviation + mean).T, strict=True)) for name, (_, v) in found.items()}
    identity = {"flip": 0, "jitter": 0, "grey": 0, "blur": 0, "sigma": 0, "solarize": 0, "brightness": 1, "hue": 0, "turn2": 1}
    changed = {
        "crop": set(),
        "flip": {"flip"},
        "colour": {"jitter", "brightness", "hue", "turn2"},
        "grey": {"grey"},
        "blur": {"blur", "sigma"},
        "solarize": {"solarize"},
    }
    with_seed = config.model_copy(update={"seed": 3})
    for key, of in known.items():
        operation, view = key.split("/")[0], int(key[-1]) - 1
        if operation == "all":
            continue
        for name, value in identity.items():
            if name not in changed[operation]:
                np.testing.assert_allclose(of[name], value, atol=1e-5, err_msg=f"{key} {name}")
        for flag in changed[operation] & {"flip", "jitter", "grey", "blur", "solarize"}:
            np.testing.assert_allclose(of[flag], 1, atol=1e-5)
        if operation == "crop":
            kind = crops(with_seed)[view]
            for row, index in enumerate(indices):
                image = decode(data, int(index))
                numbers = crop_numbers(with_seed, 0, np.array([index]), kind)[0]
                expected = torch.empty(3, 32, 32, dtype=torch.uint8)
                resized_crop(image, kind.box(*image.shape[1:], numbers), expected, flip=False)
                torch.testing.assert_close(found[key][0][row], expected.float() / 255)
                np.testing.assert_allclose(of["top"][row], kind.seen_box(*image.shape[1:], numbers)[0], atol=1e-5)
        else:
            height, width = decode(data, 0).shape[1:]
            np.testing.assert_allclose(of["height"], middle_square(height, width)[2] / height, atol=1e-5)
    torch.testing.assert_close(found["flip/1"][0], plain.flip(-1))
    torch.testing.assert_close(found["grey/1"][0], to_grey(plain).expand_as(plain))
    torch.testing.assert_close(found["solarize/2"][0], solarized(plain))
    sigma = torch.from_numpy(known["blur/1"]["sigma"]).float()
    torch.testing.assert_close(found["blur/1"][0], gaussian_blur(plain, sigma, 1), atol=1e-4, rtol=1e-4)
    assert (found["colour/1"][0] - plain).abs().amax(dim=(1, 2, 3)).min() > 0.01
    # colours are those that the pretraining's recipe draws for the sample, where it jitters at all
    drawn1 = parameters_of(with_seed, 0, indices, 0)
    assert drawn1.jitter.any()
    for row in np.flatnonzero(drawn1.jitter):
        np.testing.assert_allclose(known["colour/1"]["hue"][row], drawn1.factors[row, 3], atol=1e-5)


@pytest.mark.parametrize("method", ["simclr_equimod", "byol_equimod"])
def test_equimods_measures_are_the_formulae(method: str, runs: dict[str, Path], world: World, photographs: Path) -> None:
    found = student(runs[method], world)
    indices = np.array([0, 3, 7, 50, 60])
    augmented, content = packed(found.config, ShardSet(photographs, "val"), indices, seed=0)
    of_images = displacements.of_images(found, augmented, content, indices)
    plain, views = augmented.views(content, indices)
    assert found.equimod is not None
    of = {name: tensor.double().numpy() for name, tensor in found.equimod.state_dict().items()}

    def layers(x: Array, part: str, numbers: tuple[int, ...]) -> Array:
        for linear in numbers:
            x = x @ of[f"{part}.mlp.{linear}.weight"].T
            x = (x - of[f"{part}.mlp.{linear + 1}.running_mean"]) / np.sqrt(of[f"{part}.mlp.{linear + 1}.running_var"] + 1e-5)
            if linear != numbers[-1]:
                x = np.maximum(0, x * of[f"{part}.mlp.{linear + 1}.weight"] + of[f"{part}.mlp.{linear + 1}.bias"])
        return x

    def embed(x: Tensor) -> Array:
        return layers(found.inv(x).double().numpy(), "projector", (0, 3, 6))

    def cos(u: Array, v: Array) -> float:
        return float(u @ v / np.sqrt((u @ u) * (v @ v)))

    y0 = embed(plain)
    for key in ("all/1", "all/2", "crop/1", "colour/2", "flip/2"):
        y, p = embed(views[key][0]), views[key][1].double().numpy() @ of["of_parameters.0.weight"].T
        p = (p - of["of_parameters.1.running_mean"]) / np.sqrt(of["of_parameters.1.running_var"] + 1e-5)
        p = p * of["of_parameters.1.weight"] + of["of_parameters.1.bias"]
        predicted = layers(np.concatenate([y0, p], axis=1), "predictor", (0,))
        for row in range(len(indices)):
            plainly, well = cos(y[row], y0[row]), cos(y[row], predicted[row])
            expected = [well - plainly, (1 - plainly) / (1 - well)]
            np.testing.assert_allclose(of_images[key][row].numpy(), expected, rtol=2e-3, atol=2e-4, err_msg=f"{key} {row}")


class Fixed(nn.Module):
    """In the place of EquiMod: predicts the plain image's embedding (invariance), or with the parameters the right one."""

    def __init__(self, is_right: bool) -> None:
        super().__init__()
        self.projector = self.of_parameters = nn.Identity()
        self.is_right = is_right

    def predictor(self, joined: Tensor) -> Tensor:
        y0, p = joined[:, :3], joined[:, 3:]
        return y0 + p if self.is_right else y0


def test_invariance_reads_0_and_1_and_a_right_prediction_much_more() -> None:
    """Features in which the augmentation is an addition of its parameters."""
    generator = torch.Generator().manual_seed(0)
    plain, p = torch.rand(2, 5, 3, generator=generator)

    class Views(displacements.Augmented):
        def __init__(self) -> None:
            pass

        def views(self, packed: Tensor, indices: NDArray[np.int64]) -> Any:
            return plain, {"all/1": (plain + p, p), "nothing/1": (plain, 0 * p)}

    for is_right in (False, True):
        fake: Any = SimpleNamespace(equimod=Fixed(is_right), inv=lambda x: x)
        found = displacements.of_images(fake, Views(), plain, np.arange(5))
        if is_right:
            assert found["all/1"][:, 0].min() > 0
            assert found["all/1"][:, 1].min() > 1e6
        else:
            torch.testing.assert_close(found["all/1"], torch.tensor([[0.0, 1.0]] * 5, dtype=torch.float64))
        assert found["nothing/1"].isfinite().all()
        torch.testing.assert_close(found["nothing/1"], torch.tensor([[0.0, 1.0]] * 5, dtype=torch.float64))


# --- between the trained fractions ---------------------------------------------------------------------------------------------


def test_which_fractions_are_shown_and_by_which_decoder() -> None:
    third = [1 / 3, 2 / 3]
    assert between.shown_fractions(third) == pytest.approx([1 / 6, 1 / 3, 1 / 2, 2 / 3, 5 / 6])
    assert between.shown_fractions([*third, 1.0]) == pytest.approx([1 / 6, 1 / 3, 1 / 2, 2 / 3, 5 / 6, 1])
    assert between.shown_fractions([0.5]) == pytest.approx([0.25, 0.5, 0.75])
    expected = [(0, 1 / 2), (0, 1), (1, 3 / 4), (1, 1), (1, 5 / 4)]
    assert [between.choose(third, t) for t in between.shown_fractions(third)] == [(k, pytest.approx(way)) for k, way in expected]
    for trained in (third, [0.25, 0.5, 0.75, 1.0]):
        assert [between.choose(trained, t) for t in trained] == [(k, 1.0) for k in range(len(trained))]


class Pixels:
    """Tokens are the pixels; decoder k blends its two halves as far as its fraction: what linear features would do."""

    def __init__(self, config: PretrainConfig) -> None:
        self.config = config
        assert config.auxiliary is not None
        self.decoders = [self.decoder(fraction) for fraction in config.auxiliary.fractions]

    def equi(self, images: Tensor) -> Tensor:
        return normalise(images).flatten(2).transpose(1, 2)

    @staticmethod
    def decoder(fraction: float) -> Any:
        def decode(tokens: Tensor) -> Tensor:
            first, second = tokens.split(3, dim=2)
            side = round(tokens.shape[1] ** 0.5)
            return torch.lerp(first, second, fraction).transpose(1, 2).unflatten(2, (side, side))

        return decode


@pytest.mark.parametrize("include_final", [False, True])
def test_linear_features_blend_at_every_fraction(include_final: bool, photographs: Path, tmp_path: Path) -> None:
    config = tiny.config(str(photographs), auxiliary__include_final=include_final, transformation={"name": "rot", "border": "zero"})
    made = context(photographs, Toy("direction"), config)
    made = evals.Context(made.settings, config, made.encoder, pair(photographs), made.world, CPU, made.tick, run_dir=tmp_path)
    data, indices = ShardSet(photographs, "val"), np.arange(0, 90, 4)
    fake: Any = Pixels(config)
    found = between.measure(made, fake, data, indices)
    for name in ("trained", "between"):
        assert found[name] == pytest.approx(found[f"{name}/blend"], rel=1e-4)
        assert found[name] < min(found[f"{name}/untransformed"], found[f"{name}/transformed"])

    # the figures by the formula, in float64
    transform = transforms.get(config.transformation)  # type: ignore[arg-type]
    source = torch.stack([CentreCrop(32, 32)(decode(data, int(i))) for i in indices]).float() / 255
    drawn = transform.draw(0, 1, indices, 32)

    def at(fraction: float) -> Array:
        found: Array = normalise(transform.apply(source, drawn, fraction, 32)).double().numpy()
        return found

    u0, u1 = at(0.0), at(1.0)
    errors = {}
    for t in between.shown_fractions(config.auxiliary.fractions):  # type: ignore[union-attr]
        u = at(t)
        constant = ((u - u.mean(axis=(0, 2, 3), keepdims=True)) ** 2).mean()
        errors[t] = (((1 - t) * u0 + t * u1 - u) ** 2).mean() / constant, ((u0 - u) ** 2).mean() / constant
        assert found[f"t={t:.2f}"] == pytest.approx(errors[t][0], rel=1e-4, abs=1e-7)
    beside = [t for t in errors if not any(abs(t - k) < 1e-6 for k in config.auxiliary.fractions)]  # type: ignore[union-attr]
    assert len(beside) == 3
    assert found["between/untransformed"] == pytest.approx(np.mean([errors[t][1] for t in beside]), rel=1e-4)

    with Image.open(tmp_path / "pictures" / "fractions.png") as sheet:
        assert sheet.size == ((2 + 2 * (6 if include_final else 5)) * 97, between.HEADER + 8 * 97)
        pixels = np.asarray(sheet)
    shown = indices[:: len(indices) // 8][:8]
    first = CentreCrop(32, 32)(decode(data, int(shown[0]))).numpy().transpose(1, 2, 0)
    np.testing.assert_allclose(pixels[between.HEADER : between.HEADER + 96 : 3, 0:96:3].astype(int), first.astype(int), atol=1)
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert board.Tags()["images"] == ["fractions"]


# --- the entry -----------------------------------------------------------------------------------------------------------------

TASK = {"name": "equivariance", "num_train_images": 60, "num_val_images": 30, "num_components": 4}


def settings(run: Path, **task: Any) -> dict[str, Any]:
    return {"checkpoint": str(run), "task": {**TASK, **task}, "preset": "smoke", "num_workers": 0, "batch": 16}


def test_from_end_to_end(runs: dict[str, Path], tmp_path: Path) -> None:
    result = evaluate.main(settings(runs["byol_equimod"]), tmp_path, lambda: False)
    assert result is not None
    found = result["metrics"]
    assert result["main"] == {"metric": "equivariance/rotation/backbone/explained", "higher_is_better": True}
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    for name in (
        *(f"{g}/{part}/distance" for g in ("rotation", "translation", "colour", "blur") for part in ("inv", "equi", "backbone")),
        *(f"equimod/{measure}{operation}" for measure in ("absolute", "relative") for operation in ("", "/crop", "/flip", "/solarize")),
        *("reconstruction/trained", "reconstruction/between", "reconstruction/between/blend", "reconstruction/t=0.50"),
    ):
        assert f"equivariance/{name}" in found
    assert (tmp_path / "pictures" / "fractions.png").is_file()

    calls = iter(range(10**6))
    other = tmp_path / "other"
    other.mkdir()
    assert evaluate.main(settings(runs["byol_equimod"]), other, lambda: next(calls) > 15) is None
    again = evaluate.main(settings(runs["byol_equimod"]), other, lambda: False)
    assert again == result

    (other / "two").mkdir()
    first, second = run_ranks(evaluate_on, 2, settings(runs["byol_equimod"]), str(other / "two"))
    assert second["metrics"] == {}
    assert first["metrics"].keys() == found.keys()
    for name, value in found.items():
        assert first["metrics"][name] == pytest.approx(value, rel=2e-3, abs=2e-3), name


def evaluate_on(config: dict[str, Any], run_dir: str) -> dict[str, Any] | None:
    return evaluate.main({**config, "batch": 7}, Path(run_dir), lambda: False)


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        (
            "student.safetensors",
            "remove",
            r"has no student\.safetensors, with which this is measured: it was removed; have the",
        ),
        ("decoders.safetensors", "change", r"decoders\.safetensors has the sha256 .*, but result\.json says .*: it was changed or damaged"),
        (
            "config.json",
            "change",
            r"student\.safetensors does not fit its config: equimod\.projector\.\S+ is missing, unknown or of",
        ),
    ],
)
def test_what_is_missing_or_damaged_is_named(file: str, damage: str, message: str, runs: dict[str, Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs["byol_equimod"], tmp_path / "run"))
    if damage == "remove":
        (run / file).unlink()
    elif file == "config.json":
        config = json.loads((run / file).read_text())
        config["method"]["equimod"]["hidden"] += 8
        write_json(run / file, config)
    else:
        (run / file).write_bytes((run / file).read_bytes() + b" ")
    with pytest.raises(ValueError, match=message):
        evaluate.main(settings(run), tmp_path / "evaluation", lambda: False)


def test_of_a_run_that_an_earlier_version_made_the_rest_is_measured(runs: dict[str, Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs["byol_equimod"], tmp_path / "run"))
    result = json.loads((run / "result.json").read_text())
    del result["decoders_sha256"]
    write_json(run / "result.json", result)
    (tmp_path / "evaluation").mkdir()
    made = evaluate.main(settings(run), tmp_path / "evaluation", lambda: False)
    assert made is not None
    assert "an earlier version made this run" in made["chosen"]["not_measured"]
    assert "equivariance/rotation/backbone/explained" in made["metrics"]
    assert not [name for name in made["metrics"] if "reconstruction" in name or "equimod" in name]


def test_more_components_than_images_are_none() -> None:
    """Of n images at most n - 1 have any variance: the next one's scores would be rounding, divided by rounding."""
    generator = torch.Generator().manual_seed(0)
    z, moved = ({split: torch.randn(n, 384, generator=generator) for split, n in (("train", 12), ("val", 30))} for _ in range(2))
    theta = {split: torch.rand(len(values), 2, generator=generator) for split, values in z.items()}
    assert explained(Basis(z["train"], 64), z, moved, theta, 0.2, 0) > -2


def test_a_run_without_either_needs_no_files() -> None:
    with pytest.raises(ValueError, match="precision is bfloat16, but equivariance measures small changes"):
        EvaluateConfig.model_validate({"checkpoint": "x", "task": "equivariance", "precision": "bfloat16"})
    of_an_export = context(Path(), Toy("direction"), tiny.config())
    assert equivariance._student(of_an_export) is None
    assert "only a complete run has the student" in of_an_export.chosen["not_measured"]
    made = context(Path(), Toy("direction"), PLAIN)
    assert equivariance._student(made) is None
    assert made.chosen == {}
    cross = tiny.config(method="vicreg_cross")
    assert equivariance._student(context(Path(), Toy("direction"), cross)) is None


def test_presets_and_what_it_costs() -> None:
    assert {name for name, tasks in PRESETS.items() if "equivariance" in tasks} == {"paper", "smoke"}
    config = EvaluateConfig.model_validate({"checkpoint": "x", "task": "equivariance", "data": "cifar10"})

    def flops(method: Any) -> float:
        backbone = {"name": "resnet18", "stem": "cifar"}
        values = {"data": "cifar10", "backbone": backbone, "epochs": 1, "batch": 64, "method": method}
        found = estimate_evaluation(config, PretrainConfig.model_validate(values), {"tflops": 300.0})
        assert found is not None
        return found.flops

    # 10 passes over 10000 training images and 5000 of validation; of these 15 more for EquiMod
    assert flops({"name": "byol", "equimod": {}}) / flops("byol") == pytest.approx((150 + 75) / 150)


@pytest.mark.parametrize(
    ("metric", "higher"),
    [
        ("rotation/backbone/explained", True),
        ("rotation/backbone/explained/without_parameters", None),
        ("blur/inv/distance", False),
        ("blur/inv/distance/random_encoder", None),
        ("blur/equi/distance", None),
        ("colour/inv/cosine", True),
        ("equimod/relative", True),
        ("reconstruction/between", False),
        ("reconstruction/between/blend", None),
        ("reconstruction/t=0.17", False),
    ],
)
def test_the_better_direction_of_each_measure(metric: str, higher: bool | None) -> None:
    assert equivariance.direction(metric) is higher
