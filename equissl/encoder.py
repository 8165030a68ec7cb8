"""The encoder: a timm vision transformer or ResNet and, for an auxiliary or SIE, a split of its tokens into invariant and equivariant
parts.

What leaves a run is `teacher.safetensors`, float32, with these keys: `backbone.KEY` where KEY is timm's own (strip the prefix to
load it into `timm.create_model(name, img_size=…, patch_size=…, depth=…, init_values=…, num_classes=0)`, where `init_values` is the
config's `backbone.layer_scale`; a ResNet has `num_classes` only, and for the CIFAR stem two layers are replaced, see
`resnet.change_stem`), `mask_token` where the method has masks, and with a split `split.inv.weight`, `split.inv.bias`,
`split.equi.weight`, `split.equi.bias`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors.torch import load
from timm.layers import resample_abs_pos_embed
from timm.models import vision_transformer
from torch import Tensor, nn

from equissl.config import PretrainConfig
from equissl.initialise import UnitLinear, initialise, materialise
from equissl.resnet import ResNet

WEIGHTS = "teacher.safetensors"
SHOWN = 4  # names in a message


class Block(vision_transformer.Block):  # type: ignore[misc]  # timm is not typed throughout
    """timm's block on crops of several resolutions at once, with drop path drawn by the caller.

    Norms and linear layers see the tokens of all resolutions in one call, attention each resolution by itself: half the kernels
    to start. On one CPU core it makes no difference (ViT-Ti and S, 8 × 197 + 32 × 37 tokens: within 1 %).
    """

    def forward(self, crops: Sequence[Tensor], drops: Sequence[Tensor | None]) -> list[Tensor]:
        """`[(b_i, tokens_i, dim)]`, `[(2, ·) or None]`: drop path of the attention and of the MLP, as `Backbone.forward` has it."""

        def attention(tokens: Tensor, shapes: Sequence[torch.Size]) -> Tensor:
            mixed = [_attend(part, self.attn.num_heads) for part in _apart(self.attn.qkv(self.norm1(tokens)), shapes)]
            out: Tensor = self.ls1(self.attn.proj(_together(mixed)))
            return out

        def mlp(tokens: Tensor, shapes: Sequence[torch.Size]) -> Tensor:
            out: Tensor = self.ls2(self.mlp(self.norm2(tokens)))
            return out

        crops = _add(attention, crops, [None if drop is None else drop[0] for drop in drops])
        return _add(mlp, crops, [None if drop is None else drop[1] for drop in drops])


def _add(branch: Callable[[Tensor, Sequence[torch.Size]], Tensor], crops: Sequence[Tensor], drops: Sequence[Tensor | None]) -> list[Tensor]:
    """Crops plus a residual branch of them; what a subset skips is not computed."""
    subset = [x if drop is None or drop.is_floating_point() else x.index_select(0, drop) for x, drop in zip(crops, drops, strict=True)]
    shapes = [x.shape for x in subset]
    out = []
    for x, drop, change in zip(crops, drops, _apart(branch(_together(subset), shapes), shapes), strict=True):
        if drop is None:
            out.append(x + change)
        elif drop.is_floating_point():
            out.append(x + change * drop[:, None, None])
        else:
            out.append(x.index_add(0, drop, change, alpha=len(x) / len(drop)))
    return out


def _together(crops: Sequence[Tensor]) -> Tensor:
    """`[(b_i, tokens_i, dim)]` -> `(all tokens, dim)`."""
    flat = [x.flatten(0, 1) for x in crops]
    return torch.cat(flat) if len(flat) > 1 else flat[0]


def _apart(tokens: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """The reverse of `_together`, for any width."""
    parts = tokens.split([b * n for b, n, _ in shapes])
    return [part.view(b, n, -1) for part, (b, n, _) in zip(parts, shapes, strict=True)]


def _attend(qkv: Tensor, num_heads: int) -> Tensor:
    """`(b, tokens, 3 · dim)` -> `(b, tokens, dim)`."""
    b, tokens, width = qkv.shape
    q, k, v = qkv.view(b, tokens, 3, num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, tokens, width // 3)


class Backbone(nn.Module):
    """A timm ViT that returns its normed tokens."""

    def __init__(self, config: PretrainConfig) -> None:
        super().__init__()
        facts = config.backbone.facts
        self.vit = timm.create_model(
            config.backbone.name,
            img_size=config.side,
            patch_size=facts.patch_size,
            depth=facts.depth,
            init_values=config.backbone.layer_scale,
            num_classes=0,
            dynamic_img_size=True,
            weight_init="skip",
            block_fn=Block,
        )
        if config.method.has_masks:
            self.mask_token = nn.Parameter(torch.empty(facts.dim))

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.vit.blocks)

    def forward(
        self, crops: Sequence[Tensor], masks: Sequence[Tensor | None] | None = None, drops: Sequence[Tensor | None] | None = None
    ) -> list[Tensor]:
        """`[(b_i, 3, H_i, W_i)]` -> `[(b_i, 1 + patches_i, dim)]`, CLS first.

        Sides are multiples of the patch; position embeddings are interpolated. `masks` `[(b_i, patches_i) or None]`: patches seen
        as the mask token. `drops`: drop path of the two branches of each block, `[(depth, 2, b_i)]` floats by which a sample's
        branch is multiplied, or `[(depth, 2, kept_i)]` int64 samples whose branch is computed, times b_i / kept_i; or None.
        """
        masks = masks if masks is not None else [None] * len(crops)
        drops = drops if drops is not None else [None] * len(crops)
        tokens = [self._embed(images, mask) for images, mask in zip(crops, masks, strict=True)]
        for number, block in enumerate(self.vit.blocks):
            tokens = block(tokens, [None if drop is None else drop[number] for drop in drops])
        return [self.vit.norm(x) for x in tokens]

    def last_blocks(self, images: Tensor, num_blocks: int) -> list[Tensor]:
        """`(b, 3, H, W)` -> `(b, 1 + patches, dim)` of each of the last blocks in their order, all of them through the last norm."""
        tokens, found = [self._embed(images, None)], []
        for number, block in enumerate(self.vit.blocks):
            tokens = block(tokens, [None])
            if number >= len(self.vit.blocks) - num_blocks:
                found.append(self.vit.norm(tokens[0]))
        return found

    def _embed(self, images: Tensor, mask: Tensor | None) -> Tensor:
        x = self.vit.patch_embed(images)  # (b, rows, columns, dim)
        b, rows, columns, dim = x.shape
        if mask is not None:
            x = torch.where(mask.view(b, rows, columns, 1), self.mask_token.to(x.dtype), x)
        x = torch.cat([self.vit.cls_token.expand(b, -1, -1), x.view(b, rows * columns, dim)], dim=1)
        positions: Tensor = resample_abs_pos_embed(self.vit.pos_embed, [rows, columns], num_prefix_tokens=1)
        return x + positions


class Split(nn.Module):
    """A linear representation of each token: `inv` for the method, `equi` for the auxiliary, and for SIE."""

    def __init__(self, dim: int, d_inv: int, d_equi: int) -> None:
        super().__init__()
        self.inv = UnitLinear(dim, d_inv)
        self.equi = UnitLinear(dim, d_equi)

    def forward(self, for_inv: Tensor | None, for_equi: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Tokens `(..., dim)` -> `(..., d_inv)` and `(..., d_equi)`; None where nothing is asked for."""
        return (None if for_inv is None else self.inv(for_inv)), (None if for_equi is None else self.equi(for_equi))


