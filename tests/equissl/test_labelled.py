"""Labelled data sets: every format against torchvision's reader, as shards, damaged in every way that has a message of its own."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat

from equissl.config import BuildConfig
from equissl.data.build import build
from equissl.data.check import FAKE, check, layout
from equissl.data.fake import Settings, fake
from equissl.data.labelled import DATA_SETS, open_labelled
from equissl.data.loader import BadSample, decode
from equissl.data.shards import Images

SEVERAL = Settings(classes=3, images=3, side=24)


def keys(data: Images) -> list[str]:
    return [data.key(i) for i in range(data.num_images)]


def pixels(data: Images, i: int) -> bytes:
    content: bytes = decode(data, i).contiguous().numpy().tobytes()
    return content


@pytest.fixture(scope="module")
def fakes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of each. Do not write into them."""
    folder = tmp_path_factory.mktemp("fakes")
    for name in DATA_SETS:
        fake(name, folder / name, SEVERAL)
    return folder


@pytest.fixture
def copied(fakes: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy that may be damaged: the folder around it, and where it begins."""

    def copy(name: str) -> Path:
        shutil.copytree(fakes / name, tmp_path / name)
        return tmp_path / name / DATA_SETS[name].base

    return copy


def torchvision_s(name: str, folder: Path, split: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[Any, int]]:
    """Images and labels by torchvision's reader of this data set."""
    from torchvision import datasets

    for module in (datasets.cifar, datasets.flowers102):  # compare MD5 sums with the official ones
        monkeypatch.setattr(module, "check_integrity", lambda *_: True)
    if name == "imagenet1k":
        found = datasets.ImageFolder(folder / split)
    elif name.startswith("cifar"):
        found = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name](folder, train=split == "train")
    elif name == "inat18":  # it has no splits: the images of this one, by the names of their files
        (tmp_path / "2018").symlink_to(folder / "train_val2018")
        found = datasets.INaturalist(tmp_path, "2018")
        listed = json.loads((folder / f"{split}2018.json").read_text())["images"]
        place = {name: number for number, (_, name) in enumerate(found.index)}
        return [found[place[Path(image["file_name"]).name]] for image in listed]
    else:
        kinds = {
            "fgvc_aircraft": datasets.FGVCAircraft,
            "oxford_pets": datasets.OxfordIIITPet,
            "food101": datasets.Food101,
            "flowers102": datasets.Flowers102,
        }
        found = kinds[name](folder, split)
    return [found[number] for number in range(len(found))]


