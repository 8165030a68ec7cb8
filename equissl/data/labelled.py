"""Labelled data sets of the evaluations, as their authors give them out or as our shards. Nothing is downloaded. No torch.

    data = open_labelled("fgvc_aircraft", Path("/data/aircraft"), "train")
    data.labels            int64 (N,)
    data.read(0)           the encoded image, for `loader.decode`

`DATA_SETS` has of each its splits, counts, main metric and tree. Our own readers instead of torchvision's: those compare MD5 sums, so
that no small set in the same format passes, run CIFAR's pickles, and say only that something was not found. The order of the images
is torchvision's.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from equissl.data.shards import MANIFEST, Images, ShardSet, read_manifest
from equissl.data.sources import THREADS, Cifar, folders_of, is_image

FAKE = "fake.json"  # beside the files of a data set of `equihpc data fake`: its counts
NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)  # said of files that are not there
SAMPLED = 64  # images of a split whose bytes enter its hash
FORMAT = 2  # raised when `manifest_sha256` stands for something else


class Listing(NamedTuple):
    """What the files of annotations say of one split."""

    classes: list[str]
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


class Labelled(ABC):
    """One split of a labelled data set in its authors' format. Pickles for the workers of a loader: names and labels, no images.

    `manifest_sha256` stands for the content: it is of the names of data set, split, classes and files, of the labels, in order, and of the
    bytes of `SAMPLED` images, evenly over the split; of CIFAR of all pixels. It is the same in another place, and another where the
    images were resized or encoded anew; single files that were replaced it notices where they are in the sample.
    """

    def __init__(self, name: str, split: str, folder: Path, classes: Sequence[str], labels: NDArray[np.int64]) -> None:
        self.name, self.split, self.folder = name, split, folder
        self.classes = tuple(classes)
        self.labels = labels  # int64 (num_images,), each the number of a class
        self.num_images = len(labels)
        self.manifest_sha256 = ""

    def require_labels(self) -> NDArray[np.int64]:
        return self.labels

    @abstractmethod
    def key(self, i: int) -> str:
        """A name like no other's in the split."""

    @abstractmethod
    def read(self, i: int) -> bytes:
        """The encoded image. Raises ValueError for a file that cannot be read."""

    def _hash(self, *more: bytes) -> str:
        digest = hashlib.sha256(json.dumps([FORMAT, self.name, self.split, self.classes]).encode())
        for part in (self.labels.astype("<i8").tobytes(), *more):
            digest.update(b"\0%d\0" % len(part) + part)
        return digest.hexdigest()


class Files(Labelled):
    """An image is a file."""

    def __init__(self, name: str, split: str, root: Path, listing: Listing) -> None:
        super().__init__(name, split, root, listing.classes, np.array(listing.labels, dtype=np.int64))
        encoded = [os.fsencode(file) for file in listing.files]
        self._names = np.array(encoded or [b""])[: len(encoded)]  # a tenth of the memory of as many strings
        # evenly over the split
        chosen = np.unique(np.linspace(0, max(0, self.num_images - 1), min(SAMPLED, self.num_images)).astype(np.int64))
        self.sampled = [self.file(i) for i in chosen.tolist()]
        fake = root / FAKE
        self.manifest_sha256 = self._hash(b"\0".join(encoded), self._sample(), *([fake.read_bytes()] if fake.is_file() else []))

    def _sample(self) -> bytes:
        """The sha256 of some images; of one that is not there nothing: others say what is missing."""
        with ThreadPoolExecutor(THREADS) as pool:
            return b"\0".join(pool.map(self._digest, self.sampled))

    def _digest(self, file: str) -> bytes:
        try:
            return hashlib.sha256((self.folder / file).read_bytes()).digest()
        except ValueError:  # a name with a NUL
            return b""
        except OSError as error:
            if error.errno in NOWHERE:
                return b""
            raise

    def file(self, i: int) -> str:
        """Below `folder`."""
        return os.fsdecode(bytes(self._names[i]))

    def key(self, i: int) -> str:
        return self.file(i).rpartition(".")[0]

    @property
    def files(self) -> list[str]:
        return [self.file(i) for i in range(self.num_images)]

    def missing(self) -> list[str]:
        """The files that are not there: a look into every folder, and at links."""
        names: dict[str, set[str]] = {}
        for file in self.files:
            folder, _, name = file.rpartition("/")
            names.setdefault(folder, set()).add(name)
        with ThreadPoolExecutor(THREADS) as pool:
            there = pool.map(lambda folder: _names_in(self.folder / folder), names)
            return [
                f"{folder}/{name}" for (folder, wanted), found in zip(names.items(), there, strict=True) for name in sorted(wanted - found)
            ]

    def read(self, i: int) -> bytes:
        path = self.folder / self.file(i)
        try:
            return path.read_bytes()
        except OSError as error:
            raise ValueError(
                f"the image {path} cannot be read: {error.strerror}; equihpc data check {self.name} {self.folder} finds what else is"
                " missing"
            ) from None


