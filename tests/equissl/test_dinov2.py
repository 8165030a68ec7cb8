"""DINOv2's loss and its parts against their formulae in float64 and loops; masks; what is refused."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from harness import run_ranks
from hypothesis import given
from hypothesis import settings as how
from hypothesis import strategies as st
from numpy.typing import NDArray
from test_ibot import in_double, softmax
from test_parallel import alone, assert_the_same, two_steps
from torch.nn.functional import normalize

from equissl import distributed, optim
from equissl.config import DINOv2 as Settings
from equissl.config import PretrainConfig
from equissl.distributed import World
from equissl.losses import koleo, sinkhorn
from equissl.masks import most_masked
from equissl.methods.dinov2 import DINOv2, Network

Array = NDArray[np.float64]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.delenv("RANK", raising=False)
    yield distributed.init()
    distributed.close()


def by_loops(logits: Array, iterations: int = 3) -> Array:
    """Sinkhorn-Knopp on probabilities, as its definition has it: `(rows, prototypes)`."""
    q = np.exp(logits - logits.max())
    for _ in range(iterations):
        q = q / q.sum(axis=0, keepdims=True) / q.shape[1]
        q = q / q.sum(axis=1, keepdims=True) / q.shape[0]
    return q * q.shape[0]


def spread(z: Array) -> float:
    """The KoLeo term of one neighbourhood, sample by sample."""
    unit = [row / np.linalg.norm(row) for row in z]
    terms = []
    for i, mine in enumerate(unit):
        nearest = min((other for j, other in enumerate(unit) if j != i), key=lambda other: ((mine - other) ** 2).sum())
        terms.append(-np.log(np.sqrt(((mine - nearest + 1e-8) ** 2).sum()) + 1e-8))
    return float(np.mean(terms))


def outputs(network: Network, image: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[Array, Array, Array]:
    """Of one image: logits of the CLS token and of the patches, the CLS token itself."""
    features = network.encoder(image[None].double(), mask)
    found = []
    for head, tokens in ((network.head, features.inv_cls), (network.patch_head or network.head, features.inv_patches[0])):
        found.append((normalize(head.mlp(tokens), dim=-1) @ normalize(head.prototypes, dim=-1).T).detach().numpy())
    return found[0][0], found[1], features.cls[0].detach().numpy()


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("dinov2", {}),
        ("dinov2", {"method__separate_heads": True, "auxiliary": None, "backbone__layer_scale": 0.3, "method__koleo": 0.7}),
        ("dinov2_sinkhorn", {"auxiliary": None, "method__views__num_local": 2}),
        ("dinov2_sinkhorn", {"method__separate_heads": False, "method__koleo_samples": 4}),
    ],
    ids=str,
)
def test_the_loss_is_the_formula(method: str, changes: dict[str, Any], world: World) -> None:
    """Every image alone, every pair and patch in a loop; temperatures, centres and masks as they are in the second epoch."""
    settings = tiny.config(method=method, backbone__drop_path=0.0, **changes)
    run = tiny.Run(settings, world)
    mine, of, step, b = run.method, settings.method, 2, settings.batch
    assert isinstance(mine, DINOv2)
    assert isinstance(of, Settings)
    run.update(0, lr=1e-2)  # teacher and student are not the same any more
    mine.centres.copy_(torch.linspace(-0.3, 0.4, 2 * 64).view(2, 64))
    centres = mine.centres.double().numpy().copy()
    views = run.views(step)
    output = mine.step(views, step)

    student, teacher = in_double(mine.student, settings), in_double(mine.teacher_network, settings)
    masks = mine._masks(step, 0, b).mask.view(2, b, -1)
    temperature = 0.04 + 0.03 * step / tiny.TIMELINE.steps_per_epoch
    crops = [views.global1, views.global2, *views.local]
    of_teacher = [[outputs(teacher, image) for image in crop] for crop in crops[:2]]
    of_student = [
        [outputs(student, image, masks[number, sample][None] if number < 2 else None) for sample, image in enumerate(crop)]
        for number, crop in enumerate(crops)
    ]
    cls = np.array([[image[0] for image in crop] for crop in of_teacher]).reshape(2 * b, -1)
    places = [(view, sample, patch) for view in range(2) for sample in range(b) for patch in np.flatnonzero(masks[view, sample])]
    patches = np.array([of_teacher[view][sample][1][patch] for view, sample, patch in places])
    if of.centring == "sinkhorn":
        targets, patch_targets = by_loops(cls / temperature), by_loops(patches / temperature)
    else:
        targets = np.array([softmax((row - centres[0]) / temperature) for row in cls])
        patch_targets = np.array([softmax((row - centres[1]) / temperature) for row in patches])

    pairs = [(q, v) for q in range(2) for v in range(len(crops)) if v != q]
    assert len(pairs) == 2 + 2 * len(views.local)
    of_pairs = [
        -sum((targets[q * b + sample] * np.log(softmax(of_student[v][sample][0] / 0.1))).sum() for sample in range(b)) / b for q, v in pairs
    ]
    of_patches = 0.0
    for (view, sample, patch), target in zip(places, patch_targets, strict=True):
        loss = -(target * np.log(softmax(of_student[view][sample][1][patch] / 0.1))).sum()
        of_patches += loss / int(masks[view, sample].sum()) / (2 * b)
    size = of.koleo_samples
    near = [np.array([image[2] for image in of_student[view][at : at + size]]) for view in range(2) for at in range(0, b, size)]
    expected = {"cls": sum(of_pairs) / len(pairs), "patch": of_patches, "koleo": of.koleo * sum(map(spread, near)) * size / b}
    assert {name: term.item() for name, term in output.terms.items()} == pytest.approx(expected, rel=5e-5)

    mine.after_update(step, torch.ones(()))
    if of.centring == "softmax":
        means = np.stack([cls.mean(axis=0), patches.mean(axis=0)])  # of the masked patches alone
        np.testing.assert_allclose(mine.centres.numpy(), 0.9 * centres + 0.1 * means, atol=1e-6)
    assert ("centres" in mine.state()) == (of.centring == "softmax")


def test_both_heads_last_layers_are_frozen_and_averaged(world: World) -> None:
    run = tiny.Run(tiny.config(method="dinov2_sinkhorn"), world)
    before = run.values()
    run.update(0, lr=1e-2)
    after = run.values()
    for head in ("head", "patch_head"):
        assert torch.equal(after[f"student.{head}.prototypes"], before[f"student.{head}.prototypes"])
        name = f"{head}.mlp.2.weight"
        torch.testing.assert_close(after[f"teacher.{name}"], 0.9 * before[f"teacher.{name}"] + 0.1 * after[f"student.{name}"])
    assert run.method.frozen(2) == ()
    assert not torch.equal(before["student.head.mlp.2.weight"], before["student.patch_head.mlp.2.weight"])
    shared = tiny.Run(tiny.config(method="dinov2"), world)
    assert not [name for name in shared.values() if "patch_head" in name]


def test_parts_of_a_batch_add_up_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses, gradients, and the centre of as many masked patches as each part happens to have."""
    settings = [tiny.config(method="dinov2", accumulate=accumulate) for accumulate in (1, 2)]
    whole, parts = (alone(each, monkeypatch, two_steps) for each in settings)
    assert_the_same(parts, whole)

    def numbers(run: tiny.Run) -> list[int]:
        assert isinstance(run.method, DINOv2)
        return [int(run.method._masks(0, first, 8).mask.sum()) for first in (0, 8)]

    of_parts = alone(settings[1], monkeypatch, numbers)
    assert of_parts[0] != of_parts[1]


