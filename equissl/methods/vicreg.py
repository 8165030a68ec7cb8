"""VICReg: both views' embeddings are to agree, to vary over the batch and not to be correlated (Bardes et al., ICLR 2022)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from equissl import config as panel
from equissl import networks
from equissl.distributed import World
from equissl.encoder import Encoder
from equissl.heads import Expander
from equissl.losses import covariances, missing_deviation, off_diagonal
from equissl.methods import Output, Timeline, Watched
from equissl.views import Views


class Network(networks.Network):
    """Encoder and expander."""

    def __init__(self, config: panel.PretrainConfig, world: World) -> None:
        super().__init__()
        width = config.method_as(panel.VICReg).expander
        self.encoder = Encoder(config)
        self.expander = Expander((self.encoder.d_inv, width, width, width), world, config.d_head)


class VICReg(networks.Trained[Network]):
    """`invariance` · mean squared difference of the views' embeddings z, mean over dimensions and samples + `variance` · what the
    standard deviations of the dimensions lack to 1, mean over dimensions and views + `covariance` · squares of the covariances of
    different dimensions over their number d, summed over the views. As in the authors' code; terms are logged with their weights.

    z is of the invariant part of the CLS token, of the whole token where there is no split.
    """

    terms = ("invariance", "variance", "covariance")

    def __init__(self, config: panel.PretrainConfig, world: World, timeline: Timeline) -> None:
        super().__init__(config, world, timeline, lambda: Network(config, world))
        self.settings = config.method_as(panel.VICReg)

    def step(self, views: Views, step: int, part: int = 0) -> Output:
        b = len(views.global1)
        tokens = self.tokens_of_pair(views, step)
        patches = tokens[:, 1:]
        inv, both = tokens[:, 0], None
        if self.config.d_head:
            every = torch.cat([inv.view(2, b, -1), patches.reshape(2, -1, patches.shape[-1])], dim=1)
            z, both = self.student.expander(every, every.shape[1] - b)
            both = both.view(*patches.shape[:2], -1)
        else:
            if self.student.encoder.split is not None:
                inv, both = self.student.encoder.split(inv, patches)
            z = self.student.expander(inv.view(2, b, -1))
        z = z.float()
        cov = covariances(z, self.world)
        terms = {
            "invariance": self.settings.invariance * F.mse_loss(z[0], z[1]),
            "variance": self.settings.variance * missing_deviation(cov.diagonal(dim1=-2, dim2=-1)),
            "covariance": self.settings.covariance * off_diagonal(cov),
        }
        equi = None if both is None else (both[:b], both[b:])
        return Output(terms, equi, Watched(tokens[:b, 0].detach(), None))


METHOD = VICReg
