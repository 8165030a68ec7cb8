"""ResNets: batch norm of images over ranks, the encoder against timm's, what a step leaves behind, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import tiny
import torch
from harness import run_ranks
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from equissl import distributed, resnet
from equissl.batchnorm import BatchNorm2d, batch_norms
from equissl.config import BACKBONES, PretrainConfig
from equissl.distributed import World, local
from equissl.encoder import build_encoder, exported
from equissl.estimates import backbone_flops, backbone_parameters, convolutions, kept_of_resnet
from equissl.features import Normed
from equissl.initialise import initialise, materialise
from equissl.optim import lr_factors, module_of
from equissl.photometry import normalise
from equissl.recompute import recompute

RANKS = 3
FORMS = [("resnet18", "imagenet", 64), ("resnet18", "cifar", 32), ("resnet50", "imagenet", 65), ("resnet50", "cifar", 17)]


def settings_of(name: str, stem: str, side: int, **changes: Any) -> PretrainConfig:
    return tiny.config("synthetic", "vicreg_resnet", backbone={"name": name, "stem": stem}, image_size=side, **changes)


def norm_of(dim: int) -> BatchNorm2d:
    norm = BatchNorm2d(dim)
    initialise(norm, 0)
    with torch.no_grad():
        assert norm.weight is not None
        assert norm.bias is not None
        norm.weight.copy_(torch.linspace(0.5, 2, dim))
        norm.bias.copy_(torch.linspace(-1, 1, dim))
    return norm


# --- batch norm --------------------------------------------------------------------------------------------------------


def images(rank: int, first: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(rank + first)
    return 3 + 2 * torch.randn(2, 5, 4, 3, generator=generator, dtype=torch.float64)


def on_a_rank(dtype: torch.dtype) -> dict[str, Any]:
    """Two calls, an update of both; then a call whose update is refused."""
    world = distributed.init()
    norm = norm_of(5)
    calls = [images(world.rank, first).to(dtype).requires_grad_() for first in (0, 7)]
    outs = [norm(x) for x in calls]
    ((world.rank + 1) * sum(out.sin().sum() for out in outs)).backward()
    norm.move(torch.ones(()))
    averages = norm.running_mean.clone(), norm.running_var.clone()
    norm(10 * calls[0])
    norm.move(torch.zeros(()))
    refused = torch.equal(norm.running_mean, averages[0])
    found = {
        "outs": [out.detach() for out in outs],
        "of_x": [x.grad for x in calls],
        "gradients": [parameter.grad for parameter in norm.parameters()],
        "averages": averages,
        "refused": refused,
    }
    distributed.close()
    return found


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_ranks_together_are_torchs_batch_norm_on_the_joined_batch(dtype: torch.dtype, tolerance: float) -> None:
    """Values, gradients of images and parameters, averages; each call has statistics of its own. Float64 in torch, from the formula."""
    norm = nn.BatchNorm2d(5).double()
    template = norm_of(5)
    norm.load_state_dict(template.state_dict(), strict=True)  # torch does not miss its counter
    calls = [[images(rank, first).to(dtype).double().requires_grad_() for rank in range(RANKS)] for first in (0, 7)]
    outs = [norm(torch.cat(parts)) for parts in calls]
    weights = torch.repeat_interleave(torch.arange(1.0, RANKS + 1, dtype=torch.float64), 2).view(-1, 1, 1, 1)
    sum((weights * out.sin()).sum() for out in outs).backward()
    ranks = run_ranks(on_a_rank, RANKS, dtype)
    for rank, found in enumerate(ranks):
        for call in range(2):
            assert found["outs"][call].dtype == found["of_x"][call].dtype == dtype
            torch.testing.assert_close(found["outs"][call].double(), outs[call][2 * rank : 2 * rank + 2], rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(found["of_x"][call].double(), calls[call][rank].grad, rtol=tolerance, atol=4 * tolerance)
        for average, expected in zip(found["averages"], (norm.running_mean, norm.running_var), strict=True):
            assert average.dtype == torch.float32
            torch.testing.assert_close(average.double(), expected, rtol=1e-4, atol=1e-4)
        assert found["refused"]
    for own, parameter in zip(zip(*(found["gradients"] for found in ranks), strict=True), norm.parameters(), strict=True):
        torch.testing.assert_close(sum(own).double(), parameter.grad, rtol=tolerance, atol=30 * tolerance)


def test_gradients_are_those_of_differences(world: World) -> None:
    norm = norm_of(5).double()
    x = images(0).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: norm(x), (x, *norm.parameters()))


def test_large_means_do_not_swallow_the_variance(world: World) -> None:
    x = 1000 + images(0)
    expected = nn.functional.batch_norm(x, None, None, norm_of(5).weight.double(), norm_of(5).bias.double(), training=True)
    torch.testing.assert_close(norm_of(5)(x.float()).double(), expected, rtol=1e-2, atol=1e-3)


def test_only_the_input_is_kept(world: World) -> None:
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.randn(8, 16, 12, 12, requires_grad=True)
    norm = norm_of(16)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        norm(x)
    assert sum(kept.values()) == pytest.approx(x.nbytes, rel=0.01)


# --- the encoder ---------------------------------------------------------------------------------------------------------


def plain_timm(settings: PretrainConfig) -> Any:
    model = timm.create_model(settings.backbone.name, num_classes=0)
    resnet.change_stem(model, settings.backbone.facts)
    return model


@pytest.mark.parametrize(("name", "stem", "side"), FORMS)
def test_plan_knows_flops_and_parameters_exactly(name: str, stem: str, side: int) -> None:
    settings = settings_of(name, stem, side)
    with torch.device("meta"):
        model = plain_timm(settings)
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(2, 3, side, side))
    facts = settings.backbone.facts
    assert counter.get_total_flops() == 2 * backbone_flops(facts, side)
    assert sum(parameter.numel() for parameter in model.parameters()) == backbone_parameters(facts, side)
    assert sum(buffer.numel() for buffer in model.buffers() if buffer.ndim) == sum(2 * each.outputs for each in convolutions(facts, side))


@pytest.mark.parametrize(("name", "stem", "side"), FORMS)
def test_keys_and_features_are_timms_in_training_and_after(name: str, stem: str, side: int, world: World) -> None:
    settings = settings_of(name, stem, side)
    encoder, model = build_encoder(settings), plain_timm(settings)
    for norm in batch_norms(encoder):
        assert norm.weight is not None
        norm.weight.fill_(1.0)  # or the blocks do nothing
    model.load_state_dict({key.removeprefix("backbone."): tensor for key, tensor in exported(encoder).items()}, strict=True)
    x = torch.randn(6, 3, side, side, generator=torch.Generator().manual_seed(0))
    trained = encoder.train()(x)
    assert trained.tokens.shape == (6, 1, settings.backbone.facts.dim)
    torch.testing.assert_close(trained.cls, model.train()(x), rtol=1e-3, atol=1e-4)
    for norm in batch_norms(encoder):
        norm.move(torch.ones(()))
    for key, buffer in model.named_buffers():
        if buffer.ndim:
            torch.testing.assert_close(encoder.backbone.resnet.get_buffer(key), buffer, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(encoder.eval()(x).cls, model.eval()(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("name", "stem", "side"), FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_for_the_backward_pass_is_counted(name: str, stem: str, side: int, dtype: torch.dtype, world: World) -> None:
    settings, b = settings_of(name, stem, side), 3
    encoder = build_encoder(settings).train().requires_grad_().to(dtype)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*encoder.parameters(), *encoder.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        encoder.backbone([torch.randn(b, 3, side, side, dtype=dtype), torch.randn(b, 3, side, side, dtype=dtype)])
    expected = b * dtype.itemsize * (kept_of_resnet(settings, dtype.itemsize) + 2 * 3 * side**2)
    assert sum(storage.nbytes() for storage in kept.values()) == pytest.approx(expected, rel=0.05)


def whole_network() -> dict[str, Tensor]:
    """Features of this rank's images of two views, and its part of the gradient of a loss that knows the ranks apart."""
    world = distributed.init()
    encoder = build_encoder(settings_of("resnet18", "cifar", 16)).double().train().requires_grad_()
    for norm in batch_norms(encoder):
        local(norm.weight).fill_(1.0)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    views = torch.randn(2, 8, 3, 16, 16, generator=generator, dtype=torch.float64)
    mine = [view.chunk(world.world_size)[world.rank] for view in views]
    tokens = torch.stack(encoder.backbone(mine))
    weights = torch.linspace(1, 2, 8, dtype=torch.float64).chunk(world.world_size)[world.rank]
    (tokens.square().sum(dim=(0, 2, 3)) * weights).sum().backward()
    found = {f"of {name}": parameter.grad for name, parameter in encoder.named_parameters() if parameter.grad is not None}
    distributed.close()
    return found | {"tokens": tokens.detach()}