class _Pixels(Labelled):
    """CIFAR: all images are in memory, read again where it was unpickled."""

    def __init__(self, name: str, split: str, folder: Path) -> None:
        classes, labels, pixels = self._read(name, split, folder)
        super().__init__(name, split, folder, classes, labels)
        self._pixels: NDArray[np.uint8] | None = pixels
        self.manifest_sha256 = self._hash(pixels.tobytes())

    @staticmethod
    def _read(name: str, split: str, folder: Path) -> tuple[list[str], NDArray[np.int64], NDArray[np.uint8]]:
        source = Cifar(folder, None, name)
        _, labels, pixels = zip(*source.batches(["train" if split == "train" else "val"]), strict=True)
        assert source.classes is not None
        return source.classes, np.concatenate(labels), np.concatenate(pixels)

    def key(self, i: int) -> str:
        return f"{self.split}-{i:05d}"

    def read(self, i: int) -> bytes:
        """As PPM: a line, then the pixels as they are."""
        if self._pixels is None:
            self._pixels = self._read(self.name, self.split, self.folder)[2]
        image: NDArray[np.uint8] = self._pixels[i]
        return b"P6 32 32 255\n" + image.transpose(1, 2, 0).tobytes()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pixels": None}


class Joined:
    """Two splits of a data set as one, the first one's images first. Raises ValueError where they have not the same classes."""

    def __init__(self, first: Images, second: Images) -> None:
        if differing := differing_classes(first, second):
            raise ValueError(f"{first.folder}: {differing}")
        self.parts = (first, second)
        self.name, self.folder, self.classes = first.name, first.folder, first.classes
        self.split = f"{first.split}+{second.split}"
        self.num_images = first.num_images + second.num_images
        self.manifest_sha256 = joined_sha256(self.parts)

    @property
    def labels(self) -> NDArray[np.int64]:
        return np.concatenate([part.labels for part in self.parts])

    def require_labels(self) -> NDArray[np.int64]:
        return np.concatenate([part.require_labels() for part in self.parts])

    def key(self, i: int) -> str:
        part, i = self._part(i)
        return part.key(i)

    def read(self, i: int) -> bytes:
        part, i = self._part(i)
        return part.read(i)

    def _part(self, i: int) -> tuple[Images, int]:
        first, second = self.parts
        return (first, i) if i < first.num_images else (second, i - first.num_images)


def joined_sha256(parts: Sequence[Images]) -> str:
    """Of their `manifest_sha256`: the manifest's where all are of one folder of shards."""
    different = list(dict.fromkeys(part.manifest_sha256 for part in parts))
    return different[0] if len(different) == 1 else hashlib.sha256(" ".join(different).encode()).hexdigest()


def differing_classes(one: Images, other: Images) -> str:
    """What to say where two splits have not the same classes; "" where they have."""
    if one.classes == other.classes:
        return ""
    differing = sorted(set(one.classes) ^ set(other.classes)) or ["none, but their order"]
    return f"{one.split} and {other.split} have not the same classes: only one of them has {few(differing)}"


