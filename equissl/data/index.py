"""`equihpc data index DIR`: manifest, index and keys for tar shards that something else wrote. No torch.

Samples are grouped by WebDataset's rule: the key is the name up to the first dot after the last slash, and consecutive members
with one key are a sample. Each shard is read once from front to back, for the index and its sha256 together.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from equissl.data.parallel import processes, progress, usable_cores
from equissl.data.shards import INDEX_DTYPE, MANIFEST, NO_LABEL, SPLIT, Shard, manifest_sha256, write_index, write_manifest
from equissl.files import sync, told_when_full

log = logging.getLogger(__name__)

DESCRIPTION = "Make a data set of tar shards built elsewhere, or mend the index of one of ours; the shards stay as they are."
IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif", "ppm")  # of several in a sample the first in this order
FIELDS = ("label", "cls", "class")  # of a sample's .json, the first that is there
NO_LABELS = "-"  # as --label
MAX_CLASSES = 2**20  # a larger number is something else than a class
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test", "testing": "test"}
SPLIT_WORD = re.compile(rf"(?<![a-z])({'|'.join(SPLITS)})(?![a-z])")
COMPRESSED = re.compile(r"\.(tar\.(gz|bz2|xz|zst|lz4|Z)|tgz|tbz2?|txz|tzst)")
MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")  # gzip, bzip2, xz, zstd, lz4
MEMBER = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")  # WebDataset's: key and extension
META = re.compile(r"__[^/]*__($|/)")  # names that WebDataset passes over
CHUNK = 2**20

Label = int | str | None


# --- one shard ------------------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """What a shard holds."""

    shard: Shard  # the labels of its rows are not set yet
    extensions: list[str]  # of the images
    labels: list[Label]  # as they stand there: a number, a class's name, none
    without_image: list[str]  # keys of samples that have none; they have no row
    with_several: list[str]  # keys of samples that have more than one


class Member(NamedTuple):
    key: str
    extension: str
    offset: int  # bytes
    size: int
    content: bytes | None  # of what may hold a label


def look_through(path: Path, name: str, label: str | None, is_hashed: bool = True) -> Found:
    """Read a shard. `name`: in the manifest; `label`: None for .cls, else a .json's FIELDS; a field of .json; ".txt", the text of
    this member; or "-" for none. Unless `is_hashed`, the images are passed over and the sha256 is None.

    Raises ValueError for a tar file that is compressed, damaged or cut short, and for a label that is no number and no name.
    """
    rows: list[tuple[int, int, int, int]] = []
    keys: list[str] = []
    extensions: list[str] = []
    labels: list[Label] = []
    without_image, with_several = [], []
    with path.open("rb") as opened:
        file = Reading(opened, is_hashed)
        try:
            with open_tar(file) as tar:
                for key, group in groupby(_members(tar, file, _texts(label)), key=attrgetter("key")):
                    members = list(group)
                    every = [member.extension for member in members]
                    if len(set(every)) < len(every):
                        raise ValueError(f"the shard {path} has two members .{max(every, key=every.count)} of the sample {key}")
                    images = sorted((each for each in members if _rank(each.extension) is not None and each.size < 2**32), key=_by_rank)
                    if not images:
                        without_image.append(key)
                        continue
                    if len(images) > 1:
                        with_several.append(key)
                    try:
                        labels.append(_label({member.extension: member.content for member in members if member.content is not None}, label))
                    except ValueError as error:
                        raise ValueError(f"the label of the sample {key} in {path}: {error}") from None
                    rows.append((images[0].offset, 0, images[0].size, NO_LABEL))
                    keys.append(key)
                    extensions.append(images[0].extension.rpartition(".")[2])
            file.finish()
        except tarfile.TarError as error:
            if (start := _start(path)).startswith(MAGIC):
                raise ValueError(_compressed(path)) from None
            what = "is empty" if not start else f"is damaged or cut short near byte {file.position}: {error}"
            raise ValueError(f"the shard {path} {what}; copy it or write it again") from None
    sha256 = file.digest.hexdigest() if is_hashed else None
    entry = {"name": name, "bytes": file.position, "sha256": sha256, "num_images": len(rows)}
    encoded = np.array([key.encode() for key in keys] or [b""], dtype=np.bytes_)[: len(keys)]
    return Found(Shard(entry, np.array(rows, dtype=INDEX_DTYPE), encoded), extensions, labels, without_image, with_several)


def _members(tar: tarfile.TarFile, file: Reading, texts: tuple[str, ...]) -> Iterator[Member]:
    """Every member of a sample; the content of those in `texts` is read in passing."""
    for member in tar:
        parts = MEMBER.fullmatch(member.name)
        if not member.isreg() or parts is None or META.match(member.name):
            continue
        if member.issparse():
            raise tarfile.ReadError(f"{member.name} is a sparse file, whose bytes are not in one piece")
        extension = parts[2].lower()
        content = file.read(member.size) if extension in texts else None
        yield Member(parts[1], extension, member.offset_data, member.size, content)
        tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header otherwise


def _texts(label: str | None) -> tuple[str, ...]:
    """Extensions of the members that are read for the label."""
    if label is None:
        return ("cls", "json")
    if label == NO_LABELS:
        return ()
    return (label[1:].lower(),) if label.startswith(".") else ("json",)


def _rank(extension: str) -> tuple[bool, int] | None:
    """Place of an image's extension in the order of choice, None for what is no image; `.png` comes before `.mask.png`."""
    last = extension.rpartition(".")[2]
    return (last != extension, IMAGES.index(last)) if last in IMAGES else None