# --- KoLeo -----------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.sampled_from([(1, 6, 6), (2, 6, 3), (2, 8, 2)]))
@how(max_examples=30, deadline=None)
def test_koleo_is_the_formula_in_each_neighbourhood(seed: int, shape: tuple[int, int, int]) -> None:
    views, b, samples = shape
    z = np.random.default_rng(seed).normal(size=(views, b, 5))
    expected = [np.mean([spread(view[at : at + samples]) for at in range(0, b, samples)]) for view in z]
    one = World(0, 1, 0, torch.device("cpu"), None, None)  # type: ignore[arg-type]  # nothing is sent
    found = koleo(torch.from_numpy(z), samples, one)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-5, atol=1e-6)
    larger = koleo(torch.from_numpy(z) * torch.rand(views, b, 1) * 9 + 0.0, samples, one)
    torch.testing.assert_close(larger, found, rtol=1e-4, atol=1e-5)  # directions alone count


def test_koleo_pushes_the_nearest_apart_and_is_finite_where_there_is_no_other(world: World) -> None:
    angles = torch.tensor([0.0, 0.3, 2.0], dtype=torch.float64)
    z = torch.stack([angles.cos(), angles.sin()], dim=1).float()[None].requires_grad_()
    koleo(z, 3, world).sum().backward()
    assert z.grad is not None
    turned = z.detach() - 0.1 * z.grad
    assert torch.atan2(turned[0, 1, 1], turned[0, 1, 0]) - torch.atan2(turned[0, 0, 1], turned[0, 0, 0]) > 0.3
    for same in (torch.ones(2, 1, 4), torch.ones(2, 3, 4), torch.zeros(2, 1, 4)):
        same.requires_grad_()
        term = koleo(same, same.shape[1], world)
        assert term.isfinite().all()
        assert (term > 15).all(), "as near as can be"
        term.sum().backward()
        assert same.grad is not None
        assert same.grad.isfinite().all()


