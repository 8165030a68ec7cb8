"""What a data set is built from: for each kind of source its files, and the images in them by file, offset and size. No torch.

A source is gone through twice: `listing` names its files with sizes and times, quickly, by which a build that goes on knows that
nothing has changed; `images` finds the images in them. Labels are numbers, names of classes, or None.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import importlib
import io
import json
import logging
import os
import pickle
import re
import tarfile
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby, islice
from numbers import Integral
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from equissl.config import BuildConfig
from equissl.data import verify
from equissl.data.index import (
    COMPRESSED,
    IMAGES,
    MAX_CLASSES,
    NO_LABELS,
    SPLIT_WORD,
    SPLITS,
    Label,
    Reading,
    look_through,
    open_tar,
)
from equissl.data.parallel import Parallel
from equissl.data.shards import MANIFEST, NO_LABEL, SPLIT, manifest_sha256, read_manifest

log = logging.getLogger(__name__)

SPOOL = -1  # as `Found.file`
EMPTY, UNREADABLE, NO_IMAGE = "empty", "unreadable", "without image"  # why an image is left out
UNREADABLE_SIZE = -1
THREADS = 16  # that ask a shared file system for sizes and times
LISTS = (".tsv", ".csv", ".jsonl")
Item = tuple[str, int, int]  # a file's name below the root, bytes, time of its last change in ns


class Found(NamedTuple):
    """An image of a source."""

    split: str
    label: Label
    key: str  # from the file's name, as it is
    extension: str  # as in the file's name; "": the sample has no image
    file: int = SPOOL  # number in the listing
    offset: int = 0
    size: int = 0  # bytes
    content: bytes | None = None  # instead of file, offset and size, where the bytes cannot be had a second time


class Files:
    """Names, sizes and times of a source's files, in order: about 60 bytes each, memory-mapped where they were saved."""

    def __init__(self) -> None:
        self._names: Any = bytearray()
        self._ends: Any = array("Q")
        self.sizes: Any = array("q")
        self._digest = hashlib.sha256()

    def add(self, name: str, size: int, mtime_ns: int) -> None:
        encoded = os.fsencode(name)
        self._names += encoded
        self._ends.append(len(self._names))
        self.sizes.append(size)
        self._digest.update(b"%b\0%d %d\n" % (encoded, size, mtime_ns))

    def __len__(self) -> int:
        return len(self._ends)

    def name(self, number: int) -> str:
        start = int(self._ends[number - 1]) if number else 0
        return os.fsdecode(bytes(self._names[start : int(self._ends[number])]))

    def sha256(self) -> str:
        return self._digest.hexdigest()

    def save(self, folder: Path) -> None:
        for kind, values in (("names", np.frombuffer(self._names, np.uint8)), ("ends", self._ends), ("sizes", self.sizes)):
            np.save(folder / f"files.{kind}.npy", np.asarray(values))

    @classmethod
    def load(cls, folder: Path) -> Self:
        files = cls()
        files._names, files._ends, files.sizes = (np.load(folder / f"files.{kind}.npy", "r") for kind in ("names", "ends", "sizes"))
        return files


class Source:
    """`names` and `provenance` go into the manifest: no path of a machine is among them."""

    kind = ""
    default_name: str | None = None
    is_repeatable = True  # what was found once need not be looked for again while the listing is the same

    def __init__(self, root: Path, split: str | None) -> None:
        self.root, self.split = root, split  # the names of files are below the root
        self.where = str(root)  # for messages
        self.names: list[str] = []
        self.provenance: dict[str, Any] = {}
        self.classes: list[str] | None = None  # names of the numbers; None: known from the labels; set by `images` at the latest

    def listing(self) -> Iterator[Item]:
        """Raises ValueError where the source is not as it must be."""
        for name in self.names:
            stat = (self.root / name).stat()
            yield name, stat.st_size, stat.st_mtime_ns

    def images(self, files: Files, parallel: Parallel) -> Iterator[Found]:
        """Raises ValueError where the source is not as it must be."""
        raise NotImplementedError

    def _refuse_split(self) -> None:
        if self.split is not None:
            raise ValueError(f"{self.root} says itself which images are in which split: leave out split {self.split!r}")


