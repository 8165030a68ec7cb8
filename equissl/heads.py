"""Projection heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equissl.batchnorm import BatchNorm
from equissl.distributed import World
from equissl.initialise import UnitLinear


class PrototypeHead(nn.Module):
    """The head of DINO and iBOT (Caron et al. 2021; Zhou et al. 2022): MLP, L2 norm, weight-normed linear layer of unit rows.

    `d_equi`: outputs of patch tokens, besides, for an auxiliary (`split_at: head_output`).
    """

    def __init__(self, dim: int, hidden: int, bottleneck: int, prototypes: int, d_equi: int = 0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width, out in pairwise((dim, hidden, hidden, bottleneck)):
            layers += [nn.Linear(width, out), nn.GELU()]
        self.mlp = nn.Sequential(*layers[:-1])
        self.prototypes = nn.Parameter(torch.empty(prototypes, bottleneck))
        self.equi_prototypes = nn.Parameter(torch.empty(d_equi, bottleneck)) if d_equi else None

    def forward(
        self, tokens: Tensor, pick: Callable[[Tensor], Tensor] | None = None, num_patches: int = 0
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`(t, dim)` -> logits `(t, prototypes)`; with `num_patches` also the equivariant outputs `(num_patches, d_equi)` of the last ones.

        `pick` may replace the unit vectors `(t, bottleneck)` by some of them, or by means: the last layer is linear, so the mean
        of logits costs one row instead of one for each token.
        """
        unit = every = F.normalize(self.mlp(tokens), dim=-1)
        if pick is not None:
            unit = pick(unit)
        logits = F.linear(unit, F.normalize(self.prototypes, dim=-1))
        if not num_patches:
            return logits
        assert self.equi_prototypes is not None
        return logits, F.linear(every[-num_patches:], F.normalize(self.equi_prototypes, dim=-1))


class Expander(nn.Module):
    """The expander of VICReg (Bardes et al. 2022) and SIE: linear layers, batch norm and ReLU between them.

    None has a bias: theirs have where batch norm takes it away again. `d_equi`: outputs of patch tokens, besides, for an auxiliary
    (`split_at: head_output`); batch norms then have the statistics of all tokens, so that one head, with one set of averages, is applied
    to both kinds.
    """

    def __init__(self, widths: Sequence[int], world: World, d_equi: int = 0) -> None:
        super().__init__()
        self.mlp = nn.Sequential(*_hidden(widths, world), UnitLinear(widths[-2], widths[-1], bias=False))
        self.equi = UnitLinear(widths[-2], d_equi, bias=False) if d_equi else None

    def forward(self, x: Tensor, num_patches: int = 0) -> Tensor | tuple[Tensor, Tensor]:
        """`(views, b, widths[0])` -> `(views, b, widths[-1])`; each view has its own statistics. With `num_patches` the last ones are
        patch tokens, which have equivariant outputs instead: `(views, b - num_patches, widths[-1])`, `(views, num_patches, d_equi)`.
        """
        if not num_patches:
            out: Tensor = self.mlp(x)
            return out
        assert self.equi is not None
        *hidden, last = self.mlp
        for layer in hidden:
            x = layer(x)
        return last(x[:, :-num_patches]), self.equi(x[:, -num_patches:])


class Projector(nn.Module):
    """The heads of SimCLR (Chen et al. 2020), BYOL (Grill et al. 2020) and EquiMod: linear layers, batch norm and ReLU between them.

    `normed`: what comes out is batch-normalised too, without parameters; else the last layer has a bias. The others have none.
    """

    def __init__(self, widths: Sequence[int], world: World, normed: bool) -> None:
        super().__init__()
        last = UnitLinear(widths[-2], widths[-1], bias=not normed)
        norm = [BatchNorm(widths[-1], world, affine=False)] if normed else []
        self.mlp = nn.Sequential(*_hidden(widths, world), last, *norm)

    def forward(self, x: Tensor) -> Tensor:
        """`(n, widths[0])` -> `(n, widths[-1])`; statistics of all n together."""
        out: Tensor = self.mlp(x)
        return out


def _hidden(widths: Sequence[int], world: World) -> list[nn.Module]:
    """All layers but the last."""
    layers: list[nn.Module] = []
    for width, out in pairwise(widths[:-1]):
        layers += [UnitLinear(width, out, bias=False), BatchNorm(out, world), nn.ReLU()]
    return layers
