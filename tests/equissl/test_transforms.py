"""Transformations: torchvision's conventions, exact identity, linear paths, and no pixel from outside where that is promised."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as reference

from equissl import transforms
from equissl.config import SE2, AnyTransformation, Rotation, Transformation, Translation
from equissl.transforms.warp import PADDING, Rigid, rigid_warp, sampling_grid

KINDS: list[type[Transformation]] = [Rotation, Translation, SE2]
BILINEAR = InterpolationMode.BILINEAR


def image(side: int, seed: int = 0, batch: int = 3) -> Tensor:
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(seed))


def test_every_file_has_its_settings_and_the_other_way_round() -> None:
    kinds = get_args(get_args(AnyTransformation)[0])
    assert sorted(kind().name for kind in kinds) == transforms.names()
    with pytest.raises(ValueError, match=r"unknown transformation 'shear'; choose from rot, se2, trans"):
        transforms.get(Rotation.model_construct(name="shear"))  # type: ignore[arg-type]


@pytest.mark.parametrize("border", list(PADDING))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", [31, 32])
def test_contract_of_every_transformation(kind: Any, border: str, side: int) -> None:
    transform = transforms.get(kind(border=border))
    source_side = transform.source_side(side)
    assert source_side == side if border != "inside" else source_side > side
    source = image(source_side)
    parameters = transform.draw(0, 1, [5, 6, 7], side)
    assert parameters.shape == (3, len(transform.names))
    assert parameters.dtype == torch.float32
    margin = (source_side - side) // 2
    centre = source[..., margin : margin + side, margin : margin + side]
    assert torch.equal(transform.apply(source, parameters, 0.0, side), centre)
    assert torch.allclose(transform.apply(source, torch.zeros_like(parameters), 1.0, side), centre, atol=1e-5)
    view = transform.apply(source, parameters, 1.0, side)
    assert view.shape == (3, 3, side, side)
    assert not torch.allclose(view, centre, atol=0.05)
    # linear in the parameters; every image of the path is one resampling of the source
    assert torch.allclose(transform.apply(source, parameters, 0.25, side), transform.apply(source, parameters / 4, 1.0, side), atol=1e-5)
    # a sample does not depend on its batch
    assert torch.allclose(transform.apply(source[1:2], parameters[1:2], 1.0, side), view[1:2], atol=1e-6)


@pytest.mark.parametrize("angle", [-60.0, -13.5, 0.5, 45.0])
@pytest.mark.parametrize("side", [31, 32])
def test_rotation_is_torchvisions(angle: float, side: int) -> None:
    transform = transforms.get(Rotation(border="zero", max_degrees=90))
    source = image(side)
    ours = transform.apply(source, torch.full((3, 1), angle), 1.0, side)
    assert torch.allclose(ours, reference.rotate(source, angle, interpolation=BILINEAR), atol=1e-4)


@pytest.mark.parametrize(("x", "y"), [(3, 0), (0, 2), (-4, 1)])
def test_translation_is_torchvisions(x: int, y: int) -> None:
    transform = transforms.get(Translation(border="zero", max_pixels=100))
    source = image(32)
    ours = transform.apply(source, torch.tensor([[x, y]] * 3, dtype=torch.float32), 1.0, 32)
    theirs = reference.affine(source, angle=0, translate=[x, y], scale=1, shear=[0, 0], interpolation=BILINEAR)
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_se2_turns_first_then_shifts() -> None:
    source = image(33)
    parameters = torch.tensor([[30.0, 4.0, -3.0]] * 3)
    ours = transforms.get(SE2(border="zero", max_pixels=50)).apply(source, parameters, 1.0, 33)
    turned = rigid_warp(source, parameters[:, 0], torch.zeros(3), torch.zeros(3), 33, "zeros")
    shifted = rigid_warp(turned, torch.zeros(3), parameters[:, 1], parameters[:, 2], 33, "zeros")  # whole pixels: no second blur
    inner = (..., slice(8, 25), slice(8, 25))  # what the first of two warps has cut off does not come back
    assert torch.allclose(ours[inner], shifted[inner], atol=1e-4)
    assert not torch.allclose(ours[inner], turned[inner], atol=0.1)


def test_quarter_turns_are_exact_on_a_larger_source() -> None:
    transform = transforms.get(Rotation(max_degrees=180))
    source = image(transform.source_side(16))
    margin = (source.shape[-1] - 16) // 2
    turned = transform.apply(source, torch.full((3, 1), 90.0), 1.0, 16)
    expected = torch.rot90(source, 1, (2, 3))[..., margin : margin + 16, margin : margin + 16]
    assert torch.allclose(turned, expected, atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    side=st.integers(1, 64),
    max_degrees=st.floats(0.1, 180),
    max_pixels=st.floats(0.01, 60),
    at=st.tuples(*[st.floats(-1, 1)] * 3),
)
def test_inside_never_reads_outside(side: int, max_degrees: float, max_pixels: float, at: tuple[float, float, float]) -> None:
    """Whatever the padding says, the picture is the same: nothing outside is read, at the corners of the range least of all."""
    transform = transforms.get(SE2(max_degrees=max_degrees, max_pixels=max_pixels))
    assert isinstance(transform, Rigid)
    source_side = transform.source_side(side)
    corner = [[a * math.copysign(1, b) for a, b in zip(transform.limits(side), at, strict=True)]]
    inner = [[a * b for a, b in zip(transform.limits(side), at, strict=True)]]
    diagonal = [[min(45.0, max_degrees), *transform.limits(side)[1:]]]
    for chosen in (corner, inner, diagonal):
        parameters = torch.tensor(chosen, dtype=torch.float32)
        grid = sampling_grid(*parameters.unbind(1), side)
        assert grid.abs().max() <= (source_side - 1) / 2 + 1e-9
        ones = torch.ones(1, 1, source_side, source_side)
        assert torch.allclose(rigid_warp(ones, *parameters.unbind(1), side, "zeros"), torch.ones(1, 1, side, side), atol=1e-5)


@pytest.mark.parametrize("side", [16, 32, 96, 224])
def test_source_is_no_larger_than_needed(side: int) -> None:
    transform = transforms.get(SE2())
    assert isinstance(transform, Rigid)
    grid = sampling_grid(*torch.tensor([[45.0, *transform.limits(side)[1:]]]).unbind(1), side)
    assert grid.abs().max() > (transform.source_side(side) - 3) / 2  # two pixels less, the next of the same parity, are not enough


def test_borders_differ_only_near_the_edge() -> None:
    source = torch.ones(1, 1, 32, 32)
    angle = torch.tensor([[45.0]])
    zero = transforms.get(Rotation(border="zero")).apply(source, angle, 1.0, 32)
    reflect = transforms.get(Rotation(border="reflect")).apply(source, angle, 1.0, 32)
    assert zero[0, 0, 0, 0] == 0
    assert zero[0, 0, 16, 16] == 1
    assert torch.allclose(reflect, source, atol=1e-6)


def test_draws_are_pure_uniform_and_scaled_with_the_side() -> None:
    transform = transforms.get(SE2())
    many = transform.draw(3, 2, range(4000), 112)
    assert torch.equal(many[17:19], transform.draw(3, 2, [17, 18], 112))
    assert not torch.equal(many, transform.draw(4, 2, range(4000), 112))
    assert not torch.equal(many, transform.draw(3, 1, range(4000), 112))
    limit = torch.tensor([45.0, 5.0, 5.0])
    assert (many.abs() <= limit).all()
    assert torch.allclose(many.mean(dim=0) / limit, torch.zeros(3), atol=0.04)
    assert torch.allclose(many.std(dim=0) / limit, torch.full((3,), 3**-0.5), atol=0.02)
    assert transform.names == ("rotation", "translation_x", "translation_y")


def test_wrong_sources_are_refused() -> None:
    inside, zero = transforms.get(Rotation()), transforms.get(Rotation(border="zero"))
    parameters = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="at least 46 pixels"):
        inside.apply(torch.zeros(1, 3, 44, 44), parameters, 1.0, 32)
    with pytest.raises(ValueError, match="as odd or even"):
        inside.apply(torch.zeros(1, 3, 47, 47), parameters, 1.0, 32)
    with pytest.raises(ValueError, match="crop it first"):
        zero.apply(torch.zeros(1, 3, 46, 46), parameters, 1.0, 32)
