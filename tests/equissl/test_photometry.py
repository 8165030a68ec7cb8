"""Photometry: torchvision's operations sample by sample, parameters of each sample's own, frequencies as configured."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torchvision.transforms.v2 import functional as reference

from equissl import photometry
from equissl.config import Photometry
from equissl.data.photographs import PHOTOGRAPHS, load
from equissl.photometry import Parameters, apply, as_table, augment, denormalise, everywhere, gathered, join, normalise, parameters

NOTHING: dict[str, Any] = {"jitter": 0.0, "grey": 0.0, "blur": 0.0, "solarize": 0.0}


def images(batch: int = 12, side: int = 24, seed: int = 0) -> Tensor:
    """Noise, and the cases where hue is delicate: grey, black, white, few levels."""
    x = torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(seed))
    x[0:1] = x[0:1, :1]
    x[1:2] = (x[1:2] * 3).round() / 3
    x[2:3, :, :8], x[2:3, :, 8:16] = 0.0, 1.0
    return x


OPERATIONS: list[tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, float], Tensor], tuple[float, float]]] = [
    (photometry.brightness, reference.adjust_brightness, (0.0, 2.0)),
    (photometry.contrast, reference.adjust_contrast, (0.0, 2.0)),
    (photometry.saturation, reference.adjust_saturation, (0.0, 2.0)),
    (photometry.hue, reference.adjust_hue, (-0.5, 0.5)),
    (lambda x, _: photometry.to_grey(x).expand_as(x), lambda x, _: reference.rgb_to_grayscale(x, 3), (0.0, 1.0)),
    (lambda x, _: photometry.solarized(x), lambda x, _: reference.solarize(x, 0.5), (0.0, 1.0)),
    (lambda x, s: photometry.gaussian_blur(x, s, 6), lambda x, s: reference.gaussian_blur(x, [13, 13], [s, s]), (0.1, 2.0)),
]


@pytest.mark.parametrize("number", range(len(OPERATIONS)))
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000))
def test_operations_are_torchvisions(number: int, seed: int) -> None:
    operation, theirs, (low, high) = OPERATIONS[number]
    x = images(seed=seed)
    factors = low + (high - low) * torch.rand(len(x), generator=torch.Generator().manual_seed(seed))
    factors[3], factors[4] = low, high
    ours = operation(x, factors)
    for sample, factor, result in zip(x, factors, ours, strict=True):
        assert torch.allclose(result, theirs(sample, float(factor)), atol=1e-5)


def test_a_chain_is_torchvisions_with_the_same_parameters() -> None:
    """The whole of `augment` for each sample, rebuilt from the drawn numbers with torchvision's functions."""
    config = Photometry(solarize=0.3, blur=0.5, hue=0.2)
    x = images(40)
    ours = augment(x, config, 5, 2, np.arange(100, 140), 1, 112)
    numbers = photometry.draws.uniform(5, 2, range(100, 140), photometry.draws.Stream.PHOTOMETRY + 1, 16)
    functions = (reference.adjust_brightness, reference.adjust_contrast, reference.adjust_saturation, reference.adjust_hue)
    low, high = (0.6, 0.6, 0.8, -0.2), (1.4, 1.4, 1.2, 0.2)
    for sample, unit, result in zip(x, numbers, ours, strict=True):
        if unit[0] < 0.8:
            for which in np.argsort(unit[8:12]):
                sample = functions[which](sample, low[which] + (high[which] - low[which]) * unit[4 + which])
        if unit[1] < 0.2:
            sample = reference.rgb_to_grayscale(sample, 3)
        if unit[2] < 0.5:  # sigma 0.1 to 2 pixels of 224 are 0.05 to 1 of 112
            sigma = 0.05 + 0.95 * unit[12]
            sample = reference.gaussian_blur(sample, [7, 7], [sigma, sigma])
        if unit[3] < 0.3:
            sample = reference.solarize(sample, 0.5)
        assert (result - sample).abs().mean() < 1e-5  # the mean: at the threshold of solarize rounding decides


def test_a_sample_does_not_depend_on_its_batch() -> None:
    config = Photometry(solarize=0.3)
    x = images(20)
    together = augment(x, config, 0, 0, np.arange(20), 0, 224)
    for rows in ([3], [7, 2, 11], list(range(10, 20))):
        assert torch.allclose(augment(x[rows], config, 0, 0, rows, 0, 224), together[rows], atol=1e-6)


@pytest.mark.parametrize("change", [{"seed": 1}, {"epoch": 1}, {"crop": 1}, {"positions": [3]}])
def test_every_part_of_the_key_matters(change: dict[str, Any]) -> None:
    key: dict[str, Any] = {"seed": 0, "epoch": 0, "positions": [2], "crop": 0}
    config = Photometry(jitter=1.0)
    x = images(4)[3:]
    assert not torch.allclose(augment(x, config, **key, reference_side=224), augment(x, config, **{**key, **change}, reference_side=224))


