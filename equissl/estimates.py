"""What a run will cost, for `plan`: FLOPs, memory, traffic, GPU hours, from the config alone. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

from equissl import spread
from equissl.config import (
    BANK,
    R2,
    SYNTHETIC,
    BackboneFacts,
    Equivariance,
    Estimate,
    EvaluateConfig,
    Linear,
    Logistic,
    OnFeatures,
    PretrainConfig,
    Projector,
    is_stream,
)

NUM_IMAGES = {"imagenet1k": 1_281_167, "cifar10": 50_000, "cifar100": 50_000}  # training images of known data sets
NUM_VAL_IMAGES = {"imagenet1k": 50_000, "cifar10": 10_000, "cifar100": 10_000}
NUM_CLASSES = {"imagenet1k": 1000, "cifar10": 10, "cifar100": 100}
ASSUMED_ITERATIONS = 100  # of L-BFGS, from the solution of the strength before
ASSUMED_MFU = 0.30  # fraction of the GPU's peak that a tuned ViT step reaches (public records: 0.13 to 0.45)


def vit_flops(facts: BackboneFacts, side: int, kept: float = 1.0) -> float:
    """Forward FLOPs of one image: depth·(24·N·d² + 4·N²·d) for N tokens, plus the patch embedding. `kept`: part of the images that go
    through a residual branch."""
    patches = (side // facts.patch_size) ** 2
    tokens, d = patches + 1, facts.dim
    return kept * facts.depth * (24 * tokens * d**2 + 4 * tokens**2 * d) + 2 * patches * 3 * facts.patch_size**2 * d


def vit_parameters(facts: BackboneFacts, side: int) -> int:
    patches, d = (side // facts.patch_size) ** 2, facts.dim
    return facts.depth * (12 * d * d + 13 * d) + 3 * facts.patch_size**2 * d + (patches + 3) * d + d


class Convolution(NamedTuple):
    """Of a ResNet, with the batch norm after it. `block`: 0 of the stem."""

    block: int
    inputs: int
    outputs: int
    kernel: int
    side: int  # of its output
    is_rectified: bool  # after the norm, alone or in the block's sum: not that of a shortcut

    @property
    def parameters(self) -> int:
        return self.kernel**2 * self.inputs * self.outputs + 2 * self.outputs

    @property
    def numbers(self) -> int:
        """Of its output."""
        return self.outputs * self.side**2


def _half(side: int) -> int:
    return (side + 1) // 2


def convolutions(facts: BackboneFacts, side: int) -> Iterator[Convolution]:
    """Of a ResNet, on an image of this side, as timm builds it: the stride is in the 3×3 convolution."""
    if facts.stem == "cifar":
        yield Convolution(0, 3, 64, 3, side, True)
    else:
        yield Convolution(0, 3, 64, 7, side := _half(side), True)
        side = _half(side)  # the max-pool
    block, inputs = 0, 64
    for stage, num_blocks in enumerate(facts.stages):
        width = 64 * 2**stage
        outputs = 4 * width if facts.has_bottlenecks else width
        for number in range(num_blocks):
            block, before = block + 1, side
            halved = number == 0 and stage > 0
            side = _half(side) if halved else side
            if facts.has_bottlenecks:
                yield Convolution(block, inputs, width, 1, before, True)
                yield Convolution(block, width, width, 3, side, True)
                yield Convolution(block, width, outputs, 1, side, True)
            else:
                yield Convolution(block, inputs, width, 3, side, True)
                yield Convolution(block, width, width, 3, side, True)
            if halved or inputs != outputs:
                yield Convolution(block, inputs, outputs, 1, side, False)
            inputs = outputs


def backbone_flops(facts: BackboneFacts, side: int, kept: float = 1.0) -> float:
    """Forward FLOPs of one image; `kept` as in `vit_flops`."""
    if facts.kind == "vit":
        return vit_flops(facts, side, kept)
    return sum(2.0 * each.kernel**2 * each.inputs * each.numbers for each in convolutions(facts, side))


def backbone_parameters(facts: BackboneFacts, side: int) -> int:
    return vit_parameters(facts, side) if facts.kind == "vit" else sum(each.parameters for each in convolutions(facts, side))


def largest_block(facts: BackboneFacts, side: int) -> int:
    """Parameters."""
    if facts.kind == "vit":
        return vit_parameters(facts._replace(depth=1), side) - vit_parameters(facts._replace(depth=0), side)
    blocks = [0] * (facts.depth + 1)
    for each in convolutions(facts, side):
        blocks[each.block] += each.parameters
    return max(blocks)


class Sizes(NamedTuple):
    """Parameters of the parts of a pretraining."""

    backbone: int
    block: int  # of the backbone, the largest
    buffers: int  # averages of the backbone's batch norms, of one network
    heads: int
    inv: int
    equi: int
    blend: int  # what lies between tokens and decoders
    decoders: int  # all of them
    averaged: int  # the teacher's; 0 without one

    @property
    def student(self) -> int:
        """Encoder and heads."""
        return self.backbone + self.heads + self.inv + self.equi

    @property
    def trained(self) -> int:
        """And the auxiliary's."""
        return self.student + self.blend + self.decoders