def test_two_ranks_are_one_through_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    expected, (first, second) = whole_network(), run_ranks(whole_network, 2)
    torch.testing.assert_close(torch.cat([first.pop("tokens"), second.pop("tokens")], dim=1), expected.pop("tokens"), rtol=1e-8, atol=1e-8)
    assert len(expected) == 60  # convolutions, weights and biases
    for name, gradient in expected.items():
        assert gradient.norm() > 0, name
        assert (first[name] + second[name] - gradient).norm() <= 1e-8 * gradient.norm(), name


def test_initial_weights_are_he_s_and_blocks_begin_as_identities() -> None:
    encoder = build_encoder(settings_of("resnet18", "imagenet", 32))
    net = encoder.backbone.resnet
    assert all(tensor.isfinite().all() for tensor in exported(encoder).values())
    assert net.layer3[1].conv1.weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.01)
    assert net.conv1.weight.std().item() == pytest.approx((2 / (64 * 49)) ** 0.5, rel=0.05)
    assert not torch.equal(net.layer3[1].conv1.weight, net.layer3[1].conv2.weight)
    x = torch.randn(2, 256, 3, 3)
    torch.testing.assert_close(net.layer3[1]([x])[0], x.relu())
    assert {norm.initial_weight for norm in batch_norms(net)} == {0.0, 1.0}
    assert net.layer3[0].downsample[1].initial_weight == 1.0
    bottlenecks = build_encoder(settings_of("resnet50", "imagenet", 32)).backbone.resnet
    assert [bottlenecks.layer1[0].get_submodule(name).initial_weight for name in ("bn1", "bn2", "bn3")] == [1.0, 1.0, 0.0]


