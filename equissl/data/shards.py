"""A data set: a folder with a manifest, tar shards in WebDataset's convention, and one index per split. No torch.

    manifest.json      version, name, classes, source, and per split: num_images, index and shards with size and sha256
    train-000000.tar   KEY.png (or .jpg), KEY.cls, KEY.png, …: what `webdataset` reads
    train.index.npy    shard, offset, size and label of every sample, memory-mapped: any sample is one `pread` away

The sha256 of manifest.json stands for the whole content. Shards hold nothing that changes from one writing to the next.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from equissl.files import sync_folder, write_json

VERSION = 1
MANIFEST = "manifest.json"
INDEX_DTYPE = np.dtype([("offset", "<u8"), ("shard", "<u4"), ("size", "<u4"), ("label", "<i8")])
OPEN_SHARDS = 64  # file descriptors that one ShardSet keeps
KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")  # no dot: WebDataset ends the key at the first one; short: one plain tar header


class Sample(NamedTuple):
    key: str
    image: bytes  # encoded
    extension: str  # png or jpg
    label: int


# --- writing -----------------------------------------------------------------------------------------------------------


def write_shards(samples: Iterable[Sample], folder: Path, split: str, samples_per_shard: int) -> dict[str, Any]:
    """Write one split's shards and index; returns its entry for the manifest. Raises ValueError for a key that is not plain."""
    index: list[tuple[int, int, int, int]] = []
    shards: list[dict[str, Any]] = []
    for number, members in enumerate(_chunks(samples, samples_per_shard)):
        name = f"{split}-{number:06d}.tar"
        with (folder / name).open("wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for sample in members:
                    if not KEY.fullmatch(sample.key):
                        raise ValueError(f"the key {sample.key!r} is not 1 to 80 letters, digits, '_' and '-'")
                    _add(tar, f"{sample.key}.{sample.extension}", sample.image)
                    # the header just written is one block; the image began after it and is padded to whole blocks
                    offset = tar.offset - -(-len(sample.image) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                    index.append((offset, number, len(sample.image), sample.label))
                    _add(tar, f"{sample.key}.cls", str(sample.label).encode())
            file.flush()
            os.fsync(file.fileno())
        shards.append({**_describe(folder / name), "num_images": len(members)})
    index_path = folder / f"{split}.index.npy"
    with index_path.open("wb") as file:
        np.save(file, np.array(index, dtype=INDEX_DTYPE))
        file.flush()
        os.fsync(file.fileno())
    return {"num_images": len(index), "index": _describe(index_path), "shards": shards}


def write_manifest(folder: Path, name: str, classes: list[str], splits: dict[str, Any], source: dict[str, Any]) -> None:
    """The last file of a data set: a folder without it is not one."""
    write_json(folder / MANIFEST, {"version": VERSION, "name": name, "classes": classes, "source": source, "splits": splits})
    sync_folder(folder)


def manifest_sha256(folder: Path) -> str:
    return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()


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


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": digest}


# --- finding -----------------------------------------------------------------------------------------------------------


def find(data: str) -> Path:
    """The folder of a data set: one that holds manifest.json, a run folder of equissl.prepare, or the built-in name "photographs".

    "photographs" is cut on first use and kept in the user's cache folder. Raises ValueError for anything else.
    """
    if data == "photographs":
        from equissl.config import PrepareConfig
        from equissl.data.photographs import cached

        return cached(PrepareConfig())
    path = Path(data).expanduser()
    for folder in (path, path / "data"):
        if (folder / MANIFEST).is_file():
            return folder
    what = f"the folder has no {MANIFEST}, nor has its subfolder data" if path.is_dir() else "there is no such folder"
    raise ValueError(
        f"data {data!r}: {what}; give a folder with a {MANIFEST}, a finished run folder of equissl.prepare, or the name 'photographs'"
    )


# --- reading -----------------------------------------------------------------------------------------------------------


class ShardSet:
    """One split of a data set with random access. Pickles as names only; files are opened where they are read.

    Raises ValueError for a missing or unreadable manifest, an unknown split, an empty one, and for a shard or index that is
    missing or does not have the manifest's size.
    """

    def __init__(self, folder: Path, split: str) -> None:
        self.folder = Path(folder)
        self.split = split
        manifest = _read_manifest(self.folder)
        if split not in manifest["splits"]:
            raise ValueError(f"{self.folder / MANIFEST} has no split {split!r}; it has {', '.join(manifest['splits'])}")
        entry = manifest["splits"][split]
        self.name: str = manifest["name"]
        self.classes: tuple[str, ...] = tuple(manifest["classes"])
        self.manifest_sha256 = manifest_sha256(self.folder)
        self.num_images: int = entry["num_images"]
        if self.num_images == 0:
            raise ValueError(f"the split {split!r} of {self.folder} has no images")
        self._shards: tuple[str, ...] = tuple(shard["name"] for shard in entry["shards"])
        self._index_name: str = entry["index"]["name"]
        for shard in entry["shards"]:
            _check_size("shard", self.folder / shard["name"], shard["bytes"])
        _check_size("index", self.folder / self._index_name, entry["index"]["bytes"])
        self._reset()
        if len(self._index) != self.num_images or int(self._index["shard"].max()) >= len(self._shards):
            raise ValueError(f"{self.folder / self._index_name} does not fit the manifest: write the data set anew")

    def _reset(self) -> None:
        self._mapped: NDArray[np.void] | None = None
        self._files: OrderedDict[int, int] = OrderedDict()  # shard -> descriptor, least recently used first

    @property
    def _index(self) -> NDArray[np.void]:
        if self._mapped is None:
            self._mapped = np.load(self.folder / self._index_name, mmap_mode="r")
        return self._mapped

    @property
    def labels(self) -> NDArray[np.int64]:
        """Class of every image, `(N,)`: a view of the memory-mapped index."""
        return np.asarray(self._index["label"])

    def __len__(self) -> int:
        return self.num_images

    def read(self, i: int) -> bytes:
        """The encoded image. Raises ValueError where its shard has become shorter than the index says."""
        row = self._index[i]
        return self._pread(int(row["shard"]), int(row["size"]), int(row["offset"]))

    def label(self, i: int) -> int:
        return int(self._index[i]["label"])

    def key(self, i: int) -> str:
        """WebDataset's key, from the tar header before the image."""
        row = self._index[i]
        header = self._pread(int(row["shard"]), tarfile.BLOCKSIZE, int(row["offset"]) - tarfile.BLOCKSIZE)
        return header[:100].split(b"\0")[0].decode().partition(".")[0]

    def _pread(self, shard: int, size: int, offset: int) -> bytes:
        data = os.pread(self._descriptor(shard), size, offset)
        if len(data) != size:
            raise ValueError(f"{self.folder / self._shards[shard]} ends before byte {offset + size}: write the data set anew")
        return data

    def _descriptor(self, shard: int) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        if len(self._files) >= OPEN_SHARDS:
            os.close(self._files.popitem(last=False)[1])
        self._files[shard] = os.open(self.folder / self._shards[shard], os.O_RDONLY)
        return self._files[shard]

    def close(self) -> None:
        """Close the shards; the next read opens them again."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._reset()

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_mapped", "_files")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"there is no {path}: the folder is not a finished data set") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if manifest.get("version") != VERSION:
        raise ValueError(f"{path} has version {manifest.get('version')!r}; this program reads version {VERSION}")
    return manifest


def _check_size(kind: str, path: Path, expected: int) -> None:
    remedy = "copy it again or write the data set anew"
    try:
        actual = path.stat().st_size
    except FileNotFoundError:
        raise ValueError(f"the {kind} {path.name} is missing in {path.parent}: {remedy}") from None
    if actual != expected:
        raise ValueError(f"the {kind} {path.name} in {path.parent} has {actual} bytes, the manifest says {expected}: {remedy}")
