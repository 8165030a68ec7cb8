"""BYOL: from each view the teacher's embedding of the other is predicted (Grill et al., NeurIPS 2020)."""

from __future__ import annotations

import torch
from torch import Tensor

from equissl import config as panel
from equissl import methods, networks
from equissl.distributed import World
from equissl.encoder import Encoder
from equissl.equimod import EquiMod, equivariance
from equissl.heads import Projector
from equissl.losses import cross_prediction
from equissl.methods import Output, Timeline, Watched
from equissl.views import Views


class Network(networks.Network):
    """Encoder and projector; the student has a predictor too, and what EquiMod adds."""

    def __init__(self, config: panel.PretrainConfig, world: World, is_student: bool) -> None:
        super().__init__()
        settings = config.method_as(panel.BYOL)
        self.encoder = Encoder(config)
        self.projector = Projector(settings.widths(config.d_inv), world, normed=False)
        self.equimod = None
        if is_student:
            self.predictor = Projector(settings.widths(settings.embedding), world, normed=False)
            self.equimod = None if settings.equimod is None else EquiMod(config, settings.equimod, world)


class BYOL(networks.Trained[Network]):
    """2 · mean(2 - 2 cos) of the predictions from the student's projections and the teacher's projections of the other view.

    Projected is the invariant part of the CLS token, the whole token where there is no split. As in the authors' code of EquiMod,
    batch norms see both views together; the teacher's have the statistics of its own batch. EquiMod reads what the student's projector
    reads, and has no part in the teacher.
    """

    has_joint_statistics = True
    terms: tuple[str, ...] = ("prediction",)

    def __init__(self, config: panel.PretrainConfig, world: World, timeline: Timeline) -> None:
        super().__init__(
            config, world, timeline, lambda: Network(config, world, is_student=True), lambda: Network(config, world, is_student=False)
        )
        self.settings = config.method_as(panel.BYOL)
        self.terms = methods.terms(config)

    def step(self, views: Views, step: int, part: int = 0) -> Output:
        b = len(views.global1)
        targets, features = self._targets(views)
        tokens = self.tokens_of_pair(views, step)
        inv, both = tokens[:, 0], None
        if self.student.encoder.split is not None:
            inv, both = self.student.encoder.split(inv, tokens[: 2 * b, 1:])
        predictions = self.student.predictor(self.student.projector(inv[: 2 * b])).float()
        terms = {"prediction": cross_prediction(predictions.view(2, b, -1), targets)}
        of_equimod, measured = equivariance(self.student.equimod, self.settings.equimod, inv, views.augmentations, self.world)
        equi = None if both is None else (both[:b], both[b:])
        return Output(terms | of_equimod, equi, Watched(features, None, measured))

    @torch.no_grad()
    def _targets(self, views: Views) -> tuple[Tensor, Tensor]:
        """The teacher's projections `(2, b, embedding)`, and its CLS tokens of the first view `(b, dim)`."""
        network, b = self.teacher_network, len(views.global1)
        assert network is not None
        tokens = self.tokens_of(network, [views.global1, views.global2])
        cls = tokens[:, 0]
        inv = cls if network.encoder.split is None else network.encoder.split(cls, None)[0]
        return network.projector(inv).float().view(2, b, -1), cls[:b]


METHOD = BYOL
