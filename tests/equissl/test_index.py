"""Shards built elsewhere become data sets: what webdataset reads of them is what we read; labels, splits, mending, refusals."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import string
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.tariterators import group_by_keys, tar_file_iterator

from equissl.data import index as module
from equissl.data.__main__ import main
from equissl.data.index import IMAGES, index
from equissl.data.info import info
from equissl.data.shards import NO_LABEL, Sample, ShardSet, manifest_sha256, read_manifest, write_manifest, write_shards
from equissl.data.verify import verify
from equissl.files import DiskFull

Members = list[tuple[str, bytes]]


def write_tar(path: Path, members: Members, format: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def contents(folder: Path, split: str = "train") -> list[tuple[str, bytes, int]]:
    data = ShardSet(folder, split)
    return [(data.key(i), data.read(i), data.label(i)) for i in range(len(data))]


def by_webdataset(shard: Path) -> list[dict[str, Any]]:
    with shard.open("rb") as file:  # its WebDataset leaves files to the garbage collector, which takes long
        return list(group_by_keys({**member, "__url__": str(shard)} for member in tar_file_iterator(file)))


# --- the same as webdataset -----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_what_webdatasets_writers_produce_is_read_back(tmp_path: Path) -> None:
    images = [os.urandom(50 + i) for i in range(10)]
    pattern = str(tmp_path / "train-%02d.tar")
    with webdataset.ShardWriter(pattern, maxcount=4, verbose=0) as writer:
        for i, image in enumerate(images):
            writer.write({"__key__": f"folder/sample_{i}", "jpg": image, "cls": i % 3})
    with webdataset.TarWriter(str(tmp_path / "val.tar")) as writer:
        for i, image in enumerate(images[:3]):
            writer.write({"__key__": f"v{i}", "json": {"label": i, "caption": "x"}, "png": image, "txt": "words"})
    found = index(tmp_path)
    assert (found["num_images"], found["num_unlabelled"], found["num_classes"]) == ({"train": 10, "val": 3}, {"train": 0, "val": 0}, 3)
    assert contents(tmp_path) == [(f"folder/sample_{i}", image, i % 3) for i, image in enumerate(images)]
    assert contents(tmp_path, "val") == [(f"v{i}", image, i) for i, image in enumerate(images[:3])]
    assert ShardSet(tmp_path, "train").shard_sizes == (4, 4, 2)
    assert verify(tmp_path)[0] == []


NAMES = st.text(string.ascii_letters + string.digits + "_-/ é", max_size=20)
LONG = st.integers(0, 300)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(NAMES, LONG, st.lists(st.sampled_from(["jpg", "PNG", "cls", "txt", "left.png", "x"]), unique=True)), max_size=8),
    st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
    st.binary(max_size=1200),
)
def test_samples_are_those_of_webdataset(drawn: list[tuple[str, int, list[str]]], format: int, content: bytes) -> None:
    """Any names, directories in them, up to 320 characters, extensions of any case: webdataset's keys, images and classes."""
    members: Members = [("last/x.jpg", content), ("last/x.cls", b"7")]
    for number, (name, length, extensions) in enumerate(drawn):
        key = f"{number}{name}{'n' * length}"
        members += [(f"{key}.{ext}", str(number).encode() if ext == "cls" else content + bytes([number])) for ext in extensions]
    with tempfile.TemporaryDirectory() as folder:
        shard = write_tar(Path(folder) / "0.tar", members, format)
        expected = []
        for sample in by_webdataset(shard):
            image = next((sample[ext] for ext in ("jpg", "png", "left.png") if ext in sample), None)
            if image is not None:
                expected.append((sample["__key__"], image, int(sample.get("cls", NO_LABEL))))
        index(Path(folder))
        assert contents(Path(folder)) == expected
        assert verify(Path(folder))[0] == []


