"""iBOT: self-distillation of the CLS token across crops and of masked patch tokens within a view (Zhou et al., ICLR 2022)."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
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
        self.encoder = Encoder(config)
        self.head = self.new_head(config)

    def new_head(self, config: PretrainConfig) -> PrototypeHead:
        method = config.method_as(panel.IBOT)
        return PrototypeHead(self.encoder.d_inv, method.head_hidden, method.head_bottleneck, method.prototypes, config.d_head)

    def inv(self, tokens: Tensor) -> Tensor:
        if self.encoder.split is None:
            return tokens
        inv: Tensor = self.encoder.split(tokens, None)[0]
        return inv

    def logits(self, inv: Tensor, num_cls: int) -> tuple[Tensor, Tensor]:
        """`(num_cls + m, d_inv)` -> of the CLS tokens, which come first, and of the patches: `(num_cls, prototypes)`, `(m, prototypes)`."""
        cls, patch = self.head(inv).split([num_cls, len(inv) - num_cls])
        return cls, patch


class IBOT(networks.Trained[Network]):
    """Student, teacher and centres.

    CLS term: cross-entropy between the teacher's view of each global crop and the student's of every other crop, mean over the
    pairs. Patch term: the same at the masked patches of each global crop, mean over the patches of an image, then over all
    images (those without a mask count as 0), then over the two views. Teacher outputs are centred with moving means over
    all ranks, the patches' over all patches.
    """

    terms: tuple[str, ...] = ("cls", "patch")
    network: type[Network] = Network
    has_centres = True

    def __init__(self, config: PretrainConfig, world: World, timeline: Timeline) -> None:
        super().__init__(config, world, timeline, lambda: self.network(config))
        self.settings = config.method_as(panel.IBOT)
        self.is_compiled = wants_compilation(config, world.device)
        self.centres = torch.full((2, self.settings.prototypes), float("nan"), device=world.device)  # of CLS and patches
        # (2, prototypes + 1): sums and their number over all ranks and the parts so far of the step under way
        self._noted: Tensor | None = None

    def frozen(self, step: int) -> Collection[str]:
        freeze = step < self.timeline.steps(self.settings.freeze_last_layer_epochs)
        return [f"student.{name}" for name in self._student if name.endswith("head.prototypes")] if freeze else ()

    def initialise(self) -> None:
        super().initialise()
        self.centres.zero_()

    def state(self) -> dict[str, Tensor]:
        return super().state() | ({"centres": self.centres} if self.has_centres else {})

    def numbers(self, step: int) -> dict[str, float]:
        return super().numbers(step) | {"teacher_temperature": self._temperature(step)}

    # --- the loss ------------------------------------------------------------------------------------------------------

    def step(self, views: Views, step: int, part: int = 0) -> Output:
        b, num_local = len(views.global1), len(views.local)
        first = self.first(b, part)
        if part == 0:
            self._noted = None
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
            logits = self.student.logits(inv, num_cls)
        equi = None if both is None else (both[:b], both[b:])
        cls_logs, patch_logs = (torch.log_softmax(each.float() / self.settings.student_temperature, dim=-1) for each in logits)
        terms = {
            "cls": self_distillation(cls_targets, cls_logs.view(2 + num_local, b, -1)),
            "patch": -((patch_targets * patch_logs).sum(dim=-1) * masked.weight).sum(),
            **self._other_terms(tokens[0][:, 0].view(2, b, -1)),
        }
        return Output(terms, equi, Watched(features, cls_targets.flatten(0, 1)))

    def _other_terms(self, cls: Tensor) -> dict[str, Tensor]:
        """Of the student's CLS tokens of the global crops `(2, b, dim)`."""
        return {}

    def _through_head(self, tokens: Tensor, num_cls: int, masked: Masked) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """CLS tokens and all patches, `(num_cls + p, dim)` -> `Network.logits` of CLS and of the masked patches, equivariant outputs
        `(p, d)`."""

        def pick(unit: Tensor) -> Tensor:
            return torch.cat([unit[:num_cls], unit[num_cls:].index_select(0, masked.rows)])

        logits, equi = self.student.head(tokens, pick, len(tokens) - num_cls)
        cls, patch = logits.split([num_cls, len(logits) - num_cls])
        return (cls, patch), equi

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
        self._note(logits[-2:], torch.ones(2, device=logits.device))  # means: all ranks and parts have the same number of tokens
        temperature = self._temperature(step)
        cls = torch.softmax((logits[:crops] - self.centres[0]) / temperature, dim=-1)
        patch = torch.softmax((logits[crops:-2] - self.centres[1]) / temperature, dim=-1)
        return cls.view(2, crops // 2, -1), patch, tokens[: crops // 2, 0]

    def _note(self, sums: Tensor, numbers: Tensor) -> None:
        """`(2, prototypes)`, `(2,)`: of teacher logits of CLS tokens and of patches on this rank, for the centres."""
        noted = torch.cat([sums, numbers[:, None]], dim=1)
        dist.all_reduce(noted, group=self.world.group)
        self._noted = noted if self._noted is None else self._noted + noted

    # --- draws ---------------------------------------------------------------------------------------------------------

    def _masks(self, step: int, first: int, b: int) -> Masked:
        size = self.config.group_size
        groups = range(first // size, (first + b) // size)
        mask, most = self._draw_masks(step, groups)
        per_image = np.maximum(mask.sum(axis=1), 1)
        image, _ = np.nonzero(mask)
        weight = torch.from_numpy((1 / (per_image[image] * len(mask))).astype(np.float32))
        rows = torch.from_numpy(np.flatnonzero(mask))
        if self.is_compiled:  # for one shape
            rows, weight = (F.pad(values, (0, most - len(values))) for values in (rows, weight))
        device = self.world.device
        return Masked(send(torch.from_numpy(mask), device), send(rows, device), send(weight, device))

    def _draw_masks(self, step: int, groups: range) -> tuple[NDArray[np.bool_], int]:
        """`(2b, patches)`, view by view, of the b samples of these groups; how many patches such a draw can mask at most."""
        config, size = self.config, self.config.group_size
        grid = config.side // config.backbone.facts.patch_size
        how = (grid, self.settings.mask_probability, self.settings.mask_ratio)
        masks = [draw_masks(config.seed, step, view, groups, size, *how) for view in range(2)]
        return np.concatenate(masks), 2 * most_masked(len(groups), size, *how)

    def _drop_path(self, step: int, first: int, b: int, num_local: int) -> list[Tensor | None]:
        """For the global and the local crops, as `Backbone.forward` takes them."""
        return drop_path(self.config, self.world, step, first, b, num_local)

    # --- moving averages -----------------------------------------------------------------------------------------------

    def after_update(self, step: int, applied: Tensor) -> None:
        super().after_update(step, applied)
        if not self.has_centres:
            return
        assert self._noted is not None, "step comes first"
        kept, numbers = self.settings.centre_momentum, self._noted[:, -1:]
        moved = self.centres * kept + self._noted[:, :-1] / numbers * (1 - kept)
        self.centres.copy_(torch.where(applied.bool() & (numbers > 0), moved, self.centres))
        self._noted = None

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
