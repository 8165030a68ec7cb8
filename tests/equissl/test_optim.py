"""Optimizers against torch's own and their formulae; refusals and several ranks are in test_distributed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from equissl import config, optim
from equissl.distributed import World
from equissl.optim import AdamW, Report, lr_factors, module_of


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3))


@pytest.mark.parametrize("clip", [None, 0.5])
def test_equals_torch_with_the_recipes_groups(world: World, clip: float | None) -> None:
    mine, reference = model(), model()
    optimizer = AdamW(dict(mine.named_parameters()), config.AdamW(clip=clip, betas=(0.8, 0.95)), world)
    decayed = [parameter for name, parameter in reference.named_parameters() if name in ("0.weight", "2.weight")]
    others = [parameter for name, parameter in reference.named_parameters() if name not in ("0.weight", "2.weight")]
    expected = torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0.0}], betas=(0.8, 0.95), foreach=False)
    for step in range(5):
        lr = 0.1 / (step + 1)
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        loss, reference_loss = mine(x).square().sum(), reference(x).square().sum()
        loss.backward()
        reference_loss.backward()
        norm = torch.stack([parameter.grad.norm() for parameter in reference.parameters()]).norm().item()
        for parameter in reference.parameters():
            if clip is not None:
                nn.utils.clip_grad_norm_([parameter], clip)
        for group, weight_decay in zip(expected.param_groups, (0.3, 0.0), strict=True):
            group["lr"], group["weight_decay"] = lr, weight_decay
        expected.step()
        expected.zero_grad()
        numbers = optimizer.step(step, lr, 0.3, {"sum": loss, "half": loss / 2}).read()
        assert numbers.terms == pytest.approx({"sum": reference_loss.item(), "half": reference_loss.item() / 2})
        assert numbers.grad_norm == pytest.approx(norm, rel=1e-5)
        assert numbers.refused is None
        assert all(parameter.grad is None for parameter in mine.parameters())
    for parameter, other in zip(mine.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-5, atol=1e-7)


def gradients_of(module: nn.Module, step: int) -> torch.Tensor:
    loss = module(torch.randn(6, 4, generator=torch.Generator().manual_seed(step))).square().sum()
    loss.backward()
    return loss


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_sgd_equals_torchs(world: World, momentum: float, nesterov: bool) -> None:
    mine, reference = model(), model()
    optimizer = optim.get(dict(mine.named_parameters()), config.SGD(momentum=momentum, nesterov=nesterov), world)
    groups = [
        {"params": [p for p in reference.parameters() if p.ndim == 2]},
        {"params": [p for p in reference.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    expected = torch.optim.SGD(groups, momentum=momentum, nesterov=nesterov, weight_decay=0.3, foreach=False)
    for step in range(5):
        for group in expected.param_groups:
            group["lr"] = 0.01 / (step + 1)
        gradients_of(reference, step)
        expected.step()
        expected.zero_grad()
        optimizer.step(step, 0.01 / (step + 1), 0.3, {"loss": gradients_of(mine, step)})
    for parameter, other in zip(mine.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-5, atol=1e-7)
    assert set(optimizer.state()) == {f"momentum.{name}" for name, _ in mine.named_parameters()}


def test_lars_is_its_formula(world: World) -> None:
    """In float64, a parameter at a time; one tensor has no gradient, and one is 0."""
    mine, reference = model(), model().double()
    with torch.no_grad():
        for each in (mine, reference):
            each[2].weight.zero_()
            each[2].bias.fill_(0.1)
    optimizer = optim.get(dict(mine.named_parameters()), config.LARS(momentum=0.8, trust=0.01), world)
    velocity = {name: torch.zeros_like(p) for name, p in reference.named_parameters()}
    for step in range(4):
        lr = 0.5 / (step + 1)
        loss = gradients_of(mine, step)
        reference.zero_grad()
        reference(torch.randn(6, 4, generator=torch.Generator().manual_seed(step)).double()).square().sum().backward()
        norm = torch.stack([p.grad.norm() for p in reference.parameters()]).norm().item()
        with torch.no_grad():
            for name, p in reference.named_parameters():
                u = p.grad
                if p.ndim > 1:
                    u = u + 0.3 * p
                    if p.norm() > 0 and u.norm() > 0:
                        u = u * 0.01 * p.norm() / u.norm()
                velocity[name] = 0.8 * velocity[name] + u
                p -= lr * velocity[name]
        numbers = optimizer.step(step, lr, 0.3, {"loss": loss}).read()
        assert numbers.grad_norm == pytest.approx(norm, rel=1e-5), "without the weight decay"
    for parameter, other in zip(mine.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(parameter.double(), other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", [config.SGD(), config.LARS(), config.AdamW(clip_by="global")], ids=lambda settings: settings.name)
def test_nothing_moves_where_an_update_is_refused(world: World, settings: config.Optimizer) -> None:
    mine = model()
    optimizer = optim.get(dict(mine.named_parameters()), settings, world)
    optimizer.step(0, 0.1, 0.1, {"loss": gradients_of(mine, 0)})
    before = {name: tensor.clone() for name, tensor in (optimizer.state() | dict(mine.named_parameters())).items()}
    loss = gradients_of(mine, 1)
    mine[0].weight.grad[0, 0] = float("nan")
    assert optimizer.step(1, 0.1, 0.1, {"loss": loss}).read().refused is not None
    for name, tensor in (optimizer.state() | dict(mine.named_parameters())).items():
        assert torch.equal(tensor, before[name]), name
    assert optimizer.step(1, 0.1, 0.1, {"loss": gradients_of(mine, 1)}).read().refused is None
    assert not torch.equal(mine[0].weight, before["0.weight"])


@pytest.mark.parametrize("by", ["tensor", "module", "global"])
def test_clipping_by_tensor_module_and_all_together(world: World, by: str) -> None:
    """A step of SGD without momentum shows the clipped gradient. The auxiliary, which may have no influence, is clipped apart."""
    mine = nn.ModuleDict(
        {"student": nn.ModuleDict({"encoder": model(), "head": nn.Linear(3, 2)}), "auxiliary": nn.ModuleDict({"decoders": nn.Linear(4, 2)})}
    )
    before = {name: p.detach().clone() for name, p in mine.named_parameters()}
    settings = config.SGD(momentum=0.0, clip=0.5, clip_by=by)  # type: ignore[arg-type]
    optimizer = optim.get(dict(mine.named_parameters()), settings, world)
    loss = mine["student"]["head"](mine["student"]["encoder"](torch.ones(2, 4) / 3)).square().sum() * 30
    (loss + 50 * mine["auxiliary"]["decoders"](torch.ones(2, 4)).square().sum()).backward()
    gradients = {name: p.grad.clone() for name, p in mine.named_parameters()}
    optimizer.step(0, 1.0, 0.0, {"loss": loss})

    def part(name: str, depth: int) -> list[str]:
        return name.split(".")[:depth]

    for name, p in mine.named_parameters():
        together = [
            g
            for other, g in gradients.items()
            if {"tensor": other == name, "module": part(other, 2) == part(name, 2), "global": part(other, 1) == part(name, 1)}[by]
        ]
        norm = torch.stack([g.norm() for g in together]).norm()
        torch.testing.assert_close(before[name] - p, gradients[name] * min(1.0, 0.5 / norm.item()), rtol=1e-4, atol=1e-6)


def test_layers_learn_with_their_part_of_the_learning_rate(world: World) -> None:
    names = {
        "student.encoder.backbone.vit.patch_embed.proj.weight": 0.9**4 * 0.2,
        "student.encoder.backbone.vit.pos_embed": 0.9**4,
        "student.encoder.backbone.vit.cls_token": 0.9**4,
        "student.encoder.backbone.mask_token": 0.9**4,
        "student.encoder.backbone.vit.blocks.0.attn.qkv.weight": 0.9**3,
        "student.encoder.backbone.vit.blocks.2.mlp.fc2.bias": 0.9,
        "student.encoder.backbone.vit.norm.weight": 1.0,
        "student.encoder.split.equi.weight": 1.0,
        "student.head.prototypes": 1.0,
        "auxiliary.decoders.0.linear.weight": 1.0,
    }
    assert lr_factors(names, 0.9, 0.2) == pytest.approx(names)
    assert set(lr_factors(names, 1.0, 1.0).values()) == {1.0}
    blocks = nn.ModuleDict({"e": nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)]), "end": nn.Linear(3, 3)})})
    before = {name: p.detach().clone() for name, p in blocks.named_parameters()}
    optimizer = optim.get(dict(blocks.named_parameters()), config.SGD(momentum=0.0, layer_decay=0.5), world)
    loss = sum(p.sum() for p in blocks.parameters())
    loss.backward()
    optimizer.step(0, 1.0, 0.0, {"loss": loss})
    moved = {name: (before[name] - p).mean().item() for name, p in blocks.named_parameters() if name.endswith("weight")}
    assert moved == pytest.approx({"e.blocks.0.weight": 0.25, "e.blocks.1.weight": 0.5, "e.end.weight": 1.0}, rel=1e-4)


def test_learning_rates_are_scaled_with_the_batch() -> None:
    for scaling, lr in {"linear": 4e-3 * 8, "sqrt": 4e-3 * 2**0.5, "none": 4e-3}.items():
        assert config.AdamW(base_lr=4e-3, scaling=scaling).lr(2048) == pytest.approx(lr)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nesterov looks ahead along the momentum, which is 0"):
        config.SGD(momentum=0.0, nesterov=True)
    with pytest.raises(ValueError, match="clip_by is global, but clip is null"):
        config.AdamW(clip=None, clip_by="global")


def test_a_frozen_parameter_stays_and_its_moments_go_on(world: World) -> None:
    mine = model()
    before = mine[2].weight.detach().clone()
    optimizer = AdamW(dict(mine.named_parameters()), config.AdamW(), world)
    loss = mine(torch.ones(2, 4)).square().sum()
    loss.backward()
    optimizer.step(0, 0.1, 0.3, {"loss": loss}, frozen=("2.weight",))
    assert torch.equal(mine[2].weight, before)
    assert optimizer.moments["exp_avg"]["2.weight"].abs().sum() > 0
    assert not torch.equal(mine[0].weight, model()[0].weight)


def test_what_has_no_gradient_is_left_alone(world: World) -> None:
    mine = model()
    mine[2].requires_grad_(False)
    optimizer = AdamW(dict(mine.named_parameters()), config.AdamW(), world)
    loss = mine(torch.ones(2, 4)).square().sum()
    loss.backward()
    optimizer.step(0, 0.1, 0.3, {"loss": loss})
    assert torch.equal(mine[2].weight, model()[2].weight)
    assert set(optimizer.state()) == {f"{kind}.{name}" for kind in ("exp_avg", "exp_avg_sq") for name, _ in mine.named_parameters()}


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("student.encoder.backbone.vit.blocks.3.attn.qkv.weight", "blocks"),
        ("student.encoder.backbone.vit.pos_embed", "backbone"),
        ("student.encoder.backbone.mask_token", "backbone"),
        ("student.encoder.split.equi.weight", "split"),
        ("student.head.mlp.0.bias", "head"),
        ("student.head.prototypes", "head"),
        ("auxiliary.decoders.0.linear.weight", "decoders"),
        ("weight", "weight"),
    ],
)
def test_parameters_belong_to_modules(name: str, module: str) -> None:
    assert module_of(name) == module


def test_norms_of_modules_and_terms_of_ranks(world: World) -> None:
    vector = torch.tensor([9.0, 16.0, 144.0, 1.0, 2.0, 3.0, 6.0])
    numbers = Report(vector, ["s.head.a", "s.head.b", "s.split.c"], ["one", "two"], torch.tensor(1.0)).read()
    assert numbers.grad_norms == {"head": 5.0, "split": 12.0}
    assert numbers.grad_norm == 13.0
    assert numbers.by_rank == [{"one": 1.0, "two": 2.0}, {"one": 3.0, "two": 6.0}]
    assert numbers.terms == {"one": 2.0, "two": 4.0}
