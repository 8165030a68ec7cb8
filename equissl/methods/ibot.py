"""iBOT: self-distillation of the CLS token across crops and of masked patch tokens within a view (Zhou et al., ICLR 2022)."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from equissl import config as panel
from equissl import networks, schedules
from equissl.compiled import wants_compilation
from equissl.config import PretrainConfig
from equissl.distributed import World, send
from equissl.encoder import Encoder
from equissl.heads import PrototypeHead
from equissl.masks import draw_masks, most_masked
from equissl.methods import Output, Timeline, Watched
from equissl.networks import drop_path
from equissl.views import Views


class Masked(NamedTuple):
    """The masked patches of both global views of b samples, view by view; everything known on the host."""

    mask: Tensor  # (2b, patches) bool
    rows: Tensor  # (m,) int64 into the flattened mask
    weight: Tensor  # (m,): 1 / (masked patches of the image · 2b); 0 of rows that are there to make m the same in all steps


class Network(networks.Network):
    """Encoder and head; the head is shared between CLS and patch tokens."""

    def __init__(self, config: PretrainConfig) -> None:
        super().__init__()
        method = config.method_as(panel.IBOT)
        self.encoder = Encoder(config)
        self.head = PrototypeHead(self.encoder.d_inv, method.head_hidden, method.head_bottleneck, method.prototypes, config.d_head)

    def inv(self, tokens: Tensor) -> Tensor:
        if self.encoder.split is None:
            return tokens
        inv: Tensor = self.encoder.split(tokens, None)[0]
        return inv


class IBOT(networks.Trained[Network]):
    """Student, teacher and centres.

    CLS term: cross-entropy between the teacher's view of each global crop and the student's of every other crop, mean over the
    pairs. Patch term: the same at the masked patches of each global crop, mean over the patches of an image, then over all
    images (those without a mask count as 0), then over the two views. Teacher outputs are centred with moving means over
    all ranks, the patches' over all patches.
    """

    terms = ("cls", "patch")

    def __init__(self, config: PretrainConfig, world: World, timeline: Timeline) -> None:
        super().__init__(config, world, timeline, lambda: Network(config))
        self.settings = config.method_as(panel.IBOT)
        self.is_compiled = wants_compilation(config, world.device)
        self.centres = torch.full((2, self.settings.prototypes), float("nan"), device=world.device)  # of CLS and patches
        self._batch_means: Tensor | None = None  # of the parts so far of the step under way

    def frozen(self, step: int) -> Collection[str]:
        freeze = step < self.timeline.steps(self.settings.freeze_last_layer_epochs)
        return ("student.head.prototypes",) if freeze else ()

    def initialise(self) -> None:
        super().initialise()
        self.centres.zero_()

    def state(self) -> dict[str, Tensor]:
        return super().state() | {"centres": self.centres}

    def numbers(self, step: int) -> dict[str, float]:
        return super().numbers(step) | {"teacher_temperature": self._temperature(step)}

    # --- the loss ------------------------------------------------------------------------------------------------------

    def step(self, views: Views, step: int, part: int = 0) -> Output:
        b, num_local = len(views.global1), len(views.local)
        first = self.first(b, part)
        if part == 0:
            self._batch_means = None
        images = torch.cat([views.global1, views.global2])
        masked = self._masks(step, first, b)
        cls_targets, patch_targets, features = self._targets(images, masked, step)

        crops = [images] if num_local == 0 else [images, views.local.flatten(0, 1)]
        drops = self._drop_path(step, first, b, num_local)
        tokens = self.student.encoder.backbone(crops, [masked.mask, None][: len(crops)], drops[: len(crops)])
        patches = tokens[0][:, 1:]
        num_cls, both = (2 + num_local) * b, None
        if self.config.d_head:
            logits, both = self._through_head(torch.cat([*(x[:, 0] for x in tokens), patches.flatten(0, 1)]), num_cls, masked)
            both = both.view(*patches.shape[:2], -1)
        else:
            inv = torch.cat([*(x[:, 0] for x in tokens), patches.flatten(0, 1).index_select(0, masked.rows)])
            if self.student.encoder.split is not None:
                inv, both = self.student.encoder.split(inv, patches)
            logits = self.student.head(inv)
        equi = None if both is None else (both[:b], both[b:])
        logs = torch.log_softmax(logits.float() / self.settings.student_temperature, dim=-1)
        cls_term = self_distillation(cls_targets, logs[:num_cls].view(2 + num_local, b, -1))
        patch_term = -((patch_targets * logs[num_cls:]).sum(dim=-1) * masked.weight).sum()
        return Output({"cls": cls_term, "patch": patch_term}, equi, Watched(features, cls_targets.flatten(0, 1)))

    def _through_head(self, tokens: Tensor, num_cls: int, masked: Masked) -> tuple[Tensor, Tensor]:
        """CLS tokens and all patches, `(num_cls + p, dim)` -> logits of CLS and of the masked patches, equivariant outputs `(p, d)`."""

        def pick(unit: Tensor) -> Tensor:
            return torch.cat([unit[:num_cls], unit[num_cls:].index_select(0, masked.rows)])

        logits, equi = self.student.head(tokens, pick, len(tokens) - num_cls)
        return logits, equi

    @torch.no_grad()
    def _targets(self, images: Tensor, masked: Masked, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Probabilities: of CLS `(2, b, prototypes)`, of the masked patches `(m, prototypes)`; CLS tokens of the first view `(b, dim)`.

        Keeps the means for the centres.
        """
        network = self.teacher_network
        assert network is not None
        (tokens,) = network.encoder.backbone([images])
        crops, length, _ = tokens.shape

        def pick(unit: Tensor) -> Tensor:
            unit = unit.view(crops, length, -1)
            cls, patches = unit[:, 0], unit[:, 1:].flatten(0, 1)
            means = torch.stack([cls.mean(dim=0, dtype=torch.float32), patches.mean(dim=0, dtype=torch.float32)])
            return torch.cat([cls, patches.index_select(0, masked.rows), means.to(unit.dtype)])

        logits = network.head(network.inv(tokens.flatten(0, 1)), pick).float()
        means = logits[-2:].clone()
        dist.all_reduce(means, group=self.world.group)
        means /= self.world.world_size * self.config.accumulate
        self._batch_means = means if self._batch_means is None else self._batch_means + means
        temperature = self._temperature(step)
        cls = torch.softmax((logits[:crops] - self.centres[0]) / temperature, dim=-1)
        patch = torch.softmax((logits[crops:-2] - self.centres[1]) / temperature, dim=-1)
        return cls.view(2, crops // 2, -1), patch, tokens[: crops // 2, 0]

    # --- draws ---------------------------------------------------------------------------------------------------------

    def _masks(self, step: int, first: int, b: int) -> Masked:
        config, size = self.config, self.config.group_size
        groups = range(first // size, (first + b) // size)
        grid = config.side // config.backbone.facts.patch_size
        mask = np.concatenate(
            [
                draw_masks(config.seed, step, view, groups, size, grid, self.settings.mask_probability, self.settings.mask_ratio)
                for view in range(2)
            ]
        )
        per_image = np.maximum(mask.sum(axis=1), 1)
        image, _ = np.nonzero(mask)
        weight = torch.from_numpy((1 / (per_image[image] * len(mask))).astype(np.float32))
        rows = torch.from_numpy(np.flatnonzero(mask))
        if self.is_compiled:  # for one shape
            most = 2 * most_masked(len(groups), size, grid, self.settings.mask_probability, self.settings.mask_ratio)
            rows, weight = (F.pad(values, (0, most - len(values))) for values in (rows, weight))
        device = self.world.device
        return Masked(send(torch.from_numpy(mask), device), send(rows, device), send(weight, device))

    def _drop_path(self, step: int, first: int, b: int, num_local: int) -> list[Tensor | None]:
        """For the global and the local crops, as `Backbone.forward` takes them."""
        return drop_path(self.config, self.world, step, first, b, num_local)

    # --- moving averages -----------------------------------------------------------------------------------------------

    def after_update(self, step: int, applied: Tensor) -> None:
        assert self._batch_means is not None, "step comes first"
        super().after_update(step, applied)
        kept = self.settings.centre_momentum
        moved = self.centres * kept + self._batch_means * (1 - kept)
        self.centres.copy_(torch.where(applied.bool(), moved, self.centres))
        self._batch_means = None

    def _temperature(self, step: int) -> float:
        return schedules.linear(step, self.timeline.steps(self.settings.teacher_warmup_epochs), *self.settings.teacher_temperature)


def self_distillation(targets: Tensor, logs: Tensor) -> Tensor:
    """Cross-entropy of each teacher's global crop with every other crop of the student, mean over samples and pairs.

    `targets` `(2, b, prototypes)` probabilities; `logs` `(2 + L, b, prototypes)` log-probabilities, the same two crops first.
    """
    num_targets, b, _ = targets.shape
    num_pairs = num_targets * (len(logs) - 1)
    others = logs.sum(dim=0) - logs[:num_targets]  # over v ≠ q
    return -(targets * others).sum() / (b * num_pairs)


METHOD = IBOT
