"""Weights that others have published, as a start or to be evaluated: files of timm, and checkpoints of DINOv2's, iBOT's and MoCo's authors.

Their names are turned into timm's; what then has no counterpart is an error, but for heads, which are left out and named. Files are
read as tensors only: nothing in them is executed.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from equissl.config import PretrainConfig, Published
from equissl.encoder import Encoder, exported, some
from equissl.initialise import place

log = logging.getLogger(__name__)

FILE = "model.safetensors"  # in a folder
WRAPPED = ("teacher", "state_dict", "model")  # keys under which files hold the weights
PREFIXES = ("module.", "_orig_mod.", "backbone.")  # before the names of a backbone in a larger network
HEADS = {  # beginnings of names of what is no backbone
    "timm": ("head.", "head_drop.", "fc."),
    "dinov2": ("head.", "dino_head.", "ibot_head."),
    "ibot": ("head.",),
    "moco": ("head.", "fc."),
}
RENAMED = {  # pattern of an author's name, and timm's
    "timm": (),
    "dinov2": ((r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),),  # in chunks, of which each goes on counting
    "ibot": ((r"^masked_embed$", "mask_token"), (r"\.gamma_([12])$", r".ls\1.gamma")),
    "moco": (),
}
MOCO = ("encoder_q.", "base_encoder.")  # of versions 1 and 2, and 3; besides them: the moving average, the predictor, the queue
MOCO_SMALL = 384  # dimensions of a ViT-S
REGISTERS = ("register_tokens", "reg_token")
COUNTERS = ".num_batches_tracked"  # torch's batch norm counts, and uses it with another momentum only


@dataclass
class Found:
    """Of an encoder without split."""

    tensors: dict[str, Tensor]  # by their keys in the exported file, as `encoder.exported` has them; float32
    sha256: str  # of the file
    notes: list[str] = field(default_factory=list)  # what was left out, interpolated, or is not in the file


def load_published(config: PretrainConfig, path: Path, kind: str, sha256: str | None = None) -> Found:
    """The weights in the file for the backbone of this config; `kind` and `sha256`: as `config.Published` has them.

    Position embeddings are interpolated to the grid of the config's images (bicubic, with antialiasing, as timm does). A mask token that
    is not in the file is not in what is returned. Raises ValueError for a file that is missing, is no file of tensors, or does not fit.
    """
    facts = config.backbone.facts
    if kind == "moco" and facts.dim == MOCO_SMALL:
        raise ValueError(f"{path}: MoCo v3's ViT-S has 12 heads of attention, timm's 6: its weights would fit and compute something else")
    with torch.device("meta"):
        own = {key: tuple(tensor.shape) for key, tensor in exported(Encoder(config)).items() if not key.startswith("split.")}
    found = Found({}, sha256_of(path, sha256))
    heads, counters = [], 0
    for key, tensor in _read(path, kind).items():
        if key.endswith(COUNTERS):
            counters += 1
            continue
        if key.startswith(HEADS[kind]):
            heads.append(key)
            continue
        for pattern, name in RENAMED[kind]:
            key = re.sub(pattern, name, key)
        if key in REGISTERS:
            raise ValueError(f"{path} has {tensor.shape[-2]} register tokens, which our backbones do not have: take weights without them")
        if key == "mask_token":
            if "mask_token" in own:
                found.tensors["mask_token"] = tensor.flatten()
            else:
                found.notes.append("its mask token is left out: the method has no masks")
            continue
        found.tensors[f"backbone.{key}"] = tensor
    if heads:
        found.notes.append(f"left out as heads: {some(heads)}")
    if counters:
        found.notes.append(f"left out: {counters} counters of batches")
    if "mask_token" in own and "mask_token" not in found.tensors:
        found.notes.append("no mask token in it: ours begins as it would")
        del own["mask_token"]
    if facts.kind == "vit":
        _to_our_grid(found, own)
    _check(found.tensors, own, path, config)
    found.tensors = {key: tensor.float() for key, tensor in found.tensors.items()}
    return found


def begin_with(encoder: Encoder, config: PretrainConfig) -> None:
    """Set the backbone, sharded or not, to the config's published weights; a split stays as it is. Every rank reads the file."""
    weights = config.backbone.weights
    assert weights is not None
    found = load_published(config, path_of(weights), weights.kind, weights.sha256)
    own = exported(encoder)
    for key, tensor in found.tensors.items():
        place(tensor.to(own[key].device), own[key])
    log.info("backbone of %s (sha256 %s)%s", weights.file, found.sha256, "".join(f"; {note}" for note in found.notes))


