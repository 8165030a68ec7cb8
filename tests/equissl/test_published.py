"""Published weights: files in each layout, made here; what does not fit; the start of a run, on two ranks too."""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import tiny
import torch
from harness import run_ranks
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from equissl import distributed, resnet
from equissl.config import PretrainConfig
from equissl.distributed import World
from equissl.encoder import build_encoder, exported
from equissl.estimates import pretraining_sizes
from equissl.export import export
from equissl.published import load_published

Weights = dict[str, Tensor]
VIT = {"img_size": 32, "patch_size": 8, "depth": 2}


def vit(num_classes: int = 0, **changes: Any) -> Any:
    """A timm model with random weights, none of which is 0 or 1."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=num_classes, **(VIT | changes))
    return shaken(model)


def shaken(model: Any) -> Any:
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor += 0.1 * torch.rand_like(tensor)
    return model.eval()


def dinov2(model: Any, in_chunks: bool = True) -> Weights:
    """Its weights as the authors of DINOv2 name them: in one chunk of blocks, or without chunks."""
    named = {name.replace("blocks.", "blocks.0.", 1) if in_chunks else name: value for name, value in model.state_dict().items()}
    return named | {"mask_token": torch.full((1, 192), 0.3)}


def ibot(model: Any) -> Weights:
    """As the authors of iBOT name them inside their wrapper, with its head."""
    named = {name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): value for name, value in model.state_dict().items()}
    head = {"head.mlp.0.weight": torch.zeros(3, 192), "head.last_layer.weight_g": torch.ones(3, 1)}
    return {f"backbone.{name}": value for name, value in named.items()} | {"backbone.masked_embed": torch.full((1, 192), 0.3)} | head


def checkpoint_of_ibot(model: Any) -> dict[str, Any]:
    weights = ibot(model)
    student = {f"module.{name}": value + 1 for name, value in weights.items()}
    return {"student": student, "teacher": weights, "epoch": 100, "args": argparse.Namespace(arch="vit_tiny", lr=5e-4), "optimizer": {}}


def chunks(model: Any) -> Weights:
    return dinov2(model) | {"head.weight": torch.zeros(1)}


def moco(model: Any, encoder: str) -> dict[str, Any]:
    """As MoCo's authors save a training: the encoder with its head, its moving average, a queue."""
    weights = {f"module.{encoder}.{name}": value for name, value in model.state_dict().items()}
    head = {f"module.{encoder}.head.0.weight": torch.zeros(3, 192), f"module.{encoder}.head.1.num_batches_tracked": torch.tensor(1)}
    average = {f"module.momentum_encoder.{name}": value + 1 for name, value in model.state_dict().items()}
    return {"epoch": 300, "arch": "vit", "state_dict": weights | head | average | {"module.queue": torch.zeros(2, 3)}, "optimizer": {}}


LAYOUTS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "timm": ("timm", lambda model: model.state_dict()),
    "timm-wrapped": ("timm", lambda model: {"state_dict": {f"module.{key}": value for key, value in model.state_dict().items()}}),
    "dinov2": ("dinov2", dinov2),
    "dinov2-without-chunks": ("dinov2", lambda model: dinov2(model, in_chunks=False)),
    "dinov2-training": ("dinov2", lambda model: {"teacher": {f"backbone.{key}": value for key, value in chunks(model).items()}}),
    "ibot": ("ibot", lambda model: {"state_dict": {key.removeprefix("backbone."): value for key, value in ibot(model).items()}}),
    "ibot-checkpoint": ("ibot", checkpoint_of_ibot),
    "moco-1": ("moco", lambda model: moco(model, "encoder_q")),
    "moco-3": ("moco", lambda model: moco(model, "base_encoder")),
}


def settings_with(file: Path, kind: str, method: str = "ibot", **changes: Any) -> PretrainConfig:
    return tiny.config("synthetic", method, backbone__weights={"file": str(file), "kind": kind}, **changes)


def write(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


def tokens_of(settings: PretrainConfig, path: Path, kind: str) -> Tensor:
    """Of a few images, by an encoder with the file's weights."""
    encoder, found = build_encoder(settings), load_published(settings, path, kind)
    own = exported(encoder)
    for key, tensor in found.tensors.items():
        own[key].copy_(tensor)
    tokens: Tensor = encoder(images(settings.side)).tokens
    return tokens


def images(side: int) -> Tensor:
    return torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(1))