def open_source(config: BuildConfig, samples: Iterable[Any] | None = None) -> Source:
    """The source of this config; `samples`: the iterable itself. Raises ValueError for a place that holds no source of that kind."""
    if config.split is not None and not SPLIT.fullmatch(config.split):
        raise ValueError(f"the split {config.split!r} is not 1 to 40 letters, digits, '_' and '-'")
    if samples is not None:
        return Generated(config.source, config.split, samples)
    path = Path(config.source).expanduser()
    kind = detect(config.source) if config.kind == "auto" else config.kind
    if kind == "iterable":
        return Generated(config.source, config.split)
    if not path.exists():
        raise ValueError(f"there is no {path}: give a folder, an archive, a list ({', '.join(LISTS)}) or module:function")
    if kind == "list":
        return List(path, config.split)
    if kind == "cifar":
        return Cifar(path, config.split)
    if kind == "shards":
        return Shards(path, config.split)
    if not path.is_dir():
        raise ValueError(f"{path} is a file; a source of kind {kind} is a folder")
    return ImageNet(path, config.split) if kind == "imagenet" else Folder(path, config.split)


def detect(source: str) -> str:
    """The kind of a source by what lies there. Raises ValueError for what is none."""
    path = Path(source).expanduser()
    if not path.exists():
        if re.fullmatch(r"[\w.]+:\w+", source):
            return "iterable"
        raise ValueError(f"there is no {path}: give a folder, an archive, a list ({', '.join(LISTS)}) or module:function")
    if path.name in (ImageNet.TRAIN, ImageNet.VAL):
        raise ValueError(f"{path} is one of ImageNet's archives: give the folder that holds them, {path.parent}")
    if path.is_file():
        if path.suffix in LISTS:
            return "list"
        if path.name.endswith((".tar.gz", ".tgz")) and "cifar" in path.name:
            return "cifar"
        if path.suffix == ".tar":
            return "shards"
        raise ValueError(
            f"{path} is no source that is known by its name: a list ends in {', '.join(LISTS)}, CIFAR's archive is cifar-….tar.gz, a"
            " WebDataset shard ends in .tar; give the kind, or a folder"
        )
    if any((path / name).is_file() for name in (ImageNet.TRAIN, ImageNet.VAL)):
        return "imagenet"
    if Cifar.places(path):
        return "cifar"
    # not in every folder: those of classes are many and full
    places = [path, *(path / name for name in (*SPLITS, "data") if (path / name).is_dir())]
    return "shards" if any((place / MANIFEST).is_file() or any(place.glob("*.tar")) for place in places) else "folder"


# --- a tree of folders ------------------------------------------------------------------------------------------------------


class Folder(Source):
    """SPLIT/CLASS/…/image, or CLASS/…/image; a file's extension says whether it is an image."""

    kind = "folder"

    def listing(self) -> Iterator[Item]:
        splits = self._splits()
        for prefix in splits.values():
            if _has_images(self.root / prefix):
                raise ValueError(
                    f"{self.root / prefix} has images outside of the classes' folders: move them into such folders, or give a list"
                    f" ({', '.join(LISTS)}), which may say their class or none"
                )
        folders = [(split, prefix, name) for split, prefix in splits.items() for name in folders_of(self.root / prefix)]
        classes = {split: {name for each, _, name in folders if each == split} for split, _, _ in folders}
        if not classes:
            raise ValueError(
                f"no classes in {self.root}: it must hold a folder of images for each class, or train and val with such folders"
            )
        widest = max(classes, key=lambda split: (split == "train", len(classes[split])))
        for split, names in classes.items():
            if surplus := sorted(names - classes[widest]):
                raise ValueError(f"{self.root}: {split} has classes that {widest} does not have: {', '.join(surplus[:5])}")
        pool = ThreadPoolExecutor(THREADS)
        try:
            walks = pool.map(_walk, (self.root / prefix / name for _, prefix, name in folders))
            for (split, prefix, name), items in zip(folders, walks, strict=True):
                if not items and split == widest:
                    raise ValueError(f"{self.root / prefix / name} has no images: put some there, or remove it, for it counts as a class")
                for below, size, mtime_ns in items:
                    yield f"{prefix}{name}/{below}", size, mtime_ns
        finally:
            pool.shutdown(cancel_futures=True)

    def _splits(self) -> dict[str, str]:
        """Split -> folder below the root, "" for the root itself."""
        tops = folders_of(self.root)
        if self.split is None and any(top in SPLITS for top in tops):
            splits = {SPLITS.get(top, top): f"{top}/" for top in tops}
            if len(splits) < len(tops) or not all(map(SPLIT.fullmatch, splits)):
                raise ValueError(f"{self.root} has the folders {', '.join(tops)}: they must be splits, each once, named like train and val")
            return splits
        if self.split is None and tops and not any(_has_images(self.root / top) for top in tops):
            raise ValueError(
                f"{self.root / tops[0]} has no images: if it is a class with folders inside, give the split's name; if it is a split, name"
                " the folders train, val, test"
            )
        return {self.split or "train": ""}

    def images(self, files: Files, parallel: Parallel) -> Iterator[Found]:
        splits = {prefix: split for split, prefix in self._splits().items()}
        for number in range(len(files)):
            parts = files.name(number).split("/")
            split = splits.get("") or splits[f"{parts.pop(0)}/"]
            stem, _, extension = parts[-1].rpartition(".")
            yield Found(split, parts[0], stem, extension, number, 0, files.sizes[number])


