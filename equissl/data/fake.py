"""`equihpc data fake TASK DIR`: a tiny data set in the true format of an evaluation's, for tests and rehearsals. No torch.

Images are noise on the colour of their class: a classifier can learn them. The same names, labels and pixels for the same settings.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from equissl.data.labelled import DATA_SETS, FAKE, find_data_set
from equissl.draws import MAX_SEED

DESCRIPTION = "Write a tiny data set in the true format of an evaluation's: a few classes and images, from a seed."
SIDE = 32  # of CIFAR's images


@dataclass(frozen=True)
class Settings:
    classes: int = 3
    images: int = 4  # of every class, in every split
    side: int = 48  # pixels of the short side
    seed: int = 0


DEFAULT = Settings()


@dataclass(frozen=True)
class _Image:
    label: int
    number: int  # among those of its class, from 0 in the first split on
    settings: Settings

    def pixels(self, height: int, width: int) -> NDArray[np.uint8]:
        """`(height, width, 3)`."""
        colour = np.random.default_rng([self.settings.seed, self.label]).uniform(60, 195, 3)
        noise = np.random.default_rng([self.settings.seed, self.label, self.number + 1]).normal(0, 20, (height, width, 3))
        return np.clip(colour + noise, 0, 255).astype(np.uint8)

    def save(self, path: Path) -> None:
        side = self.settings.side
        longer = side + side * (self.number % 4) // 4  # not all are square
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(self.pixels(*((side, longer) if self.label % 2 else (longer, side)))).save(path, "JPEG", quality=90)


Splits = dict[str, list[_Image]]


def fake(name: str, folder: Path, settings: Settings = DEFAULT) -> None:
    """Write it into `folder`, which must not be there yet; whole or not at all. Raises ValueError."""
    data_set = find_data_set(name)
    for what, value, low, high in (
        ("classes", settings.classes, 1, data_set.num_classes),
        ("images", settings.images, 1, 1000),
        ("side", settings.side, 8, 1024),
        ("seed", settings.seed, 0, MAX_SEED),
    ):
        if not low <= value <= high:
            raise ValueError(f"{what} is {value}; it must be between {low} and {high}")
    if name == "cifar10" and settings.classes * settings.images < len(BATCHES):
        raise ValueError(f"{settings.classes} classes of {settings.images} images do not fill CIFAR-10's {len(BATCHES)} batches: take more")
    if folder.exists() or folder.is_symlink():
        raise ValueError(f"{folder} is there already: give another folder, or remove it first")
    disjoint = [each for each in data_set.splits if each in (data_set.train, data_set.tune, data_set.test)]
    splits = {
        split: [_Image(label, part * settings.images + i, settings) for label in range(settings.classes) for i in range(settings.images)]
        for part, split in enumerate(disjoint)
    }
    if "trainval" in data_set.splits and "trainval" not in splits:
        splits["trainval"] = splits["train"] + splits["val"]
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        root = temporary / data_set.base
        root.mkdir(exist_ok=True)
        WRITERS[name](root, splits, settings.classes)
        counts = {split: len(splits[split]) for split in data_set.splits}
        content = {"data_set": name, "num_classes": settings.classes, "splits": counts, "seed": settings.seed, "side": settings.side}
        (root / FAKE).write_text(json.dumps(content))
        temporary.chmod(0o755)  # mkdtemp's is 700
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


# --- one writer each --------------------------------------------------------------------------------------------------------


def _write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def _imagenet(root: Path, splits: Splits, classes: int) -> None:
    for image in splits["train"]:
        wnid = f"n{image.label + 1:08d}"
        image.save(root / "train" / wnid / f"{wnid}_{image.number}.JPEG")
    for number, image in enumerate(splits["val"], start=1):
        image.save(root / "val" / f"n{image.label + 1:08d}" / f"ILSVRC2012_val_{number:08d}.JPEG")


def _aircraft(root: Path, splits: Splits, classes: int) -> None:
    variants = [f"Fake {700 + label}-200" for label in range(classes)]
    _write(root / "data/variants.txt", "".join(f"{name}\n" for name in variants))
    for split, images in splits.items():
        names = [f"{1000 * image.label + image.number:07d}" for image in images]
        lines = (f"{name} {variants[image.label]}\n" for name, image in zip(names, images, strict=True))
        _write(root / f"data/images_variant_{split}.txt", "".join(lines))
        for name, image in zip(names, images, strict=True):
            image.save(root / f"data/images/{name}.jpg")


def _pets(root: Path, splits: Splits, classes: int) -> None:
    for split, images in splits.items():
        lines = []
        for image in images:
            name = f"fake_breed_{image.label}_{image.number + 1}"
            image.save(root / f"images/{name}.jpg")
            lines.append(f"{name} {image.label + 1} {image.label % 2 + 1} {image.label // 2 + 1}\n")
        _write(root / f"annotations/{split}.txt", "".join(lines))


def _food(root: Path, splits: Splits, classes: int) -> None:
    for split, images in splits.items():
        listed: dict[str, list[str]] = {}
        for image in images:
            name = f"fake_dish_{image.label:03d}"
            listed.setdefault(name, []).append(f"{name}/{1000 + image.number}")
            image.save(root / f"images/{listed[name][-1]}.jpg")
        _write(root / f"meta/{split}.json", json.dumps(listed))


def _flowers(root: Path, splits: Splits, classes: int) -> None:
    from scipy.io import savemat  # type: ignore[import-untyped]

    images = sorted((image for each in splits.values() for image in each), key=lambda image: (image.label, image.number))
    number = {image: position for position, image in enumerate(images, start=1)}
    for image in images:
        image.save(root / f"jpg/image_{number[image]:05d}.jpg")
    savemat(root / "imagelabels.mat", {"labels": np.array([[image.label + 1 for image in images]], dtype=np.uint8)})
    keys = {"train": "trnid", "val": "valid", "test": "tstid"}
    savemat(root / "setid.mat", {keys[split]: np.array([[number[i] for i in each]], dtype=np.uint16) for split, each in splits.items()})


def _inat18(root: Path, splits: Splits, classes: int) -> None:
    supers = ["Aves", "Insecta", "Plantae"]
    categories = [{"id": label, "name": str(label), "supercategory": supers[label % 3]} for label in range(classes)]
    first = 1
    for split, images in splits.items():
        entries, annotations = [], []
        for number, image in enumerate(images, start=first):
            digest = hashlib.md5(f"{image.settings.seed} {image.label} {image.number}".encode(), usedforsecurity=False).hexdigest()
            file = f"train_val2018/{supers[image.label % 3]}/{image.label}/{digest}.jpg"
            image.save(root / file)
            entries.append({"id": number, "file_name": file, "license": 0, "rights_holder": ""})
            annotations.append({"id": number, "image_id": number, "category_id": image.label})
        first += len(images)
        content = {"info": {"year": 2018}, "images": entries, "categories": categories, "annotations": annotations, "licenses": []}
        _write(root / f"{split}2018.json", json.dumps(content))


BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))


def _cifar10(root: Path, splits: Splits, classes: int) -> None:
    parts = np.array_split(np.arange(len(splits["train"])), len(BATCHES))
    mixed = _mixed(splits["train"])
    for name, part in zip(BATCHES, parts, strict=True):
        _batch(root / name, [mixed[i] for i in part], "labels")
    _batch(root / "test_batch", _mixed(splits["test"]), "labels")
    _write(root / "batches.meta", _python2({"label_names": [f"fake_{label}" for label in range(classes)]}))


def _cifar100(root: Path, splits: Splits, classes: int) -> None:
    for split in ("train", "test"):
        _batch(root / split, _mixed(splits[split]), "fine_labels")
    names = {"fine_label_names": [f"fake_{label}" for label in range(classes)], "coarse_label_names": ["fake"]}
    _write(root / "meta", _python2(names))


def _mixed(images: list[_Image]) -> list[_Image]:
    """Every batch has all classes, where it is large enough."""
    return sorted(images, key=lambda image: (image.number, image.label))


def _batch(path: Path, images: list[_Image], key: str) -> None:
    rows = np.stack([image.pixels(SIDE, SIDE).transpose(2, 0, 1).reshape(-1) for image in images])
    names = [f"{image.label}_{image.number}.png" for image in images]
    _write(path, _python2({"data": rows, key: [image.label for image in images], "filenames": names}))


def _python2(content: dict[str, Any]) -> bytes:
    """A pickle as Python 2 and its numpy wrote it, as the authors' are: a string there is bytes or text as the reader asks for."""
    return pickle.PROTO + b"\x02" + _pickled(content) + pickle.STOP