@pytest.mark.parametrize("format", ["pax", "gnu", "ustar"])
def test_gnu_tar(tmp_path: Path, format: str) -> None:
    """Directories, links and names of more than 100 and more than 256 characters, as the program on every machine packs them."""
    tree, shards = tmp_path / "tree", tmp_path / "shards"
    shards.mkdir()
    expected = {}
    for number, name in enumerate(
        ("short", "d" * 60 + "/" + "k" * 90, *(["e" * 150 + "/" + "f" * 130 + "/" + "k" * 60] * (format != "ustar")))
    ):
        path = tree / "set" / f"{name}.jpeg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(700))
        path.with_suffix(".cls").write_text(f"{number}\n")
        expected[f"./set/{name}"] = (path.read_bytes(), number)
    (tree / "set" / "link.jpg").symlink_to("short.jpeg")
    subprocess.run(["tar", "--sort=name", f"--format={format}", "-cf", shards / "train-0.tar", "-C", tree, "."], check=True)
    index(shards)
    found = contents(shards)
    assert {key: (image, label) for key, image, label in found} == expected
    assert [key for key, *_ in found] == [sample["__key__"] for sample in by_webdataset(shards / "train-0.tar")]
    assert verify(shards)[0] == []


# --- labels -----------------------------------------------------------------------------------------------------------------


def labels_of(folder: Path, samples: list[dict[str, bytes]], **options: Any) -> tuple[list[int], tuple[str, ...]]:
    members = [(f"s{i}.{extension}", content) for i, sample in enumerate(samples) for extension, content in sample.items()]
    write_tar(folder / "a.tar", members)
    index(folder, **options)
    data = ShardSet(folder, "train")
    assert verify(folder)[0] == []
    return data.labels.tolist(), data.classes


def record(**fields: Any) -> dict[str, bytes]:
    return {"jpg": b"image", "json": json.dumps(fields).encode()}


def test_labels(tmp_path: Path) -> None:
    def found(name: str, *samples: dict[str, bytes], **options: Any) -> tuple[list[int], tuple[str, ...]]:
        return labels_of(tmp_path / name, list(samples), **options)

    assert found("cls", {"jpg": b"", "cls": b" 2\n"}, {"jpg": b"", "cls": b"0"}) == ([2, 0], ("0", "1", "2"))
    assert found("some", {"jpg": b"", "cls": b"1"}, {"jpg": b""}, record(label=-1)) == ([1, NO_LABEL, NO_LABEL], ("0", "1"))
    assert found("none", {"jpg": b"", "txt": b"a caption"}, record(key=3)) == ([NO_LABEL, NO_LABEL], ())
    assert found("cls first", {"json": b'{"label": 5}', "jpg": b"", "cls": b"1"}) == ([1], ("0", "1"))
    assert found("fields", record(**{"class": 2}), record(cls=1, **{"class": 2}), record(label="0", cls=1)) == ([2, 1, 0], ("0", "1", "2"))
    names = [record(label="dog"), record(label=None), record(label="cat")]
    assert found("names", *names) == ([1, NO_LABEL, 0], ("cat", "dog"))
    assert found("given", *names, classes=["fox", "dog", "cat"]) == ([1, NO_LABEL, 2], ("fox", "dog", "cat"))
    assert found("numbered", {"jpg": b"", "cls": b"1"}, classes=["x", "y", "z"]) == ([1], ("x", "y", "z"))
    assert found("other", record(species="b", label=0), record(species="a", label=1), label="species") == ([1, 0], ("a", "b"))
    assert found("txt", {"jpg": b"", "txt": b"b"}, {"jpg": b"", "txt": b"a"}, label=".txt") == ([1, 0], ("a", "b"))
    assert found("refused", record(label=[1, 2]), label="-") == ([NO_LABEL], ())