CASES = [(name, split) for name, data_set in DATA_SETS.items() for split in data_set.splits]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torchvision's unpickling of CIFAR by today's numpy
@pytest.mark.filterwarnings("ignore:dtype")
@pytest.mark.parametrize(("name", "split"), CASES, ids=[f"{name}-{split}" for name, split in CASES])
def test_labels_and_images_are_those_of_torchvision(
    name: str, split: str, fakes: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data, expected = open_labelled(name, fakes / name, split), torchvision_s(name, fakes / name, split, monkeypatch, tmp_path)
    assert data.labels.dtype == np.int64
    assert data.labels.tolist() == [label for _, label in expected]
    assert data.num_images == SEVERAL.classes * SEVERAL.images * (2 if split == "trainval" and name == "fgvc_aircraft" else 1)
    assert len(data.classes) == SEVERAL.classes
    for i, (image, _) in enumerate(expected):
        assert np.array_equal(decode(data, i).permute(1, 2, 0).numpy(), np.asarray(image.convert("RGB")))
    assert len(set(keys(data))) == data.num_images


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:dtype")
@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fgvc_aircraft", "oxford_pets", "food101", "imagenet1k"])
def test_names_of_classes_are_those_of_torchvision(name: str, fakes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda *_: True)
    kinds: dict[str, Callable[[Path], Any]] = {
        "cifar10": datasets.CIFAR10,
        "cifar100": datasets.CIFAR100,
        "fgvc_aircraft": datasets.FGVCAircraft,
        "oxford_pets": datasets.OxfordIIITPet,
        "food101": datasets.Food101,
        "imagenet1k": lambda root: datasets.ImageFolder(root / "train"),
    }
    assert open_labelled(name, fakes / name, DATA_SETS[name].train).classes == tuple(kinds[name](fakes / name).classes)


@pytest.mark.parametrize("name", DATA_SETS)
def test_a_fake_fits_and_is_not_taken_for_the_real_one(name: str, fakes: Path, copied: Callable[[str], Path]) -> None:
    found = check(name, fakes / name, decode=True)
    assert (found.problems, found.is_fake, found.layout) == ([], True, "own format")
    assert list(found.splits) == list(DATA_SETS[name].splits)
    for split, there in found.splits.items():
        data = open_labelled(name, fakes / name, split)
        assert (there.num_images, there.num_classes, there.manifest_sha256) == (data.num_images, SEVERAL.classes, data.manifest_sha256)
    base = copied(name)
    assert check(name, base).splits.keys() == found.splits.keys(), "the folder that the archive unpacks to, too"
    (base / FAKE).unlink()
    found = check(name, base)
    assert not found.is_fake
    for split, count in DATA_SETS[name].splits.items():
        assert sum(f"{split} has " in problem and f"images, not {count:,}" in problem for problem in found.problems) == 1
        assert f"{split} has 3 classes, not {DATA_SETS[name].num_classes:,}" in found.problems
    assert len(found.problems) == 2 * len(DATA_SETS[name].splits)


@pytest.mark.parametrize("name", DATA_SETS)
def test_splits_and_metric_are_of_the_protocol(name: str) -> None:
    data_set = DATA_SETS[name]
    assert {data_set.train, data_set.test} | ({data_set.tune} - {None}) <= set(data_set.splits)
    assert len({data_set.train, data_set.tune, data_set.test}) == 3
    assert (data_set.main == "mean_per_class") == (name in ("fgvc_aircraft", "oxford_pets", "flowers102"))


@pytest.mark.parametrize("name", DATA_SETS)
def test_pickles_and_hash(name: str, fakes: Path, copied: Callable[[str], Path]) -> None:
    data_set = DATA_SETS[name]
    data = open_labelled(name, fakes / name, data_set.test)
    again: Images = pickle.loads(pickle.dumps(data))
    assert all(again.read(i) == data.read(i) for i in range(data.num_images))
    assert (keys(again), again.manifest_sha256, again.labels.tolist()) == (keys(data), data.manifest_sha256, data.labels.tolist())
    elsewhere = copied(name)
    assert open_labelled(name, elsewhere, data_set.test).manifest_sha256 == data.manifest_sha256
    hashes = {open_labelled(name, elsewhere, split).manifest_sha256 for split in data_set.splits}
    assert len(hashes) == len(data_set.splits)


def test_a_changed_label_or_pixel_changes_the_hash(copied: Callable[[str], Path]) -> None:
    root, before = copied("food101"), {}
    before["food101"] = open_labelled("food101", root, "train").manifest_sha256
    content = json.loads((root / "meta/train.json").read_text())
    first, second, _ = content
    content[first][0], content[second][0] = content[second][0], content[first][0]
    (root / "meta/train.json").write_text(json.dumps(content))
    assert open_labelled("food101", root, "train").manifest_sha256 != before["food101"]
    root = copied("cifar100")
    before["cifar100"] = open_labelled("cifar100", root, "train").manifest_sha256
    pixels = (root / "train").read_bytes()
    middle = len(pixels) // 2
    (root / "train").write_bytes(pixels[:middle] + bytes([pixels[middle] ^ 1]) + pixels[middle + 1 :])
    assert open_labelled("cifar100", root, "train").manifest_sha256 != before["cifar100"]


def test_a_copy_with_other_pixels_is_another_data_set(copied: Callable[[str], Path]) -> None:
    """Resized, or encoded anew, under the same names."""
    root = copied("oxford_pets")
    before, planned = open_labelled("oxford_pets", root, "test").manifest_sha256, layout("oxford_pets", root)
    assert layout("oxford_pets", root) == planned
    for path in (root / "images").iterdir():
        with Image.open(path) as image:
            image.resize((12, 12)).save(path)
    assert open_labelled("oxford_pets", root, "test").manifest_sha256 != before
    assert layout("oxford_pets", root) not in (planned, ""), "what was kept of the first look does not hold"


# --- shards -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "place"), [("imagenet1k", ""), ("cifar10", "cifar-10-batches-py")])
def test_shards_have_the_same_images(name: str, place: str, fakes: Path, tmp_path: Path) -> None:
    build(BuildConfig(source=str(fakes / name / place), num_workers=1), tmp_path / "built")
    for split in DATA_SETS[name].splits:
        shards, own = open_labelled(name, tmp_path / "built", split), open_labelled(name, fakes / name, split)
        assert shards.classes == own.classes
        assert len(set(keys(shards))) == shards.num_images
        content = [sorted((int(label), pixels(data, i)) for i, label in enumerate(data.labels)) for data in (shards, own)]
        assert content[0] == content[1]
        assert pickle.loads(pickle.dumps(shards)).read(0) == shards.read(0)
    assert [
        problem for problem in check(name, tmp_path / "built").problems if "images, not" not in problem and "classes" not in problem
    ] == []
    marker = json.loads((fakes / name / place / FAKE).read_text())
    (tmp_path / "built" / FAKE).write_text(json.dumps(marker))
    found = check(name, tmp_path / "built", decode=True, workers=2)
    assert (found.problems, found.layout) == ([], "shards")
    shard = next((tmp_path / "built").glob("train-*.tar"))
    os.truncate(shard, shard.stat().st_size - 512)
    (problem,) = check(name, tmp_path / "built").problems
    assert problem.startswith(f"{shard.name} in {tmp_path / 'built'} has ")


def test_shards_without_labels(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "list.csv").write_text("path,label,split\na.png,,train\n")
    build(BuildConfig(source=str(tmp_path / "list.csv"), num_workers=1), tmp_path / "built")
    with pytest.raises(ValueError, match=r"1 of 1 images of the split 'train' .* have no label"):
        open_labelled("imagenet1k", tmp_path / "built", "train")
    with pytest.raises(ValueError, match="has no split 'val'; it has train"):
        open_labelled("imagenet1k", tmp_path / "built", "val")


# --- damage -----------------------------------------------------------------------------------------------------------------


def first_image(root: Path) -> Path:
    return min(path for path in root.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))