def test_each_view_has_its_own_statistics_and_one_batch_has_common_ones(world: World) -> None:
    encoder = build_encoder(settings_of("resnet18", "cifar", 16)).train()
    view1, view2 = torch.randn(4, 3, 16, 16), 2 + torch.randn(4, 3, 16, 16)
    apart = encoder.backbone([view1, view2])
    assert [tokens.shape for tokens in apart] == [(4, 1, 512)] * 2
    torch.testing.assert_close(apart[1], encoder.backbone([view2])[0])
    assert not torch.allclose(torch.cat(apart), encoder.backbone([torch.cat([view1, view2])])[0], atol=1e-2)


def test_vicreg_passes_the_views_apart(world: World) -> None:
    run = tiny.Run(tiny.config(method="vicreg_resnet"), world)
    run.backward(0)
    assert {len(norm._seen) for norm in batch_norms(run.method.teacher)} == {2}


def test_a_block_that_is_computed_again_counts_its_batches_once(world: World) -> None:
    def step(which: str) -> dict[str, Tensor]:
        encoder = build_encoder(settings_of("resnet18", "cifar", 16)).train().requires_grad_()
        for norm in batch_norms(encoder):
            local(norm.weight).fill_(1.0)  # type: ignore[arg-type]
        recompute(encoder.backbone.blocks, which, is_compiled=False)
        x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        torch.cat(encoder.backbone([x, 2 * x + x.square()])).square().sum().backward()
        for norm in batch_norms(encoder):
            norm.move(torch.ones(()))
        gradients = {f"of {name}": parameter.grad for name, parameter in encoder.named_parameters()}
        return gradients | {name: buffer.clone() for name, buffer in encoder.named_buffers()}

    whole = step("none")
    for which in ("selective", "full"):
        found = step(which)
        for name, value in whole.items():
            assert torch.equal(found[name], value), name


def test_features_of_evaluations_are_the_pooled_one() -> None:
    encoder = build_encoder(settings_of("resnet18", "cifar", 16))
    x = torch.rand(3, 3, 16, 16)
    features = Normed(encoder)
    assert torch.equal(features.cls_and_mean(x), features.last_blocks(x, 1)["cls"])
    assert features.last_blocks(x, 1).keys() == {"cls"}
    torch.testing.assert_close(features.cls_and_mean(x), encoder(normalise(x)).cls)
    assert features.cls_and_mean(x).isfinite().all()


