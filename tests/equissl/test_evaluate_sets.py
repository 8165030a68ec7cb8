"""Evaluations on named data sets: official splits, images that cannot be decoded, bad layouts and labels, bfloat16."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from harness import run_ranks
from test_evaluate import on_ranks, pretrained, settings

from equissl import evaluate
from equissl import fake as entry
from equissl.classify import IGNORED, Tally, to_choose_on
from equissl.config import BuildConfig, DataSetName, EvaluateConfig
from equissl.data import check
from equissl.data.build import build
from equissl.data.check import layout
from equissl.data.fake import Settings, fake
from equissl.data.labelled import DATA_SETS, Joined, open_labelled, open_sets
from equissl.data.shards import Sample, write_manifest, write_shards
from equissl.evals import Context

__all__ = ["pretrained"]  # a fixture

CLASSES, IMAGES = 3, 40  # of each class and split: one image in 120 may be bad
KNN = {"name": "knn", "k": [5, 20]}
LINEAR = {"name": "linear", "blocks": [1], "base_lrs": [0.1, 1.0], "epochs": 3}
LOGISTIC = {"name": "logistic", "num_c": 4, "max_iterations": 30}
R2 = {"name": "r2", "num_train_images": None, "num_val_images": None, "epochs": 2}


@pytest.fixture(scope="module")
def fakes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of each, each under its name. Do not write into them."""
    folder = tmp_path_factory.mktemp("fakes")
    for name in DATA_SETS:
        fake(name, folder / name, Settings(CLASSES, IMAGES, side=24))
    return folder


def run(pretrained: Path, run_dir: Path, data: Path, name: str | None, task: Any, **changes: Any) -> dict[str, Any]:
    result = evaluate.main(settings(pretrained, task, data=str(data), data_set=name, **changes), run_dir, lambda: False)
    assert result is not None
    return result


def test_the_panel_names_every_data_set() -> None:
    assert get_args(DataSetName) == tuple(DATA_SETS)
    filled = EvaluateConfig.model_validate({"checkpoint": "x", "task": "knn", "data_set": "food101"})
    assert filled.data == "food101", "the profile's data set of this name"


def test_plan_knows_what_they_cost() -> None:
    pretraining = {"data": "photographs", "backbone": "vit_small_patch16_224", "batch": 8, "num_steps": 1, "method": "ibot"}

    def flops(**config: Any) -> float:
        estimate = EvaluateConfig.model_validate({"checkpoint": "${a}", **config}).estimate({}, 1, {"a": pretraining})
        assert estimate is not None
        return estimate.flops

    one = flops(task="knn", data_set="flowers102") / (2 * 1020 + 6149)
    assert flops(task="knn", data_set="fgvc_aircraft") == pytest.approx(one * 10_000)
    single = {"name": "linear", "augment": False, "epochs": 1, "base_lrs": [0.1], "blocks": [1], "mean_patch": [False]}
    heads = flops(task=single, data_set="flowers102") - one * (2 * 1020 + 6149)
    assert heads == pytest.approx(384 * 102 * (6 * (2040 + 1020) + 2 * (6149 + 1020)), rel=1e-6), "half of them are chosen on"
    assert EvaluateConfig.model_validate({"checkpoint": "${a}", "task": "knn"}).estimate({}, 1, {"a": pretraining}) is None


@pytest.mark.parametrize("name", DATA_SETS)
def test_every_data_set(name: str, fakes: Path, pretrained: Path, tmp_path: Path) -> None:
    """Colours tell the classes of a fake one."""
    result, data_set = run(pretrained, tmp_path, fakes, name, KNN), DATA_SETS[name]
    assert result["main"] == {"metric": f"knn:{name}/{data_set.main}", "higher_is_better": True}
    assert {f"knn:{name}/top1", f"knn:{name}/mean_per_class"} < result["metrics"].keys()
    assert result["metrics"][f"knn:{name}/top1"] > 0.6
    assert result["dataset"] == {"name": name, "manifest_sha256": layout(name, fakes / name), "fake": True}
    train = f"{data_set.train}+{data_set.tune}" if data_set.tune else data_set.train
    assert result["num_images"] == {train: 120 * (2 if data_set.tune else 1), data_set.test: 120}
    assert (result["precision"], "undecodable" in result, "precision_difference" in result) == ("float32", False, False)


