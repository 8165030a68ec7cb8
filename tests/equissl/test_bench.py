"""The measuring command on a tiny pretraining, and the noise that stands for images."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from typer.testing import CliRunner

from equissl import bench, logs, pretrain
from equissl.config import SYNTHETIC, EvaluateConfig
from equissl.data.shards import find
from equissl.data.synthetic import Synthetic
from equissl.logs import forget_peak
from equissl.optim import Report


def written(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(tiny.config(**changes).model_dump(mode="json", by_alias=True)))
    return path


def test_measures_both_inputs_and_leaves_nothing(photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In two parts per batch: the phases come twice in a step, and are all of it."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    config = written(tmp_path, data=str(photographs), accumulate=2, num_steps=100_000)
    assert bench.command([str(config), "--steps", "3", "--scratch", str(scratch), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["batch"] == 16
    assert found["inputs"].keys() == {"synthetic", "real"}
    for figures in found["inputs"].values():
        assert figures["images_per_s"] == pytest.approx(16 / figures["seconds_per_step"])
        assert figures["flops_per_s"] == pytest.approx(figures["images_per_s"] * found["flops_per_image"])
        assert all(seconds > 0 for seconds in figures["phases"].values())
        assert sum(figures["phases"].values()) == pytest.approx(figures["seconds_per_step"], rel=0.1)
        assert figures["mfu"] is None, "of a CPU no peak is known"
        assert figures["memory_bytes"] > 1e8
    saved = found["checkpoint"]
    assert 0 < saved["stall_seconds"] <= saved["seconds"]
    assert saved["bytes"] > 1e6
    assert not list(scratch.iterdir())
    bench.show({**found, "data_problem": "lost"})
    shown = capsys.readouterr().out
    assert "real input was not measured: lost" in shown
    assert f"{found['inputs']['real']['images_per_s']:.1f}" in shown
    assert "of which training waits" in shown


def test_a_refused_update_and_data_that_are_not_there_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = written(tmp_path, data=str(tmp_path / "nowhere"))
    assert bench.command([str(config), "--input", "real"]) == 2
    assert "there is no such folder" in capsys.readouterr().err
    assert bench.command([str(config), "--steps", "1", "--scratch", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err
    config.write_text("{}")
    assert bench.command([str(config)]) == 2
    assert "data: Field required" in capsys.readouterr().err
    monkeypatch.setattr(bench, "LR", float("nan"))
    config = written(tmp_path, data=SYNTHETIC)
    with pytest.raises(FloatingPointError, match=r"^step 2 on synthetic: the term cls is nan on rank 0"):  # the first one's loss is finite
        bench.command([str(config), "--steps", "1"])


@pytest.mark.parametrize("number", [1, bench.WARM_UP + 2])
def test_the_step_that_was_refused_is_named_also_the_last_one(
    number: int, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the second input, whose steps go on in the trainer where the first one's ended."""
    update = bench.Trainer.update

    def refused(self: bench.Trainer, step: int, *arguments: Any) -> Report:
        report = update(self, step, *arguments)
        if step + 1 == bench.WARM_UP + 2 + number:
            report = Report(torch.tensor([1.0, float("nan")]), ["a.weight"], ["cls"], torch.tensor(0.0))
        return report

    monkeypatch.setattr(bench.Trainer, "update", refused)
    config = written(tmp_path, data=str(photographs))
    with pytest.raises(FloatingPointError, match=rf"^step {number} on photographs: the term cls is nan on rank 0"):
        bench.command([str(config), "--steps", "2"])