def _by_rank(member: Member) -> tuple[Any, ...]:
    return (_rank(member.extension), member.extension)


def _label(texts: dict[str, bytes], label: str | None) -> Label:
    if label is None and "cls" in texts:
        value: Any = texts["cls"].decode().strip()
    elif "json" in texts:
        record = json.loads(texts["json"])
        if not isinstance(record, dict):
            raise ValueError("its .json is not an object")
        value = next((record[field] for field in (FIELDS if label is None else (label,)) if field in record), None)
    else:
        value = next((content.decode().strip() for content in texts.values()), None)
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+", value):
        value = int(value)
    if value is None or value == NO_LABEL:
        return None
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise ValueError(f"{value!r} is no class; it must be a whole number or a name. --label names another field, '-' reads no labels")
    if isinstance(value, int) and not 0 <= value < MAX_CLASSES:
        raise ValueError(f"{value} is no class; the numbers must be between 0 and {MAX_CLASSES - 1}. --label names another field")
    return value


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(8)


def _compressed(path: Path) -> str:
    return (
        f"the shard {path} is compressed: a sample in it cannot be read alone. Unpack it (gunzip, bunzip2, unxz, zstd -d);"
        " encoded images hardly get smaller by compression"
    )


class Reading:
    """A file, or `size` bytes of it from `start` on, for tarfile: read once from front to back and hashed in passing, or, unless
    `is_hashed`, only where it is asked for."""

    def __init__(self, file: BinaryIO, is_hashed: bool, start: int = 0, size: int | None = None) -> None:
        self._file, self._is_hashed, self._start, self._last = file, is_hashed, start, b""
        self._size = os.fstat(file.fileno()).st_size if size is None else size
        self.digest, self.position = hashlib.sha256(), 0
        file.seek(start)

    def read(self, size: int) -> bytes:
        self._last = self._file.read(max(0, min(size, self._size - self.position)))  # a damaged header asks for anything
        self.digest.update(self._last)
        self.position += len(self._last)
        return self._last

    def tell(self) -> int:
        return self.position

    def seek(self, position: int) -> None:
        if not self._is_hashed:
            self._file.seek(self._start + position)
            self.position = position
        while self.position < position and self.read(min(CHUNK, position - self.position)):
            pass

    def check_end(self) -> None:
        """Raises ReadError where the members do not end with tar's mark: tarfile itself takes any block that is no header for the end."""
        if len(self._last) < tarfile.BLOCKSIZE or any(self._last):
            raise tarfile.ReadError("no header and no end mark")

    def finish(self) -> None:
        """Read what follows the members. Raises ReadError where that is not the end."""
        self.check_end()
        while block := self.read(CHUNK):
            if block.count(0) < len(block):
                raise tarfile.ReadError("something follows the end mark")