@pytest.mark.parametrize("task", [KNN, R2], ids=["knn", "r2"])
def test_images_that_were_got_anew_are_read_anew(task: Any, food: Path, pretrained: Path, tmp_path: Path) -> None:
    """Their names, and as their bytes are not in it the data set's sha256, are the same: neither cached features nor those of an earlier
    attempt say otherwise."""
    names = [f"fake_dish_000/{1000 + IMAGES + i}" for i in (2, 4, 6, 8, 10, 12)]
    before = open_labelled("food101", food / "food-101", "test")
    assert not {f"images/{name}.jpg" for name in names} & {*before.sampled}  # type: ignore[attr-defined]
    whole = {key: (food / f"food-101/images/{key}.jpg").read_bytes() for key in names}
    expected = run(pretrained, tmp_path, food, "food101", task)
    damage(food, *names)
    assert open_labelled("food101", food / "food-101", "test").manifest_sha256 == before.manifest_sha256
    (tmp_path / "attempt").mkdir()
    with pytest.raises(ValueError, match=r"6 of .*120"):
        run(pretrained, tmp_path / "attempt", food, "food101", task, cache=str(tmp_path / "cache"))
    for key, content in whole.items():
        (food / f"food-101/images/{key}.jpg").write_bytes(content)
    found = run(pretrained, tmp_path / "attempt", food, "food101", task, cache=str(tmp_path / "cache"))
    assert found["metrics"] == expected["metrics"]
    assert "undecodable" not in found


def test_too_few_images_for_k_are_said(food: Path, pretrained: Path, tmp_path: Path) -> None:
    damage(food, *TRAIN)
    with pytest.raises(ValueError, match=r"task\.k is \[120\], but only 119 training images can be decoded"):
        run(pretrained, tmp_path, food, "food101", {"name": "knn", "k": [120]})


@pytest.mark.parametrize("task", [LINEAR, {**LINEAR, "augment": True}, LOGISTIC, R2], ids=["linear", "augmented", "logistic", "r2"])
@pytest.mark.parametrize("name", ["flowers102", "cifar10"])
def test_every_task(name: str, task: Any, fakes: Path, pretrained: Path, tmp_path: Path) -> None:
    result = run(pretrained, tmp_path, fakes, name, task)
    main = "rotation" if task is R2 else DATA_SETS[name].main
    assert result["main"]["metric"] == f"{task['name']}:{name}/{main}"
    if task["name"] == "linear":
        assert f"linear:{name}/{main}/best_on_test" in result["metrics"]
        assert f"linear:{name}/{main}/cls" in result["metrics"]
        assert result["chosen"]["heads"][0].keys() == {"blocks", "mean_patch", "base_lr", "test", "held_out"}


def test_the_official_tuning_split_is_chosen_on(fakes: Path) -> None:
    data = open_sets("flowers102", fakes)
    parts = {split: open_labelled("flowers102", fakes, split) for split in ("train", "val", "test")}
    assert (data.train.split, data.train.num_images, data.test.split) == ("train+val", 240, "test")
    assert data.train.require_labels().tolist() == [*parts["train"].labels, *parts["val"].labels]
    assert [data.train.key(i) for i in (0, 119, 120, 239)] == [parts[split].key(i) for split in ("train", "val") for i in (0, 119)]
    assert data.train.read(120) == parts["val"].read(0)
    kept, held = to_choose_on(data, 0.1, 0)
    assert (kept.tolist(), held.tolist()) == (list(range(120)), list(range(120, 240)))
    assert len({data.manifest_sha256, *(part.manifest_sha256 for part in parts.values())}) == 4
    without = open_sets("oxford_pets", fakes)
    assert without.num_tune == 0
    assert len(to_choose_on(without, 0.1, 0)[1]) == 12


def test_what_is_chosen_by_the_main_metric() -> None:
    """Of a head that knows the large class, and one that knows the two small ones."""
    tally = Tally(2, 3, torch.device("cpu"))
    truth = torch.tensor([0] * 8 + [1, 2, IGNORED])
    tally.add(torch.tensor([[0, 1]] * 8 + [[0, 1], [0, 2], [0, 0]]), truth)
    assert tally.of("top1").tolist() == pytest.approx([0.8, 0.2])
    assert tally.of("mean_per_class").tolist() == pytest.approx([1 / 3, 2 / 3])


