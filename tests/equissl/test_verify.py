"""Verification: every kind of damage is found and named, what is whole gets a receipt, and the receipt is trusted at the start."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from equissl.data import shards, verify
from equissl.data.__main__ import main
from equissl.data.shards import NO_LABEL, Sample, describe, write_manifest, write_shards
from equissl.data.verify import Damage, State, check, read_receipts


def png(seed: int) -> bytes:
    encoded = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)).save(encoded, "PNG")
    return encoded.getvalue()


def write(folder: Path, bad: str | None = None) -> Path:
    """12 images in three shards in each of two splits, of three classes; the files of the splits have equal sizes."""
    folder.mkdir()
    splits = {}
    for number, split in enumerate(("train", "val")):
        samples = [(f"{split[0]}{i:02d}", png(100 * number + i), i) for i in range(12)]
        made = [
            Sample(key, b"no image" if key == bad else image, "png", NO_LABEL if i == 5 else (i + number) % 3) for key, image, i in samples
        ]
        splits[split] = write_shards(made, folder, split, 4)
    write_manifest(folder, "test", ["a", "b", "c"], splits, {})
    return folder


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write(tmp_path / "data")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("verify") / "data")


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x40
    path.write_bytes(content)


def change_index(folder: Path, kind: str, change: Callable[[Any], None]) -> None:
    """Of the training split, with a manifest that says so: only a comparison with the shards finds this."""
    manifest = json.loads((folder / "manifest.json").read_text())
    path = folder / f"train.{kind}.npy"
    values = np.load(path)
    change(values)
    np.save(path, values)
    manifest["splits"]["train"][kind] = describe(path)
    (folder / "manifest.json").write_text(json.dumps(manifest))


# --- everything is looked at ------------------------------------------------------------------------------------------------


def test_whole(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damages, files = verify.verify(data, decode=True)
    assert damages == []
    assert {state.name for state in files} == {path.name for path in data.glob("*.*") if path.name != "manifest.json"}
    assert main(["verify", str(data), "--decode", "--workers", "1", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["damaged"], shown["num_whole"], shown["receipt"]) == ([], 10, str(data / "verified.json"))
    receipt = json.loads((data / "verified.json").read_text())
    for name, entry in receipt.items():
        status = (data / name).stat()
        times = {"mtime_ns": status.st_mtime_ns, "ctime_ns": status.st_ctime_ns}
        assert entry == {"bytes": status.st_size, **times, "sha256": describe(data / name)["sha256"]}
    assert read_receipts(data) == files


def set_label(values: Any) -> None:
    values["label"][2] = 0


def set_class(values: Any) -> None:
    values["label"][2] = 3


def set_key(values: Any) -> None:
    values[2] = b"t99"


def set_size(values: Any) -> None:
    values["size"][2] -= 1


def set_offset(values: Any) -> None:
    values["offset"][2] += 512


def swap(data: Path) -> None:
    (data / "train.index.npy").rename(data / "other")
    (data / "val.index.npy").rename(data / "train.index.npy")
    (data / "other").rename(data / "val.index.npy")


def shard_twice(data: Path) -> None:
    shutil.copy(data / "train-000000.tar", data / "train-000001.tar")


SHARD = "train-000000.tar"
DAMAGES: dict[str, tuple[Callable[[Path], object], str, str | None, str]] = {
    "byte of an image": (lambda data: flip(data / SHARD, 540), SHARD, None, "was changed: its sha256"),
    "byte of a header": (lambda data: flip(data / SHARD, 1024 + 3), SHARD, None, "damaged or cut short near byte 1536"),
    "byte of the padding": (lambda data: flip(data / SHARD, -1), SHARD, None, "something follows the end mark"),
    "truncated shard": (lambda data: os.truncate(data / SHARD, 2000), SHARD, None, "has 2000 bytes, the manifest says"),
    "missing shard": (lambda data: (data / SHARD).unlink(), SHARD, None, "is missing"),
    "folder as shard": (lambda data: ((data / SHARD).unlink(), (data / SHARD).mkdir()), SHARD, None, "bytes, the manifest says"),
    "another shard": (shard_twice, "train-000001.tar", "t00", "its key is 't04' in the file of keys"),
    "swapped index": (swap, "train.index.npy", None, r"was changed.*data index --force writes it anew"),
    "truncated index": (lambda data: os.truncate(data / "val.index.npy", 200), "val.index.npy", None, "has 200 bytes"),
    "missing keys": (lambda data: (data / "val.keys.npy").unlink(), "val.keys.npy", None, "is missing"),
    "wrong label": (lambda data: change_index(data, "index", set_label), SHARD, "t02", "its label is 2, the index says 0"),
    "no such class": (lambda data: change_index(data, "index", set_class), SHARD, "t02", "its label is 3 in the index, and there are 3 c"),
    "wrong key": (lambda data: change_index(data, "keys", set_key), SHARD, "t02", "its key is 't99' in the file of keys"),
    "wrong size": (lambda data: change_index(data, "index", set_size), SHARD, "t02", "the index says"),
    "wrong offset": (lambda data: change_index(data, "index", set_offset), SHARD, "t02", "is not in the index"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_with_its_name(data: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    damage, file, key, problem = DAMAGES[name]
    damage(data)
    damages, files = verify.verify(data)
    found = [each for each in damages if (each.file, each.key) == (file, key)]
    assert found
    assert any(re.search(problem, each.problem) for each in found), damages
    assert not {each.file for each in damages} & {state.name for state in files}
    assert {each.file for each in damages} <= {file, "val.index.npy"}
    assert main(["verify", str(data), "--workers", "1"]) == 1
    assert file in capsys.readouterr().out
    assert not (data / "verified.json").exists()


def test_an_image_that_cannot_be_decoded(tmp_path: Path) -> None:
    data = write(tmp_path / "data", bad="v07")
    assert verify.verify(data)[0] == []
    (damage,), files = verify.verify(data, decode=True)
    assert damage[:2] == ("val-000001.tar", "v07")
    assert "cannot be decoded" in damage.problem
    assert "val-000001.tar" not in {state.name for state in files}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_change_of_any_file_is_found(whole: Path, drawn: st.DataObject) -> None:
    """A byte changed anywhere, or a file cut anywhere: a finding with the file's name, never a crash."""
    with tempfile.TemporaryDirectory() as name:
        data = Path(shutil.copytree(whole, Path(name) / "data"))
        path = drawn.draw(st.sampled_from(sorted(path for path in data.iterdir() if path.name != "manifest.json")))
        content = bytearray(path.read_bytes())
        position = drawn.draw(st.integers(0, len(content) - 1))
        if drawn.draw(st.booleans()):
            del content[position:]
        else:
            content[position] ^= drawn.draw(st.integers(1, 255))
        path.write_bytes(content)
        damages, files = verify.verify(data, decode=drawn.draw(st.booleans()))
        assert {damage.file for damage in damages} == {path.name}
        assert len(files) == 9


