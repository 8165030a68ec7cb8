"""Transformations: torchvision's conventions, exact identity, straight paths, and no pixel from outside where that is promised."""

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
from equissl.config import LARGEST_SIGMA, SE2, All, AnyTransformation, Blur, Bordered, Color, Rotation, Transformation, Translation
from equissl.photometry import blur_radius
from equissl.transforms.base import centre
from equissl.transforms.warp import PADDING, rigid_warp, sampling_grid

KINDS: tuple[type[Any], ...] = get_args(get_args(AnyTransformation)[0])
# every transformation with every border it has; a blur that shows on a few pixels
CASES = [
    pytest.param(kind, {"border": border} if border else {}, id=f"{kind().name}-{border}")
    for kind in KINDS
    for border in (PADDING if issubclass(kind, Bordered) else [None])
]
WIDE = {"sigma": (4.0, 14.0)}
BILINEAR = InterpolationMode.BILINEAR
JITTER = (reference.adjust_brightness, reference.adjust_contrast, reference.adjust_saturation, reference.adjust_hue)


def made(kind: type[Transformation], **changes: Any) -> transforms.Transform:
    return transforms.get(kind(**(WIDE if "sigma" in kind.model_fields else {}), **changes))


def image(side: int, seed: int = 0, batch: int = 3) -> Tensor:
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(seed))


def test_every_file_has_its_settings_and_the_other_way_round() -> None:
    assert sorted(kind().name for kind in KINDS) == transforms.names()
    with pytest.raises(ValueError, match=r"unknown transformation 'shear'; choose from all, blur, color, rot, se2, trans"):
        transforms.get(Rotation.model_construct(name="shear"))  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "border"), CASES)