@dataclass(frozen=True)
class Features:
    """What an encoder says of b images of n patches, 0 of a ResNet, whose `cls` is the pooled feature. The parts are computed when they
    are asked for."""

    tokens: Tensor  # (b, 1 + n, dim), normed
    split: Split | None

    @property
    def cls(self) -> Tensor:
        """`(b, dim)`."""
        return self.tokens[:, 0]

    @property
    def patches(self) -> Tensor:
        """`(b, n, dim)`."""
        return self.tokens[:, 1:]

    @cached_property
    def inv_cls(self) -> Tensor:
        """`(b, d_inv)`: what the method read; the plain CLS token where there is no split."""
        return self._inv(self.cls)

    @cached_property
    def inv_patches(self) -> Tensor:
        """`(b, n, d_inv)`; the plain patch tokens where there is no split."""
        return self._inv(self.patches)

    @cached_property
    def equi(self) -> Tensor | None:
        """`(b, n, d_equi)`: equivariant part of the patch tokens; None where the representation is not split."""
        equi: Tensor | None = None if self.split is None else self.split(None, self.patches)[1]
        return equi

    def _inv(self, tokens: Tensor) -> Tensor:
        if self.split is None:
            return tokens
        inv: Tensor = self.split(tokens, None)[0]
        return inv


