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
    # a product, not an index: the gradient of what several have chosen is then summed in a fixed order on GPUs too
    neighbours = F.one_hot(nearest, samples).to(near.dtype) @ near
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
        largest = largest.clamp(min=torch.finfo(largest.dtype).min)  # where no rank has a row: finite
        sums = (mine - largest).exp()
        dist.all_reduce(sums, group=world.group)
        of_columns = -(largest + sums.clamp(min=torch.finfo(sums.dtype).tiny).log())
        of_rows = absent - (logits + of_columns).logsumexp(dim=1, keepdim=True)
    return torch.softmax(logits + of_columns, dim=1)


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
