"""EquiMod: from the un-augmented image's embedding and the augmentation's parameters, that of the augmented image is predicted
(Devillers & Lefort, ICLR 2023). An addition to methods of two global views."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equissl import config as panel
from equissl.batchnorm import BatchNorm
from equissl.distributed import World
from equissl.heads import Projector
from equissl.initialise import UnitLinear
from equissl.losses import nt_xent


class EquiMod(nn.Module):
    """The equivariance projector, the projection of the parameters, and the predictor, which is linear in both."""

    def __init__(self, config: panel.PretrainConfig, settings: panel.EquiMod, world: World) -> None:
        super().__init__()
        width = settings.embedding
        self.projector = Projector((config.d_inv, settings.hidden, settings.hidden, width), world, normed=True)
        self.of_parameters = nn.Sequential(
            UnitLinear(config.num_augmentation_parameters, settings.parameter_width, bias=False), BatchNorm(settings.parameter_width, world)
        )
        self.predictor = Projector((width + settings.parameter_width, width), world, normed=True)

    def forward(self, features: Tensor, augmentations: Tensor) -> tuple[Tensor, Tensor]:
        """`(3b, dim)`: of both views and of the un-augmented images; `(2, b, p)`: what was done to the views.

        -> their embeddings `(3b, embedding)`, and those predicted of the views `(2b, embedding)`.
        """
        embeddings = self.projector(features)
        y0 = embeddings[2 * len(features) // 3 :]
        parameters = self.of_parameters(augmentations.flatten(0, 1).to(embeddings.dtype))
        return embeddings, self.predictor(torch.cat([torch.cat([y0, y0]), parameters], dim=1))


def equivariance(
    module: EquiMod | None, settings: panel.EquiMod | None, features: Tensor, augmentations: Tensor | None, world: World
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Both empty where a method goes without. The term, with its weight: NT-Xent of each view's embedding and the one predicted for it,
    among those of both views of all samples on all ranks, without a stop of the gradient; and means of `measures` over this rank's views.
    Arguments as of `EquiMod.forward`."""
    if module is None:
        return {}, {}
    assert settings is not None
    assert augmentations is not None
    embeddings, predicted = (each.float() for each in module(features, augmentations))
    y, y0 = embeddings.split([len(predicted), len(predicted) // 2])
    with torch.no_grad():
        absolute, relative = measures(y, predicted, torch.cat([y0, y0]))
    found = {"equivariance_absolute": absolute.mean(), "equivariance_relative": relative.mean()}
    return {"equivariance": settings.weight * nt_xent(predicted, y, settings.temperature, world)}, found


def measures(y: Tensor, predicted: Tensor, y0: Tensor) -> tuple[Tensor, Tensor]:
    """How much nearer to y is what is predicted than y0, `(n, d)` each -> `(n,)` each: cos(y, ŷ) - cos(y, y0), which is 0, and
    (1 - cos(y, y0)) / (1 - cos(y, ŷ)), which is 1, where the prediction is y0 itself: invariance."""
    with_prediction, with_plain = F.cosine_similarity(y, predicted, dim=-1), F.cosine_similarity(y, y0, dim=-1)
    return with_prediction - with_plain, (1 - with_plain) / (1 - with_prediction)
