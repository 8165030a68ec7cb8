"""Where an evaluation's encoder comes from: a run of ours, what `equihpc export` made of one, or weights that others have published."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import timm
import torch
import torch.distributed as dist
from torch import Tensor

from equissl import export, published
from equissl.config import EvaluateConfig, PretrainConfig, PublishedEncoder
from equissl.encoder import Encoder, exported, load_teacher, with_tensors
from equissl.photometry import MEAN, STD

if TYPE_CHECKING:
    from equissl.distributed import World

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    encoder: Encoder  # frozen
    config: PretrainConfig  # of the run that it comes from, or of one with this encoder
    sha256: str  # of the `teacher.safetensors` with these weights, wherever they were read from
    about: dict[str, Any] = field(default_factory=dict)  # where they were read from, for the result; no places of this machine
    incomplete: str = ""  # "step 3 of 6" of a training that is not finished

    @property
    def is_export(self) -> bool:
        return bool(self.about.get("from") == "export")


def load_source(settings: EvaluateConfig, world: World) -> Source:
    """What `checkpoint` or `published` names. Every rank reads it.

    Raises ValueError where it is not there, not whole, not complete (unless `allow_incomplete`), or not what its config says.
    """
    if settings.published is not None:
        return _published(settings.published, world.device)
    assert settings.checkpoint is not None
    folder = Path(settings.checkpoint).expanduser()
    if not folder.is_dir():
        raise ValueError(f"checkpoint {folder}: there is no such folder; give that of a pretraining, or of an export")
    if (folder / "COMPLETE").is_file():
        encoder, config, sha256 = load_teacher(folder, world.device)
        return Source(encoder, config, sha256, {"from": "run", "run": folder.name})
    found = _exported(folder, world.device) if (folder / export.MODEL).is_file() else None
    if found is not None and not found.incomplete:
        return found
    if not settings.allow_incomplete:
        what = f"an export of a run that is not complete ({found.incomplete})" if found else "not a complete run: it has no COMPLETE marker"
        raise ValueError(
            f"{folder} is {what}; allow_incomplete: true (or --allow-incomplete) evaluates "
            + ("it" if found else "the teacher of its newest checkpoint")
            + " all the same, and the result says so"
        )
    found = found or _unfinished(folder, world)
    log.warning("the pretraining in %s is not complete: %s", folder, found.incomplete)
    return found


def _unfinished(run_dir: Path, world: World) -> Source:
    """The newest undamaged checkpoint, the same on all ranks: the run may go on meanwhile."""
    from equissl.checkpoint import find_newest

    config = export.config_of(run_dir)
    step = torch.tensor([find_newest(run_dir / "checkpoints") if world.rank == 0 else 0])
    if world.world_size > 1:
        dist.broadcast(step, src=0, group=world.cpu_group)
    found = export.of_checkpoint(run_dir, student=False, is_complete=False, step=int(step))
    encoder = with_tensors(config, found.encoder, run_dir / "checkpoints" / f"step_{found.step}", world.device)
    incomplete = _progress(found.step, export.num_steps_of(config, run_dir))
    return Source(encoder, config, _sha256(encoder), {"from": "checkpoint", "run": run_dir.name, "step": found.step}, incomplete)


def _exported(folder: Path, device: torch.device) -> Source:
    config = export.config_of(folder)
    tensors = {f"backbone.{name}": tensor for name, tensor in _read(folder / export.MODEL).items()}
    if config.d_split:
        tensors |= {f"split.{name}": tensor for name, tensor in _read(folder / export.SPLIT).items()}
    if config.method.has_masks:
        tensors |= {name: tensor for name, tensor in _read(folder / export.HEADS).items() if name == "mask_token"}
    with safetensors.safe_open(folder / export.MODEL, framework="pt") as file:
        told = file.metadata() or {}
    encoder = with_tensors(config, tensors, folder, device)
    about = {"from": "export", "folder": folder.name, "of": told.get("of", "")}
    if "step" not in told:
        return Source(encoder, config, _sha256(encoder), about, "after steps that its export, of an earlier version, does not tell")
    incomplete = "" if told["step"] == told["num_steps"] else _progress(int(told["step"]), int(told["num_steps"] or 0))
    return Source(encoder, config, _sha256(encoder), about | {"step": int(told["step"])}, incomplete)


def _published(settings: PublishedEncoder, device: torch.device) -> Source:
    _check_normalisation(settings.name)
    config, path = settings.as_pretraining(), published.path_of(settings)
    found = published.load_published(config, path, settings.kind, settings.sha256)
    encoder = with_tensors(config, found.tensors, path, device)
    about = {"from": "published", "name": settings.name, "file": path.name, "sha256": found.sha256, "notes": found.notes}
    log.info("%s from %s (sha256 %s)%s", settings.name, path, found.sha256, "".join(f"; {note}" for note in found.notes))
    return Source(encoder, config, _sha256(encoder), about)


def _check_normalisation(name: str) -> None:
    """All encoders see images by the mean and deviation of ImageNet, with which self-supervised ones are trained."""
    if "." not in name:
        return
    try:
        known = timm.get_pretrained_cfg(name)
    except RuntimeError:  # a name of somebody's own
        return
    if known is not None and (tuple(known.mean), tuple(known.std)) != (tuple(MEAN), tuple(STD)):
        raise ValueError(
            f"{name} was trained on images with the mean {known.mean} and the deviation {known.std}, but evaluations normalise them with"
            f" {tuple(MEAN)} and {tuple(STD)}: its features would not be its own"
        )


def _read(path: Path) -> dict[str, Tensor]:
    try:
        found: dict[str, Tensor] = safetensors.torch.load_file(path)
        return found
    except FileNotFoundError:
        raise ValueError(f"there is no {path}: an export is its whole folder") from None
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or damaged: {error}") from None


def _sha256(encoder: Encoder) -> str:
    tensors = {name: tensor.float().cpu().contiguous() for name, tensor in exported(encoder).items()}
    return hashlib.sha256(safetensors.torch.save(tensors)).hexdigest()


def _progress(step: int, num_steps: int | None) -> str:
    return f"step {step} of {num_steps or 'an unknown number'}"