class Encoder(nn.Module):
    """Backbone and optional split. Has no values until they are initialised or loaded; build it on the meta device."""

    def __init__(self, config: PretrainConfig) -> None:
        super().__init__()
        dim = config.backbone.facts.dim
        self.backbone = ResNet(config) if config.backbone.facts.kind == "resnet" else Backbone(config)
        self.split = Split(dim, config.d_inv, config.d_split) if config.d_split else None
        self.d_inv = config.d_inv

    def forward(self, images: Tensor, masks: Tensor | None = None) -> Features:
        """`(b, 3, H, W)`, normalised, sides multiples of the patch; `masks` `(b, patches)`: patches hidden from the encoder."""
        return Features(self.backbone([images], [masks])[0], self.split)

    def units(self) -> Iterator[nn.Module]:
        """The parts to shard, children before their parents."""
        yield from self.backbone.blocks
        yield self.backbone
        if self.split is not None:
            yield self.split


def build_encoder(config: PretrainConfig, device: torch.device | str = "cpu") -> Encoder:
    """An untrained encoder with the initial weights of a run of this config and seed; published weights are not loaded."""
    encoder = _empty(config, device)
    names = nn.ModuleDict({"encoder": encoder})  # the names that its parameters have in a method
    initialise(names, config.seed)
    return encoder


load_random = build_encoder  # the control of the evaluations: what the architecture alone gives


def load_teacher(run_dir: Path, device: torch.device | str = "cpu") -> tuple[Encoder, PretrainConfig, str]:
    """The teacher of a complete run, its config, and its weights' sha256, checked against the one in result.json.

    Raises ValueError where the run is not complete or the weights are not what config and result say.
    """
    if not (run_dir / "COMPLETE").is_file():
        raise ValueError(f"{run_dir} is not a complete run: it has no COMPLETE marker")
    try:
        config = PretrainConfig.model_validate(json.loads((run_dir / "config.json").read_text()))
        expected = json.loads((run_dir / "result.json").read_text())["weights_sha256"]
    except ValidationError as error:
        raise ValueError(f"{run_dir / 'config.json'} is not the config of a pretraining: {error}") from None
    except (FileNotFoundError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{run_dir} is not the folder of a complete pretraining, or damaged: {error!r}") from None
    if not (run_dir / WEIGHTS).is_file():
        raise ValueError(f"{run_dir} has no {WEIGHTS}")
    content = (run_dir / WEIGHTS).read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != expected:
        raise ValueError(f"{run_dir / WEIGHTS} has the sha256 {sha256}, but result.json says {expected}: it was changed or damaged")
    return with_tensors(config, load(content), run_dir / WEIGHTS, device), config, sha256


def with_tensors(config: PretrainConfig, tensors: Mapping[str, Tensor], path: Path, device: torch.device | str = "cpu") -> Encoder:
    """A frozen encoder with these weights, named as in the exported file. `path`: where they are from, for messages.

    Raises ValueError, which names some of them, for keys that are missing or unknown, and for another shape.
    """
    encoder = _empty(config, device)
    _load(encoder, tensors, path)
    return encoder


def exported_name(name: str) -> str:
    """The key in the exported file of a parameter or buffer of `Encoder`."""
    for model in ("backbone.vit.", "backbone.resnet."):
        if name.startswith(model):
            return name.replace(model, "backbone.", 1)
    return name.removeprefix("backbone.")


def exported(encoder: Encoder) -> dict[str, Tensor]:
    """Parameters and buffers by their key in the exported file; shared, not copied."""
    return {exported_name(name): tensor for name, tensor in (*encoder.named_parameters(), *encoder.named_buffers())}


def _empty(config: PretrainConfig, device: torch.device | str) -> Encoder:
    with torch.device("meta"):
        encoder = Encoder(config)
    materialise(encoder, torch.device(device))
    return encoder.eval().requires_grad_(False)


def some(names: Iterable[str]) -> str:
    """The first few of them, and how many more."""
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _load(encoder: Encoder, tensors: Mapping[str, Any], path: Path) -> None:
    own = exported(encoder)
    missing, unknown = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or unknown:
        raise ValueError(f"{path} does not fit its config: missing {some(missing) or 'nothing'}, unknown {some(unknown) or 'nothing'}")
    for name, tensor in own.items():
        if tensor.shape != tensors[name].shape:
            raise ValueError(f"{path}: {name} has the shape {tuple(tensors[name].shape)}, its config says {tuple(tensor.shape)}")
        tensor.copy_(tensors[name])
