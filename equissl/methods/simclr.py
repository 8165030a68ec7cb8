"""SimCLR: each view's embedding is to be told from all others of the batch by the one of the other view (Chen et al., ICML 2020)."""

from __future__ import annotations

from equissl import config as panel
from equissl import methods, networks
from equissl.distributed import World
from equissl.encoder import Encoder
from equissl.equimod import EquiMod, equivariance
from equissl.heads import Projector
from equissl.losses import nt_xent
from equissl.methods import Output, Timeline, Watched
from equissl.views import Views


class Network(networks.Network):
    """Encoder and projector, and what EquiMod adds."""

    def __init__(self, config: panel.PretrainConfig, world: World) -> None:
        super().__init__()
        settings = config.method_as(panel.SimCLR)
        self.encoder = Encoder(config)
        self.projector = Projector(settings.widths(config.d_inv), world, normed=True)
        self.equimod = None if settings.equimod is None else EquiMod(config, settings.equimod, world)


class SimCLR(networks.Trained[Network]):
    """NT-Xent of the projections of both views' CLS tokens over the joined batch of all ranks.

    Projected is the invariant part of the CLS token, the whole token where there is no split. As in the authors' code of EquiMod,
    batch norms see both views together, and the last one has no parameters. EquiMod reads what the projector reads.
    """

    has_joint_statistics = True
    terms: tuple[str, ...] = ("contrast",)

    def __init__(self, config: panel.PretrainConfig, world: World, timeline: Timeline) -> None:
        super().__init__(config, world, timeline, lambda: Network(config, world))
        self.settings = config.method_as(panel.SimCLR)
        self.terms = methods.terms(config)

    def step(self, views: Views, step: int, part: int = 0) -> Output:
        b = len(views.global1)
        tokens = self.tokens_of_pair(views, step)
        inv, both = tokens[:, 0], None
        if self.student.encoder.split is not None:
            inv, both = self.student.encoder.split(inv, tokens[: 2 * b, 1:])
        z1, z2 = self.student.projector(inv[: 2 * b]).float().split(b)
        terms = {"contrast": nt_xent(z1, z2, self.settings.temperature, self.world)}
        of_equimod, measured = equivariance(self.student.equimod, self.settings.equimod, inv, views.augmentations, self.world)
        equi = None if both is None else (both[:b], both[b:])
        return Output(terms | of_equimod, equi, Watched(tokens[:b, 0].detach(), None, measured))


METHOD = SimCLR