def described(weights: Published) -> dict[str, str]:
    """For the result. Raises ValueError as `sha256_of`."""
    path = path_of(weights)
    return {"file": path.name, "sha256": sha256_of(path, weights.sha256)}


def path_of(weights: Published) -> Path:
    """The file itself, where a folder is named."""
    path = Path(weights.file).expanduser()
    return path / FILE if path.is_dir() else path


def sha256_of(path: Path, expected: str | None = None) -> str:
    """Raises ValueError for a file that cannot be read, or has another one than is expected."""
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"the file of weights {path} cannot be read: {error.strerror}") from None
    if expected not in (None, found):
        raise ValueError(f"{path} has the sha256 {found}, but {expected} was expected: it was changed, or is another file")
    return found


def _read(path: Path, kind: str) -> dict[str, Tensor]:
    """The tensors by their names without prefixes; of a whole network those of its backbone, and its heads."""
    content: Any
    if path.suffix == ".safetensors":
        try:
            content = load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is no safetensors file: {error}") from None
    else:
        try:
            # the authors' checkpoints hold their command line too: names and values, no code
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, TypeError, AssertionError) as error:
            # not torch's own words, which advise to run what is in the file
            raise ValueError(
                f"{path} is not read ({type(error).__name__}): it is damaged, no file of torch's, or holds more than tensors, names and"
                " numbers. Save the weights alone, as safetensors or a dict of tensors"
            ) from None
    for wrapped in WRAPPED:
        if isinstance(content, Mapping) and isinstance(content.get(wrapped), Mapping):
            content = content[wrapped]
            break
    if not isinstance(content, Mapping) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        keys = f": it has {some(map(str, content))}" if isinstance(content, Mapping) and content else ""
        raise ValueError(f"{path} holds no weights{keys}; they stand alone, or under one of {', '.join(WRAPPED)}")
    tensors = {}
    for key, tensor in content.items():
        while key.startswith(PREFIXES):
            key = key.partition(".")[2]
        if kind == "moco":
            if not key.startswith(MOCO):
                continue
            key = key.partition(".")[2]
        tensors[key] = tensor
    if not tensors:
        raise ValueError(f"{path} has no names that begin with {' or '.join(MOCO)}: is kind where it comes from?")
    return tensors


def _to_our_grid(found: Found, own: Mapping[str, tuple[int, ...]]) -> None:
    key = "backbone.pos_embed"
    tensor = found.tensors.get(key)
    if tensor is None or tensor.ndim != 3 or tensor.shape == own[key] or tensor.shape[2] != own[key][2]:
        return  # it fits, or `_check` says that it does not
    theirs, ours = (round((tokens - 1) ** 0.5) for tokens in (tensor.shape[1], own[key][1]))
    if theirs**2 + 1 == tensor.shape[1]:
        found.tensors[key] = resample_abs_pos_embed(tensor.float(), [ours, ours], [theirs, theirs], num_prefix_tokens=1)
        found.notes.append(f"position embeddings interpolated from {theirs}×{theirs} to {ours}×{ours} patches")


def _check(tensors: Mapping[str, Tensor], own: Mapping[str, tuple[int, ...]], path: Path, config: PretrainConfig) -> None:
    missing, unknown = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    settings = config.backbone
    if missing or unknown:
        hint = "is name the file's model, and kind where it comes from?"
        scales = [key for key in (*missing, *unknown) if key.endswith(".gamma")]
        if scales and len(scales) == len(missing) + len(unknown):
            hint = "its model has LayerScale: give layer_scale" if unknown else "its model has no LayerScale: leave layer_scale out"
        elif any(re.search(r"blocks\.\d+\.", key) for key in (*missing, *unknown)):
            hint += f" Has it {settings.facts.depth} blocks (depth)?"
        differing = f"missing {some(missing) or 'nothing'}, unknown {some(unknown) or 'nothing'}"
        raise ValueError(f"{path} does not fit {settings.name}: {differing}; {hint}")
    for key, shape in own.items():
        if tuple(tensors[key].shape) != shape:
            hint = "; give patch_size, or a name with it" if key.endswith("patch_embed.proj.weight") else ""
            hint = "; give stem" if key == "backbone.conv1.weight" else hint
            raise ValueError(f"{path}: {key} has the shape {tuple(tensors[key].shape)}, that of {settings.name} is {shape}{hint}")