def folders_of(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _has_images(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return any(is_image(entry.name) for entry in entries)


def _walk(folder: Path) -> list[Item]:
    """The images of a folder and of those in it."""
    found: list[Item] = []
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=attrgetter("name")):
            if entry.is_dir() and not entry.name.startswith("."):
                found += [(f"{entry.name}/{name}", size, mtime_ns) for name, size, mtime_ns in _walk(Path(entry))]
            elif is_image(entry.name):
                found.append((entry.name, *_size_and_time(entry.path)))
    return found


def _size_and_time(path: str | Path) -> tuple[int, int]:
    try:
        stat = os.stat(path)
    except OSError:
        return UNREADABLE_SIZE, 0
    return stat.st_size, stat.st_mtime_ns


def is_image(name: str) -> bool:
    return name.rpartition(".")[2].lower() in IMAGES and not name.startswith(".")


# --- tar archives -----------------------------------------------------------------------------------------------------------


def files_in_tar(path: Path, start: int, size: int) -> list[tuple[str, int, int]]:
    """Name, offset in `path` and size of every file in the tar archive that `size` bytes from `start` are.

    Raises ValueError where it is damaged or cut short.
    """
    with path.open("rb") as opened:
        file = Reading(opened, False, start, size)
        try:
            with open_tar(file) as tar:
                found = [(member.name, start + member.offset_data, member.size) for member in tar if member.isreg()]
            file.check_end()
        except tarfile.TarError as error:
            problem = f"damaged, cut short or no tar archive, near byte {start + file.position}: {error}"
            raise ValueError(f"{path} is {problem}; copy it or download it again") from None
    return found


class ImageNet(Source):
    """The official archives of ILSVRC 2012 in one folder, as they are; the class is the position of its WNID among the sorted ones."""

    TRAIN, VAL, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
    kind = "imagenet"
    default_name = "imagenet1k"

    def __init__(self, root: Path, split: str | None) -> None:
        super().__init__(root, split)
        self._refuse_split()
        self.names = [name for name in (self.TRAIN, self.VAL, self.DEVKIT) if (root / name).is_file()]
        if not {self.TRAIN, self.VAL} & set(self.names):
            raise ValueError(f"{root} has neither {self.TRAIN} nor {self.VAL}: put the official archives there, as they are")
        if self.VAL in self.names and self.DEVKIT not in self.names:
            raise ValueError(
                f"{root} has {self.VAL}, but not {self.DEVKIT}, which says the classes of its images: put it there too (it is on the same"
                " page of image-net.org), or take the validation archive away"
            )
        self.provenance = {"names": self.names}

    def images(self, files: Files, parallel: Parallel) -> Iterator[Found]:
        train = self._archive(self.TRAIN, ".tar")
        wnids = {Path(name).stem for name, _, _ in train}
        if self.VAL in self.names:
            known, truth = _devkit(self.root / self.DEVKIT)
            if train and wnids != set(known.values()):
                raise ValueError(
                    f"{self.root / self.TRAIN} has {len(wnids)} classes, {self.DEVKIT} {len(known)}; only one of them has"
                    f" {', '.join(sorted(wnids ^ set(known.values()))[:5])}: download the archives again"
                )
            wnids = set(known.values())
        self.classes = sorted(wnids)
        tasks = ((self.root / self.TRAIN, offset, size) for _, offset, size in train)
        for (name, _, _), images in zip(train, parallel(files_in_tar, tasks), strict=True):
            for image, offset, size in images:
                stem, _, extension = Path(image).name.rpartition(".")
                yield Found("train", Path(name).stem, stem, extension, self.names.index(self.TRAIN), offset, size)
        if self.VAL in self.names:
            yield from self._validation(known, truth)

    def _archive(self, name: str, ending: str) -> list[tuple[str, int, int]]:
        if name not in self.names:
            return []
        path = self.root / name
        if found := [member for member in files_in_tar(path, 0, path.stat().st_size) if member[0].endswith(ending)]:
            return found
        raise ValueError(f"{path} has no members that end in {ending}: it is not the official archive")

    def _validation(self, known: dict[int, str], truth: list[int]) -> Iterator[Found]:
        images = self._archive(self.VAL, ".JPEG")
        numbers = [int(stem[-8:]) if (stem := Path(name).stem)[-8:].isdigit() else 0 for name, _, _ in images]
        if sorted(numbers) != list(range(1, len(truth) + 1)):
            raise ValueError(
                f"{self.root / self.VAL} has {len(images)} images and the ground truth in {self.DEVKIT} {len(truth)} lines: they must be"
                " numbered from 1 on, one line each; download both again"
            )
        for number, (name, offset, size) in zip(numbers, images, strict=True):
            if truth[number - 1] not in known:
                raise ValueError(f"{self.root / self.DEVKIT}: the class {truth[number - 1]} of image {number} is not in meta.mat")
            yield Found("val", known[truth[number - 1]], Path(name).stem, "JPEG", self.names.index(self.VAL), offset, size)


def _devkit(path: Path) -> tuple[dict[int, str], list[int]]:
    """WNID of every ILSVRC2012_ID of a leaf synset, and the IDs of the validation images in order. Raises ValueError."""
    from scipy.io import loadmat  # type: ignore[import-untyped]

    content = _from_archive(path, ("meta.mat", "ILSVRC2012_validation_ground_truth.txt"))
    synsets = np.atleast_1d(loadmat(io.BytesIO(content["meta.mat"]), squeeze_me=True)["synsets"])
    known = {int(each["ILSVRC2012_ID"]): str(each["WNID"]) for each in synsets if int(each["num_children"]) == 0}
    return known, [int(line) for line in content["ILSVRC2012_validation_ground_truth.txt"].split()]


def _from_archive(path: Path, names: Sequence[str]) -> dict[str, bytes]:
    """Content of the members with these base names of a .tar.gz. Raises ValueError where it is damaged or lacks one."""
    content = {}
    try:
        with tarfile.open(path, "r:gz") as tar:
            for member in tar:
                if member.isreg() and (name := Path(member.name).name) in names:
                    content[name] = tar.extractfile(member).read()  # type: ignore[union-attr]
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path} is damaged, cut short or no .tar.gz: {error}; download it again") from None
    if missing := [name for name in names if name not in content]:
        raise ValueError(f"{path} has no {', '.join(missing)}: it is not the official archive; download it again")
    return content


