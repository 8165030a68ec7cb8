"""The table that `plan` uses against timm, and the encoder against timm's own forward pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import tiny
import torch
from timm.models.resnet import Bottleneck

from equissl import distributed
from equissl.auxiliary import Decoder
from equissl.checkpoint import Checkpoints, read_whole
from equissl.config import BACKBONES, BANK, BackboneFacts, PretrainConfig
from equissl.encoder import Block, build_encoder, exported_name
from equissl.estimates import backbone_parameters
from equissl.initialise import initialise
from equissl.methods.ibot import Network
from equissl.monitor import Monitor
from equissl.views import fractions


@pytest.mark.parametrize("name", BACKBONES)
def test_the_table_says_what_timm_builds(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    facts, num_parameters = BACKBONES[name], sum(parameter.numel() for parameter in model.parameters())
    if type(model).__name__ == "ResNet":
        stages = tuple(len(getattr(model, f"layer{stage}")) for stage in (1, 2, 3, 4))
        is_bottleneck, side = isinstance(model.layer1[0], Bottleneck), model.default_cfg["input_size"][-1]
        assert facts == BackboneFacts("resnet", 1, model.num_features, sum(stages), side, stages, is_bottleneck)
        assert num_parameters == backbone_parameters(facts, side)
        return
    assert type(model).__name__ == "VisionTransformer"
    side = model.patch_embed.img_size[0]
    assert facts == BackboneFacts("vit", model.patch_embed.patch_size[0], model.embed_dim, len(model.blocks), side)
    assert num_parameters == pytest.approx(backbone_parameters(facts, side), rel=1e-3)


@pytest.mark.parametrize("auxiliary", [None, "reconstruction"])
def test_the_estimated_checkpoint_is_what_is_built(auxiliary: str | None) -> None:
    """The paper's ViT-S: student, decoders and their two moments, teacher; 4 bytes each."""
    values = {"transformation": "se2", "auxiliary": auxiliary, "epochs": 1.0, "batch": 64}
    settings = PretrainConfig.model_validate({"data": "imagenet1k", **values})
    with torch.device("meta"):
        network = Network(settings)
        widths = settings.auxiliary.decoder_widths if settings.auxiliary else ()
        decoders = [Decoder(2 * settings.d_equi, widths) for _ in fractions(settings)]
    sizes = [sum(parameter.numel() for module in modules for parameter in module.parameters()) for modules in ([network], decoders)]
    estimate = settings.estimate({}, 1, {})
    assert estimate is not None
    bank = BANK * (2 * settings.backbone.facts.dim + 16)
    assert estimate.checkpoint_bytes == pytest.approx(4 * (3 * sum(sizes) + sizes[0]) + bank, rel=5e-3)


@pytest.mark.parametrize(("data", "num_classes"), [("photographs", 18), ("synthetic", 0)])
def test_the_estimated_checkpoint_is_what_is_written(data: str, num_classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of a tiny one is the monitor's bank."""
    monkeypatch.delenv("RANK", raising=False)
    world, settings = distributed.init(), tiny.config(data=data)
    run, monitor = tiny.Run(settings, world), Monitor(settings, world, 6, 2 * BANK, num_classes)
    assert run.auxiliary is not None
    checkpoints = Checkpoints(tmp_path, 1, world)
    checkpoints.save(1, run.method.state() | run.auxiliary.state() | run.optimizer.state() | monitor.state())
    checkpoints.close()
    distributed.close()
    written = sum(tensor.nbytes for tensor in read_whole(tmp_path / "step_1", lambda name: True).values())
    estimate = settings.estimate({}, 1, {})
    assert estimate is not None
    assert estimate.checkpoint_bytes == pytest.approx(written, rel=5e-3)


@pytest.mark.parametrize("scale", [None, 0.3])
def test_the_exported_keys_are_timms_and_the_tokens_too(scale: float | None) -> None:
    settings = tiny.config(backbone__layer_scale=scale)
    encoder = build_encoder(settings)
    facts = settings.backbone.facts
    shape = {"img_size": 32, "patch_size": facts.patch_size, "depth": facts.depth}
    model = timm.create_model(settings.backbone.name, **shape, init_values=scale, num_classes=0)
    exported = {exported_name(name): value for name, value in encoder.state_dict().items()}
    model.load_state_dict({name.removeprefix("backbone."): value for name, value in exported.items() if name.startswith("backbone.")})
    assert {name for name in exported if not name.startswith("backbone.")} == {
        "mask_token",
        *(f"split.{part}.{kind}" for part in ("inv", "equi") for kind in ("weight", "bias")),
    }
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(encoder(images).tokens, model.forward_features(images))


def test_masked_patches_are_not_seen() -> None:
    encoder = build_encoder(tiny.config())
    encoder.backbone.mask_token.fill_(0.3)
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, 5] = True  # row 1, column 1 of the grid
    images = torch.zeros(1, 3, 32, 32)
    changed = images.clone()
    changed[:, :, 8:16, 8:16] = 1.0
    assert torch.equal(encoder(images, mask).tokens, encoder(changed, mask).tokens)
    assert not torch.allclose(encoder(images).tokens, encoder(changed).tokens)
    changed[:, :, 0, 0] = 1.0
    assert not torch.allclose(encoder(images, mask).tokens, encoder(changed, mask).tokens)


def test_drop_path_scales_each_branch_of_each_sample() -> None:
    encoder = build_encoder(tiny.config())
    block = encoder.backbone.vit.blocks[1]
    assert isinstance(block, Block)
    x = torch.randn(3, 5, 192, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 1.0]])
    (got,) = block([x], [scale])
    (plain,) = block([x], [None])
    after_attention = x + block.attn(block.norm1(x))
    torch.testing.assert_close(got[0], x[0] + 3 * block.mlp(block.norm2(x[:1]))[0])
    torch.testing.assert_close(got[1], x[1] + 2 * (after_attention - x)[1])
    torch.testing.assert_close(got[2], plain[2])


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    one, other = build_encoder(tiny.config()), build_encoder(tiny.config(seed=1))
    without = build_encoder(tiny.config(auxiliary=None))
    assert without.split is None
    for name, parameter in without.named_parameters():
        assert torch.equal(parameter, one.get_parameter(name))
    qkv = "backbone.vit.blocks.{}.attn.qkv.weight"
    assert not torch.equal(one.get_parameter(qkv.format(0)), one.get_parameter(qkv.format(1)))
    assert not torch.equal(one.get_parameter(qkv.format(0)), other.get_parameter(qkv.format(0)))
    assert one.get_parameter(qkv.format(0)).std().item() == pytest.approx(0.02, rel=0.02)
    assert one.backbone.vit.patch_embed.proj.weight.abs().max().item() == pytest.approx((3 * 64) ** -0.5, rel=0.01)


def test_a_parameter_without_a_rule_is_an_error() -> None:
    module = torch.nn.Module()
    module.strange = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(AssertionError, match="no rule for the initial value of strange in a Module"):
        initialise(module, 0)


def test_a_list_of_names_gets_a_message() -> None:
    with pytest.raises(ValueError, match=r"(?s)backbone\.name.*valid string"):
        PretrainConfig.model_validate({"data": "synthetic", "batch": 8, "num_steps": 1, "backbone": {"name": ["resnet18"]}})