class Sets(NamedTuple):
    """What an evaluation is trained and tested on."""

    train: Images  # with those of the official split that hyper-parameters are chosen on, which are the last ones
    test: Images
    num_tune: int = 0  # how many these are; 0: there is no such split
    reported: str = "val"  # what the split to test on is called
    main: str = "top1"  # of classifiers, or mean_per_class: the metric by which hyper-parameters are chosen

    @property
    def manifest_sha256(self) -> str:
        return joined_sha256([*(self.train.parts if isinstance(self.train, Joined) else [self.train]), self.test])


def pair(folder: Path) -> Sets:
    """Of a folder of shards the splits train and val, as a pretraining's has them. Raises ValueError."""
    return Sets(ShardSet(folder, "train"), ShardSet(folder, "val"))


def open_sets(name: str, path: Path) -> Sets:
    """The splits of the data set's protocol. Raises ValueError as `open_labelled`, and where they have not the same classes."""
    data_set = find_data_set(name)
    train, test = (open_labelled(name, path, split) for split in (data_set.train, data_set.test))
    if differing := differing_classes(train, test):
        raise ValueError(f"{train.folder}: {differing}")
    reported = data_set.test, data_set.main
    if data_set.tune is None:
        return Sets(train, test, 0, *reported)
    tune = open_labelled(name, path, data_set.tune)
    return Sets(Joined(train, tune), test, tune.num_images, *reported)


def open_labelled(name: str, path: Path | str, split: str) -> Images:
    """One split of the data set `name` in `path`: the folder that its archive unpacks to, the one around it, a folder of several data
    sets, each under its name, or a data set of ours.

    The number of images and classes is what is there: `equihpc data check` compares it with the official one.
    Raises ValueError for an unknown name or split, and for what is not as it must be.
    """
    data_set = find_data_set(name)
    if split not in data_set.splits:
        raise ValueError(f"{name} has no split {split!r}; choose from {', '.join(data_set.splits)}")
    root = find_root(data_set, Path(path))
    if (root / MANIFEST).is_file():
        shards = ShardSet(root, split_of_shards(data_set, root, split))
        shards.require_labels()
        return shards
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
    own = next((folder for folder in (path / data_set.name, path / "data" / data_set.name) if folder.is_dir()), path)
    for folder in (own, own / "data"):
        if (folder / MANIFEST).is_file():
            return folder
    if data_set.listing is None:
        return Cifar(own, None, data_set.name).place
    files = [*data_set.needs, *map(data_set.from_file, data_set.splits)]
    for root in dict.fromkeys((own / data_set.base, own)):
        if any(file and (root / file).exists() for file in files):
            return root
    raise ValueError(
        f"{own} holds nothing of {data_set.name}: neither {data_set.base or data_set.needs[0]}/ nor {MANIFEST}; equihpc data check"
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
    except RecursionError:
        raise ValueError(f"{path} is not what the authors give out: it is nested too deeply") from None


def few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _imagenet(root: Path, split: str) -> Listing:
    """As torchvision's ImageFolder: the class is the position of its folder among the sorted ones."""
    classes = folders_of(root / "train")
    if differing := sorted(set(classes) ^ set(folders_of(root / "val"))):  # it would shift the labels of all classes after it
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
    """Of files; a link that leads nowhere is none. A file system that tells the kind with the name is not asked again."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if _is_file(entry)}
    except (FileNotFoundError, NotADirectoryError):
        return set()


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError as error:
        if error.errno in NOWHERE:  # a link to itself
            return False
        raise


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
    if gaps := [str(label + 1) for label in range(len(names)) if label not in names]:
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
        listed, labelled = (Counter(each[key] for each in content[of]) for of, key in (("images", "id"), ("annotations", "image_id")))
    except (LookupError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path} is not the competition's: categories, images, annotations ({error!r})") from None
    if sorted(names) != list(range(len(names))):
        raise ValueError(f"{path}: the ids of the {len(names)} categories are not 0 to {len(names) - 1}")
    if differing := [str(image) for image in {**listed, **labelled} if not listed[image] == labelled[image] == 1]:
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
