"""What TensorBoard, metrics.jsonl and the profile hold. Whole runs, resumed ones too, are in test_loop."""

from __future__ import annotations

import gzip
import io
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from pydantic import ValidationError
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.summary.writer.record_writer import RecordWriter

from equissl import logs, pretrain
from equissl.checkpoint import Checkpoints
from equissl.config import PretrainConfig
from equissl.data.loader import Loader
from equissl.distributed import World
from equissl.estimates import pretraining_flops, vit_flops
from equissl.logs import MEASURED, Late, Logs
from equissl.optim import Fetch, Report

PLUGIN = "hparams"


@pytest.fixture(scope="module")
def run(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of five steps, with a profile of two of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RANK", raising=False)
        run_dir = tmp_path_factory.mktemp("run")
        settings = tiny.config(str(photographs), num_steps=5, monitor_every=2, profile_steps=(2, 3))
        assert pretrain.main(settings.model_dump(mode="json", by_alias=True), run_dir, lambda: False)
    return run_dir


def records(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def board(run_dir: Path) -> EventAccumulator:
    return EventAccumulator(str(run_dir / "tensorboard")).Reload()


def test_every_figure_is_in_both_and_the_same(run: Path) -> None:
    lines, events = records(run), board(run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    always = {
        "loss",
        "cls",
        "patch",
        "reconstruction",
        "lr",
        "weight_decay",
        "ema",
        "teacher_temperature",
        "epoch",
        "loss_spikes",
        "memory_gb",
    }
    always |= {"feature_std", "target_entropy", "mean_target_entropy", "grad_norm", "checkpoint_wait_s"}
    always |= {f"grad_norm/{module}" for module in ("blocks", "backbone", "split", "head", "decoders")}
    expected = {name: [1, 2, 3, 4, 5] for name in always}
    expected |= {name: [2, 3, 4, 5] for name in ("images_per_s", "data_wait_s")}  # the first step is the clock's beginning
    expected |= {name: [2, 4, 5] for name in ("knn_top1", "effective_rank")}
    found = {tag.removeprefix("pretrain/"): events.Scalars(tag) for tag in events.Tags()["scalars"]}
    assert {name: [event.step for event in curve] for name, curve in found.items()} == expected
    for name, curve in found.items():
        for event in curve:
            assert event.value == pytest.approx(lines[event.step - 1][name], rel=1e-6), name
    assert all(0 < line["feature_std"] <= 1.01 and 0 < line["target_entropy"] < line["mean_target_entropy"] < 1 for line in lines)
    assert 1 < lines[-1]["effective_rank"] <= 16
    for line in lines:
        of_modules = sum(value**2 for name, value in line.items() if name.startswith("grad_norm/"))
        assert line["grad_norm"] ** 2 == pytest.approx(of_modules, rel=1e-6)


def test_the_settings_are_tensorboards_hparams_of_the_run_itself(run: Path) -> None:
    events = board(run)
    told = {tag: HParamsPluginData.FromString(content) for tag, content in events.PluginTagToContent(PLUGIN).items()}
    start = told["_hparams_/session_start_info"].session_start_info.hparams
    assert start["auxiliary.lambda"].number_value == 1
    assert start["method.optimizer.base_lr"].number_value == 2e-2
    assert start["transformation.name"].string_value == "se2"
    assert start["method.views.global_scale"].string_value == "[0.25, 1.0]"
    assert "epochs" in start
    assert told.keys() == {"_hparams_/session_start_info", "_hparams_/session_end_info"}, "an experiment's columns would be one run's"
    assert [path.name for path in (run / "tensorboard").iterdir() if path.is_dir()] == [], "no run of its own"


def test_the_profile_is_a_trace_of_the_steps_asked_for(run: Path) -> None:
    (file,) = (run / "profile").iterdir()
    assert file.name == "steps_2_to_3.pt.trace.json.gz"
    names = [event.get("name", "") for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]]
    assert {name for name in names if name.startswith("ProfilerStep#")} == {"ProfilerStep#1", "ProfilerStep#2"}  # from 0 on
    assert any("scaled_dot_product" in name for name in names)


@pytest.mark.parametrize("steps", [(1, 3), (4, 3), (0, 0)])
def test_a_profile_that_cannot_be_is_refused(steps: tuple[int, int]) -> None:
    with pytest.raises(ValidationError, match="must be two steps with 2 <= first <= last"):
        tiny.config(profile_steps=steps)


def test_what_is_flushed_can_be_read_before_the_end(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what an attempt that was killed told of later steps than its checkpoint is gone."""
    settings, write = tiny.config(log_every=2), RecordWriter.write
    monkeypatch.setattr(RecordWriter, "write", lambda self, data: (time.sleep(0.02), write(self, data)))  # in the board's thread
    first = Logs(tmp_path, 0, tiny.TIMELINE, settings, world, lambda: 0.0)
    for step in range(1, 5):
        first.step(step, {"loss": float(step)})
    first.flush()
    assert [(event.step, event.value) for event in board(tmp_path).Scalars("pretrain/loss")] == [(2, 2.0), (4, 4.0)]
    second = Logs(tmp_path, 3, tiny.TIMELINE, settings, world, lambda: 0.0)
    for step in range(4, 7):
        second.step(step, {"loss": 10.0 * step})
    second.close()
    first.close()
    assert [(event.step, event.value) for event in board(tmp_path).Scalars("pretrain/loss")] == [(2, 2.0), (4, 40.0), (6, 60.0)]
    assert [(record["step"], record["loss"]) for record in records(tmp_path)] == [(2, 2.0), (4, 40.0), (6, 60.0)]


def test_a_flush_syncs_this_attempts_files_alone(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(logs, "sync", synced.append)
    for attempt in range(3):
        log = Logs(tmp_path, attempt, tiny.TIMELINE, tiny.config(), world, lambda: 0.0)
        log.flush()
        log.step(attempt + 1, {"loss": 1.0})
        log.flush()
        log.close()
    events = set((tmp_path / "tensorboard").iterdir())
    assert len(events) == 3
    assert set(synced) == {tmp_path / "metrics.jsonl", *events}
    assert len(synced) == 3 * 4 - 1, "two files at each flush, but for the metrics before the first record"


def test_what_a_save_costs_the_loop_has_the_logs_in_it(photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(Checkpoints, "save", lambda *arguments, **how: None)
    monkeypatch.setattr(Logs, "flush", lambda self: time.sleep(0.1))
    settings = tiny.config(str(photographs), num_steps=3, checkpoint_every=1)
    assert pretrain.main(settings.model_dump(mode="json", by_alias=True), tmp_path, lambda: False)
    waited = [record["checkpoint_wait_s"] for record in records(tmp_path)]
    assert waited[0] < 0.1 <= waited[1] < waited[2], "each step's record is read before its save"
    assert waited[2] >= 0.2


def test_speed_mfu_and_waiting_are_of_the_steps_since_the_last_record(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, clock, waited = tiny.config(log_every=2, batch=16), [100.0], [3.0]
    monkeypatch.setattr(logs.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(logs, "peak_flops", lambda device: 1e12)
    log = Logs(tmp_path, 0, tiny.TIMELINE, settings, world, lambda: waited[0])
    for step in range(1, 6):
        log.step(step, {"loss": 1.0})
        clock[0] += 0.5
        waited[0] += 0.1
    log.close()
    two, four = records(tmp_path)
    student, teacher = pretraining_flops(settings)
    assert two["images_per_s"] == four["images_per_s"] == 32
    assert four["mfu"] == pytest.approx(32 * (3 * student + teacher) / 1e12, abs=1e-4)
    assert four["mfu"] > 32 * 3 * 2 * vit_flops(settings.backbone.facts, settings.side) / 1e12, "two views, forward and backward"
    assert two["data_wait_s"] == four["data_wait_s"] == pytest.approx(0.1)
    assert 0.05 < four["memory_gb"] < 100
    assert set(MEASURED) >= {"images_per_s", "mfu", "data_wait_s", "memory_gb"}


def test_gpus_are_known_by_name_and_others_have_no_mfu(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {
        "NVIDIA A100-SXM4-40GB": 312e12,
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA GH200 120GB": 989e12,
        "AMD Instinct MI250X": 191.5e12,
        "NVIDIA Something": None,
    }
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert logs.peak_flops(torch.device("cuda", 0)) == peak
    assert logs.peak_flops(torch.device("cpu")) is None


def test_a_spike_is_logged_and_counted_also_after_a_resume(world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    timeline, settings = tiny.TIMELINE._replace(num_steps=40), tiny.config(spike_factor=2.0)
    for start, stop in ((0, 15), (13, 21)):
        log = Logs(tmp_path, start, timeline, settings, world, lambda: 0.0)
        with caplog.at_level(logging.WARNING, "equissl.logs"):
            for step in range(start + 1, stop):
                log.step(step, {"loss": 9.0 if step in (12, 13, 14, 19) else 1.0})
        log.close()
    assert [message.split(",")[0] for message in caplog.messages] == ["step 12: the loss is 9", "step 19: the loss is 9"]
    counts = {record["step"]: record["loss_spikes"] for record in records(tmp_path)}
    assert [counts[step] for step in (11, 12, 18, 19, 20)] == [0, 1, 1, 2, 2]


def refusing(term: float, world: World) -> Report:
    return Report(torch.tensor([1.0, term]), ["a.weight"], ["cls"], torch.tensor(0.0))


def test_a_refusal_names_the_file_with_the_samples(world: World, tmp_path: Path) -> None:
    batch = tiny.batch(tiny.config(), 0)
    late = Late(None, {}, tmp_path, 0, lambda index: [f"key-{image}" for image in index.tolist()])
    late.put(7, batch, refusing(float("nan"), world), {}, None)
    file = tmp_path / "refused" / "step_7_rank_0.json"
    with pytest.raises(
        FloatingPointError, match=rf"^step 7: the term cls is nan on rank 0; the update was not applied; {file} lists this rank"
    ):
        late.read()
    told = json.loads(file.read_text())
    assert told["keys"] == [f"key-{image}" for image in range(16)]
    assert told["positions"] == list(range(16))
    assert (told["step"], told["rank"], told["terms"]) == (7, 0, {"cls": "nan"})

    late = Late(None, {}, file, 0, lambda index: [])  # a file where the folder should be
    late.put(7, batch, refusing(float("inf"), world), {}, None)
    with pytest.raises(
        FloatingPointError, match=r"the term cls is inf on rank 0; the update was not applied; .* could not be written: .*Not a dir"
    ):
        late.read()


def test_a_picture_is_written_when_its_step_is(world: World, tmp_path: Path) -> None:
    settings = tiny.config()
    log = Logs(tmp_path, 0, tiny.TIMELINE, settings, world, lambda: 0.0)
    views = tiny.Run(settings, world).views(0)
    log.pictures(1, views, list(views.targets if views.targets is not None else ()))
    log.flush()
    assert board(tmp_path).Tags()["images"] == []
    log.step(1, {"loss": 1.0})
    log.close()
    (shown,) = board(tmp_path).Images("views")
    assert shown.step == 1
    with Image.open(tmp_path / "pictures" / "views.png") as kept, Image.open(io.BytesIO(shown.encoded_image_string)) as told:
        assert kept.size == told.size
        assert abs(np.asarray(kept, int) - np.asarray(told, int)).max() <= 1, "one is rounded, the other cut"
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["views.png"]


def test_fetch_gives_the_tensor() -> None:
    assert Fetch(torch.arange(3)).read().tolist() == [0, 1, 2]


def test_the_flat_settings_name_every_value() -> None:
    settings = PretrainConfig.model_validate({"data": "photographs", "batch": 8, "num_steps": 1}).model_dump(mode="json", by_alias=True)
    flat = logs._flat(settings)
    assert flat["backbone.name"] == flat["backbone"] == "vit_small_patch16_224"
    assert flat["auxiliary"] == "null"
    assert all(isinstance(value, (str, int, float)) for value in flat.values())


def test_waiting_for_data_is_counted_once() -> None:
    def slow() -> Iterator[Any]:
        for step in range(3):
            time.sleep(0.02)
            yield tiny.batch(tiny.config(), step)

    loader = Loader(slow(), 0.0, lambda: None)
    assert loader.waited_s == 0
    next(loader)
    assert not loader.has_failed()  # fetches the next two
    waited = loader.waited_s
    assert waited >= 0.06
    next(loader)
    next(loader)
    assert loader.waited_s == waited
