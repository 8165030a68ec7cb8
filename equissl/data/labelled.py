"""Labelled data sets of the evaluations, as their authors give them out or as our shards. Nothing is downloaded. No torch to open one.

    data = open_labelled("fgvc_aircraft", Path("/data/aircraft"), "train")
    data.labels            int64 (N,)
    data.image(0)          uint8 (3, height, width)

`DATA_SETS` has of each its splits, counts, main metric and tree. Our own readers instead of torchvision's: those compare MD5 sums, so
that no small set in the same format passes, run CIFAR's pickles, and say only that something was not found. The order of the images
is torchvision's.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from equissl.data.shards import MANIFEST, ShardSet, read_manifest
from equissl.data.sources import THREADS, Cifar, folders_of, is_image

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1  # raised when `manifest_sha256` stands for something else


class Listing(NamedTuple):
    """What the files of annotations say of one split."""

    class_names: list[str]
    files: list[str]  # below the root
    labels: list[int]


@dataclass(frozen=True)
class DataSet:
    """A data set as its authors give it out."""

    name: str
    title: str
    num_classes: int
    splits: dict[str, int]  # official number of images
    train: str
    tune: str | None  # where hyper-parameters are chosen; None: on a part of `train` that is held out
    test: str
    main: str  # "top1" or "mean_per_class"; both are measured
    base: str  # the folder that the archive unpacks to, "" where it has none
    tree: tuple[str, ...]  # for people
    needs: tuple[str, ...]  # files and folders below `base`; of CIFAR there are several forms: none
    listing: Callable[[Path, str], Listing] | None  # root, split; None: CIFAR
    from_file: Callable[[str], str] = lambda split: ""  # the split's own file of annotations below `base`

    def expected(self) -> str:
        counts = ", ".join(f"{split} {count:,}" for split, count in self.splits.items())
        return f"{self.title}: {self.num_classes:,} classes; images: {counts}"


# --- opening ----------------------------------------------------------------------------------------------------------------


class Labelled:
    """One split of a labelled data set. Pickles for the workers of a loader: names and labels, no images.

    `manifest_sha256` stands for the layout: of our shards the sha256 of manifest.json, which stands for every byte; otherwise of the
    names of data set, split, classes and files and of the labels, in order, and of CIFAR the pixels too. It costs no look at the image
    files, and is the same in another place; what is in a file that keeps its name it does not notice.
    """

    def __init__(self, name: str, split: str, path: Path, class_names: Sequence[str], labels: NDArray[np.int64]) -> None:
        self.name, self.split, self.path = name, split, path
        self.class_names = tuple(class_names)
        self.labels = labels  # int64 (num_images,), each below num_classes
        self.manifest_sha256 = ""

    @property
    def num_images(self) -> int:
        return len(self.labels)

    def __len__(self) -> int:
        return self.num_images

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def keys(self) -> list[str]:
        """Of every image a name like no other's in the split."""
        return [self.key(i) for i in range(self.num_images)]

    def key(self, i: int) -> str:
        raise NotImplementedError

    def encoded(self, i: int) -> bytes | NDArray[np.uint8]:
        """The image's bytes as they are stored; of CIFAR its pixels, `(3, 32, 32)`. Raises ValueError for a file that cannot be read."""
        raise NotImplementedError

    def image(self, i: int) -> Tensor:
        """uint8 `(3, height, width)`, RGB. Raises BadSample where it cannot be decoded, ValueError where it is missing."""
        import torch

        from equissl.data.loader import BadSample, decode_image

        content = self.encoded(i)
        if isinstance(content, np.ndarray):
            return torch.from_numpy(content.copy())
        try:
            return torch.from_numpy(decode_image(content)).permute(2, 0, 1)
        except Exception as error:  # Pillow's readers raise what they like
            raise BadSample(f"the image {self.key(i)} of {self.name} in {self.path} cannot be decoded: {error}") from None

    def _hash(self, *more: bytes) -> str:
        digest = hashlib.sha256(json.dumps([FORMAT, self.name, self.split, self.class_names]).encode())
        for part in (self.labels.astype("<i8").tobytes(), *more):
            digest.update(b"\0%d\0" % len(part) + part)
        return digest.hexdigest()


