"""AdamW against torch's own; refusals are in test_distributed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from equissl import config, distributed
from equissl.distributed import World
from equissl.optim import AdamW, Report, module_of


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.delenv("RANK", raising=False)
    yield distributed.init()
    distributed.close()


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
