"""The control panel: every setting of the learning side, with its default, range and meaning. Imports no torch.

Conventions:
- unknown keys, wrong types, NaN and infinities are refused; instances are frozen;
- a field is part of a run's identity unless marked `Operational` (it may change between two segments of one run);
- a field added after a release is marked `Neutral(value)`: while it has that value it is left out of the identity, so
  old runs keep their name;
- "data" marks a data set: a known name, or a folder with a `manifest.json`; it enters the identity by name or by the
  manifest's hash, never by path; "format" names the field that says what else the folder may hold, which the class's `look`
  looks at; "file" marks a file, which enters by its sha256, and "sha256_of" the field beside it that a plan fills with that;
  "reference" marks the folder of another run, `${stage}` of this job or any, which enters by the weights in it;
- `epochs`-like durations may be fractions; "(start, end)" pairs are schedules over the whole run.
"""

from __future__ import annotations

import json
import math
import re
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from equissl import spread

Unit = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Several = Annotated[int, Field(ge=2)]
Seed = Annotated[int, Field(ge=0, lt=2**64)]


def Operational(default: Any, **kwargs: Any) -> Any:
    """A field that does not change what is learnt: workers, logging, places. Not part of the identity."""
    return Field(default, json_schema_extra={"operational": True}, **kwargs)


def Neutral(default: Any, **kwargs: Any) -> Any:
    """A field added later: left out of the identity while it has its default."""
    return Field(default, json_schema_extra={"neutral": default}, **kwargs)


def _pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Pair = Annotated[tuple[float, float], BeforeValidator(_pair)]
Units = Annotated[tuple[Unit, Unit], BeforeValidator(_pair)]
Positives = Annotated[tuple[Positive, Positive], BeforeValidator(_pair)]
NonNegatives = Annotated[tuple[NonNegative, NonNegative], BeforeValidator(_pair)]
Betas = Annotated[tuple[BelowOne, BelowOne], BeforeValidator(_pair)]
Counts = Annotated[tuple[Count, ...], BeforeValidator(_pair)]


def _named(value: Any) -> Any:
    """`method: ibot` is short for `method: {name: ibot}`."""
    return {"name": value} if isinstance(value, str) else value


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True, populate_by_name=False)


# --- backbones ---------------------------------------------------------------------------------------------------------


