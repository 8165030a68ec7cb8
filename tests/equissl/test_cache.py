"""The cache of features: what is read is what was written, by any number of ranks; what is damaged is not read; one writer."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from test_evaluate import counting, on_ranks, pretrained, settings

from equissl import cache, evaluate, features
from equissl.config import EvaluateConfig

__all__ = ["pretrained"]  # a fixture


class Extracted:
    """Counts the images that pass the encoder."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.images = 0
        extract = features.extract

        def counted(data: Any, indices: Any, *rest: Any) -> Any:
            self.images += len(indices)
            return extract(data, indices, *rest)

        monkeypatch.setattr(features, "extract", counted)

    def since(self) -> int:
        images, self.images = self.images, 0
        return images


@pytest.fixture
def extracted(monkeypatch: pytest.MonkeyPatch) -> Extracted:
    monkeypatch.setattr(cache, "ROWS", 100)
    monkeypatch.setattr(cache, "WAIT_SECONDS", 0.05)
    return Extracted(monkeypatch)


def run(pretrained: Path, run_dir: Path, folder: Path, task: Any = "knn", **changes: Any) -> dict[str, Any]:
    result = evaluate.main(settings(pretrained, task, cache=str(folder), **changes), run_dir, lambda: False)
    assert result is not None
    return result


def test_features_are_extracted_once(pretrained: Path, tmp_path: Path, extracted: Extracted) -> None:
    folder = tmp_path / "cache"
    first = run(pretrained, tmp_path, folder)
    assert extracted.since() == 216 + 90
    entries = list(folder.iterdir())
    assert sorted(len(list(entry.glob("*.safetensors"))) for entry in entries) == [1, 3]
    keys = [json.loads((entry / "key.json").read_text()) for entry in entries]
    assert {key["split"] for key in keys} == {"train", "val"}
    assert {key["weights_sha256"] for key in keys} == {first["weights_sha256"]}
    assert run(pretrained, tmp_path, folder) == first
    assert extracted.since() == 0
    run(pretrained, tmp_path, folder, {"name": "linear", "blocks": [1]})
    assert extracted.since() == 0, "the linear probe reads what the nearest neighbours read"
    run(pretrained, tmp_path, folder, {"name": "logistic", "num_c": 3, "max_iterations": 20, "part": "inv"})
    assert extracted.since() == 0
    run(pretrained, tmp_path, folder, {"name": "logistic", "num_c": 3, "max_iterations": 20, "dtype": "float16"})
    assert extracted.since() == 216 + 90
    assert evaluate.main(settings(pretrained, "knn"), tmp_path, lambda: False) == first
    assert extracted.since() == 216 + 90, "without a cache"


