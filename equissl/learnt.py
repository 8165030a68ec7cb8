"""What a complete pretraining has learnt besides the encoder that leaves it: the student, EquiMod's heads, the auxiliary's decoders.

All of it is frozen, whole on each rank, in float32. Decoders and EquiMod's predictor have learnt from the student's features, so they
are measured with the student, as EquiMod's authors do (their `eval_repr` has the online network, of BYOL too), and not with the
moving average of it that leaves the run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load
from torch import Tensor, nn

from equissl import config as panel
from equissl.auxiliary import Decoder
from equissl.config import PretrainConfig, Reconstruction
from equissl.distributed import World
from equissl.encoder import Encoder, exported, with_tensors
from equissl.equimod import EquiMod
from equissl.export import DECODERS, HEADS, STUDENT
from equissl.heads import Expander, PrototypeHead
from equissl.initialise import materialise
from equissl.photometry import normalise


class Student:
    """A run's student, and what has learnt from its features."""

    def __init__(self, run_dir: Path, config: PretrainConfig, teacher: Encoder, world: World) -> None:
        """`teacher`: the encoder that left the run; without a moving average that is the student.

        Raises ValueError where the run lacks a file that measures need, or has another than its result says.
        """
        self.config = config
        has_reconstruction = isinstance(config.auxiliary, Reconstruction)
        self.encoder, heads = teacher, HEADS
        if config.method.has_teacher and (config.method.sees_plain or has_reconstruction):
            tensors, heads = _read(run_dir, STUDENT), STUDENT
            own = {name: tensor for name, tensor in tensors.items() if name in exported(teacher)}
            self.encoder = with_tensors(config, own, run_dir / STUDENT, world.device)
        self.equimod: EquiMod | None = None
        if isinstance(config.method, panel.Equivariant) and config.method.equimod is not None:
            with torch.device("meta"):
                self.equimod = EquiMod(config, config.method.equimod, world)
            _fill(self.equimod, _read(run_dir, heads), "equimod.", run_dir / heads, world.device)
        self.decoders: nn.ModuleList | None = None
        self.head: Expander | PrototypeHead | None = None
        if has_reconstruction:
            assert config.auxiliary is not None
            width = config.auxiliary.blend(config.d_equi, config.num_patches).width
            with torch.device("meta"):
                self.decoders = nn.ModuleList(Decoder(width, config.auxiliary.decoder_widths) for _ in config.auxiliary.fractions)
            _fill(self.decoders, _read(run_dir, DECODERS), "decoders.", run_dir / DECODERS, world.device)
            if config.d_head:
                with torch.device("meta"):
                    self.head, name = _head(config, world)
                _fill(self.head, _read(run_dir, heads), f"{name}.", run_dir / heads, world.device)

    def inv(self, images: Tensor) -> Tensor:
        """`(b, 3, S, S)` in [0, 1] -> `(b, d_inv)`: what the method's heads read of an image."""
        found: Tensor = self.encoder(normalise(images)).inv_cls
        return found

    def equi(self, images: Tensor) -> Tensor:
        """`(b, 3, S, S)` in [0, 1] -> `(b, patches, d_equi)`: what the decoders read of an image."""
        features = self.encoder(normalise(images))
        if self.head is None:
            assert features.equi is not None
            equi: Tensor = features.equi
            return equi
        b, patches, dim = features.patches.shape
        tokens = features.patches.reshape(b * patches, dim)
        if isinstance(self.head, PrototypeHead):
            equi = self.head(tokens, lambda unit: unit[:0], len(tokens))[1]
        else:
            equi = self.head(tokens[None], len(tokens))[1]
        return equi.view(b, patches, -1)


def _head(config: PretrainConfig, world: World) -> tuple[Expander | PrototypeHead, str]:
    """The head whose last layer has the equivariant outputs, and what a method calls it."""
    if isinstance(config.method, panel.IBOT):
        of = config.method
        return PrototypeHead(config.d_inv, of.head_hidden, of.head_bottleneck, of.prototypes, config.d_head), "head"
    width = config.method_as(panel.VICReg).expander
    return Expander((config.d_inv, width, width, width), world, config.d_head), "expander"


def _read(run_dir: Path, file: str) -> Mapping[str, Tensor]:
    result = json.loads((run_dir / "result.json").read_text())
    path, expected = run_dir / file, result[f"{Path(file).stem}_sha256"]
    if not path.is_file():
        raise ValueError(
            f"{run_dir} has no {file}, with which this is measured: it was removed; have the pretraining run again"
            " (equihpc invalidate RUN, then submit)"
        )
    content = path.read_bytes()
    if (sha256 := hashlib.sha256(content).hexdigest()) != expected:
        raise ValueError(f"{path} has the sha256 {sha256}, but result.json says {expected}: it was changed or damaged")
    tensors: dict[str, Tensor] = load(content)
    return tensors


def _fill(module: nn.Module, tensors: Mapping[str, Tensor], prefix: str, path: Path, device: torch.device) -> None:
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    expected = {name: tensor.shape for name, tensor in (*module.named_parameters(), *module.named_buffers())}
    if expected != {name: tensor.shape for name, tensor in own.items()}:
        wrong = sorted(name for name in expected.keys() | own.keys() if name not in own or expected.get(name) != own[name].shape)
        raise ValueError(f"{path} does not fit its config: {prefix}{wrong[0]} is missing, unknown or of another shape")
    materialise(module, device)
    module.load_state_dict(own, strict=True)
    module.eval().requires_grad_(False)
