"""`equihpc data verify DIR`: is a data set what its manifest says? And `check`, the short form before every training. No torch.

A folder that is whole gets a receipt: size, times of the last changes and sha256 of every file. A file that still has the
receipt's size and times is trusted, so that the next check costs one `stat` a shard. A copy is not: it may keep the time of the
last change of the content (mtime), but never that of the file itself (ctime).
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import logging
import os
import time
import warnings
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from equissl.data.index import Found, look_through
from equissl.data.parallel import processes, progress, usable_cores
from equissl.data.shards import MANIFEST, NO_LABEL, describe, find, manifest_sha256, read_manifest
from equissl.files import write_json

log = logging.getLogger(__name__)

DESCRIPTION = "Check every shard against the manifest's sha256 and the index, and leave a receipt that training trusts."
RECEIPT = "verified.json"
HASHED_AT_START = 2 * 2**30  # bytes that `check` reads at most: some seconds
THREADS = 16
SHOWN = 20  # problems named of one shard


class Damage(NamedTuple):
    file: str  # shard, index or keys
    key: str | None  # of the sample, where it is one
    problem: str


class State(NamedTuple):
    """A file as a receipt knows it."""

    name: str
    bytes: int
    mtime_ns: int
    ctime_ns: int
    sha256: str


# --- the receipt ------------------------------------------------------------------------------------------------------------


def receipts(folder: Path) -> tuple[Path, Path]:
    """In the data set, and in the user's cache for one that cannot be written to."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "equihpc" / "verified"
    return folder / RECEIPT, cache / f"{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]}.json"


def read_receipts(folder: Path) -> set[State]:
    """Empty where there is none; one that cannot be read is as good as none."""
    states: set[State] = set()
    for path in receipts(folder):
        try:
            states |= {State(name, *(entry[field] for field in State._fields[1:])) for name, entry in json.loads(path.read_text()).items()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            continue
    return states


def write_receipt(folder: Path, states: Collection[State]) -> Path | None:
    """Returns where it stands: nowhere if neither place can be written to, which is said."""
    content = {state.name: dict(zip(State._fields[1:], state[1:], strict=True)) for state in sorted(states)}
    for path in receipts(folder):
        try:
            if path.parent != folder:
                path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, content)
            return path
        except OSError as error:
            problem = error
    log.warning("no receipt of the checks of %s can be left: %s", folder, problem)
    return None