# --- CIFAR ------------------------------------------------------------------------------------------------------------------


class _Form(NamedTuple):
    dataset: str
    folder: str
    archive: str
    train: tuple[str, ...]
    val: tuple[str, ...]
    meta: str  # the names of the classes
    label: str | int  # in a pickled batch its name, in a record the number of its byte

    def is_in(self, folder: Path) -> bool:
        return all((folder / name).is_file() for name in (self.meta, *self.val))


BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
FORMS = (
    _Form("cifar10", "cifar-10-batches-py", "cifar-10-python.tar.gz", BATCHES, ("test_batch",), "batches.meta", "labels"),
    _Form("cifar100", "cifar-100-python", "cifar-100-python.tar.gz", ("train",), ("test",), "meta", "fine_labels"),
    _Form(
        "cifar10",
        "cifar-10-batches-bin",
        "cifar-10-binary.tar.gz",
        tuple(f"{name}.bin" for name in BATCHES),
        ("test_batch.bin",),
        "batches.meta.txt",
        0,
    ),
    _Form("cifar100", "cifar-100-binary", "cifar-100-binary.tar.gz", ("train.bin",), ("test.bin",), "fine_label_names.txt", 1),
)


class Cifar(Source):
    """CIFAR-10 or CIFAR-100 (fine labels) in its own files, binary or pickled, unpacked or not. Its test images are the split val.

    Stored as PNG, without loss, and without compression: the bytes do not depend on the zlib at hand.
    """

    kind = "cifar"

    def __init__(self, path: Path, split: str | None, dataset: str | None = None) -> None:
        """`dataset`: the one that is looked for where both are. Raises ValueError where there is none, or a file is missing."""
        places = [(form, place) for form, place in self.places(path) if dataset in (None, form.dataset)]
        if len({form.dataset for form, _ in places}) != 1:
            archives = ", ".join(form.archive for form in FORMS)
            kind = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}.get(dataset or "", "CIFAR")
            what = "both CIFAR-10 and CIFAR-100: give the folder or the archive of one" if places else f"no {kind}: give one of {archives}"
            raise ValueError(f"{path} holds {what}, or the folder that is in it")
        self.form, self.place = places[0]
        super().__init__(self.place.parent if self.place.is_file() else self.place, split)
        self._refuse_split()
        self.default_name = self.form.dataset
        self.members = (*self.form.train, *self.form.val, self.form.meta)
        self.names = [self.place.name] if self.place.is_file() else list(self.members)
        if missing := [name for name in self.names if not (self.root / name).is_file()]:
            raise ValueError(f"{self.place} lacks {', '.join(missing)}: unpack {self.form.archive} again, or give the archive itself")
        self.provenance = {"names": self.names}

    @staticmethod
    def places(path: Path) -> list[tuple[_Form, Path]]:
        """Every form of CIFAR that `path` is or holds, and where."""
        found = [(form, path) for form in FORMS if (path.is_file() and path.name == form.archive) or form.is_in(path)]
        found += [(form, path / form.folder) for form in FORMS if form.is_in(path / form.folder)]
        return found + [(form, path / form.archive) for form in FORMS if (path / form.archive).is_file()]

    def batches(self, splits: Sequence[str] = ("train", "val")) -> Iterator[tuple[str, NDArray[np.int64], NDArray[np.uint8]]]:
        """Split, labels `(n,)` and pixels `(n, 3, 32, 32)` of each file of these splits; `classes` is known from the first on.

        Raises ValueError for a file that is no batch of this data set.
        """
        content = _from_archive(self.place, self.members) if self.place.is_file() else None
        self.classes = self._class_names(self._read(content, self.form.meta))
        for split in splits:
            for name in self.form.train if split == "train" else self.form.val:
                yield split, *self._batch(name, self._read(content, name))

    def images(self, files: Files, parallel: Parallel) -> Iterator[Found]:
        from PIL import Image

        for split, batches in groupby(self.batches(), key=itemgetter(0)):
            number = 0
            for _, labels, pixels in batches:
                assert self.classes is not None
                for label, image in zip(labels.tolist(), pixels, strict=True):
                    encoded = io.BytesIO()
                    Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).save(encoded, "PNG", compress_level=0)
                    yield Found(split, self.classes[label], f"{split}-{number:05d}", "png", content=encoded.getvalue())
                    number += 1

    def _read(self, content: dict[str, bytes] | None, name: str) -> bytes:
        return (self.root / name).read_bytes() if content is None else content[name]

    def _class_names(self, content: bytes) -> list[str]:
        if isinstance(self.form.label, int):
            return content.decode().split()
        key = b"label_names" if self.form.label == "labels" else b"fine_label_names"
        names = unpickle(content, f"{self.place}: {self.form.meta}").get(key)
        if not isinstance(names, list) or not all(isinstance(name, bytes) for name in names):
            raise ValueError(f"{self.place}: {self.form.meta} has no names of the classes")
        return [name.decode() for name in names]

    def _batch(self, name: str, content: bytes) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """Labels `(n,)` and pixels `(n, 3, 32, 32)`."""
        if isinstance(self.form.label, int):
            record = self.form.label + 1 + 3072
            data = np.frombuffer(content[: len(content) // record * record], np.uint8).reshape(-1, record)
            labels, pixels = data[:, self.form.label], data[:, self.form.label + 1 :]
            is_whole = len(content) % record == 0
        else:
            batch = unpickle(content, f"{self.place}: {name}")
            labels, pixels = np.asarray(batch.get(self.form.label.encode())), np.asarray(batch.get(b"data"))
            is_whole = labels.dtype.kind == "i" and pixels.dtype == np.uint8 and pixels.shape == (len(np.atleast_1d(labels)), 3072)
        if not is_whole or not labels.size or not 0 <= labels.min() <= labels.max() < len(self.classes or ()):
            raise ValueError(f"{self.place}: {name} is not a batch of {self.form.dataset}: cut short, or labels without a class")
        return labels.astype(np.int64), pixels.reshape(-1, 3, 32, 32)


class _Unpickler(pickle.Unpickler):
    """What CIFAR's pickles need and nothing else: arrays of numpy, and bytes as Python 3 writes them for Python 2."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np.ndarray(0).__reduce__()[0]
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):
            return codecs.encode
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def unpickle(content: bytes, where: str) -> dict[bytes, Any]:
    """A dictionary out of CIFAR's pickles. Raises ValueError for anything else; nothing that is in it is run."""
    try:
        found = _Unpickler(io.BytesIO(content), encoding="bytes").load()
        if not isinstance(found, dict):
            raise pickle.UnpicklingError(f"it holds a {type(found).__name__}, not a dictionary")
    except Exception as error:  # a damaged pickle raises whatever its bytes come to
        raise ValueError(
            f"{where} is no pickle of CIFAR: {error}. Nothing in it was run; download the official archive again or take the binary one"
        ) from None
    return found


# --- lists, iterables, shards -------------------------------------------------------------------------------------------------


def as_label(value: object) -> Label:
    """Number or name of a class; none for None, "" and -1. Raises ValueError."""
    if isinstance(value, str) and re.fullmatch(r"-?\d+", value):
        value = int(value)
    if value is None or value == "" or value == NO_LABEL:
        return None
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, Integral) or not 0 <= int(value) < MAX_CLASSES:
        raise ValueError(f"the label {value!r} is neither the number (0 to {MAX_CLASSES - 1}) nor the name of a class; none is empty")
    return int(value)


class List(Source):
    """A .tsv, .csv or .jsonl file of path (relative to the list), label and split.

    In the first two a first line with the word path names the columns; without it they are path, label and split, in this order.
    Label and split may be missing.
    """

    kind = "list"

    def __init__(self, path: Path, split: str | None) -> None:
        if path.suffix not in LISTS:
            raise ValueError(f"the list {path} must end in one of {', '.join(LISTS)}, which says how to read it")
        super().__init__(path.parent, split)
        self.path, self.where = path, str(path)
        self.provenance = {"names": [path.name]}

    def listing(self) -> Iterator[Item]:
        records = self._records()
        with ThreadPoolExecutor(THREADS) as pool:
            while some := list(islice(records, 4096)):
                for (where, name, _, _), (size, mtime_ns) in zip(
                    some, pool.map(_size_and_time, (self.root / each[1] for each in some)), strict=True
                ):
                    if size == UNREADABLE_SIZE and not (self.root / name).exists():
                        raise ValueError(f"{where}: there is no file {name!r}; paths are relative to the list's folder, {self.root}")
                    yield name, size, mtime_ns
        yield self.path.name, *_size_and_time(self.path)  # labels may change without a change of the images

    def images(self, files: Files, parallel: Parallel) -> Iterator[Found]:
        for number, (_, name, label, split) in enumerate(self._records()):
            stem, _, extension = Path(name).name.rpartition(".")
            yield Found(split, label, stem, extension, number, 0, files.sizes[number])

    def _records(self) -> Iterator[tuple[str, str, Label, str]]:
        """Where it stands, path, label and split of every line. Raises ValueError with file and line."""
        try:
            for line, record in self._jsonl() if self.path.suffix == ".jsonl" else self._columns():
                where = f"{self.path}:{line}"
                name, split = record.get("path"), record.get("split") or self.split or "train"
                if record.get("split") and self.split:
                    raise ValueError(f"{where}: the list says the split itself: leave out split {self.split!r}")
                if not isinstance(name, str) or not is_image(name):
                    raise ValueError(f"{where}: the path {name!r} is not that of an image: it must end in one of {', '.join(IMAGES)}")
                if not isinstance(split, str) or not SPLIT.fullmatch(split):
                    raise ValueError(f"{where}: the split {split!r} is not 1 to 40 letters, digits, '_' and '-'")
                try:
                    label = as_label(record.get("label"))
                except ValueError as error:
                    raise ValueError(f"{where}: {error}") from None
                yield where, name, label, split
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path} is not UTF-8: {error}") from None

    def _columns(self) -> Iterator[tuple[int, dict[str, Any]]]:
        dialect: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if self.path.suffix == ".tsv" else {"strict": True}
        with self.path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, **dialect)
            columns: list[str] = []
            try:
                for row in reader:
                    if not row:
                        continue
                    if not columns:
                        columns = row if "path" in row else ["path", "label", "split"][: len(row)]
                        if "path" in row:
                            continue
                    if len(row) != len(columns):
                        raise ValueError(f"{self.path}:{reader.line_num}: {len(row)} columns, but there must be {len(columns)}: {columns}")
                    yield reader.line_num, dict(zip(columns, row, strict=True))
            except csv.Error as error:
                raise ValueError(f"{self.path}:{reader.line_num}: {error}") from None

    def _jsonl(self) -> Iterator[tuple[int, dict[str, Any]]]:
        with self.path.open(encoding="utf-8-sig") as file:
            for line, text in enumerate(file, start=1):
                try:
                    record = json.loads(text) if text.strip() else None
                except json.JSONDecodeError as error:
                    raise ValueError(f"{self.path}:{line}: not JSON: {error}") from None
                if record is None:
                    continue
                if not isinstance(record, dict):
                    raise ValueError(f"{self.path}:{line}: {text.strip()[:80]} is not an object with path, label and split")
                yield line, record