@pytest.mark.parametrize("name", list(NOTHING))
def test_probabilities(name: str) -> None:
    """Out of 400 samples the configured part changes, the others stay as they are, bit for bit."""
    x = images(403, side=6, seed=1)[3:].clamp(0.05, 0.95)
    before = x.clone()
    result = augment(x, Photometry(**{**NOTHING, name: 0.25}, sigma=(0.5, 2.0)), 0, 0, np.arange(400), 0, 224)
    assert torch.equal(x, before)  # the input is left alone
    changed = (result != x).flatten(1).any(dim=1).sum().item()
    assert 70 <= changed <= 130  # 100 expected, standard deviation 8.7
    assert torch.equal(augment(x, Photometry(**NOTHING), 0, 0, np.arange(400), 0, 224), x)
    assert (
        (augment(x, Photometry(**{**NOTHING, name: 1.0}, sigma=(0.5, 2.0)), 0, 0, np.arange(400), 0, 224) != x).flatten(1).any(dim=1).all()
    )


def test_order_of_the_jitter_varies() -> None:
    """Brightness first or contrast first: the results differ, and over the samples all four come first equally often."""
    numbers = photometry.draws.uniform(0, 0, range(2000), photometry.draws.Stream.PHOTOMETRY, 16)
    first = np.bincount(np.argsort(numbers[:, 8:12], axis=1)[:, 0], minlength=4)
    assert first.min() > 430


@pytest.mark.parametrize("side", [4, 32])
def test_blur_on_small_images(side: int) -> None:
    """A kernel wider than the image is cut to what reflection can fill; a tiny sigma is the identity."""
    x = images(4, side=32)[..., :side, :side]
    wide = augment(x, Photometry(**{**NOTHING, "blur": 1.0}, sigma=(40.0, 40.0)), 0, 0, range(4), 0, 224)
    assert torch.isfinite(wide).all()
    assert wide.flatten(2).std(dim=2).mean() < x.flatten(2).std(dim=2).mean()
    tiny = augment(x, Photometry(**{**NOTHING, "blur": 1.0}, sigma=(0.1, 0.1)), 0, 0, range(4), 0, side)
    assert torch.allclose(tiny, x, atol=1e-6)


def test_values_stay_in_range_and_normalisation_is_inverted() -> None:
    x = images(30)
    result = augment(x, Photometry(brightness=1.5, contrast=1.5, saturation=1.5, hue=0.5, solarize=0.5), 0, 0, range(30), 0, 224)
    assert result.min() >= -1e-6
    assert result.max() <= 1 + 1e-6
    assert torch.allclose(denormalise(normalise(x)), x, atol=1e-6)
    assert torch.allclose(normalise(x)[5], reference.normalize(x[5], list(photometry.MEAN), list(photometry.STD)), atol=1e-5)


# --- the two ways -----------------------------------------------------------------------------------------------------------


def table(drawn: Parameters) -> Tensor:
    return torch.from_numpy(as_table(drawn)).float()


share = st.floats(0, 1)
any_settings = st.builds(
    Photometry,
    jitter=share,
    brightness=st.floats(0, 1.5),
    contrast=st.floats(0, 1.5),
    saturation=st.floats(0, 1.5),
    hue=st.floats(0, 0.5),
    grey=share,
    blur=share,
    sigma=st.tuples(st.floats(0.1, 1), st.floats(1, 8)),
    solarize=share,
)


@settings(max_examples=60, deadline=None)
@given(config=any_settings, seed=st.integers(0, 1000), side=st.integers(8, 20), last=st.booleans())
def test_both_ways_give_the_same(config: Photometry, seed: int, side: int, last: bool) -> None:
    """Each operation on those that need it, or on all with a choice; in either order of the memory."""
    x = images(10, side=24, seed=seed)[..., :side]
    drawn = parameters(config, seed, 3, np.arange(10), 1, 224)
    expected = gathered(x, drawn)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    assert torch.allclose(everywhere(x, table(drawn), drawn.largest_sigma), expected, rtol=0, atol=1e-6)
    assert torch.allclose(gathered(x, drawn), expected, rtol=0, atol=1e-6)


def test_static_shapes_are_one_graph_for_all_draws() -> None:
    """What a compiler is given: no break, and nothing to compile anew when other samples are chosen. Compiling takes too long here."""
    counter = CompileCounter()
    compiled = torch.compile(everywhere, backend=counter, fullgraph=True, dynamic=False)
    for epoch in range(4):
        drawn = parameters(Photometry(solarize=0.3), 0, epoch, np.arange(5), 0, 112)
        x = images(5, side=8, seed=epoch)
        assert torch.allclose(compiled(x, table(drawn), drawn.largest_sigma), gathered(x, drawn), rtol=0, atol=1e-6)
    assert counter.frame_count == 1


