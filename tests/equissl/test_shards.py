"""Data sets: WebDataset reads what we write, random access agrees, the same bytes every time, bad folders are named."""

from __future__ import annotations

import gc
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from equissl import prepare
from equissl.config import PrepareConfig
from equissl.data import photographs as source
from equissl.data import shards
from equissl.data.shards import Sample, ShardSet, find, manifest_sha256, write_manifest, write_shards


def pixels(encoded: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encoded)))


def damaged(photographs: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(photographs, tmp_path / "data"))


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves the files it has read to the garbage collector
@pytest.mark.parametrize("split", ["train", "val"])
def test_webdataset_reads_our_shards(photographs: Path, split: str) -> None:
    ours = ShardSet(photographs, split)
    urls = [str(path) for path in sorted(photographs.glob(f"{split}-*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert len(urls) > 1
    assert len(samples) == ours.num_images
    for i, sample in enumerate(samples):
        assert sample["__key__"] == ours.key(i)
        assert sample["cls"] == ours.labels[i] == ours.label(i)
        assert np.array_equal(sample["png"], pixels(ours.read(i)))
    gc.collect()


def test_class_is_the_photograph_and_halves_are_apart(photographs: Path, small: dict[str, Any]) -> None:
    """Every patch is found, pixel for pixel, in its photograph's left half (train) or right half (val)."""
    for split, name in (("train", "coins"), ("val", "coins"), ("train", "chelsea"), ("val", "chelsea")):
        data = ShardSet(photographs, split)
        photograph = np.asarray(Image.open(_file(name)).convert("RGB"))
        middle = photograph.shape[1] // 2
        part = photograph[:, :middle] if split == "train" else photograph[:, middle:]
        windows = np.lib.stride_tricks.sliding_window_view(part[..., 0], 48, axis=1)  # (H, positions, 48)
        chosen = np.flatnonzero(data.labels == data.classes.index(name))
        assert len(chosen) == small["train_patches" if split == "train" else "val_patches"]
        for i in chosen:
            patch = pixels(data.read(int(i)))
            rows, columns = np.nonzero((windows == patch[0, :, 0]).all(axis=-1))
            assert any(np.array_equal(part[y : y + 48, x : x + 48], patch) for y, x in zip(rows, columns, strict=True))


def _file(name: str) -> Path:
    import skimage

    return Path(skimage.__file__).parent / "data" / f"{name}.png"


def test_patches_show_something(photographs: Path) -> None:
    """The moon and the retina's black margin have flat places; hardly any patch may come from there."""
    data = ShardSet(photographs, "train")
    spread = [pixels(data.read(i)).mean(axis=2).std() for i in range(data.num_images)]
    assert np.mean(np.array(spread) < source.FLAT) < 0.02


def test_every_photograph_allows_the_largest_patch() -> None:
    largest = next(rule.le for rule in PrepareConfig.model_fields["patch_size"].metadata if hasattr(rule, "le"))
    sides = [side for name in source.PHOTOGRAPHS for split in ("train", "val") for side in source.half(source.load(name), split).shape[:2]]
    assert min(sides) >= largest


def test_bytes_are_a_pure_function_of_the_config(photographs: Path, small: dict[str, Any], tmp_path: Path) -> None:
    again = prepare.main(small, tmp_path, lambda: False)
    assert again is not None
    assert again["manifest_sha256"] == manifest_sha256(photographs)
    assert again["num_images"] == {"train": 216, "val": 90}
    assert again["num_classes"] == 18
    other = tmp_path / "other"
    other.mkdir()
    another = prepare.main({**small, "seed": 1}, other, lambda: False)
    assert another is not None
    assert another["manifest_sha256"] != again["manifest_sha256"]


def test_prepare_stopped_or_killed_leaves_nothing_half_made(photographs: Path, small: dict[str, Any], tmp_path: Path) -> None:
    calls = iter([False, True])
    assert prepare.main(small, tmp_path, lambda: next(calls)) is None
    assert not (tmp_path / "data").exists()
    assert not (tmp_path / "data.partial").exists()
    (tmp_path / "data.partial").mkdir()  # what a kill leaves
    (tmp_path / "data.partial" / "train-000000.tar").write_bytes(b"half")
    result = prepare.main(small, tmp_path, lambda: False)
    assert result is not None
    assert result["manifest_sha256"] == manifest_sha256(photographs)
    assert not (tmp_path / "data.partial").exists()
    assert prepare.main(small, tmp_path, lambda: pytest.fail("finished data is not made again")) == result
    progress = json.loads((tmp_path / "progress.json").read_text())
    assert progress["stage"] == "writing val"
    assert 0 <= progress["step"] <= progress["num_steps"] == 90


def test_prepare_needs_no_torch(small: dict[str, Any], tmp_path: Path) -> None:
    code = (
        "import sys, pathlib, equissl.prepare as p; assert p.Config;"
        f"assert p.main({small!r}, pathlib.Path({str(tmp_path)!r}), lambda: False);"
        "sys.exit(bool({'torch', 'timm', 'sklearn', 'skimage'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_entries_need_no_torch() -> None:
    code = "import sys, equissl.evaluate, equissl.prepare, equissl.config; sys.exit(bool({'torch', 'timm'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_find(photographs: Path, tmp_path: Path) -> None:
    assert find(str(photographs)) == photographs
    assert find(str(photographs.parent)) == photographs  # a run folder of prepare
    with pytest.raises(ValueError, match=r"imagenet1k.*no such folder.*'photographs'"):
        find("imagenet1k")
    with pytest.raises(ValueError, match=r"no manifest\.json"):
        find(str(tmp_path))


def test_photographs_are_cut_once_when_several_processes_ask(small: dict[str, Any], tmp_path: Path) -> None:
    code = (
        f"from equissl.config import PrepareConfig; from equissl.data.photographs import cached;print(cached(PrepareConfig(**{small!r})))"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    processes = [subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    folders = {process.communicate()[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert len(folders) == 1
    assert os.listdir(tmp_path / "equihpc" / "data") == [Path(folders.pop()).name]


def test_builtin_name_is_the_default_config(photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked: list[PrepareConfig] = []

    def write(config: PrepareConfig, folder: Path, *_: object) -> None:
        asked.append(config)
        shutil.copytree(photographs, folder, dirs_exist_ok=True)

    monkeypatch.setattr(source, "write", write)
    assert find("photographs") == find("photographs")
    assert asked == [PrepareConfig()]


# --- bad folders -----------------------------------------------------------------------------------------------------------


def test_missing_shard(photographs: Path, tmp_path: Path) -> None:
    folder = damaged(photographs, tmp_path)
    (folder / "train-000002.tar").unlink()
    with pytest.raises(ValueError, match=r"shard train-000002\.tar is missing"):
        ShardSet(folder, "train")
    ShardSet(folder, "val")


def test_wrong_size(photographs: Path, tmp_path: Path) -> None:
    folder = damaged(photographs, tmp_path)
    with (folder / "val-000000.tar").open("ab") as file:
        file.write(b"more")
    with pytest.raises(ValueError, match=r"shard val-000000\.tar .* bytes, the manifest says"):
        ShardSet(folder, "val")


def test_damaged_index(photographs: Path, tmp_path: Path) -> None:
    folder = damaged(photographs, tmp_path)
    shutil.copy(folder / "val.index.npy", folder / "train.index.npy")
    with pytest.raises(ValueError, match=r"index train\.index\.npy"):
        ShardSet(folder, "train")


def test_no_manifest_or_not_ours(photographs: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no .*manifest\.json"):
        ShardSet(tmp_path, "train")
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        ShardSet(tmp_path, "train")
    (tmp_path / "manifest.json").write_text('{"version": 99}')
    with pytest.raises(ValueError, match="version 99"):
        ShardSet(tmp_path, "train")
    with pytest.raises(ValueError, match="no split 'test'; it has train, val"):
        ShardSet(photographs, "test")


@pytest.mark.parametrize(
    ("at", "value"),
    [
        ((), []),
        (("name",), None),
        (("classes",), 3),
        (("splits",), []),
        (("splits", "train", "num_images"), "720"),
        (("splits", "train", "index"), None),
        (("splits", "train", "shards"), 7),
        (("splits", "train", "shards", 0), "train-000000.tar"),
        (("splits", "train", "shards", 0, "sha256"), 1),
        (("splits", "train", "shards", 0, "bytes"), 1.5),
    ],
)
def test_a_manifest_of_another_shape(at: tuple[Any, ...], value: Any, photographs: Path, tmp_path: Path) -> None:
    folder = damaged(photographs, tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    inner = manifest
    for key in at[:-1]:
        inner = inner[key]
    if at:
        inner[at[-1]] = value
    (folder / "manifest.json").write_text(json.dumps(manifest if at else value))
    with pytest.raises(ValueError, match=r"manifest\.json (is damaged \(.*equihpc data index|is no manifest of a data set, but a list)"):
        ShardSet(folder, "train")


def test_zero_images(tmp_path: Path) -> None:
    write_manifest(tmp_path, "nothing", [], {"train": write_shards([], tmp_path, "train", 10)}, {})
    with pytest.raises(ValueError, match="no images"):
        ShardSet(tmp_path, "train")


def test_a_shard_cut_short_while_it_is_read(photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = damaged(photographs, tmp_path)
    data = ShardSet(folder, "train")
    os.truncate(folder / "train-000000.tar", 5000)
    monkeypatch.setattr(shards, "RETRY_SECONDS", (0.0, 0.0))
    with pytest.raises(shards.ShardLost, match=r"train-000000\.tar cannot be read any more: it ends before byte"):
        data.read(20)


# --- random access -----------------------------------------------------------------------------------------------------------


def test_pickles_small_and_reads_again(photographs: Path) -> None:
    data = ShardSet(photographs, "train")
    first = data.read(3)
    packed = pickle.dumps(data)
    assert len(packed) < 2000
    copy = pickle.loads(packed)
    assert copy.read(3) == first
    assert copy.manifest_sha256 == manifest_sha256(photographs)
    data.close()
    assert data.read(3) == first


def test_few_files_stay_open(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "OPEN_SHARDS", 2)
    data = ShardSet(photographs, "train")
    before = len(os.listdir("/proc/self/fd"))
    images = [data.read(i) for i in range(data.num_images)]
    assert len(os.listdir("/proc/self/fd")) <= before + 3  # two shards and the listing itself
    assert images == [ShardSet(photographs, "train").read(i) for i in range(data.num_images)]


SAMPLES = st.lists(st.tuples(st.binary(max_size=2000), st.sampled_from(["png", "jpg"]), st.integers(0, 5)), min_size=1, max_size=20)


@settings(max_examples=30, deadline=None)
@given(SAMPLES, st.integers(1, 7))
def test_what_is_written_is_read(samples: list[tuple[bytes, str, int]], per_shard: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        entry = write_shards((Sample(f"key_{i}", *sample) for i, sample in enumerate(samples)), folder, "train", per_shard)
        write_manifest(folder, "test", list("abcdef"), {"train": entry}, {})
        data = ShardSet(folder, "train")
        assert len(data) == len(samples)
        assert [shard["num_images"] for shard in entry["shards"]][:-1] == [per_shard] * (len(entry["shards"]) - 1)
        for i, (content, _, label) in enumerate(samples):
            assert (data.read(i), data.label(i), data.key(i)) == (content, label, f"key_{i}")
        data.close()


@pytest.mark.parametrize("key", ["", "a.b", "a/b", "k" * 81])
def test_keys_that_webdataset_would_split_are_refused(key: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the key"):
        write_shards([Sample(key, b"x", "png", 0)], tmp_path, "train", 1)


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest["splits"].update({"../evil": manifest["splits"]["train"]}),
        lambda manifest: manifest["splits"]["train"]["shards"][0].update(name="../../evil.tar"),
        lambda manifest: manifest["splits"]["val"]["index"].update(name="/evil.npy"),
    ],
)
def test_a_manifest_that_names_places_elsewhere_is_refused(photographs: Path, tmp_path: Path, change: Any) -> None:
    folder = damaged(photographs, tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"names '.*evil.*': a split is letters"):
        ShardSet(folder, "train")