def test_a_batch_of_one_learns(world: World) -> None:
    run = tiny.Run(tiny.config(method="dinov2", batch=1, group_size=1), world)
    report = run.update(0).read()
    assert report.refused is None
    assert math.isfinite(report.terms["koleo"])


# --- Sinkhorn-Knopp --------------------------------------------------------------------------------------------------------


def random_logits(seed: int, rows: int, prototypes: int, sharpness: float = 3.0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(rows, prototypes))) * sharpness


def assigned(logits: torch.Tensor, world: World, iterations: int = 3, present: torch.Tensor | None = None) -> torch.Tensor:
    return sinkhorn(logits, torch.ones(len(logits), dtype=torch.bool) if present is None else present, world, iterations)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("rows", "prototypes"), [(12, 5), (5, 12), (1, 4)])
def test_sinkhorn_properties(seed: int, rows: int, prototypes: int, world: World) -> None:
    logits = random_logits(seed, rows, prototypes)
    found = assigned(logits, world)
    np.testing.assert_allclose(found.numpy(), by_loops(logits.numpy()), rtol=1e-9)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(rows, dtype=torch.float64))
    converged = assigned(logits, world, iterations=2000)
    torch.testing.assert_close(converged.sum(dim=0), torch.full((prototypes,), rows / prototypes, dtype=torch.float64))
    if rows == 1:
        torch.testing.assert_close(found, torch.full_like(found, 1 / prototypes))  # why a few rows are refused
    # a constant for all changes nothing; one for each row is a row's scale, which is gone when it has converged
    torch.testing.assert_close(assigned(logits + 7.5, world), found)
    torch.testing.assert_close(assigned(logits + random_logits(9, rows, 1), world, iterations=2000), converged)
    order, columns = torch.randperm(rows), torch.randperm(prototypes)
    torch.testing.assert_close(assigned(logits[order][:, columns], world), found[order][:, columns])


def test_rows_that_only_fill_the_shape_count_for_nothing(world: World) -> None:
    logits = random_logits(0, 9, 6)
    present = torch.tensor([True, True, False, True, False, True, True, True, False])
    found = assigned(logits, world, present=present)
    torch.testing.assert_close(found[present], assigned(logits[present], world))
    assert found.isfinite().all()
    assert assigned(logits, world, present=torch.zeros(9, dtype=torch.bool)).isfinite().all(), "a step without masks"


def test_nothing_overflows(world: World) -> None:
    logits = torch.tensor([[150.0, 0.0, -140.0], [0.0, 200.0, 0.0], [-190.0, 0.0, 1.0]])
    assert logits.exp().isinf().any()
    np.testing.assert_allclose(assigned(logits, world).numpy(), by_loops(logits.double().numpy()), rtol=1e-3, atol=1e-6)