def test_learning_rates_and_parts_go_by_stage_and_block() -> None:
    names = [f"student.encoder.{name}" for name, _ in build_encoder(settings_of("resnet18", "imagenet", 32)).named_parameters()]
    factors = lr_factors([*names, "student.expander.mlp.0.weight"], 0.5, 1.0)
    start = "student.encoder.backbone.resnet"
    assert factors["student.expander.mlp.0.weight"] == 1.0
    assert factors[f"{start}.layer4.1.conv2.weight"] == 0.5
    assert factors[f"{start}.layer4.0.downsample.1.bias"] == 0.5**2
    assert factors[f"{start}.layer1.0.bn1.weight"] == 0.5**8
    assert factors[f"{start}.conv1.weight"] == factors[f"{start}.bn1.bias"] == 0.5**9
    assert module_of(f"{start}.layer4.0.downsample.1.bias") == "blocks"
    assert module_of(f"{start}.conv1.weight") == "backbone"


def test_parts_that_nobody_initialises_show() -> None:
    with torch.device("meta"):
        encoder = resnet.ResNet(settings_of("resnet18", "cifar", 16))
    materialise(encoder, torch.device("cpu"))
    assert all(tensor.isnan().all() for tensor in (*encoder.parameters(), *encoder.buffers()))


# --- settings ------------------------------------------------------------------------------------------------------------


def tiny_values(changes: dict[str, Any]) -> dict[str, Any]:
    """Those of the smallest ResNet, changed; `a__b` is b of a."""
    values: dict[str, Any] = {"data": "synthetic", "batch": 16, "num_steps": 2, "transformation": "rot", "method": {"name": "vicreg"}}
    values |= {"backbone": {"name": "resnet18"}}
    for name, value in changes.items():
        at, *path = values, *name.split("__")
        for part in path[:-1]:
            at = at.setdefault(part, {})
        at[path[-1]] = value
    return values


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": {"name": "vit_tiny_patch16_224", "stem": "cifar"}}, "stem cifar is of ResNets, and backbone vit_tiny_patch16_224 is"),
        ({"backbone__patch_size": 8}, "patch_size is 8, but backbone resnet18 is a ResNet, which has none: leave patch_size out"),
        ({"compile": True}, "compile is true, but the batch norms of a ResNet"),
        ({"backbone__depth": 2}, "depth is 2, but backbone resnet18"),
        ({"backbone__drop_path": 0.1}, "drop_path is 0.1, but backbone resnet18"),
        ({"backbone__drop_path_mode": "batch"}, "drop_path_mode is batch, but backbone resnet18"),
        ({"auxiliary": "reconstruction"}, "auxiliary needs patch tokens, and backbone resnet18 has none: choose one of vit_tiny"),
        (
            {"method": {"name": "ibot", "views": {"num_local": 0}}},
            "method ibot hides patches, and backbone resnet18 has none: choose one of vit_tiny",
        ),
        ({"method__optimizer__patch_embed_lr": 0.2}, "patch_embed_lr is 0.2, but backbone resnet18 has no patch embedding"),
    ],
)
def test_what_a_resnet_cannot_do_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PretrainConfig.model_validate(tiny_values(changes))


def test_what_is_left_open() -> None:
    small = settings_of("resnet18", "cifar", 32)
    assert small.backbone.drop_path == 0.0
    assert PretrainConfig.model_validate(small.model_dump(mode="json", by_alias=True)) == small
    assert settings_of("resnet18", "cifar", None).side == 32  # type: ignore[arg-type]
    assert settings_of("resnet50", "imagenet", None).side == 224  # type: ignore[arg-type]
    assert tiny.config(method="vicreg", backbone="vit_small_patch16_224", image_size=224, auxiliary=None).backbone.drop_path == 0.1
    assert {facts.kind for facts in BACKBONES.values()} == {"vit", "resnet"}


def test_sie_splits_the_pooled_feature(world: World) -> None:
    run = tiny.Run(tiny.config(method="sie", **tiny.RESNETS["vicreg_resnet"]), world)
    assert all(term.isfinite() for term in run.backward(0).values())
    assert run.parameters["student.encoder.split.equi.weight"].grad is not None
