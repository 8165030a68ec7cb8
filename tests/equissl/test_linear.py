"""The linear probe: each head of the grid is a head of its own, trained by torch's optimizers; figures are torchmetrics'; an evaluation
that was stopped ends as if it had not been; what features it reads."""

from __future__ import annotations

import errno
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from harness import run_ranks
from pydantic import ValidationError
from test_evaluate import counting, on_ranks, pretrained, settings
from tiny import config as pretraining_config
from torch import nn
from torchmetrics.functional.classification import multiclass_accuracy

from equissl import classify, draws, evaluate
from equissl.classify import Tally, Variant, held_out
from equissl.config import PRESETS, EvaluateConfig, Linear
from equissl.data.labelled import Sets
from equissl.data.shards import ShardSet
from equissl.encoder import build_encoder
from equissl.evals import linear
from equissl.features import Normed, RandomCrop
from equissl.files import DiskFull

__all__ = ["pretrained"]  # a fixture

WIDTH, CLASSES, ROWS = 6, 5, 70
VARIANTS = [Variant(1, False), Variant(1, True), Variant(3, False), Variant(3, True)]


def grid(**changes: Any) -> Linear:
    return Linear(**{"base_lrs": (0.01, 0.3), "batch": 16, "epochs": 3, "weight_decay": 0.05, **changes})