class Files(Labelled):
    """An image is a file."""

    def __init__(self, name: str, split: str, root: Path, listing: Listing) -> None:
        super().__init__(name, split, root, listing.class_names, np.array(listing.labels, dtype=np.int64))
        encoded = [os.fsencode(file) for file in listing.files]
        self._names = np.array(encoded or [b""])[: len(encoded)]  # a tenth of the memory of as many strings
        self.manifest_sha256 = self._hash(b"\0".join(encoded))

    def file(self, i: int) -> str:
        """Below `path`."""
        return os.fsdecode(bytes(self._names[i]))

    def key(self, i: int) -> str:
        return self.file(i).rpartition(".")[0]

    @property
    def files(self) -> list[str]:
        return [self.file(i) for i in range(self.num_images)]

    def missing(self) -> list[str]:
        """The files that are not there: a look into every folder, none at a file."""
        names: dict[str, set[str]] = {}
        for file in self.files:
            folder, _, name = file.rpartition("/")
            names.setdefault(folder, set()).add(name)
        with ThreadPoolExecutor(THREADS) as pool:
            there = pool.map(lambda folder: _names_in(self.path / folder), names)
            return [
                f"{folder}/{name}" for (folder, wanted), found in zip(names.items(), there, strict=True) for name in sorted(wanted - found)
            ]

    def encoded(self, i: int) -> bytes:
        path = self.path / self.file(i)
        try:
            return path.read_bytes()
        except OSError as error:
            raise ValueError(
                f"the image {path} cannot be read: {error.strerror}; equihpc data check {self.name} {self.path} finds what else is missing"
            ) from None


class _Pixels(Labelled):
    """CIFAR: all images are in memory, read again where it was unpickled."""

    def __init__(self, name: str, split: str, path: Path) -> None:
        classes, labels, pixels = self._read(name, split, path)
        super().__init__(name, split, path, classes, labels)
        self._pixels: NDArray[np.uint8] | None = pixels
        self.manifest_sha256 = self._hash(pixels.tobytes())

    @staticmethod
    def _read(name: str, split: str, path: Path) -> tuple[list[str], NDArray[np.int64], NDArray[np.uint8]]:
        source = Cifar(path, None, name)
        _, labels, pixels = zip(*source.batches(["train" if split == "train" else "val"]), strict=True)
        assert source.classes is not None
        return source.classes, np.concatenate(labels), np.concatenate(pixels)

    def key(self, i: int) -> str:
        return f"{self.split}-{i:05d}"

    def encoded(self, i: int) -> NDArray[np.uint8]:
        if self._pixels is None:
            self._pixels = self._read(self.name, self.split, self.path)[2]
        image: NDArray[np.uint8] = self._pixels[i]
        return image

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pixels": None}


class _Shards(Labelled):
    def __init__(self, name: str, split: str, data: ShardSet) -> None:
        labels = np.array(data.require_labels(), dtype=np.int64)
        if labels.max() >= len(data.classes):
            raise ValueError(
                f"{data.folder}: the label {labels.max()} of the split {data.split!r} is not one of {len(data.classes)} classes"
            )
        super().__init__(name, split, data.folder, data.classes, labels)
        self._data, self.manifest_sha256 = data, data.manifest_sha256

    def key(self, i: int) -> str:
        return self._data.key(i)

    def encoded(self, i: int) -> bytes:
        return self._data.read(i)


def open_labelled(name: str, path: Path | str, split: str) -> Labelled:
    """One split of the data set `name` in `path`: the folder that its archive unpacks to, the one around it, or a data set of ours.

    The number of images and classes is what is there: `equihpc data check` compares it with the official one.
    Raises ValueError for an unknown name or split, and for what is not as it must be.
    """
    data_set = find_data_set(name)
    if split not in data_set.splits:
        raise ValueError(f"{name} has no split {split!r}; choose from {', '.join(data_set.splits)}")
    root = find_root(data_set, Path(path))
    if (root / MANIFEST).is_file():
        return _Shards(name, split, ShardSet(root, split_of_shards(data_set, root, split)))
    if data_set.listing is None:
        return _Pixels(name, split, root)
    if missing := [each for each in (*data_set.needs, data_set.from_file(split)) if not (root / each).exists()]:
        raise ValueError(f"{root} has no {missing[0]}, which {name} needs: equihpc data check {name} {path} shows the whole tree")
    listing = data_set.listing(root, split)
    if not listing.files:
        raise ValueError(f"{root}: the split {split!r} of {name} has no images")
    return Files(name, split, root, listing)


