"""`equihpc data check TASK PATH`: is a labelled data set there as its evaluation needs it? No GPU; torch only with --decode.

`layout` is the same for `equihpc plan`, and `require` for the evaluation itself.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from equissl.data import verify
from equissl.data.labelled import (
    DATA_SETS,
    FAKE,
    FORMAT,
    DataSet,
    Files,
    differing_classes,
    few,
    find_data_set,
    find_root,
    joined_sha256,
    open_labelled,
    split_of_shards,
)
from equissl.data.parallel import processes, usable_cores
from equissl.data.shards import MANIFEST, DataError, Images
from equissl.files import write_json

log = logging.getLogger(__name__)

DESCRIPTION = "Is an evaluation's data set as it must be? Says what is expected and what is there; exit code 2 where it does not fit."
CHUNK = 512  # images that a process decodes at a time
LINE_SECONDS = 10.0  # between two lines about the progress


@dataclass
class Split:
    """What is there of one split."""

    num_images: int
    expected: int
    num_classes: int  # that have images
    per_class: tuple[int, int]  # smallest and largest number of images
    manifest_sha256: str
    missing: list[str]  # files
    undecodable: list[str] | None = None  # keys; None: not looked at


@dataclass
class Found:
    """What is there, and what of it does not fit."""

    root: str = ""
    layout: str = ""  # "own format" or "shards"
    is_fake: bool = False
    splits: dict[str, Split] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    manifest_sha256: str = ""  # of what is trained, chosen and tested on
    sampled: list[str] = field(default_factory=list)  # files whose bytes are in it


@contextmanager
def _readable() -> Iterator[None]:
    """Raises ValueError for what may not be read: it is bad input."""
    try:
        yield
    except PermissionError as error:
        raise ValueError(f"{error.filename} may not be read: {error.strerror}") from None


@_readable()
def check(name: str, path: Path, decode: bool = False, workers: int = 1, checksums: bool = True) -> Found:
    """Every split against the official counts, or those of a fake data set. Raises ValueError for an unknown name.

    `checksums`: of shards, where no receipt vouches for them.
    """
    data_set, found = find_data_set(name), Found()
    try:
        root = find_root(data_set, path)
        num_classes, expected = _expected(data_set, root)
    except ValueError as error:
        found.problems.append(str(error))
        return found
    found.root, found.is_fake = str(root), (root / FAKE).is_file()
    found.layout = "shards" if (root / MANIFEST).is_file() else "own format"
    disjoint = [each for each in (data_set.train, data_set.tune, data_set.test) if each]
    opened: dict[str, Images] = {}
    for split, count in expected.items():
        if found.layout == "shards" and split not in disjoint:  # no image is in two of them
            continue
        try:
            if found.layout == "shards" and checksums:
                verify.check(root, [split_of_shards(data_set, root, split)])
            opened[split] = data = open_labelled(name, root, split)
        except ValueError as error:
            if str(error) not in found.problems:  # what all splits share is said once
                found.problems.append(str(error))
            continue
        found.splits[split] = _look(split, data, count, num_classes, found.problems)
    first, *others = opened.values() or [None]
    found.problems += [differing for other in others if first and other and (differing := differing_classes(first, other))]
    disjoint = [each for each in disjoint if each in opened]
    listed = {split: set(data.files) for split in disjoint if isinstance(data := opened[split], Files)}
    for one, other in combinations(listed, 2):
        if shared := sorted(listed[one] & listed[other]):
            found.problems.append(f"{one} and {other} share {len(shared):,} images: {few(shared)}")
    found.manifest_sha256 = joined_sha256([opened[split] for split in disjoint]) if disjoint else ""
    found.sampled = [file for data in opened.values() if isinstance(data, Files) for file in data.sampled]
    if decode:
        for split in disjoint:
            _decode(name, split, opened[split], found.splits[split], found.problems, workers)
    return found


def require(name: str, path: Path, checksums: bool = True) -> Found:
    """As `check`. Raises ValueError with all its problems."""
    found = check(name, path, checksums=checksums)
    if found.problems:
        raise ValueError(_text(name, path, found))
    return found


def _text(name: str, path: Path, found: Found) -> str:
    return f"{path} does not fit {name}: {'; '.join(found.problems)}"


@_readable()
def layout(name: str, path: Path) -> str:
    """The sha256 that stands for the data set in `path`. Raises ValueError as `require`.

    What is found is kept in the user's cache, with the times of the last changes of annotations, folders and the images whose bytes
    are in the hash: ImageNet's million names are listed once, not for each plan. Checksums of shards, and files that vanish from folders
    further down, are noticed when the evaluation begins.
    """
    data_set = find_data_set(name)
    root = find_root(data_set, path)
    watched = sorted(_watched(data_set, root))
    stamp = hashlib.sha256(json.dumps([FORMAT, name, str(root.resolve()), watched]).encode()).hexdigest()
    kept = verify.receipts(root)[1].parent.with_name("layouts") / f"{stamp[:24]}.json"
    try:
        before = json.loads(kept.read_text())
        if all(_state(root / file) == state for file, state in before["sampled"].items()):
            return str(before["manifest_sha256"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        pass
    found = require(name, path, checksums=False)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        sampled = {file: _state(root / file) for file in found.sampled}
        write_json(kept, {"name": name, "path": str(root), "manifest_sha256": found.manifest_sha256, "sampled": sampled})
    except OSError as error:
        log.warning("what was found in %s cannot be kept: %s; it is looked through again next time", path, error)
    return found.manifest_sha256


def _state(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _watched(data_set: DataSet, root: Path) -> Iterator[tuple[str, int, int, int]]:
    """Name, size and times of the files of annotations, of the folders of images, and of the folders in these."""
    entries: list[Path] = [root]
    if root.is_dir():
        entries = [path for path in root.iterdir() if path.is_file()]
        for each in (*data_set.needs, *filter(None, map(data_set.from_file, data_set.splits))):
            entries.append(root / each)
            if (root / each).is_dir():
                with os.scandir(root / each) as found:
                    entries += [Path(entry.path) for entry in found if entry.is_dir()]
    for path in dict.fromkeys(entries):
        with suppress(FileNotFoundError):
            status = path.stat()
            yield str(path.relative_to(root)), status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _expected(data_set: DataSet, root: Path) -> tuple[int, dict[str, int]]:
    """Number of classes, and of images of each split."""
    if not (root / FAKE).is_file():
        return data_set.num_classes, data_set.splits
    try:
        content = json.loads((root / FAKE).read_text())
        name, num_classes = content["data_set"], int(content["num_classes"])
        splits = {str(split): int(count) for split, count in content["splits"].items()}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{root / FAKE} is damaged ({error!r}): write the fake data set anew") from None
    if name != data_set.name:
        raise ValueError(f"{root} is a fake {name}, not {data_set.name}")
    return num_classes, splits


def _look(split: str, data: Images, count: int, num_classes: int, problems: list[str]) -> Split:
    per_class = np.bincount(data.labels, minlength=len(data.classes))
    if data.num_images != count:
        problems.append(f"{split} has {data.num_images:,} images, not {count:,}")
    if len(data.classes) != num_classes:
        problems.append(f"{split} has {len(data.classes):,} classes, not {num_classes:,}")
    if empty := [name for name, images in zip(data.classes, per_class, strict=True) if not images]:
        problems.append(f"{split} has no images of the classes {few(empty)}")
    missing = data.missing() if isinstance(data, Files) else []
    if isinstance(data, Files) and (more := data.num_images - len(set(data.files))):
        problems.append(f"{split} names {more:,} images more than once: {few(_repeated(data.files))}")
    if missing:
        problems.append(f"{split}: {len(missing):,} of {data.num_images:,} image files are not there: {few(missing)}")
    present = per_class[per_class > 0]
    return Split(data.num_images, count, len(present), (int(present.min()), int(present.max())), data.manifest_sha256, missing)


def _repeated(names: list[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def _decode(name: str, split: str, data: Images, there: Split, problems: list[str], workers: int) -> None:
    starts = range(0, data.num_images, CHUNK)
    told, there.undecodable = time.monotonic(), []
    with processes(workers) as parallel:
        for start, bad in zip(starts, parallel(_undecodable, ((name, data.folder, split, start) for start in starts)), strict=True):
            there.undecodable += bad
            if time.monotonic() - told > LINE_SECONDS:
                told = time.monotonic()
                log.info("%s: %d of %d images decoded", split, start + CHUNK, data.num_images)
    if there.undecodable:
        problems.append(f"{split}: {len(there.undecodable):,} images cannot be decoded: {few(there.undecodable)}")


_open = lru_cache(maxsize=1)(open_labelled)  # once in each process, not for every chunk


def _undecodable(name: str, path: Path, split: str, start: int) -> list[str]:
    """Keys, of the chunk from `start` on; a file that is not there is none: it is among the missing."""
    from equissl.data.loader import decode

    data, bad = _open(name, path, split), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of strange but legible metadata
        for i in range(start, min(start + CHUNK, data.num_images)):
            if isinstance(data, Files) and not os.path.isfile(data.folder / data.file(i)):  # False also of a name that is too long
                continue
            try:
                decode(data, i)
            except (ValueError, DataError):
                bad.append(data.key(i))
    return bad


# --- the command ------------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="TASK", help=f"the data set: {', '.join(DATA_SETS)}")
    parser.add_argument("path", metavar="PATH", type=Path, help="its folder, the one around it, or a data set of shards")
    parser.add_argument("--decode", action="store_true", help="decode every image too")
    parser.add_argument("--workers", type=int, default=usable_cores(), metavar="N", help="processes that decode; default: %(default)s")
    parser.add_argument("--json", action="store_true", help="for scripts")


def command(arguments: argparse.Namespace) -> int:
    data_set = find_data_set(arguments.name)
    found = check(arguments.name, arguments.path, arguments.decode, arguments.workers)
    if arguments.json:
        shown = {key: value for key, value in asdict(found).items() if key != "sampled"}
        print(json.dumps({"name": arguments.name, **shown}, indent=1))
        return 2 if found.problems else 0
    print(f"expected: {data_set.expected()}")
    for line in data_set.tree:
        print(f"  {data_set.base + '/' if data_set.base and not line.startswith('or ') else ''}{line}")
    splits = filter(None, (data_set.train, data_set.tune, data_set.test))
    print(f"  or shards of equihpc data build with the splits {', '.join(splits)}")
    print(
        f"evaluation: trained on {data_set.train}, chosen on {data_set.tune or 'a part of it held out'}, tested on {data_set.test};",
        end=" ",
    )
    print(f"main metric {data_set.main}")
    if found.splits:
        print(f"found: {found.root}, {found.layout}{', A FAKE DATA SET: its counts are expected' if found.is_fake else ''}")
    for split, there in found.splits.items():
        print("  " + ", ".join(_texts(split, there)))
    if found.problems:
        raise ValueError(_text(arguments.name, arguments.path, found))
    print("it fits" if arguments.decode else "it fits; no image was decoded, which --decode does")
    return 0


def _texts(name: str, split: Split) -> list[str]:
    low, high = split.per_class
    texts: list[Any] = [
        f"{name}: {split.num_images:,} images of {split.expected:,}",
        f"{split.num_classes:,} classes of {low:,} to {high:,}" if low < high else f"{split.num_classes:,} classes of {low:,}",
        f"{len(split.missing):,} files missing",
    ]
    if split.undecodable is not None:
        texts.append(f"{len(split.undecodable):,} not decodable")
    return [*texts, f"manifest {split.manifest_sha256[:12]}"]