# --- layouts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer_scale", [None, 0.1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_are_those_of_the_model_in_the_file(layout: str, layer_scale: float | None, tmp_path: Path) -> None:
    model = vit(**({} if layer_scale is None else {"init_values": layer_scale}))
    kind, rename = LAYOUTS[layout]
    path = write(rename(model), tmp_path / "weights.pth")
    settings = settings_with(path, kind, backbone__layer_scale=layer_scale)
    torch.testing.assert_close(tokens_of(settings, path, kind), model.forward_features(images(32)))
    found = load_published(settings, path, kind)
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert {key for key in found.tensors if not key.startswith("backbone.")} == ({"mask_token"} if kind in ("dinov2", "ibot") else set())
    if kind in ("dinov2", "ibot"):
        assert torch.equal(found.tensors["mask_token"], torch.full((192,), 0.3))
    without_masks = load_published(settings_with(path, kind, "vicreg", backbone__layer_scale=layer_scale), path, kind)
    assert "mask_token" not in without_masks.tensors


def test_mocos_small_transformer_has_other_heads_of_attention(tmp_path: Path) -> None:
    """Its weights would fit."""
    path = write(moco(timm.create_model("vit_small_patch16_224", num_classes=0, **VIT), "base_encoder"), tmp_path / "weights.pth")
    settings = tiny.config(backbone__name="vit_small_patch16_224")
    assert load_published(tiny.config(), write(moco(vit(), "base_encoder"), tmp_path / "tiny.pth"), "moco").tensors
    with pytest.raises(ValueError, match="ViT-S has 12 heads of attention, timm's 6"):
        load_published(settings, path, "moco")


def test_safetensors_heads_and_half_precision(tmp_path: Path) -> None:
    model = vit(num_classes=5)
    save_file({name: value.bfloat16() for name, value in model.state_dict().items()}, tmp_path / "model.safetensors")
    found = load_published(tiny.config(), tmp_path / "model.safetensors", "timm")
    assert "left out as heads: head.bias, head.weight" in found.notes
    assert {tensor.dtype for tensor in found.tensors.values()} == {torch.float32}
    torch.testing.assert_close(found.tensors["backbone.norm.weight"], model.norm.weight.detach(), rtol=1e-2, atol=1e-2)


def test_positions_are_interpolated_to_our_grid(tmp_path: Path) -> None:
    model = vit(img_size=56)
    path = write(dinov2(model), tmp_path / "weights.pth")
    found = load_published(tiny.config(), path, "dinov2")
    assert "position embeddings interpolated from 7×7 to 4×4 patches" in found.notes
    assert torch.equal(found.tensors["backbone.pos_embed"], resample_abs_pos_embed(model.pos_embed, [4, 4], [7, 7]).detach())


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_resnets_with_their_averages(stem: str, tmp_path: Path) -> None:
    settings = tiny.config("synthetic", "vicreg_resnet", backbone={"name": "resnet18", "stem": stem}, image_size=32)
    model = timm.create_model("resnet18", num_classes=3)
    resnet.change_stem(model, settings.backbone.facts)
    shaken(model)
    path = write(model.state_dict(), tmp_path / "weights.pth")
    model.reset_classifier(0)
    torch.testing.assert_close(tokens_of(settings, path, "timm")[:, 0], model(images(32)), rtol=1e-4, atol=1e-4)
    notes = load_published(settings, path, "timm").notes
    assert notes == ["left out as heads: fc.weight, fc.bias", "left out: 20 counters of batches"]


# --- the start of a run ----------------------------------------------------------------------------------------------------


def start(path: str, method: str, kind: str) -> dict[str, Tensor]:
    world = distributed.init()
    run = tiny.Run(settings_with(Path(path), kind, method), world)
    found = run.values()
    distributed.close()
    return found