def on_ranks(rows: list[list[int]], logits: torch.Tensor, present: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Sinkhorn of a rank's rows; KoLeo of its half of the samples, and its gradient as the loop takes it, on all ranks."""
    world = distributed.init()
    mine = rows[world.rank]
    found = sinkhorn(logits[mine], present[mine], world)
    share = z.shape[1] // world.world_size
    leaf = z[:, world.rank * share : (world.rank + 1) * share].clone().requires_grad_()
    term = koleo(leaf, z.shape[1], world)
    term.sum().backward()
    assert leaf.grad is not None
    gradient = distributed.gather(leaf.grad.transpose(0, 1) / world.world_size, world).transpose(0, 1)
    distributed.close()
    return found, term.detach(), gradient


def test_two_ranks_equal_one() -> None:
    logits = random_logits(3, 10, 7)
    present = torch.tensor([True] * 6 + [False] + [True] * 3)
    z = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    ((one, term, gradient),) = run_ranks(on_ranks, 1, [list(range(10))], logits, present, z)
    for rows in ([[0, 1, 2, 3, 4, 5, 6], [7, 8, 9]], [[6], [0, 1, 2, 3, 4, 5, 7, 8, 9]]):  # the second: a rank has none
        two = run_ranks(on_ranks, 2, rows, logits, present, z)
        for mine, (found, term2, gradient2) in zip(rows, two, strict=True):
            torch.testing.assert_close(found[present[mine]], one[[row for row in mine if present[row]]])
            torch.testing.assert_close(term2, term)
            torch.testing.assert_close(gradient2, gradient)


# --- masks -----------------------------------------------------------------------------------------------------------------


def drawn(step: int, groups: range, **changes: Any) -> tuple[NDArray[np.bool_], int]:
    """`(2, groups, group_size, patches)`, and the bound."""
    settings = tiny.config(method="dinov2", image_size=112, auxiliary=None, transformation=None, **changes)
    method = object.__new__(DINOv2)
    method.config, method.settings = settings, settings.method  # type: ignore[assignment]
    masks, most = method._draw_masks(step, groups)
    return masks.reshape(2, len(groups), settings.group_size, -1), most


def test_half_of_a_groups_crops_are_masked_one_in_each_part_of_the_range() -> None:
    of_steps = [drawn(step, range(16)) for step in range(8)]
    masks = np.stack([mask for mask, _ in of_steps])  # (steps, 2, groups, samples, patches)
    shares = masks.mean(axis=-1).transpose(0, 2, 1, 3).reshape(-1, 8)  # of both crops of the four samples of a group
    assert ((shares > 0).sum(axis=1) == 4).all()
    per_view = (masks.any(axis=-1)).sum(axis=-1)
    assert set(per_view.ravel()) > {1, 2, 3}, "not half of each view"
    chosen = np.sort(shares, axis=1)[:, 4:]
    wanted = np.array([0.15, 0.25, 0.35, 0.45])
    assert (np.abs(chosen - wanted) < 0.05 + 0.03).all()
    assert np.abs(chosen.mean(axis=0) - wanted).max() < 0.02
    assert all(mask.sum() <= most for mask, most in of_steps)
    assert of_steps[0][1] == most_masked(16, 8, 14, 0.5, (0.1, 0.5))
    halves = [drawn(3, groups)[0] for groups in (range(7), range(7, 16))]
    assert np.array_equal(np.concatenate(halves, axis=1), masks[3])
    with_bound = masks.sum(axis=(1, 2, 3, 4))
    assert len(set(with_bound)) > 1, "shapes are fixed by the bound, not by the draw"


def test_blocks_may_be_as_small_as_four_patches() -> None:
    masks = np.concatenate([drawn(step, range(16), method__mask_ratio=[0.1, 0.1])[0].reshape(-1, 14, 14) for step in range(6)])
    masks = masks[masks.any(axis=(1, 2))]
    boxes = []
    for mask in masks:
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        boxes.append((rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1) / mask.sum())
    # of 20 patches: iBOT's begin with a block of 16, so that what is left is a small rest; here there are several blocks
    assert np.median(boxes) > 3
    tiny_masks, _ = drawn(0, range(64), method__mask_ratio=[4 / 196, 4 / 196])
    sizes = tiny_masks.sum(axis=-1).ravel()
    assert set(sizes) <= {0, 1, 2, 3, 4}
    assert (sizes[sizes > 0] == 4).mean() > 0.8, "one block of four, not four of one"
    of_four = tiny_masks.reshape(-1, 14, 14)[sizes == 4]
    assert all(mask.any(axis=1).sum() * mask.any(axis=0).sum() <= 12 for mask in of_four)


# --- settings --------------------------------------------------------------------------------------------------------------


def test_the_recipe() -> None:
    values = {"data": "imagenet1k", "method": "dinov2", "epochs": 200.0, "batch": 2048}
    settings = PretrainConfig.model_validate(values | {"transformation": "se2", "auxiliary": "reconstruction"})
    method = settings.method
    assert isinstance(method, Settings)
    assert (settings.d_inv, settings.d_equi) == (1536, 512)
    assert method.optimizer.lr(2048) == pytest.approx(4e-3 * math.sqrt(2))
    assert (method.optimizer.layer_decay, method.optimizer.patch_embed_lr, method.optimizer.clip, method.optimizer.clip_by) == (
        0.9,
        0.2,
        3.0,
        "module",
    )
    assert (method.views.num_local, method.views.global_scale, method.views.local_scale) == (8, (0.32, 1.0), (0.05, 0.32))
    assert (method.prototypes, method.head_hidden, method.head_bottleneck, method.ema) == (65536, 2048, 256, (0.992, 1.0))
    assert settings.total_steps(1_281_167) == 125_000, "the authors' 100 epochs of 1250 steps"
    settings.check(48 // 3, {})
    with_sinkhorn = PretrainConfig.model_validate(values | {"method": {"name": "dinov2", "centring": "sinkhorn", "prototypes": 131072}})
    assert with_sinkhorn.estimate({}, 32, {}) is not None


def sinkhorn_with(**changes: Any) -> PretrainConfig:
    return tiny.config(method="dinov2_sinkhorn", **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"accumulate": 2}, "accumulate is 2, but centring sinkhorn assigns the prototypes over a whole batch .* or centring softmax"),
        ({"method__centre_momentum": 0.5}, "method.centre_momentum is 0.5, but centring sinkhorn has no centres: leave it at 0.9"),
        (
            {"method__prototypes": 1025},
            r"1025 prototypes among the 32 CLS tokens .* spread over 32 of them .* 33 CLS tokens. Give a larger",
        ),
        ({"method__mask_probability": 0.01}, "prototypes among the .* masked patches"),
        ({"method__mask_probability": 0.0}, "prototypes among the 0 masked patches"),
        ({"method__koleo_samples": 12}, "method.koleo_samples is 12: the batch, 16, is to be a multiple of it, or smaller"),
        ({"method__koleo_samples": 1}, "koleo_samples"),
        ({"method__centring": "median"}, "centring"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sinkhorn_with(**changes)


def test_without_koleo_the_batch_need_not_hold_its_neighbourhoods() -> None:
    tiny.config(method="dinov2", method__koleo=0.0, method__koleo_samples=12)


def test_the_smallest_batch_for_sinkhorn_is_taken() -> None:
    sinkhorn_with(method__prototypes=1024)  # 32 CLS tokens
    tiny.config(method="dinov2", method__prototypes=1025)


def test_parts_hold_whole_neighbourhoods() -> None:
    settings = tiny.config(method="dinov2", accumulate=2)  # 8 of 16
    settings.check(1, {})
    with pytest.raises(ValueError, match=r"a rank's part is 4 samples, but koleo looks for neighbours among 8, and a part must hold them"):
        settings.check(2, {})
    tiny.config(method="dinov2").check(4, {})  # in one part they may be on several ranks


# --- LayerScale ------------------------------------------------------------------------------------------------------------


def test_layer_scale_begins_as_told_learns_and_does_not_decay(world: World) -> None:
    run = tiny.Run(tiny.config(method="dinov2", backbone__layer_scale=0.25), world)
    names = [name for name in run.parameters if name.endswith("gamma")]
    assert len(names) == 4
    before = run.values()
    assert all((before[name] == 0.25).all() for name in names)
    run.update(0, lr=1e-2)
    stays = optim.get({name: run.parameters[name] for name in names}, run.settings.method.optimizer, world)
    after = run.values()
    for name in names:
        assert not torch.equal(after[name], before[name])
        run.parameters[name].grad = torch.zeros_like(run.parameters[name])
    stays.step(0, 1e-2, 0.5, {"none": torch.zeros(())})
    assert all(torch.equal(run.values()[name], after[name]) for name in names), "weight decay alone moves nothing"