def edit(file: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Of text, JSON, or the words of the first line."""

    def damage(root: Path) -> None:
        text = (root / file).read_text()
        if file.endswith(".json"):
            content = json.loads(text)
            change(content)
            (root / file).write_text(json.dumps(content))
        else:
            (root / file).write_text(change(text))

    return damage


def unlink(file: str) -> Callable[[Path], None]:
    return lambda root: (root / file).unlink()


def rmtree(folder: str) -> Callable[[Path], None]:
    return lambda root: shutil.rmtree(root / folder)


def extra_class(root: Path) -> None:
    (root / "val/n99999999").mkdir()
    shutil.copy(first_image(root / "val"), root / "val/n99999999/a.JPEG")


def empty_class(root: Path) -> None:
    for path in (root / "val/n00000001").iterdir():
        path.unlink()


def label_zero(root: Path) -> None:
    savemat(root / "imagelabels.mat", {"labels": np.arange(27, dtype=np.uint8)[None]})


def image_99(root: Path) -> None:
    savemat(root / "setid.mat", {"trnid": [[1, 2]], "valid": [[3, 99]], "tstid": [[5]]})


def truncated(root: Path) -> None:
    path = first_image(root)
    os.truncate(path, path.stat().st_size // 2)


def not_an_image(root: Path) -> None:
    first_image(root).write_bytes(b"<html>404</html>")


def cut(file: str) -> Callable[[Path], None]:
    return lambda root: os.truncate(root / file, (root / file).stat().st_size // 2)


def swapped_classes(content: dict[str, Any]) -> None:
    content["categories"][0]["name"] = "another"


def links_to_nowhere(root: Path) -> None:
    for path in [*(root / "val/n00000001").iterdir()]:
        path.unlink()
        path.symlink_to("/nowhere/at.JPEG")


def link_to_itself(root: Path) -> None:
    path = min((root / "val/n00000001").iterdir())
    path.unlink()
    path.symlink_to(path)


def two_annotations(content: dict[str, Any]) -> None:
    content["annotations"].append({**content["annotations"][0], "category_id": 2})


def image_twice(content: dict[str, Any]) -> None:
    content["images"].append(dict(content["images"][0]))


def endless_label(content: dict[str, Any]) -> None:
    content["annotations"][0]["category_id"] = float("inf")


def label_of_first(content: dict[str, Any]) -> None:
    content["annotations"][0]["category_id"] = 77


DAMAGE: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "imagenet: no val": ("imagenet1k", rmtree("val"), "has no val, which imagenet1k needs"),
    "imagenet: class folder missing": ("imagenet1k", rmtree("val/n00000002"), "only one of them has n00000002$"),
    "imagenet: extra class": ("imagenet1k", extra_class, "only one of them has n99999999$"),
    "imagenet: empty class": ("imagenet1k", empty_class, "no images in the class folders n00000001$"),
    "imagenet: truncated": ("imagenet1k", truncated, "train: 1 images cannot be decoded: train/n00000001/n00000001_0$"),
    "imagenet: not an image": ("imagenet1k", not_an_image, "train: 1 images cannot be decoded: train/n00000001/n00000001_0$"),
    "imagenet: links to nowhere": ("imagenet1k", links_to_nowhere, "^val: 3 of 9 image files are not there: val/n00000001/"),
    "imagenet: a link to itself": ("imagenet1k", link_to_itself, "^val: 1 of 9 image files are not there: val/n00000001/"),
    "food: a long name": (
        "food101",
        edit("meta/test.json", lambda content: content["fake_dish_000"].__setitem__(0, "fake_dish_000/" + "x" * 300)),
        "^test: 1 of 9 image files are not there: images/fake_dish_000/xxx",
    ),
    "fake.json: cut": ("food101", cut(FAKE), r"fake.json is damaged \(JSONDecodeError.*write the fake data set anew$"),
    "fake.json: a list": ("food101", lambda root: (root / FAKE).write_text("[]"), r"fake.json is damaged \(TypeError"),
    "fake.json: no counts": (
        "food101",
        edit(FAKE, lambda content: content.pop("splits")),
        r"fake.json is damaged \(KeyError\('splits'\)\)",
    ),
    "cifar10: batch missing": ("cifar10", unlink("data_batch_3"), "lacks data_batch_3"),
    "cifar10: batch cut": ("cifar10", cut("data_batch_3"), "data_batch_3 is no pickle of CIFAR"),
    "cifar10: test missing": ("cifar10", unlink("test_batch"), "holds no CIFAR-10: give"),
    "cifar100: names cut": ("cifar100", cut("meta"), "meta is no pickle of CIFAR"),
    "aircraft: split missing": ("fgvc_aircraft", unlink("data/images_variant_val.txt"), "has no data/images_variant_val.txt, which"),
    "aircraft: variants missing": ("fgvc_aircraft", unlink("data/variants.txt"), "has no data/variants.txt, which fgvc_aircraft needs"),
    "aircraft: unknown variant": (
        "fgvc_aircraft",
        edit("data/images_variant_test.txt", lambda text: text.replace("Fake 701-200", "Concorde", 1)),
        r"images_variant_test.txt:4: the variant 'Concorde' is not one of the 3",
    ),
    "aircraft: surplus variant": (
        "fgvc_aircraft",
        edit("data/variants.txt", lambda text: text + "Concorde\n"),
        "train has 4 classes, not 3; .*train has no images of the classes Concorde",
    ),
    "pets: split missing": ("oxford_pets", unlink("annotations/test.txt"), "has no annotations/test.txt, which oxford_pets needs"),
    "pets: images missing": ("oxford_pets", rmtree("images"), "has no images, which oxford_pets needs"),
    "pets: label out of range": (
        "oxford_pets",
        edit("annotations/test.txt", lambda text: text.replace("fake_breed_2_4 3", "fake_breed_2_4 0")),
        "test.txt:7: 'fake_breed_2_4 0 1 2' is not IMAGE CLASS SPECIES BREED",
    ),
    "pets: gap": (
        "oxford_pets",
        edit("annotations/test.txt", lambda text: text.replace(" 2 2 1", " 99 2 1")),
        "the classes must be 1, 2, …, but there is 99 and not 2$",
    ),
    "pets: another's class": (
        "oxford_pets",
        edit("annotations/test.txt", lambda text: text.replace("fake_breed_2_5 3", "fake_breed_2_5 1")),
        "the image fake_breed_2_5 has the class 1, which is that of fake_breed_0",
    ),
    "pets: truncated": ("oxford_pets", truncated, "trainval: 1 images cannot be decoded: images/fake_breed_0_1$"),
    "food: split missing": ("food101", unlink("meta/test.json"), "has no meta/test.json, which food101 needs"),
    "food: JSON cut": ("food101", cut("meta/test.json"), "test.json is not JSON, or cut short"),
    "food: not lists": ("food101", edit("meta/test.json", lambda content: content.update(a=1)), "test.json is not {class: "),
    "food: class folder missing": (
        "food101",
        rmtree("images/fake_dish_001"),
        "train: 3 of 9 image files are not there: images/fake_dish_001/1000.jpg, .*; test: 3 of 9",
    ),
    "food: image missing": (
        "food101",
        lambda root: first_image(root).unlink(),
        "^train: 1 of 9 image files are not there: images/fake_dish_000/1000.jpg$",
    ),
    "food: an image twice": (
        "food101",
        edit("meta/test.json", lambda content: content["fake_dish_000"].__setitem__(0, "fake_dish_000/1004")),
        "^test names 1 images more than once: images/fake_dish_000/1004.jpg$",
    ),
    "pets: trained on the test": (
        "oxford_pets",
        edit("annotations/test.txt", lambda text: text.replace("fake_breed_1_4 ", "fake_breed_1_1 ")),
        "^trainval and test share 1 images: images/fake_breed_1_1.jpg$",
    ),
    "food: extra class": (
        "food101",
        edit("meta/test.json", lambda content: content.update(a=[content["fake_dish_000"].pop()])),
        "test has 4 classes, not 3; train and test have not the same classes: only one of them has a$",
    ),
    "flowers: split file missing": ("flowers102", unlink("setid.mat"), "has no setid.mat, which flowers102 needs"),
    "flowers: labels cut": ("flowers102", cut("imagelabels.mat"), "imagelabels.mat is not the official file with labels"),
    "flowers: label out of range": ("flowers102", label_zero, r"imagelabels.mat: the label 0 of image 1 is not 1 or more"),
    "flowers: image out of range": (
        "flowers102",
        image_99,
        "train has 2 images, not 9; .*val has an image that is none of the 27",
    ),
    "inat: split missing": ("inat18", unlink("val2018.json"), "has no val2018.json, which inat18 needs"),
    "inat: label out of range": ("inat18", edit("val2018.json", label_of_first), "the category 77 of image 10 is not one of the 3$"),
    "inat: no annotation": ("inat18", edit("val2018.json", lambda content: content["annotations"].pop()), "not so the ids 18$"),
    "inat: two annotations": ("inat18", edit("val2018.json", two_annotations), "must have one annotation; not so the ids 10$"),
    "inat: an image twice": ("inat18", edit("val2018.json", image_twice), "must have one annotation; not so the ids 10$"),
    "inat: no number": ("inat18", edit("val2018.json", endless_label), "is not the competition's"),
    "inat: nested": ("inat18", lambda root: (root / "val2018.json").write_text("[" * 200_000), "val2018.json is not what .* too deeply$"),
    "inat: category missing": ("inat18", edit("val2018.json", lambda content: content["categories"].pop(0)), "are not 0 to 1$"),
    "inat: no categories": ("inat18", edit("val2018.json", lambda content: content.pop("categories")), "is not the competition's"),
    "inat: other classes": ("inat18", edit("val2018.json", swapped_classes), "only one of them has 0, another$"),
    "inat: images missing": ("inat18", rmtree("train_val2018/Insecta"), "train: 3 of 9 image files .*; val: 3 of 9 image files"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_has_one_message(case: str, copied: Callable[[str], Path]) -> None:
    name, damage, message = DAMAGE[case]
    root = copied(name)
    damage(root)
    found = check(name, root, decode=True)
    assert found.problems
    assert len(set(found.problems)) == len(found.problems), "none is said twice"
    if "; " not in message:
        assert len(found.problems) == 1, found.problems
    assert re.search(message, "; ".join(found.problems)), found.problems


@pytest.mark.parametrize("name", ["imagenet1k", "food101", "oxford_pets", "cifar10"])
def test_what_may_not_be_read_is_said(name: str, copied: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is for people who are not root."""
    root = copied(name)

    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(root))

    monkeypatch.setattr(os, "scandir", forbidden)
    monkeypatch.setattr(Path, "read_bytes", forbidden)
    monkeypatch.setattr(Path, "read_text", forbidden)
    for look in (check, layout):
        with pytest.raises(ValueError, match=f"{root} may not be read: Permission denied"):
            look(name, root)


