"""Terms that several methods share, on the joined batch of all ranks; gradients are as in `distributed.gather`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from equissl.distributed import World, gather, total

EPS = 1e-4  # under the root of a variance


def covariances(z: Tensor, world: World) -> Tensor:
    """`(…, b, d)` on each rank -> `(…, d, d)`: of the vectors of all ranks, with their number less one as the divisor.

    What the ranks exchange are sums, so that none computes with the vectors of others.
    """
    num = z.shape[-2] * world.world_size
    centred = z - total(z.sum(dim=-2, keepdim=True), world) / num
    return total(centred.mT @ centred, world) / (num - 1)


def variances(z: Tensor, world: World) -> Tensor:
    """`(…, b, d)` -> `(…, d)`: the diagonal of `covariances`."""
    num = z.shape[-2] * world.world_size
    centred = z - total(z.sum(dim=-2, keepdim=True), world) / num
    return total(centred.square().sum(dim=-2), world) / (num - 1)


def missing_deviation(var: Tensor) -> Tensor:
    """VICReg's variance term (Bardes et al. 2022, eq. 1): what standard deviations lack to 1, mean over all; `var` `(…, d)`."""
    return torch.relu(1 - (var + EPS).sqrt()).mean()


def off_diagonal(cov: Tensor) -> Tensor:
    """VICReg's covariance term (eq. 4): squares off the diagonal over d, summed over the leading dimensions; `cov` `(…, d, d)`."""
    outside = cov - torch.diag_embed(cov.diagonal(dim1=-2, dim2=-1))
    return outside.square().sum() / cov.shape[-1]


def nt_xent(x: Tensor, y: Tensor, temperature: float, world: World) -> Tensor:
    """NT-Xent (Chen et al. 2020, eq. 1): of each vector its partner is to be told from all others by the cosine over the temperature.

    `x`, `y` `(n, d)`, float32 or wider: n pairs on each rank, of all together N. Cross-entropy of the partner among the 2N - 1 others,
    mean over this rank's 2n vectors. The order of the pairs does not matter, nor the vectors' lengths. Memory: 2n · 2N numbers.
    """
    assert x.dtype in (torch.float32, torch.float64)
    n = len(x)
    mine = F.normalize(torch.stack([x, y], dim=1), dim=-1)  # (n, 2, d)
    everyone = gather(mine, world)
    similarity = (mine / temperature).flatten(0, 1) @ everyone.flatten(0, 1).T
    itself = torch.arange(2 * n, device=x.device) + world.rank * 2 * n
    partner = itself.view(n, 2).flip(1).flatten()
    return F.cross_entropy(similarity.scatter(1, itself[:, None], -torch.inf), partner)


def cross_prediction(predictions: Tensor, targets: Tensor) -> Tensor:
    """BYOL's loss (Grill et al. 2020, eq. 2, both directions): |q - z|² of each view's unit prediction and the other's unit target.

    `(2, b, d)` each, float32 or wider -> 2 · mean(2 - 2 cos) over the 2b vectors: the mean over samples of both directions' sum.
    """
    assert predictions.dtype in (torch.float32, torch.float64)
    cosines = F.cosine_similarity(predictions, targets.flip(0), dim=-1)
    return 2 * (2 - 2 * cosines).mean()
