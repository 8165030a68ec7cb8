"""What the auxiliaries can and cannot learn, with toy features whose information is known: the loss falls to its floor, and no lower.

Intermediate reconstruction: u = s · p, a pattern p of mean 1 and a brightness s, and g changes the brightness; every target is u times a
number, so that all floors have a formula. Cross-attention: g moves the patches to other places.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import tiny
import torch
import torch.nn.functional as F
from torch import Tensor

from equissl import transforms
from equissl.auxiliary import Auxiliary
from equissl.config import Color
from equissl.distributed import World

SIDE, PATCH = 8, 4
LOW, HIGH = 0.4, 0.6  # s
DELTA = 0.4  # largest change of brightness, as in the paper
AT = 1 / 2  # where on the path the target is
UNIT = 0.1  # in which images are told, less their mean 1/2: what decoders see is of order 1


class Drawn(NamedTuple):
    pattern: Tensor  # p: (b, 3, side, side)
    first: Tensor  # the views
    second: Tensor
    target: Tensor  # (1, b, 3, side, side)


def patterns(b: int, generator: torch.Generator) -> Tensor:
    """Smooth, of mean 1, in [0.8, 1.2]: no brightness here leaves [0, 1]."""
    coarse = 2 * torch.rand(b, 3, 5, 5, generator=generator) - 1
    smooth = F.interpolate(coarse, (SIDE, SIDE), mode="bilinear", align_corners=True)
    smooth = smooth - smooth.mean(dim=(1, 2, 3), keepdim=True)
    return 1 + 0.2 * smooth / smooth.abs().amax(dim=(1, 2, 3), keepdim=True)


def brighter(b: int, seed: int) -> Drawn:
    generator = torch.Generator().manual_seed(seed)
    p = patterns(b, generator)
    u = p * (LOW + (HIGH - LOW) * torch.rand(b, 1, 1, 1, generator=generator))
    g, parameters = transforms.get(Color(max_brightness=DELTA)), torch.zeros(b, 4)
    parameters[:, g.names.index("brightness")] = DELTA * (2 * torch.rand(b, generator=generator) - 1)
    first, second, target = ((g.apply(u, parameters, fraction, SIDE) - 0.5) / UNIT for fraction in (0.0, 1.0, AT))
    return Drawn(p, first, second, target[None])


def moved(b: int, seed: int) -> Drawn:
    """The second view: the patches of the first, rolled by as many rows and columns as a number of each image says."""
    generator = torch.Generator().manual_seed(seed)
    first = (patterns(b, generator) - 1) / UNIT
    rolls = torch.stack([first.roll((PATCH * rows, PATCH * columns), dims=(2, 3)) for rows in range(2) for columns in range(2)])
    second = rolls[torch.randint(4, (b,), generator=generator), torch.arange(b)]
    return Drawn(first, first, second, second[None])


def patches(images: Tensor) -> Tensor:
    """`(b, 3, S, S)` -> `(b, patches, 3 · patch²)`: the pixels themselves."""
    return F.unfold(images, PATCH, stride=PATCH).transpose(1, 2)


Tokens = tuple[Tensor, Tensor]


def equivariant(at: Drawn) -> Tokens:
    return patches(at.first), patches(at.second)


def invariant(at: Drawn) -> Tokens:
    """The pattern: the same for the whole orbit of an image under g, and all that is."""
    tokens = patches((at.pattern - 1) / UNIT)
    return tokens, tokens


def constant(at: Drawn) -> Tokens:
    return torch.ones_like(patches(at.first)), torch.ones_like(patches(at.second))


def unplaced(at: Drawn) -> Tokens:
    """All of the first view; of the second the mean of its patches, which is the same wherever these are."""
    first, second = equivariant(at)
    return first, second.mean(dim=1, keepdim=True).expand_as(second)


def trained(encode: Callable[[Drawn], Tokens], draw: Callable[[int, int], Drawn], world: World, method: str, steps: int = 300) -> Auxiliary:
    """Decoders of this toy encoder's features."""
    kind = {"auxiliary__num_images": 1, "auxiliary__include_final": False} if method == "vicreg" else {}
    decoders = {"auxiliary__d": 3 * PATCH**2, "auxiliary__decoder_widths": [64, 32]}
    backbone = {"image_size": SIDE, "backbone__patch_size": PATCH, "method__representation": 100}
    auxiliary = Auxiliary(tiny.config(method=method, **kind, **decoders, **backbone), world)
    auxiliary.initialise()
    optimizer = torch.optim.Adam(auxiliary.parameters())
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / steps)
        at = draw(128, step)
        optimizer.zero_grad()
        auxiliary(encode(at), at.target).term.backward()
        optimizer.step()
    return auxiliary