def open_tar(file: Reading) -> tarfile.TarFile:
    """Of names that are not UTF-8 different ones stay different. Raises TarError."""
    return tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="backslashreplace")  # type: ignore[call-overload,no-any-return]


# --- a folder -------------------------------------------------------------------------------------------------------------


class Old(NamedTuple):
    """What still holds of the manifest that is replaced, where there is one that can be read."""

    name: str | None = None
    classes: list[str] | None = None
    source: dict[str, Any] = {"format": "webdataset"}
    splits: dict[str, list[str]] = {}  # shards of each


def index(
    folder: Path,
    dest: Path | None = None,
    *,
    split_pattern: str | None = None,
    name: str | None = None,
    label: str | None = None,
    classes: list[str] | None = None,
    force: bool = False,
    workers: int = 1,
) -> dict[str, Any]:
    """Make `folder`, or `dest` with symbolic links to its shards, a data set; returns what was found.

    An old manifest is replaced only by `force`; its name, classes, source and splits hold on where nothing else is said, so that
    an index that was damaged is mended without a change of the manifest. Raises ValueError for shards that are none (see
    `look_through`) and labels that do not go together, DiskFull.
    """
    folder = folder.resolve()
    target = folder if dest is None else dest.resolve()
    if (target / MANIFEST).exists() and not force:
        raise ValueError(f"{target} has a {MANIFEST}: --force replaces it, and does nothing to the shards")
    if target != folder and target.is_relative_to(folder):
        raise ValueError(f"--dest {dest} is inside {folder}, where its links would be taken for shards")
    old = _old(target if (target / MANIFEST).exists() else folder)
    shards = _find_shards(folder)
    splits = _splits(shards, split_pattern, old)
    label_from = old.source.get("label_from") if label is None else label
    found = _look_through_all(folder, shards, label_from, workers)
    if lost := [shard for names in old.splits.values() for shard in names if shard not in found]:
        log.warning("%s of the old manifest is not there any more", _count(lost, "shard"))
    if empty := [shard for shard in shards if not found[shard].labels]:
        log.warning("%s without an image left out", _count(empty, "shard"))
    without_image = [key for shard in shards for key in found[shard].without_image]
    if len(empty) == len(shards):
        raise ValueError(
            f"no sample in {folder} has an image{f', not {without_image[0]} either' if without_image else ''}:"
            f" the extension of an image must be one of {', '.join(IMAGES)}"
        )
    if without_image:
        log.warning("%s without an image left out", _count(without_image, "sample"))
    with_several = [key for shard in shards for key in found[shard].with_several]
    if with_several:
        log.warning("%s with several images: the first of %s is taken", _count(with_several, "sample"), ", ".join(IMAGES))
    all_classes = _set_labels(found, label_from, classes, old.classes if label is None else None)
    source = old.source if label_from is None else {**old.source, "label_from": label_from}
    written = {split: [found[shard].shard for shard in names if shard not in empty] for split, names in splits.items()}
    _write(folder, target, name or old.name or folder.name, all_classes, {split: kept for split, kept in written.items() if kept}, source)
    labels = {split: np.concatenate([shard.rows["label"] for shard in kept]) for split, kept in written.items() if kept}
    return {
        "folder": str(target),
        "manifest_sha256": manifest_sha256(target),
        "num_classes": len(all_classes),
        "num_images": {split: len(values) for split, values in labels.items()},
        "num_unlabelled": {split: int(np.count_nonzero(values == NO_LABEL)) for split, values in labels.items()},
        "num_without_image": len(without_image),
        "num_with_several": len(with_several),
    }


