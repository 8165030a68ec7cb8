"""Whole runs through the entry, on two ranks: stopped, killed, resumed, damaged; what they leave behind."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from harness import run_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from equissl import pretrain
from equissl.checkpoint import Checkpoints, find_newest
from equissl.config import PretrainConfig
from equissl.encoder import WEIGHTS, load_random, load_teacher
from equissl.logs import MEASURED

Outcome = tuple[dict[str, Any] | None, list[str]]


def attempt(config: dict[str, Any], run_dir: Path, stop_at: int = 0, kill_at: int = 0) -> Outcome:
    """One execution on one rank: what `main` returned, and what was logged. Rank 1 alone is asked to stop."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("equissl").addHandler(handler)
    calls = 0

    def stop() -> bool:
        nonlocal calls
        calls += 1
        if calls == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return calls == stop_at and os.environ["RANK"] == "1"

    return pretrain.main(config, run_dir, stop), messages


@pytest.fixture(scope="module")
def config(photographs: Path) -> dict[str, Any]:
    settings = tiny.config(str(photographs), checkpoint_every=2, num_steps=7, auxiliary__lambda=0.5)
    return settings.model_dump(mode="json", by_alias=True)


@pytest.fixture(scope="module")
def whole(config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run of seven steps on two ranks that nobody interrupted."""
    run_dir = tmp_path_factory.mktemp("whole")
    (result, _), (other, _) = run_ranks(attempt, 2, config, run_dir)
    assert result
    assert other == {}
    return run_dir, result


@pytest.fixture(scope="module")
def killed(config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder after both ranks died in the sixth step; the checkpoints are of steps 2 and 4."""
    run_dir = tmp_path_factory.mktemp("killed")
    run_ranks(attempt, 2, config, run_dir, 0, 6, killed=True)
    return run_dir


def curve(run_dir: Path) -> list[dict[str, float]]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name not in MEASURED} for record in records]