def test_without_a_compiler_it_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    tried: list[float] = []

    def compiles(largest_sigma: float) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, numbers: everywhere(x, numbers, largest_sigma)

    def fails(largest_sigma: float) -> Callable[[Tensor, Tensor], Tensor]:
        tried.append(largest_sigma)
        raise RuntimeError("there is no compiler\nbut a long explanation")

    monkeypatch.setattr(photometry, "_can_compile", True)
    monkeypatch.setattr(photometry, "_compile", compiles)
    x, drawn = images(6), parameters(Photometry(), 0, 0, range(6), 0, 24)
    result = photometry._compiled(x, drawn)
    assert result is not None
    assert torch.allclose(result, gathered(x, drawn), rtol=0, atol=1e-6)
    monkeypatch.setattr(photometry, "_compile", fails)
    with caplog.at_level(logging.WARNING):
        assert photometry._compiled(x, drawn) is None
        assert photometry._compiled(x, drawn) is None
    assert len(tried) == 1
    (record,) = caplog.records
    assert record.getMessage().endswith("RuntimeError: there is no compiler")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("last", [False, True])
def test_on_a_gpu_it_is_compiled_and_the_same(last: bool) -> None:
    drawn = parameters(Photometry(solarize=0.3), 0, 0, np.arange(40), 0, 112)
    x = images(40, side=112)
    on_gpu = x.cuda().contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    with torch.no_grad():
        result = apply(on_gpu, drawn)
    assert photometry._can_compile
    assert torch.allclose(result.cpu(), gathered(x, drawn), rtol=0, atol=2e-6)


# --- what is drawn ------------------------------------------------------------------------------------------------------------


def test_parameters_say_what_happens() -> None:
    """A chosen operation has its turn once; one of no strength has none; rows are those of their positions."""
    config = Photometry(jitter=0.5, contrast=0.0, blur=0.4, sigma=(0.5, 2.0), solarize=0.3)
    drawn = parameters(config, 1, 2, np.arange(300), 3, 112)
    for turns, jitter in zip(drawn.order, drawn.jitter, strict=True):
        assert sorted(turns) == ([-1, 0, 2, 3] if jitter else [-1] * 4)
    for chosen, share in ((drawn.jitter, 0.5), (drawn.grey, 0.2), (drawn.sigma > 0, 0.4), (drawn.solarize, 0.3)):
        assert chosen.mean() == pytest.approx(share, abs=0.1)
    blurred = drawn.sigma[drawn.sigma > 0]
    assert 0.25 <= blurred.min() < 0.3 < 0.95 < blurred.max() <= drawn.largest_sigma == 1.0
    parts = [parameters(config, 1, 2, positions, 3, 112) for positions in (range(100), range(100, 300))]
    for ours, whole in zip(join(parts), drawn, strict=True):
        assert np.array_equal(ours, whole)
    assert parameters(Photometry(blur=0.0), 0, 0, [0], 0, 224).largest_sigma == 0
    with pytest.raises(AssertionError):  # another kernel: not one batch
        join([parts[0], parameters(config, 1, 2, range(4), 3, 224)])


# --- how far it is from the common way: the figures of the docstring -----------------------------------------------------------


def crops_of_photographs(side: int = 224) -> Tensor:
    """uint8 `(18, 3, side, side)`."""
    squares = [Image.fromarray(load(name)[:190, :190]).resize((side, side), Image.Resampling.BICUBIC) for name in sorted(PHOTOGRAPHS)]
    return torch.stack([reference.pil_to_tensor(square) for square in squares])


def test_what_rounding_makes_of_each_operation() -> None:
    x = crops_of_photographs(96)
    factors = torch.linspace(0, 1, len(x))
    limits = {0: (0.6, 1.4), 1: (0.6, 1.4), 2: (0.8, 1.2), 3: (-0.1, 0.1), 4: (0, 1), 6: (0.1, 2)}
    means, largest = (0.6, 0.6, 0.6, 0.1, 0.8, 0, 0.3), (1.01, 1.45, 1.25, 1.01, 1.01, 0, 0.51)
    for number, (low, high) in limits.items():
        operation, theirs, _ = OPERATIONS[number]
        values = low + (high - low) * factors
        rounded = torch.stack([theirs(sample, float(value)) for sample, value in zip(x, values, strict=True)])
        difference = (operation(x.float() / 255, values) * 255 - rounded).abs()
        assert 0 < difference.mean() < means[number]
        assert difference.max() < largest[number]


def test_what_a_narrower_kernel_makes_of_a_blur() -> None:
    """9 pixels for sigma 0.1 to 2, as in the dinov2 repository."""
    x = crops_of_photographs(96).float() / 255
    sigma = torch.linspace(0.1, 2, len(x))
    narrow = torch.stack([reference.gaussian_blur(sample, [9, 9], [s, s]) for sample, s in zip(x, sigma.tolist(), strict=True)])
    difference = 255 * (photometry.gaussian_blur(x, sigma, 6) - narrow).abs()
    assert 0 < difference.mean() < 0.1
    assert difference.max() < 8