def find_data_set(name: str) -> DataSet:
    """Raises ValueError for an unknown name."""
    if name not in DATA_SETS:
        raise ValueError(f"unknown data set {name!r}; choose from {', '.join(DATA_SETS)}")
    return DATA_SETS[name]


def find_root(data_set: DataSet, path: Path) -> Path:
    """Where the data set begins in `path`. Raises ValueError where nothing of it is there."""
    path = path.expanduser()
    if not path.exists():
        raise ValueError(f"there is no {path}: give the folder of {data_set.name}")
    for folder in (path, path / "data"):
        if (folder / MANIFEST).is_file():
            return folder
    if data_set.listing is None:
        return Cifar(path, None, data_set.name).place
    files = [*data_set.needs, *map(data_set.from_file, data_set.splits)]
    for root in dict.fromkeys((path / data_set.base, path)):
        if any(file and (root / file).exists() for file in files):
            return root
    raise ValueError(
        f"{path} holds nothing of {data_set.name}: neither {data_set.base or data_set.needs[0]}/ nor {MANIFEST}; equihpc data check"
        f" {data_set.name} {path} shows what it must hold, equihpc data build makes shards"
    )


def split_of_shards(data_set: DataSet, root: Path, split: str) -> str:
    """`data build` calls CIFAR's test images val."""
    is_val = data_set.listing is None and split == "test" and "test" not in read_manifest(root)["splits"]
    return "val" if is_val else split


# --- one reader each --------------------------------------------------------------------------------------------------------


def _lines(path: Path) -> list[str]:
    """Without spaces at their ends, nor empty ones at the end. Raises ValueError."""
    try:
        return [line.rstrip() for line in path.read_text(encoding="utf-8").rstrip().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON, or cut short: {error}") from None


def few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _imagenet(root: Path, split: str) -> Listing:
    """As torchvision's ImageFolder: the class is the position of its folder among the sorted ones."""
    classes = folders_of(root / split)
    for other in ("train", "val"):  # a class that only one of them has would shift the labels of all after it
        if differing := sorted(set(classes) ^ set(folders_of(root / other))):
            raise ValueError(f"{root}: train and val have not the same class folders: only one of them has {few(differing)}")
    if not classes:
        raise ValueError(f"{root / split} has no folders of classes, such as n01440764: are the images still to be sorted into them?")
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda name: _images_in(root / split / name), classes))
    if empty := [name for name, images in zip(classes, found, strict=True) if not images]:
        raise ValueError(f"{root / split}: no images in the class folders {few(empty)}")
    files = [f"{split}/{name}/{image}" for name, images in zip(classes, found, strict=True) for image in images]
    return Listing(classes, files, [label for label, images in enumerate(found) for _ in images])