def test_processes_find_the_same(data: Path) -> None:
    flip(data / "val-000002.tar", 600)
    alone = verify.verify(data, workers=1)
    assert verify.verify(data, workers=2) == alone
    assert [damage.file for damage in alone[0]] == ["val-000002.tar"]


def test_many_findings_are_counted(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "SHOWN", 2)
    shard_twice(data)
    damages, _ = verify.verify(data)
    assert [damage.problem for damage in damages][-1] == "7 more"  # 4 keys and 4 labels, and the sha256: 9
    assert len(damages) == 3


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path)]) == 2
    assert "no manifest.json" in capsys.readouterr().err


def test_none_of_it_needs_torch() -> None:
    code = (
        "import sys, equissl.data.verify, equissl.data.index, equissl.data.info, equissl.data.stage;"
        "sys.exit(bool({'torch', 'webdataset', 'rich'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- check: the short form ----------------------------------------------------------------------------------------------------


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose sha256 `check` takes."""
    names: list[str] = []

    def noted(path: Path) -> dict[str, Any]:
        names.append(path.name)
        return shards.describe(path)

    monkeypatch.setattr(verify, "describe", noted)
    return names


TRAIN = ["train.index.npy", "train.keys.npy", *(f"train-{i:06d}.tar" for i in range(3))]


def test_check_hashes_what_no_receipt_vouches_for(data: Path, hashed: list[str]) -> None:
    check(data, ("train",))
    assert sorted(hashed) == sorted(TRAIN)
    hashed.clear()
    check(data, ("train",))
    assert hashed == []
    os.utime(data / "train-000001.tar")
    check(data, ("train", "val"))
    assert sorted(hashed) == sorted(["train-000001.tar", *(name.replace("train", "val") for name in TRAIN)])
    hashed.clear()
    check(data, ("val", "train"))
    assert hashed == []


def test_check_trusts_the_receipt_of_verify(data: Path, hashed: list[str]) -> None:
    assert main(["verify", str(data), "--workers", "1"]) == 0
    hashed.clear()
    check(data, ("train", "val"))
    assert hashed == []


def test_check_finds_a_changed_byte_of_unchanged_size(data: Path) -> None:
    check(data, ("train", "val"))
    flip(data / "train-000001.tar", 700)
    with pytest.raises(ValueError, match=r"train-000001\.tar in .*data was changed.*equihpc data verify"):
        check(data, ("train",))
    with pytest.raises(ValueError, match=r"train-000001\.tar"):  # nothing was noted down that hides it
        check(data, ("train",))
    check(data, ("val",))


def flip_and_keep_the_time(path: Path) -> None:
    before = path.stat()
    flip(path, 700)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_restored_time_does_not_hide_a_change(data: Path) -> None:
    check(data, ("train",))
    flip_and_keep_the_time(data / "train-000001.tar")
    with pytest.raises(ValueError, match=r"train-000001\.tar in .* was changed"):
        check(data, ("train",))


def test_a_receipt_does_not_vouch_for_a_copy(data: Path, tmp_path: Path, hashed: list[str]) -> None:
    check(data, ("train",))
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-a", data, copy], check=True)
    assert (copy / "verified.json").exists()
    assert (copy / "train-000001.tar").stat().st_mtime_ns == (data / "train-000001.tar").stat().st_mtime_ns
    flip_and_keep_the_time(copy / "train-000001.tar")
    with pytest.raises(ValueError, match=r"train-000001\.tar in .*copy was changed"):
        check(copy, ("train",))
    flip_and_keep_the_time(copy / "train-000001.tar")
    hashed.clear()
    check(copy, ("train",))
    assert sorted(hashed) == sorted(TRAIN)
    hashed.clear()
    check(copy, ("train",))
    assert hashed == []


def test_receipts_of_the_old_form_are_ignored(data: Path, hashed: list[str]) -> None:
    check(data, ("train",))
    old = json.loads((data / "verified.json").read_text())
    for entry in old.values():
        del entry["ctime_ns"]
    (data / "verified.json").write_text(json.dumps(old))
    hashed.clear()
    assert read_receipts(data) == set()
    check(data, ("train",))
    assert sorted(hashed) == sorted(TRAIN)


@pytest.mark.parametrize("file", ["train-000002.tar", "train.index.npy", "train.keys.npy"])
def test_check_names_what_is_missing_or_cut(data: Path, file: str) -> None:
    check(data, ("train",))
    os.truncate(data / file, 100)
    with pytest.raises(ValueError, match=rf"{file} in .* has 100 bytes, the manifest says"):
        check(data, ("train",))
    (data / file).unlink()
    with pytest.raises(ValueError, match=rf"{file} in .* is missing"):
        check(data, ("train",))
    check(data, ("val",))
    with pytest.raises(ValueError, match="no split 'test'; it has train, val"):
        check(data, ("test",))


def test_too_much_to_hash_is_said(data: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    sizes = [(data / name).stat().st_size for name in TRAIN if name.endswith("tar")]
    monkeypatch.setattr(verify, "HASHED_AT_START", sum(sizes) - 1)
    check(data, ("train",))
    assert sorted(hashed) == TRAIN[:2]
    assert [record.message for record in caplog.records if "3 of 3 shards" in record.message and "equihpc data verify" in record.message]
    flip(data / "train.index.npy", -1)
    with pytest.raises(ValueError, match=r"train\.index\.npy in .* was changed"):
        check(data, ("train",))
    flip(data / "train.index.npy", -1)
    monkeypatch.setattr(verify, "HASHED_AT_START", sum(sizes))
    hashed.clear()
    check(data, ("train",))
    assert set(hashed) >= set(TRAIN[2:])


def test_the_receipt_of_a_folder_that_cannot_be_written_to(
    data: Path, tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (data / "verified.json").mkdir()  # so that root cannot write it either
    check(data, ("train",))
    (receipt,) = (tmp_path / "cache" / "equihpc" / "verified").iterdir()
    hashed.clear()
    check(data, ("train",))
    assert hashed == []
    receipt.unlink()
    receipt.mkdir()
    with caplog.at_level(logging.WARNING):
        check(data, ("train",))
    assert len(hashed) == 5
    assert "no receipt" in caplog.text


@pytest.mark.parametrize("content", ["", "[1]", '{"train-000000.tar": 3}', '{"train-000000.tar": {"bytes": 1}}', "\0"])
def test_a_receipt_that_cannot_be_read_is_none(data: Path, content: str, hashed: list[str]) -> None:
    (data / "verified.json").write_text(content)
    assert read_receipts(data) == set()
    check(data, ("train",))
    assert len(hashed) == 5
    assert {state.name for state in read_receipts(data)} == set(TRAIN)


def test_a_receipt_with_another_sha256_vouches_for_nothing(data: Path) -> None:
    """One that came with the data set from elsewhere, or of a data set that stood here before."""
    path = data / "train-000000.tar"
    flip(path, 600)
    status = path.stat()
    states = {State(path.name, status.st_size, status.st_mtime_ns, status.st_ctime_ns, describe(path)["sha256"])}
    verify.write_receipt(data, states)
    with pytest.raises(ValueError, match=r"train-000000\.tar in .* was changed"):
        check(data, ("train",))
    assert isinstance(verify.verify(data)[0][0], Damage)


def test_of_two_receipts_the_one_that_holds_is_kept(data: Path, hashed: list[str]) -> None:
    check(data, ("train",))
    before = read_receipts(data)
    _, cache = verify.receipts(data)
    cache.parent.mkdir(parents=True)
    cache.write_text(json.dumps({"train-000000.tar": {"bytes": 1, "mtime_ns": 2**62, "ctime_ns": 2**62, "sha256": "old"}}))
    check(data, ("train", "val"))
    cache.unlink()
    assert before < read_receipts(data)
    hashed.clear()
    check(data, ("train", "val"))
    assert hashed == []