def files_of(folder: Path, splits: Collection[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The manifest's entries of these splits: index and keys; shards. Raises ValueError for an unknown split."""
    known = read_manifest(folder)["splits"]
    if unknown := [split for split in splits if split not in known]:
        raise ValueError(f"{folder / MANIFEST} has no split {unknown[0]!r}; it has {', '.join(known)}")
    entries = [known[split] for split in splits]
    return [entry[kind] for entry in entries for kind in ("index", "keys") if kind in entry], [
        shard for entry in entries for shard in entry["shards"]
    ]


def check(folder: Path, splits: Collection[str]) -> None:
    """Before training: raises ValueError with the name of the first file that is missing or not the manifest's.

    Sizes are compared of all; the sha256 of those that no receipt vouches for, which are then in a new receipt: of all of them if
    they are no more than 2 GiB together, otherwise of index and keys only, with a warning.
    """
    small, shards = files_of(folder, splits)
    known = read_receipts(folder)
    now = {state.name: state for state in states(folder, small + shards)}
    new_small, new_shards = ([entry for entry in entries if now[entry["name"]] not in known] for entries in (small, shards))
    if sum(entry["bytes"] for entry in new_shards) > HASHED_AT_START:
        log.warning(
            "%d of %d shards of %s were copied or changed since they were verified; they have the right sizes, and equihpc data"
            " verify checks what is in them",
            len(new_shards),
            len(shards),
            folder,
        )
        new_shards = []
    new = new_small + new_shards

    def compare(entry: dict[str, Any]) -> None:
        with _told(folder, entry):
            _compare(describe(folder / entry["name"])["sha256"], entry)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(compare, new))
    if new:
        fresh = {now[entry["name"]] for entry in new} | (known & set(now.values()))
        write_receipt(folder, fresh | {before for before in known if before.name not in now})


def states(folder: Path, entries: list[dict[str, Any]]) -> list[State]:
    """As a receipt has them if they are the manifest's. Raises ValueError for the first that is missing or has another size."""

    def state(entry: dict[str, Any]) -> State:
        with _told(folder, entry):
            return _state(folder, entry)

    with ThreadPoolExecutor(THREADS) as pool:  # a parallel file system answers one stat after the other slowly
        return list(pool.map(state, entries))


@contextmanager
def _told(folder: Path, entry: dict[str, Any]) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        remedy = f"copy it again or write the data set anew; equihpc data verify {folder} finds what else is damaged"
        raise ValueError(f"{entry['name']} in {folder} {error}: {remedy}") from None


def _state(folder: Path, entry: dict[str, Any]) -> State:
    """As a receipt has it if the file is the manifest's. Raises ValueError where it is missing or has another size."""
    try:
        status = (folder / entry["name"]).stat()
    except FileNotFoundError:
        raise ValueError("is missing") from None
    if status.st_size != entry["bytes"]:
        raise ValueError(f"has {status.st_size} bytes, the manifest says {entry['bytes']}")
    return State(entry["name"], entry["bytes"], status.st_mtime_ns, status.st_ctime_ns, entry["sha256"])


def _compare(sha256: str, entry: dict[str, Any]) -> None:
    """Raises ValueError where the file is not the manifest's."""
    if sha256 != entry["sha256"]:
        raise ValueError(f"was changed: its sha256 is {sha256[:12]}…, the manifest says {entry['sha256'][:12]}…")


# --- everything -------------------------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """A shard to be looked through."""

    folder: Path
    entry: dict[str, Any]
    rows: NDArray[np.void] | None  # of the index; None: the index is damaged
    keys: NDArray[np.bytes_] | None  # None: damaged, or version 1, which has no file of keys
    classes: list[str]
    label_from: str | None
    decode: bool


def verify(folder: Path, decode: bool = False, workers: int = 1) -> tuple[list[Damage], set[State]]:
    """What is damaged, and the files that are whole. Raises ValueError where there is no manifest that can be read."""
    manifest = read_manifest(folder)
    damages: list[Damage] = []
    whole: set[State] = set()
    tasks: list[Task] = []
    for split, entry in manifest["splits"].items():
        small, shards = files_of(folder, [split])
        tables: list[NDArray[Any]] = []
        for file in small:
            try:
                state = _state(folder, file)
                _compare(describe(folder / file["name"])["sha256"], file)
                table = np.load(folder / file["name"], mmap_mode="r")
                if len(table) != entry["num_images"]:
                    raise ValueError(f"it has {len(table)} entries for {entry['num_images']} images")
            except (OSError, ValueError) as error:
                damages.append(Damage(file["name"], None, f"{error}; equihpc data index --force writes it anew from the shards"))
            else:
                tables.append(table)
                whole.add(state)
        parts: list[list[NDArray[Any] | None]] = [[None] * len(shards)] * 2  # rows and keys of each shard
        if len(tables) == len(small):
            borders = np.searchsorted(tables[0]["shard"], np.arange(len(shards) + 1))
            parts[: len(tables)] = [[np.array(table[a:b]) for a, b in pairwise(borders)] for table in tables]
        common = (manifest["classes"], manifest["source"].get("label_from"), decode)
        tasks += [Task(folder, shard, rows, keys, *common) for shard, rows, keys in zip(shards, *parts, strict=True)]
    with progress("verify", sum(task.entry["bytes"] for task in tasks)) as advance, processes(min(workers, len(tasks))) as parallel:
        for task, (found_damages, shard_state) in zip(tasks, parallel(look, [(task,) for task in tasks]), strict=True):
            damages += found_damages
            whole |= {shard_state} if shard_state else set()
            advance(task.entry["bytes"])
    return sorted(damages, key=lambda damage: damage.file), whole


def look(task: Task) -> tuple[list[Damage], State | None]:
    """What is damaged in a shard; if nothing is, its state."""
    folder, entry = task.folder, task.entry
    name: str = entry["name"]
    try:
        state = _state(folder, entry)  # before reading: what is changed meanwhile is not what was checked
        found = look_through(folder / name, name, task.label_from)
        damages = [*_of_the_whole(entry, found), *_of_samples(task, found)]
        if task.decode:
            damages += _not_decoded(task, found)
    except (OSError, ValueError) as error:
        return [Damage(name, None, str(error))], None
    if len(damages) > SHOWN:
        damages = [*damages[:SHOWN], Damage(name, None, f"{len(damages) - SHOWN} more")]
    return damages, None if damages else state


def _of_the_whole(entry: dict[str, Any], found: Found) -> Iterator[Damage]:
    try:
        _compare(found.shard.entry["sha256"], entry)
    except ValueError as error:
        yield Damage(entry["name"], None, str(error))
    if len(found.labels) != entry["num_images"]:
        yield Damage(entry["name"], None, f"has {len(found.labels)} images, the manifest says {entry['num_images']}")


def _of_samples(task: Task, found: Found) -> Iterator[Damage]:
    """Tar headers and labels against the index."""
    if task.rows is None:
        return
    indexed = {int(row["offset"]): (number, row) for number, row in enumerate(task.rows)}
    for row, encoded, label in zip(found.shard.rows, found.shard.keys, found.labels, strict=True):
        key = encoded.decode()
        number, expected = indexed.pop(int(row["offset"]), (0, None))
        if expected is None:
            yield Damage(task.entry["name"], key, f"its image at byte {row['offset']} is not in the index")
            continue
        if row["size"] != expected["size"]:
            yield Damage(task.entry["name"], key, f"its image has {row['size']} bytes, the index says {expected['size']}")
        if task.keys is not None and task.keys[number] != encoded:
            yield Damage(task.entry["name"], key, f"its key is {task.keys[number].decode()!r} in the file of keys")
        number = int(expected["label"])
        if number != NO_LABEL and not 0 <= number < len(task.classes):
            yield Damage(task.entry["name"], key, f"its label is {number} in the index, and there are {len(task.classes)} classes")
            continue
        there = None if number == NO_LABEL else task.classes[number] if isinstance(label, str) else number
        if label != there:
            yield Damage(task.entry["name"], key, f"its label is {label!r}, the index says {there!r}")
    for offset in indexed:
        yield Damage(task.entry["name"], None, f"the index has an image at byte {offset}, where none begins")


def _not_decoded(task: Task, found: Found) -> Iterator[Damage]:
    from PIL import Image

    with (task.folder / task.entry["name"]).open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of strange but legible metadata
        for row, key in zip(found.shard.rows, found.shard.keys, strict=True):
            encoded = os.pread(file.fileno(), int(row["size"]), int(row["offset"]))
            try:
                with Image.open(io.BytesIO(encoded)) as image:
                    image.convert("RGB")
            except Exception as error:  # whatever Pillow's readers raise
                yield Damage(task.entry["name"], key.decode(), f"its image cannot be decoded: {error}")


# --- the command ------------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DIR", help="a data set, or the name photographs")
    parser.add_argument("--decode", action="store_true", help="decode every image too")
    parser.add_argument(
        "--workers", type=int, default=usable_cores(), metavar="N", help="processes; default: %(default)s, the cores at hand"
    )
    parser.add_argument("--json", action="store_true", help="for scripts")


def command(arguments: argparse.Namespace) -> int:
    folder = find(arguments.data)
    began = time.monotonic()
    damages, whole = verify(folder, arguments.decode, arguments.workers)
    seconds = time.monotonic() - began
    receipt = None if damages else write_receipt(folder, whole)
    result = {
        "folder": str(folder),
        "manifest_sha256": manifest_sha256(folder),
        "num_whole": len(whole),
        "bytes": sum(state.bytes for state in whole),
        "seconds": round(seconds, 3),
        "decoded": arguments.decode,
        "damaged": [damage._asdict() for damage in damages],
        "receipt": str(receipt) if receipt else None,
    }
    if arguments.json:
        print(json.dumps(result, indent=1))
        return int(bool(damages))
    for damage in damages:
        print(": ".join(part for part in damage if part))
    if damages:
        print(f"{len({damage.file for damage in damages})} files are damaged, {len(whole)} are whole")
    else:
        print(
            f"{len(whole)} files, {result['bytes'] / 1e9:.2f} GB: all as the manifest says ({seconds:.1f} s); receipt: {receipt or 'none'}"
        )
    return int(bool(damages))