@pytest.mark.parametrize(
    ("samples", "options", "message"),
    [
        ([record(label=True)], {}, r"sample s0 in .*a\.tar: True is no class"),
        ([record(label=1.5)], {}, r"1\.5 is no class; it must be a whole number or a name"),
        ([record(label=-2)], {}, r"-2 is no class"),
        ([record(label=10**12)], {}, r"1000000000000 is no class"),
        ([{"jpg": b"", "cls": b""}], {}, r"'' is no class"),
        ([{"jpg": b"", "cls": b"\xff"}], {}, r"label of the sample s0 in .*decode"),
        ([{"jpg": b"", "json": b"{"}], {}, r"label of the sample s0 in .*a\.tar"),
        ([{"jpg": b"", "json": b"3"}], {}, r"its \.json is not an object"),
        ([record(label="dog"), record(label=1)], {}, r"'dog' \(s0\) and 1 \(s1\) do not go together"),
        ([record(label="dog")], {"classes": ["cat"]}, r"'dog' of the sample s0 is none of the 1 classes"),
        ([record(label=0), record(label=2)], {"classes": ["a", "b"]}, r"label 2 of the sample s1 is too large for 2 classes"),
        ([record(label=0)], {"label": "species"}, r"no sample has a label 'species'"),
    ],
)
def test_labels_that_are_none(tmp_path: Path, samples: list[dict[str, bytes]], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        labels_of(tmp_path, samples, **options)
    assert os.listdir(tmp_path) == ["a.tar"]


# --- samples ----------------------------------------------------------------------------------------------------------------


def test_the_first_of_several_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = [(f"a.{extension}", extension.encode()) for extension in reversed(IMAGES)] + [("a.0.jpg", b"part"), ("b.mask.png", b"mask")]
    members += [("c.ppm", b"ppm"), ("c.GIF", b"gif")]
    write_tar(tmp_path / "0.tar", members)
    assert index(tmp_path)["num_with_several"] == 2
    assert [image for _, image, _ in contents(tmp_path)] == [b"jpg", b"mask", b"gif"]
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning == "2 samples (a, …) with several images: the first of jpg, jpeg, png, webp, bmp, tif, tiff, gif, ppm is taken"


def test_samples_without_an_image(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tar(tmp_path / "0.tar", [("a.cls", b"1"), ("b.jpg", b"b"), ("README", b"no sample"), ("__meta__/x.jpg", b"nor this")])
    write_tar(tmp_path / "1.tar", [("c.cls", b"2")])
    write_tar(tmp_path / "2.tar", [])
    found = index(tmp_path)
    assert (found["num_without_image"], found["num_images"]) == (2, {"train": 1})
    assert ShardSet(tmp_path, "train").shards == ("0.tar",)
    assert "2 samples (a, …) without an image left out" in caplog.text
    assert "2 shards (1.tar, …) without an image left out" in caplog.text
    (tmp_path / "0.tar").unlink()
    with pytest.raises(ValueError, match=r"no sample in .* has an image, not c either: the extension of an image must be one of jpg, "):
        index(tmp_path, force=True)


def test_a_member_twice(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("a.jpg", b"1"), ("a.JPG", b"2")])
    with pytest.raises(ValueError, match=r"0\.tar has two members \.jpg of the sample a"):
        index(tmp_path)


def test_keys_that_come_again_are_other_samples(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.png", b"3")])
    write_tar(tmp_path / "1.tar", [("a.jpg", b"4")])
    index(tmp_path)
    assert [(key, image) for key, image, _ in contents(tmp_path)] == [("a", b"1"), ("b", b"2"), ("a", b"3"), ("a", b"4")]


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for name in ("ä.jpg", "ö.jpg"):
            tar.addfile(tarfile.TarInfo(name))
    index(tmp_path)
    assert [key for key, *_ in contents(tmp_path)] == ["\\xe4", "\\xf6"]


# --- splits -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shard", "split"),
    [
        ("train-000.tar", "train"),
        ("imagenet-val-0001.tar", "val"),
        ("val/00.tar", "val"),
        ("Validation_3.tar", "val"),
        ("imagenet1k-test.tar", "test"),
        ("test-set/train/00.tar", "train"),
        ("trainval-0.tar", "train"),
        ("evaluation-0.tar", "train"),
        ("00007.tar", "train"),
    ],
)
def test_splits_by_name(tmp_path: Path, shard: str, split: str) -> None:
    write_tar(tmp_path / "set" / shard, [("a.jpg", b"1")])
    index(tmp_path / "set")
    assert read_manifest(tmp_path / "set")["splits"].keys() == {split}
    assert ShardSet(tmp_path / "set", split).shards == (shard,)
    assert contents(tmp_path / "set", split) == [("a", b"1", NO_LABEL)]


def test_splits_by_a_pattern(tmp_path: Path) -> None:
    for shard in ("p1_a.tar", "p2_a.tar", "p1_b.tar"):
        write_tar(tmp_path / shard, [("x.jpg", shard.encode())])
    index(tmp_path, split_pattern=r"^(\w+?)_")
    assert [image for _, image, _ in contents(tmp_path, "p1")] == [b"p1_a.tar", b"p1_b.tar"]
    for pattern, message in (("^p(3)", "does not find"), ("(", "no regular expression"), ("p", "one group"), ("^p1(.)", "does not find")):
        with pytest.raises(ValueError, match=message):
            index(tmp_path, split_pattern=pattern, force=True)


# --- refused ----------------------------------------------------------------------------------------------------------------


def test_compressed(tmp_path: Path) -> None:
    content = write_tar(tmp_path / "0.tar", [("a.jpg", b"1")]).read_bytes()
    (tmp_path / "1.tar").write_bytes(gzip.compress(content))
    with pytest.raises(ValueError, match=r"1\.tar is compressed.*Unpack it \(gunzip"):
        index(tmp_path)
    for name in ("1.tar.gz", "1.tgz", "1.tar.zst"):
        (tmp_path / "1.tar").rename(tmp_path / name)
        with pytest.raises(ValueError, match=rf"{name} is compressed"):
            index(tmp_path)
        (tmp_path / name).rename(tmp_path / "1.tar")


def test_no_shard(tmp_path: Path) -> None:
    (tmp_path / ".hidden.tar").touch()
    with pytest.raises(ValueError, match=r"no shard \(\*\.tar\)"):
        index(tmp_path)


def test_cut_anywhere_damaged_anywhere(tmp_path: Path) -> None:
    """What a writer that was killed leaves is refused with the shard's name, wherever it was cut; so is a damaged header."""
    whole = write_tar(tmp_path / "0.tar", [("a.jpg", b"1" * 700), ("a.cls", b"1"), ("b.jpg", b"2")]).read_bytes()
    end = 512 * 7  # of the members; tar pads to 10 240 bytes
    for length in range(0, end + 512, 100):
        (tmp_path / "0.tar").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"0\.tar is (empty|damaged or cut short)"):
            index(tmp_path)
    for position in (100, 512 * 3 + 100, 512 * 5 + 100):
        (tmp_path / "0.tar").write_bytes(whole[:position] + b"x" + whole[position + 1 :])
        with pytest.raises(ValueError, match=r"0\.tar is damaged or cut short near byte"):
            index(tmp_path)
    (tmp_path / "0.tar").write_bytes(whole + whole)  # cat a b: tar and webdataset read the first alone
    with pytest.raises(ValueError, match="something follows the end mark"):
        index(tmp_path)
    (tmp_path / "0.tar").write_bytes(whole[: end + 1024])  # without tar's padding
    index(tmp_path)