def board(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """TensorBoard's curves, which no step is doubled in or missing from."""
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    curves = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    curves["views"] = [(event.step, float(zlib.crc32(event.encoded_image_string))) for event in events.Images("views")]
    return {tag: curve for tag, curve in curves.items() if tag.removeprefix("pretrain/") not in MEASURED}


def checkpoints(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_stopped_and_resumed_is_bit_identical(config: dict[str, Any], whole: Any, tmp_path: Path) -> None:
    """One rank's flag stops both one step late, with the state saved."""
    for result, _ in run_ranks(attempt, 2, config, tmp_path, 3):
        assert result is None
    assert checkpoints(tmp_path)[-1] == "step_4"
    assert [record["step"] for record in curve(tmp_path)] == [1, 2, 3, 4]
    assert not (tmp_path / WEIGHTS).exists()
    (result, _), (other, _) = run_ranks(attempt, 2, config, tmp_path)
    assert other == {}
    assert curve(tmp_path) == curve(whole[0])
    assert board(tmp_path) == board(whole[0])
    assert {**result, "metrics": 0} == {**whole[1], "metrics": 0}  # with the weights' sha256; the speed is another


def test_killed_and_resumed_is_bit_identical(config: dict[str, Any], whole: Any, killed: Path, tmp_path: Path) -> None:
    run_dir = shutil.copytree(killed, tmp_path / "run")
    (run_dir / "checkpoints" / ".writing_6").mkdir()  # killed while it was writing
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    result = run_ranks(attempt, 2, config, run_dir)[0][0]
    assert curve(run_dir) == curve(whole[0])
    assert board(run_dir) == board(whole[0])
    assert result["weights_sha256"] == whole[1]["weights_sha256"]
    assert checkpoints(run_dir) == ["step_6", "step_7"]


def slowly(config: dict[str, Any], run_dir: Path, kill_at: int = 0) -> tuple[str, list[int]]:
    """Saves take a second behind steps of a few hundredths. Returns what a kill after each step would have lost."""
    complete, losses = Checkpoints._complete, []
    Checkpoints._complete = lambda *arguments: (time.sleep(1), complete(*arguments))[1]  # type: ignore[method-assign, assignment]

    def stop() -> bool:
        step = len(losses) + 1
        losses.append(step - find_newest(run_dir / "checkpoints"))
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return False

    result = pretrain.main(config, run_dir, stop)
    assert result is not None
    return result["weights_sha256"], losses


def test_a_kill_loses_one_interval_at_most_also_while_saves_are_written_behind(config: dict[str, Any], tmp_path: Path) -> None:
    config = {**config, "checkpoint_every": 10, "num_steps": 21}
    for name in ("whole", "run"):
        (tmp_path / name).mkdir()
    ((weights_sha256, losses),) = run_ranks(slowly, 1, config, tmp_path / "whole")
    assert losses[:8] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert max(losses) == 10, "one interval, and the step after each save did not wait for it"
    run_ranks(slowly, 1, config, tmp_path / "run", 19, killed=True)
    assert checkpoints(tmp_path / "run") == [".writing_18", "step_9"]
    ((result, _),) = run_ranks(attempt, 1, config, tmp_path / "run")
    assert result["weights_sha256"] == weights_sha256
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")


def test_resumed_on_another_number_of_ranks_is_close(config: dict[str, Any], whole: Any, killed: Path, tmp_path: Path) -> None:
    run_dir = shutil.copytree(killed, tmp_path / "run")
    ((result, _),) = run_ranks(attempt, 1, config, run_dir)
    for mine, other in zip(curve(run_dir), curve(whole[0]), strict=True):
        assert mine == pytest.approx(other, rel=1e-3)
    assert curve(run_dir)[:4] == curve(whole[0])[:4]
    assert result["world_size"] == 1


def test_a_damaged_checkpoint_is_reported_and_the_one_before_used(config: dict[str, Any], whole: Any, killed: Path, tmp_path: Path) -> None:
    run_dir = shutil.copytree(killed, tmp_path / "run")
    assert checkpoints(run_dir) == ["step_2", "step_4"]
    file = run_dir / "checkpoints" / "step_4" / "__1_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    result, messages = run_ranks(attempt, 2, config, run_dir)[0]
    assert any("step_4 cannot be used: __1_0.distcp is not what checksums.json says" in message for message in messages)
    assert curve(run_dir) == curve(whole[0])
    assert result["weights_sha256"] == whole[1]["weights_sha256"]


def test_a_finished_run_only_writes_its_result_again(config: dict[str, Any], whole: Any, tmp_path: Path) -> None:
    """As after a kill between the last checkpoint and COMPLETE."""
    run_dir = shutil.copytree(whole[0], tmp_path / "run")
    (run_dir / WEIGHTS).unlink()
    result = run_ranks(attempt, 2, config, run_dir)[0][0]
    assert result["weights_sha256"] == whole[1]["weights_sha256"]
    assert result["final_loss"] == whole[1]["final_loss"]
    assert "pretrain/images_per_s" not in result["metrics"]


def test_the_logs(config: dict[str, Any], whole: Any) -> None:
    run_dir, result = whole
    records = curve(run_dir)
    assert [record["step"] for record in records] == list(range(1, 8))
    for record in records:
        assert record["loss"] == pytest.approx(record["cls"] + record["patch"] + 0.5 * record["reconstruction"])
        assert record["epoch"] == pytest.approx(record["step"] / 13, abs=1e-4)
        assert {"lr", "weight_decay", "ema", "teacher_temperature", "grad_norm"} <= record.keys()
    assert result["final_loss"] == records[-1]["loss"] == result["metrics"]["pretrain/loss"]
    assert result["metrics"]["pretrain/images_per_s"] > 0
    assert result["num_steps"] == 7
    assert result["world_size"] == 2
    progress = json.loads((run_dir / "progress.json").read_text())
    assert progress["step"] == progress["num_steps"] == 7
    assert progress["eta_s"] == 0
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("pretrain/reconstruction")] == list(range(1, 8))
    pictures = events.Images("views")
    assert [picture.step for picture in pictures] == [4, 7]
    assert (pictures[0].width, pictures[0].height) == (8 * 33 * 3, 8 * 33 * 3)  # view, 3 pairs, view × 8 samples of this rank, enlarged
    assert len(list(run_dir.rglob("*"))) < 25


def test_the_exported_teacher(config: dict[str, Any], whole: Any, tmp_path: Path) -> None:
    run_dir = shutil.copytree(whole[0], tmp_path / "run")
    with pytest.raises(ValueError, match="no COMPLETE marker"):
        load_teacher(run_dir)
    (run_dir / "COMPLETE").touch()
    (run_dir / "config.json").write_text(json.dumps(config))
    (run_dir / "result.json").write_text(json.dumps(whole[1]))
    encoder, settings, sha256 = load_teacher(run_dir)
    assert sha256 == whole[1]["weights_sha256"]
    assert settings == PretrainConfig.model_validate(config)
    images = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
    features = encoder(images)
    assert features.cls.shape == (2, 192)
    assert features.patches.shape == (2, 16, 192)
    assert features.inv_cls.shape == (2, 32)
    assert features.inv_patches.shape == (2, 16, 32)
    assert features.equi is not None
    assert features.equi.shape == (2, 16, 16)
    assert not torch.allclose(features.cls, load_random(settings)(images).cls)
    assert encoder(torch.zeros(1, 3, 16, 48)).patches.shape == (1, 12, 192)

    (run_dir / "config.json").write_text(json.dumps({**config, "auxiliary": None}))
    with pytest.raises(ValueError, match=r"missing nothing, unknown split.equi.bias, "):
        load_teacher(run_dir)
    weights = bytearray((run_dir / WEIGHTS).read_bytes())
    weights[-1] ^= 1
    (run_dir / WEIGHTS).write_bytes(weights)
    with pytest.raises(ValueError, match="changed or damaged"):
        load_teacher(run_dir)


def test_a_run_stops_at_what_is_not_finite_and_does_not_save_it(config: dict[str, Any], tmp_path: Path) -> None:
    settings = {
        **config,
        "checkpoint_every": 1,
        "method": {**config["method"], "optimizer": {**config["method"]["optimizer"], "base_lr": 1e38}},
    }
    with pytest.raises(FloatingPointError, match=r"^step 2: the term cls is nan on rank 0; the update was not applied; .*rank_0.json"):
        pretrain.main(settings, tmp_path, lambda: False)
    assert checkpoints(tmp_path) == ["step_1"]
    assert [record["step"] for record in curve(tmp_path)] == [1]
    told = json.loads((tmp_path / "refused" / "step_2_rank_0.json").read_text())
    assert told["terms"]["cls"] == "nan"
    assert len(told["keys"]) == 16
    assert "-train-" in told["keys"][0]


def test_what_does_not_fit_is_refused(config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="216 images, fewer than one batch of 512"):
        pretrain.main({**config, "batch": 512}, tmp_path, lambda: False)
    with pytest.raises(ValueError, match="there is no such folder"):
        pretrain.main({**config, "data": str(tmp_path / "nowhere")}, tmp_path, lambda: False)


def test_staged_data_are_the_same_and_gone_afterwards(config: dict[str, Any], whole: Any, tmp_path: Path) -> None:
    node = tmp_path / "node"
    node.mkdir()
    (tmp_path / "run").mkdir()
    staged = {**config, "stage": {"to": str(node), "budget_gb": 1.0}}
    result, _ = run_ranks(attempt, 2, staged, tmp_path / "run")[0]
    assert result["weights_sha256"] == whole[1]["weights_sha256"]
    assert result["data"] == whole[1]["data"]
    assert not list(node.iterdir())
    left = node / f"equihpc-{os.getuid()}" / "0123-left"  # of a run that was killed
    left.mkdir(mode=0o700, parents=True)
    left.parent.chmod(0o700)
    pretrain.tidy(staged)
    assert not left.exists()
    pretrain.tidy(config)


def test_data_that_vanishes_stops_all_ranks_with_the_state_saved(
    config: dict[str, Any], whole: Any, photographs: Path, tmp_path: Path
) -> None:
    """One rank cannot read a shard any more; both stop at the same step, and when the data are back the run ends as it would have."""
    data, run_dir = Path(shutil.copytree(photographs, tmp_path / "data")), tmp_path / "run"
    run_dir.mkdir()
    outcomes = run_ranks(attempt_without, 2, {**config, "data": str(data)}, run_dir, data)
    assert outcomes[0] is None
    assert outcomes[1].startswith("ShardLost: the shard")
    assert "copy it again" in outcomes[1]
    (saved,) = (int(name.removeprefix("step_")) for name in checkpoints(run_dir)[-1:])
    assert 3 <= saved < 7
    assert [record["step"] for record in curve(run_dir)] == list(range(1, saved + 1))
    result = run_ranks(attempt, 2, config, run_dir)[0][0]
    assert curve(run_dir) == curve(whole[0])
    assert result["weights_sha256"] == whole[1]["weights_sha256"]


def attempt_without(config: dict[str, Any], run_dir: Path, data: Path) -> str | None:
    """From its third step on rank 1 finds no shard."""
    from equissl.data import shards

    steps = 0

    def stop() -> bool:
        nonlocal steps
        steps += 1
        if steps == 2 and os.environ["RANK"] == "1":
            shards.RETRY_SECONDS = (0.0, 0.0)
            shards.os.open = raising  # type: ignore[assignment]
            shards.os.preadv = raising  # type: ignore[assignment]
        return False

    def raising(*_: object) -> int:
        raise FileNotFoundError(2, "No such file or directory", str(data))

    try:
        assert pretrain.main(config, run_dir, stop) is None
    except shards.ShardLost as error:
        return f"ShardLost: {error}"
    return None