def test_student_and_teacher_begin_with_them_on_any_number_of_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest begins as without them."""
    monkeypatch.delenv("RANK", raising=False)
    model = vit()
    path = write(checkpoint_of_ibot(model), tmp_path / "checkpoint.pth")
    one, two = start(str(path), "ibot", "ibot"), run_ranks(start, 2, str(path), "ibot", "ibot")[0]
    assert one.keys() == two.keys()
    for network in ("student", "teacher"):
        for name, value in model.state_dict().items():
            assert torch.equal(one[f"{network}.encoder.backbone.vit.{name}"], value), name
        assert torch.equal(one[f"{network}.encoder.backbone.mask_token"], torch.full((192,), 0.3))
    world = distributed.init()
    drawn = tiny.Run(tiny.config("synthetic"), world).values()
    distributed.close()
    for name, value in one.items():
        assert torch.equal(two[name], value), name
        assert ".backbone." in name or torch.equal(drawn[name], value), name


def test_averages_of_norms_reach_the_run_and_the_log(tmp_path: Path, world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model = timm.create_model("resnet18", num_classes=3)
    settings = settings_with(Path("/nowhere"), "timm", "vicreg_resnet")
    resnet.change_stem(model, settings.backbone.facts)
    path = write(shaken(model).state_dict(), tmp_path / "weights.pth")
    values = tiny.Run(settings_with(path, "timm", "vicreg_resnet"), world).values()
    assert torch.equal(values["student.encoder.backbone.resnet.layer2.0.bn1.running_var"], model.layer2[0].bn1.running_var)
    assert f"sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}" in caplog.text
    assert "left out as heads: fc.weight, fc.bias" in caplog.text


# --- what is refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "kind", "changes", "message"),
    [
        (lambda: vit(depth=3).state_dict(), "timm", {}, r"missing nothing, unknown backbone.blocks.2.* and 8 more.*\(depth\)\?"),
        (lambda: vit(patch_size=16).state_dict(), "timm", {}, "patch_embed.proj.weight has the shape .*16, 16.*give patch_size"),
        (lambda: vit(init_values=0.1).state_dict(), "timm", {}, "its model has LayerScale: give layer_scale"),
        (lambda: vit().state_dict(), "timm", {"backbone__layer_scale": 0.1}, "its model has no LayerScale: leave layer_scale out"),
        (
            lambda: dinov2(vit()) | {"register_tokens": torch.zeros(1, 4, 192)},
            "dinov2",
            {},
            "has 4 register tokens, which our backbones do",
        ),
        (lambda: dinov2(vit()), "timm", {}, "missing .*kind where it comes from"),
        (lambda: vit().state_dict() | {"strange.weight": torch.zeros(1)}, "timm", {}, "unknown backbone.strange.weight; is name"),
        (lambda: {"optimizer": 1}, "timm", {}, "holds no weights: it has optimizer; they stand alone, or under one of teacher,"),
        (lambda: {}, "timm", {}, "holds no weights; they"),
        (lambda: vit().state_dict(), "moco", {}, "has no names that begin with encoder_q. or base_encoder.: is kind where it comes from"),
        (lambda: {"x": Path("/")}, "timm", {}, r"is not read \(UnpicklingError\): it is damaged, .* Save the weights alone"),
    ],
    ids=range(11),
)
def test_what_does_not_fit_is_refused(content: Any, kind: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(content(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=message):
        load_published(tiny.config(**changes), path, kind)


class Trap:
    def __reduce__(self) -> Any:
        return os.mkdir, ("trapped",)


def test_nothing_in_a_file_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="holds more than tensors"):
        load_published(tiny.config(), write({"teacher": Trap()}, tmp_path / "weights.pth"), "ibot")
    assert not (tmp_path / "trapped").exists()


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the file of weights .*/nowhere.pth cannot be read: No such file or directory"):
        load_published(tiny.config(), tmp_path / "nowhere.pth", "timm")
    for name, message in {"a.safetensors": "is no safetensors file", "a.pth": r"is not read \("}.items():
        (tmp_path / name).write_bytes(b"no weights at all")
        with pytest.raises(ValueError, match=message):
            load_published(tiny.config(), tmp_path / name, "timm")


def test_settings() -> None:
    with pytest.raises(ValueError, match=r"file 'weights.pth' is relative, but a job runs in another folder: give the whole path"):
        settings_with(Path("weights.pth"), "timm")
    with pytest.raises(ValueError, match=r"kind dinov2 is of vision transformers, and resnet18 is a ResNet: choose timm or moco"):
        settings_with(Path("/a"), "dinov2", "vicreg_resnet")
    assert pretraining_sizes(settings_with(Path("/a"), "dinov2")) == pretraining_sizes(tiny.config("synthetic"))


def test_an_export_tells_the_files_name_and_not_its_place(tmp_path: Path, world: World) -> None:
    from equissl.checkpoint import Checkpoints
    from equissl.files import write_json

    path = write(vit().state_dict(), tmp_path / "published.pth")
    settings = settings_with(path, "timm", "vicreg")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    write_json(run_dir / "config.json", settings.model_dump(mode="json", by_alias=True))
    run = tiny.Run(settings, world)
    checkpoints = Checkpoints(run_dir / "checkpoints", 1, world)
    checkpoints.save(1, run.method.state())
    checkpoints.close()
    export(run_dir, tmp_path / "export")
    for file in ("config.json", "README.md"):
        text = (tmp_path / "export" / file).read_text()
        assert "published.pth" in text
        assert str(tmp_path) not in text
