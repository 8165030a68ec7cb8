"""The auxiliary tasks: decode images from both views' equivariant tokens.

`reconstruction`: the second view at intermediate points of its transformation, from the tokens of both side by side.
`cross_attention`: the second view itself, from the first one's tokens.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equissl.compiled import wants_compilation
from equissl.config import CrossAttention, PretrainConfig
from equissl.distributed import World, shard
from equissl.initialise import UnitLinear, initialise, materialise
from equissl.views import fractions

HEAD_WIDTH = 64  # of attention, in dimensions that are a multiple of it; others have one head


class Blend(nn.Module):
    """The second view's tokens attend to the first one's: what is decoded is made of the first view's values.

    The paper (arXiv 2412.03314) says that cross-attention blends the views and that one of them is reconstructed, without information
    about the transformation, not which and by how many layers. Ours: one attention, whose queries are the view to be reconstructed. Its
    own tokens are not added to what they chose, as a transformer's block would: from these alone the image could be decoded, and the
    other view would not be needed. `residual` adds them. What g has done is known to the queries only: with the right
    tokens they say where in the first view each patch of the second is.
    """

    def __init__(self, d: int, residual: bool) -> None:
        super().__init__()
        self.residual, self.num_heads = residual, d // HEAD_WIDTH if d % HEAD_WIDTH == 0 else 1
        self.norm = nn.LayerNorm(d)
        self.queries, self.keys, self.values, self.out = (UnitLinear(d, d) for _ in range(4))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Twice `(b, patches, d)` -> `(b, patches, d)`."""
        b, patches, d = first.shape
        chosen_from, chooses = self.norm(first), self.norm(second)
        q, k, v = (
            x.view(b, patches, self.num_heads, -1).transpose(1, 2)
            for x in (self.queries(chooses), self.keys(chosen_from), self.values(chosen_from))
        )
        chosen: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, patches, d))
        return chosen + second if self.residual else chosen


class Decoder(nn.Module):
    """Tokens -> an image: a linear layer on the patch grid, then convolutions, each doubling the side.

    A transposed convolution of size 4 and stride 2 gives every output pixel 2×2 inputs, as nearest-neighbour doubling and a
    3×3 convolution do, at 4/9 of the cost (measured on a CPU: 3 times as fast, 1.1 to 2.3 times as fast as with pixel shuffle).

    Tokens are an image with channels last in memory as they are, and stay so through the layers. Several decoders at once are no
    faster on a CPU: grouped convolutions take 1.15 times as long, one product for all linear layers as long.
    """

    def __init__(self, d: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.linear = UnitLinear(d, widths[0])
        self.doublings = nn.ModuleList(
            nn.ConvTranspose2d(width, out, kernel_size=4, stride=2, padding=1) for width, out in pairwise((*widths, 3))
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """`(b, grid², d)` -> `(b, 3, S, S)`."""
        b, patches, _ = tokens.shape
        grid = round(patches**0.5)
        x: Tensor = self.linear(tokens).view(b, grid, grid, -1).permute(0, 3, 1, 2)
        for doubling in self.doublings:
            x = doubling(F.gelu(x))
        return x


class Reconstructed(NamedTuple):
    term: Tensor  # scalar: mean squared error per pixel and channel of normalised images, mean over the targets
    images: list[Tensor]  # K times (b, 3, S, S), detached


class Auxiliary(nn.Module):
    """One independent decoder per target, sharded, without values until they are initialised or loaded.

    `L = L_SSL + lambda · L_recon`. At lambda 0 the decoders learn from detached tokens, with weight 1: what they show has no
    influence on the encoder.
    """

    def __init__(self, config: PretrainConfig, world: World) -> None:
        super().__init__()
        assert config.auxiliary is not None
        settings, d = config.auxiliary, config.d_equi
        self.seed, self.weight = config.seed, settings.weight
        width = settings.blend(d, config.num_patches).width
        with torch.device("meta"):
            self.blend = Blend(d, settings.residual) if isinstance(settings, CrossAttention) else None
            self.decoders = nn.ModuleList(Decoder(width, settings.decoder_widths) for _ in fractions(config))
        units = [*self.decoders] if self.blend is None else [self.blend, *self.decoders]
        if wants_compilation(config, world.device):
            world.compiler.in_place(units)
        shard(units, world)
        materialise(self, world.device)

    def initialise(self) -> None:
        initialise(self, self.seed)

    def parameters_by_name(self) -> dict[str, nn.Parameter]:
        """What the optimizer trains."""
        return {f"auxiliary.{name}": parameter for name, parameter in self.named_parameters()}

    def state(self) -> dict[str, Tensor]:
        """Tensors to save and to load into, by name."""
        return {name: parameter.detach() for name, parameter in self.parameters_by_name().items()}

    @property
    def objective_weight(self) -> float:
        """The weight of the term in what is minimised."""
        return self.weight if self.weight else 1.0

    def forward(self, equi: tuple[Tensor, Tensor], targets: Tensor) -> Reconstructed:
        """`equi` twice `(b, grid², d)`; `targets` `(K, b, 3, S, S)`."""
        if not self.weight:
            equi = (equi[0].detach(), equi[1].detach())
        tokens = torch.cat(equi, dim=-1) if self.blend is None else self.blend(*equi)
        images = [decoder(tokens).float() for decoder in self.decoders]
        errors = [F.mse_loss(image, target) for image, target in zip(images, targets, strict=True)]
        return Reconstructed(torch.stack(errors).mean(), [image.detach() for image in images])