class Generated(Source):
    """Whatever a Python iterable yields: (image bytes, extension, label or None[, key]) each time."""

    kind = "iterable"

    def __init__(self, source: str, split: str | None, samples: Iterable[Any] | None = None) -> None:
        super().__init__(Path(), split)
        self.where, self.is_repeatable = source, samples is None
        self._samples: Callable[[], Iterable[Any]] = lambda: samples  # type: ignore[assignment,return-value]
        self._file: str | None = None
        if samples is None:
            name, _, function = source.partition(":")
            try:
                module = importlib.import_module(name)
            except ModuleNotFoundError as error:
                if error.name != name:
                    raise
                raise ValueError(f"{source}: there is no module {name!r}; it is looked for from the current folder on") from None
            if not callable(getattr(module, function, None)):
                raise ValueError(f"{source}: {name} has no function {function!r}")
            self._samples, self._file = getattr(module, function), module.__file__
            self.provenance = {"names": [source]}

    def listing(self) -> Iterator[Item]:
        """The module's file: what the function reads besides is its own business."""
        if self._file is not None:
            yield Path(self._file).name, *_size_and_time(self._file)

    def images(self, files: Files, parallel: Parallel) -> Iterator[Found]:
        split = self.split or "train"
        for number, sample in enumerate(self._samples()):
            where = f"sample {number} of {self.where}"
            if not isinstance(sample, tuple) or len(sample) not in (3, 4) or not isinstance(sample[0], bytes | bytearray | memoryview):
                raise ValueError(f"{where} is {str(sample)[:80]}; it must be a tuple (image bytes, extension, label or None[, key])")
            content, extension, label, key = (*sample, f"{split}-{number:08d}")[:4]
            if not isinstance(extension, str) or not is_image(f"image.{extension.lstrip('.')}"):
                raise ValueError(f"{where} has the extension {extension!r}; it must be one of {', '.join(IMAGES)}")
            try:
                known = as_label(label)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            yield Found(split, known, str(key), extension.lstrip("."), content=bytes(content))