# --- a manifest that is there -------------------------------------------------------------------------------------------------


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    """A data set as equihpc data build writes it, with a class that no image has and a split of its own name."""
    folder = tmp_path / "ours"
    folder.mkdir()
    splits = {}
    for split in ("validation_b", "train"):
        samples = [Sample(f"{split}-{i}", os.urandom(100), "png", NO_LABEL if i == 3 else i % 2) for i in range(7)]
        splits[split] = write_shards(samples, folder, split, 3)
    write_manifest(folder, "mine", ["a", "b", "unused"], splits, {"kind": "test"})
    return folder


def listing(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("damage", ["index", "keys", "missing"])
def test_a_damaged_index_is_mended(ours: Path, damage: str) -> None:
    """To the last byte: the data set keeps its identity."""
    before = listing(ours)
    if damage == "missing":
        (ours / "train.index.npy").unlink()
    else:
        (ours / f"train.{damage}.npy").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"has a manifest\.json: --force replaces it"):
        index(ours)
    index(ours, force=True)
    assert listing(ours) == before


def test_another_version_is_mended(ours: Path) -> None:
    before = listing(ours)
    manifest = json.loads(before["manifest.json"])
    (ours / "manifest.json").write_text(json.dumps({**manifest, "version": 99}))
    with pytest.raises(ValueError, match="version 99"):
        ShardSet(ours, "train")
    index(ours, force=True)
    assert listing(ours) == before
    for entry in manifest["splits"].values():
        (ours / entry.pop("keys")["name"]).unlink()
    (ours / "manifest.json").write_text(json.dumps({**manifest, "version": 1}))
    assert verify(ours)[0] == []
    index(ours, force=True)
    assert listing(ours) == before


