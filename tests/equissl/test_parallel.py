"""What is learnt must not depend on how the work is spread: ways of sharding, micro-batches, recomputed activations, precision."""

from __future__ import annotations

import json
import os
import sys
import unittest.mock
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist
from harness import run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Run
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from equissl import distributed, encoder, pretrain, spread
from equissl.checkpoint import Checkpoints
from equissl.compiled import Compiler
from equissl.config import IBOT, PretrainConfig
from equissl.distributed import local
from equissl.encoder import build_encoder
from equissl.estimates import KEPT_OF_BLOCK, KEPT_OF_SCALES, KEPT_OF_SIZES, KEPT_OF_SUBSETS, sharding_model
from equissl.recompute import recompute

GIB = 2**30


def config(**changes: Any) -> PretrainConfig:
    return tiny.config(group_size=2, auxiliary__include_final=False, auxiliary__num_images=1, **changes)


def backward(run: Run, step: int) -> dict[str, torch.Tensor]:
    """As the loop does it; mean terms of the parts of this rank's share."""
    accumulate, of_parts = run.settings.accumulate, []
    for part, views in enumerate(run.views(step).split(accumulate)):
        output = run.method.step(views, step, part)
        terms = dict(output.terms)
        objective = sum(terms.values())
        if run.auxiliary:
            terms["reconstruction"] = run.auxiliary(output.equi, views.targets).term
            objective = objective + terms["reconstruction"]
        distributed.reduce_over_replicas(run.world, now=part + 1 == accumulate)
        (objective / accumulate).backward()
        of_parts.append(terms)
    return {name: torch.stack([terms[name].detach() for terms in of_parts]).mean() for name in terms}


def two_steps(run: Run) -> dict[str, Any]:
    """Initial values; terms, norm and gradients of each step; values after both."""
    found: dict[str, Any] = {"initial": run.values(), "steps": []}
    for step in range(2):
        terms = backward(run, step)
        gradients = run.gradients()
        report = run.update(step, terms=terms)
        found["steps"].append((report.read(), gradients))
    return found | {"values": run.values()}


WAYS = {
    "replicate": config(sharding="replicate", accumulate=2),  # in parts: the replicas' sum waits for the last
    "shard": config(sharding="shard"),
    "hybrid": config(sharding="hybrid", accumulate=2, activation_checkpointing="full"),
}


def each_way(folder: Path) -> dict[str, Any]:
    """On four ranks, two to a node: every way in turn; each saves a checkpoint, which the next one loads."""
    os.environ.update(LOCAL_WORLD_SIZE="2", LOCAL_RANK=str(int(os.environ["RANK"]) % 2))
    joined = distributed.init(config(sharding="hybrid"))
    assert joined.num_replicas == 2
    found, all_reduce = {}, dist.all_reduce
    for number, (name, chosen) in enumerate(WAYS.items()):
        shape = distributed.mesh_shape(chosen, [distributed.Place(rank % 2, 2, None) for rank in range(4)])
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=distributed.MESH[-len(shape) :])
        world = replace(joined, mesh=mesh, units=[])
        run = Run(chosen, world)
        callers: list[str] = []

        def noted(*arguments: Any, callers: list[str] = callers, **how: Any) -> Any:
            callers.append(sys._getframe(1).f_globals["__name__"].removeprefix("torch.distributed.").partition(".")[0])
            return all_reduce(*arguments, **how)

        with unittest.mock.patch.object(dist, "all_reduce", noted):
            found[name] = two_steps(run) | {"mesh": tuple(world.mesh.shape), "loaded": None}
        found[name] |= {"over_replicas": callers.count("fsdp"), "others": set(callers) - {"fsdp"}}
        shard = local(run.parameters["student.head.prototypes"])
        found[name] |= {"part": shard.numel() / run.parameters["student.head.prototypes"].numel()}
        checkpoints = Checkpoints(folder, 9, world)
        checkpoints.save(number + 1, run.method.state() | run.optimizer.state())
        if number:
            checkpoints.load(number, run.method.state() | run.optimizer.state())
            found[name]["loaded"] = run.values()
        checkpoints.close()
    distributed.close()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ways")