def test_shards_give_the_figures_of_the_own_format(fakes: Path, pretrained: Path, tmp_path: Path) -> None:
    for name, place in (("imagenet1k", ""), ("cifar10", "cifar-10-batches-py")):
        built = tmp_path / name
        build(BuildConfig(source=str(fakes / name / place), num_workers=1), built)
        shutil.copy(fakes / name / place / check.FAKE, built)
        own, shards = (run(pretrained, tmp_path, data, name, KNN) for data in (fakes, built))
        assert own["metrics"] == pytest.approx(shards["metrics"])
        assert own["main"] == shards["main"]
        assert shards["dataset"]["manifest_sha256"] == layout(name, built) != own["dataset"]["manifest_sha256"]


def test_shards_have_the_tuning_split_too(fakes: Path, pretrained: Path, tmp_path: Path) -> None:
    """Built of a list; `trainval`, whose images are in others, is not needed."""
    lines = ["path,label,split"]
    for split in ("train", "val", "test"):
        data = open_labelled("fgvc_aircraft", fakes, split)
        names = (data.folder / f"{data.key(i)}.jpg" for i in range(data.num_images))
        lines += [f"{path},{data.classes[label]},{split}" for path, label in zip(names, data.labels, strict=True)]
    (tmp_path / "list.csv").write_text("\n".join(lines))
    built = tmp_path / "built"
    build(BuildConfig(source=str(tmp_path / "list.csv"), num_workers=1), built)
    shutil.copy(fakes / "fgvc_aircraft/fgvc-aircraft-2013b" / check.FAKE, built)
    assert check.check("fgvc_aircraft", built).problems == []
    own, shards = (run(pretrained, tmp_path, data, "fgvc_aircraft", KNN) for data in (fakes, built))
    assert own["metrics"] == pytest.approx(shards["metrics"])
    assert own["num_images"] == shards["num_images"] == {"train+val": 240, "test": 120}


# --- images that cannot be decoded ------------------------------------------------------------------------------------------


