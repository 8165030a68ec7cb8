"""Building data sets: every kind of source in its true format, byte for byte; kills, full disks, bad sources."""

from __future__ import annotations

import csv
import errno
import fcntl
import functools
import gc
import io
import itertools
import json
import logging
import os
import pickle
import pty
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat
from test_disk_full import mounted

import equissl.build
from equissl.config import BuildConfig
from equissl.data import build as module
from equissl.data import sources
from equissl.data.build import KEY_LENGTH, build, cut, make_unique, plain, tar_bytes
from equissl.data.shards import KEY, Sample, ShardSet, describe, manifest_sha256, read_manifest, write_manifest, write_shards
from equissl.data.sources import detect, files_in_tar, unpickle
from equissl.files import DiskFull
from equissl.progress import Stopped

COUNTER = itertools.count()


def encoded(kind: str = "JPEG", side: int = 8) -> bytes:
    """An image like no other."""
    pixels = np.random.default_rng(next(COUNTER)).integers(0, 256, (side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def put(path: Path, content: bytes) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return content


def made(source: Path | str, dest: Path, **values: Any) -> dict[str, dict[str, tuple[bytes, str | None]]]:
    """Build with shards of 5 kB, and read: split -> key -> bytes and name of the class."""
    build(BuildConfig(source=str(source), **{"shard_mb": 0.005, "num_workers": 2, **values}), dest)
    assert not dest.with_name(f"{dest.name}.partial").exists()
    return read(dest)


def read(dest: Path) -> dict[str, dict[str, tuple[bytes, str | None]]]:
    found = {}
    for split in read_manifest(dest)["splits"]:
        data = ShardSet(dest, split)
        labels = [None if label < 0 else data.classes[label] for label in data.labels.tolist()]
        found[split] = {data.key(i): (data.read(i), labels[i]) for i in range(len(data))}
        assert len(found[split]) == len(data)
        data.close()
    return found


def tree(root: Path, counts: dict[str, int]) -> dict[str, tuple[bytes, str | None]]:
    """So many images per class folder, in three formats and spellings."""
    found = {}
    for name, count in counts.items():
        for number in range(count):
            kind, extension = (("JPEG", "JPEG"), ("PNG", "png"), ("JPEG", "jpg"))[number % 3]
            stem = f"{name}_{number}"
            found[stem] = (put(root / name / f"{stem}.{extension}", encoded(kind)), name)
    return found


@pytest.fixture
def flowers(tmp_path: Path) -> Path:
    """60 images of two classes, without splits."""
    tree(tmp_path / "flowers", {"rose": 30, "lily": 30})
    return tmp_path / "flowers"


# --- the sources ------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves the files it has read to the garbage collector
def test_a_tree_of_folders(tmp_path: Path) -> None:
    source = tmp_path / "source"
    expected = {"train": tree(source / "train", {"b": 20, "a": 13}), "val": tree(source / "validation", {"b": 4})}
    put(source / "train" / "a" / "deeper" / "x.y.png", content := encoded("PNG"))
    expected["train"]["x_y"] = (content, "a")
    for name in (".DS_Store", "notes.txt", ".hidden.png"):
        put(source / "train" / "a" / name, b"no image")
    put(source / "train" / ".cache" / "z.png", b"no class")
    assert made(source, tmp_path / "two") == expected
    assert made(source, tmp_path / "one", num_workers=1, name="two") == expected
    assert manifest_sha256(tmp_path / "one") == manifest_sha256(tmp_path / "two"), "the same bytes for any number of workers"
    made(source, tmp_path / "other", seed=1, name="two")
    assert manifest_sha256(tmp_path / "other") != manifest_sha256(tmp_path / "two")

    manifest = read_manifest(tmp_path / "two")
    assert (manifest["name"], manifest["classes"]) == ("two", ["a", "b"])
    assert manifest["source"] == {"kind": "folder", "seed": 0, "shard_mb": 0.005, "left_out": {}}
    assert len(manifest["splits"]["train"]["shards"]) > 3
    urls = [str(tmp_path / "two" / shard["name"]) for shard in manifest["splits"]["train"]["shards"]]
    samples = {sample["__key__"]: sample for sample in webdataset.WebDataset(urls, shardshuffle=False)}
    assert samples.keys() == expected["train"].keys()
    for key, (content, label) in expected["train"].items():
        extension = "png" if content.startswith(b"\x89PNG") else "jpg"
        assert samples[key][extension] == content
        assert samples[key]["cls"] == b"%d" % ["a", "b"].index(str(label))
    gc.collect()


def test_a_tree_without_splits_has_the_one_that_is_said(tmp_path: Path, flowers: Path) -> None:
    assert set(made(flowers, tmp_path / "a")) == {"train"}
    put(flowers / "test" / "x.png", encoded("PNG"))  # a class called like a split
    assert {name for _, name in made(flowers, tmp_path / "b", split="val")["val"].values()} == {"lily", "rose", "test"}


def add(tar: tarfile.TarFile, name: str, content: bytes) -> bytes:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
    return content


def imagenet(root: Path, wnids: tuple[str, ...], truth: list[int], per_class: int = 6) -> dict[str, dict[str, tuple[bytes, str | None]]]:
    """The archives, with the leaves 1, 2, … in the order of `wnids` and an inner node of the hierarchy."""
    root.mkdir()
    expected: dict[str, dict[str, tuple[bytes, str | None]]] = {"train": {}, "val": {}}
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as outer:
        for wnid in sorted(wnids):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for number in range(per_class):
                    content = add(tar, f"{wnid}_{number * 37}.JPEG", encoded())
                    expected["train"][f"{wnid}_{number * 37}"] = (content, wnid)
            add(outer, f"{wnid}.tar", inner.getvalue())
    with tarfile.open(root / "ILSVRC2012_img_val.tar", "w") as tar:
        for number in reversed(range(1, len(truth) + 1)):  # the order in the archive says nothing
            key = f"ILSVRC2012_val_{number:08d}"
            expected["val"][key] = (add(tar, f"{key}.JPEG", encoded()), wnids[truth[number - 1] - 1])
    synsets = np.zeros(len(wnids) + 1, dtype=[("ILSVRC2012_ID", object), ("WNID", object), ("words", object), ("num_children", object)])
    for number, wnid in enumerate(wnids):
        synsets[number] = (number + 1, wnid, "a word", 0)
    synsets[-1] = (len(wnids) + 1, "n00000001", "an inner node", 2)
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        add(tar, "ILSVRC2012_devkit_t12/data/meta.mat", meta.getvalue())
        lines = "".join(f"{number}\n" for number in truth)
        add(tar, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", lines.encode())
    return expected


WNIDS = ("n02119789", "n01440764", "n02100735")


def test_imagenet_from_its_archives(tmp_path: Path) -> None:
    source = tmp_path / "archives"
    expected = imagenet(source, WNIDS, [3, 1, 2, 2, 1])
    assert made(source, tmp_path / "data") == expected
    manifest = read_manifest(tmp_path / "data")
    assert (manifest["name"], manifest["classes"]) == ("imagenet1k", sorted(WNIDS))
    assert manifest["source"]["names"] == [
        "ILSVRC2012_img_train.tar",
        "ILSVRC2012_img_val.tar",
        "ILSVRC2012_devkit_t12.tar.gz",
    ]
    (source / "ILSVRC2012_img_train.tar").unlink()
    assert made(source, tmp_path / "val") == {"val": expected["val"]}
    assert read_manifest(tmp_path / "val")["classes"] == sorted(WNIDS)


def test_imagenets_archives_must_fit_each_other(tmp_path: Path) -> None:
    source = tmp_path / "archives"
    imagenet(source, WNIDS, [1, 2, 3])
    devkit, train, val = (source / f"ILSVRC2012_{name}" for name in ("devkit_t12.tar.gz", "img_train.tar", "img_val.tar"))

    def message() -> str:
        with pytest.raises(ValueError, match="ILSVRC2012") as caught:
            made(source, tmp_path / "data")
        assert not (tmp_path / "data.partial").exists()
        return str(caught.value)

    imagenet(tmp_path / "longer", WNIDS, [1, 2, 3, 1])
    shutil.copy(tmp_path / "longer" / devkit.name, devkit)
    assert "has 3 images and the ground truth in ILSVRC2012_devkit_t12.tar.gz 4 lines" in message()
    imagenet(tmp_path / "fewer", WNIDS[:2], [1, 2, 3 - 1])
    shutil.copy(tmp_path / "fewer" / devkit.name, devkit)
    assert "has 3 classes, ILSVRC2012_devkit_t12.tar.gz 2; only one of them has n02100735" in message()
    whole = devkit.read_bytes()
    devkit.write_bytes(whole[: len(whole) // 2])
    assert "ILSVRC2012_devkit_t12.tar.gz is damaged, cut short or no .tar.gz" in message()
    devkit.unlink()
    assert "but not ILSVRC2012_devkit_t12.tar.gz, which says the classes" in message()
    val.unlink()
    os.truncate(train, train.stat().st_size // 2)
    assert "img_train.tar is damaged, cut short or no tar archive, near byte" in message()
    with pytest.raises(ValueError, match="give the folder that holds them"):
        detect(str(train))


def test_an_archive_that_ends_without_a_mark(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        add(tar, "a.JPEG", b"x" * 600)
    path = tmp_path / "archive"
    for content, said in ((buffer.getvalue(), ""), (buffer.getvalue()[:1536], "no header and no end mark"), (b"", "near byte 7: empty")):
        put(path, b"before " + content)
        if said:
            with pytest.raises(ValueError, match=said):
                files_in_tar(path, 7, len(content))
        else:
            assert files_in_tar(path, 7, len(content)) == [("a.JPEG", 7 + 512, 600)]


def cifar(root: Path, dataset: int, per_batch: int = 8) -> dict[str, dict[str, tuple[np.ndarray, str]]]:
    """All four forms of the same images: folder and archive, binary and pickled as Python 2 did."""
    fine = [f"fine_{number}" for number in range(dataset)]
    batches = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"] if dataset == 10 else ["train", "test"]
    binary, pickled = (
        root / name for name in {10: ("cifar-10-batches-bin", "cifar-10-batches-py")}.get(dataset, ("cifar-100-binary", "cifar-100-python"))
    )
    rng = np.random.default_rng(dataset)
    expected: dict[str, dict[str, tuple[np.ndarray, str]]] = {"train": {}, "val": {}}
    for name in batches:
        pixels = rng.integers(0, 256, (per_batch, 3072), dtype=np.uint8)
        labels = rng.integers(0, dataset, per_batch).tolist()
        split = "val" if name.startswith("test") else "train"
        for row, label in zip(pixels, labels, strict=True):
            expected[split][f"{split}-{len(expected[split]):05d}"] = (row.reshape(3, 32, 32).transpose(1, 2, 0), fine[label])
        head = [[label] if dataset == 10 else [7, label] for label in labels]
        put(binary / f"{name}.bin", np.concatenate([np.array(head, dtype=np.uint8), pixels], axis=1).tobytes())
        key = "labels" if dataset == 10 else "fine_labels"
        put(pickled / name, pickle.dumps({key.encode(): labels, b"data": pixels, b"filenames": [b"x.png"] * per_batch}, protocol=2))
    words = "\n".join(fine) + "\n\n"
    put(binary / ("batches.meta.txt" if dataset == 10 else "fine_label_names.txt"), words.encode())
    key = "label_names" if dataset == 10 else "fine_label_names"
    put(pickled / ("batches.meta" if dataset == 10 else "meta"), pickle.dumps({key.encode(): [name.encode() for name in fine]}, protocol=2))
    for folder, form in ((binary, "binary"), (pickled, "python")):
        with tarfile.open(root / f"cifar-{dataset}-{form}.tar.gz", "w:gz") as tar:
            tar.add(folder, folder.name)
    return expected


@pytest.mark.parametrize("dataset", [10, 100])
def test_cifar_in_its_own_files(dataset: int, tmp_path: Path) -> None:
    expected = cifar(tmp_path, dataset)
    splits = []
    for number, place in enumerate(sorted(tmp_path.glob("cifar-*"))):
        found = made(place, tmp_path / str(number), shard_mb=0.05)
        assert {split: found[split].keys() for split in found} == {split: expected[split].keys() for split in expected}
        for split, images in expected.items():
            for key, (pixels, name) in images.items():
                content, label = found[split][key]
                assert np.array_equal(np.asarray(Image.open(io.BytesIO(content))), pixels)
                assert label == name
        manifest = read_manifest(tmp_path / str(number))
        assert manifest["name"] == f"cifar{dataset}"
        assert len(manifest["classes"]) == dataset
        splits.append(manifest["splits"])
    assert len(splits) == 4
    assert splits.count(splits[0]) == 4, "the same bytes from every form"


class Trap:
    """A pickle that would make a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_wants_more_than_arrays_is_refused_without_running_it(tmp_path: Path) -> None:
    cifar(tmp_path, 10)
    place, trap = tmp_path / "cifar-10-batches-py", tmp_path / "trap"
    for protocol in (0, 2, 4):
        content = put(place / "data_batch_3", pickle.dumps({b"labels": [0], b"data": Trap(trap)}, protocol))
        with pytest.raises(ValueError, match=r"data_batch_3 is no pickle of CIFAR: it asks for posix\.mkdir\. Nothing in it was run"):
            made(place, tmp_path / "data")
        assert not trap.exists()
    pickle.loads(content)
    assert trap.exists(), "the trap works"
    assert not (tmp_path / "data.partial").exists()


@pytest.mark.parametrize(
    "name", ["numpy load", "numpy.core.multiarray scalar", "builtins eval", "_codecs lookup", "equissl.data.sources open_source"]
)
def test_nothing_near_to_what_is_allowed_is_allowed(name: str) -> None:
    with pytest.raises(ValueError, match=f"x is no pickle of CIFAR: it asks for {name.replace(' ', '.')}"):
        unpickle(f"c{name.replace(' ', chr(10))}\n.".encode(), "x")


def test_damaged_cifar(tmp_path: Path) -> None:
    cifar(tmp_path, 10)
    cifar(tmp_path / "more", 100)
    python, binary = tmp_path / "cifar-10-batches-py", tmp_path / "cifar-10-batches-bin"
    os.truncate(binary / "data_batch_2.bin", 3073 * 2 + 5)
    os.truncate(python / "test_batch", 1000)
    archive = tmp_path / "cifar-10-python.tar.gz"
    os.truncate(archive, archive.stat().st_size // 2)
    for place, said in (
        (binary, r"data_batch_2\.bin is not a batch of cifar10"),
        (python, "test_batch is no pickle"),
        (archive, "is damaged"),
    ):
        with pytest.raises(ValueError, match=said):
            made(place, tmp_path / "data")
    (binary / "data_batch_2.bin").unlink()
    with pytest.raises(ValueError, match=r"lacks data_batch_2\.bin: unpack cifar-10-binary\.tar\.gz again"):
        made(binary, tmp_path / "data")
    shutil.copytree(tmp_path / "more", tmp_path, dirs_exist_ok=True)
    with pytest.raises(ValueError, match="holds both CIFAR-10 and CIFAR-100: give"):
        made(tmp_path, tmp_path / "data")


@pytest.mark.parametrize("form", ["tsv", "csv", "jsonl", "headless"])
def test_lists(form: str, tmp_path: Path) -> None:
    names = {"rose": 3, "lily": 2, "": 1}
    rows, expected = [], {"train": {}, "holdout": {}}
    for label, count in names.items():
        for number in range(count):
            path, split = f'im ages/{label}"{number}.JPG', "train" if number else "holdout"
            rows.append({"path": path, "label": label, "split": split})
            expected[split][plain(f'{label}"{number}').decode()] = (put(tmp_path / path, encoded()), label or None)
    listed = tmp_path / f"list.{'csv' if form == 'headless' else form}"
    with listed.open("w", newline="") as file:
        if form == "jsonl":
            file.write("".join(json.dumps({key: value for key, value in row.items() if value}) + "\n" for row in rows))
        elif form == "tsv":
            file.write("\ufefflabel\tpath\tcomment\tsplit\r\n")
            file.write("".join(f"{row['label']}\t{row['path']}\tnice\t{row['split']}\r\n" for row in rows))
        else:
            writer = csv.DictWriter(file, ["path", "label", "split"])
            if form == "csv":
                writer.writeheader()
            writer.writerows(rows)
    assert made(listed, tmp_path / "data") == expected
    assert read_manifest(tmp_path / "data")["classes"] == ["lily", "rose"]


def test_numbers_as_labels_and_none_at_all(tmp_path: Path) -> None:
    for number in range(3):
        put(tmp_path / f"{number}.png", encoded("PNG"))
    put(tmp_path / "a.tsv", b"0.png\t2\n1.png\t0\n2.png\t2\n")
    put(tmp_path / "b.tsv", b"0.png\n1.png\n0.png\n")
    assert [label for _, label in made(tmp_path / "a.tsv", tmp_path / "a")["train"].values()].count("2") == 2
    assert read_manifest(tmp_path / "a")["classes"] == ["0", "1", "2"]
    found = made(tmp_path / "b.tsv", tmp_path / "b", split="unlabelled")["unlabelled"]
    assert {label for _, label in found.values()} == {None}
    assert found.keys() == {"0", "1", "0-1"}
    assert read_manifest(tmp_path / "b")["classes"] == []


ITERABLE = """
import os
def images():
    for number in range(12):
        yield bytes([number]) * 50, "JPEG" if number % 2 else ".png", number % 3
"""


def test_iterables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [(bytes([number]) * 50, "jpg", f"class {number % 2}" if number else None, f"my key.{number}") for number in range(20)]
    build(BuildConfig(source="mine", kind="iterable", split="val", num_workers=1), tmp_path / "data", samples=iter(samples))
    assert read(tmp_path / "data") == {"val": {key.replace(" ", "_").replace(".", "_"): (image, name) for image, _, name, key in samples}}

    put(tmp_path / "generated_images.py", ITERABLE.encode())
    monkeypatch.syspath_prepend(str(tmp_path))
    expected = {f"train-{number:08d}": (bytes([number]) * 50, str(number % 3)) for number in range(12)}
    assert made("generated_images:images", tmp_path / "other") == {"train": expected}
    assert read_manifest(tmp_path / "other")["source"]["names"] == ["generated_images:images"]


@pytest.mark.parametrize(
    ("sample", "said"),
    [
        (b"x", "sample 1 of mine is b'x'; it must be a tuple"),
        (("x", "png", 0), "it must be a tuple"),
        ((b"x", "txt", 0), "sample 1 of mine has the extension 'txt'; it must be one of jpg"),
        ((b"x", "png", 1.5), r"sample 1 of mine: the label 1\.5 is neither the number"),
        ((b"x", "png", -2), "the label -2 is neither"),
        ((b"x", "png", "rose"), r"mine: some labels are numbers \(0 of train-00000000\), others names \('rose'\)"),
    ],
)
def test_an_iterable_that_yields_something_else(sample: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        build(BuildConfig(source="mine", kind="iterable"), tmp_path / "data", samples=[(b"x", "png", 0), sample])
    assert not list(tmp_path.iterdir())


def test_resharding_what_webdataset_wrote(tmp_path: Path) -> None:
    """Keys with folders and long names, .cls and .json, several extensions; the first dot ends the key."""
    source, expected = tmp_path / "source", {"train": {}, "val": {}}
    source.mkdir()
    with webdataset.ShardWriter(str(source / "train-%04d.tar"), maxcount=7, verbose=0) as writer:
        for number in range(20):
            key, content = f"{'deep/' * 25}n01/im{number}", encoded("PNG" if number % 2 else "JPEG")
            label = {"cls": number % 3} if number % 4 else {"json": {"label": number % 3, "note": "ä"}}
            writer.write({"__key__": key, ("seg.png" if number == 8 else "png") if number % 2 or number == 8 else "jpeg": content, **label})
            expected["train"][plain(key[-KEY_LENGTH:]).decode()] = (content, str(number % 3))
    with webdataset.TarWriter(str(source / "my_validation.tar")) as writer:
        for number in range(5):
            content = encoded()
            writer.write({"__key__": f"x{number}", "jpg": content, "txt": "no label"})
            expected["val"][f"x{number}"] = (content, None)
    found = made(source, tmp_path / "data")
    assert found["val"] == expected["val"]
    assert sorted(found["train"].values()) == sorted(expected["train"].values())
    assert all(KEY.fullmatch(key) for key in found["train"])
    assert set(made(source / "train-0001.tar", tmp_path / "one", split="some")["some"].values()) <= set(found["train"].values())


def test_resharding_a_data_set_of_ours_keeps_all_but_the_order(tmp_path: Path, photographs: Path) -> None:
    for place in (photographs, photographs.parent):  # the folder, or the run of equissl.prepare that holds it
        assert made(place, tmp_path / place.name, shard_mb=1) == read(photographs)
    manifest = read_manifest(tmp_path / photographs.name)
    assert manifest["classes"] == read_manifest(photographs)["classes"]
    assert manifest["source"]["manifest_sha256"] == manifest_sha256(photographs)
    assert len(manifest["splits"]["train"]["shards"]) == 2
    # labels are those of the index, whatever the shards say
    relabelled = tmp_path / "relabelled"
    relabelled.mkdir()
    entry = write_shards([Sample("a", encoded(), "jpg", 1), Sample("b", encoded(), "jpg", 0)], relabelled, "train", 1)
    rows = np.load(relabelled / "train.index.npy")
    rows["label"] = [0, -1]
    np.save(relabelled / "train.index.npy", rows)
    entry["index"] = describe(relabelled / "train.index.npy")
    write_manifest(relabelled, "again", ["x", "y"], {"train": entry, "val": write_shards([], relabelled, "val", 1)}, {})
    assert {key: label for key, (_, label) in made(relabelled, tmp_path / "c")["train"].items()} == {"a": "x", "b": None}


def cut_shard(folder: Path, entry: dict[str, Any]) -> None:
    os.truncate(folder / "train-000001.tar", 5120)


def flip_a_byte(folder: Path, entry: dict[str, Any]) -> None:
    content = bytearray((folder / "train-000001.tar").read_bytes())
    content[600] ^= 1
    (folder / "train-000001.tar").write_bytes(content)


def foreign_index(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path, dict[str, Any]], None]:
    """An index, with its sha256 in the manifest, that is not of these shards."""

    def apply(folder: Path, entry: dict[str, Any]) -> None:
        path = folder / "train.index.npy"
        np.save(path, change(np.load(path)))
        entry["index"] = describe(path)

    return apply


def shift(rows: np.ndarray) -> np.ndarray:
    rows["offset"][6:10] += 512
    return rows


def fewer(folder: Path, entry: dict[str, Any]) -> None:
    """A manifest and an index that agree on less than the shard holds."""
    foreign_index(lambda rows: rows[:-4])(folder, entry)
    entry["num_images"] -= 4
    entry["shards"][-1]["num_images"] -= 4


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut_shard, r"train-000001\.tar in .*source has 5120 bytes, the manifest says"),
        (flip_a_byte, r"train-000001\.tar in .*source was changed: its sha256"),
        (foreign_index(shift), r"the 5 images of train-000001\.tar in .*source are not the 5 of the index: equihpc data verify"),
        (foreign_index(lambda rows: rows[:-4]), r"the 5 images of train-000003\.tar in .*source are not the 1 of the index"),
        (foreign_index(lambda rows: np.append(rows, rows[-4:])), r"the 5 images of train-000003\.tar .* are not the 9 of the index"),
        (fewer, r"the 5 images of train-000003\.tar in .*source are not the 1 of the index"),
    ],
)
def test_a_damaged_data_set_of_ours_is_not_resharded(
    tmp_path: Path, damage: Callable[[Path, dict[str, Any]], None], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (source := tmp_path / "source").mkdir()
    entry = write_shards([Sample(f"k{number}", encoded(), "jpg", 0) for number in range(20)], source, "train", 5)
    damage(source, entry)
    write_manifest(source, "ours", ["a"], {"train": entry}, {})
    with pytest.raises(ValueError, match=said):
        made(source, tmp_path / "data", num_workers=1)
    assert not list(tmp_path.glob("data*"))


def test_no_split_leads_out_of_the_folder(tmp_path: Path, flowers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither that of a foreign manifest nor, whatever the source has let through, that of an image."""
    dest = tmp_path / "deep" / "data"
    (source := tmp_path / "source").mkdir()
    entry = write_shards([Sample("a", encoded(), "jpg", 0)], source, "train", 1)
    write_manifest(source, "ours", ["a"], {"../evil": entry}, {})
    with pytest.raises(ValueError, match=r"'\.\./evil'"):
        made(source, dest)
    monkeypatch.setattr(sources, "SPLIT", re.compile(".*"))
    put(flowers / "list.tsv", b"rose/rose_0.JPEG\t0\t../evil\n")
    with pytest.raises(ValueError, match=r"list\.tsv: the split '\.\./evil' is not 1 to 40 letters"):
        made(flowers / "list.tsv", dest)
    assert not list(tmp_path.rglob("*evil*"))
    assert not list(dest.parent.iterdir())


def test_an_image_too_large_for_the_index_is_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number in range(120):
            add(tar, f"{number}.png", b"x")
        member = tarfile.TarInfo("huge.png")
        member.size = 2**32
        tar.addfile(member)  # only the header: the file has a hole
    put(tmp_path / "a.tar", buffer.getvalue()[: tar.offset])
    os.truncate(tmp_path / "a.tar", tar.offset + 2**32 + tarfile.RECORDSIZE)
    assert len(made(tmp_path / "a.tar", tmp_path / "data", shard_mb=1)["train"]) == 120
    assert "left out, without image: huge in a.tar" in caplog.text


# --- keys, cuts -------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=60), st.integers(1, 3 * 10**6))
def test_shards_are_about_equal_and_cover_everything(sizes: list[int], shard_bytes: int) -> None:
    num_bytes = tar_bytes(np.array(sizes), np.array([size % 2 == 0 for size in sizes]))
    cuts = cut(num_bytes, shard_bytes)
    assert cuts[0] == 0
    assert cuts[-1] == len(sizes)
    assert np.all(np.diff(cuts) > 0)
    written = np.add.reduceat(num_bytes, cuts[:-1])
    assert len(written) <= -(-num_bytes.sum() // shard_bytes)
    assert written.max() <= shard_bytes + num_bytes.max()
    assert np.abs(written - num_bytes.sum() / -(-num_bytes.sum() // shard_bytes)).max() <= num_bytes.max() or len(written) < len(sizes)


def test_bytes_of_a_sample_are_those_that_are_written(tmp_path: Path) -> None:
    for size, label in itertools.product((1, 511, 512, 513), (-1, 12)):
        entry = write_shards([Sample("a", bytes(size), "png", label)] * 40, tmp_path, "train", 40)
        needed = 40 * int(tar_bytes(np.array([size]), np.array([label >= 0]))[0]) + 2 * 512
        assert entry["shards"][0]["bytes"] == -(-needed // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(["a", "a-1", "a-2", "a-1-1", "ä.b/c", "", "k" * 90, "k" * 70]) | st.text(max_size=5), min_size=1, max_size=40)
)
def test_keys_become_plain_and_unique_and_stay_where_they_can(names: list[str]) -> None:
    keys = np.array([plain(name) for name in names], dtype="S80")
    before = keys.copy()
    make_unique(keys)
    assert len(set(keys.tolist())) == len(names)
    assert all(KEY.fullmatch(key.decode()) for key in keys.tolist())
    _, first = np.unique(before, return_index=True)
    assert np.array_equal(keys[first], before[first])


def test_the_order_is_a_permutation_that_mixes_the_classes(tmp_path: Path, flowers: Path) -> None:
    made(flowers, tmp_path / "data")
    labels = ShardSet(tmp_path / "data", "train").labels
    runs = 1 + np.count_nonzero(np.diff(labels))
    assert abs(runs - 31) < 4 * 3.84  # mean and standard deviation of the number of runs of 30 + 30
    assert all(0 < labels[start : start + 20].mean() < 1 for start in (0, 20, 40))


# --- kills, full disks, what cannot be read -------------------------------------------------------------------------------


BLOCKED = """
import os, sys
from pathlib import Path
from equissl.config import BuildConfig
from equissl.data.build import build
source, dest, victim = map(Path, sys.argv[1:])
def report(stage, images, of, num_bytes):
    if stage == "write" and victim.is_file():  # the scan is through: from now on this image cannot be opened without a writer
        os.rename(victim, victim.with_suffix(".away"))
        os.mkfifo(victim)
build(BuildConfig(source=str(source), shard_mb=0.005, num_workers=2), dest, report=report)
"""


def until(is_so: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.02)


def identities(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.tar")}


def finished_in(work: Path) -> dict[str, tuple[int, int]]:
    """Shards with what is saved beside them last: one whose writer was interrupted between the two is written again."""
    return {name: identity for name, identity in identities(work / "data").items() if (work / f"{name}.npz").is_file()}


def test_a_kill_in_the_middle_of_a_shard_keeps_those_that_are_finished(
    tmp_path: Path, flowers: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made(flowers, tmp_path / "whole", name="data")
    dest, work = tmp_path / "data", tmp_path / "data.partial"
    whole = ShardSet(tmp_path / "whole", "train")
    shard = int(np.searchsorted(np.cumsum(whole.shard_sizes), 15, side="right"))
    (victim,) = flowers.rglob(f"{whole.key(15)}.*")
    process = subprocess.Popen([sys.executable, "-c", BLOCKED, flowers, dest, victim])
    try:
        until(lambda: len(list(work.glob("*.npz"))) == shard + 3)  # those before it, and what two workers have queued up behind it
        with pytest.raises(ValueError, match=r"another build into .*data is running: wait"):
            build(BuildConfig(source=str(flowers)), dest)
    finally:
        process.kill()
        process.wait()
    (half,) = (work / "data").glob(".*")
    until(lambda: not Path(f"/proc/{half.name.rpartition('.')[2]}").exists())  # the worker ends with its parent
    os.rename(victim.with_suffix(".away"), victim)
    finished = identities(work / "data")
    assert len(finished) == shard + 3 > 3
    stages = []
    build(
        BuildConfig(source=str(flowers), shard_mb=0.005, num_workers=1),
        dest,
        report=lambda stage, images, of, num_bytes: stages.append((stage, images)),
    )
    assert manifest_sha256(dest) == manifest_sha256(tmp_path / "whole")
    assert read(dest) == read(tmp_path / "whole")
    assert finished.items() <= identities(dest).items(), "kept, not written again"
    assert {stage for stage, _ in stages} == {"listing", "write"}, "the scan is kept too"
    assert not work.exists()
    assert not list(dest.glob(".*"))
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


def stopped(dest: Path, source: Path, **values: Any) -> None:
    """A build that was stopped after its first shard."""
    seen: list[str] = []
    config = BuildConfig(source=str(source), **{"shard_mb": 0.005, "num_workers": 1, **values})
    with pytest.raises(Stopped):
        build(config, dest, lambda: "write 1" in seen, lambda stage, images, of, _: seen.append(f"{stage} {min(images, 1)}"))
    assert list(dest.with_name(f"{dest.name}.partial").glob("*.npz"))


def test_a_change_of_source_or_settings_begins_anew_and_says_so(tmp_path: Path, flowers: Path, caplog: pytest.LogCaptureFixture) -> None:
    stopped(tmp_path / "a", flowers)
    made(flowers, tmp_path / "a", seed=3)
    assert "cannot be gone on with (changed: seed): the build begins anew" in caplog.text
    stopped(tmp_path / "b", flowers)
    image = put(flowers / "rose" / "rose_0.JPEG", encoded(side=9))
    assert made(flowers, tmp_path / "b")["train"]["rose_0"] == (image, "rose")
    assert "changed: the source's files" in caplog.text
    stopped(tmp_path / "c", flowers)
    os.utime(flowers / "rose" / "rose_1.png", (1, 1))
    made(flowers, tmp_path / "c", name="b")
    assert manifest_sha256(tmp_path / "c") == manifest_sha256(tmp_path / "b")
    assert caplog.text.count("begins anew") == 3
    (tmp_path / "d.partial").mkdir()
    put(tmp_path / "d.partial" / "train.rows", b"half")
    put(tmp_path / "d.partial" / module.LOCK, b"")
    made(flowers, tmp_path / "d")
    assert "holds a scan that was not finished" in caplog.text


def test_damaged_shards_of_a_stopped_build_are_written_again(tmp_path: Path, flowers: Path) -> None:
    made(flowers, tmp_path / "whole", name="data")
    stopped(tmp_path / "data", flowers)
    shard = min((tmp_path / "data.partial" / "data").glob("*.tar"))
    os.truncate(shard, 512)
    made(flowers, tmp_path / "data")
    assert manifest_sha256(tmp_path / "data") == manifest_sha256(tmp_path / "whole")


def test_a_full_disk_leaves_nothing_to_read_and_the_build_goes_on_when_there_is_room(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for number in range(40):
        put(source / "a" / f"{number}.png", os.urandom(50_000))
    made(source, tmp_path / "data", shard_mb=0.2)
    with mounted(tmp_path / "small", "size=1m") as folder:
        dest = folder / "data"
        with pytest.raises(DiskFull) as caught:
            made(source, dest, shard_mb=0.2)
        text = str(caught.value)
        assert "No space left on device: train-0000" in text
        assert text.endswith("then start the same run again: what it had finished is untouched, and it goes on from there")
        assert not dest.exists()
        assert not list(folder.rglob("manifest.json"))
        assert not list(folder.rglob(".*")), "nothing half-written takes room"
        finished = finished_in(folder / "data.partial")
        assert finished
        subprocess.run(["mount", "-o", "remount,size=8m", folder], check=True)
        assert made(source, dest, shard_mb=0.2) == read(tmp_path / "data")
        assert manifest_sha256(dest) == manifest_sha256(tmp_path / "data")
        assert finished.items() <= identities(dest).items()


def test_a_disk_full_in_the_scan_leaves_nothing(tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "size=1m") as folder:
        with pytest.raises(DiskFull, match=r"No space left on device: data\.partial cannot be written"):
            build(BuildConfig(source="mine", kind="iterable"), folder / "data", samples=((os.urandom(50_000), "png", 0) for _ in range(40)))
        assert not list(folder.iterdir())


def test_one_in_a_hundred_may_be_empty_or_unreadable(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tmp_path / "source"
    for number in range(200):
        put(source / "a" / f"{number}.png", b"image %d" % number)
    put(source / "a" / "7.png", b"")
    (source / "a" / "8.png").unlink()
    (source / "a" / "8.png").symlink_to("nowhere")
    found = made(source, tmp_path / "data", shard_mb=0.1)
    assert found["train"].keys() == {str(number) for number in range(200)} - {"7", "8"}
    assert read_manifest(tmp_path / "data")["source"]["left_out"] == {"empty": 1, "unreadable": 1}
    assert caplog.text.count("left out, empty: 7.png in a/7.png") == 1
    assert caplog.text.count("left out, unreadable: 8.png in a/8.png") == 1
    put(source / "a" / "9.png", b"")
    with pytest.raises(ValueError, match=r"of 200 images more than 1% cannot be used; 2 are empty, 1 are unreadable, the first is 7\.png"):
        made(source, tmp_path / "more")
    assert not (tmp_path / "more.partial").exists()


def test_what_cannot_be_read_later_is_left_out_and_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Images that vanish or change after the scan."""
    source = tmp_path / "source" / "a"
    for number in range(120):
        put(source / f"{number}.png", b"image %d" % number)

    def damage(*names: str, shorter: bool = False) -> Callable[..., None]:
        def report(stage: str, images: int, of: int | None, num_bytes: int) -> None:
            if stage == "write" and not list(source.glob("*.away")):
                for name in names:
                    (source / f"{name}.png").rename(source / f"{name}.away")
                    if shorter:
                        put(source / f"{name}.png", b"im")

        return report

    def mend() -> None:
        for path in source.glob("*.away"):
            path.replace(path.with_suffix(".png"))

    config = BuildConfig(source=str(source.parent), shard_mb=0.03, num_workers=1)
    build(config, tmp_path / "one", report=damage("0"))
    assert caplog.text.count("left out, unreadable: 0.png in a/0.png: No such file or directory") == 1
    assert read_manifest(tmp_path / "one")["source"]["left_out"] == {"unreadable": 1}
    assert read(tmp_path / "one")["train"].keys() == {str(number) for number in range(1, 120)}
    mend()
    with pytest.raises(ValueError, match=r"of 120 images more than 1% cannot be used; [23] are unreadable, the first is \d\.png in a/"):
        build(config, tmp_path / "two", report=damage("0", "1", "2"))
    mend()
    caplog.clear()
    build(config, tmp_path / "two")
    assert len(read(tmp_path / "two")["train"]) == 120
    assert caplog.text == ""
    build(config, tmp_path / "three", report=damage("5", shorter=True))
    assert "5.png in a/5.png: its size has changed since the scan" in caplog.text
    assert len(read(tmp_path / "three")["train"]) == 119


# --- what is refused --------------------------------------------------------------------------------------------------------


def empty_class(root: Path) -> None:
    tree(root, {"rose": 2})
    (root / "lily").mkdir()


def surplus(root: Path) -> None:
    tree(root / "train", {"rose": 2})
    tree(root / "val", {"tulip": 2})


def loose(root: Path) -> None:
    tree(root / "train", {"rose": 2})
    put(root / "val" / "1.png", encoded())


def a_shard(*names: str, end: int | None = None) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for name in names:
                add(tar, name, b"{" if name.endswith("json") else b"x" * 3000)
        put(root / "train.tar", buffer.getvalue()[:end])

    return make


def a_list(text: str, suffix: str = "tsv") -> Callable[[Path], None]:
    def make(root: Path) -> None:
        put(root / "0.png", encoded("PNG"))
        put(root / f"list.{suffix}", text.encode("latin1"))

    return make


BAD: dict[str, tuple[Callable[[Path], Any], dict[str, Any], str]] = {
    "nowhere": (lambda root: None, {"source": "nowhere"}, "there is no nowhere: give a folder, an archive, a list"),
    "empty": (lambda root: root.mkdir(), {}, "no classes in .*source: it must hold a folder of images for each class"),
    "no images": (lambda root: (root / "a").mkdir(parents=True), {"split": "train"}, "source/a has no images: put some there"),
    "nested": (lambda root: tree(root / "x" / "y", {"a": 2}), {}, "source/x has no images: if it is a class with folders inside"),
    "loose": (loose, {}, "source/val has images outside of the classes' folders: move them"),
    "empty class": (empty_class, {}, "lily has no images: put some there, or remove it"),
    "surplus": (surplus, {}, "val has classes that train does not have: tulip"),
    "twice": (
        lambda root: [tree(root / name, {"a": 2}) for name in ("val", "valid")],
        {},
        "folders val, valid: they must be splits, each once",
    ),
    "split": (lambda root: tree(root, {"a": 2}), {"split": "a/b"}, "the split 'a/b' is not 1 to 40 letters"),
    "kind": (lambda root: tree(root, {"a": 2}), {"kind": "imagenet"}, "has neither ILSVRC2012_img_train.tar nor"),
    "no cifar": (lambda root: tree(root, {"a": 2}), {"kind": "cifar"}, "holds no CIFAR: give one of cifar-10-python"),
    "no shards": (lambda root: tree(root, {"a": 2}), {"kind": "shards"}, r"has no shards \*\.tar"),
    "compressed": (lambda root: put(root / "a.tar.gz", b"x"), {"kind": "shards"}, "only compressed ones.*unpack them"),
    "file": (lambda root: put(root, b"x"), {}, "is no source that is known by its name: a list ends in .tsv"),
    "file as folder": (lambda root: put(root, b"x"), {"kind": "folder"}, "is a file; a source of kind folder is a folder"),
    "cut shard": (a_shard("a.png", "b.png", end=4000), {}, "the shard .*train.tar is damaged or cut short near byte"),
    "shard without end": (a_shard("a.png", end=512 + 3072), {}, "no header and no end mark"),
    "no images in shards": (a_shard("a.txt", "b.txt"), {}, "has no images; 2 are without image, the first is a in train.tar"),
    "bad json": (a_shard("a.png", "a.json"), {}, "the label of the sample a in .*train.tar: Expecting property name"),
    "two splits": (lambda root: put(root / "train-val.tar", b"x"), {}, "train-val.tar has the splits train, val: give the split"),
    "missing": (
        a_list("path\tlabel\n0.png\t1\n1.png\t1\n"),
        {"list": "tsv"},
        r"list\.tsv:3: there is no file '1\.png'; paths are relative",
    ),
    "columns": (a_list("0.png\t1\n0.png\n"), {"list": "tsv"}, r"list\.tsv:2: 1 columns, but there must be 2"),
    "many columns": (a_list("0.png,1,train,more\n", "csv"), {"list": "csv"}, r"list\.csv:1: 4 columns, but there must be 3"),
    "quote": (a_list('0.png,"a"b\n', "csv"), {"list": "csv"}, r"list\.csv:1: "),
    "no image": (
        a_list("0.txt\t1\n"),
        {"list": "tsv"},
        r"list\.tsv:1: the path '0\.txt' is not that of an image: it must end in one of jpg",
    ),
    "json": (a_list('{"path": "0.png"}\n{"path"\n', "jsonl"), {"list": "jsonl"}, r"list\.jsonl:2: not JSON"),
    "no object": (a_list("\n[1]\n", "jsonl"), {"list": "jsonl"}, r"list\.jsonl:2: \[1\] is not an object"),
    "label": (a_list('{"path": "0.png", "label": 1.5}\n', "jsonl"), {"list": "jsonl"}, r"list\.jsonl:1: the label 1\.5 is neither"),
    "mixed": (a_list("0.png\t1\n0.png\trose\n"), {"list": "tsv"}, r"some labels are numbers \(1 of 0\), others names \('rose'\)"),
    "list's split": (a_list("0.png\t1\t\xe4\n".encode().decode("latin1")), {"list": "tsv"}, r"list\.tsv:1: the split 'ä' is not"),
    "split twice": (a_list("0.png\t1\ta\n"), {"list": "tsv", "split": "b"}, r"list\.tsv:1: the list says the split itself"),
    "latin1": (a_list("\xe4.png\n"), {"list": "tsv"}, r"list\.tsv is not UTF-8"),
    "empty list": (a_list("path\tlabel\n"), {"list": "tsv"}, "list.tsv has no images"),
    "no list": (lambda root: put(root, b"x"), {"kind": "list"}, "must end in one of .tsv, .csv, .jsonl, which says how to read it"),
    "module": (lambda root: None, {"source": "no_such_module:f"}, "there is no module 'no_such_module'"),
    "function": (lambda root: None, {"source": "json:no_such"}, "json has no function 'no_such'"),
}


@pytest.mark.parametrize("case", BAD)
def test_one_message_for_each_bad_source(case: str, tmp_path: Path) -> None:
    make, values, said = BAD[case]
    make(source := tmp_path / "source")
    if "list" in values:
        source = source / f"list.{values['list']}"
    values = {"source": str(source), **{key: value for key, value in values.items() if key != "list"}}
    with pytest.raises(ValueError, match=said):
        build(BuildConfig(**values), tmp_path / "data")
    assert not list(tmp_path.glob("data*")), "nothing is left behind"


def test_places_that_are_taken(tmp_path: Path, flowers: Path) -> None:
    note = tmp_path / "other.partial" / "note.txt"
    put(note, b"mine")
    with pytest.raises(ValueError, match=r"other\.partial, where the build would work, is there already and not of a build"):
        build(BuildConfig(source=str(flowers)), tmp_path / "other")
    put(tmp_path / "other", b"mine too")
    with pytest.raises(ValueError, match="other is there already"):
        build(BuildConfig(source=str(flowers)), tmp_path / "other")
    assert note.exists()
    (tmp_path / "data").mkdir()
    for dest in (tmp_path / "data", flowers):
        with pytest.raises(ValueError, match="is there already: give another DEST, or remove it first"):
            build(BuildConfig(source=str(flowers)), dest)
    with pytest.raises(ValueError, match="lies in the source"):
        build(BuildConfig(source=str(flowers)), flowers / "tulip" / "data")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "flowers", "other", "other.partial"]


def test_a_place_without_locks(tmp_path: Path, flowers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(tmp_path / "begun", flowers)
    before = sorted((tmp_path / "begun.partial").rglob("*"))

    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    for name in ("data", "begun"):
        with pytest.raises(ValueError, match=rf"{name}\.partial cannot be locked \(Function not implemented\): build on another file"):
            build(BuildConfig(source=str(flowers)), tmp_path / name)
    assert not list(tmp_path.glob("data*"))
    assert sorted((tmp_path / "begun.partial").rglob("*")) == before


# --- the entry and the command ---------------------------------------------------------------------------------------------


def test_the_entry_stops_and_goes_on(tmp_path: Path, flowers: Path) -> None:
    config = {"source": str(flowers), "shard_mb": 0.005, "num_workers": 1}
    (run_dir := tmp_path / "run").mkdir()
    assert equissl.build.main(config, run_dir, lambda: any((run_dir / "data.partial").glob("*.npz"))) is None
    finished = finished_in(run_dir / "data.partial")
    assert finished
    result = equissl.build.main(config, run_dir, lambda: False)
    assert result == {"num_images": {"train": 60}, "num_classes": 2, "manifest_sha256": manifest_sha256(run_dir / "data")}
    assert finished.items() <= identities(run_dir / "data").items()
    assert read_manifest(run_dir / "data")["name"] == "flowers"
    (run_dir / "data.partial").mkdir()  # what a kill after the last rename leaves
    put(run_dir / "data.partial" / "train.rows", b"rows")
    assert equissl.build.main(config, run_dir, lambda: pytest.fail("a finished data set is not built again")) == result
    assert not (run_dir / "data.partial").exists()
    progress = json.loads((run_dir / "progress.json").read_text())
    assert (progress["stage"], progress["step"], progress["num_steps"]) == ("write", 60, 60)


def test_a_job_needs_one_process_and_a_whole_path() -> None:
    BuildConfig(source="/data").check(1, {})
    BuildConfig(source="module:function").check(1, {})
    with pytest.raises(ValueError, match="one process, which starts its own, not 4"):
        BuildConfig(source="/data").check(4, {})
    with pytest.raises(ValueError, match=r"source 'data/x' is relative"):
        BuildConfig(source="data/x").check(1, {})


def command(*words: Any, cwd: Path, **values: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "equissl.data", "build", *map(str, words)], cwd=cwd, capture_output=True, text=True, **values
    )


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own from which the command is called."""
    monkeypatch.setenv("PYTHONPATH", str(Path(equissl.build.__file__).parent.parent))
    return tmp_path


def test_the_command(there: Path, flowers: Path) -> None:
    put(there / "generated_images.py", ITERABLE.encode())
    done = command("generated_images:images", "made", "--split", "val", "--json", cwd=there)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == {
        "path": "made",
        "name": "made",
        "num_images": {"val": 12},
        "num_classes": 3,
        "manifest_sha256": manifest_sha256(there / "made"),
    }
    again = command("generated_images:images", "made", cwd=there)
    assert (again.returncode, again.stderr) == (
        2,
        "equihpc: made is there already: give another DEST, or remove it first\n".replace("made", f"{there}/made", 1),
    )
    bad = command(flowers, "other", "--shard-mb", "-1", cwd=there)
    assert (bad.returncode, bad.stderr.count("\n")) == (2, 1)
    assert "shard_mb: Input should be greater than 0" in bad.stderr


def test_the_bar_on_a_terminal(there: Path, flowers: Path) -> None:
    terminal, end = pty.openpty()
    words = [sys.executable, "-m", "equissl.data", "build", str(flowers), "made", "--workers", "1"]
    process = subprocess.Popen(
        words, cwd=there, stderr=end, stdout=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "150", "TERM": "xterm"}
    )
    os.close(end)
    shown = b""
    try:
        while part := os.read(terminal, 4096):
            shown += part
    except OSError:  # the other end is closed
        pass
    os.close(terminal)
    said, _ = process.communicate()
    assert process.returncode == 0
    assert said == f"made: 60 in train; 2 classes; manifest {manifest_sha256(there / 'made')[:12]}\n"
    assert b"60 of 60 images" in shown
    assert b"MB/s" in shown
    assert b"0:00:00 left" in shown


INTERRUPTED = """
import contextlib, signal, sys, time
from pathlib import Path
from equissl.data import build
from equissl.data.__main__ import main
@contextlib.contextmanager
def shown():
    def report(stage, images, of, num_bytes):
        if stage == "write" and images:
            Path("ready").touch()
            while signal.getsignal(signal.SIGINT) is not signal.SIG_DFL:  # until the first Ctrl-C has come
                time.sleep(0.01)
    yield report
build.shown = shown
sys.exit(main(sys.argv[1:]))
"""


def test_ctrl_c_keeps_what_is_finished(there: Path, flowers: Path) -> None:
    words = ["build", str(flowers), "made", "--workers", "2", "--shard-mb", "0.005"]
    hear = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # the children of a background shell ignore it
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, *words], cwd=there, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=hear
    )
    until((there / "ready").exists)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
    _, said = process.communicate(timeout=20)
    assert (process.returncode, said) == (1, "equihpc: stopped as asked; the same command goes on with the shards that are finished\n")
    finished = finished_in(there / "made.partial")
    assert finished
    made(flowers, there / "made")
    assert finished.items() <= identities(there / "made").items()