@pytest.mark.parametrize("side", [31, 32])
def test_contract_of_every_transformation(kind: Any, border: dict[str, Any], side: int) -> None:
    transform = made(kind, **border)
    source_side = transform.source_side(side)
    assert source_side > side if border.get("border") == "inside" else source_side == side
    source = image(source_side)
    before = source.clone()
    parameters = transform.draw(0, 1, [5, 6, 7], side)
    assert parameters.shape == (3, len(transform.names))
    assert parameters.dtype == torch.float32
    middle = centre(source, side)
    start = transform.apply(source, parameters, 0.0, side)
    assert torch.equal(start, middle)
    assert start.data_ptr() != source.data_ptr()  # whoever changes the one leaves the other alone
    assert torch.allclose(transform.apply(source, torch.zeros_like(parameters), 1.0, side), middle, atol=1e-5)
    view = transform.apply(source, parameters, 1.0, side)
    assert torch.equal(source, before)
    assert view.shape == (3, 3, side, side)
    assert -1e-5 <= view.min() <= view.max() <= 1 + 1e-5
    assert not torch.allclose(view, middle, atol=0.05)
    # the path is straight in the parameters; every image of it is made from the source
    assert torch.allclose(transform.apply(source, parameters, 0.25, side), transform.apply(source, parameters / 4, 1.0, side), atol=1e-5)
    # a path, not a jump: halving the step halves the change, or nearly so
    near, nearer = (transform.apply(source, parameters, fraction, side) - view for fraction in (0.96, 0.98))
    assert 0 < nearer.norm() < 0.8 * near.norm()
    # a sample does not depend on its batch
    for rows in ([1], [2, 0]):
        assert torch.allclose(transform.apply(source[rows], parameters[rows], 1.0, side), view[rows], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_moves_the_picture(kind: Any) -> None:
    transform = made(kind)
    source, drawn = image(transform.source_side(32)), transform.draw(0, 0, range(3), 32)
    still = transform.apply(source, torch.zeros_like(drawn), 1.0, 32)
    for number in range(len(transform.names)):
        alone = torch.zeros_like(drawn)
        alone[:, number] = drawn[:, number]
        assert not torch.allclose(transform.apply(source, alone, 1.0, 32), still, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_draws_are_pure_uniform_and_scaled_with_the_side(kind: Any) -> None:
    """Of each parameter and independent of the others."""
    transform = transforms.get(kind())
    many = transform.draw(3, 2, range(4000), 112)
    assert torch.equal(many[[18, 17]], transform.draw(3, 2, [18, 17], 112))
    assert not torch.equal(many, transform.draw(4, 2, range(4000), 112))
    assert not torch.equal(many, transform.draw(3, 1, range(4000), 112))
    table = {
        "rotation": (-45.0, 45.0),
        **dict.fromkeys(("translation_x", "translation_y"), (-5.0, 5.0)),
        **dict.fromkeys(("brightness", "contrast", "saturation"), (-0.4, 0.4)),
        "hue": (-0.1, 0.1),
        "sigma": (0.05, 1.0),
    }
    low, high = torch.tensor([table[name] for name in transform.names]).T
    assert torch.allclose(torch.tensor(transform.ranges(112)), torch.stack([low, high], dim=1))
    unit = (many - low) / (high - low)
    assert unit.min() >= -1e-6
    assert unit.max() <= 1 + 1e-6
    assert torch.allclose(unit.mean(dim=0), torch.full_like(low, 0.5), atol=0.02)
    assert torch.allclose(unit.std(dim=0), torch.full_like(low, 12**-0.5), atol=0.01)
    if len(transform.names) > 1:
        assert (torch.corrcoef(unit.T) - torch.eye(len(low))).abs().max() < 0.06  # 4000 samples: standard deviation 0.016


@pytest.mark.parametrize("kind", [kind for kind in KINDS if issubclass(kind, Bordered)])
@pytest.mark.parametrize("side", [15, 32])
def test_inside_shows_no_pixel_from_outside(kind: Any, side: int) -> None:
    """Around the smallest source that is allowed everything is painted NaN, which any weight but none would carry into the picture."""
    transform = made(kind)
    smallest = transform.source_side(side)
    low, high = torch.tensor(transform.ranges(side)).T
    parameters = torch.stack([low, high, *transform.draw(0, 0, range(6), side)])
    source = image(smallest, batch=len(parameters))
    painted = torch.nn.functional.pad(source, [4] * 4, value=torch.nan)
    on_the_way = {k / (num + 1) for num in range(1, 9) for k in range(1, num + 1)}  # of every number of targets that is allowed
    for fraction in (0.0, *sorted(on_the_way), 1.0):
        view = transform.apply(painted, parameters, fraction, side)
        assert torch.allclose(view, transform.apply(source, parameters, fraction, side), atol=1e-4)  # NaN is close to nothing


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
    source_side = transform.source_side(side)
    limits = [high for _, high in transform.ranges(side)]
    corner = [[a * math.copysign(1, b) for a, b in zip(limits, at, strict=True)]]
    inner = [[a * b for a, b in zip(limits, at, strict=True)]]
    diagonal = [[min(45.0, max_degrees), *limits[1:]]]
    for chosen in (corner, inner, diagonal):
        parameters = torch.tensor(chosen, dtype=torch.float32)
        grid = sampling_grid(*parameters.unbind(1), side)
        assert grid.abs().max() <= (source_side - 1) / 2 + 1e-9
        ones = torch.ones(1, 1, source_side, source_side)
        assert torch.allclose(rigid_warp(ones, *parameters.unbind(1), side, "zeros"), torch.ones(1, 1, side, side), atol=1e-5)


@pytest.mark.parametrize("side", [16, 32, 96, 224])
def test_source_is_no_larger_than_needed(side: int) -> None:
    transform = transforms.get(SE2())
    grid = sampling_grid(*torch.tensor([[45.0, *[high for _, high in transform.ranges(side)][1:]]]).unbind(1), side)
    assert grid.abs().max() > (transform.source_side(side) - 3) / 2  # two pixels less, the next of the same parity, are not enough


def test_borders_differ_only_near_the_edge() -> None:
    source = torch.ones(1, 1, 32, 32)
    angle = torch.tensor([[45.0]])
    zero = transforms.get(Rotation(border="zero")).apply(source, angle, 1.0, 32)
    reflect = transforms.get(Rotation(border="reflect")).apply(source, angle, 1.0, 32)
    assert zero[0, 0, 0, 0] == 0
    assert zero[0, 0, 16, 16] == 1
    assert torch.allclose(reflect, source, atol=1e-6)


def test_wrong_sources_are_refused() -> None:
    inside, zero = transforms.get(Rotation()), transforms.get(Rotation(border="zero"))
    parameters = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="at least 46 pixels"):
        inside.apply(torch.zeros(1, 3, 44, 44), parameters, 1.0, 32)
    with pytest.raises(ValueError, match="as odd or even"):
        inside.apply(torch.zeros(1, 3, 47, 47), parameters, 1.0, 32)
    with pytest.raises(ValueError, match="crop it first"):
        zero.apply(torch.zeros(1, 3, 46, 46), parameters, 1.0, 32)
    with pytest.raises(ValueError, match="without a border it must have 32 pixels"):
        transforms.get(Color()).apply(torch.zeros(1, 3, 34, 34), torch.zeros(1, 4), 1.0, 32)
    with pytest.raises(ValueError, match="at least 34 pixels"):
        transforms.get(Blur()).apply(torch.zeros(1, 3, 32, 32), parameters, 1.0, 32)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (Color, {"border": "reflect"}, "Extra inputs are not permitted"),
        (Color, {"max_hue": 0.6}, "less than or equal to 0.5"),
        (Blur, {"sigma": (2.0, 0.1)}, "two numbers with 0 <= low < high"),
        (Blur, {"sigma": (0.1, 70.5)}, r"sigma is \(0\.1, 70\.5\); .* <= 70, in pixels of a 224-pixel image"),
        (All, {"max_degrees": 0.0}, "greater than 0"),
    ],
)
def test_wrong_settings_are_refused(kind: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**changes)