def made(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS, 4 * WIDTH, generator=generator), torch.randint(CLASSES, (ROWS,), generator=generator)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("number", [0, 3, 5, 6])
def test_a_head_of_the_grid_is_the_head_alone(optimizer: str, number: int) -> None:
    """A plain loop over one head, of the same start and order."""
    task, (x, labels) = grid(optimizer=optimizer), made()
    heads = linear.Heads(VARIANTS, WIDTH, task, CLASSES, ROWS, 7, torch.device("cpu"))
    variant, which = VARIANTS[number // 2], number % 2
    weight, bias = heads.parameters[number // 2]
    columns = list(range(variant.blocks * WIDTH)) + (list(range(3 * WIDTH, 4 * WIDTH)) if variant.mean_patch else [])
    alone = nn.Linear(len(columns), CLASSES)
    with torch.no_grad():
        alone.weight.copy_(weight[which])
        alone.bias.zero_()
    lr = task.base_lrs[which] * 16 / 256
    groups = [{"params": [alone.weight], "weight_decay": 0.05}, {"params": [alone.bias], "weight_decay": 0.0}]
    plain: Any = torch.optim.SGD(groups, lr=lr, momentum=0.9) if optimizer == "sgd" else torch.optim.AdamW(groups, lr=lr)
    decay = torch.optim.lr_scheduler.LambdaLR(plain, lambda step: (1 + math.cos(math.pi * step / 12)) / 2)
    step = 0
    for epoch in range(3):
        order = draws.permutation(ROWS, 7, epoch, draws.Stream.PROBE + 5)
        for batch in range(4):
            rows = torch.from_numpy(order[batch * 16 : batch * 16 + 16])
            heads.step(x[rows], labels[rows], step)
            plain.zero_grad()
            F.cross_entropy(alone(x[rows][:, columns]), labels[rows]).backward()
            plain.step()
            decay.step()
            step += 1
    torch.testing.assert_close(weight[which], alone.weight, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(bias[which, :, 0], alone.bias, atol=1e-6, rtol=1e-4)
    predicted = alone(x[:, columns]).argmax(dim=1)
    tally = heads.score(x, labels)
    assert tally.top1()[number].item() == pytest.approx((predicted == labels).float().mean().item())
    assert heads.described()[number] == {"blocks": variant.blocks, "mean_patch": variant.mean_patch, "base_lr": task.base_lrs[which]}


def test_figures_are_those_of_torchmetrics() -> None:
    generator = torch.Generator().manual_seed(1)
    truth = torch.randint(4, (300,), generator=generator)  # nothing of class 4
    predicted = torch.where(torch.rand(300, 3, generator=generator) < 0.5, truth[:, None], torch.randint(5, (300, 3), generator=generator))
    tally = Tally(3, 5, torch.device("cpu"))
    for rows in torch.split(torch.arange(300), 77):
        tally.add(predicted[rows], truth[rows])
    for k in range(3):
        assert tally.top1()[k].item() == pytest.approx(multiclass_accuracy(predicted[:, k], truth, 5, average="micro").item())
        by_class = multiclass_accuracy(predicted[:, k], truth, 5, average=None)[:4]
        assert tally.mean_per_class()[k].item() == pytest.approx(by_class.mean().item())


def test_the_chosen_head_is_chosen_on_held_out_images() -> None:
    """The best one on the validation split is another one."""
    task = grid()
    heads = linear.Heads(VARIANTS[:1], WIDTH, task, 2, ROWS, 0, torch.device("cpu"))
    truth = torch.tensor([0, 0, 0, 1])

    def tally(right: list[list[int]]) -> Tally:
        found = Tally(2, 2, torch.device("cpu"))
        found.add(torch.tensor([[t if r else 1 - t for r in row] for t, row in zip(truth.tolist(), right, strict=True)]), truth)
        return found

    class Notes:
        chosen: dict[str, Any] = {}
        data = Sets(None, None)  # type: ignore[arg-type]

    on_val, on_held = tally([[1, 0], [1, 1], [1, 0], [0, 1]]), tally([[0, 1], [1, 1], [0, 1], [0, 1]])
    figures = linear._figures(Notes(), heads, on_val, on_held)  # type: ignore[arg-type]
    expected = {"top1": 0.5, "top1/cls": 0.5, "top1/best_on_val": 0.75, "mean_per_class": 2 / 3, "mean_per_class/best_on_val": 0.5}
    assert figures == pytest.approx(expected)
    assert Notes.chosen["held_out"]["base_lr"] == 0.3
    assert Notes.chosen["best_on_val"]["base_lr"] == 0.01
    assert [head["held_out"] for head in Notes.chosen["heads"]] == [0.25, 1.0]


def test_blocks_and_their_last_norm() -> None:
    """The tokens are those that hooks see, through the last norm; the last block's are what the encoder says."""
    encoder = build_encoder(pretraining_config())
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    seen: list[torch.Tensor] = []
    for block in encoder.backbone.blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    with torch.no_grad():
        found = Normed(encoder).last_blocks(images, 2)
        assert len(seen) == 2
        norm = encoder.backbone.vit.norm
        torch.testing.assert_close(found["cls-1"], norm(seen[0])[:, 0])
        torch.testing.assert_close(found["cls"], norm(seen[1])[:, 0])
        torch.testing.assert_close(found["mean"], norm(seen[1])[:, 1:].mean(dim=1))
        one = Normed(encoder).last_blocks(images, 1)
    assert one.keys() == {"cls", "mean"}
    torch.testing.assert_close(one["cls"], found["cls"])


def test_random_crops_are_drawn_for_the_image(photographs: Path) -> None:
    image = torch.randint(0, 256, (3, 48, 40), dtype=torch.uint8)
    crop = RandomCrop(32, 3, 1)
    assert crop(image, 5).shape == (3, 32, 32)
    assert torch.equal(crop(image, 5), RandomCrop(32, 3, 1)(image, 5))
    assert not torch.equal(crop(image, 5), crop(image, 6))
    assert not torch.equal(crop(image, 5), RandomCrop(32, 3, 2)(image, 5))


TINY = {"name": "linear", "epochs": 4, "base_lrs": [0.1, 0.5]}


@pytest.mark.parametrize("task", [TINY, {**TINY, "augment": True}, {**TINY, "blocks": [1], "part": "inv"}])
def test_ranks_share_the_images(pretrained: Path, tmp_path: Path, task: Any) -> None:
    config = settings(pretrained, task, batch=7)
    alone = evaluate.main(config, tmp_path, lambda: False)
    assert alone is not None
    first, second = run_ranks(on_ranks, 2, config, str(tmp_path), None)
    assert second["metrics"] == {}
    assert first["metrics"].keys() == alone["metrics"].keys()
    for name, value in alone["metrics"].items():
        assert first["metrics"][name] == pytest.approx(value, abs=0.012), name  # one of 90 images
    assert first["chosen"]["best_on_val"].keys() == {"blocks", "mean_patch", "base_lr"}
    assert alone["metrics"]["linear/top1/best_on_val"] == max(head["val"] for head in alone["chosen"]["heads"]) > 0.15  # chance: 0.06
    assert alone["metrics"]["linear/top1/best_on_val"] >= alone["metrics"]["linear/top1"]


@pytest.mark.parametrize("augment", [False, True])
def test_a_stopped_evaluation_goes_on(pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, augment: bool) -> None:
    task = {**TINY, "augment": augment}
    whole = evaluate.main(settings(pretrained, task), tmp_path, lambda: False)
    monkeypatch.setattr(linear, "SAVE_SECONDS", 0.0)
    attempts, epochs, result = 0, [], None
    load = linear._State.load

    def loaded(self: Any) -> int:
        epochs.append(load(self))
        return epochs[-1]

    monkeypatch.setattr(linear._State, "load", loaded)
    while result is None:
        attempts += 1
        result = evaluate.main(settings(pretrained, task), tmp_path, counting(37))
        assert attempts < 20
    assert attempts > 1
    assert epochs == sorted(epochs)
    assert epochs[-1] > 0
    assert whole is not None
    assert result["metrics"] == whole["metrics"]
    assert result["chosen"] == whole["chosen"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["progress.json"]


def test_a_state_of_other_settings_is_not_used(pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "SAVE_SECONDS", 0.0)
    assert evaluate.main(settings(pretrained, {**TINY, "epochs": 50}), tmp_path, counting(80)) is None
    assert (tmp_path / linear.STATE).is_file()
    (tmp_path / "new").mkdir()
    one = evaluate.main(settings(pretrained, TINY), tmp_path, lambda: False)
    other = evaluate.main(settings(pretrained, TINY), tmp_path / "new", lambda: False)
    assert one == other


@pytest.mark.parametrize("damage", ["no tensors", "flipped", "cut", "full disk"])
def test_a_state_that_is_lost_costs_work_and_nothing_else(
    pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(linear, "SAVE_SECONDS", 0.0)
    task, path, loaded = {**TINY, "epochs": 50}, tmp_path / linear.STATE, []
    load, write = linear._State.load, linear.write_atomic

    def noted(self: Any) -> int:
        loaded.append(load(self))
        return loaded[-1]

    def full(where: Path, content: bytes) -> None:
        raise DiskFull(errno.ENOSPC, "there is no room")

    monkeypatch.setattr(linear._State, "load", noted)
    monkeypatch.setattr(linear, "write_atomic", full if damage == "full disk" else write)
    assert evaluate.main(settings(pretrained, task), tmp_path, counting(80)) is None
    assert path.is_file() == (damage != "full disk")
    if damage == "no tensors":
        path.write_bytes(b"no tensors")
    elif damage != "full disk":
        content = bytearray(path.read_bytes())
        content[-50] ^= 1
        path.write_bytes(content if damage == "flipped" else content[:-50])
    (tmp_path / "new").mkdir()
    again = evaluate.main(settings(pretrained, task), tmp_path, lambda: False)
    assert loaded == [0, 0]
    assert ("the heads are not kept" if damage == "full disk" else "the heads are trained from the start") in caplog.text
    assert again == evaluate.main(settings(pretrained, task), tmp_path / "new", lambda: False)


@pytest.mark.parametrize("chunk", [1, 3, ROWS - 1, ROWS, ROWS + 1])
def test_each_image_is_scored_once(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    x, labels = made()
    heads = linear.Heads(VARIANTS, WIDTH, grid(), CLASSES, ROWS, 0, torch.device("cpu"))
    whole = heads.score(x, labels)
    monkeypatch.setattr(classify, "CHUNK", chunk)
    parts = heads.score(x, labels)
    assert torch.equal(parts.present, torch.bincount(labels, minlength=CLASSES).double())
    assert torch.equal(parts.hits, whole.hits)


def test_held_out() -> None:
    kept, held = held_out(50, 0.2, 0)
    assert len(held) == 10
    assert np.array_equal(np.sort(np.concatenate([kept, held])), np.arange(50))
    assert len(held_out(50, 0.0, 0)[1]) == 0
    with pytest.raises(ValueError, match=r"held_out 0\.001 of 50 training images is 0"):
        held_out(50, 0.001, 0)


def test_without_held_out_images_there_is_the_best_on_val_only(pretrained: Path, tmp_path: Path) -> None:
    result = evaluate.main(settings(pretrained, {**TINY, "held_out": 0.0}), tmp_path, lambda: False)
    assert result is not None
    assert result["metrics"].keys() == {"linear/top1/best_on_val", "linear/mean_per_class/best_on_val"}
    assert result["main"]["metric"] == "linear/top1/best_on_val"


def test_bad_input(pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for task, message in (
        ({"base_lrs": [0.1, 0.1]}, r"base_lrs is \[0\.1, 0\.1\]; each may stand there once"),
        ({"blocks": [0]}, r"blocks\.0\n  Input should be greater than or equal to 1"),
        ({"part": "inv"}, r"part inv is of the last block, but blocks are \[1, 2\]"),
    ):
        with pytest.raises(ValidationError, match=message):
            EvaluateConfig.model_validate(settings(pretrained, {"name": "linear", **task}))
    with pytest.raises(ValidationError, match="preset ibot has no values for the task r2; it has them for knn, linear"):
        EvaluateConfig.model_validate({"checkpoint": "x", "task": "r2", "preset": "ibot"})
    planned = EvaluateConfig.model_validate(settings(pretrained, {**TINY, "blocks": [1, 4]}))
    with pytest.raises(ValueError, match=r"task\.blocks has 4, but the backbone has 2 blocks"):
        planned.check(1, {})
    with pytest.raises(ValidationError, match=r"num_val_images\n  Input should be greater than or equal to 2"):
        EvaluateConfig.model_validate(settings(pretrained, {"name": "r2", "num_val_images": 1}))
    with pytest.raises(ValueError, match=r"task\.blocks has 4, but the backbone has 2 blocks"):
        evaluate.main(settings(pretrained, {**TINY, "blocks": [1, 4]}), tmp_path, lambda: False)
    labels = ShardSet.require_labels

    def without(self: ShardSet) -> Any:
        raise ValueError("no label")

    monkeypatch.setattr(ShardSet, "require_labels", without)
    with pytest.raises(ValueError, match="no label"):
        evaluate.main(settings(pretrained, TINY), tmp_path, lambda: False)
    monkeypatch.setattr(ShardSet, "require_labels", labels)


def test_plan_knows_what_it_costs() -> None:
    """Forward passes, and heads as FLOPs of their products."""
    pretraining = {"data": "imagenet1k", "backbone": "vit_small_patch16_224", "batch": 1024, "epochs": 1, "method": "ibot"}

    def flops(task: Any) -> float:
        config = EvaluateConfig.model_validate({"checkpoint": "${pretrain}", "task": task, "preset": "dinov2"})
        estimate = config.estimate({}, 1, {"pretrain": pretraining})
        assert estimate is not None
        return estimate.flops

    nearest = flops("knn")
    one = {"name": "linear", "augment": False, "epochs": 1, "held_out": 0.0, "base_lrs": [0.1], "blocks": [1], "mean_patch": [False]}
    assert flops(one) - nearest == pytest.approx(6 * 384 * 1000 * 1_281_167 + 2 * 384 * 1000 * 50_000, rel=1e-6)
    assert flops({**one, "augment": True, "epochs": 10}) > 9 * nearest
    whole, single = flops("linear"), flops({"name": "linear", "base_lrs": [0.1], "blocks": [1], "mean_patch": [False]})
    assert whole < 1.3 * single, "52 heads against one, with DINOv2's augmentation"
    assert nearest < flops("logistic") < 1000 * nearest


def test_presets() -> None:
    tasks = {
        preset: EvaluateConfig.model_validate({"checkpoint": "x", "task": "linear", "preset": preset}).task
        for preset, each in PRESETS.items()
        if "linear" in each
    }
    assert tasks.keys() == {"paper", "ibot", "dinov2", "smoke"}
    assert tasks["dinov2"] == Linear()
    assert len(Linear().base_lrs) * len(Linear().blocks) * len(Linear().mean_patch) == 52
    assert tasks["paper"].optimizer == "adamw"  # type: ignore[union-attr]