def test_other_weights_have_other_features(pretrained: Path, tmp_path: Path, extracted: Extracted) -> None:
    import hashlib

    from safetensors.torch import load_file, save_file

    run(pretrained, tmp_path, tmp_path / "cache")
    extracted.since()
    other = Path(shutil.copytree(pretrained, tmp_path / "other"))
    weights = load_file(other / "teacher.safetensors")
    save_file({name: 1.01 * tensor for name, tensor in weights.items()}, other / "teacher.safetensors")
    digest = hashlib.sha256((other / "teacher.safetensors").read_bytes()).hexdigest()
    (other / "result.json").write_text(json.dumps({"weights_sha256": digest}))
    run(other, tmp_path, tmp_path / "cache")
    assert extracted.since() == 216 + 90


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing", "half-written"])
def test_what_is_damaged_is_extracted_anew(
    pretrained: Path, tmp_path: Path, extracted: Extracted, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "cache"
    first = run(pretrained, tmp_path, folder)
    extracted.since()
    (path,) = folder.glob("*/00001.*.safetensors")
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[-5] ^= 1
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(content[:-40])
    else:
        path.unlink()
    if damage == "half-written":  # as `write_atomic` leaves it behind when it is killed
        (path.parent / f".{path.name}.1.abc").write_bytes(content[:100])
    assert run(pretrained, tmp_path, folder) == first
    assert extracted.since() == 100
    assert ("are damaged" in caplog.text) == (damage in ("flipped", "cut"))
    assert run(pretrained, tmp_path, folder) == first
    assert extracted.since() == 0


def test_a_stopped_evaluation_goes_on_with_what_is_there(pretrained: Path, tmp_path: Path, extracted: Extracted) -> None:
    folder = tmp_path / "cache"
    assert evaluate.main(settings(pretrained, "knn", cache=str(folder)), tmp_path, counting(20)) is None  # 9 of each 100 images
    extracted.since()
    run(pretrained, tmp_path, folder)
    assert extracted.since() == 216 + 90 - 200


def test_any_number_of_ranks_reads_it(pretrained: Path, tmp_path: Path, extracted: Extracted, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cache"
    config = settings(pretrained, {"name": "logistic", "mean_patch": True, "num_c": 3, "max_iterations": 20}, cache=str(folder), batch=7)
    written_by_two, _ = run_ranks(on_ranks, 2, config, str(tmp_path), None)
    assert len(list(folder.glob("*/*.safetensors"))) == 2  # of the ranks' ROWS
    read_by_two, _ = run_ranks(on_ranks, 2, config, str(tmp_path), None)
    assert read_by_two == written_by_two
    monkeypatch.setattr(cache, "ROWS", 65536)
    read_by_one = evaluate.main(config, tmp_path, lambda: False)
    assert extracted.since() == 0
    assert read_by_one == written_by_two, "exactly: the features are the same"


def test_one_writes_and_neighbours_wait_with_a_heartbeat(pretrained: Path, tmp_path: Path, extracted: Extracted) -> None:
    """A neighbour has the entry; it stops being alive without having written anything."""
    folder = tmp_path / "cache"
    run(pretrained, tmp_path, folder)
    first = extracted.since()
    held = []
    for entry in folder.iterdir():
        for path in entry.glob("*.safetensors"):
            path.unlink()
        held.append(os.open(entry / ".lock", os.O_RDWR))
        fcntl.flock(held[-1], fcntl.LOCK_EX)
    stages: list[str] = []
    waited = threading.Event()

    def stop() -> bool:
        stage = json.loads((tmp_path / "progress.json").read_text())["stage"]
        stages.append(stage)
        if stages.count("waiting for features of another evaluation") == 3 and not waited.is_set():
            waited.set()
            for handle in held:
                os.close(handle)  # as a process that dies
        return False

    began = time.monotonic()
    result = evaluate.main(settings(pretrained, "knn", cache=str(folder)), tmp_path, stop)
    assert result is not None
    assert waited.is_set()
    assert time.monotonic() - began < 30
    assert extracted.since() == first


def test_stopped_while_waiting(pretrained: Path, tmp_path: Path, extracted: Extracted) -> None:
    folder = tmp_path / "cache"
    run(pretrained, tmp_path, folder)
    held = []
    for entry in folder.iterdir():
        held.append(os.open(entry / ".lock", os.O_RDWR))
        fcntl.flock(held[-1], fcntl.LOCK_EX)
    assert evaluate.main(settings(pretrained, "knn", cache=str(folder)), tmp_path, counting(4)) is None
    for handle in held:
        os.close(handle)


def test_a_folder_that_cannot_be_written(pretrained: Path, tmp_path: Path, extracted: Extracted, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    without = evaluate.main(settings(pretrained, "knn"), tmp_path, lambda: False)
    assert run(pretrained, tmp_path, tmp_path / "file" / "cache") == without
    assert "no cache of features in" in caplog.text


def test_the_bound(pretrained: Path, tmp_path: Path, extracted: Extracted) -> None:
    folder = tmp_path / "cache"
    run(pretrained, tmp_path, folder)
    before = {path.name for path in folder.iterdir()}
    for path in folder.iterdir():
        os.utime(path / ".lock", (1, 1))
    (busy,) = [path for path in folder.iterdir() if json.loads((path / "key.json").read_text())["split"] == "val"]
    handle = os.open(busy / ".lock", os.O_RDWR)
    fcntl.flock(handle, fcntl.LOCK_EX)
    run(pretrained, tmp_path, folder, {"name": "linear", "epochs": 1}, cache_gb=1e-6)
    os.close(handle)
    after = [json.loads((path / "key.json").read_text()) for path in folder.iterdir()]
    assert {key["tokens"] for key in after if key["split"] == "train"} == {"last 2"}, "the one used last is kept"
    assert busy.is_dir(), "and what another process has"
    assert len(before) == 2


def test_the_place(tmp_path: Path) -> None:
    def root(**changes: Any) -> Path | None:
        config = {"checkpoint": str(tmp_path / "pretrain" / "id"), "task": "knn", **changes}
        return cache.root(EvaluateConfig.model_validate(config), tmp_path / "evaluate" / "id")

    assert root() == tmp_path / "pretrain" / ".features"
    assert root(cache="none") is None
    assert root(cache="/there") == Path("/there")
    assert root(checkpoint=None, published={"name": "resnet18", "file": "/x"}, data="/d") == tmp_path / "evaluate" / ".features"
    export = tmp_path / "away" / "export"
    export.mkdir(parents=True)
    (export / "model.safetensors").touch()
    assert root(checkpoint=str(export)) == tmp_path / "evaluate" / ".features"


def test_float16_is_near(pretrained: Path, tmp_path: Path, extracted: Extracted) -> None:
    folder = tmp_path / "cache"
    run(pretrained, tmp_path, folder, {"name": "logistic", "num_c": 3, "max_iterations": 20, "dtype": "float32"})
    run(pretrained, tmp_path, folder, {"name": "logistic", "num_c": 3, "max_iterations": 20, "dtype": "float16"})
    from safetensors.torch import load_file

    found: dict[str, dict[str, torch.Tensor]] = {}
    for entry in folder.iterdir():
        key = json.loads((entry / "key.json").read_text())
        if key["split"] == "val":
            (path,) = entry.glob("*.safetensors")
            found[key["dtype"]] = load_file(path)
    assert found["float16"]["cls"].dtype == torch.float16
    torch.testing.assert_close(found["float16"]["cls"].float(), found["float32"]["cls"], atol=2e-3, rtol=2e-3)