def test_the_kernel_of_the_widest_blur_is_not_cut_off() -> None:
    """± 3 sigma at every side from 16 on; wider than the limit, it would be."""
    widest = transforms.get(Blur(sigma=(0.0, LARGEST_SIGMA)))
    for side in range(16, 513):
        assert widest.source_side(side) == side + 2 * math.ceil(3 * LARGEST_SIGMA * side / 224)
    assert blur_radius((LARGEST_SIGMA + 0.1) * 16 / 224, 16) < 3 * (LARGEST_SIGMA + 0.1) * 16 / 224


# --- colour, blur, all together ------------------------------------------------------------------------------------------


def jittered(sample: Tensor, parameters: Tensor, fraction: float) -> Tensor:
    for operation, value, identity in zip(JITTER, parameters.tolist(), (1, 1, 1, 0), strict=True):
        sample = operation(sample, identity + fraction * value)
    return sample


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), fraction=st.sampled_from([0.25, 1 / 3, 2 / 3, 1.0]))
def test_color_is_torchvisions(seed: int, fraction: float) -> None:
    """Brightness, contrast, saturation, hue, in this order; each factor on its way from 1, the hue on its way from 0."""
    transform = transforms.get(Color(max_brightness=1.0, max_contrast=1.0, max_saturation=1.0, max_hue=0.5))
    assert transform.names == ("brightness", "contrast", "saturation", "hue")
    source, parameters = image(16, seed), transform.draw(seed, 0, range(3), 16)
    source[0] = (source[0] * 3).round() / 3  # few levels, where the hue is delicate
    ours = transform.apply(source, parameters, fraction, 16)
    theirs = torch.stack([jittered(*each, fraction) for each in zip(source, parameters, strict=True)])
    assert torch.allclose(ours, theirs, atol=2e-5)
    backwards = source
    for operation, values in reversed(list(zip(JITTER, (parameters * fraction).T, strict=True))):
        identity = 0 if operation is reference.adjust_hue else 1
        backwards = torch.stack([operation(each, identity + value.item()) for each, value in zip(backwards, values, strict=True)])
    assert not torch.allclose(ours, backwards, atol=1e-3)


@pytest.mark.parametrize("border", list(PADDING))
@pytest.mark.parametrize("fraction", [1 / 3, 2 / 3, 1.0])
def test_blur_is_torchvisions(border: str, fraction: float) -> None:
    """With a kernel of ± 3 of the largest sigma at every fraction; outside lies what the border says."""
    side, radius = 40, 8  # sigma up to 14 pixels of 224 are 2.5 of 40
    transform = made(Blur, border=border)
    source, parameters = image(transform.source_side(side)), transform.draw(0, 0, range(3), side)
    assert transform.source_side(side) == side + 2 * radius * (border == "inside")
    ours = transform.apply(source, parameters, fraction, side)
    if border == "zero":
        source = torch.nn.functional.pad(source, [radius] * 4)
    sigmas = (parameters[:, 0] * fraction).tolist()
    theirs = [reference.gaussian_blur(each, [2 * radius + 1] * 2, [sigma] * 2) for each, sigma in zip(source, sigmas, strict=True)]
    assert torch.allclose(ours, centre(torch.stack(theirs), side), atol=1e-5)


@pytest.mark.parametrize("fraction", [1 / 3, 1.0])
@pytest.mark.parametrize("border", list(PADDING))
def test_all_is_warp_then_blur_then_color(border: str, fraction: float) -> None:
    side = 32
    whole, blur, color = made(All, border=border), made(Blur, border=border), made(Color)
    warp = transforms.get(SE2(border=border))
    assert whole.names == (*warp.names, *blur.names, *color.names)
    source, drawn = image(whole.source_side(side)), whole.draw(0, 0, range(3), side)
    moved = warp.apply(source, drawn[:, :3], fraction, blur.source_side(side))
    blurred = blur.apply(moved, drawn[:, 3:4], fraction, side)
    expected = torch.stack([jittered(*each, fraction) for each in zip(blurred, drawn[:, 4:], strict=True)])
    assert torch.allclose(whole.apply(source, drawn, fraction, side), expected, atol=2e-5)


@pytest.mark.parametrize("part", [SE2, Blur, Color])
@pytest.mark.parametrize("border", list(PADDING))
def test_one_part_of_all_is_that_transformation(part: Any, border: str) -> None:
    whole = made(All, border=border)
    alone = made(part, **({"border": border} if issubclass(part, Bordered) else {}))
    source, drawn = image(whole.source_side(32)), whole.draw(0, 0, range(3), 32)
    only = torch.stack([column * (name in alone.names) for name, column in zip(whole.names, drawn.T, strict=True)], dim=1)
    parameters = drawn[:, [whole.names.index(name) for name in alone.names]]
    for fraction in (1 / 3, 1.0):
        expected = alone.apply(centre(source, alone.source_side(32)), parameters, fraction, 32)
        assert torch.allclose(whole.apply(source, only, fraction, 32), expected, atol=2e-5)
