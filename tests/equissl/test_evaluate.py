"""The evaluation entry from end to end: results and what they stand on, ranks, stopping, names, bad input."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from safetensors.torch import save
from tiny import config as pretraining_config

from equissl import evaluate, prepare
from equissl.data.shards import MANIFEST, ShardSet, describe, manifest_sha256, read_manifest
from equissl.encoder import WEIGHTS, build_encoder, exported_name
from equissl.evals import r2


@pytest.fixture(scope="module")
def pretrained(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run whose teacher is another than the untrained encoder of its config."""
    run_dir = tmp_path_factory.mktemp("pretrained")
    config = pretraining_config(str(photographs))
    teacher = build_encoder(config.model_copy(update={"seed": 99}))
    content = save({exported_name(name): parameter for name, parameter in teacher.named_parameters()})
    (run_dir / WEIGHTS).write_bytes(content)
    (run_dir / "config.json").write_text(config.model_dump_json(by_alias=True))
    (run_dir / "result.json").write_text(json.dumps({"weights_sha256": hashlib.sha256(content).hexdigest()}))
    (run_dir / "COMPLETE").touch()
    return run_dir


def settings(pretrained: Path, task: Any, **changes: Any) -> dict[str, Any]:
    """Without a cache: what is counted are the images."""
    return {"checkpoint": str(pretrained), "task": task, "preset": "smoke", "num_workers": 0, "batch": 16, "cache": "none", **changes}


R2 = {"name": "r2", "num_train_images": 61, "num_val_images": 30, "epochs": 4, "pairs_per_image": 2}


@pytest.mark.parametrize(
    ("task", "main"),
    [
        ("knn", "knn/top1"),
        ("linear", "linear/top1"),
        ("logistic", "logistic/top1"),
        ("projector", "projector/same_image"),
        (R2, "r2/rotation"),
        ({**R2, "transformations": ["blur", "colour"]}, "r2/blur"),
    ],
)
def test_result(pretrained: Path, photographs: Path, tmp_path: Path, task: Any, main: str) -> None:
    result = evaluate.main(settings(pretrained, task), tmp_path, lambda: False)
    assert result is not None
    assert result["main"] == {"metric": main, "higher_is_better": True}
    assert main in result["metrics"]
    assert all(isinstance(value, float) and -1 < value <= 1 for value in result["metrics"].values())
    assert result["weights_sha256"] == hashlib.sha256((pretrained / WEIGHTS).read_bytes()).hexdigest()
    assert result["dataset"] == {"name": "photographs", "manifest_sha256": manifest_sha256(photographs)}
    assert result["num_images"] == {"train": 216, "val": 90}
    assert result["protocol"] == f"{main.partition('/')[0]}-1"
    assert result["versions"]["torch"] == torch.__version__
    assert json.loads(json.dumps(result)) == result
    progress = json.loads((tmp_path / "progress.json").read_text())
    assert set(progress) == {"step", "num_steps", "stage", "images_per_s", "time"}
    again = evaluate.main(settings(pretrained, task), tmp_path, lambda: False)
    assert again == result
    shows = ["tensorboard"] if task in ("knn", "logistic", "projector") else []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["progress.json", *shows]
    assert all(len(list(path.glob("events.*"))) == 1 for path in tmp_path.glob("tensorboard")), "not of both"


def test_a_trained_and_an_untrained_encoder_differ(pretrained: Path, tmp_path: Path) -> None:
    """The control is the untrained encoder of the pretraining's seed, not the teacher again."""
    longer = {**R2, "epochs": 10, "held_out": 0.0}
    result = evaluate.main(settings(pretrained, longer), tmp_path, lambda: False)
    assert result is not None
    assert result["metrics"]["r2/rotation"] != result["metrics"]["r2/rotation/random_encoder"]


def on_ranks(config: dict[str, Any], run_dir: str, stop_after: int | None) -> dict[str, Any] | None:
    """Rank 1 alone is asked to stop."""
    import os

    calls = 0

    def stop() -> bool:
        nonlocal calls
        calls += 1
        return stop_after is not None and os.environ["RANK"] == "1" and calls > stop_after

    return evaluate.main(config, Path(run_dir), stop)


@pytest.mark.parametrize("task", ["knn", R2])
def test_ranks_share_the_images_and_agree(pretrained: Path, tmp_path: Path, task: Any) -> None:
    config = settings(pretrained, task, batch=7)
    alone = evaluate.main(config, tmp_path, lambda: False)
    assert alone is not None
    first, second = run_ranks(on_ranks, 2, config, str(tmp_path), None)
    assert second["metrics"] == {}
    assert first["metrics"].keys() == alone["metrics"].keys()
    for name, value in alone["metrics"].items():
        assert first["metrics"][name] == pytest.approx(value, abs=0.012 if task == "knn" else 1e-3)  # one of 90 images