class _Done(bytes):
    """Pickled already."""


def _sequence(kind: bytes, values: Iterable[Any]) -> _Done:
    return _Done(pickle.MARK + b"".join(map(_pickled, values)) + kind)


def _global(module: str, name: str) -> _Done:
    return _Done(pickle.GLOBAL + f"{module}\n{name}\n".encode())


def _called(module: str, name: str, arguments: tuple[Any, ...]) -> _Done:
    return _Done(_global(module, name) + _pickled(arguments) + pickle.REDUCE)


def _built(value: _Done, state: tuple[Any, ...]) -> _Done:
    return _Done(value + _pickled(state) + pickle.BUILD)


def _pickled(value: Any) -> bytes:
    if isinstance(value, _Done):
        return value
    if isinstance(value, str | bytes):
        content = value.encode() if isinstance(value, str) else value
        return pickle.BINSTRING + struct.pack("<i", len(content)) + content
    if isinstance(value, bool) or value is None:
        return {True: pickle.NEWTRUE, False: pickle.NEWFALSE, None: pickle.NONE}[value]
    if isinstance(value, int):
        return pickle.BININT + struct.pack("<i", value)
    if isinstance(value, np.ndarray):
        assert value.dtype == np.uint8
        empty = _called("numpy.core.multiarray", "_reconstruct", (_global("numpy", "ndarray"), (0,), "b"))
        dtype = _built(_called("numpy", "dtype", ("u1", 0, 1)), (3, "|", None, None, None, -1, -1, 0))
        return _built(empty, (1, value.shape, dtype, False, value.tobytes()))
    if isinstance(value, dict):
        return _sequence(pickle.DICT, [part for pair in value.items() for part in pair])
    assert isinstance(value, tuple | list)
    return _sequence(pickle.TUPLE if isinstance(value, tuple) else pickle.LIST, value)


