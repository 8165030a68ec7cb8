"""A data set: a folder with a manifest, tar shards in WebDataset's convention, and one index per split. No torch.

    manifest.json      version, name, classes, source, and per split: num_images, index, keys and shards with size and sha256
    train-000000.tar   KEY.png (or .jpg), KEY.cls, KEY.png, …: what `webdataset` reads
    train.index.npy    shard, offset, size and label of every sample, memory-mapped: any sample is one `pread` away
    train.keys.npy     the key of every sample, in the same order

The sha256 of manifest.json stands for the whole content. Shards hold nothing that changes from one writing to the next.
A label of -1 stands for a sample without one.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from equissl.config import SYNTHETIC, is_stream
from equissl.files import sync, told_when_full, write_json

log = logging.getLogger(__name__)

VERSION = 2
READABLE = (1, 2)  # version 1 had no file of keys: they were read from the tar headers
MANIFEST = "manifest.json"
INDEX_DTYPE = np.dtype([("offset", "<u8"), ("shard", "<u4"), ("size", "<u4"), ("label", "<i8")])
NO_LABEL = -1
OPEN_SHARDS = 64  # file descriptors that one ShardSet keeps
SPLIT = re.compile(r"[A-Za-z0-9_-]{1,40}")  # it becomes part of file names
KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")  # no dot: WebDataset ends the key at the first one; short: one plain tar header
RETRY_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0)  # pauses before a shard that cannot be read is given up: a minute in all


class Sample(NamedTuple):
    key: str
    image: bytes  # encoded
    extension: str  # png, jpg, …
    label: int  # NO_LABEL: none


class Shard(NamedTuple):
    """One shard that has been written or looked through."""

    entry: dict[str, Any]  # for the manifest: name, bytes, sha256, num_images
    rows: NDArray[np.void]  # INDEX_DTYPE, (num_images,); `shard` is filled by `write_index`
    keys: NDArray[np.bytes_]  # (num_images,), UTF-8


class Images(Protocol):
    """One split of a data set with random access, whatever it is kept in. Pickles without its images."""

    name: str
    folder: Path
    split: str
    classes: tuple[str, ...]
    num_images: int
    manifest_sha256: str  # stands for the content, as far as it is known without reading every image

    @property
    def labels(self) -> NDArray[np.int64]: ...

    def require_labels(self) -> NDArray[np.int64]:
        """`labels`. Raises ValueError where an image has none, or one that is no class."""

    def key(self, i: int) -> str: ...

    def read(self, i: int) -> bytes:
        """The encoded image."""


class DataError(RuntimeError):
    """The data are not what they were at the start, or not what they should be: the state is saved, then the run ends."""


class ShardLost(DataError):
    """A shard that was there at the start cannot be read any more."""


# --- writing --------------------------------------------------------------------------------------------------------------


def write_shards(samples: Iterable[Sample], folder: Path, split: str, samples_per_shard: int) -> dict[str, Any]:
    """Write one split's shards and index; returns its entry for the manifest. Raises ValueError for a key that is not plain."""
    chunks = enumerate(_chunks(samples, samples_per_shard))
    return write_index(folder, split, [write_shard(folder / shard_name(split, number), chunk) for number, chunk in chunks])


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:06d}.tar"