@torch.no_grad()
def loss(auxiliary: Auxiliary, tokens: Tokens, at: Drawn) -> float:
    return float(auxiliary(tokens, at.target).term)


def variance(at: Drawn) -> float:
    """Of the target's pixels."""
    return float(at.target.var(dim=1, correction=0).mean())


def floor_of_the_pattern(at: Drawn) -> float:
    """What is left of the target's variance when p is known: E p² · Var((1 + AT · delta) · s), of uniform and independent delta and s."""
    mean_s, square_s = (LOW + HIGH) / 2, (LOW**2 + LOW * HIGH + HIGH**2) / 3
    return float(at.pattern.square().mean()) * ((1 + (AT * DELTA) ** 2 / 3) * square_s - mean_s**2) / UNIT**2


def floor_of_places(at: Drawn) -> float:
    """The patches are known, their places are not: the variance over the patches."""
    return float(patches(at.first).var(dim=1, correction=0).mean())


NEW = 10**6  # a seed that no training has seen


def test_equivariant_features_let_the_loss_fall_to_its_floor_which_is_0(world: World) -> None:
    """The target is linear in both views. Decoders that get another sample's second view are wrong: they have learnt to read pairs."""
    auxiliary, at = trained(equivariant, brighter, world, "vicreg"), brighter(1024, NEW)
    first, second = equivariant(at)
    right = loss(auxiliary, (first, second), at)
    assert right < 0.1 * floor_of_the_pattern(at)
    assert loss(auxiliary, (first, second.roll(1, dims=0)), at) > 5 * right
    assert loss(auxiliary, (first.roll(1, dims=0), second), at) > 5 * right


def test_invariant_features_leave_the_variance_that_they_do_not_know(world: World) -> None:
    """Within the error of 1024 samples from below, and that of 300 steps from above."""
    at = brighter(1024, NEW)
    floor = floor_of_the_pattern(at)
    assert floor > 0.5 * variance(at)
    assert 0.95 * floor < loss(trained(invariant, brighter, world, "vicreg"), invariant(at), at) < 1.15 * floor


def test_constant_features_leave_all_of_the_variance(world: World) -> None:
    at = brighter(1024, NEW)
    assert 0.98 * variance(at) < loss(trained(constant, brighter, world, "vicreg"), constant(at), at) < 1.05 * variance(at)


def test_cross_attention_finds_where_the_patches_are(world: World) -> None:
    """From the second view's own tokens alone nothing can be decoded: another sample's first view gives another image."""
    auxiliary, at = trained(equivariant, moved, world, "vicreg_cross"), moved(1024, NEW)
    first, second = equivariant(at)
    right = loss(auxiliary, (first, second), at)
    assert right < 0.15 * floor_of_places(at)
    assert loss(auxiliary, (first.roll(1, dims=0), second), at) > 10 * right
    assert loss(auxiliary, (first, second.roll(1, dims=0)), at) > 10 * right


def test_cross_attention_cannot_place_what_the_second_view_does_not_place(world: World) -> None:
    at = moved(1024, NEW)
    floor = floor_of_places(at)
    assert floor > 0.5 * variance(at)
    assert 0.95 * floor < loss(trained(unplaced, moved, world, "vicreg_cross"), unplaced(at), at) < 1.15 * floor