def _old(folder: Path) -> Old:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        splits = {split: [shard["name"] for shard in entry["shards"]] for split, entry in manifest["splits"].items()}
        if foreign := [split for split in splits if not SPLIT.fullmatch(split)]:
            raise ValueError(f"{foreign[0]!r} is no name of a split")
        return Old(str(manifest["name"]), [str(name) for name in manifest["classes"]], dict(manifest["source"]), splits)
    except FileNotFoundError:
        return Old()
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        log.warning("the old %s cannot be used: %s", path, error)
        return Old()


def _find_shards(folder: Path) -> list[str]:
    """Their names relative to the folder, in order."""
    files = sorted(path for path in folder.rglob("*") if not any(part.startswith(".") for part in path.relative_to(folder).parts))
    for path in files:
        if COMPRESSED.search(path.name) and path.is_file():
            raise ValueError(_compressed(path))
    shards = [str(path.relative_to(folder)) for path in files if path.suffix == ".tar" and path.is_file()]
    if not shards:
        raise ValueError(f"there is no shard (*.tar) in {folder}")
    return shards


def _splits(shards: list[str], pattern: str | None, old: Old) -> dict[str, list[str]]:
    """Shards of each split: by the pattern's group, else as in the old manifest, else by the last word for a split in the name."""
    before = {shard: split for split, names in old.splits.items() for shard in names}
    result: dict[str, list[str]] = {split: [] for split in ([] if pattern else old.splits)}
    try:
        compiled = re.compile(pattern or "()")
    except re.error as error:
        raise ValueError(f"--split-pattern {pattern!r} is no regular expression: {error}") from None
    if compiled.groups != 1:
        raise ValueError(f"--split-pattern {pattern!r} must have one group, the split's name, as in '^([a-z]+)-'")
    for shard in shards:
        if pattern:
            match = compiled.search(shard)
            if match is None or not SPLIT.fullmatch(match[1] or ""):
                raise ValueError(f"--split-pattern {pattern!r} does not find a split of 1 to 40 letters, digits, '_' and '-' in {shard!r}")
            split = match[1]
        else:
            words = SPLIT_WORD.findall(shard.lower())
            split = before.get(shard) or (SPLITS[words[-1]] if words else "train")
        result.setdefault(split, []).append(shard)
    return result


def _look_through_all(folder: Path, shards: list[str], label: str | None, workers: int) -> dict[str, Found]:
    sizes = [(folder / shard).stat().st_size for shard in shards]
    found: dict[str, Found] = {}
    with progress("index", sum(sizes)) as advance, processes(min(workers, len(shards))) as parallel:
        results = parallel(look_through, [(folder / shard, shard, label) for shard in shards])
        for shard, size, result in zip(shards, sizes, results, strict=True):
            found[shard] = result
            advance(size)
    return found


def _count(names: list[str], what: str) -> str:
    return f"{len(names)} {what}{'s' * (len(names) > 1)} ({names[0]}{', …' * (len(names) > 1)})"