def test_a_manifest_of_no_use(ours: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = contents(ours)
    (ours / "manifest.json").write_text('{"splits": 3}')
    index(ours, force=True, name="again")
    assert "cannot be used" in caplog.text
    assert ShardSet(ours, "train").name == "again"
    assert ShardSet(ours, "train").classes == ("0", "1")
    assert contents(ours) == before


def test_a_manifest_whose_split_leads_out_of_the_folder(ours: Path, caplog: pytest.LogCaptureFixture) -> None:
    manifest = json.loads((ours / "manifest.json").read_text())
    manifest["splits"]["../evil"] = manifest["splits"].pop("train")
    (ours / "manifest.json").write_text(json.dumps(manifest))
    around = set(ours.parent.rglob("*"))
    index(ours, force=True)
    assert "cannot be used: '../evil' is no name of a split" in caplog.text
    assert set(ours.parent.rglob("*")) - around == {ours / f"val.{kind}.npy" for kind in ("index", "keys")}
    assert read_manifest(ours)["splits"].keys() == {"train", "val"}
    with pytest.raises(ValueError, match="does not find a split of 1 to 40 letters"):
        index(ours, force=True, split_pattern=r"^(.*)$")


def test_a_shard_that_is_gone_is_said(ours: Path, caplog: pytest.LogCaptureFixture) -> None:
    (ours / "train-000001.tar").unlink()
    index(ours, force=True)
    assert "1 shard (train-000001.tar) of the old manifest is not there any more" in caplog.text
    assert ShardSet(ours, "train").shards == ("train-000000.tar", "train-000002.tar")


def test_other_labels_replace_the_old_classes(tmp_path: Path) -> None:
    samples = [record(label="dog", kind=1), record(label="cat", kind=0)]
    assert labels_of(tmp_path, samples) == ([1, 0], ("cat", "dog"))
    first = manifest_sha256(tmp_path)
    assert labels_of(tmp_path, samples, label="kind", force=True) == ([1, 0], ("0", "1"))
    assert manifest_sha256(tmp_path) != first
    assert labels_of(tmp_path, samples, force=True) == ([1, 0], ("0", "1"))  # the field is remembered


def test_a_failure_leaves_the_old_data_set(ours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = listing(ours)

    def full(*_: object) -> None:
        raise DiskFull(28, "no space")

    monkeypatch.setattr(module, "write_manifest", full)
    with pytest.raises(DiskFull):
        index(ours, force=True, name="other")
    assert listing(ours) == before


def test_at_no_moment_is_there_a_mixture(ours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between any two changes of the folder, what is left is the old data set, the new one, or none."""
    write_tar(ours / "train-000009.tar", [("new.jpg", b"new")])
    kept = ours.with_name("kept")
    shutil.copytree(ours, kept)
    old, seen = manifest_sha256(ours), []
    for stop in range(20):
        shutil.rmtree(ours)
        shutil.copytree(kept, ours)
        changes = iter(range(stop))

        def counted(original: Any, changes: Any = changes) -> Any:
            def change(*arguments: Any, **options: Any) -> Any:
                next(changes)  # StopIteration: the kill
                return original(*arguments, **options)

            return change

        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", counted(Path.unlink))
            patch.setattr(Path, "replace", counted(Path.replace))
            try:
                index(ours, force=True)
                done = True
            except StopIteration:
                done = False
        if (ours / "manifest.json").exists():
            assert verify(ours)[0] == []
            seen.append(manifest_sha256(ours))
        else:
            seen.append("none")
        if done:
            break
    assert done
    assert list(dict.fromkeys(seen)) == [old, "none", seen[-1]]


# --- elsewhere ----------------------------------------------------------------------------------------------------------------


def test_an_index_elsewhere_with_links(tmp_path: Path) -> None:
    shards, dest = tmp_path / "shards", tmp_path / "dest"
    write_tar(shards / "val" / "0.tar", [("a.jpg", b"1")])
    write_tar(shards / "0.tar", [("b.jpg", b"2")])
    before = sorted(shards.rglob("*"))
    index(shards, dest)
    assert sorted(shards.rglob("*")) == before
    assert (dest / "val" / "0.tar").readlink() == shards / "val" / "0.tar"
    assert contents(dest, "val") == [("a", b"1", NO_LABEL)]
    assert verify(dest)[0] == []
    with pytest.raises(ValueError, match="--force"):
        index(shards, dest)
    index(shards, dest, force=True)
    with pytest.raises(ValueError, match=r"is inside .*shards"):
        index(shards, shards / "index")
    (dest / "0.tar").unlink()
    (dest / "0.tar").touch()
    with pytest.raises(ValueError, match="stands where a link"):
        index(shards, dest, force=True)


# --- commands -----------------------------------------------------------------------------------------------------------------


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shards = tmp_path / "shards"
    for number in range(2):
        write_tar(
            shards / f"train-{number}.tar", [(f"{number}_{i}.jpg", b"x" * (10 + i)) for i in range(5)] + [("c.jpg", b"y"), ("c.cls", b"1")]
        )
    write_tar(shards / "val-0.tar", [("v.jpg", b"v"), ("v.cls", b"0")])
    (tmp_path / "classes").write_text("cat\n\ndog\n")
    words = ["index", str(shards), "--classes", str(tmp_path / "classes"), "--workers", "2", "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["num_images"], found["num_unlabelled"], found["num_classes"]) == ({"train": 12, "val": 1}, {"train": 10, "val": 0}, 2)
    assert main(words) == 2
    assert "--force" in capsys.readouterr().err
    assert main([*words[:-1], "--force"]) == 0
    assert "train: 12 images, 10 without a label" in capsys.readouterr().out
    (tmp_path / "classes").write_text("cat\ncat\n")
    assert main([*words, "--force"]) == 2
    assert "'cat' twice" in capsys.readouterr().err

    assert main(["info", str(shards), "--batch", "5", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["name"], shown["classes"], shown["manifest_sha256"]) == ("shards", ["cat", "dog"], manifest_sha256(shards))
    train, val = shown["splits"]["train"], shown["splits"]["val"]
    assert (train["num_images"], train["num_shards"], train["num_unlabelled"], train["num_unverified"]) == (12, 2, 10, 4)
    assert train["bytes"] == sum((shards / f"train-{i}.tar").stat().st_size for i in range(2))
    assert train["image_bytes"] == {"mean": (2 * sum(range(10, 15)) + 2) / 12, "min": 1, "max": 14}
    assert train["images_per_class"] == {"min": 0, "max": 2}
    assert train["order"]["steps_per_epoch"] == 2
    assert val["order"] == {"order": "none: fewer images than the batch"}
    assert main(["verify", str(shards), "--workers", "1"]) == 0
    assert info(shards)["splits"]["train"]["num_unverified"] == 0
    capsys.readouterr()
    assert main(["info", str(shards)]) == 0
    assert "images without a label" in capsys.readouterr().out
    assert main(["info", str(shards), "--batch", "0"]) == 2
    assert main(["info", str(tmp_path / "cache")]) == 2


def test_info_of_splits_without_images_or_labels(tmp_path: Path) -> None:
    samples = [Sample(f"k{i}", bytes(i), "png", NO_LABEL) for i in range(3)]
    splits = {"train": write_shards(samples, tmp_path, "train", 2), "val": write_shards([], tmp_path, "val", 2)}
    write_manifest(tmp_path, "bare", [], splits, {})
    train, val = (info(tmp_path)["splits"][split] for split in ("train", "val"))
    assert (train["images_per_class"], train["num_unlabelled"], train["image_bytes"]["mean"]) == (None, 3, 1.0)
    assert (val["num_images"], val["image_bytes"], val["images_per_class"]) == (0, None, None)
    assert np.load(tmp_path / "val.index.npy").shape == (0,)