def test_an_image_that_cannot_be_had_is_named(copied: Callable[[str], Path]) -> None:
    root = copied("food101")
    data = open_labelled("food101", root, "train")
    truncated(root)
    with pytest.raises(BadSample, match=r"the sample images/fake_dish_000/1000 of .* cannot be decoded"):
        decode(data, 0)
    first_image(root).unlink()
    with pytest.raises(ValueError, match=r"1000\.jpg cannot be read: No such file.*; equihpc data check food101"):
        decode(data, 0)


def test_bad_calls(fakes: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown data set 'mnist'; choose from imagenet1k, cifar10"):
        open_labelled("mnist", tmp_path, "train")
    with pytest.raises(ValueError, match="oxford_pets has no split 'train'; choose from trainval, test"):
        open_labelled("oxford_pets", fakes / "oxford_pets", "train")
    with pytest.raises(ValueError, match=r"there is no .*nowhere: give the folder of food101"):
        open_labelled("food101", tmp_path / "nowhere", "train")
    for name in DATA_SETS:
        with pytest.raises(ValueError, match=r"holds no(thing of)? "):
            open_labelled(name, tmp_path, DATA_SETS[name].test)
    with pytest.raises(ValueError, match="holds no CIFAR-100"):
        open_labelled("cifar100", fakes / "cifar10", "test")
    shutil.copytree(fakes / "cifar10", tmp_path, dirs_exist_ok=True)
    shutil.copytree(fakes / "cifar100", tmp_path, dirs_exist_ok=True)
    assert open_labelled("cifar100", tmp_path, "test").manifest_sha256 != open_labelled("cifar10", tmp_path, "test").manifest_sha256


# --- fakes ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DATA_SETS)
def test_a_fake_is_its_seed(name: str, fakes: Path, tmp_path: Path) -> None:
    fake(name, tmp_path / "again", SEVERAL)
    fake(name, tmp_path / "other", Settings(SEVERAL.classes, SEVERAL.images, SEVERAL.side, seed=1))
    content = [
        {path.relative_to(root): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file() and path.suffix != ".mat"}
        for root in (fakes / name, tmp_path / "again", tmp_path / "other")
    ]
    assert content[0] == content[1]
    assert not set(content[0].values()) & {value for path, value in content[2].items() if path.suffix.lower() in (".jpg", ".jpeg")}
    images = [open_labelled(name, fakes / name, split).read(i) for split in DATA_SETS[name].splits for i in range(9)]
    assert len(set(images)) == 9 * len(set(DATA_SETS[name].splits) - {"trainval"}) + 9 * (name == "oxford_pets"), "no image twice"


def test_a_fake_is_not_written_over_anything(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="there is there already: give another folder"):
        fake("food101", tmp_path / "there")
    for values, message in (
        ({"classes": 0}, "classes is 0; it must be between 1 and 37"),
        ({"classes": 38}, "classes is 38; it must be between 1 and 37"),
        ({"images": 0}, "images is 0"),
        ({"side": 7}, "side is 7"),
        ({"seed": -1}, "seed is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            fake("oxford_pets", tmp_path / "new", Settings(**values))
    with pytest.raises(ValueError, match="do not fill CIFAR-10's 5 batches"):
        fake("cifar10", tmp_path / "new", Settings(classes=2, images=2))
    assert [path.name for path in tmp_path.iterdir()] == ["there"], "nothing is left"


def test_a_fake_that_cannot_be_finished_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("equissl.data.fake._write", full)
    with pytest.raises(OSError, match="No space"):
        fake("food101", tmp_path / "new")
    assert not list(tmp_path.iterdir())


@given(classes=st.integers(1, 10), images=st.integers(1, 3), seed=st.integers(0, 2**64 - 1), name=st.sampled_from(sorted(DATA_SETS)))
@settings(max_examples=25, deadline=None)
def test_any_fake_fits(classes: int, images: int, seed: int, name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("any") / "fake"
    if name == "cifar10" and classes * images < 5:
        images = 5
    fake(name, folder, Settings(classes, images, 8, seed))
    assert check(name, folder).problems == []
    for split in (DATA_SETS[name].train, DATA_SETS[name].test):
        assert np.bincount(open_labelled(name, folder, split).labels).tolist() == [images] * classes


# --- annotations as they come -------------------------------------------------------------------------------------------------


@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=30), order=st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_any_annotations_are_read_as_written(labels: list[int], order: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("any")
    (root / "train_val2018").mkdir()
    ids = order.sample(range(1000), len(labels))
    annotations = [{"id": 0, "image_id": image, "category_id": label} for image, label in zip(ids, labels, strict=True)]
    order.shuffle(annotations)
    categories = [{"id": label, "name": f"name {label}"} for label in order.sample(range(5), 5)]
    images = [{"id": image, "file_name": f"train_val2018/x/{image}.jpg"} for image in ids]
    (root / "train2018.json").write_text(json.dumps({"categories": categories, "images": images, "annotations": annotations}))
    data = open_labelled("inat18", root, "train")
    assert data.labels.tolist() == labels
    assert keys(data) == [f"train_val2018/x/{image}" for image in ids]
    assert data.classes == tuple(f"name {label}" for label in range(5))


ANNOTATIONS = [
    ("cifar10", "data_batch_2"),
    ("cifar10", "batches.meta"),
    ("fgvc_aircraft", "data/variants.txt"),
    ("fgvc_aircraft", "data/images_variant_train.txt"),
    ("oxford_pets", "annotations/trainval.txt"),
    ("food101", "meta/train.json"),
    ("flowers102", "setid.mat"),
    ("flowers102", "imagelabels.mat"),
    ("inat18", "train2018.json"),
]


@pytest.mark.filterwarnings("ignore")  # scipy's, of strange files
@given(where=st.floats(0, 1), insert=st.binary(max_size=4), drop=st.integers(0, 200), which=st.sampled_from(ANNOTATIONS))
@settings(max_examples=150, deadline=None)
def test_whatever_happens_to_annotations_there_is_a_message(
    where: float, insert: bytes, drop: int, which: tuple[str, str], tmp_path_factory: pytest.TempPathFactory, fakes: Path
) -> None:
    """Bytes replaced anywhere: it opens, with labels in range, or says what is wrong."""
    name, file = which
    root = tmp_path_factory.mktemp("damaged") / "x"
    shutil.copytree(fakes / name / DATA_SETS[name].base, root)
    whole = (root / file).read_bytes()
    start = int(where * len(whole))
    (root / file).write_bytes(whole[:start] + insert + whole[start + drop :])
    try:
        data = open_labelled(name, root, DATA_SETS[name].train)
    except ValueError:
        return
    assert 0 <= data.labels.min() <= data.labels.max() < len(data.classes)
