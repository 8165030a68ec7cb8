"""SIE: VICReg on an invariant and an equivariant part; of the second, a hypernetwork predicts one view from the other (Garrido et al.,
ICML 2023)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equissl import config as panel
from equissl import networks, transforms
from equissl.distributed import World
from equissl.encoder import Encoder
from equissl.heads import Expander
from equissl.initialise import UnitLinear
from equissl.losses import covariances, missing_deviation, off_diagonal, variances
from equissl.methods import Output, Timeline, Watched
from equissl.views import Views


class Predictor(nn.Module):
    """x -> W x, where W is a linear function of the transformation's p parameters, without bias: `sum_i parameters_i W_i x`.

    The products W_i x are summed, not the matrices: p · d numbers of a sample are kept instead of d². Linear in x at given
    parameters; 0 where these are.
    """

    def __init__(self, num_parameters: int, dim: int) -> None:
        super().__init__()
        self.matrices = UnitLinear(dim, num_parameters * dim, bias=False)

    def forward(self, x: Tensor, parameters: Tensor) -> Tensor:
        """`(b, d)`, `(b, p)` -> `(b, d)`."""
        b, d = x.shape
        products: Tensor = self.matrices(x).view(b, -1, d)
        return (products * parameters.to(x.dtype)[:, :, None]).sum(dim=1)


class Network(networks.Network):
    """Encoder, an expander for each part, and the predictor."""

    def __init__(self, config: panel.PretrainConfig, world: World) -> None:
        super().__init__()
        assert config.transformation is not None
        width = config.method_as(panel.SIE).expander
        self.encoder = Encoder(config)
        self.inv = Expander((config.d_inv, width, width, width), world)
        self.equi = Expander((config.d_equi, width, width, width), world)
        self.predictor = Predictor(config.transformation.num_parameters, width)


class SIE(networks.Trained[Network]):
    """x, y: embeddings of the views, of an invariant and an equivariant part each; ŷ: the predictor's of x's equivariant part.

    `invariance` · MSE(x_inv, y_inv) + `equivariance` · `invariance` · MSE(ŷ, y_equi) + `variance` · what the standard deviations of
    (inv, equi) lack to 1, mean over dimensions and views + `variance` / 2 · the same of ŷ + `covariance` · squares of the covariances of
    different dimensions of (inv, equi) over their number, summed over the views. Terms are logged with their weights.

    Both parts are of the CLS token: SIE's vector of a whole image. Patches, which the auxiliary reads, are not asked to be predictable
    by a matrix: g moves them to other places. Parameters are parts of the largest of their range, so that degrees and pixels weigh alike.
    """

    terms = ("invariance", "equivariance", "variance", "predicted_variance", "covariance")

    def __init__(self, config: panel.PretrainConfig, world: World, timeline: Timeline) -> None:
        super().__init__(config, world, timeline, lambda: Network(config, world))
        assert config.transformation is not None
        self.settings = config.method_as(panel.SIE)
        largest = [max(map(abs, ends)) for ends in transforms.get(config.transformation).ranges(config.side)]
        self.largest = torch.tensor(largest, device=world.device)

    def step(self, views: Views, step: int, part: int = 0) -> Output:
        assert views.parameters is not None
        b = len(views.global1)
        tokens = self.tokens_of_pair(views, step)
        split = self.student.encoder.split
        assert split is not None
        inv, equi = split(tokens[:, 0], tokens if self.config.auxiliary else tokens[:, :1])
        z_inv = self.student.inv(inv.view(2, b, -1)).float()
        z_equi = self.student.equi(equi[:, 0].view(2, b, -1))
        predicted = self.student.predictor(z_equi[0], views.parameters / self.largest).float()
        z_equi = z_equi.float()
        cov = covariances(torch.cat([z_inv, z_equi], dim=-1), self.world)
        of, variance = self.settings, missing_deviation
        terms = {
            "invariance": of.invariance * F.mse_loss(z_inv[0], z_inv[1]),
            "equivariance": of.equivariance * of.invariance * F.mse_loss(predicted, z_equi[1]),
            "variance": of.variance * variance(cov.diagonal(dim1=-2, dim2=-1)),
            "predicted_variance": of.variance * variance(variances(predicted, self.world)) / 2,
            "covariance": of.covariance * off_diagonal(cov),
        }
        patches = (equi[:b, 1:], equi[b:, 1:]) if self.config.auxiliary else None
        return Output(terms, patches, Watched(tokens[:b, 0].detach(), None))


METHOD = SIE