@pytest.mark.parametrize(("task", "stop_after"), [("knn", 3), ({**R2, "epochs": 300}, 20)])  # among the images; while rank 0 works alone
def test_all_ranks_stop_together(pretrained: Path, tmp_path: Path, task: Any, stop_after: int) -> None:
    assert run_ranks(on_ranks, 2, settings(pretrained, task), str(tmp_path), stop_after) == [None, None]


def test_a_stopped_r2_goes_on(pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the last images and the last probe, on another number of ranks too. Only the batches on the way are seen twice."""
    config, images, fitted = settings(pretrained, R2), [], []
    whole = evaluate.main(config, tmp_path, lambda: False)
    encode, fit = r2._Pairs._encode, r2.fit

    def encoded(self: Any, pixels: Any, indices: Any) -> Any:
        images.append(len(indices))
        return encode(self, pixels, indices)

    def fitting(*arguments: Any) -> Any:
        fitted.append(1)
        return fit(*arguments)

    monkeypatch.setattr(r2._Pairs, "_encode", encoded)
    monkeypatch.setattr(r2, "fit", fitting)
    assert evaluate.main(config, tmp_path, counting(3)) is None
    assert sum(images) == 48  # of which 32 are written
    assert run_ranks(on_ranks, 2, config, str(tmp_path), 2) == [None, None]
    result, attempts = None, 0
    while result is None:
        result, attempts = evaluate.main(config, tmp_path, counting(14)), attempts + 1
        assert attempts < 20
    assert attempts > 2
    assert sum(images) <= 48 + 61 - 32 + 30 + 16
    assert len(fitted) <= 10 + attempts
    assert whole is not None
    assert result["metrics"] == pytest.approx(whole["metrics"], abs=1e-3)  # batches of the two ranks are others
    assert sorted(path.name for path in tmp_path.iterdir()) == ["progress.json"]


def counting(after: int) -> Callable[[], bool]:
    calls = iter(range(10**9))
    return lambda: next(calls) >= after


@pytest.mark.parametrize("after", [0, 5, 40])
def test_stopped(pretrained: Path, tmp_path: Path, after: int) -> None:
    assert evaluate.main(settings(pretrained, R2), tmp_path, counting(after)) is None
    assert evaluate.main(settings(pretrained, "knn"), tmp_path, counting(10**6)) is not None  # groups were left: main can run again


def test_names_tell_other_data_sets(pretrained: Path, photographs: Path, small: dict[str, Any], tmp_path: Path) -> None:
    copied = Path(shutil.copytree(photographs, tmp_path / "copy"))
    same = evaluate.main(settings(pretrained, "knn", data=str(copied)), tmp_path, lambda: False)
    assert same is not None
    assert "knn/top1" in same["metrics"]
    other = tmp_path / "other"
    other.mkdir()
    prepare.main({**small, "seed": 1}, other, lambda: False)
    another = evaluate.main(settings(pretrained, "knn", data=str(other)), tmp_path, lambda: False)
    assert another is not None
    assert "knn:photographs/top1" in another["metrics"]
    assert another["main"]["metric"] == "knn:photographs/top1"
    assert another["dataset"]["manifest_sha256"] == manifest_sha256(other / "data")


def test_bad_input(pretrained: Path, photographs: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="COMPLETE"):
        evaluate.main(settings(tmp_path, "knn"), tmp_path, lambda: False)
    with pytest.raises(ValueError, match="no such folder"):
        evaluate.main(settings(pretrained, "knn", data="nowhere"), tmp_path, lambda: False)
    broken = Path(shutil.copytree(photographs, tmp_path / "broken"))
    (broken / "val-000001.tar").unlink()
    with pytest.raises(ValueError, match=r"val-000001\.tar in .* is missing"):
        evaluate.main(settings(pretrained, "knn", data=str(broken)), tmp_path, lambda: False)
    bad = Path(shutil.copytree(photographs, tmp_path / "bad"))
    data = ShardSet(bad, "val")
    with (bad / "val-000000.tar").open("r+b") as file:
        file.seek(int(data._index[7]["offset"]))
        file.write(b"\0" * 50)
    with pytest.raises(ValueError, match=r"val-000000\.tar in .* was changed"):
        evaluate.main(settings(pretrained, "knn", data=str(bad)), tmp_path, lambda: False)
    (bad / MANIFEST).write_text(json.dumps(read_manifest(bad) | {"splits": _with_what_is_there(bad)}))
    with pytest.raises(ValueError, match=f"1 of 90 images of val .* more than 1 %: {data.key(7)}; get them anew"):
        evaluate.main(settings(pretrained, "knn", data=str(bad)), tmp_path, lambda: False)


def _with_what_is_there(folder: Path) -> dict[str, Any]:
    """The manifest's splits with the checksums of the shards as they are."""
    splits: dict[str, Any] = read_manifest(folder)["splits"]
    for split in splits.values():
        split["shards"] = [shard | describe(folder / shard["name"]) for shard in split["shards"]]
    return splits
