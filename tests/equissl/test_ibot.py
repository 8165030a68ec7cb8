"""iBOT's loss against its formula in float64 and loops; what moves and what does not."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from numpy.typing import NDArray
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from equissl import compiled
from equissl.distributed import World, full, local
from equissl.encoder import _add, build_encoder
from equissl.estimates import vit_flops
from equissl.initialise import materialise
from equissl.masks import drop_path_rows
from equissl.methods.ibot import IBOT, Network


def softmax(x: NDArray[np.float64]) -> NDArray[np.float64]:
    e = np.exp(x - x.max())
    return e / e.sum()


def in_double(network: Network, settings: Any) -> Network:
    """The same network, whole and in float64."""
    plain = type(network)(settings)
    materialise(plain, torch.device("cpu"))
    with torch.no_grad():
        for mine, theirs in zip(plain.parameters(), network.parameters(), strict=True):
            mine.copy_(full(theirs))
    return plain.double()


def logits(network: Network, image: torch.Tensor, mask: torch.Tensor | None = None) -> NDArray[np.float64]:
    """Of one image: `(1 + patches, prototypes)`."""
    features = network.encoder(image[None].double(), mask)
    tokens = torch.cat([features.inv_cls[:, None], features.inv_patches], dim=1)
    unit = torch.nn.functional.normalize(network.head.mlp(tokens[0]), dim=-1)
    weight = network.head.prototypes / network.head.prototypes.norm(dim=1, keepdim=True)
    return (unit @ weight.T).detach().numpy()


@pytest.mark.parametrize("changes", [{}, {"auxiliary": None, "method__views__num_local": 2}])
def test_the_loss_is_the_formula(changes: dict[str, Any], world: World) -> None:
    """Every image alone, every pair and patch in a loop; temperatures, centres and masks as they are in the second epoch."""
    settings = tiny.config(backbone__drop_path=0.0, **changes)
    run = tiny.Run(settings, world)
    method, step, b = run.method, 2, settings.batch
    assert isinstance(method, IBOT)
    run.update(0, lr=1e-2)  # teacher and student are not the same any more
    method.centres.copy_(torch.linspace(-0.3, 0.4, 2 * 64).view(2, 64))
    old_centres = method.centres.double().numpy().copy()
    views = run.views(step)
    output = method.step(views, step)

    student, teacher = in_double(method.student, settings), in_double(method.teacher_network, settings)
    masks = method._masks(step, 0, b).mask
    temperature = 0.04 + 0.03 * step / tiny.TIMELINE.steps_per_epoch  # warm-up over one epoch
    cls_losses, patch_losses, teachers = [], [], []
    for sample in range(b):
        crops = [views.global1[sample], views.global2[sample], *(crop[sample] for crop in views.local)]
        hidden = [masks[sample][None], masks[b + sample][None]] + [None] * len(views.local)
        of_student = [logits(student, crop, mask) for crop, mask in zip(crops, hidden, strict=True)]
        of_teacher = [logits(teacher, crop) for crop in crops[:2]]
        teachers.append(of_teacher)
        for q in range(2):
            target = softmax((of_teacher[q][0] - old_centres[0]) / temperature)
            for v, outputs in enumerate(of_student):
                if v != q:
                    cls_losses.append(-(target * np.log(softmax(outputs[0] / 0.1))).sum())
            rows = np.flatnonzero(masks[q * b + sample])
            each = [
                -(softmax((of_teacher[q][1 + row] - old_centres[1]) / temperature) * np.log(softmax(of_student[q][1 + row] / 0.1))).sum()
                for row in rows
            ]
            patch_losses.append(sum(each) / max(1, len(each)))
    assert 0 in [int(mask.sum()) for mask in masks], "some images have no mask"
    assert len(cls_losses) == b * 2 * (1 + len(views.local))
    assert output.terms["cls"].item() == pytest.approx(np.mean(cls_losses), rel=2e-5)
    assert output.terms["patch"].item() == pytest.approx(np.mean(patch_losses), rel=2e-5)

    method.after_update(step, torch.ones(()))
    everything = np.array(teachers)  # (b, 2, 1 + patches, prototypes)
    means = np.stack([everything[:, :, 0].mean(axis=(0, 1)), everything[:, :, 1:].mean(axis=(0, 1, 2))])
    np.testing.assert_allclose(method.centres.numpy(), 0.9 * old_centres + 0.1 * means, atol=1e-6)


def test_equivariant_tokens_are_the_students_of_the_masked_views(world: World) -> None:
    settings = tiny.config(backbone__drop_path=0.0)
    run = tiny.Run(settings, world)
    views = run.views(0)
    equi = run.method.step(views, 0).equi
    assert equi is not None
    student = in_double(run.method.student, settings)  # type: ignore[attr-defined]
    masks = run.method._masks(0, 0, settings.batch).mask  # type: ignore[attr-defined]
    images = torch.cat([views.global1, views.global2]).double()
    expected = student.encoder(images, masks).equi
    assert expected is not None
    torch.testing.assert_close(torch.cat(equi).double(), expected, rtol=1e-4, atol=1e-5)
    assert tiny.Run(tiny.config(auxiliary=None), world).method.step(views, 0).equi is None


def test_teacher_momentum_frozen_layer_and_temperature(world: World) -> None:
    run = tiny.Run(tiny.config(), world)
    method = run.method
    assert isinstance(method, IBOT)
    before = run.values()
    run.update(0, lr=1e-2)
    after = run.values()
    name = "encoder.backbone.vit.blocks.1.mlp.fc1.weight"
    expected = 0.9 * before[f"teacher.{name}"] + 0.1 * after[f"student.{name}"]
    torch.testing.assert_close(after[f"teacher.{name}"], expected)
    assert torch.equal(after["student.head.prototypes"], before["student.head.prototypes"])  # half an epoch is 1.5 steps
    run.update(1, lr=1e-2)
    assert torch.equal(run.values()["student.head.prototypes"], before["student.head.prototypes"])
    run.update(2, lr=1e-2)
    assert not torch.equal(run.values()["student.head.prototypes"], before["student.head.prototypes"])
    assert method.numbers(0) == pytest.approx({"ema": 0.9, "teacher_temperature": 0.04})
    assert method.numbers(6) == pytest.approx({"ema": 1.0, "teacher_temperature": 0.07})
    assert all(parameter.grad is None for parameter in method.teacher_network.parameters())


def test_drop_path_is_drawn_for_each_crop_and_reaches_the_loss(world: World) -> None:
    with_drop, without = tiny.Run(tiny.config(backbone__drop_path=0.9), world), tiny.Run(tiny.config(backbone__drop_path=0.0), world)
    assert with_drop.backward(0)["cls"] != without.backward(0)["cls"]
    scales = with_drop.method._drop_path(0, 0, 16, 1)  # type: ignore[attr-defined]
    assert [tuple(scale.shape) for scale in scales] == [(2, 2, 32), (2, 2, 16)]
    last = torch.cat(scales, dim=-1)[-1]
    assert not torch.equal(last[:, :16], last[:, 16:32])
    assert not torch.equal(last[0], last[1])


def test_forgotten_initial_values_show(world: World) -> None:
    method = IBOT(tiny.config(), world, tiny.TIMELINE)
    assert all(local(tensor).isnan().all() for tensor in method.state().values())
    method.initialise()
    assert all(local(tensor).isfinite().all() for tensor in method.state().values())


# --- drop path on a subset of the batch ------------------------------------------------------------------------------------


def test_a_subset_is_computed_alone_and_scaled(world: World) -> None:
    encoder = build_encoder(tiny.config())
    block = encoder.backbone.vit.blocks[1]
    x = torch.randn(4, 5, 192, generator=torch.Generator().manual_seed(0))
    (got,) = block([x], [torch.tensor([[0, 2, 3], [1, 2, 3]])])
    (plain,) = block([x], [torch.full((2, 4), 4 / 3)])
    torch.testing.assert_close(got[2:], plain[2:])
    (first,) = block([x], [torch.tensor([[4 / 3] * 4, [0.0] * 4])])
    torch.testing.assert_close(got[0], first[0])
    torch.testing.assert_close(got[1], x[1] + 4 / 3 * block.mlp(block.norm2(x[1:2]))[0])


def test_on_average_a_subset_gives_the_plain_branch() -> None:
    x = [torch.linspace(-2, 2, 2 * 4 * 3 * 2).view(8, 3, 2), torch.linspace(0, 3, 4 * 2 * 2).view(4, 2, 2)]

    def branch(tokens: torch.Tensor, shapes: Any) -> torch.Tensor:
        return tokens.sin() + 1

    total = [torch.zeros_like(each) for each in x]
    for step in range(1500):
        rows = drop_path_rows(0, step, range(1), 4, [(2, 5), (1, 2)], 1)
        for sum_, each in zip(total, _add(branch, x, [row[0, 0] for row in rows]), strict=True):
            sum_ += each / 1500
    for mean, each in zip(total, x, strict=True):
        assert (mean - (each + branch(each, None))).abs().max() < 0.15


@pytest.mark.parametrize(("mode", "kept"), [("sample", (1.0, 1.0)), ("batch", (4 / 8, 2 / 4))])
def test_a_subset_saves_its_flops(mode: str, kept: tuple[float, float], world: World) -> None:
    """Counted, and by the formula from which `plan` has its hours."""
    settings = tiny.config(backbone__drop_path=0.5, backbone__drop_path_mode=mode, auxiliary=None)
    method = tiny.Run(settings, world).method
    assert isinstance(method, IBOT)
    backbone = build_encoder(settings).backbone
    crops = [torch.zeros(32, 3, 32, 32), torch.zeros(16, 3, 16, 16)]
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the CPU's fused kernel is not counted
        backbone(crops, None, method._drop_path(0, 0, 16, 1))
    facts = settings.backbone.facts
    expected = [vit_flops(facts, side, part) * num for side, num, part in zip((32, 16), (32, 16), kept, strict=True)]
    assert counter.get_total_flops() == pytest.approx(sum(expected))


# --- compiled --------------------------------------------------------------------------------------------------------------


def several_terms(run: tiny.Run) -> list[dict[str, float]]:
    return [run.update(step).read().terms for step in range(3)]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's own tracer asks for it
@pytest.mark.parametrize(
    ("name", "graphs"),
    [("ibot", 5), ("dinov2", 5), ("dinov2_sinkhorn", 7)],  # block and head of student and teacher, decoder; of two heads each
)
def test_compiled_networks_give_the_same_numbers_in_one_graph_per_shape(
    name: str, graphs: int, world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a compiler: with inductor the first step takes a minute. Each step masks another number of patches."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()  # it knows the graphs of the run before
    counters.clear()
    plain = tiny.Run(tiny.config(method=name, backbone__drop_path_mode="batch"), world)
    run = tiny.Run(tiny.config(method=name, backbone__drop_path_mode="batch", compile=True), world)
    assert isinstance(run.method, IBOT)
    sizes = [run.method._masks(step, 0, 16) for step in range(3)]
    assert len({int((masked.weight > 0).sum()) for masked in sizes}) > 1
    assert len({len(masked.rows) for masked in sizes}) == 1
    for mine, expected in zip(several_terms(run), several_terms(plain), strict=True):
        assert mine == pytest.approx(expected, rel=1e-5)
    assert counters["stats"]["unique_graphs"] == graphs
    assert not [record for record in caplog.records if record.name.startswith("equissl")]
    assert run.values().keys() == plain.values().keys()


def test_what_cannot_be_compiled_runs_as_it_is(world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def failing(function: Any, **options: Any) -> Any:
        def call(*arguments: Any) -> Any:
            raise RuntimeError("no compiler\nmore of it")

        return call

    monkeypatch.setattr(torch, "compile", failing)
    run = tiny.Run(tiny.config(compile=True), world)
    assert not world.compiler.has_failed
    for mine, expected in zip(several_terms(run), several_terms(tiny.Run(tiny.config(), world)), strict=True):
        assert mine == pytest.approx(expected, rel=1e-5)
    assert caplog.messages == ["the networks cannot be compiled and run slower: RuntimeError: no compiler"]
    assert world.compiler.has_failed

    compiled_calls = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: lambda *arguments: compiled_calls.append(function))
    module = torch.nn.Identity()
    compiled.Compiler().in_place([module])
    module(torch.ones(1))
    assert len(compiled_calls) == 1, "the next run of this process tries again"


def test_compilation_is_for_gpus_unless_asked_for() -> None:
    assert [compiled.wants_compilation(tiny.config(), torch.device(kind)) for kind in ("cpu", "cuda")] == [False, True]
    assert compiled.wants_compilation(tiny.config(compile=True), torch.device("cpu"))
    assert not compiled.wants_compilation(tiny.config(compile=False), torch.device("cuda"))
