"""Methods of self-supervised learning: one file each, found by name; a file defines `METHOD`, a class taking (config, world, timeline).

`networks.Trained` has what they share. What couples the samples of a batch goes over all ranks: `distributed.gather` and `total`,
`batchnorm.BatchNorm`, `losses`.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, NamedTuple, Protocol

from equissl.config import PretrainConfig

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from torch import Tensor, nn

    from equissl.distributed import World
    from equissl.encoder import Encoder
    from equissl.views import Views


class Timeline(NamedTuple):
    """How long a run is; schedules are functions of the step within it."""

    num_steps: int
    steps_per_epoch: int

    def steps(self, epochs: float) -> float:
        return epochs * self.steps_per_epoch


class Watched(NamedTuple):
    """What `monitor` looks at, detached."""

    # (b, dim): CLS tokens of the first global view, by the encoder that leaves the run; of a student with the drop path of its training
    features: Tensor
    targets: Tensor | None  # (t, prototypes): the teacher's probabilities; None without prototypes
    measured: Mapping[str, Tensor] = {}  # scalars to log besides the terms, means over the rank's samples


class Output(NamedTuple):
    """What a method makes of a batch on one rank."""

    terms: dict[str, Tensor]  # scalars, means over the rank's samples; their sum is the method's loss
    equi: tuple[Tensor, Tensor] | None  # equivariant patch tokens of the two global views, (b, patches, d); None without auxiliary
    watched: Watched


class Method(Protocol):
    """A method owns its networks, their sharding and initial weights, its loss and its moving averages."""

    terms: tuple[str, ...]  # the names of its terms

    @property
    def teacher(self) -> Encoder:
        """The encoder that leaves the run."""

    def parameters_by_name(self) -> dict[str, nn.Parameter]:
        """What the optimizer trains."""

    def frozen(self, step: int) -> Collection[str]:
        """The parameters that stay as they are at this step."""

    def step(self, views: Views, step: int, part: int = 0) -> Output:
        """The loss of this rank's share of the batch; with equal shares the mean over ranks is that of the joined batch.

        `part`: which of the `config.accumulate` parts of the share these views are; centres move by all parts together.
        """

    def after_update(self, step: int, applied: Tensor) -> None:
        """Move the averages; `applied` is 0 on the device where the update was refused, and then nothing may change."""

    def initialise(self) -> None:
        """Set all state to that of a run at step 0."""

    def state(self) -> dict[str, Tensor]:
        """Tensors to save and to load into, by name: sharded, or the same on all ranks."""

    def numbers(self, step: int) -> dict[str, float]:
        """Schedules' values to log."""


def names() -> list[str]:
    """The methods in this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def terms(config: PretrainConfig) -> tuple[str, ...]:
    """The names of the terms that a pretraining's method has; EquiMod adds one."""
    found: tuple[str, ...] = importlib.import_module(f"{__name__}.{config.method.name}").METHOD.terms
    return (*found, "equivariance") if config.method.sees_plain else found


def get(config: PretrainConfig, world: World, timeline: Timeline) -> Method:
    """The method of the file named `config.method.name`, sharded and without values. Raises ValueError for a name without a file."""
    name = config.method.name
    if name not in names():
        raise ValueError(f"unknown method {name!r}; choose from {', '.join(names())}")
    module = importlib.import_module(f"{__name__}.{name}")  # an ImportError inside the file is shown as it is
    method: Method = module.METHOD(config, world, timeline)
    return method
