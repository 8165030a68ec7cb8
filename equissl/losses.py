"""Terms that several methods share, on the joined batch of all ranks; gradients are as in `distributed.gather`."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from equissl.distributed import World, gather, total

EPS = 1e-4  # under the root of a variance
KOLEO_EPS = 1e-8  # added to a difference and to a distance


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


def koleo(z: Tensor, samples: int, world: World) -> Tensor:
    """`(views, b, d)` on each rank -> `(views,)`: minus the logarithm of the distance to the nearest neighbour, mean over samples.

    The Kozachenko-Leonenko estimator of entropy on L2-normalised vectors (Sablayrolles et al., ICLR 2019; DINOv2). Neighbours are
    looked for among `samples` consecutive vectors of the joined batch, which must be a multiple of it. One by itself is its own
    neighbour: finite, without gradient. In float32.
    """
    if z.shape[1] % samples:  # a neighbourhood is on several ranks: all of them compute all
        z = gather(z.transpose(0, 1), world).transpose(0, 1)
    unit = F.normalize(z.float(), dim=-1, eps=KOLEO_EPS)
    near = unit.reshape(-1, samples, z.shape[-1])  # neighbourhoods of all views
    with torch.no_grad():
        products = near @ near.mT
        products.diagonal(dim1=-2, dim2=-1).fill_(-torch.inf)
        nearest = products.argmax(dim=-1)
    neighbours = near.gather(1, nearest[..., None].expand_as(near))
    distances = (near - neighbours + KOLEO_EPS).norm(dim=-1)
    means: Tensor = -(distances + KOLEO_EPS).log().view(len(z), -1).mean(dim=1)
    return means


@torch.no_grad()
def sinkhorn(logits: Tensor, present: Tensor, world: World, iterations: int = 3) -> Tensor:
    """`(r, k)` on each rank -> probabilities of the k prototypes in each row, which over all rows give each prototype nearly the same.

    Sinkhorn & Knopp on exp(logits) of the rows of all ranks, as in SwAV (Caron et al., NeurIPS 2020) and DINOv2: the columns are divided
    by their sums, then the rows by theirs, `iterations` times. `present` `(r,)` bool: the others only fill the shape. In logarithms:
    nothing overflows, and only the scales of rows and columns are kept from one iteration to the next.
    """
    absent = torch.zeros_like(logits[:, :1]).masked_fill(~present[:, None], -torch.inf)
    of_rows, of_columns = absent, logits.new_zeros(logits.shape[1])
    for _ in range(iterations):
        mine = (logits + of_rows).logsumexp(dim=0)
        largest = mine.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=world.group)
        sums = (mine - largest).exp()
        dist.all_reduce(sums, group=world.group)
        of_columns = -(largest + sums.log())
        of_rows = absent - (logits + of_columns).logsumexp(dim=1, keepdim=True)
    return torch.softmax(logits + of_columns, dim=1)