class BackboneFacts(NamedTuple):
    """What `plan` must know of a timm model without importing timm; a test compares every row with timm."""

    kind: Literal["vit", "resnet"]
    patch_size: int  # 1 for a ResNet: images of any side
    dim: int
    depth: int  # blocks
    image_size: int
    stages: tuple[int, ...] = ()  # blocks of each, of a ResNet
    has_bottlenecks: bool = False
    stem: Literal["imagenet", "cifar"] = "imagenet"

    def patches(self, side: int) -> int:
        """Patch tokens of an image; a ResNet has none."""
        return (side // self.patch_size) ** 2 if self.kind == "vit" else 0

    def require_blocks(self, blocks: Iterable[int]) -> None:
        """Raises ValueError for more last blocks than there are; a ResNet is not read by blocks."""
        if self.kind == "vit" and (deepest := max(blocks)) > self.depth:
            raise ValueError(f"task.blocks has {deepest}, but the backbone has {self.depth} blocks")


BACKBONES: dict[str, BackboneFacts] = {
    "vit_tiny_patch16_224": BackboneFacts("vit", 16, 192, 12, 224),
    "vit_small_patch16_224": BackboneFacts("vit", 16, 384, 12, 224),
    "vit_base_patch16_224": BackboneFacts("vit", 16, 768, 12, 224),
    "vit_large_patch16_224": BackboneFacts("vit", 16, 1024, 24, 224),
    "vit_huge_patch14_224": BackboneFacts("vit", 14, 1280, 32, 224),
    "resnet18": BackboneFacts("resnet", 1, 512, 8, 224, (2, 2, 2, 2)),
    "resnet50": BackboneFacts("resnet", 1, 2048, 16, 224, (3, 4, 6, 3), has_bottlenecks=True),
}
CIFAR_SIDE = 32  # pixels of an image for the CIFAR stem


class Published(Settings):
    """Weights that others have published, to begin with: `published` reads them. A path that changes is not another run."""

    # .safetensors, or torch's own format with nothing but tensors; or a folder with a model.safetensors
    file: Annotated[str, Field(json_schema_extra={"file": True})]
    # timm: a model of timm's; dinov2, ibot: of the authors' code, the backbone alone or a whole checkpoint, of which the teacher is taken;
    # moco: a checkpoint of the authors', of which the encoder is taken that gradients have trained
    kind: Literal["timm", "dinov2", "ibot", "moco"] = "timm"
    # that the file is to have, compared when it is read; None: any. A plan fills it in
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = Field(
        None, json_schema_extra={"operational": True, "sha256_of": "file"}
    )

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if not self.file.startswith(("/", "~", "${")):
            raise ValueError(f"file {self.file!r} is relative, but a job runs in another folder: give the whole path")
        return self


class Backbone(Settings):
    """A timm model by name, at any image size; a vision transformer at any patch size too."""

    name: str = "vit_small_patch16_224"
    patch_size: Count | None = None  # pixels; None: as in the name
    depth: Count | None = None  # blocks; None: as in the name
    # rate of the last block, linear from 0 at the first; in mode batch of all blocks. A ResNet has none: 0 is filled in
    drop_path: BelowOne = 0.1
    # sample: each residual branch of each crop is multiplied by 0 or 1 / (1 - rate); batch: only a random subset of a group's crops goes
    # through a branch, which saves its FLOPs (DINOv2)
    drop_path_mode: Literal["sample", "batch"] = Neutral("sample")
    # factor of each residual branch's output at the start, learnt for each dimension (LayerScale, Touvron et al. 2021); None: without
    layer_scale: Positive | None = Neutral(None)
    weights: Published | None = Neutral(None)  # of the backbone at the start; None: drawn
    # of a ResNet; cifar: a first convolution of 3×3 pixels with stride 1 and no max-pool, for images of 32 pixels (He et al. 2016; SimCLR)
    stem: Literal["imagenet", "cifar"] = Neutral("imagenet")

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        if isinstance(values, dict) and (facts := BACKBONES.get(str(values.get("name")))) and facts.kind == "resnet":
            return {"drop_path": 0.0, **values}
        return values

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.name not in BACKBONES:
            raise ValueError(f"unknown backbone {self.name!r}; choose from {', '.join(BACKBONES)}")
        if self.facts.kind == "vit" and self.stem != "imagenet":
            raise ValueError(f"stem {self.stem} is of ResNets, and backbone {self.name} is a vision transformer: leave it out")
        if self.facts.kind == "resnet":
            for field, none in (
                ("patch_size", None),
                ("depth", None),
                ("drop_path", 0.0),
                ("drop_path_mode", "sample"),
                ("layer_scale", None),
            ):
                if (value := getattr(self, field)) != none:
                    raise ValueError(f"{field} is {value}, but backbone {self.name} is a ResNet, which has none: leave {field} out")
            self.check_kind(self.weights)
        return self

    def check_kind(self, weights: Published | None) -> None:
        """Raises ValueError for weights that are of vision transformers, where this is a ResNet."""
        if weights is not None and self.facts.kind == "resnet" and weights.kind in ("dinov2", "ibot"):
            raise ValueError(f"kind {weights.kind} is of vision transformers, and {self.name} is a ResNet: choose timm or moco")

    @property
    def facts(self) -> BackboneFacts:
        facts = BACKBONES[self.name]
        if self.stem == "cifar":
            facts = facts._replace(stem="cifar", image_size=CIFAR_SIDE)
        return facts._replace(patch_size=self.patch_size or facts.patch_size, depth=self.depth or facts.depth)

    def kept(self, crops: int) -> int:
        """How many of a group's crops of one kind are computed in each residual branch."""
        return crops if self.drop_path_mode == "sample" else crops - math.floor(self.drop_path * crops + 1e-9)


# --- transformations ---------------------------------------------------------------------------------------------------


class Transformation(Settings):
    """What g does to the second view. Ranges are those of Table 1 of the paper; one mix-in for each of its rows."""

    num_parameters: ClassVar[int]  # of g; the file has their names


class Bordered(Transformation):
    """Reads beyond the pixels it yields. inside: from a larger crop, of which the middle is kept: no pixel from outside."""

    border: Literal["inside", "reflect", "zero"] = "inside"


class Turned(Settings):
    max_degrees: Annotated[float, Field(gt=0, le=180)] = 45.0


class Shifted(Settings):
    max_pixels: Positive = 10.0  # of a 224-pixel image; scaled with the side


class Coloured(Settings):
    """Largest difference of the factors of brightness, contrast and saturation from 1; largest shift of the hue, in turns."""

    max_brightness: Annotated[float, Field(gt=0, le=1)] = Neutral(0.4)
    max_contrast: Annotated[float, Field(gt=0, le=1)] = Neutral(0.4)
    max_saturation: Annotated[float, Field(gt=0, le=1)] = Neutral(0.4)
    max_hue: Annotated[float, Field(gt=0, le=0.5)] = Neutral(0.1)


# pixels of a 224-pixel image: a kernel of 3 sigma a side is then one that reflection can fill, of images of 16 pixels and more
LARGEST_SIGMA = 70.0


class Blurred(Settings):
    sigma: Pair = Neutral((0.1, 2.0))  # pixels of a 224-pixel image; scaled with the side

    @model_validator(mode="after")
    def _sigma(self) -> Self:
        low, high = self.sigma
        if not 0 <= low < high <= LARGEST_SIGMA:
            raise ValueError(
                f"sigma is ({low}, {high}); it must be two numbers with 0 <= low < high <= {LARGEST_SIGMA:g}, in pixels of a 224-pixel"
                " image: of a wider blur the image could not fill the kernel, which is 3 sigma to each side"
            )
        return self


class Rotation(Bordered, Turned):
    num_parameters: ClassVar[int] = 1

    name: Literal["rot"] = "rot"


class Translation(Bordered, Shifted):
    num_parameters: ClassVar[int] = 2

    name: Literal["trans"] = "trans"


class SE2(Bordered, Turned, Shifted):
    """Rotation about the centre, then translation, as one affine warp."""

    num_parameters: ClassVar[int] = 3

    name: Literal["se2"] = "se2"


class Color(Transformation, Coloured):
    """Brightness, contrast, saturation, hue, in this order. Pixel by pixel: there is no border."""

    num_parameters: ClassVar[int] = 4

    name: Literal["color"] = "color"


class Blur(Bordered, Blurred):
    """A Gaussian blur."""

    num_parameters: ClassVar[int] = 1

    name: Literal["blur"] = "blur"


class All(Bordered, Turned, Shifted, Coloured, Blurred):
    """The warp of `se2`, then the blur, then the colours: what SIE(all) knows the parameters of."""

    num_parameters: ClassVar[int] = 8

    name: Literal["all"] = "all"


AnyTransformation = Annotated[Rotation | Translation | SE2 | Color | Blur | All, Field(discriminator="name")]


def choices(annotation: Any) -> str:
    """The names in a union that is discriminated by name."""
    return ", ".join(member.model_fields["name"].default for member in get_args(get_args(annotation)[0]))


class Blend(NamedTuple):
    """What makes one token of a patch's two, one of each view, for `plan`; numbers are of one sample."""

    width: int  # of the tokens that decoders read
    kept: float  # numbers kept for the backward pass, in the precision of the computation
    parameters: int = 0
    flops: float = 0.0


class AuxiliarySettings(Settings):
    """What every auxiliary task has: images are decoded from the equivariant patch tokens of the two global views."""

    title: ClassVar[str]
    needs_transformation: ClassVar[bool] = False

    name: str
    weight: NonNegative = Field(1.0, alias="lambda")  # at 0 the decoders learn from detached features: pictures without influence
    d: Count | None = None  # width of the equivariant part; None: the method's recipe
    # what the decoders read. representation: a part of linear features of the patch tokens, of which the method's head reads the others;
    # head_output: outputs of the head for the patch tokens, d more of its last layer than the loss reads. Of iBOT's head with 8192
    # outputs, of which d are equivariant, `method.prototypes` is 8192 - d
    split_at: Literal["representation", "head_output"] = Neutral("representation")
    decoder_widths: Counts = (512, 256, 128, 64)  # channels after the linear layer and after each but the last of the convolutions

    @property
    @abstractmethod
    def fractions(self) -> list[float]:
        """Where on the path from the untransformed second view (0) to the transformed one (1) the images to decode lie."""

    @abstractmethod
    def blend(self, d: int, patches: int) -> Blend:
        """Of tokens of d dimensions."""


def _some_images(value: Any) -> Any:
    if value == 0:
        raise ValueError(
            "num_images is 0, so nothing on the way would be reconstructed: give 1 to 8 (the paper has 2), lambda 0 for the control"
            " whose decoders learn beside it, or auxiliary null for none"
        )
    return value


class Reconstruction(AuxiliarySettings):
    """The auxiliary task: reconstruct the second view at K intermediate points of g's path from the equivariant features."""

    title: ClassVar[str] = "intermediate reconstruction"
    needs_transformation: ClassVar[bool] = True

    name: Literal["reconstruction"] = "reconstruction"
    num_images: Annotated[int, BeforeValidator(_some_images), Field(ge=1, le=8)] = 2
    include_final: bool = False  # reconstruct the transformed view itself too ("2+final" in Table 7)

    @property
    def fractions(self) -> list[float]:
        return [k / (self.num_images + 1) for k in range(1, self.num_images + 1)] + [1.0] * self.include_final

    def blend(self, d: int, patches: int) -> Blend:
        return Blend(2 * d, kept=4 * patches * d)  # both views' apart, and side by side


class CrossAttention(AuxiliarySettings):
    """Cross-attention reconstruction (Wang, Krajsek, Scharr, arXiv 2412.03314): the second view is reconstructed from the first one's
    equivariant features, of which its own choose. Without a transformation it is another crop in other colours.

    In Table 2 of the paper it rides on `vicreg`.
    """

    title: ClassVar[str] = "cross-attention reconstruction"

    name: Literal["cross_attention"] = "cross_attention"
    residual: bool = False  # add the second view's own features to what they chose: then it could be decoded without the first

    @property
    def fractions(self) -> list[float]:
        return [1.0]

    def blend(self, d: int, patches: int) -> Blend:
        # queries, keys, values, output; of both views the tokens and their norms
        return Blend(d, kept=9 * patches * d, parameters=4 * d**2, flops=8.0 * patches * d**2 + 4.0 * patches**2 * d)


def _auxiliary(value: Any) -> Any:
    """The first auxiliary there was needs no name."""
    value = _named(value)
    return {"name": Reconstruction.model_fields["name"].default, **value} if isinstance(value, dict) else value


AnyAuxiliary = Annotated[Reconstruction | CrossAttention, Field(discriminator="name")]


# --- recipes: views, optimizer -----------------------------------------------------------------------------------------


class Photometry(Settings):
    """Colour augmentation of one kind of crop, in the order jitter, grey, blur, solarize. Probabilities per crop."""

    jitter: Unit = 0.8
    brightness: NonNegative = 0.4
    contrast: NonNegative = 0.4
    saturation: NonNegative = 0.2
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    grey: Unit = 0.2
    blur: Unit = 0.5
    sigma: NonNegatives = (0.1, 2.0)  # pixels of a 224-pixel crop; scaled with the side
    solarize: Unit = 0.0

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        low, high = self.sigma
        if low > high:
            raise ValueError(f"sigma is ({low}, {high}); the first must not be larger than the second, which the blur's kernel is made for")
        return self


class Globals(Settings):
    """Two global crops. Scales are fractions of the image's area."""

    global_scale: Pair = (0.25, 1.0)
    max_aspect: Annotated[float, Field(ge=1)] = Neutral(4 / 3)  # of all crops: width / height between 1 / this and this
    one_crop: bool = Neutral(False)  # both global views are the same crop, mirrored alike; each with its own colours
    flip: Unit = 0.5
    global1: Photometry = Photometry(blur=1.0)
    global2: Photometry = Photometry(blur=0.1, solarize=0.2)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for name in ("global_scale", "local_scale"):
            low, high = getattr(self, name, (1, 1))
            if not 0 < low <= high <= 1:
                raise ValueError(f"{name} is ({low}, {high}); it must be two numbers with 0 < low <= high <= 1")
        return self


NO_PHOTOMETRY = {"jitter": 0.0, "grey": 0.0, "blur": 0.0, "solarize": 0.0}
# Of `Views`: the largest square of the image, twice; with the border inside it is what g warps, and its middle is seen.
G_ALONE = {
    "global_scale": [1.0, 1.0],
    "max_aspect": 1.0,
    "one_crop": True,
    "num_local": 0,
    "flip": 0.0,
    "global1": NO_PHOTOMETRY,
    "global2": NO_PHOTOMETRY,
    "local": NO_PHOTOMETRY,
}


def _under(own: Any, filled: Any) -> Any:
    """`filled`, where `own` leaves it open."""
    if isinstance(own, Settings):
        own = {field: getattr(own, field) for field in (own.model_fields_set | {"name"}) & type(own).model_fields.keys()}
    if not isinstance(own, dict) or not isinstance(filled, dict):
        return own
    return {**filled, **{key: _under(value, filled.get(key)) for key, value in own.items()}}


def _changed(default: Settings, given: Any) -> Any:
    """`default` with what a dictionary gives, at any depth; anything else that is given is meant as it is."""
    if not isinstance(given, dict):
        return given
    own = {name: getattr(default, name) for name in type(default).model_fields}
    return own | {name: _changed(own[name], value) if isinstance(own.get(name), Settings) else value for name, value in given.items()}


class Pairs(Globals):
    """The views of methods that see no local crops."""

    num_local: ClassVar[int] = 0
    local_size: ClassVar[int] = 1  # of no crop
    local_scale: ClassVar[tuple[float, float]] = (1.0, 1.0)
    local: ClassVar[Photometry] = Photometry()


class Views(Globals):
    """Two global crops and any number of local ones."""

    num_local: Annotated[int, Field(ge=0)] = 10
    local_size: Count = 96  # pixels
    local_scale: Pair = (0.05, 0.25)
    local: Photometry = Photometry(blur=0.5)


class Optimizer(Settings):
    """What the optimizers share: the learning rate rises linearly, then falls along half a cosine.

    Weight decay is not for biases, norms and other 1-D parameters.
    """

    num_moments: ClassVar[int]  # tensors of its state for each parameter

    base_lr: Positive
    # linear: lr = base_lr · batch / 256; sqrt: base_lr · sqrt(batch / 1024), as in DINOv2; none: base_lr
    scaling: Literal["linear", "sqrt", "none"] = Neutral("linear")
    final_lr: NonNegative = 0.0
    warmup_epochs: NonNegative = 10.0
    weight_decay: NonNegatives  # (start, end), cosine
    # the last block learns with this part of the learning rate, the one before with its square, and so on to the embeddings
    layer_decay: Annotated[float, Field(gt=0, le=1)] = Neutral(1.0)
    patch_embed_lr: Positive = Neutral(1.0)  # part of the learning rate for the patch embedding, besides

    def lr(self, batch: int) -> float:
        """The highest learning rate of a run."""
        return self.base_lr * {"linear": batch / 256, "sqrt": math.sqrt(batch / 1024), "none": 1.0}[self.scaling]

    def resolved(self, batch: int) -> str:
        """The schedules as people read them, with what the learning rate is made of."""
        made_of = {"linear": f" = {self.base_lr:g} · {batch}/256", "sqrt": f" = {self.base_lr:g} · √({batch}/1024)", "none": ""}
        start, end = self.weight_decay
        parts = [
            f"lr {self.lr(batch):g}{made_of[self.scaling]} after {self.warmup_epochs:g} epochs, down to {self.final_lr:g}",
            f"weight decay {start:g}" + (f" to {end:g}" if end != start else ""),
        ]
        parts += [f"{self.layer_decay:g} of the learning rate per block downwards"] if self.layer_decay != 1 else []
        parts += [f"{self.patch_embed_lr:g} of the learning rate for the patch embedding"] if self.patch_embed_lr != 1 else []
        return ", ".join(parts)


class Clipped(Optimizer):
    clip: Positive | None = None  # largest L2 norm of a gradient; None: no clipping
    # whose norm it is: each parameter tensor's, each network part's (encoder, head, …; DINOv2), or that of all together, the decoders apart
    clip_by: Literal["tensor", "module", "global"] = Neutral("tensor")

    @model_validator(mode="after")
    def _clips(self) -> Self:
        if self.clip is None and self.clip_by != "tensor":
            raise ValueError(f"clip_by is {self.clip_by}, but clip is null and nothing is clipped: give a norm for clip, or no clip_by")
        return self


class AdamW(Clipped):
    """Loshchilov & Hutter 2019; the defaults are iBOT's."""

    num_moments: ClassVar[int] = 2

    name: Literal["adamw"] = Neutral("adamw")
    base_lr: Positive = 5e-4
    final_lr: NonNegative = 1e-6
    weight_decay: NonNegatives = (0.04, 0.4)
    betas: Betas = (0.9, 0.999)
    clip: Positive | None = 3.0


class SGD(Clipped):
    """With momentum; the defaults are SimSiam's."""

    num_moments: ClassVar[int] = 1

    name: Literal["sgd"] = "sgd"
    base_lr: Positive = 0.05
    weight_decay: NonNegatives = (1e-4, 1e-4)  # added to the gradient
    momentum: BelowOne = 0.9
    nesterov: bool = False

    @model_validator(mode="after")
    def _has_momentum(self) -> Self:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov looks ahead along the momentum, which is 0: give momentum above 0, or nesterov false")
        return self


class LARS(Optimizer):
    """You et al. 2017; the defaults are SimCLR's. The length of a tensor's step does not depend on its gradient's: there is no clipping."""

    num_moments: ClassVar[int] = 1

    name: Literal["lars"] = "lars"
    base_lr: Positive = 0.3
    weight_decay: NonNegatives = (1e-6, 1e-6)  # added to the gradient
    momentum: BelowOne = 0.9
    trust: Positive = 1e-3  # eta: the step before momentum as a part of the tensor's norm; 1-D parameters are not scaled


AnyOptimizer = Annotated[AdamW | SGD | LARS, Field(discriminator="name")]


# --- methods -----------------------------------------------------------------------------------------------------------


class Head(NamedTuple):
    """A head, or a layer of one, for `plan`; a vector that passes costs two FLOPs per parameter. Numbers are of one sample."""

    parameters: int
    student: float  # vectors that pass through the student's
    teacher: float = 0.0  # and through the teacher's
    kept: float = 0.0  # numbers kept for the backward pass, in the precision of the computation
    losses: float = 0.0  # and those that are float32 always: what losses are computed from
    averaged: bool = False  # whether the teacher has one too


class Loss(NamedTuple):
    """What a loss takes by itself: FLOPs and float32 numbers of one sample, and numbers that do not depend on how many there are."""

    flops: float = 0.0
    kept: float = 0.0
    fixed: float = 0.0


class Demand(NamedTuple):
    """What a method reads and has besides the backbone and the split, for `plan`."""

    inv: float  # tokens of a sample that the student's heads read
    heads: tuple[Head, ...]
    teacher_inv: float = 0.0  # and the teacher's
    equi: float = 0.0  # tokens of which the method itself reads the equivariant part
    loss: Loss = Loss()


def expander(dim: int, width: int, patches: int = 0, d_equi: int = 0) -> tuple[Head, ...]:
    """Of both views' CLS tokens, three layers, normalised and rectified between; statistics are of float32 copies. With `d_equi`
    patch tokens pass too, and have a last layer of their own."""
    tokens = 2 * (1 + patches) if d_equi else 2
    hidden = Head(dim * width + width**2, student=tokens, kept=tokens * 4 * width, losses=tokens * 4 * width)
    return hidden, Head(width**2, student=2), Head(width * d_equi, student=2 * patches)


def projector(widths: tuple[int, ...], student: int, teacher: int = 0, bias: bool = False, averaged: bool = False) -> Head:
    """Of so many vectors of a sample: layers of these widths, normalised and rectified between; statistics are of float32 copies."""
    hidden, out = sum(widths[1:-1]), widths[-1]
    parameters = sum(a * b for a, b in pairwise(widths)) + bias * out
    numbers = student * 2.0 * (hidden + out)
    return Head(parameters, student, teacher, kept=numbers, losses=numbers, averaged=averaged)


def contrast(pairs: int, batch: int, width: int) -> Loss:
    """NT-Xent of so many pairs of a sample with those of all: the matrix of similarities, as they are, masked, and their gradient."""
    similarities = (2 * pairs) ** 2 * batch
    return Loss(flops=2.0 * similarities * width, kept=3.0 * similarities)


def couple(vectors: int, width: int) -> Loss:
    """Variance and covariance of so many vectors of a sample over the batch: the covariance matrices, their squares and gradients."""
    return Loss(flops=vectors * 2.0 * width**2, kept=3.0 * vectors * width, fixed=4.0 * vectors * width**2)


class MethodSettings(Settings):
    """What the rest of the package asks of a method's settings."""

    token_objective: ClassVar[bool] = True  # yields patch tokens of two global views: the auxiliary can ride on it
    accumulates: ClassVar[bool] = False  # the loss of a batch is the mean of its parts' losses
    has_teacher: ClassVar[bool] = False  # a moving average of the student, which sees both global views
    has_masks: ClassVar[bool] = False  # the encoder has a mask token
    always_splits: ClassVar[bool] = False  # the method itself has a use for an equivariant part
    head_splits: ClassVar[bool] = False  # the last layer of its head can have equivariant outputs, of patch tokens

    name: str
    representation: Count  # width of the linear representation, of which a part is equivariant; unused without a split
    views: Any
    optimizer: Any

    @property
    def sees_plain(self) -> bool:
        """Whether the student sees the un-augmented image too, and what was done to each view."""
        return False

    @property
    def num_global(self) -> int:
        """Images of a global view's size of each sample that the student sees."""
        return 2 + self.sees_plain

    @property
    @abstractmethod
    def recipe_d(self) -> int:
        """Width of the equivariant part where the auxiliary does not say."""

    @abstractmethod
    def demand(self, config: PretrainConfig) -> Demand:
        """What the method asks of a GPU, for `plan`."""

    def check(self, config: PretrainConfig) -> None:
        """Raises ValueError for what this method cannot do."""

    def check_part(self, config: PretrainConfig, samples: int) -> None:
        """Raises ValueError where the method cannot compute its loss of so many samples, a rank's part of a batch."""

    @model_validator(mode="before")
    @classmethod
    def _recipe(cls, values: Any) -> Any:
        """What is given of `views` and `optimizer` changes the method's own recipe, unless it names another optimizer."""
        if not isinstance(values, dict):
            return values
        filled = dict(values)
        for field in ("views", "optimizer"):
            default, given = cls.model_fields[field].default, _named(values.get(field))
            if isinstance(given, dict) and given.get("name") in (None, getattr(default, "name", None)):
                given = _changed(default, given)
            if field in values:
                filled[field] = given
        return filled


class Averaged(MethodSettings):
    """A method whose teacher is a moving average of its student."""

    has_teacher: ClassVar[bool] = True

    ema: Units = (0.996, 1.0)  # (start, end), cosine: what the teacher keeps of itself at each step


class IBOT(Averaged):
    """iBOT (Zhou et al., ICLR 2022); defaults are the authors' ViT-S/16 recipe, but for the blur of local crops: its sigma is scaled with
    their side here, and is not in the authors' code, which with `views: {local: {sigma: [0.2333, 4.6667]}}` is followed (`jobs/paper`).
    """

    accumulates: ClassVar[bool] = True  # centres stand still within a step
    has_masks: ClassVar[bool] = True
    head_splits: ClassVar[bool] = True

    name: Literal["ibot"] = "ibot"
    representation: Count = 8192
    head_hidden: Count = 2048
    head_bottleneck: Count = 256
    prototypes: Count = 8192
    student_temperature: Positive = 0.1
    teacher_temperature: Positives = (0.04, 0.07)  # (start, end), linear over teacher_warmup_epochs
    teacher_warmup_epochs: NonNegative = 30.0
    centre_momentum: Unit = 0.9
    mask_probability: Unit = 0.5
    mask_ratio: Units = (0.1, 0.5)
    freeze_last_layer_epochs: NonNegative = 1.0
    views: Views = Views()
    optimizer: AnyOptimizer = AdamW()

    @property
    def recipe_d(self) -> int:
        return 2048

    def demand(self, config: PretrainConfig) -> Demand:
        hidden, bottleneck = self.head_hidden, self.head_bottleneck
        masked = config.num_patches * self.mask_probability * sum(self.mask_ratio) / 2  # patches of a global view
        asked, of_teacher = 2 + self.views.num_local + 2 * masked, 2 * (1 + config.num_patches)
        # log-probabilities and their gradients before and after softmax; the teacher's probabilities
        losses = self.prototypes * (3 * asked + 2 + 2 * masked)
        mlp = config.d_inv * hidden + hidden * hidden + hidden * bottleneck
        patches = 2 * config.num_patches if config.d_head else 0.0  # the masked ones among them
        in_mlp = 2 + self.views.num_local + patches if config.d_head else asked
        kept = in_mlp * (4 * hidden + 3 * bottleneck) + (in_mlp * config.d_inv if config.d_head else 0.0)
        equi = Head(bottleneck * config.d_head, student=patches, averaged=True)
        return Demand(
            inv=asked,
            teacher_inv=of_teacher,
            heads=(
                equi,
                Head(mlp, in_mlp, of_teacher, kept=kept, averaged=True),
                # the teacher's last layer sees the CLS tokens and the masked patches; the mean over all patches costs one row more
                Head(bottleneck * self.prototypes, asked, 2 + 2 * masked, losses=losses, averaged=True),
            ),
        )


class DINOv2(IBOT):
    """DINOv2 (Oquab et al., TMLR 2024); defaults are the authors' short recipe for ViT-L/16; of local crops' blur see `IBOT`.

    Of the backbone, which is a section of its own, their recipe has `drop_path: 0.3`, `drop_path_mode: batch` and `layer_scale: 1.0e-5`.
    What they call an epoch is 1250 steps of 2048 images, whatever the data: on ImageNet, two of our epochs. To do what they did
    there, double all numbers of epochs: 200, `warmup_epochs: 20`, `teacher_warmup_epochs: 60`, `freeze_last_layer_epochs: 2`.
    """

    head_splits: ClassVar[bool] = False

    name: Literal["dinov2"] = "dinov2"  # type: ignore[assignment]
    representation: Count = 2048
    prototypes: Count = 65536
    separate_heads: bool = False  # patches have a head of their own, of the same size
    # of the teacher's outputs. softmax: moving centres are subtracted; sinkhorn: over the batch each prototype gets nearly the same
    centring: Literal["softmax", "sinkhorn"] = "softmax"
    koleo: NonNegative = 0.1  # weight of the term that spreads the CLS tokens
    koleo_samples: Several = 64  # consecutive samples of a batch among which neighbours are looked for; of fewer, all
    ema: Units = (0.992, 1.0)
    views: Views = Views(global_scale=(0.32, 1.0), num_local=8, local_scale=(0.05, 0.32))
    optimizer: AnyOptimizer = AdamW(base_lr=4e-3, scaling="sqrt", layer_decay=0.9, patch_embed_lr=0.2, clip_by="module")

    @property
    def recipe_d(self) -> int:
        return 512

    def _masked(self, config: PretrainConfig) -> float:
        """Patches of a sample's global views, on average."""
        return 2 * config.num_patches * self.mask_probability * sum(self.mask_ratio) / 2

    def neighbourhood(self, batch: int) -> int:
        return min(self.koleo_samples, batch)

    def demand(self, config: PretrainConfig) -> Demand:
        hidden, bottleneck, dim = self.head_hidden, self.head_bottleneck, config.backbone.facts.dim
        masked = self._masked(config)
        mlp, last = config.d_inv * hidden + hidden * hidden + hidden * bottleneck, bottleneck * self.prototypes

        def head(student: float, teacher: float) -> tuple[Head, Head]:
            """Losses: log-probabilities and their gradients before and after softmax; the teacher's probabilities."""
            return (
                Head(mlp, student, teacher, kept=student * (4 * hidden + 3 * bottleneck), averaged=True),
                Head(last, student, teacher, losses=self.prototypes * (3 * student + teacher), averaged=True),
            )

        of_cls, of_patches = (2 + self.views.num_local, 2), (masked, masked)
        together = (of_cls[0] + masked, 2 + masked)
        return Demand(
            inv=together[0],
            teacher_inv=together[1],
            heads=(*head(*of_cls), *head(*of_patches)) if self.separate_heads else head(*together),
            # two products with all neighbours; unit vectors, neighbours, differences and their gradients
            loss=Loss(flops=8.0 * self.neighbourhood(config.batch) * dim, kept=2 * 4.0 * dim),
        )

    def check(self, config: PretrainConfig) -> None:
        if self.koleo and config.batch % self.neighbourhood(config.batch):
            raise ValueError(
                f"method.koleo_samples is {self.koleo_samples}: the batch, {config.batch}, is to be a multiple of it, or smaller"
            )
        if self.centring == "sinkhorn":
            self._check_sinkhorn(config)

    def _check_sinkhorn(self, config: PretrainConfig) -> None:
        if config.accumulate > 1:
            raise ValueError(
                f"accumulate is {config.accumulate}, but centring sinkhorn assigns the prototypes over a whole batch at once:"
                " give accumulate 1, or centring softmax"
            )
        if self.centre_momentum != (default := type(self).model_fields["centre_momentum"].default):
            raise ValueError(
                f"method.centre_momentum is {self.centre_momentum}, but centring sinkhorn has no centres: leave it at {default}"
            )
        # No prototype gets more than its part, rows / prototypes, of all targets together, so no target gives it more: a target's entropy
        # is log(prototypes / rows) at least. Over half of log(prototypes), that of a target without any knowledge, is refused
        for what, rows in (("CLS tokens", 2 * config.batch), ("masked patches", config.batch * self._masked(config))):
            if rows**2 < self.prototypes:
                raise ValueError(
                    f"centring sinkhorn shares {self.prototypes} prototypes among the {rows:g} {what} of a batch, so that a target is"
                    f" spread over {self.prototypes / max(rows, 1):.0f} of them at least and says next to nothing: it needs the square root"
                    f" of their number, {math.ceil(math.sqrt(self.prototypes))} {what}. Give a larger batch (now {config.batch}), fewer"
                    " prototypes, or centring softmax"
                )

    def check_part(self, config: PretrainConfig, samples: int) -> None:
        if self.koleo and config.accumulate > 1 and samples % (neighbourhood := self.neighbourhood(config.batch)):
            raise ValueError(
                f"accumulate is {config.accumulate}: a rank's part is {samples} samples, but koleo looks for neighbours among"
                f" {neighbourhood}, and a part must hold them: give a smaller accumulate, or for method.koleo_samples a divisor of the part"
            )


def compares_samples(method: str, batch: int) -> None:
    """Raises ValueError for a batch of one."""
    if batch < 2:
        raise ValueError(f"batch is {batch}: method {method} compares the samples of a batch, and needs 2 at least")


class VICReg(MethodSettings):
    """VICReg (Bardes et al., ICLR 2022) as the invariance half of SIE; recipe of the paper's ViT-S/16.

    Their own weights are 25, 25, 1. Views are VICReg's. Weight decay, warm-up and drop path (the backbone's 0.1) are not published: ours.
    """

    head_splits: ClassVar[bool] = True

    name: Literal["vicreg"] = "vicreg"
    representation: Count = 512
    expander: Count = 1024  # width of its three layers
    invariance: NonNegative = 10.0  # weights of the terms
    variance: NonNegative = 10.0
    covariance: NonNegative = 1.0
    views: Pairs = Pairs(global_scale=(0.08, 1.0))
    optimizer: AnyOptimizer = AdamW(base_lr=1e-4, weight_decay=(0.04, 0.04), clip=None)

    @property
    def recipe_d(self) -> int:
        return 256

    def demand(self, config: PretrainConfig) -> Demand:
        heads = expander(config.d_inv, self.expander, config.num_patches, config.d_head)
        return Demand(2.0, heads, loss=couple(2, self.expander))

    def check(self, config: PretrainConfig) -> None:
        compares_samples(self.name, config.batch)


class SIE(VICReg):
    """SIE (Garrido et al., ICML 2023): VICReg, and a hypernetwork that predicts the second view's equivariant part from the first's."""

    always_splits: ClassVar[bool] = True
    head_splits: ClassVar[bool] = False

    name: Literal["sie"] = "sie"  # type: ignore[assignment]
    d: Count = 256  # width of the equivariant part; `auxiliary.d` is to be the same, or not given
    expander: Count = 1024  # width of the three layers of each part's
    equivariance: NonNegative = 0.45  # f: weight of the predicted part, times `invariance`; the authors' command line, not their default

    @property
    def recipe_d(self) -> int:
        return self.d

    def demand(self, config: PretrainConfig) -> Demand:
        width = self.expander
        assert config.transformation is not None
        p = config.transformation.num_parameters
        predictor = Head(p * width**2, student=1, losses=2 * width * (p + 1))
        heads = (*expander(config.d_inv, width), *expander(config.d_equi, width), predictor)
        return Demand(2.0, heads, equi=2.0, loss=couple(2, 2 * width))

    def check(self, config: PretrainConfig) -> None:
        super().check(config)
        if config.transformation is None:
            raise ValueError(
                "method sie predicts the second view from the parameters of its transformation, and there is none: give transformation,"
                f" one of {choices(AnyTransformation)}, or choose method vicreg, which needs none"
            )
        if config.d_equi != self.d:
            raise ValueError(
                f"auxiliary.d is {config.d_equi} and method.d {self.d}: they are the width of the same part; give method.d only"
            )
        if self.d >= self.representation:
            raise ValueError(f"method.d {self.d} must be smaller than method.representation {self.representation}: the rest is invariant")


class EquiMod(Settings):
    """An addition to a method (Devillers & Lefort, ICLR 2023): from the embedding of the un-augmented image and the parameters of the
    augmentation that of the augmented image is predicted."""

    weight: NonNegative = 1.0
    temperature: Positive = 0.2
    hidden: Count = 2048  # width of the equivariance projector's two hidden layers
    embedding: Count = 128
    parameter_width: Count = 128  # of what the augmentation's parameters are projected to


class Equivariant(MethodSettings):
    """A method that EquiMod can be added to."""

    equimod: EquiMod | None = None

    @property
    def sees_plain(self) -> bool:
        return self.equimod is not None

    def with_equimod(self, config: PretrainConfig, demand: Demand) -> Demand:
        of = self.equimod
        if of is None:
            return demand
        heads = (
            projector((config.d_inv, of.hidden, of.hidden, of.embedding), student=3),
            projector((config.num_augmentation_parameters, of.parameter_width), student=2),
            projector((of.embedding + of.parameter_width, of.embedding), student=2),
        )
        mine, theirs = contrast(2, config.batch, of.embedding), demand.loss
        loss = Loss(theirs.flops + mine.flops, theirs.kept + mine.kept, theirs.fixed + mine.fixed)
        return demand._replace(inv=demand.inv + 1, heads=(*demand.heads, *heads), loss=loss)

    def check(self, config: PretrainConfig) -> None:
        compares_samples(self.name, config.batch)


SIMCLR_COLOURS = Photometry(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2)


class SimCLR(Equivariant):
    """SimCLR (Chen et al., ICML 2020) as the authors of EquiMod train it; defaults are their recipe for ImageNet, ResNet-50, 800
    epochs, batch 4096 (lr 2.4).

    Theirs for CIFAR-10, ResNet-18, 800 epochs, batch 512: temperature 0.5, base_lr 2.0 (lr 4.0); of the views global_scale [0.2, 1.0]
    and in both brightness, contrast, saturation 0.4, hue 0.1, no blur.
    """

    name: Literal["simclr"] = "simclr"
    representation: Count = 512  # width of the split's parts together, and of the equivariant one 256: ours, as VICReg's
    hidden: Count = 2048  # width of the projector's two hidden layers
    embedding: Count = 128
    temperature: Positive = 0.2
    views: Pairs = Pairs(global_scale=(0.08, 1.0), global1=SIMCLR_COLOURS, global2=SIMCLR_COLOURS)
    optimizer: AnyOptimizer = LARS(base_lr=0.15)

    @property
    def recipe_d(self) -> int:
        return 256

    def widths(self, dim: int) -> tuple[int, ...]:
        """Of the projector's layers."""
        return dim, self.hidden, self.hidden, self.embedding

    def demand(self, config: PretrainConfig) -> Demand:
        heads = (projector(self.widths(config.d_inv), student=2),)
        return self.with_equimod(config, Demand(2.0, heads, loss=contrast(1, config.batch, self.embedding)))


class BYOL(Averaged, Equivariant):
    """BYOL (Grill et al., NeurIPS 2020) as the authors of EquiMod train it; defaults are their recipe for ImageNet, ResNet-50, 1000
    epochs, batch 4096 (lr 4.8). The encoder that leaves the run is the teacher's, as of all methods with one.

    Theirs for CIFAR-10, ResNet-18, 800 epochs, batch 512: base_lr 1.0 (lr 2.0), weight_decay [1e-6, 1e-6]; of the views global_scale
    [0.2, 1.0] and in both sigma [0.7, 5.6] (0.1 to 0.8 pixels of 32).
    """

    name: Literal["byol"] = "byol"
    representation: Count = 512  # width of the split's parts together, and of the equivariant one 256: ours, as VICReg's
    hidden: Count = 4096  # width of the hidden layer of projector and predictor
    embedding: Count = 256
    views: Pairs = Pairs(global_scale=(0.08, 1.0))
    optimizer: AnyOptimizer = LARS(base_lr=0.3, weight_decay=(1.5e-6, 1.5e-6))

    @property
    def recipe_d(self) -> int:
        return 256

    def widths(self, dim: int) -> tuple[int, ...]:
        """Of the projector's and the predictor's layers."""
        return dim, self.hidden, self.embedding

    def demand(self, config: PretrainConfig) -> Demand:
        heads = (
            projector(self.widths(config.d_inv), student=2, teacher=2, bias=True, averaged=True),
            projector(self.widths(self.embedding), student=2, bias=True),
        )
        return self.with_equimod(config, Demand(2.0, heads, teacher_inv=2.0))


M = TypeVar("M", bound=MethodSettings)
Method = Annotated[IBOT | DINOv2 | VICReg | SIE | SimCLR | BYOL, BeforeValidator(_named), Field(discriminator="name")]


# --- entries -----------------------------------------------------------------------------------------------------------


class Estimate(NamedTuple):
    """What a run will cost on one kind of GPU; assumptions are in `note`."""

    num_steps: int
    flops: float  # of the whole run, all ranks
    memory_bytes: float  # per rank, at the peak
    checkpoint_bytes: float  # one checkpoint
    gpu_hours: float | None  # None where the GPU's speed is unknown
    note: str
    num_checkpoints: int = 2  # of a complete run
    memory: Mapping[str, float] = {}  # the parts of memory_bytes
    recipe: str = ""  # learning rate and its like, with what they are computed from
    sharding: str = ""  # how the state is spread over the ranks, and why
    reason: str = ""
    traffic: spread.Traffic | None = None  # of one step and rank
    scaling: Mapping[str, Mapping[int, float]] = {}  # way of sharding -> nodes -> seconds of a step for traffic, at this share of the batch


class PrepareConfig(Settings):
    """`equissl.prepare`: write a labelled data set as WebDataset shards with an index and a manifest."""

    source: Literal["photographs"] = "photographs"  # those that scikit-image and scikit-learn ship; class = photograph
    patch_size: Annotated[int, Field(ge=16, le=192)] = 64  # pixels, side of the square patches; half of the smallest photograph has 192
    train_patches: Annotated[int, Field(ge=1)] = 256  # per photograph, from its left part
    val_patches: Annotated[int, Field(ge=1)] = 64  # per photograph, from its right part; no pixel is shared with the left
    samples_per_shard: Count = 1024
    seed: Seed = 0

    def check(self, world_size: int, upstream_configs: Mapping[str, Any]) -> None:
        if world_size != 1:
            raise ValueError(f"equissl.prepare is one process, not {world_size}: use resources {{gpus: 0}}")


DataSetName = Literal["imagenet1k", "cifar10", "cifar100", "fgvc_aircraft", "oxford_pets", "food101", "flowers102", "inat18"]


class FakeConfig(Settings):
    """`equissl.fake`: write tiny data sets in the true formats of the evaluations', to rehearse with."""

    data_sets: Annotated[tuple[DataSetName, ...], BeforeValidator(_pair), Field(min_length=1)] = get_args(DataSetName)
    classes: Annotated[int, Field(ge=1, le=10)] = 3  # the smallest has ten
    images: Annotated[int, Field(ge=1, le=1000)] = 4  # of every class, in every split
    side: Annotated[int, Field(ge=8, le=1024)] = 48  # pixels of the short side, but CIFAR's 32
    seed: Seed = 0

    @model_validator(mode="after")
    def _batches(self) -> Self:
        if "cifar10" in self.data_sets and self.classes * self.images < 5:
            raise ValueError(f"classes times images is {self.classes * self.images}: CIFAR-10 has 5 batches, of at least an image each")
        return self

    def check(self, world_size: int, upstream_configs: Mapping[str, Any]) -> None:
        if world_size != 1:
            raise ValueError(f"equissl.fake is one process, not {world_size}: use resources {{gpus: 0}}")


BANK = 8192  # images whose features a pretraining keeps, for its nearest neighbours on the way (`monitor`)
SYNTHETIC = "synthetic"  # the name of the data set that is none


def is_stream(data: str) -> bool:
    """A URL or a pipe: read through webdataset, without an index."""
    return data.startswith("pipe:") or "://" in data


class Stage(Settings):
    """Copy the shards to the node before they are read, as many as fit; the others are read where they are."""

    to: str = "/dev/shm"
    budget_gb: Positive  # 10⁹ bytes per node; of /dev/shm it is the node's memory


class BuildConfig(Settings):
    """`equissl.build` and `equihpc data build`: write a data set from images that are somewhere already. One class for all sources:
    they differ in what lies at `source`, not in settings.

    There is no manifest yet by which the images could be named: `source` enters the identity as it is written.
    """

    source: Annotated[str, Field(min_length=1)]  # a folder, an archive, a list, or module:function, which yields images
    # folder: SPLIT/CLASS/images or CLASS/images; imagenet: the official archives in one folder; cifar: its own files; list: .tsv, .csv
    # or .jsonl of path, label, split; shards: WebDataset's or ours. auto: by what lies there
    kind: Literal["auto", "folder", "imagenet", "cifar", "shards", "list", "iterable"] = "auto"
    name: str | None = None  # of the data set; None: imagenet1k, cifar10, cifar100, else as its folder or source is called
    split: str | None = None  # of all images, where the source has no splits; None: train
    shard_mb: Positive = 256  # 10^6 bytes
    seed: Seed = 0  # of the order of the images

    num_workers: Count | None = Operational(None)  # processes; None: two for each core, for they wait for the disk, but not over 32

    def check(self, world_size: int, upstream_configs: Mapping[str, Any]) -> None:
        if world_size != 1:
            raise ValueError(f"equissl.build is one process, which starts its own, not {world_size}: use resources {{gpus: 0}}")
        if self.kind != "iterable" and not self.source.startswith(("/", "~")) and ("/" in self.source or ":" not in self.source):
            raise ValueError(f"source {self.source!r} is relative, but a job runs in another folder: give the whole path")


class PretrainConfig(Settings):
    """`equissl.pretrain`: one self-supervised pretraining."""

    # synthetic: noise that is drawn once, to measure the model's speed without the input's
    data: Annotated[str, Field(json_schema_extra={"data": True, "builtin": ["photographs", "synthetic"]})]
    backbone: Annotated[Backbone, BeforeValidator(_named)] = Backbone()
    image_size: Count | None = None  # pixels, side of the global views; None: the backbone's
    method: Method = IBOT()
    transformation: Annotated[AnyTransformation | None, BeforeValidator(_named)] = None
    auxiliary: Annotated[AnyAuxiliary | None, BeforeValidator(_auxiliary)] = None
    # What Table 2 calls the augmentation. all: crops, flips and colours of the method's recipe, then g. rot: "rotation as the sole
    # augmentation": both views show the same uncoloured square and g, which must be rot, turns the second. g: the same with any
    # transformation, for SIE(color), SIE(blur) and so on. The paper does not say whether `rot` still crops, flips or has local
    # crops: ours does not (what is seen is the middle that g leaves, so it depends on g). rot and g fill what `method.views` leaves
    # open; the filled values are the identity.
    augmentation: Literal["all", "rot", "g"] = Operational("all")
    epochs: Positive | None = None
    num_steps: Count | None = None  # instead of epochs
    batch: Count  # global: samples per step over all ranks
    group_size: Count = 8  # samples that share one draw of masks and drop path; a rank holds whole groups
    seed: Seed = 0

    # fast: decode once, crop as uint8, colour in batch on the device; reference: PIL and torchvision for each sample, to compare with
    pipeline: Literal["fast", "reference"] = Neutral("fast")
    stream_images: Count | None = Neutral(None)  # images that make an epoch, where `data` is a URL or a pipe that cannot be indexed

    stage: Stage | None = Operational(None)
    # loader processes per rank, at most one per core; 1, 2, 3, 4, 6 and 12 share no reading. 0: in the rank itself
    num_workers: Annotated[int, Field(ge=0)] = Operational(6)
    max_bad_samples: Unit = Operational(0.01)  # fraction of a rank's samples that may be undecodable, and are replaced; ten always may
    log_every: Count = Operational(10)  # steps
    picture_every: Count = Operational(500)  # steps
    monitor_every: Count = Operational(100)  # steps between two figures of k-NN and effective rank, which are dearer than the others
    profile_steps: Annotated[tuple[int, int], BeforeValidator(_pair)] | None = Operational(None)  # (first, last) of an attempt, from 1 on
    spike_factor: Annotated[float, Field(gt=1)] | None = Operational(3.0)  # a loss over this times its running median is warned of
    # of the run (but ten logged steps at least): a loss that over such a part is no lower than over the one before is warned of, where
    # the features are nearly alike
    progress_part: Annotated[float, Field(gt=0, le=0.25)] | None = Operational(0.05)
    startup_timeout_s: Positive = Operational(300.0)  # for a collective between GPUs until the first step is through: compiling
    step_timeout_s: Positive = Operational(120.0)  # and after it; a lost shard is waited for a minute
    # steps that are lost at most where a run is killed without a word: it saves a tenth earlier, and has that tenth to write
    checkpoint_every: Count = Operational(500)
    compile: bool | None = Operational(None)  # blocks, heads and decoders by torch.compile; None: on GPUs
    keep_checkpoints: Count = Operational(2)
    milestone_every: Count | None = Operational(None)  # steps; these checkpoints are never removed

    # replicate: whole on every rank; shard: over all ranks; hybrid: inside a node; auto: by model, ranks and memory, see `spread`
    sharding: Literal["auto", "none", "replicate", "shard", "hybrid"] = Operational("auto")
    precision: Literal["auto", "float32", "bfloat16"] = Neutral("auto")  # of the computation; auto: bfloat16 on GPUs, float32 elsewhere
    # blocks that are computed again in the backward pass instead of kept; selective: every second one
    activation_checkpointing: Literal["none", "selective", "full"] = Operational("none")
    accumulate: Count = Operational(1)  # parts in which each rank works through its share of a batch

    @property
    def side(self) -> int:
        return self.image_size or self.backbone.facts.image_size

    def method_as(self, kind: type[M]) -> M:
        """The method's settings, which are known to be of this kind."""
        assert isinstance(self.method, kind)
        return self.method

    @property
    def num_patches(self) -> int:
        """Of a global view."""
        return self.backbone.facts.patches(self.side)

    @property
    def d_equi(self) -> int:
        """Width of the equivariant part; 0 without a split, which an auxiliary needs, and some methods."""
        if self.auxiliary is None:
            return self.method.recipe_d if self.method.always_splits else 0
        return self.auxiliary.d or self.method.recipe_d

    @property
    def d_head(self) -> int:
        """Of `d_equi`, what the method's head gives; 0 where it is a part of the representation."""
        return self.d_equi if self.auxiliary is not None and self.auxiliary.split_at == "head_output" else 0

    @property
    def d_split(self) -> int:
        """Of `d_equi`, what is a part of the representation; 0 without such a split."""
        return self.d_equi - self.d_head

    @property
    def d_inv(self) -> int:
        """Width of what a method's heads read: the invariant part, or the plain tokens where the representation is not split."""
        return self.method.representation - self.d_split if self.d_split else self.backbone.facts.dim

    @property
    def num_augmentation_parameters(self) -> int:
        """What describes the augmentation of a global view, see `augmentation`: blur and solarization where one of them can have it, g."""
        both = (self.method.views.global1, self.method.views.global2)
        can_blur, can_solarize = any(view.blur > 0 for view in both), any(view.solarize > 0 for view in both)
        return 15 + 2 * can_blur + can_solarize + (0 if self.transformation is None else self.transformation.num_parameters)

    @property
    def num_targets(self) -> int:
        """Images to reconstruct; 0 without an auxiliary."""
        return 0 if self.auxiliary is None else len(self.auxiliary.fractions)

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("augmentation") not in ("rot", "g"):
            return values
        method = _named(values.get("method", cls.model_fields["method"].default))
        name = method.get("name") if isinstance(method, dict) else getattr(method, "name", None)
        kind = next((kind for kind in get_args(get_args(Method)[0]) if kind.model_fields["name"].default == name), IBOT)
        known = type(kind.model_fields["views"].default).model_fields
        return {**values, "method": _under(method, {"views": {key: value for key, value in G_ALONE.items() if key in known}})}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.augmentation == "rot" and not isinstance(self.transformation, Rotation):
            name = self.transformation and self.transformation.name
            raise ValueError(
                f"augmentation rot is rotation alone, but the transformation is {name}: choose transformation rot, or augmentation g"
            )
        if self.augmentation == "g" and self.transformation is None:
            raise ValueError(
                "augmentation g is the transformation alone, but there is none: choose one of rot, trans, se2, color, blur, all"
            )
        facts, views = self.backbone.facts, self.method.views
        if (self.epochs is None) == (self.num_steps is None):
            raise ValueError(f"give one of epochs (now {self.epochs}) and num_steps (now {self.num_steps})")
        if is_stream(self.data) != (self.stream_images is not None):
            raise ValueError(
                f"stream_images is {self.stream_images} and data {self.data!r}: a stream (pipe:… or a URL) needs the number of images"
                " that make an epoch, a data set with a manifest has its own"
            )
        if is_stream(self.data) and (self.stage is not None or self.pipeline != "fast"):
            raise ValueError(f"data {self.data!r} is a stream: it cannot be staged, and has no pipeline but fast")
        if self.data == SYNTHETIC and (self.num_steps is None or self.stage is not None or self.pipeline != "fast"):
            raise ValueError(f"data {self.data!r} has no epochs, files or decoding: give num_steps, no stage, and no pipeline but fast")
        if facts.kind == "resnet":
            self._on_a_resnet()
        if self.side % facts.patch_size:
            raise ValueError(f"image_size {self.side} is not a multiple of the patch size {facts.patch_size}")
        if views.num_local and views.local_size % facts.patch_size:
            raise ValueError(f"method.views.local_size {views.local_size} is not a multiple of the patch size {facts.patch_size}")
        if self.profile_steps is not None and not 2 <= self.profile_steps[0] <= self.profile_steps[1]:
            raise ValueError(
                f"profile_steps is {list(self.profile_steps)}; it must be two steps with 2 <= first <= last, for the one before warms up"
            )
        if self.compile and facts.kind == "resnet":
            raise ValueError(
                "compile is true, but the batch norms of a ResNet speak to other ranks inside it, which is no graph: leave it out"
            )
        if self.batch % self.group_size:
            raise ValueError(f"batch {self.batch} is not a multiple of group_size {self.group_size}")
        if self.backbone.drop_path_mode == "batch":
            for kind, num in (("global", self.method.num_global), ("local", views.num_local)):
                if self.backbone.drop_path and num and self.backbone.kept(crops := num * self.group_size) == crops:
                    raise ValueError(
                        f"backbone.drop_path {self.backbone.drop_path} in mode batch leaves out none of the {crops} {kind} crops of a"
                        f" group: give a rate of at least {1 / crops:.3g}, a larger group_size (now {self.group_size}), or mode sample"
                    )
        if self.auxiliary is not None:
            if self.transformation is None and self.auxiliary.needs_transformation:
                raise ValueError(
                    f"auxiliary {self.auxiliary.name} needs a transformation to reconstruct along; choose one of"
                    f" {choices(AnyTransformation)}"
                )
            if not self.method.token_objective:
                raise ValueError(f"auxiliary needs patch tokens of two global views, which method {self.method.name} does not have")
            if self.d_head and not self.method.head_splits:
                splits = [kind.model_fields["name"].default for kind in get_args(get_args(Method)[0]) if kind.head_splits]
                reason = "splits the representation itself" if self.method.always_splits else "has no head with equivariant outputs"
                raise ValueError(
                    f"auxiliary.split_at is head_output, but method {self.method.name} {reason}: choose split_at representation, or one of"
                    f" {', '.join(splits)}"
                )
            if self.d_split >= self.method.representation:
                raise ValueError(
                    f"auxiliary.d {self.d_equi} must be smaller than method.representation {self.method.representation}"
                    " (what is left is the invariant part)"
                )
            stages = len(self.auxiliary.decoder_widths)
            if 2**stages != facts.patch_size:
                raise ValueError(
                    f"auxiliary.decoder_widths has {stages} stages, each doubles the side: that makes {2**stages} pixels of a patch,"
                    f" but the backbone's patch size is {facts.patch_size}"
                )
        self.method.check(self)
        return self

    def _on_a_resnet(self) -> None:
        """Raises ValueError for what asks for more than one feature of an image."""
        name, vits = self.backbone.name, ", ".join(name for name, facts in BACKBONES.items() if facts.kind == "vit")
        if self.auxiliary is not None:
            raise ValueError(f"auxiliary needs patch tokens, and backbone {name} has none: choose one of {vits}, or auxiliary null")
        if self.method.has_masks:
            raise ValueError(f"method {self.method.name} hides patches, and backbone {name} has none: choose one of {vits}")
        if self.method.optimizer.patch_embed_lr != 1.0:
            raise ValueError(
                f"method.optimizer.patch_embed_lr is {self.method.optimizer.patch_embed_lr}, but backbone {name} has no patch embedding:"
                " leave it out"
            )

    def check(self, world_size: int, upstream_configs: Mapping[str, Any]) -> None:
        """Raises ValueError for what single fields cannot say."""
        share = world_size * self.accumulate * self.group_size
        if self.batch % share:
            in_parts = f" in {self.accumulate} parts each" if self.accumulate > 1 else ""
            raise ValueError(
                f"batch {self.batch} cannot be shared by {world_size} processes{in_parts} in whole groups of {self.group_size}:"
                f" it must be a multiple of {share}"
            )
        if self.accumulate > 1 and not self.method.accumulates:
            raise ValueError(f"accumulate is {self.accumulate}, but the loss of {self.method.name} couples a batch: it must be 1")
        self.method.check_part(self, self.batch // (world_size * self.accumulate))
        if self.sharding == "none" and world_size > 1:
            raise ValueError(f"sharding none is one process, not {world_size}: choose auto, replicate, shard or hybrid")

    def choose_sharding(self, world_size: int, ranks_per_node: int, memory_bytes: float | None) -> spread.Choice:
        """Of a run on so many ranks. `memory_bytes`: of one GPU; None on CPUs. Raises ValueError where they cannot be spread as asked."""
        from equissl.estimates import sharding_model

        model = sharding_model(self, world_size, on_gpu=memory_bytes is not None)
        return spread.choose(self.sharding, model, world_size, ranks_per_node, memory_bytes)

    def steps_per_epoch(self, num_images: int) -> int:
        """An epoch is floor(N/B) steps. Raises ValueError for fewer images than one batch."""
        if num_images < self.batch:
            raise ValueError(f"the data set has {num_images} images, fewer than one batch of {self.batch}")
        return num_images // self.batch

    def total_steps(self, num_images: int) -> int:
        return self.num_steps or max(1, round((self.epochs or 0) * self.steps_per_epoch(num_images)))

    def estimate(self, gpu: Mapping[str, Any], world_size: int, upstream_configs: Mapping[str, Any]) -> Estimate | None:
        """Cost on GPUs of the profile's kind; None where the number of images is unknown.

        `gpu`: the profile's section (`tflops`, `memory_gib`, `node_gb_s`, `network_gb_s`, any of which may be missing; on CPUs all
        are), and `ranks_per_node`, where the ranks are on several.
        """
        from equissl.estimates import estimate_pretraining

        return estimate_pretraining(self, gpu, world_size)


# --- evaluations -------------------------------------------------------------------------------------------------------


class KNN(Settings):
    """Weighted k-NN on L2-normalised features (Wu et al. 2018, as in DINO and iBOT)."""

    name: Literal["knn"] = "knn"
    k: Annotated[Counts, Field(min_length=1)] = (10, 20, 100, 200)
    temperature: Positive = 0.07


Predicted = Literal["rotation", "colour", "blur", "translation"]
RANGES_OF: dict[str, type[Settings]] = {"rotation": Turned, "colour": Coloured, "blur": Blurred, "translation": Shifted}


class Drawn(Turned, Shifted, Coloured, Blurred):
    """Transformations that an evaluation draws, each in its range."""

    transformations: Annotated[tuple[Predicted, ...], BeforeValidator(_pair), Field(min_length=1)]

    @model_validator(mode="after")
    def _different(self) -> Self:
        if len(set(self.transformations)) < len(self.transformations):
            raise ValueError(f"transformations are {list(self.transformations)}; each may stand there once")
        return self

    @model_validator(mode="after")
    def _used(self) -> Self:
        # by value: a config that was resolved, and read again, has all of them set
        for name in sorted(RANGES_OF.keys() - set(self.transformations)):
            for field, info in RANGES_OF[name].model_fields.items():
                if (value := getattr(self, field)) != info.default:
                    raise ValueError(
                        f"{field} is {value}, but {name} is not among the transformations {list(self.transformations)} and nothing would"
                        f" use it: add {name} to transformations, or leave {field} at {info.default}"
                    )
        return self


class R2(Drawn):
    """R² of transformation parameters from the frozen features of both views (SIE's protocol; EVALS with leak controls)."""

    name: Literal["r2"] = "r2"
    # drawn in their ranges, each with probes of its own
    transformations: Annotated[tuple[Predicted, ...], BeforeValidator(_pair), Field(min_length=1)] = Neutral(("rotation", "translation"))
    # what is read of each view. backbone: CLS ‖ mean patch; inv: the same of z_inv; equi: the mean patch of z_equi
    part: Literal["backbone", "inv", "equi"] = Neutral("backbone")
    hidden: Count = 1024
    base_lr: Positive = 1e-3
    batch: Count = 256
    epochs: Count = 300
    pairs_per_image: Count = 1  # transformed views drawn per training image
    weight_decay: NonNegative = 0.0  # decoupled
    held_out: BelowOne = 0.0  # fraction of the training images that chooses the epoch; 0: the last one
    num_train_images: Count | None = None  # a random part of the training images; None: all
    num_val_images: Several | None = None


class Equivariance(Drawn):
    """How much features change under a transformation, and how much of the change is a linear function of features and parameters;
    EquiMod's own measures where the pretraining has it; images decoded at fractions never trained on where it has decoders."""

    name: Literal["equivariance"] = "equivariance"
    transformations: Annotated[tuple[Predicted, ...], BeforeValidator(_pair), Field(min_length=1)] = (
        "rotation",
        "translation",
        "colour",
        "blur",
    )
    num_components: Count = 64  # principal components of the features whose change is predicted, and that predict it
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.2  # fraction of the training images that chooses the ridge
    num_train_images: Count | None = 10000  # a random part of the training images; None: all
    num_val_images: Several | None = 5000


class OnFeatures(Settings):
    """What classifiers on frozen features read, and what is held out of the training images to choose among them."""

    # backbone: its own tokens after the last norm; inv: z_inv, the part that the pretraining's method read
    part: Literal["backbone", "inv"] = "backbone"
    held_out: BelowOne = 0.1  # fraction of the training images, where the data set has no split to choose on
    dtype: Literal["float32", "float16"] = "float32"  # as features are kept


class Linear(OnFeatures):
    """Linear heads on frozen features, one for each learning rate, number of blocks and with or without the mean patch, trained
    together (Oquab et al. 2023). The defaults are DINOv2's."""

    name: Literal["linear"] = "linear"
    blocks: Annotated[Counts, Field(min_length=1)] = (1, 4)  # a head reads the CLS tokens of so many last blocks
    mean_patch: Annotated[tuple[bool, ...], BeforeValidator(_pair), Field(min_length=1)] = (False, True)  # and the last one's mean patch
    # of a batch of 256, linear in `batch`
    base_lrs: Annotated[tuple[Positive, ...], BeforeValidator(_pair), Field(min_length=1)] = (
        *(1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1),
    )
    optimizer: Literal["sgd", "adamw"] = "sgd"  # with momentum 0.9; with betas 0.9, 0.999
    weight_decay: NonNegative = 0.0  # of sgd added to the gradient, of adamw decoupled; biases have none
    batch: Count = 1024  # of all processes; where there are fewer images, all of them
    epochs: Count = 10
    # whether each epoch sees random crops of its own, mirrored half of the time: a forward pass over the training images for each epoch;
    # else the middle of each image: one forward pass in all, and features that are kept
    augment: bool = True

    @model_validator(mode="after")
    def _heads(self) -> Self:
        for field in ("blocks", "mean_patch", "base_lrs"):
            values = getattr(self, field)
            if len(set(values)) < len(values):
                raise ValueError(f"{field} is {list(values)}; each may stand there once")
        if self.part == "inv" and self.blocks != (1,):
            raise ValueError(f"part inv is of the last block, but blocks are {list(self.blocks)}: give blocks [1]")
        return self


class Logistic(OnFeatures):
    """Logistic regression by L-BFGS, the strength of its penalty chosen on held-out training images. The defaults are DINOv2's."""

    name: Literal["logistic"] = "logistic"
    mean_patch: bool = False  # CLS ‖ mean patch, else CLS
    num_c: Count = 45  # strengths, in equal steps of the logarithm
    log10_c: Pair = (-6.0, 5.0)
    max_iterations: Count = 1000
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        if self.log10_c[0] >= self.log10_c[1]:
            raise ValueError(f"log10_c is {list(self.log10_c)}; the first must be smaller than the second")
        return self


class Projector(Settings):
    """Features of validation images and of transformed views of them, for TensorBoard's embeddings projector."""

    name: Literal["projector"] = "projector"
    transformation: Annotated[AnyTransformation, BeforeValidator(_named)] = All(border="inside")
    num_images: Count = 200
    views: Count = 4  # of each image, transformed
    sprite: Count = 32  # pixels a side of a point's picture


Task = Annotated[KNN | R2 | Linear | Logistic | Equivariance | Projector, Field(discriminator="name")]

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {
        "knn": {},
        "r2": {"transformations": ["rotation", "colour", "blur", "translation"]},  # the columns of Table 2
        # AdamW, batch 1024, CLS or CLS ‖ mean patch of the last block; learning rates and length are not stated: DINOv2's
        "linear": {"blocks": [1], "optimizer": "adamw"},
        "logistic": {},
        "equivariance": {},
        "projector": {},
    },
    # CLS of the last four blocks, or CLS ‖ mean patch of the last; 100 epochs
    "ibot": {"knn": {}, "linear": {"epochs": 100}},
    "dinov2": {"knn": {}, "linear": {}, "logistic": {}},
    "smoke": {
        "knn": {"k": [5, 10, 20]},
        # a thousand pairs cannot feed the paper's MLP: a smaller one, decayed, stopped where held-out images say so
        "r2": {
            "hidden": 128,
            "batch": 64,
            "epochs": 30,
            "weight_decay": 0.1,
            "held_out": 0.2,
            "num_train_images": 1000,
            "num_val_images": 500,
        },
        "linear": {"blocks": [1, 2], "base_lrs": [1e-3, 1e-2, 0.1, 1.0], "batch": 64, "epochs": 20, "augment": False, "held_out": 0.2},
        "logistic": {"num_c": 12, "max_iterations": 100, "held_out": 0.2},
        "equivariance": {"num_components": 16, "num_train_images": 500, "num_val_images": 200},
        "projector": {"num_images": 60},
    },
}


TIMM_VIT = re.compile(r"(vit_(?:tiny|small|base|large|huge)_patch)(\d+)_(\d+|dinov2)")  # a plain one; the last number is the image's side
DINOV2 = {"image_size": 518, "layer_scale": 1e-5}  # what timm's names of DINOv2's models stand for


class TimmModel(Settings):
    """An encoder by timm's name: a plain vision transformer, with its patch and image size, or a ResNet.

    Behind a point stands what it is told apart by: vit_base_patch16_224.dino, vit_large_patch14_dinov2.lvd142m, resnet50.mine
    """

    name: str
    image_size: Count | None = None  # pixels; position embeddings are interpolated. None: as in the name
    depth: Count | None = None  # blocks; None: as in the name
    layer_scale: Positive | None = None  # at the start, where that is drawn; None: without LayerScale, or DINOv2's by the name
    stem: Literal["imagenet", "cifar"] = "imagenet"  # of a ResNet

    @model_validator(mode="after")
    def _known(self) -> Self:
        self.as_pretraining()
        return self

    def as_pretraining(self) -> PretrainConfig:
        """The config of a pretraining with this encoder. Raises ValueError for a name or a size that is none."""
        model = self.name.partition(".")[0]
        values: dict[str, Any] = {"name": model, "depth": self.depth, "layer_scale": self.layer_scale, "stem": self.stem}
        side = None
        if match := TIMM_VIT.fullmatch(model):
            stands_for = DINOV2 if match[3] == "dinov2" else {"image_size": int(match[3])}
            side = stands_for["image_size"]
            known = next(name for name in BACKBONES if name.startswith(match[1]))
            values |= {"name": known, "patch_size": int(match[2]), "layer_scale": self.layer_scale or stands_for.get("layer_scale")}
        elif model not in BACKBONES:
            raise ValueError(
                f"unknown model {model!r}: choose from {', '.join(BACKBONES)}, with any patch and image size in the name of a vision"
                " transformer (vit_small_patch8_224), or vit_small_patch14_dinov2 and its like"
            )
        backbone = {key: value for key, value in values.items() if value is not None}
        # a method without masks and split: neither a mask token nor parts are in published weights
        return PretrainConfig.model_validate(
            {
                "data": "published",
                "backbone": backbone,
                "image_size": self.image_size or side,
                "method": "vicreg",
                "batch": 8,
                "num_steps": 1,
            }
        )


class PublishedEncoder(Published, TimmModel):
    """An encoder that others have published, to be evaluated as it is."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        self.as_pretraining().backbone.check_kind(self)
        return self


class UntrainedConfig(TimmModel):
    """`equissl.untrained`: an encoder with drawn weights, in a file as others publish theirs: a control for every evaluation."""

    seed: Seed = 0

    def check(self, world_size: int, upstream_configs: Mapping[str, Any]) -> None:
        if world_size != 1:
            raise ValueError(f"equissl.untrained is one process, not {world_size}: use resources {{gpus: 0}}")


def is_reference(folder: str) -> bool:
    """Whether it stands for the folder of a run of the same job."""
    return folder.startswith("${")


class EvaluateConfig(Settings):
    """`equissl.evaluate`: one task on one encoder, of a pretraining or published by others."""

    # a pretraining's run folder, or what `equihpc export` made of one
    checkpoint: Annotated[str | None, Field(json_schema_extra={"reference": True})] = None
    published: PublishedEncoder | None = Neutral(None)  # instead of checkpoint
    # also a run that is not complete: the teacher of its newest checkpoint, and the result says so
    allow_incomplete: bool = Operational(False)
    task: Task
    # None: the pretraining's, or what the profile calls `data_set`. A folder of shards with the splits train and val, or of `data_set`
    data: Annotated[str | None, Field(json_schema_extra={"data": True, "builtin": ["photographs"], "format": "data_set"})] = None
    # `data` are this data set, in its authors' format or as shards; its own splits are trained, chosen and tested on
    data_set: DataSetName | None = Neutral(None)
    preset: Literal["paper", "ibot", "dinov2", "smoke"] = Operational(
        "paper"
    )  # fills what `task` leaves open; the filled values are the identity
    seed: Seed = 0
    # of forward passes; auto: bfloat16 on GPUs, float32 elsewhere, and where features in bfloat16 differ too much
    precision: Literal["auto", "float32", "bfloat16"] = Neutral("auto")

    batch: Count = Operational(256)  # images per forward pass and rank
    num_workers: Annotated[int, Field(ge=0)] = Operational(6)
    # a folder of features that evaluations of the same weights share; None: .features beside the pretraining's run folder, or beside the
    # evaluation's own where there is none; "none": no cache
    cache: str | None = Operational(None)
    cache_gb: Positive = Operational(200.0)  # 10^9 bytes; beyond them what was not used for the longest time is removed

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        """`task: knn` and the preset's values under the user's own; `data_set: cifar10` is the data set that is called so."""
        if not isinstance(values, dict):
            return values
        if values.get("data") is None and values.get("data_set") is not None:
            values = {**values, "data": values["data_set"]}
        if "task" not in values:
            return values
        task = _named(values["task"])
        if isinstance(task, dict):
            name, tasks = values.get("preset", "paper"), {}
            if isinstance(name, str):
                tasks = PRESETS.get(name, {})
            known = any(task.get("name") in each for each in PRESETS.values())
            if known and tasks and task["name"] not in tasks:
                raise ValueError(f"preset {name} has no values for the task {task['name']}; it has them for {', '.join(tasks)}")
            task = {**tasks.get(task.get("name", ""), {}), **task}
        return {**values, "task": task}

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.precision == "bfloat16" and isinstance(self.task, Equivariance):
            raise ValueError("precision is bfloat16, but equivariance measures small changes, which its rounding would hide: leave it out")
        if (self.checkpoint is None) == (self.published is None):
            raise ValueError(
                "give one of checkpoint (the folder of a pretraining or an export) and published (weights of others, by model and file),"
                f" not {'both' if self.published else 'neither'}"
            )
        if self.published is None:
            return self
        if self.data is None:
            raise ValueError("published weights know no data set of ours: give data")
        if self.allow_incomplete:
            raise ValueError("allow_incomplete is of a pretraining that is not complete, but the weights are published: leave it out")
        self._check_part(self.published.as_pretraining())
        return self

    def _check_part(self, pretraining: PretrainConfig) -> None:
        part = getattr(self.task, "part", "backbone")
        if part != "backbone" and not pretraining.d_split:
            raise ValueError(
                f"task.part is {part}, but "
                + ("published weights have" if self.published else "the pretraining's representation has")
                + " no invariant and equivariant part: give part backbone"
            )

    def pretraining(self, upstream_configs: Mapping[str, Any]) -> PretrainConfig | None:
        """What the encoder is, where it can be told before: of a stage, of a folder that is there, of published weights."""
        if self.published is not None:
            return self.published.as_pretraining()
        assert self.checkpoint is not None
        if is_reference(self.checkpoint):
            config = upstream_configs.get(self.checkpoint.removeprefix("${").removesuffix("}"))
        else:
            path = Path(self.checkpoint).expanduser() / "config.json"
            config = json.loads(path.read_text()) if path.is_file() else None
        try:
            return None if config is None else PretrainConfig.model_validate(config)
        except ValidationError as error:
            raise ValueError(f"checkpoint {self.checkpoint} is no pretraining: {error.errors()[0]['msg']}") from None

    def check(self, world_size: int, upstream_configs: Mapping[str, Any]) -> None:
        """Raises ValueError for a pretraining that saw no images, for one on a stream without a data set of the evaluation's own, and for
        a part that its representation does not have.

        Any number of processes can share the images.
        """
        if self.checkpoint is not None and is_reference(self.checkpoint):
            if self.allow_incomplete:
                raise ValueError(
                    f"allow_incomplete is true, but checkpoint {self.checkpoint} is a stage, which is waited for until it is complete: give"
                    " the folder of its run instead"
                )
        elif self.checkpoint is not None and not self.checkpoint.startswith(("/", "~")):
            raise ValueError(f"checkpoint {self.checkpoint!r} is relative, but a job runs in another folder: give the whole path")
        pretraining = self.pretraining(upstream_configs)
        data = self.data or ("" if pretraining is None else pretraining.data)
        if data == SYNTHETIC:
            raise ValueError(f"data {SYNTHETIC!r} is noise, to measure a pretraining's speed with: there is nothing to evaluate")
        if self.data is None and is_stream(data):
            raise ValueError(f"the pretraining's data {data!r} are a stream, which has no splits: give the evaluation its own `data`")
        if pretraining is not None:
            self._check_part(pretraining)
            if isinstance(self.task, Linear):
                pretraining.backbone.facts.require_blocks(self.task.blocks)

    @staticmethod
    def look(data_set: str, folder: Path) -> str:
        """The sha256 of `data` in a format of their own. Raises ValueError with what `equihpc data check` says."""
        from equissl.data.check import layout

        return layout(data_set, folder)

    def estimate(self, gpu: Mapping[str, Any], world_size: int, upstream_configs: Mapping[str, Any]) -> Estimate | None:
        """Forward passes of both splits; None where the number of images is unknown."""
        pretraining = self.pretraining(upstream_configs)
        if pretraining is None:
            return None
        from equissl.estimates import estimate_evaluation

        return estimate_evaluation(self, pretraining, gpu)