def _names_in(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return set()


def _images_in(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if is_image(entry.name))


def _aircraft(root: Path, split: str) -> Listing:
    """Lines "IMAGE VARIANT"; the class is the position in variants.txt."""
    classes = _lines(root / "data/variants.txt")
    position = {name: number for number, name in enumerate(classes)}
    path = root / f"data/images_variant_{split}.txt"
    files, labels = [], []
    for number, line in enumerate(_lines(path), start=1):
        image, _, variant = line.partition(" ")
        if variant not in position:
            raise ValueError(f"{path}:{number}: the variant {variant!r} is not one of the {len(classes)} of variants.txt")
        files.append(f"data/images/{image}.jpg")
        labels.append(position[variant])
    return Listing(classes, files, labels)


def _pets(root: Path, split: str) -> Listing:
    """Lines "IMAGE CLASS SPECIES BREED", classes from 1; their names are in those of the images."""
    path = root / f"annotations/{split}.txt"
    files, labels, names = [], [], dict[int, str]()
    for number, line in enumerate(_lines(path), start=1):
        words = line.split()
        if len(words) != 4 or not words[1].isdecimal() or int(words[1]) < 1:
            raise ValueError(f"{path}:{number}: {line[:80]!r} is not IMAGE CLASS SPECIES BREED with a class from 1 on")
        name, label = words[0].rpartition("_")[0], int(words[1]) - 1
        if names.setdefault(label, name) != name:
            raise ValueError(f"{path}:{number}: the image {words[0]} has the class {words[1]}, which is that of {names[label]}")
        files.append(f"images/{words[0]}.jpg")
        labels.append(label)
    if gaps := [str(label + 1) for label in range(min(len(names), max(names, default=0))) if label not in names]:
        raise ValueError(f"{path}: the classes must be 1, 2, …, but there is {max(names) + 1} and not {few(gaps)}")
    return Listing([names[label].replace("_", " ").title() for label in sorted(names)], files, labels)


def _food(root: Path, split: str) -> Listing:
    """{CLASS: ["CLASS/IMAGE", …]}; the class is its position among the sorted names."""
    path = root / f"meta/{split}.json"
    content = _json(path)
    if not isinstance(content, dict) or not all(
        isinstance(images, list) and all(isinstance(image, str) for image in images) for images in content.values()
    ):
        raise ValueError(f"{path} is not {{class: [image, …]}}")
    classes = sorted(content)
    position = {name: number for number, name in enumerate(classes)}
    pairs = [(image, position[name]) for name, images in content.items() for image in images]
    return Listing(classes, [f"images/{image}.jpg" for image, _ in pairs], [label for _, label in pairs])


def _flowers(root: Path, split: str) -> Listing:
    """Classes and numbers of the images from 1. The files have no names of the classes: they are "1" to "102"."""
    labels = _matrix(root / "imagelabels.mat", "labels")
    chosen = _matrix(root / "setid.mat", {"train": "trnid", "val": "valid", "test": "tstid"}[split])
    if labels.size and labels.min() < 1:
        raise ValueError(f"{root / 'imagelabels.mat'}: the label {labels.min()} of image {labels.argmin() + 1} is not 1 or more")
    if chosen.size and not 1 <= chosen.min() <= chosen.max() <= len(labels):
        raise ValueError(f"{root / 'setid.mat'}: {split} has an image that is none of the {len(labels)} of imagelabels.mat")
    classes = [str(number) for number in range(1, int(labels.max(initial=0)) + 1)]
    return Listing(classes, [f"jpg/image_{number:05d}.jpg" for number in chosen.tolist()], (labels[chosen - 1] - 1).tolist())


def _matrix(path: Path, name: str) -> NDArray[np.int64]:
    from scipy.io import loadmat  # type: ignore[import-untyped]

    try:
        values = np.atleast_1d(loadmat(path, squeeze_me=True)[name])
        if values.ndim != 1 or values.dtype.kind not in "ui":
            raise ValueError(f"{name} is {values.dtype} of shape {values.shape}")
    except Exception as error:  # a damaged file raises whatever its bytes come to
        raise ValueError(f"{path} is not the official file with {name}: {error}") from None
    return values.astype(np.int64)


def _inat18(root: Path, split: str) -> Listing:
    """The competition's form of COCO's JSON; a category's id is its class. The competition hid the categories' names."""
    path = root / f"{split}2018.json"
    content = _json(path)
    try:
        names = {int(category["id"]): str(category["name"]) for category in content["categories"]}
        files = {image["id"]: str(image["file_name"]) for image in content["images"]}
        labels = {annotation["image_id"]: int(annotation["category_id"]) for annotation in content["annotations"]}
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not the competition's: categories, images, annotations ({error!r})") from None
    if sorted(names) != list(range(len(names))):
        raise ValueError(f"{path}: the ids of the {len(names)} categories are not 0 to {len(names) - 1}")
    if differing := [str(image) for image in files.keys() ^ labels.keys()]:
        raise ValueError(f"{path}: every image must have one annotation; not so the ids {few(differing)}")
    if foreign := [image for image, label in labels.items() if label not in names]:
        raise ValueError(f"{path}: the category {labels[foreign[0]]} of image {foreign[0]} is not one of the {len(names)}")
    return Listing([names[number] for number in range(len(names))], list(files.values()), [labels[image] for image in files])


# --- the data sets ----------------------------------------------------------------------------------------------------------

_CIFAR = {"train": 50_000, "test": 10_000}
DATA_SETS = {
    each.name: each
    for each in (
        DataSet(
            name="imagenet1k",
            title="ImageNet-1k (ILSVRC 2012)",
            num_classes=1000,
            splits={"train": 1_281_167, "val": 50_000},
            train="train",
            tune=None,
            test="val",
            main="top1",
            base="",
            tree=("train/n01440764/n01440764_10026.JPEG", "val/n01440764/ILSVRC2012_val_00000293.JPEG"),
            needs=("train", "val"),
            listing=_imagenet,
        ),
        DataSet(
            name="cifar10",
            title="CIFAR-10",
            num_classes=10,
            splits=_CIFAR,
            train="train",
            tune=None,
            test="test",
            main="top1",
            base="cifar-10-batches-py",
            tree=(
                *(f"data_batch_{number}" for number in range(1, 6)),
                "test_batch",
                "batches.meta",
                "or the binary version, or its .tar.gz",
            ),
            needs=(),
            listing=None,
        ),
        DataSet(
            name="cifar100",
            title="CIFAR-100, fine labels",
            num_classes=100,
            splits=_CIFAR,
            train="train",
            tune=None,
            test="test",
            main="top1",
            base="cifar-100-python",
            tree=("train", "test", "meta", "or the binary version, or its .tar.gz"),
            needs=(),
            listing=None,
        ),
        DataSet(
            name="fgvc_aircraft",
            title="FGVC-Aircraft 2013b, variants",
            num_classes=100,
            splits={"train": 3334, "val": 3333, "trainval": 6667, "test": 3333},
            train="train",
            tune="val",
            test="test",
            main="mean_per_class",
            base="fgvc-aircraft-2013b",
            tree=("data/variants.txt", "data/images_variant_{train,val,trainval,test}.txt", "data/images/0034309.jpg"),
            needs=("data/variants.txt", "data/images"),
            listing=_aircraft,
            from_file=lambda split: f"data/images_variant_{split}.txt",
        ),
        DataSet(
            name="oxford_pets",
            title="Oxford-IIIT Pet, breeds",
            num_classes=37,
            splits={"trainval": 3680, "test": 3669},
            train="trainval",
            tune=None,
            test="test",
            main="mean_per_class",
            base="oxford-iiit-pet",
            tree=("annotations/{trainval,test}.txt", "images/Abyssinian_1.jpg"),
            needs=("images",),
            listing=_pets,
            from_file=lambda split: f"annotations/{split}.txt",
        ),
        DataSet(
            name="food101",
            title="Food-101",
            num_classes=101,
            splits={"train": 75_750, "test": 25_250},
            train="train",
            tune=None,
            test="test",
            main="top1",
            base="food-101",
            tree=("meta/{train,test}.json", "images/apple_pie/1005649.jpg"),
            needs=("images",),
            listing=_food,
            from_file=lambda split: f"meta/{split}.json",
        ),
        DataSet(
            name="flowers102",
            title="Oxford 102 Flowers",
            num_classes=102,
            splits={"train": 1020, "val": 1020, "test": 6149},
            train="train",
            tune="val",
            test="test",
            main="mean_per_class",
            base="flowers-102",
            tree=("imagelabels.mat", "setid.mat", "jpg/image_00001.jpg"),
            needs=("jpg", "imagelabels.mat", "setid.mat"),
            listing=_flowers,
        ),
        DataSet(
            name="inat18",
            title="iNaturalist 2018",
            num_classes=8142,
            splits={"train": 437_513, "val": 24_426},
            train="train",
            tune=None,
            test="val",
            main="top1",
            base="",
            tree=("{train,val}2018.json", "train_val2018/Plantae/7477/3b60c9486db1d2ee875f11a669fbde4a.jpg"),
            needs=("train_val2018",),
            listing=_inat18,
            from_file=lambda split: f"{split}2018.json",
        ),
    )
}