@pytest.fixture
def food(fakes: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged, and the same without its first test image."""
    shutil.copytree(fakes / "food101", tmp_path / "food101")
    return tmp_path / "food101"


def damage(root: Path, *keys: str) -> None:
    for key in keys:
        (root / f"food-101/images/{key}.jpg").write_bytes(b"<html>404</html>")


TEST = [f"fake_dish_000/{1000 + IMAGES + i}" for i in range(3)]  # keys below images/
TRAIN = ["fake_dish_001/1000"]


def test_an_undecodable_image_is_left_out_and_named(food: Path, pretrained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = tmp_path / "without"
    shutil.copytree(food, whole)
    for split, key in (("test", TEST[0]), ("train", TRAIN[0])):
        path = whole / f"food-101/meta/{split}.json"
        content = json.loads(path.read_text())
        content[key.partition("/")[0]].remove(key)
        path.write_text(json.dumps(content))
    marker = json.loads((whole / "food-101" / check.FAKE).read_text())
    (whole / "food-101" / check.FAKE).write_text(json.dumps(marker | {"splits": {"train": 119, "test": 119}}))
    expected = run(pretrained, tmp_path, whole, "food101", KNN)
    damage(food, TEST[0], *TRAIN)
    found = run(pretrained, tmp_path, food, "food101", KNN, cache=str(tmp_path / "cache"))
    assert found["metrics"] == expected["metrics"], "as if they were not there"
    assert found["num_images"] == {"train": 119, "test": 119}
    assert found["undecodable"] == {
        "train": {"num_images": 1, "keys": [f"images/{TRAIN[0]}"]},
        "test": {"num_images": 1, "keys": [f"images/{TEST[0]}"]},
    }
    assert f"1 images of test of {food / 'food-101'} cannot be decoded and are left out: images/{TEST[0]}" in caplog.text
    again = run(pretrained, tmp_path, food, "food101", KNN, cache=str(tmp_path / "cache"))
    assert again == found, "the cache knows them too"


@pytest.mark.parametrize("task", [LINEAR, {**LINEAR, "augment": True}, LOGISTIC, R2], ids=["linear", "augmented", "logistic", "r2"])
def test_no_task_sees_it(task: Any, food: Path, pretrained: Path, tmp_path: Path) -> None:
    damage(food, TEST[0], *TRAIN)
    found = run(pretrained, tmp_path, food, "food101", task)
    assert found["num_images"] == {"train": 119, "test": 119}
    assert all(np.isfinite(value) for value in found["metrics"].values())
    if task["name"] != "r2":
        hits = found["metrics"][f"{task['name']}:food101/top1"] * 119
        assert hits == pytest.approx(round(hits)), "a fraction of those that are there"


def test_ranks_leave_out_the_same(food: Path, pretrained: Path, tmp_path: Path) -> None:
    damage(food, TEST[0], *TRAIN)
    config = settings(pretrained, LOGISTIC, data=str(food), data_set="food101", batch=7)
    alone = evaluate.main(config, tmp_path, lambda: False)
    first, _ = run_ranks(on_ranks, 2, config, str(tmp_path), None)
    assert alone is not None
    assert (first["undecodable"], first["num_images"]) == (alone["undecodable"], alone["num_images"])
    assert first["metrics"] == pytest.approx(alone["metrics"], abs=0.012)


def test_too_many_are_refused(food: Path, pretrained: Path, tmp_path: Path) -> None:
    damage(food, *TEST[:2])
    with pytest.raises(ValueError, match=r"2 of 120 images of test of .* cannot be decoded, more than 1 %: images/fake_dish_000/1040, "):
        run(pretrained, tmp_path, food, "food101", KNN)


def test_features_that_are_not_finite(fakes: Path, pretrained: Path, tmp_path: Path) -> None:
    import hashlib

    from safetensors.torch import load_file, save

    broken = Path(shutil.copytree(pretrained, tmp_path / "broken"))
    weights = load_file(broken / "teacher.safetensors")
    weights["backbone.norm.bias"][3] = torch.inf
    content = save(weights)
    (broken / "teacher.safetensors").write_bytes(content)
    (broken / "result.json").write_text(json.dumps({"weights_sha256": hashlib.sha256(content).hexdigest()}))
    with pytest.raises(ValueError, match=r"features cls of the image .* are not finite: are the weights whole"):
        run(broken, tmp_path, fakes, "cifar10", KNN)


# --- other bad input ----------------------------------------------------------------------------------------------------------


def test_a_missing_class_folder(food: Path, pretrained: Path, tmp_path: Path) -> None:
    shutil.rmtree(food / "food-101/images/fake_dish_001")
    with pytest.raises(ValueError, match=r"does not fit food101: train: 40 of 120 image files are not there: .*; test: 40 of 120"):
        run(pretrained, tmp_path, food, "food101", KNN)


def test_another_list_of_classes(fakes: Path, pretrained: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(fakes / "inat18", tmp_path / "inat18"))
    content = json.loads((root / "val2018.json").read_text())
    content["categories"][0]["name"] = "another"
    (root / "val2018.json").write_text(json.dumps(content))
    message = "train and val have not the same classes: only one of them has 0, another"
    with pytest.raises(ValueError, match=f"does not fit inat18: {message}"):
        run(pretrained, tmp_path, root, "inat18", KNN)
    with pytest.raises(ValueError, match=message):
        open_sets("inat18", root)
    with pytest.raises(ValueError, match=message):
        Joined(open_labelled("inat18", root, "train"), open_labelled("inat18", root, "val"))


def test_labels_out_of_range(fakes: Path, pretrained: Path, tmp_path: Path) -> None:
    image = open_labelled("food101", fakes, "train").read(0)
    folder = tmp_path / "shards"
    folder.mkdir()
    samples = [Sample(f"{i}", image, "jpg", i) for i in range(6)]
    splits = {split: write_shards(samples, folder, split, 10) for split in ("train", "val")}
    write_manifest(folder, "made", ["a", "b", "c", "d", "e"], splits, {})
    for task in (KNN, LINEAR, LOGISTIC):
        with pytest.raises(ValueError, match="the label 5 of the split 'train' is not one of 5 classes"):
            run(pretrained, tmp_path, folder, None, {**task, **({"k": [2]} if task is KNN else {})})
    run(pretrained, tmp_path, folder, None, {**R2, "num_train_images": None})  # it reads none


def test_wrong_places(fakes: Path, pretrained: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no .*nowhere: give the folder of food101"):
        run(pretrained, tmp_path, tmp_path / "nowhere", "food101", KNN)
    with pytest.raises(ValueError, match=r"holds nothing of food101: neither food-101/ nor manifest.json"):
        run(pretrained, tmp_path, fakes / "cifar10", "food101", KNN)


# --- what stands for it in a plan ---------------------------------------------------------------------------------------------


def test_a_layout_is_looked_through_once(food: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = layout("food101", food)
    monkeypatch.setattr(check, "require", lambda *_, **__: pytest.fail("it is known"))
    assert layout("food101", food) == first
    assert layout("food101", food.parent) == first, "from the folder around it"
    monkeypatch.undo()
    path = food / "food-101/meta/test.json"
    content = json.loads(path.read_text())
    for name, other in (("fake_dish_000", "fake_dish_001"), ("fake_dish_001", "fake_dish_000")):
        content[name][0] = f"{other}/{1000 + IMAGES}"
    path.write_text(json.dumps(content))
    os.utime(path, (1, 1))  # a copy may keep the time
    assert layout("food101", food) != first
    shutil.rmtree(food / "food-101/images/fake_dish_001")
    with pytest.raises(ValueError, match="40 of 120 image files are not there"):
        layout("food101", food)


@pytest.mark.parametrize("name", DATA_SETS)
def test_every_layout_is_noticed_to_change(name: str, fakes: Path, tmp_path: Path) -> None:
    """A file of annotations, a batch, a class folder: whatever is touched is looked at."""
    copied = Path(shutil.copytree(fakes / name, tmp_path / name))
    assert layout(name, copied) == layout(name, fakes)
    listed = {path for path in copied.rglob("*") if path.is_file() and path.suffix.lower() not in (".jpg", ".jpeg", ".png")}
    for path in listed - {copied / DATA_SETS[name].base / check.FAKE}:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 3])
        with pytest.raises(ValueError, match=rf"{name}|{path.name}|{path.parent}"):
            layout(name, copied)
        path.write_bytes(content)
    if name == "imagenet1k":
        shutil.copy(next((copied / "val/n00000001").iterdir()), copied / "val/n00000001/more.JPEG")
        with pytest.raises(ValueError, match="val has 121 images, not 120"):
            layout(name, copied)


# --- bfloat16 -----------------------------------------------------------------------------------------------------------------


def test_bfloat16_is_compared_with_float32(fakes: Path, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    exact = run(pretrained, tmp_path, fakes, "food101", LOGISTIC, cache=str(cache))
    rounded = run(pretrained, tmp_path, fakes, "food101", LOGISTIC, cache=str(cache), precision="bfloat16")
    assert rounded["precision"] == "bfloat16"
    assert 1e-4 < rounded["precision_difference"] < 0.03
    assert rounded["metrics"] == pytest.approx(exact["metrics"], abs=0.05)
    keys = [json.loads(path.read_text()) for path in cache.glob("*/key.json")]
    assert sorted(key["precision"] for key in keys) == ["torch.bfloat16"] * 2 + ["torch.float32"] * 2
    monkeypatch.setattr(evaluate, "MAX_DIFFERENCE", 1e-6)
    with pytest.raises(ValueError, match=r"precision is bfloat16, but features in bfloat16 differ .* choose float32, or auto"):
        run(pretrained, tmp_path, fakes, "food101", KNN, precision="bfloat16")


@pytest.mark.parametrize(("difference", "dtype"), [(0.01, torch.bfloat16), (0.06, torch.float32), (float("nan"), torch.float32)])
def test_auto_falls_back_on_a_gpu(
    difference: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(evaluate, "_difference", lambda _: difference)
    values: Any = {"settings": EvaluateConfig.model_validate({"checkpoint": "x", "task": "knn"}), "device": SimpleNamespace(type="cuda")}
    world: Any = SimpleNamespace(rank=0, world_size=1)
    others: dict[str, Any] = dict.fromkeys(("pretraining", "encoder", "data", "tick"))
    context = Context(**values, world=world, **others)
    found, told = evaluate._with_precision(context)
    assert found.precision is dtype
    assert told == (None if np.isnan(difference) else difference), "JSON has no NaN"
    assert ("float32 is used" in caplog.text) == (dtype is torch.float32)
    assert evaluate._with_precision(replace(context, device=torch.device("cpu")))[0].precision is torch.float32


# --- the entry that writes fake ones ------------------------------------------------------------------------------------------


def test_fakes_of_a_stage(pretrained: Path, tmp_path: Path) -> None:
    sets = {"data_sets": ["cifar10", "oxford_pets"], "classes": 2, "images": 6}
    assert entry.main(sets, tmp_path, lambda: True) is None
    assert not (tmp_path / "data").exists()
    first = entry.main(sets, tmp_path, lambda: False)
    assert first is not None
    assert first == entry.main(sets, tmp_path, lambda: False)
    for name in sets["data_sets"]:  # type: ignore[attr-defined]
        result = run(pretrained, tmp_path, tmp_path, name, {"name": "knn", "k": [3]})
        assert result["dataset"]["manifest_sha256"] == first["manifest_sha256"][name]
