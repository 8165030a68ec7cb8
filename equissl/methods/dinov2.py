"""DINOv2: iBOT with other masks, a term that spreads the features, and prototypes assigned over the batch (Oquab et al., TMLR 2024)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from equissl import config as panel
from equissl.config import PretrainConfig
from equissl.distributed import World
from equissl.losses import koleo, sinkhorn
from equissl.masks import draw_masks, most_masked
from equissl.methods import Timeline, ibot
from equissl.methods.ibot import IBOT, Masked

SMALLEST_BLOCK = 4  # patches


class Network(ibot.Network):
    """iBOT's, where `separate_heads` is set with a head of their own for the patches."""

    def __init__(self, config: PretrainConfig) -> None:
        super().__init__(config)
        self.patch_head = self.new_head(config) if config.method_as(panel.DINOv2).separate_heads else None

    def logits(self, inv: Tensor, num_cls: int) -> tuple[Tensor, Tensor]:
        if self.patch_head is None:
            return super().logits(inv, num_cls)
        return self.head(inv[:num_cls]), self.patch_head(inv[num_cls:])


class DINOv2(IBOT):
    """Student and teacher, and with centring softmax the centres. What is not iBOT:

    - of a group's global crops, of both views together, `mask_probability` are masked, one ratio from each part of `mask_ratio`;
    - the teacher's outputs are centred with the moving mean of the *masked* patches, or assigned by Sinkhorn-Knopp over the CLS tokens,
      and over the masked patches, of all ranks;
    - `koleo` · the sum over the two global crops of minus the log distance of the student's CLS token (the backbone's, of which a split
      and the head are made) to that of the nearest other image in the same crop.

    The authors look for neighbours among the images of one GPU, which makes the loss depend on the number of GPUs. Here it is among
    `koleo_samples` consecutive samples of the batch, 64 as on theirs, wherever they are computed: the same on any number of ranks.

    CLS and patch terms are iBOT's: theirs too are means over all pairs of crops and over all global crops. (Without local crops their
    code divides the CLS term by 3 instead of 2.)
    """

    terms = (*IBOT.terms, "koleo")
    network = Network
    settings: panel.DINOv2

    def __init__(self, config: PretrainConfig, world: World, timeline: Timeline) -> None:
        super().__init__(config, world, timeline)
        self.has_centres = self.settings.centring == "softmax"

    def _other_terms(self, cls: Tensor) -> dict[str, Tensor]:
        if not self.settings.koleo:  # then the batch need not hold whole neighbourhoods
            return {"koleo": torch.zeros((), device=cls.device)}
        return {"koleo": self.settings.koleo * koleo(cls, self.settings.neighbourhood(self.config.batch), self.world).sum()}

    @torch.no_grad()
    def _targets(self, images: Tensor, masked: Masked, step: int) -> tuple[Tensor, Tensor, Tensor]:
        network, crops = self.teacher_network, len(images)
        assert network is not None
        (tokens,) = network.encoder.backbone([images])
        asked = torch.cat([tokens[:, 0], tokens[:, 1:].flatten(0, 1).index_select(0, masked.rows)])
        cls, patch = (logits.float() for logits in network.logits(network.inv(asked), crops))
        present, temperature = masked.weight > 0, self._temperature(step)
        if self.has_centres:
            ones = present.float()
            self._note(torch.stack([cls.sum(dim=0), ones @ patch]), torch.stack([ones.new_full((), crops), ones.sum()]))
            cls = torch.softmax((cls - self.centres[0]) / temperature, dim=-1)
            patch = torch.softmax((patch - self.centres[1]) / temperature, dim=-1)
        else:
            cls = sinkhorn(cls / temperature, torch.ones_like(cls[:, 0], dtype=torch.bool), self.world)
            patch = sinkhorn(patch / temperature, present, self.world)
        return cls.view(2, crops // 2, -1), patch, tokens[: crops // 2, 0]

    def _draw_masks(self, step: int, groups: range) -> tuple[NDArray[np.bool_], int]:
        config, size = self.config, self.config.group_size
        grid = config.side // config.backbone.facts.patch_size
        how = (2 * size, grid, self.settings.mask_probability, self.settings.mask_ratio)
        masks = draw_masks(config.seed, step, 0, groups, *how, SMALLEST_BLOCK)
        by_view = masks.reshape(len(groups), 2, size, -1).swapaxes(0, 1).reshape(len(masks), -1)
        return by_view, most_masked(len(groups), *how)


METHOD = DINOv2
