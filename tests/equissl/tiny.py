"""A configuration small enough to train in a second, with everything switched on; and synthetic batches for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from equissl import methods, optim, transforms
from equissl.auxiliary import Auxiliary
from equissl.config import PretrainConfig
from equissl.data.loader import Batch
from equissl.distributed import World, full
from equissl.methods import Timeline
from equissl.optim import Report
from equissl.views import MakeViews, Views

TIMELINE = Timeline(num_steps=6, steps_per_epoch=3)


IBOT: dict[str, Any] = {
    "representation": 48,
    "head_hidden": 32,
    "head_bottleneck": 16,
    "prototypes": 64,
    "teacher_warmup_epochs": 1,
    "freeze_last_layer_epochs": 0.5,
    "ema": [0.9, 1.0],
    "views": {"num_local": 1, "local_size": 16},
}
METHODS: dict[str, dict[str, Any]] = {  # what is small of each; `name`: the method's, where it is another than the entry's
    "ibot": IBOT,
    "dinov2": IBOT | {"koleo_samples": 8},
    "dinov2_sinkhorn": IBOT | {"name": "dinov2", "centring": "sinkhorn", "separate_heads": True, "koleo_samples": 16},  # of all ranks
    "vicreg": {"representation": 48, "expander": 24},
    "sie": {"representation": 48, "d": 16, "expander": 24},
    "vicreg_resnet": {"name": "vicreg", "expander": 24},
    "simclr": {"representation": 48, "hidden": 24, "embedding": 16},
    "byol": {"representation": 48, "hidden": 24, "embedding": 16, "ema": [0.9, 1.0]},
}
EQUIMOD = {"hidden": 24, "embedding": 16, "parameter_width": 8}
METHODS |= {f"{name}_equimod": {"name": name, **METHODS[name], "equimod": EQUIMOD} for name in ("simclr", "byol")}
METHODS |= {
    "byol_resnet": {**METHODS["byol_equimod"]},
    "vicreg_cross": {"name": "vicreg", **METHODS["vicreg"]},
    "ibot_head": {"name": "ibot", **METHODS["ibot"], "head_hidden": 256},  # wide: what passes a head shows in the FLOPs
    "vicreg_head": {"name": "vicreg", **METHODS["vicreg"], "expander": 256},
}

RECONSTRUCTION = {"name": "reconstruction", "d": 16, "decoder_widths": [16, 8, 8], "include_final": True}
AUXILIARIES: dict[str, dict[str, Any]] = {  # of entries that are there for theirs
    "vicreg_cross": {"name": "cross_attention", "d": 16, "decoder_widths": [16, 8, 8]},
    "ibot_head": {**RECONSTRUCTION, "split_at": "head_output"},
    "vicreg_head": {**RECONSTRUCTION, "split_at": "head_output"},
}

# every method with the other auxiliary
ON_CROSS = {f"{name}_cross": name for name in ("ibot", "dinov2", "sie", "simclr", "byol")}
METHODS |= {entry: {"name": name, **METHODS[name]} for entry, name in ON_CROSS.items()}
AUXILIARIES |= dict.fromkeys(ON_CROSS, AUXILIARIES["vicreg_cross"])

RESNET = {"backbone": {"name": "resnet18", "stem": "cifar"}, "image_size": 16, "auxiliary": None}
# entries on another backbone than the small ViT, with its settings: no patches, no auxiliary
RESNETS: dict[str, dict[str, Any]] = dict.fromkeys(("vicreg_resnet", "byol_resnet"), RESNET)
ON_PATCHES = ("auxiliary", "lambda-0", "subset")  # variants that ResNets do not have
OF_AUXILIARY = ("auxiliary", "lambda-0")  # those that entries have that are there for their auxiliary


NEED_TRANSFORMATION = {"sie", "sie_cross"}


def plain(method: str) -> dict[str, Any]:
    """The changes of `config` that leave nothing but the method."""
    without_g = {} if method in NEED_TRANSFORMATION else {"transformation": None}
    without_local = {"method__views__num_local": 0} if "views" in METHODS[method] else {}
    return {"auxiliary": None, **without_g, **without_local}


def variants(changes: dict[str, dict[str, Any]]) -> list[tuple[str, str, dict[str, Any]]]:
    """(method, variant, changes) of all entries."""
    return [
        (method, name, change)
        for method in METHODS
        for name, change in changes.items()
        if (method not in RESNETS or name not in ON_PATCHES) and (method not in AUXILIARIES or name in OF_AUXILIARY)
        if method not in ON_CROSS or name == "auxiliary"
    ]


def config(data: str = "photographs", method: str = "ibot", **changes: Any) -> PretrainConfig:
    """`changes`: settings, with `a__b` for b of a."""
    values: dict[str, Any] = {
        "data": data,
        "backbone": {"name": "vit_tiny_patch16_224", "patch_size": 8, "depth": 2, "drop_path": 0.4},
        "image_size": 32,
        "batch": 16,
        "group_size": 4,
        "num_steps": TIMELINE.num_steps,
        "transformation": "se2",
        "auxiliary": AUXILIARIES.get(method, RECONSTRUCTION),
        "num_workers": 0,
        "log_every": 1,
        "picture_every": 4,
        "checkpoint_every": 100,
        "method": {"name": method, **METHODS[method], "optimizer": {"warmup_epochs": 0.5, "base_lr": 2e-2}},
        **RESNETS.get(method, {}),
    }
    for name, value in changes.items():
        at, path = values, name.split("__")
        for part in path[:-1]:
            at[part] = dict(at.get(part, {}))
            at = at[part]
        at[path[-1]] = value
    return PretrainConfig.model_validate(values)


def batch(settings: PretrainConfig, step: int, rank: int = 0, world_size: int = 1) -> Batch:
    """This rank's share of a global batch of smooth noise; a pure function of the step."""
    generator = np.random.Generator(np.random.PCG64([settings.seed, step]))
    side, local = settings.side, settings.method.views.local_size

    def images(*shape: int) -> torch.Tensor:
        coarse = generator.uniform(0, 255, (*shape[:-2], 5, 5)).astype(np.float32)
        flat = torch.from_numpy(coarse).flatten(0, -4)
        return torch.nn.functional.interpolate(flat, shape[-2:], mode="bilinear").to(torch.uint8).view(shape)

    b = settings.batch
    source_side = transforms.get(settings.transformation).source_side(side) if settings.transformation else side
    view1, source2 = images(b, 3, side, side), images(b, 3, source_side, source_side)
    crops = images(settings.method.views.num_local, b, 3, local, local)
    mine = slice(rank * b // world_size, (rank + 1) * b // world_size)
    position = torch.arange(b)[mine] + b * (step % TIMELINE.steps_per_epoch)
    epoch = step // TIMELINE.steps_per_epoch
    plain, boxes = None, None
    if settings.method.sees_plain:
        plain = images(b, 3, side, side)[mine]
        boxes = torch.from_numpy(generator.uniform(0, 0.5, (b, 2, 5)).astype(np.float32))[mine]
        boxes[..., 4] = boxes[..., 4].round()
    return Batch(step, epoch, position, position, position * 0, view1[mine], source2[mine], crops[:, mine], plain, boxes)


def world_batch(settings: PretrainConfig, step: int, world: World) -> Batch:
    return batch(settings, step, world.rank, world.world_size)


class Run:
    """What the loop puts together, one step at a time."""

    def __init__(self, settings: PretrainConfig, world: World) -> None:
        self.settings, self.world = settings, world
        self.method = methods.get(settings, world, TIMELINE)
        self.method.initialise()
        self.auxiliary = Auxiliary(settings, world) if settings.auxiliary else None
        self.parameters = self.method.parameters_by_name()
        if self.auxiliary:
            self.auxiliary.initialise()
            self.parameters |= self.auxiliary.parameters_by_name()
        self.optimizer = optim.get(self.parameters, settings.method.optimizer, world)
        self.make_views = MakeViews(settings, world.device)

    def views(self, step: int) -> Views:
        return self.make_views(world_batch(self.settings, step, self.world))

    def backward(self, step: int, with_auxiliary: bool = True) -> dict[str, torch.Tensor]:
        views = self.views(step)
        output = self.method.step(views, step)
        objective, terms = sum(output.terms.values()), dict(output.terms)
        if self.auxiliary and with_auxiliary:
            terms["reconstruction"] = self.auxiliary(output.equi, views.targets).term
            objective = objective + self.auxiliary.objective_weight * terms["reconstruction"]
        objective.backward()
        return {name: term.detach() for name, term in terms.items()}

    def gradients(self) -> dict[str, torch.Tensor]:
        return {name: full(p.grad).clone() for name, p in self.parameters.items() if p.grad is not None}

    def values(self) -> dict[str, torch.Tensor]:
        return {name: full(tensor).clone() for name, tensor in (self.method.state() | self.optimizer.state()).items()}

    def update(self, step: int, lr: float = 1e-3, weight_decay: float = 0.1, terms: dict[str, torch.Tensor] | None = None) -> Report:
        """With the gradients that are there, or those of the step."""
        report = self.optimizer.step(step, lr, weight_decay, self.backward(step) if terms is None else terms, self.method.frozen(step))
        self.method.after_update(step, report.applied)
        return report
