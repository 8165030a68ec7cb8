"""What the methods build on: networks ready to train, drop path, and the state that a student and its teacher have."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from equissl import published, schedules
from equissl.batchnorm import batch_norms
from equissl.compiled import wants_compilation
from equissl.config import Averaged, PretrainConfig
from equissl.distributed import World, local, send, shard
from equissl.encoder import Encoder
from equissl.initialise import initialise, materialise
from equissl.masks import drop_path_rows, drop_path_scales
from equissl.methods import Timeline
from equissl.optim import move_towards
from equissl.recompute import recompute
from equissl.views import Views


class Network(nn.Module):
    """An encoder and a method's heads, its other children. Never sharded as a whole: the encoder's units and the heads are."""

    encoder: Encoder

    def heads(self) -> list[nn.Module]:
        return [child for child in self.children() if child is not self.encoder]


N = TypeVar("N", bound=Network)


def build(make: Callable[[], N], config: PretrainConfig, world: World) -> N:
    """A network compiled, recomputing and sharded as the config says, without values."""
    is_compiled = wants_compilation(config, world.device)
    with torch.device("meta"):
        network = make()
    blocks = network.encoder.backbone.blocks
    if is_compiled:  # not what speaks to other ranks inside: that is no graph
        world.compiler.in_place(part for part in (*blocks, *network.heads()) if not batch_norms(part))
    recompute(blocks, config.activation_checkpointing, is_compiled and not batch_norms(blocks[0]))
    shard([*network.encoder.units(), *network.heads()], world)
    materialise(network, world.device)
    return network


def drop_path(config: PretrainConfig, world: World, step: int, first: int, b: int, num_local: int) -> list[Tensor | None]:
    """Of the global crops and of the local ones of the b samples from position `first` of the global batch on, as
    `Backbone.forward` takes them."""
    backbone, size = config.backbone, config.group_size
    facts, rate, num_global = backbone.facts, backbone.drop_path, config.method.num_global
    if rate and backbone.drop_path_mode == "batch":
        groups = range(first // size, (first + b) // size)
        kinds = [(crops, backbone.kept(crops * size)) for crops in (num_global, num_local)]
        rows = drop_path_rows(config.seed, step, groups, size, kinds, facts.depth)
        return [send(each, world.device) for each in rows]
    positions: NDArray[np.int64] = np.arange(first, first + b)
    scales = drop_path_scales(config.seed, step, positions, num_global + num_local, facts.depth, rate)
    if scales is None:
        return [None, None]
    together = [part.permute(1, 2, 0, 3).flatten(2).contiguous() for part in (scales[:num_global], scales[num_global:])]
    return [send(part, world.device) for part in together]


class Trained(Generic[N]):
    """A student and, where the method's settings have one, a teacher: a moving average of those of the student's parameters that it has.

    What a method adds: `terms`, `step`, and where it needs other than this: `has_joint_statistics`, `frozen`, `numbers`, `state`,
    `initialise` and `after_update`.
    """

    has_joint_statistics = False  # whether the batch norms of a ResNet see all images of a sample together, or each view by itself

    def __init__(
        self, config: PretrainConfig, world: World, timeline: Timeline, make: Callable[[], N], make_teacher: Callable[[], N] | None = None
    ) -> None:
        """`make_teacher`: where the teacher lacks some of the student's heads."""
        self.config, self.world, self.timeline = config, world, timeline
        self.student = build(make, config, world)
        self.teacher_network = build(make_teacher or make, config, world).requires_grad_(False) if config.method.has_teacher else None
        # FSDP swaps a module's parameters for whole ones while it computes; these are the shards, and stay so
        self._student = dict(self.student.named_parameters())
        self._teacher = dict(self.teacher_network.named_parameters()) if self.teacher_network is not None else {}

    @property
    def teacher(self) -> Encoder:
        return (self.student if self.teacher_network is None else self.teacher_network).encoder

    def parameters_by_name(self) -> dict[str, nn.Parameter]:
        return {f"student.{name}": parameter for name, parameter in self._student.items()}

    def frozen(self, step: int) -> Collection[str]:
        return ()

    def numbers(self, step: int) -> dict[str, float]:
        return {} if self.teacher_network is None else {"ema": self._momentum(step)}

    def initialise(self) -> None:
        initialise(self.student, self.config.seed)
        if self.config.backbone.weights is not None:
            published.begin_with(self.student.encoder, self.config)
        with torch.no_grad():
            for name, mine in self._teacher.items():
                local(mine).copy_(local(self._student[name]))
            averages = dict(self.student.named_buffers())
            for name, average in self.teacher_network.named_buffers() if self.teacher_network is not None else ():
                average.copy_(averages[name])

    def state(self) -> dict[str, Tensor]:
        def of(name: str, network: Network | None, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
            buffers = dict(network.named_buffers()) if network is not None else {}
            return {f"{name}.{key}": tensor.detach() for key, tensor in (*parameters.items(), *buffers.items())}

        return of("student", self.student, self._student) | of("teacher", self.teacher_network, self._teacher)

    def after_update(self, step: int, applied: Tensor) -> None:
        for network in (self.student, self.teacher_network):
            for norm in batch_norms(network) if network is not None else ():
                norm.move(applied)
        if self._teacher:
            move_towards(
                list(self._teacher.values()), [self._student[name] for name in self._teacher], (1 - self._momentum(step)) * applied
            )

    def _momentum(self, step: int) -> float:
        return schedules.cosine(step, self.timeline.num_steps, *self.config.method_as(Averaged).ema)  # type: ignore[type-abstract]  # it is only asked for

    def first(self, b: int, part: int) -> int:
        """Position in the global batch of the first sample of this rank's `part` of b samples."""
        return (self.world.rank * self.config.accumulate + part) * b

    def tokens_of_pair(self, views: Views, step: int) -> Tensor:
        """The student's of both global views in one pass, the first view's first, with drop path: `(2b, 1 + patches, dim)`.

        Of a method that sees the un-augmented images too they come last: `(3b, …)`.
        """
        b = len(views.global1)
        drops = drop_path(self.config, self.world, step, self.first(b, 0), b, 0)
        images = [views.global1, views.global2] + ([] if views.plain is None else [views.plain])
        return self.tokens_of(self.student, images, drops[0])

    def tokens_of(self, network: N, images: Sequence[Tensor], drops: Tensor | None = None) -> Tensor:
        """`k · (b, 3, S, S)` -> `(k · b, 1 + patches, dim)` in one pass."""
        backbone = network.encoder.backbone
        if self.config.backbone.facts.kind == "resnet" and not self.has_joint_statistics:
            return torch.cat(backbone(images))
        tokens: Tensor = backbone([torch.cat(list(images))], None, [drops])[0]
        return tokens
