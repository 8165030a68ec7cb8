"""The reconstruction: its targets, its loss, and how far its influence reaches."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import tiny
import torch

from equissl import distributed, transforms
from equissl.auxiliary import Auxiliary, Decoder
from equissl.distributed import World
from equissl.initialise import initialise
from equissl.photometry import augment, denormalise, normalise
from equissl.views import fractions


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.delenv("RANK", raising=False)
    yield distributed.init()
    distributed.close()


def test_at_lambda_0_the_encoders_gradients_are_those_without_decoders(world: World) -> None:
    """Bit for bit; the decoders learn all the same."""
    settings = tiny.config(auxiliary__lambda=0.0)
    with_decoders, without = tiny.Run(settings, world), tiny.Run(settings, world)
    with_decoders.backward(0)
    without.backward(0, with_auxiliary=False)
    mine, expected = with_decoders.gradients(), without.gradients()
    decoders = {name for name in mine if name.startswith("auxiliary.")}
    assert len(decoders) == len(dict(with_decoders.auxiliary.named_parameters()))  # type: ignore[union-attr]
    assert all(mine[name].abs().sum() > 0 for name in decoders)
    assert mine.keys() - decoders == expected.keys()
    assert all(torch.equal(mine[name], expected[name]) for name in expected)
    assert not any("split.equi" in name for name in expected)


def test_above_0_the_encoder_feels_lambda_times_the_reconstruction(world: World) -> None:
    zero, one, three = (tiny.Run(tiny.config(auxiliary__lambda=value), world) for value in (0.0, 1.0, 3.0))
    terms = [run.backward(0) for run in (zero, one, three)]
    assert terms[0] == terms[1] == terms[2]  # the terms are logged without their weight
    name = "student.encoder.backbone.vit.blocks.0.attn.qkv.weight"
    none, once, thrice = (run.gradients()[name] for run in (zero, one, three))
    assert (once - none).norm() > 1e-4 * none.norm()
    torch.testing.assert_close(thrice - none, 3 * (once - none), rtol=1e-2, atol=1e-2 * float((once - none).abs().max()))
    assert one.gradients()["student.encoder.split.equi.weight"].abs().sum() > 0


def test_the_loss_is_the_mean_squared_error_over_targets_pixels_and_channels(world: World) -> None:
    auxiliary = Auxiliary(tiny.config(), world)
    auxiliary.initialise()
    generator = torch.Generator().manual_seed(0)
    equi = torch.randn(2, 5, 16, 16, generator=generator)
    targets = torch.randn(3, 5, 3, 32, 32, generator=generator)
    term, images = auxiliary((equi[0], equi[1]), targets)
    assert len(images) == 3
    errors = [((image.double() - target.double()) ** 2).mean() for image, target in zip(images, targets, strict=True)]
    assert term.item() == pytest.approx(float(sum(errors)) / 3, rel=1e-6)
    assert not any(torch.allclose(images[0], other) for other in images[1:])  # independent decoders
    swapped = auxiliary((equi[1], equi[0]), targets).images
    assert not torch.allclose(images[0], swapped[0])  # it matters which view is which


@pytest.mark.parametrize(("widths", "grid"), [((8, 4), 7), ((16, 8, 8), 4), ((8, 8, 8, 8), 14)])
def test_a_decoder_doubles_the_side_once_per_width(widths: tuple[int, ...], grid: int) -> None:
    decoder = Decoder(6, widths)
    image = decoder(torch.randn(2, grid**2, 12))
    assert image.shape == (2, 3, grid * 2 ** len(widths), grid * 2 ** len(widths))


def test_a_decoder_begins_as_nearest_neighbour_doubling_and_3x3_convolutions() -> None:
    decoder = Decoder(6, (32, 16))
    initialise(decoder, 0)
    first = decoder.doublings[0].weight.detach()  # (in, out, 4, 4)
    kernel = torch.stack([first[:, :, 3], first[:, :, 1] - first[:, :, 0], first[:, :, 0]], dim=2)
    kernel = torch.stack([kernel[..., 3], kernel[..., 1] - kernel[..., 0], kernel[..., 0]], dim=3)
    x = torch.randn(2, 32, 5, 5, generator=torch.Generator().manual_seed(0))
    doubled = torch.nn.functional.interpolate(x, scale_factor=2)
    expected = torch.nn.functional.conv2d(doubled, kernel.transpose(0, 1), padding=1)
    torch.testing.assert_close(decoder.doublings[0](x), expected, rtol=1e-4, atol=1e-5)
    assert kernel.std().item() == pytest.approx((2 / (9 * 32)) ** 0.5, rel=0.05)


def test_a_decoder_keeps_patches_in_their_place() -> None:
    torch.manual_seed(0)
    decoder = Decoder(6, (8, 8))
    tokens = torch.zeros(1, 49, 12)
    changed = tokens.clone()
    changed[0, 2 * 7 + 5] = 1.0  # row 2, column 5
    difference = (decoder(changed) - decoder(tokens)).abs().sum(dim=1)[0]
    rows, columns = difference.nonzero(as_tuple=True)
    assert 4 < rows.min() <= 8 <= 11 <= rows.max() < 16
    assert 16 < columns.min() <= 20 <= 23 <= columns.max() < 28


@pytest.mark.parametrize("name", transforms.names())
def test_targets_lie_on_the_way_of_the_augmented_source(world: World, name: str) -> None:
    settings = tiny.config(transformation=name)
    run = tiny.Run(settings, world)
    batch, views = tiny.batch(settings, 4), run.views(4)
    assert settings.transformation is not None
    transform = transforms.get(settings.transformation)
    positions = batch.position.numpy()
    source = augment(batch.source2.float() / 255, settings.method.views.global2, 0, 1, positions, 1, 32)
    parameters = transform.draw(0, 1, positions, 32)
    assert views.targets is not None
    assert fractions(settings) == pytest.approx([1 / 3, 2 / 3, 1])
    for fraction, target in zip(fractions(settings), views.targets, strict=True):
        torch.testing.assert_close(target, normalise(transform.apply(source, parameters, fraction, 32)))
    assert torch.equal(views.targets[2], views.global2)
    assert not torch.allclose(views.global2, normalise(transform.apply(source, parameters, 0.0, 32)))
    torch.testing.assert_close(
        denormalise(views.global1), augment(batch.view1.float() / 255, settings.method.views.global1, 0, 1, positions, 0, 32)
    )
    local = augment(batch.local[0].float() / 255, settings.method.views.local, 0, 1, positions, 2, 16)
    torch.testing.assert_close(views.local[0], normalise(local))


def test_the_controls_see_the_same_second_view(world: World) -> None:
    """At lambda 0, and without the auxiliary, g is applied all the same; without a transformation it is not."""
    full = tiny.Run(tiny.config(), world).views(0)
    at_zero = tiny.Run(tiny.config(auxiliary__lambda=0.0), world).views(0)
    without = tiny.Run(tiny.config(auxiliary=None), world).views(0)
    assert torch.equal(full.global2, at_zero.global2)
    assert torch.equal(full.global2, without.global2)
    assert without.targets is None
    plain = tiny.Run(tiny.config(auxiliary=None, transformation=None), world).views(0)
    assert plain.targets is None
    assert plain.global2.shape == full.global2.shape
    no_local = tiny.Run(tiny.config(method__views__num_local=0), world).views(0)
    assert len(no_local.local) == 0