WRITERS: dict[str, Callable[[Path, Splits, int], None]] = {
    "imagenet1k": _imagenet,
    "cifar10": _cifar10,
    "cifar100": _cifar100,
    "fgvc_aircraft": _aircraft,
    "oxford_pets": _pets,
    "food101": _food,
    "flowers102": _flowers,
    "inat18": _inat18,
}


# --- the command ------------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="TASK", help=f"the data set: {', '.join(DATA_SETS)}")
    parser.add_argument("folder", metavar="DIR", type=Path, help="is made; must not be there yet")
    parser.add_argument("--classes", type=int, default=DEFAULT.classes, metavar="N", help="default: %(default)s")
    parser.add_argument("--images", type=int, default=DEFAULT.images, metavar="N", help="of a class in every split; default: %(default)s")
    parser.add_argument("--side", type=int, default=DEFAULT.side, metavar="PX", help="short side of an image; default: %(default)s")
    parser.add_argument("--seed", type=int, default=DEFAULT.seed, metavar="N", help="default: %(default)s")


def command(arguments: argparse.Namespace) -> int:
    fake(arguments.name, arguments.folder, Settings(arguments.classes, arguments.images, arguments.side, arguments.seed))
    print(f"{arguments.folder}: a fake {arguments.name}; equihpc data check {arguments.name} {arguments.folder} shows what is in it")
    return 0