def test_each_inputs_peak_memory_is_its_own(photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no GPU here: what it would be asked for is what is noted."""
    asked: list[str] = []
    monkeypatch.setattr(bench, "forget_peak", lambda device: asked.append("forget"))
    monkeypatch.setattr(bench, "memory_bytes", lambda device: asked.append("read") or 1.0)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: asked.append(str(device)))
    assert bench.command([str(written(tmp_path, data=str(photographs))), "--steps", "1"]) == 0
    assert asked == ["forget", "read"] * 2
    for name in ("cpu", "cuda:1"):
        forget_peak(torch.device(name))
    assert asked[4:] == ["cuda:1"]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's own tracer asks for it
@pytest.mark.parametrize("works", [True, False])
def test_what_ran_is_told_and_not_what_was_asked_for(
    works: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compiler(function: Any, **options: Any) -> Any:
        def failing(*arguments: Any) -> Any:
            raise RuntimeError("no compiler")

        return function if works else failing

    monkeypatch.setattr(torch, "compile", compiler)
    assert bench.command([str(written(tmp_path, data=SYNTHETIC, compile=True)), "--steps", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["compiled"] is works
    bench.show({**found, "data_problem": None})
    assert (", compiled," if works else ", eager,") in capsys.readouterr().out


def test_the_stall_of_a_checkpoint_has_the_logs_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logs, "sync", lambda path: time.sleep(1))
    assert bench.command([str(written(tmp_path, data=SYNTHETIC)), "--steps", "1", "--json"]) == 0
    saved = json.loads(capsys.readouterr().out)["checkpoint"]
    assert 2 <= saved["stall_seconds"] <= saved["seconds"], "two files"


def test_the_command_gives_each_process_its_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job's two processes are one here."""
    from hpc.cli import app
    from hpc.commands import bench as module

    config = tiny.config(data=SYNTHETIC, batch=32).model_dump(mode="json", by_alias=True)
    stages = {
        "prepare": {"entry": "equissl.prepare", "resources": {"gpus": 0}},
        "pretrain": {"entry": "equissl.pretrain", "resources": {"gpus": 2, "hours": 1}, "config": config},
    }
    (tmp_path / "job.yaml").write_text(json.dumps({"stages": stages}))
    seen: list[Any] = []

    def call(command: list[str]) -> int:
        seen.append((command, json.loads(next(Path(word) for word in command if word.endswith("config.json")).read_text())))
        return 3

    monkeypatch.setattr(module, "call", call)
    monkeypatch.chdir(tmp_path)
    for processes in ("1", "2"):
        words = ["bench", "job.yaml", "--cluster", "local", "--steps", "7", "--processes", processes, "--json"]
        assert CliRunner().invoke(app, words).exit_code == 3
    (one, config1), (two, config2) = seen
    assert one[1:3] == ["-m", "equissl.bench"]
    assert one[4:] == ["--steps", "7", "--json"]
    assert "--nproc-per-node=2" in two
    assert (config1["batch"], config2["batch"]) == (16, 32)
    assert config1["data"] == SYNTHETIC
    (tmp_path / "job.yaml").write_text(json.dumps({"stages": {"prepare": stages["prepare"]}}))
    refused = CliRunner().invoke(app, ["bench", "job.yaml", "--cluster", "local"])
    assert "has no stage with entry equissl.pretrain" in str(refused.exception)


# --- noise instead of images ------------------------------------------------------------------------------------------------


def test_noise_is_drawn_once_and_its_positions_go_on() -> None:
    settings = tiny.config(data=SYNTHETIC, num_steps=5, method__views__num_local=2)
    source = Synthetic(settings, torch.device("cpu"))
    batches = {rank: list(source.loader(rank, 2, 1, 5)) for rank in range(2)}
    resumed = next(source.loader(1, 2, 3, 5))
    assert torch.equal(resumed.position, batches[1][2].position)
    assert torch.equal(resumed.view1, batches[1][2].view1)
    for step in range(4):
        mine, other = batches[0][step], batches[1][step]
        assert mine.step == 1 + step
        assert torch.cat([mine.position, other.position]).tolist() == list(range(16 * (1 + step), 16 * (2 + step)))
        assert mine.view1 is batches[0][0].view1
        assert not torch.equal(mine.view1, other.view1)
    example = tiny.batch(settings, 0, 0, 2)
    for name in ("view1", "source2", "local", "index", "label"):
        mine, expected = getattr(batches[0][0], name), getattr(example, name)
        assert (mine.shape, mine.dtype) == (expected.shape, expected.dtype), name
    assert 120 < batches[0][0].source2.float().mean() < 135


def test_a_pretraining_on_noise(tmp_path: Path) -> None:
    settings = tiny.config(data=SYNTHETIC, num_steps=2).model_dump(mode="json", by_alias=True)
    result = pretrain.main(settings, tmp_path, lambda: False)
    assert result is not None
    assert result["data"] == {"name": "synthetic", "manifest_sha256": None}


@pytest.mark.parametrize("changes", [{"num_steps": None, "epochs": 1.0}, {"stage": {"budget_gb": 1.0}}, {"pipeline": "reference"}])
def test_noise_has_no_epochs_files_or_decoding(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="'synthetic' has no epochs, files or decoding: give num_steps"):
        tiny.config(data=SYNTHETIC, **changes)


def test_there_is_nothing_to_evaluate_on_noise() -> None:
    upstream = {"pretrain": tiny.config(data=SYNTHETIC).model_dump(mode="json", by_alias=True)}
    of_noise = EvaluateConfig.model_validate({"checkpoint": "${pretrain}", "task": "knn"})
    with pytest.raises(ValueError, match="nothing to evaluate"):
        of_noise.check(1, upstream)
    EvaluateConfig.model_validate({"checkpoint": "${pretrain}", "task": "knn", "data": "photographs"}).check(1, upstream)
    with pytest.raises(ValueError, match="here a data set is needed"):
        find(SYNTHETIC)


def test_a_subset_that_would_leave_out_nobody_is_refused() -> None:
    with pytest.raises(ValueError, match=r"leaves out none of the 4 local crops of a group: give a rate of at least 0.25"):
        tiny.config(backbone__drop_path=0.2, backbone__drop_path_mode="batch")
    tiny.config(backbone__drop_path=0.2, backbone__drop_path_mode="batch", method__views__num_local=2)
    tiny.config(backbone__drop_path=0.0, backbone__drop_path_mode="batch")