def pretraining_sizes(config: PretrainConfig) -> Sizes:
    facts, heads = config.backbone.facts, config.method.demand(config).heads
    blend = decoder = 0
    if config.auxiliary:
        of_both, widths = config.auxiliary.blend(config.d_equi, config.num_patches), config.auxiliary.decoder_widths
        blend, decoder = of_both.parameters, of_both.width * widths[0] + sum(16 * a * b for a, b in pairwise((*widths, 3)))
    scales = 2 * facts.dim * (config.backbone.layer_scale is not None)
    backbone = backbone_parameters(facts, config.side) + facts.depth * scales
    inv, equi = facts.dim * config.d_inv if config.d_split else 0, facts.dim * config.d_split
    in_teacher = sum(head.parameters for head in heads if head.averaged)
    return Sizes(
        backbone=backbone,
        block=largest_block(facts, config.side) + scales,
        buffers=sum(2 * each.outputs for each in convolutions(facts, config.side)) if facts.kind == "resnet" else 0,
        heads=sum(head.parameters for head in heads),
        inv=inv,
        equi=equi,
        blend=blend,
        decoders=decoder * config.num_targets,
        averaged=backbone + inv + equi + in_teacher if config.method.has_teacher else 0,
    )


def _student_crops(config: PretrainConfig) -> tuple[tuple[int, int], ...]:
    """(number, side) of each kind, of one sample."""
    return (config.method.num_global, config.side), (config.method.views.num_local, config.method.views.local_size)


def _student_backbone_flops(config: PretrainConfig) -> float:
    return sum(num * backbone_flops(config.backbone.facts, side, _part_in_branches(config, num)) for num, side in _student_crops(config))


def _part_in_branches(config: PretrainConfig, num: int) -> float:
    """Of `num` crops of each image, the part that goes through a residual branch."""
    crops = num * config.group_size
    return config.backbone.kept(crops) / crops if crops else 1.0


def pretraining_flops(config: PretrainConfig) -> tuple[float, float]:
    """FLOPs of a step per image: of the student's forward pass and of the teacher's. A step has three times the first, for the backward
    pass, and once the second; what activation checkpointing computes again is not in it."""
    facts, sizes, demand, patches = config.backbone.facts, pretraining_sizes(config), config.method.demand(config), config.num_patches
    student = _student_backbone_flops(config) + 2 * demand.inv * sizes.inv + 2 * demand.equi * sizes.equi
    student += sum(2 * head.student * head.parameters for head in demand.heads) + demand.loss.flops
    teacher = 2 * demand.teacher_inv * sizes.inv + sum(2 * head.teacher * head.parameters for head in demand.heads)
    if config.method.has_teacher:
        teacher += 2 * backbone_flops(facts, config.side)
    if config.auxiliary:
        of_both, widths = config.auxiliary.blend(config.d_equi, patches), config.auxiliary.decoder_widths
        student += 2 * 2 * patches * sizes.equi + of_both.flops
        decoder = 2.0 * patches * of_both.width * widths[0]
        for stage, (a, b) in enumerate(pairwise((*widths, 3)), start=1):
            decoder += 2.0 * patches * 4**stage * 4 * a * b  # a transposed convolution gives each pixel 2×2 inputs
        student += config.num_targets * decoder
    return student, teacher