@pytest.fixture(scope="module")
def on_four(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = run_ranks(each_way, 4, folder)[3]  # what rank 0 says is the same, but it holds the first shards
    return found


def alone(settings: PretrainConfig, monkeypatch: pytest.MonkeyPatch, function: Any = two_steps) -> Any:
    monkeypatch.delenv("RANK", raising=False)
    world = distributed.init(settings)
    try:
        return function(Run(settings, world))
    finally:
        distributed.close()


@pytest.fixture(scope="module")
def one_process() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        return alone(config(), patch)


def assert_the_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["initial"].keys() == expected["initial"].keys()
    assert [name for name in found["initial"] if not torch.equal(found["initial"][name], expected["initial"][name])] == []
    # Adam's first update divides small gradients by their own size, and with them their rounding
    for tolerance, (numbers, gradients), (expected_numbers, expected_gradients) in zip(
        (1e-5, 1e-4), found["steps"], expected["steps"], strict=True
    ):
        assert numbers.refused is None
        assert numbers.terms == pytest.approx(expected_numbers.terms, rel=tolerance)
        assert numbers.grad_norm == pytest.approx(expected_numbers.grad_norm, rel=tolerance)
        assert gradients.keys() == expected_gradients.keys()
        for name, gradient in gradients.items():
            assert (gradient - expected_gradients[name]).norm() <= tolerance * expected_gradients[name].norm(), name
    for name, value in expected["values"].items():
        moved = (value - expected["initial"][name]).norm()
        tolerance = 1e-2 if name.startswith(("student", "teacher")) else 1e-4
        if tolerance < 1e-2 or not name.endswith("qkv.bias"):  # the keys' has no gradient but rounding, which Adam makes large
            assert (found["values"][name] - value).norm() <= tolerance * moved, name


# --- ways --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("way", "mesh", "part"),
    [("replicate", (4, 1), 1.0), ("shard", (4,), 0.25), ("hybrid", (2, 2), 0.5)],
)
def test_every_way_learns_what_one_process_learns(
    way: str, mesh: tuple[int, ...], part: float, on_four: Any, one_process: dict[str, Any]
) -> None:
    """From the same bits at the start: values are drawn whole, and NaN where nobody sets them."""
    assert on_four[way]["mesh"] == mesh
    assert on_four[way]["part"] == part
    assert_the_same(on_four[way], one_process)
    assert all(value.isfinite().all() for value in on_four[way]["initial"].values())


def test_replicas_are_summed_once_a_step(on_four: Any) -> None:
    """Not for each part of a batch: two steps of six units (two blocks, the rest of the backbone, head, split, decoder)."""
    assert {way: found["over_replicas"] for way, found in on_four.items()} == {"replicate": 2 * 6, "shard": 0, "hybrid": 2 * 6}
    assert {way: found["others"] for way, found in on_four.items()} == {way: {"equissl"} for way in WAYS}, "norms, terms, centres"