def _set_labels(found: dict[str, Found], label: str | None, classes: list[str] | None, old_classes: list[str] | None) -> list[str]:
    """Write the classes' numbers into the rows; returns the classes' names."""
    first: dict[Label, str] = {}  # where a label stands first
    for result in found.values():
        for value, key in zip(result.labels, result.shard.keys, strict=True):
            first.setdefault(value, key.decode())
    numbers = [value for value in first if isinstance(value, int)]
    names = sorted(value for value in first if isinstance(value, str))
    if label not in (None, NO_LABELS) and not numbers and not names:
        raise ValueError(f"no sample has a label {label!r}; --label is a field of .json, or .txt for the text of such a member")
    if numbers and names:
        both = f"{names[0]!r} ({first[names[0]]}) and {numbers[0]} ({first[numbers[0]]})"
        raise ValueError(f"the labels {both} do not go together: all must be names, or all numbers")
    largest = max(numbers, default=-1)
    if classes is None and old_classes is not None and set(names) <= set(old_classes) and largest < len(old_classes):
        classes = old_classes
    if classes is None:
        classes = names or [str(number) for number in range(largest + 1)]
    if largest >= len(classes):
        raise ValueError(f"the label {largest} of the sample {first[largest]} is too large for {len(classes)} classes")
    place: dict[Label, int] = {None: NO_LABEL, **{number: number for number in numbers}}
    if names:
        place |= {name: number for number, name in enumerate(classes)}
    if unknown := [name for name in names if name not in place]:
        raise ValueError(f"the label {unknown[0]!r} of the sample {first[unknown[0]]} is none of the {len(classes)} classes")
    for result in found.values():
        result.shard.rows["label"] = [place[value] for value in result.labels]
    return classes


def _write(folder: Path, target: Path, name: str, classes: list[str], splits: dict[str, list[Shard]], source: dict[str, Any]) -> None:
    """The new files are written beside and moved. Between the old manifest and a new one there is none: nobody reads a mixture."""
    target.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=".index.", dir=target))
    try:
        write_manifest(beside, name, classes, {split: write_index(beside, split, shards) for split, shards in splits.items()}, source)
        manifest = beside / MANIFEST
        if not (target / MANIFEST).exists() or (target / MANIFEST).read_bytes() != manifest.read_bytes():
            (target / MANIFEST).unlink(missing_ok=True)
            sync(target)
        if target != folder:
            for shards in splits.values():
                for shard in shards:
                    _link(target / shard.entry["name"], folder / shard.entry["name"])
        for path in sorted(beside.glob("*.npy")):
            path.replace(target / path.name)
        manifest.replace(target / MANIFEST)
        sync(target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _link(path: Path, shard: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        raise ValueError(f"{path} stands where a link to {shard} should be: give another --dest")
    with told_when_full(path, None):
        path.symlink_to(shard)


# --- the command ------------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="where the shards are, in subfolders too")
    parser.add_argument("--split-pattern", help="regular expression whose group is the split in a shard's name; default: train, val, test")
    parser.add_argument("--name", help="of the data set; default: the folder's")
    parser.add_argument(
        "--label",
        metavar="FIELD",
        help=f"field of .json, .txt for the text of that member, '-' for none; default: .cls, else {', '.join(FIELDS)}",
    )
    parser.add_argument("--classes", type=Path, metavar="FILE", help="names of the classes, a line each")
    parser.add_argument("--dest", type=Path, metavar="FOLDER", help="put the index there, with symbolic links to the shards")
    parser.add_argument("--force", action="store_true", help="replace the manifest that is there")
    parser.add_argument(
        "--workers", type=int, default=usable_cores(), metavar="N", help="processes; default: %(default)s, the cores at hand"
    )
    parser.add_argument("--json", action="store_true", help="for scripts")


def command(arguments: argparse.Namespace) -> int:
    classes = None
    if arguments.classes is not None:
        classes = [line.strip() for line in arguments.classes.read_text().splitlines() if line.strip()]
        if len(set(classes)) < len(classes):
            raise ValueError(f"{arguments.classes} has the class {max(classes, key=classes.count)!r} twice")
    result = index(
        arguments.folder,
        arguments.dest,
        split_pattern=arguments.split_pattern,
        name=arguments.name,
        label=arguments.label,
        classes=classes,
        force=arguments.force,
        workers=arguments.workers,
    )
    if arguments.json:
        print(json.dumps(result, indent=1))
        return 0
    for split, count in result["num_images"].items():
        unlabelled = result["num_unlabelled"][split]
        print(f"{split}: {count:,} images" + f", {unlabelled:,} without a label" * bool(unlabelled))
    print(f"{result['num_classes']:,} classes; the data set stands in {result['folder']}")
    return 0
