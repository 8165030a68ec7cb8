"""A timm ResNet (He et al. 2016) as a backbone: one token of an image, the mean of its last features over rows and columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.models import resnet
from torch import Tensor, nn

from equissl.batchnorm import BatchNorm2d
from equissl.config import BackboneFacts, PretrainConfig


class _Block(nn.Module):
    """A block of timm's on several batches, which come as one call: FSDP gathers it once. Each batch has statistics of its own.

    The last norm of its residual branch begins with weight 0, timm's default and the recipe of SimCLR, BYOL and VICReg: the block is
    the identity then (Goyal et al. 2017).
    """

    last_norm: str

    def zero_init_last(self) -> None:
        """timm calls it where it would set the weight, which has no values yet."""
        getattr(self, self.last_norm).initial_weight = 0.0

    def forward(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """`[(b_i, channels, H_i, W_i)]` -> the same, halved or not."""
        return [super(_Block, self).forward(x) for x in batches]


class BasicBlock(_Block, resnet.BasicBlock):  # type: ignore[misc]  # timm is not typed throughout
    last_norm = "bn2"


class Bottleneck(_Block, resnet.Bottleneck):  # type: ignore[misc]
    last_norm = "bn3"


class ResNet(nn.Module):
    """A timm ResNet that returns its pooled feature as the only token.

    Batch norm is over all ranks, and of each batch by itself: the views of `backbone([view1, view2])` have statistics of their own, as
    in BYOL and VICReg; those of `backbone([torch.cat([view1, view2])])` have common ones, as in SimCLR.
    """

    def __init__(self, config: PretrainConfig) -> None:
        super().__init__()
        facts = config.backbone.facts
        block = Bottleneck if facts.has_bottlenecks else BasicBlock
        self.resnet = timm.create_model(config.backbone.name, num_classes=0, norm_layer=BatchNorm2d, block=block)
        change_stem(self.resnet, facts)

    @property
    def blocks(self) -> list[nn.Module]:
        return [block for stage in (1, 2, 3, 4) for block in getattr(self.resnet, f"layer{stage}")]

    def forward(self, crops: Sequence[Tensor], masks: Sequence[None] | None = None, drops: Sequence[None] | None = None) -> list[Tensor]:
        """`[(b_i, 3, H_i, W_i)]`, of any side -> `[(b_i, 1, dim)]`. `masks` and `drops`: as other backbones have them, without any."""
        assert not any(each is not None for each in (*(masks or ()), *(drops or ())))
        batches = [self._stem(images) for images in crops]
        for block in self.blocks:
            batches = block(batches)
        return [torch.stack([self.resnet.global_pool(x)], dim=1) for x in batches]  # FSDP wants no view

    def _stem(self, images: Tensor) -> Tensor:
        x = images.contiguous(memory_format=torch.channels_last)  # and so through the layers: 0.81 of the time on a CPU
        out: Tensor = self.resnet.maxpool(self.resnet.act1(self.resnet.bn1(self.resnet.conv1(x))))
        return out


def change_stem(model: Any, facts: BackboneFacts) -> None:
    """Turn timm's ImageNet stem into the one that the facts say; in place."""
    if facts.stem == "cifar":
        model.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        model.maxpool = nn.Identity()