# What autograd keeps of a block, in tensors of (batch, tokens, dim): the input, its norm, q, k, v, the attention's output, the sum after
# it, its norm, and of the MLP's fourfold width the values before and after GELU. A test measures it.
KEPT_OF_BLOCK = 1 + 1 + 3 + 1 + 1 + 1 + 4 + 4
KEPT_OF_SIZES = 1  # more where a block has crops of two sizes: attention leaves each apart, the next layer reads them together
KEPT_OF_SUBSETS = 2  # more in drop path's mode batch: what is added to a subset, of each branch
KEPT_OF_SCALES = 2  # more with LayerScale: each branch's output


def _kept_of_vit(config: PretrainConfig) -> float:
    """Numbers of a sample that autograd keeps of the blocks."""
    facts = config.backbone.facts
    crops = [(num, facts.patches(side)) for num, side in _student_crops(config)]
    tokens = sum(num * (each + 1) for num, each in crops)
    in_branches = sum(num * (each + 1) * _part_in_branches(config, num) for num, each in crops)
    again = {"none": 0, "selective": facts.depth // 2, "full": facts.depth}[config.activation_checkpointing]
    kept_of_scales = KEPT_OF_SCALES * (config.backbone.layer_scale is not None)
    whole = facts.depth - again + (again > 0)  # one at a time is computed again
    kept_of_block = KEPT_OF_BLOCK + KEPT_OF_SIZES * (config.method.views.num_local > 0) + kept_of_scales
    kept_of_block += KEPT_OF_SUBSETS * (config.backbone.drop_path > 0 and config.backbone.drop_path_mode == "batch")
    return facts.dim * (in_branches * kept_of_block * whole + tokens * (again + 1))


def kept_of_resnet(config: PretrainConfig, width: int) -> float:
    """Numbers of a sample that autograd keeps of the stem and the blocks: each convolution's output, for its norm, and what follows that
    norm, for the next convolution. Max-pool keeps the places of its maxima, 8 bytes each."""
    facts, (num, side) = config.backbone.facts, _student_crops(config)[0]
    of_blocks, outputs, places = [0.0] * (facts.depth + 1), [0] * (facts.depth + 1), 0.0
    for each in convolutions(facts, side):
        of_blocks[each.block] += each.numbers * (1 + each.is_rectified)
        if each.is_rectified:
            outputs[each.block] = each.numbers
    if facts.stem == "imagenet":
        outputs[0] = 64 * _half(_half(side)) ** 2
        places = outputs[0] * (8 / width + 1)
    which = config.activation_checkpointing
    again = [block for block in range(1, facts.depth + 1) if which == "full" or (which == "selective" and block % 2 == 0)]
    kept = sum(of_blocks) + places - sum(of_blocks[block] - outputs[block] for block in again)
    return num * (kept + max((of_blocks[block] for block in again), default=0.0))  # one at a time is computed again


def activation_bytes(config: PretrainConfig, samples: float, width: int) -> float:
    """What a part of a batch of so many samples keeps for its backward pass, at `width` bytes per number; images and losses are
    float32 always."""
    facts, demand, sizes, patches = config.backbone.facts, config.method.demand(config), pretraining_sizes(config), config.num_patches
    d, pixels = facts.dim, sum(num * side**2 for num, side in _student_crops(config)) * 3
    kept = pixels + (_kept_of_vit(config) if facts.kind == "vit" else kept_of_resnet(config, width))
    kept += demand.inv * d * (sizes.inv > 0) + sum(head.kept for head in demand.heads)
    if config.d_split:
        kept += demand.inv * config.d_inv + demand.equi * (d + config.d_equi)
    if config.auxiliary:
        kept += config.auxiliary.blend(config.d_equi, patches).kept
        stages = sum(2 * patches * 4**stage * channels for stage, channels in enumerate(config.auxiliary.decoder_widths))
        kept += config.num_targets * stages
    losses = sum(head.losses for head in demand.heads) + demand.loss.kept
    images = (pixels + config.num_targets * 3 * config.side**2) * config.accumulate  # with the targets, of all parts of a batch
    reconstructions = config.num_targets * 3 * config.side**2
    return samples * (kept * width + (losses + images + reconstructions) * 4) + demand.loss.fixed * 4


def sharding_model(config: PretrainConfig, world_size: int, on_gpu: bool) -> spread.Model:
    sizes = pretraining_sizes(config)
    width = 2 if config.precision == "bfloat16" or (config.precision == "auto" and on_gpu) else 4
    units = config.backbone.facts.depth + 2 + (config.d_split > 0)  # blocks, what else the backbone has, head, split
    return spread.Model(
        trained=sizes.trained,
        averaged=sizes.averaged,
        largest_unit=max(sizes.block, sizes.heads, sizes.inv + sizes.equi, sizes.blend),
        trained_units=units + (sizes.blend > 0) + config.num_targets,
        averaged_units=units if config.method.has_teacher else 0,
        compute_bytes=width,
        activation_bytes=activation_bytes(config, config.batch / world_size / config.accumulate, width),
        passes=config.accumulate,
        moments=config.method.optimizer.num_moments,
    )


SCALING_NODES = (1, 4, 16, 64, 256)


def estimate_pretraining(config: PretrainConfig, gpu: Mapping[str, Any], world_size: int) -> Estimate | None:
    num_images = config.stream_images or NUM_IMAGES.get(config.data, 0)
    if config.num_steps is None and not num_images:
        return None
    num_steps = config.total_steps(num_images) if config.num_steps is None else config.num_steps
    student, teacher = pretraining_flops(config)
    flops = num_steps * config.batch * (3 * student + teacher)
    again = {"none": 0.0, "selective": 0.5, "full": 1.0}[config.activation_checkpointing] * _student_backbone_flops(config)
    sizes = pretraining_sizes(config)

    ranks_per_node, memory_gib = gpu.get("ranks_per_node", world_size), gpu.get("memory_gib")
    model = sharding_model(config, world_size, on_gpu=memory_gib is not None)
    choice = spread.choose(config.sharding, model, world_size, ranks_per_node, memory_gib and memory_gib * 2**30)
    memory = spread.memory(choice.way, model, world_size, ranks_per_node)

    def traffic(way: spread.Way, nodes: int) -> spread.Traffic:
        return spread.traffic(way, model, nodes, ranks_per_node, gpu.get("node_gb_s"), gpu.get("network_gb_s"))

    return Estimate(
        num_steps=num_steps,
        flops=flops,
        memory_bytes=sum(memory.values()),
        checkpoint_bytes=4 * ((1 + model.moments) * sizes.trained + sizes.averaged + sizes.buffers * (1 + bool(sizes.averaged)))
        + _bank_bytes(config, num_images),
        gpu_hours=_hours(flops + num_steps * config.batch * again, gpu),
        note=_note(gpu),
        num_checkpoints=config.keep_checkpoints + num_steps // (config.milestone_every or num_steps + 1),
        memory=memory,
        recipe=f"{config.method.name} with {config.method.optimizer.name}: {config.method.optimizer.resolved(config.batch)}",
        sharding=choice.way,
        reason=choice.reason,
        traffic=traffic(choice.way, max(1, world_size // ranks_per_node)),
        scaling={
            way: {nodes: seconds for nodes in SCALING_NODES if (seconds := traffic(way, nodes).seconds) is not None}
            for way in ("replicate", "shard", "hybrid")
        },
    )


def _bank_bytes(config: PretrainConfig, num_images: int) -> int:
    """Of the monitor's bank, at most: whether there are classes shows in the data, and `num_images` is 0 where it is not known."""
    without_classes = config.data == SYNTHETIC or is_stream(config.data)
    return 0 if without_classes else min(BANK, num_images or BANK) * (2 * config.backbone.facts.dim + 2 * 8)


def _hours(flops: float, gpu: Mapping[str, Any]) -> float | None:
    return flops / (gpu["tflops"] * 1e12 * ASSUMED_MFU) / 3600 if gpu.get("tflops") else None


def _note(gpu: Mapping[str, Any]) -> str:
    return f"at {ASSUMED_MFU:.0%} of {gpu['tflops']:g} TFLOP/s" if gpu.get("tflops") else ""


def _num_images(config: EvaluateConfig, pretraining: PretrainConfig) -> tuple[int, int, int, float] | None:
    """To train on, to test on, classes, and the part of the former that is chosen on; None where they are unknown."""
    held_out = config.task.held_out if isinstance(config.task, OnFeatures) else 0.0
    if config.data_set is None:
        name = config.data or pretraining.data
        return (NUM_IMAGES[name], NUM_VAL_IMAGES[name], NUM_CLASSES[name], held_out) if name in NUM_IMAGES else None
    from equissl.data.labelled import DATA_SETS

    data_set = DATA_SETS[config.data_set]
    tune = data_set.splits[data_set.tune] if data_set.tune else 0
    train = data_set.splits[data_set.train] + tune
    return train, data_set.splits[data_set.test], data_set.num_classes, tune / train if tune else held_out


def estimate_evaluation(config: EvaluateConfig, pretraining: PretrainConfig, gpu: Mapping[str, Any]) -> Estimate | None:
    counts = _num_images(config, pretraining)
    if counts is None:
        return None
    train, test, classes, held_out = counts
    task, facts, side = config.task, pretraining.backbone.facts, pretraining.side
    images = {"train": train, "val": test}
    passes: dict[str, float] = {"train": 1, "val": 1}
    flops = 0.0
    if isinstance(task, R2):
        images = {
            "train": min(images["train"], task.num_train_images or images["train"]),
            "val": min(images["val"], task.num_val_images or images["val"]),
        }
        # view 1 by both encoders; view 2: three borders by the trained encoder, of colour one, and one by the random encoder
        second = sum(2 if name == "colour" else 4 for name in task.transformations)
        passes = {"train": 2 + second * task.pairs_per_image, "val": 2 + second}
        weights = (2 if facts.kind == "resnet" else 4) * facts.dim * task.hidden + task.hidden**2
        flops += (second + len(task.transformations)) * task.epochs * images["train"] * task.pairs_per_image * 6 * weights
    if isinstance(task, Equivariance):
        images = {
            "train": min(images["train"], task.num_train_images or images["train"]),
            "val": min(images["val"], task.num_val_images or images["val"]),
        }
        both = 2 * (1 + len(task.transformations))  # by the trained and by the random encoder
        # EquiMod: the image, both views, and of each of six operations at most two; decoders: both views, and about as much in them
        further = 15 * pretraining.method.sees_plain + 4 * (pretraining.auxiliary is not None)
        passes = {"train": both, "val": both + further}
    if isinstance(task, Projector):
        images = {"train": 0, "val": min(images["val"], task.num_images)}
        passes["val"] = 1 + task.views
    if isinstance(task, Linear):
        if task.augment:
            passes["train"] = task.epochs + held_out
        inputs = sum(blocks + mean for blocks in task.blocks for mean in task.mean_patch) * facts.dim
        if facts.kind == "resnet":
            inputs = facts.dim
        # a training step on all images and, where some are held out, one on the others; a forward pass on what is scored
        grids = 2 - held_out if held_out else 1
        flops += 6 * len(task.base_lrs) * inputs * classes * task.epochs * images["train"] * grids
        flops += 2 * len(task.base_lrs) * inputs * classes * (images["val"] + held_out * images["train"])
    if isinstance(task, Logistic):
        fits = task.num_c * (1 - held_out) + 1
        flops += 6 * (1 + task.mean_patch) * facts.dim * classes * images["train"] * min(ASSUMED_ITERATIONS, task.max_iterations) * fits
    flops += sum(images[split] * passes[split] for split in images) * backbone_flops(facts, side)
    parameters = backbone_parameters(facts, side)
    activations = config.batch * facts.patches(side) * facts.dim * 64
    if facts.kind == "resnet":
        activations = 16 * config.batch * max(each.numbers for each in convolutions(facts, side))  # four tensors of the largest layer
    return Estimate(
        num_steps=0,
        flops=flops,
        memory_bytes=4 * parameters + activations,
        checkpoint_bytes=0,
        gpu_hours=_hours(flops, gpu),
        note=_note(gpu),
    )