def write_shard(path: Path, samples: Iterable[Sample]) -> Shard:
    """Write one shard, whole or not at all: temporary name, fsync, rename. Raises ValueError for a key that is not plain, DiskFull."""
    rows: list[tuple[int, int, int, int]] = []
    keys: list[bytes] = []
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with told_when_full(path, None):
        try:
            with temporary.open("wb") as file:
                hashing = _Hashing(file)
                with tarfile.open(fileobj=hashing, mode="w", format=tarfile.USTAR_FORMAT) as tar:  # type: ignore[call-overload]
                    for sample in samples:
                        if not KEY.fullmatch(sample.key):
                            raise ValueError(f"the key {sample.key!r} is not 1 to 80 letters, digits, '_' and '-'")
                        _add(tar, f"{sample.key}.{sample.extension}", sample.image)
                        # the header just written is one block; the image began after it and is padded to whole blocks
                        offset = tar.offset - -(-len(sample.image) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                        rows.append((offset, 0, len(sample.image), sample.label))
                        keys.append(sample.key.encode())
                        if sample.label != NO_LABEL:
                            _add(tar, f"{sample.key}.cls", str(sample.label).encode())
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    entry = {"name": path.name, "bytes": hashing.num_bytes, "sha256": hashing.digest.hexdigest(), "num_images": len(rows)}
    return Shard(entry, np.array(rows, dtype=INDEX_DTYPE), np.array(keys or [b""], dtype=np.bytes_)[: len(keys)])


def write_index(folder: Path, split: str, shards: Sequence[Shard]) -> dict[str, Any]:
    """Index and keys of a split's shards, in their order; returns the split's entry for the manifest. Raises DiskFull."""
    rows = np.concatenate([np.empty(0, dtype=INDEX_DTYPE), *(shard.rows for shard in shards)])
    rows["shard"] = np.repeat(np.arange(len(shards)), [len(shard.rows) for shard in shards])
    keys = np.concatenate([np.empty(0, dtype="S1"), *(shard.keys for shard in shards)])
    entry: dict[str, Any] = {"num_images": len(rows)}
    for kind, values in (("index", rows), ("keys", keys)):
        path = folder / f"{split}.{kind}.npy"
        with told_when_full(path, values.nbytes), path.open("wb") as file:
            np.save(file, values)
            file.flush()
            os.fsync(file.fileno())
        entry[kind] = describe(path)
    return {**entry, "shards": [shard.entry for shard in shards]}


def write_manifest(folder: Path, name: str, classes: list[str], splits: dict[str, Any], source: dict[str, Any]) -> None:
    """The last file of a data set: a folder without it is not one."""
    write_json(folder / MANIFEST, {"version": VERSION, "name": name, "classes": classes, "source": source, "splits": splits})
    sync(folder)


def manifest_sha256(folder: Path) -> str:
    return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()


def describe(path: Path) -> dict[str, Any]:
    """Name, bytes and sha256 of a file, as the manifest has them."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": digest}


class _Hashing:
    """A file for tarfile to write to that hashes what passes: a shard is not read again for its checksum."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.digest, self.num_bytes = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.num_bytes += len(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self.num_bytes


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # mtime 0, no owner, mode 644: the same bytes every time
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _chunks(samples: Iterable[Sample], size: int) -> Iterator[list[Sample]]:
    chunk: list[Sample] = []
    for sample in samples:
        chunk.append(sample)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


# --- finding -----------------------------------------------------------------------------------------------------------


def find(data: str) -> Path:
    """The folder of a data set: one that holds manifest.json, a run folder of equissl.prepare, or the built-in name "photographs".

    "photographs" is cut on first use and kept in the user's cache folder. Raises ValueError for anything else.
    """
    if data == "photographs":
        from equissl.config import PrepareConfig
        from equissl.data.photographs import cached

        return cached(PrepareConfig())
    if is_stream(data):
        raise ValueError(f"data {data!r} is a stream: here a data set with a manifest is needed; equihpc data build makes one")
    if data == SYNTHETIC:
        raise ValueError(f"data {data!r} is noise, to measure a pretraining's speed with: here a data set is needed")
    path = Path(data).expanduser()
    for folder in (path, path / "data"):
        if (folder / MANIFEST).is_file():
            return folder
    what = f"the folder has no {MANIFEST}, nor has its subfolder data" if path.is_dir() else "there is no such folder"
    raise ValueError(
        f"data {data!r}: {what}; give a folder with a {MANIFEST}, a finished run folder of equissl.prepare, or the name 'photographs'"
    )


# --- reading --------------------------------------------------------------------------------------------------------------


class ShardSet:
    """One split of a data set with random access. Pickles as names only; files are opened where they are read.

    Raises ValueError for a missing or unreadable manifest, an unknown split, an empty one, and for a shard or index that is
    missing or does not have the manifest's size. `origin`: what a staged copy is of, for messages.
    """

    def __init__(self, folder: Path, split: str) -> None:
        self.folder = self.origin = Path(folder)
        self.split = split
        manifest = read_manifest(self.folder)
        if split not in manifest["splits"]:
            raise ValueError(f"{self.folder / MANIFEST} has no split {split!r}; it has {', '.join(manifest['splits'])}")
        entry = manifest["splits"][split]
        self.name: str = manifest["name"]
        self.classes: tuple[str, ...] = tuple(manifest["classes"])
        self.manifest_sha256 = manifest_sha256(self.folder)
        self.num_images: int = entry["num_images"]
        if self.num_images == 0:
            raise ValueError(f"the split {split!r} of {self.folder} has no images")
        self.shards: tuple[str, ...] = tuple(shard["name"] for shard in entry["shards"])
        self.shard_sizes: tuple[int, ...] = tuple(shard["num_images"] for shard in entry["shards"])  # images
        self._files_of_index: dict[str, str] = {kind: entry[kind]["name"] for kind in ("index", "keys") if kind in entry}
        for shard in entry["shards"]:
            _check_size("shard", self.folder / shard["name"], shard["bytes"])
        for kind, name in self._files_of_index.items():
            _check_size(kind, self.folder / name, entry[kind]["bytes"])
        self._reset()
        counts = np.bincount(self._index["shard"], minlength=len(self.shards))
        if tuple(counts) != self.shard_sizes or np.any(np.diff(self._index["shard"].astype(np.int64)) < 0):
            raise ValueError(f"{self.folder / self._files_of_index['index']} does not fit the manifest: equihpc data index writes it anew")

    def _reset(self) -> None:
        self._abandoned = threading.Event()
        self._mapped: dict[str, NDArray[Any]] = {}
        self._files: OrderedDict[int, int] = OrderedDict()  # shard -> descriptor, least recently used first

    def _map(self, kind: str) -> NDArray[Any]:
        if kind not in self._mapped:
            self._mapped[kind] = np.load(self.folder / self._files_of_index[kind], mmap_mode="r")
        return self._mapped[kind]

    @property
    def _index(self) -> NDArray[np.void]:
        return self._map("index")

    @property
    def labels(self) -> NDArray[np.int64]:
        """Class of every image, `(N,)`, NO_LABEL where it has none: a view of the memory-mapped index."""
        return np.asarray(self._index["label"])

    def require_labels(self) -> NDArray[np.int64]:
        """`labels`. Raises ValueError where an image has none, or one that is no class."""
        missing = int(np.count_nonzero(self.labels < 0))
        if missing:
            raise ValueError(
                f"{missing} of {self.num_images} images of the split {self.split!r} of {self.folder} have no label, and here every one"
                " needs its class: build the data set from a source with classes, or give equihpc data index the field that holds them"
            )
        if (largest := int(self.labels.max())) >= len(self.classes):
            raise ValueError(f"{self.folder}: the label {largest} of the split {self.split!r} is not one of {len(self.classes)} classes")
        return self.labels

    def __len__(self) -> int:
        return self.num_images

    def read(self, i: int) -> bytes:
        """The encoded image. Raises ShardLost where its shard cannot be read any more."""
        row = self._index[i]
        return self._pread(int(row["shard"]), int(row["size"]), int(row["offset"]))

    def read_range(self, start: int, stop: int) -> list[memoryview]:
        """The encoded images `start` to `stop - 1`, at most 500 and all of one shard, by one read, each in memory of its own.

        Raises ShardLost.
        """
        rows = self._index[start:stop]
        shard, sizes = int(rows["shard"][0]), rows["size"].astype(np.int64)
        assert stop - start <= 500  # a read takes 1024 buffers
        assert int(rows["shard"][-1]) == shard
        offsets = rows["offset"].astype(np.int64)
        gaps = np.append(offsets[1:] - offsets[:-1] - sizes[:-1], 0).tolist()  # tar headers, labels, padding
        images = [_memory(size) for size in sizes.tolist()]
        between = _memory(max(gaps))
        buffers = [part for image, gap in zip(images, gaps, strict=True) for part in (image, between[:gap])]
        self._fill(shard, buffers[:-1], int(offsets[0]))
        return images

    def shard_of(self, images: NDArray[np.int64]) -> NDArray[np.int64]:
        """Number of the shard of each image."""
        return np.searchsorted(np.cumsum(self.shard_sizes), images, side="right")

    def label(self, i: int) -> int:
        return int(self._index[i]["label"])

    def key(self, i: int) -> str:
        """WebDataset's key; of version 1 from the tar header before the image."""
        if "keys" in self._files_of_index:
            return bytes(self._map("keys")[i]).decode()
        row = self._index[i]
        header = self._pread(int(row["shard"]), tarfile.BLOCKSIZE, int(row["offset"]) - tarfile.BLOCKSIZE)
        return header[:100].split(b"\0")[0].decode().partition(".")[0]

    def _pread(self, shard: int, size: int, offset: int) -> bytes:
        data = bytearray(size)
        self._fill(shard, [memoryview(data)], offset)
        return bytes(data)

    def _fill(self, shard: int, buffers: list[memoryview], offset: int) -> None:
        """From `offset` on, one after the other. Raises ShardLost."""
        path, size = self.folder / self.shards[shard], sum(map(len, buffers))
        for pause in (*RETRY_SECONDS, None):
            try:
                if os.preadv(self._descriptor(shard), buffers, offset) == size:
                    return
                problem = f"it ends before byte {offset + size}"
            except OSError as error:
                problem = str(error)
            if shard in self._files:  # a file that came back is another one
                os.close(self._files.pop(shard))
            if pause is not None:
                log.warning("the shard %s cannot be read: %s; again in %g s", path, problem, pause)
                if self._abandoned.wait(pause):
                    break
        raise ShardLost(
            f"the shard {path} cannot be read any more: {problem}. It was whole at the start: copy it again (equihpc data verify"
            f" {self.origin} finds what else is damaged), then submit again"
        )

    def _descriptor(self, shard: int) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        if len(self._files) >= OPEN_SHARDS:
            os.close(self._files.popitem(last=False)[1])
        self._files[shard] = os.open(self.folder / self.shards[shard], os.O_RDONLY)
        return self._files[shard]

    def abandon(self) -> None:
        """From another thread: a read that waits for its shard to come back gives up at once."""
        self._abandoned.set()

    def close(self) -> None:
        """Close the shards; the next read opens them again."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._reset()

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_mapped", "_files", "_abandoned")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()


def _memory(size: int) -> memoryview:
    """Not set to zero first, as a bytearray is."""
    return np.empty(size, dtype=np.uint8).data


class _File(BaseModel):
    model_config = ConfigDict(strict=True)
    name: str
    bytes: int
    sha256: str


class _Shard(_File):
    num_images: int


class _Split(BaseModel):
    model_config = ConfigDict(strict=True)
    num_images: int
    index: _File
    keys: _File | None = None
    shards: list[_Shard]


class _Manifest(BaseModel):
    """What every version has; more may stand there."""

    model_config = ConfigDict(strict=True)
    name: str
    classes: list[str]
    splits: dict[str, _Split]


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises ValueError where there is none, or one of another version."""
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"there is no {path}: the folder is not a finished data set") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(manifest, dict):
        raise ValueError(f"{path} is no manifest of a data set, but a {type(manifest).__name__}")
    if manifest.get("version") not in READABLE:
        raise ValueError(
            f"{path} has version {manifest.get('version')!r}; this program reads {' and '.join(map(str, READABLE))}:"
            f" equihpc data index {folder} writes it anew from the shards"
        )
    try:
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        where = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()[:3])
        raise ValueError(f"{path} is damaged ({where}): equihpc data index {folder} writes it anew from the shards") from None
    for split, entry in manifest["splits"].items():
        names = [
            entry["index"]["name"],
            *([entry["keys"]["name"]] if "keys" in entry else []),
            *(shard["name"] for shard in entry["shards"]),
        ]
        foreign = next((name for name in names if not name or name.startswith("/") or ".." in name.split("/")), None)
        if not SPLIT.fullmatch(split) or foreign is not None:
            raise ValueError(
                f"{path} names {split if foreign is None else foreign!r}: a split is letters, digits, '_', '-', and files lie in its folder"
            )
    return manifest


def _check_size(kind: str, path: Path, expected: int) -> None:
    remedy = "copy it again or write the data set anew"
    try:
        actual = path.stat().st_size
    except FileNotFoundError:
        raise ValueError(f"the {kind} {path.name} is missing in {path.parent}: {remedy}") from None
    if actual != expected:
        raise ValueError(f"the {kind} {path.name} in {path.parent} has {actual} bytes, the manifest says {expected}: {remedy}")