def test_a_checkpoint_of_one_way_is_loaded_by_another(on_four: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ways = list(WAYS)
    for before, way in pairwise(ways):
        saved, loaded = on_four[before]["values"], on_four[way]["loaded"]
        assert [name for name in saved if not torch.equal(saved[name], loaded[name])] == [], f"{before} -> {way}"

    def load(run: Run) -> dict[str, torch.Tensor]:
        checkpoints = Checkpoints(folder, 9, run.world)
        checkpoints.load(1 + ways.index("hybrid"), run.method.state() | run.optimizer.state())
        checkpoints.close()
        return run.values()

    for name, value in alone(config(), monkeypatch, load).items():
        assert torch.equal(value, on_four["hybrid"]["values"][name]), name


def test_initial_weights_are_those_of_the_encoder_alone(on_four: Any) -> None:
    whole = build_encoder(config())
    for name, parameter in whole.named_parameters():
        for way in WAYS:
            assert torch.equal(on_four[way]["initial"][f"student.encoder.{name}"], parameter), (way, name)


def test_ranks_that_cannot_be_spread_are_refused() -> None:
    for places in (
        [distributed.Place(rank // 2, 2, None) for rank in range(4)],
        [distributed.Place(rank % 3, 3, None) for rank in range(4)],
    ):
        with pytest.raises(ValueError, match=r"sharding hybrid"):
            distributed.mesh_shape(config(sharding="hybrid"), places)
    with pytest.raises(ValueError, match="sharding none is one process, not 2"):
        config(sharding="none").check(2, {})
    config(sharding="none").check(1, {})


# --- what is kept, in what precision, in how many parts ----------------------------------------------------------------


@pytest.mark.parametrize(("which", "again"), [("none", 0), ("selective", 1), ("full", 2)])
def test_recomputed_blocks_give_the_same_bits(which: str, again: int, one_process: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    forward = encoder.Block.forward
    monkeypatch.setattr(encoder.Block, "forward", lambda self, *args: calls.append(self) or forward(self, *args))
    found = alone(config(activation_checkpointing=which), monkeypatch)
    assert len(calls) == 2 * (2 + 2 + again), "two steps of two blocks, student's and teacher's, and those computed again"
    for (numbers, gradients), (expected, expected_gradients) in zip(found["steps"], one_process["steps"], strict=True):
        assert numbers == expected
        assert [name for name in gradients if not torch.equal(gradients[name], expected_gradients[name])] == []
    assert found["values"].keys() == one_process["values"].keys()


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_blocks_are_recomputed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled block must run to its end: the way in which torch ends a recomputation early is not an error of the compiler."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend="aot_eager", **options))
    block = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 4))
    x = torch.ones(3, 4, requires_grad=True)
    expected = torch.autograd.grad(block(x).square().sum(), [x, *block.parameters()])
    compiler = Compiler()
    compiler.in_place([block])
    recompute([block], "full", is_compiled=True)
    for got, gradient in zip(torch.autograd.grad(block(x).square().sum(), [x, *block.parameters()]), expected, strict=True):
        torch.testing.assert_close(got, gradient)
    assert not compiler.has_failed


def test_parts_of_a_batch_add_up_to_the_whole(one_process: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a part is a single group of samples; losses, gradients, and the centres, which move by all parts together."""
    for accumulate in (2, 8):
        assert_the_same(alone(config(accumulate=accumulate), monkeypatch), one_process)


def test_a_run_in_parts_is_the_run_in_one(photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the loop, with pictures of reconstructions."""
    monkeypatch.delenv("RANK", raising=False)
    curves = []
    for name, saving in {"whole": {}, "parts": {"accumulate": 4, "activation_checkpointing": "selective"}}.items():
        (tmp_path / name).mkdir()
        values = tiny.config(str(photographs), group_size=2, num_steps=3, picture_every=2, **saving).model_dump(mode="json", by_alias=True)
        assert pretrain.main(values, tmp_path / name, lambda: False) is not None
        records = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        curves.append([{key: record[key] for key in ("cls", "patch", "reconstruction", "loss", "grad_norm")} for record in records])
    assert len(curves[0]) == 3
    for record, expected in zip(*curves, strict=True):
        assert record == pytest.approx(expected, rel=1e-3)


def test_parts_that_cannot_be_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"batch 16 cannot be shared by 4 processes in 4 parts each .* must be a multiple of 32"):
        config(accumulate=4).check(4, {})
    config(accumulate=4).check(2, {})
    monkeypatch.setattr(IBOT, "accumulates", False)
    with pytest.raises(ValueError, match="accumulate is 2, but the loss of ibot couples a batch: it must be 1"):
        config(accumulate=2).check(1, {})
    config().check(1, {})


def test_bfloat16_computes_so_and_keeps_float32(one_process: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    forward = encoder.Block.forward
    monkeypatch.setattr(
        encoder.Block, "forward", lambda self, crops, *args: seen.update(x.dtype for x in crops) or forward(self, crops, *args)
    )
    found = alone(config(precision="bfloat16"), monkeypatch)
    assert seen == {torch.bfloat16}
    (numbers, gradients), (expected, expected_gradients) = found["steps"][0], one_process["steps"][0]
    assert numbers.terms == pytest.approx(expected.terms, rel=0.02)
    assert numbers.terms != pytest.approx(expected.terms, rel=1e-6)
    assert {gradient.dtype for gradient in gradients.values()} == {value.dtype for value in found["values"].values()} == {torch.float32}
    for name in ("student.encoder.backbone.vit.blocks.0.attn.qkv.weight", "student.head.prototypes", "auxiliary.decoders.0.linear.weight"):
        assert torch.cosine_similarity(gradients[name].flatten(), expected_gradients[name].flatten(), dim=0) > 0.98, name


# --- estimates ---------------------------------------------------------------------------------------------------------


class Peak(TorchDispatchMode):
    """The most memory that tensors made meanwhile hold at once, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0
        self._storages: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [tensor.untyped_storage() for tensor in torch.utils._pytree.tree_leaves(out) if type(tensor) is torch.Tensor]
        self._storages |= {storage._cdata: StorageWeakRef(storage) for storage in made}
        if max((storage.nbytes() for storage in made), default=0) > 2**18:
            alive = {key: torch.UntypedStorage._new_with_weak_ptr(ref.cdata) for key, ref in self._storages.items()}
            self._storages = {key: ref for key, ref in self._storages.items() if alive[key] is not None}
            self.num_bytes = max(self.num_bytes, sum(storage.nbytes() for storage in alive.values() if storage is not None))
        return out


@pytest.mark.parametrize(
    "changes",
    [
        {"activation_checkpointing": "selective"},
        {"activation_checkpointing": "full", "accumulate": 2},
        {"auxiliary": None, "method__prototypes": 4096},
        {"precision": "bfloat16", "auxiliary__decoder_widths": [64, 64, 32]},
        {"backbone__drop_path_mode": "batch", "backbone__drop_path": 0.5},
        {"method": "vicreg", "auxiliary": None, "batch": 32, "method__expander": 256},
        {"method": "sie", "batch": 32, "method__expander": 256},
        {"method": "dinov2", "method__prototypes": 4096, "backbone__layer_scale": 0.1, "auxiliary": None},
        {"method": "dinov2_sinkhorn", "method__views": {"num_local": 2, "local_size": 32}},
        {"method": "simclr", "auxiliary": None, "batch": 128, "method__hidden": 512},
        {"method": "byol", "auxiliary": None, "batch": 32, "method__hidden": 512},
        {"method": "simclr_equimod", "batch": 64, "method__hidden": 256},
        {"method": "vicreg_cross", "batch": 32},
        {"method": "ibot_head", "method__prototypes": 512},
        {"method": "vicreg_head", "batch": 32, "method__expander": 256},
        {"method": "vicreg_cross", "batch": 32, "method__representation": 800, "auxiliary__d": 512},
        {"method": "vicreg_resnet", "image_size": 32, "backbone": {"name": "resnet50", "stem": "cifar"}},
    ],
    ids=str,
)
def test_the_estimated_memory_is_what_a_step_takes(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = {"name": "vit_tiny_patch16_224", "patch_size": 8, "depth": 4, "drop_path": 0.1}
    views = {"method__views": {"num_local": 2, "local_size": 32}} if "method" not in changes else {}
    few = {"backbone": backbone, "image_size": 64, "batch": 16}
    if changes.get("method") in tiny.RESNETS:
        few = {}
    final = {} if changes.get("method") in (*tiny.AUXILIARIES, *tiny.RESNETS) else {"auxiliary__include_final": False}
    settings = tiny.config(**few | final | views | changes)

    def peak(run: Run) -> float:
        backward(run, 0)  # the first one makes what stays
        for parameter in run.parameters.values():
            parameter.grad = None
        views = run.views(0)
        monkeypatch.setattr(run, "views", lambda step: views)
        with Peak() as found:
            backward(run, 0)
        return found.num_bytes

    parts = spread.memory("none", sharding_model(settings, 1, on_gpu=False), 1, 1)
    expected = parts["gradients"] + parts["gathered"] + parts["activations"]
    assert alone(settings, monkeypatch, peak) == pytest.approx(expected, rel=0.12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("crops", "subset", "scale", "expected"),
    [
        ([(4, 65)], False, None, KEPT_OF_BLOCK),
        ([(4, 65), (6, 17)], False, None, KEPT_OF_BLOCK + KEPT_OF_SIZES),
        ([(4, 65), (6, 17)], True, None, KEPT_OF_BLOCK + KEPT_OF_SIZES + KEPT_OF_SUBSETS),
        ([(4, 65), (6, 17)], True, 0.1, KEPT_OF_BLOCK + KEPT_OF_SIZES + KEPT_OF_SUBSETS + KEPT_OF_SCALES),
    ],
)
def test_what_a_block_keeps_is_counted(
    dtype: torch.dtype, crops: list[tuple[int, int]], subset: bool, scale: float | None, expected: int
) -> None:
    """In tensors of (all tokens in a branch, dim); the statistics of norms and softmax come to a few per cent of one."""
    dim, num_tokens = 192, sum(b * tokens for b, tokens in crops)
    block = encoder.Block(dim, 3, qkv_bias=True, init_values=scale).to(dtype)
    weights = {parameter.data_ptr() for parameter in block.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    drops = [torch.arange(b).expand(2, b) if subset else torch.ones(2, b, dtype=dtype) for b, _ in crops]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        block([torch.randn(b, tokens, dim, dtype=dtype, requires_grad=True) for b, tokens in crops], drops)
    num_bytes = sum(storage.nbytes() for storage in kept.values())
    assert num_bytes / (num_tokens * dim * dtype.itemsize) == pytest.approx(expected, abs=0.1)


LARGE = {"name": "vit_large_patch16_224"}
REAL = {"data": "imagenet1k", "epochs": 100.0, "transformation": "se2", "auxiliary": "reconstruction"}


@pytest.mark.parametrize(
    ("changes", "ranks", "gib", "way", "reason"),
    [
        ({"batch": 64}, (1, 1), 40, "none", "one process"),
        ({"batch": 1024}, (4, 4), 40, "replicate", "3% of a GPU"),
        ({"batch": 512, "backbone": LARGE}, (4, 4), 40, "hybrid", "shards inside a node fit"),
        ({"batch": 128, "backbone": LARGE}, (1, 4), 40, "shard", "on one node"),
        ({"batch": 512, "backbone": LARGE}, (4, 4), 96, "replicate", "7% of a GPU"),
        ({"batch": 2048, "backbone": LARGE}, (4, 4), 40, "shard", "shards inside a node would take"),
        ({"batch": 64}, (2, 2), None, "shard", "CPUs"),
        ({"batch": 64, "sharding": "replicate"}, (2, 2), None, "replicate", "as asked"),
        ({"batch": 64, "sharding": "hybrid"}, (1, 4), 40, "shard", "one node"),
    ],
)
def test_what_auto_chooses(changes: dict[str, Any], ranks: tuple[int, int], gib: float | None, way: str, reason: str) -> None:
    settings = PretrainConfig.model_validate(REAL | changes)
    nodes, per_node = ranks
    choice = settings.choose_sharding(nodes * per_node, per_node, gib and gib * GIB)
    assert choice.way == way
    assert reason in choice.reason
    gpu = {"tflops": 312, "memory_gib": gib} if gib else {}
    estimate = settings.estimate(gpu | {"ranks_per_node": per_node}, nodes * per_node, {})
    assert estimate is not None
    assert (estimate.sharding, estimate.reason) == choice, "plan says what the run does"
    assert estimate.memory_bytes == sum(estimate.memory.values())


MODELS = st.builds(
    spread.Model,
    trained=st.floats(1e6, 1e10),
    averaged=st.floats(1e6, 1e10),
    largest_unit=st.floats(1e5, 1e8),
    trained_units=st.integers(1, 50),
    averaged_units=st.integers(1, 50),
    compute_bytes=st.sampled_from([2, 4]),
    activation_bytes=st.floats(0, 1e11),
    passes=st.integers(1, 4),
    moments=st.integers(1, 2),
)


@given(MODELS, st.integers(1, 64), st.integers(1, 8), st.floats(1e9, 1e11))
@settings(max_examples=100, deadline=None)
def test_auto_never_chooses_what_does_not_fit_where_another_way_does(model: spread.Model, nodes: int, per_node: int, gpu: float) -> None:
    ranks = nodes * per_node
    needs = {way: sum(spread.memory(way, model, ranks, per_node).values()) for way in ("replicate", "hybrid", "shard")}
    assert needs["replicate"] >= needs["hybrid"] >= needs["shard"]
    chosen = spread.choose("auto", model, ranks, per_node, gpu).way
    if min(needs.values()) <= spread.USABLE * gpu:
        assert sum(spread.memory(chosen, model, ranks, per_node).values()) <= spread.USABLE * gpu


@given(MODELS, st.integers(1, 64), st.integers(1, 8))
@settings(max_examples=100, deadline=None)
def test_traffic(model: spread.Model, nodes: int, per_node: int) -> None:
    """What must hold for any model, and the sums of a ring."""
    found = {way: spread.traffic(way, model, nodes, per_node, 100.0, 10.0) for way in ("none", "replicate", "shard", "hybrid")}
    assert found["none"] == (0, 0, 0)
    for way in ("replicate", "shard", "hybrid"):
        assert (found[way].across_bytes > 0) == (nodes > 1)
        assert (found[way].inside_bytes > 0) == (per_node > 1)
        assert found[way].seconds >= max(found[way].inside_bytes / 100e9, found[way].across_bytes / 10e9)
        assert spread.traffic(way, model, nodes, per_node, 200.0, 20.0).seconds <= found[way].seconds
        unknown = spread.traffic(way, model, nodes, per_node, None, None)
        assert unknown[:2] == found[way][:2]
        assert (unknown.seconds is None) == (nodes * per_node > 1)
    ranks = nodes * per_node
    assert found["hybrid"].across_bytes == pytest.approx(
        found["replicate"].across_bytes
    )  # each GPU sends its shard, or its part of the ring
    assert found["replicate"].across_bytes == pytest.approx(2 * 4 * model.trained * (1 - 1 / nodes) / per_node)
    moved = model.passes * (model.compute_bytes * (2 * model.trained + model.averaged) + 4 * model.trained)
    assert found["shard"].across_bytes == pytest.approx(moved * (1 - 1 / nodes) / per_node)
    if per_node > 1:
        assert found["shard"].inside_bytes == pytest.approx(moved * (1 - 1 / ranks))
        assert found["hybrid"].inside_bytes == pytest.approx(moved * (1 - 1 / per_node))
    if nodes == 1:
        assert found["hybrid"] == pytest.approx(found["shard"])


def test_hybrid_scales_where_shards_over_all_ranks_do_not() -> None:
    """ViT-L on up to 256 nodes of four A100: the ring over all ranks is paid for each unit, three times a step."""
    gpu = {"tflops": 312, "memory_gib": 40, "node_gb_s": 300, "network_gb_s": 25, "ranks_per_node": 4}
    estimate = PretrainConfig.model_validate(REAL | {"backbone": LARGE, "batch": 512}).estimate(gpu, 16, {})
    assert estimate is not None
    shard, hybrid = estimate.scaling["shard"], estimate.scaling["hybrid"]
    assert list(shard) == [1, 4, 16, 64, 256]
    assert shard[1] == pytest.approx(hybrid[1])
    assert hybrid[256] < 2 * hybrid[4]
    assert shard[256] > 5 * hybrid[256]


def test_ranks_on_nodes_that_differ_choose_alike() -> None:
    """The choice is one function of all ranks' places: of the smallest GPU, and without sharing inside nodes of different size."""
    uneven = [distributed.Place(rank, 4, 10**11) for rank in range(4)] + [distributed.Place(rank, 2, 10**6) for rank in range(2)]
    assert distributed.mesh_shape(config(batch=48), uneven) == (6,), "sharded over all: the smallest GPU counts, and hybrid is out"
    even = [distributed.Place(rank % 2, 2, 10**12) for rank in range(4)]
    assert distributed.mesh_shape(config(), even) == (4, 1)
    with pytest.raises(ValueError, match="sharding hybrid"):
        distributed.mesh_shape(config(batch=48, sharding="hybrid"), uneven)