class Shards(Source):
    """A folder of WebDataset shards, or one shard; or a data set of ours, whose classes, labels and splits stay."""

    kind = "shards"

    def __init__(self, path: Path, split: str | None) -> None:
        root = path / "data" if (path / "data" / MANIFEST).is_file() else path
        super().__init__(root if root.is_dir() else root.parent, split)
        self._manifest = read_manifest(root) if (root / MANIFEST).is_file() else None
        if self._manifest is not None:
            self._refuse_split()
            entries = self._manifest["splits"].items()
            self._splits = {shard["name"]: name for name, entry in entries for shard in entry["shards"]}
            self.names = [*self._splits, MANIFEST]
            self.classes = self._manifest["classes"] or None
            self.provenance = {"names": [self._manifest["name"]], "manifest_sha256": manifest_sha256(root)}
            return
        self.names = sorted(each.relative_to(root).as_posix() for each in root.rglob("*.tar")) if root.is_dir() else [root.name]
        if not self.names:
            is_compressed = any(COMPRESSED.search(each.name) for each in root.rglob("*"))
            remedy = "only compressed ones, whose samples cannot be read alone: unpack them (gunzip, unxz, zstd -d)"
            raise ValueError(f"{root} has no shards *.tar{f', {remedy}' if is_compressed else ''}")
        self._splits = {name: self.split or self._split(name) for name in self.names}
        self.provenance = {"names": self.names}

    @staticmethod
    def _split(name: str) -> str:
        words = {SPLITS[word] for word in SPLIT_WORD.findall(name.lower())}
        if len(words) > 1:
            raise ValueError(f"the name of the shard {name} has the splits {', '.join(sorted(words))}: give the split, or rename it")
        return words.pop() if words else "train"

    def _indexed(self) -> dict[str, NDArray[np.void]]:
        """Of a data set of ours what its index says of each shard."""
        found: dict[str, NDArray[np.void]] = {}
        for entry in self._manifest["splits"].values() if self._manifest else ():
            ends = np.cumsum([shard["num_images"] for shard in entry["shards"]])
            parts = np.split(np.load(self.root / entry["index"]["name"]), ends[:-1])  # one, too, where there is no shard
            found |= {shard["name"]: part for shard, part in zip(entry["shards"], parts, strict=False)}
        return found

    def images(self, files: Files, parallel: Parallel) -> Iterator[Found]:
        if self._manifest is not None:
            verify.check(self.root, self._manifest["splits"])
        several, indexed = [], self._indexed()
        tasks = [(self.root / name, name, NO_LABELS if self._manifest else None, False) for name in self._splits]
        for number, ((name, split), found) in enumerate(zip(self._splits.items(), parallel(look_through, tasks), strict=True)):
            rows, labels = found.shard.rows, found.labels
            several += found.with_several
            if self._manifest is None:
                yield from (Found(split, None, key, "", number) for key in found.without_image)
            else:
                labels = indexed[name]["label"].tolist()
                if not all(np.array_equal(rows[field], indexed[name][field]) for field in ("offset", "size")):
                    raise ValueError(
                        f"the {len(rows)} images of {name} in {self.root} are not the {len(labels)} of the index: equihpc data verify"
                        f" {self.root} says which; equihpc data index --force writes the index anew from the shards"
                    )
            columns = (found.shard.keys.tolist(), found.extensions, rows["offset"].tolist(), rows["size"].tolist(), labels)
            for key, extension, offset, size, label in zip(*columns, strict=True):
                yield Found(split, label, key.decode(), extension, number, offset, size)
        if several:
            order = " ".join(IMAGES)
            log.warning("%d samples have several images; the first in the order %s is taken, as of %s", len(several), order, several[0])
