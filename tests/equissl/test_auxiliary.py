"""The reconstruction: its targets, its loss, and how far its influence reaches."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tiny
import torch

from equissl import distributed, transforms
from equissl.auxiliary import Auxiliary, Blend, Decoder
from equissl.config import Reconstruction
from equissl.distributed import World
from equissl.initialise import initialise
from equissl.photometry import augment, denormalise, normalise
from equissl.views import fractions


@pytest.mark.parametrize("method", ["ibot", "vicreg_cross"])
def test_at_lambda_0_the_encoders_gradients_are_those_without_decoders(method: str, world: World) -> None:
    """Bit for bit; the decoders learn all the same, and the blend with them."""
    settings = tiny.config(method=method, auxiliary__lambda=0.0)
    with_decoders, without = tiny.Run(settings, world), tiny.Run(settings, world)
    with_decoders.backward(0)
    without.backward(0, with_auxiliary=False)
    mine, expected = with_decoders.gradients(), without.gradients()
    decoders = {name for name in mine if name.startswith("auxiliary.")}
    assert len(decoders) == len(dict(with_decoders.auxiliary.named_parameters()))  # type: ignore[union-attr]
    # a key's bias adds the same to the logits of all keys: its gradient is rounding
    assert all(mine[name].abs().sum() > 0 for name in decoders if name != "auxiliary.blend.keys.bias")
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
    decoder = Decoder(12, widths)
    image = decoder(torch.randn(2, grid**2, 12))
    assert image.shape == (2, 3, grid * 2 ** len(widths), grid * 2 ** len(widths))


def test_a_decoder_begins_as_nearest_neighbour_doubling_and_3x3_convolutions() -> None:
    decoder = Decoder(12, (32, 16))
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
    decoder = Decoder(12, (8, 8))
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


@pytest.mark.parametrize("name", sorted(set(transforms.names()) - {"color"}))  # pixel by pixel: it has no border
@pytest.mark.parametrize("border", ["inside", "zero"])
def test_no_target_shows_where_the_image_ends(name: str, border: str, world: World) -> None:
    """White images in a black world: with the border inside all targets and the second view are of one colour, to the last pixel."""
    wide = {"sigma": (10.0, 40.0)} if name in ("blur", "all") else {}  # 1.4 to 6 of 32 pixels
    settings = tiny.config(transformation={"name": name, "border": border, **wide}, auxiliary__num_images=8, method__views__num_local=0)
    batch = tiny.batch(settings, 0)
    batch = dataclasses.replace(batch, source2=torch.full_like(batch.source2, 255))
    views = tiny.Run(settings, world).make_views(batch)
    assert views.targets is not None
    assert len(views.targets) == 9
    for images in (*views.targets, views.global2):
        spread = (images - images.mean(dim=(2, 3), keepdim=True)).abs().amax(dim=(1, 2, 3))
        assert (spread.max() < 1e-4) if border == "inside" else (spread.max() > 0.1)


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


# --- cross-attention -------------------------------------------------------------------------------------------------------


def blend(d: int, residual: bool = False) -> Blend:
    """With random biases and norms: the initial ones hide mistakes."""
    made, generator = Blend(d, residual), torch.Generator().manual_seed(1)
    initialise(made, 0)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return made.double()


def two_views(d: int, patches: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = torch.randn(2, 2, patches, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return first, second


@pytest.mark.parametrize(("d", "heads"), [(6, 1), (64, 1), (192, 3)])
@pytest.mark.parametrize("residual", [False, True])
def test_the_blend_is_attention_of_the_second_view_to_the_first(d: int, heads: int, residual: bool) -> None:
    """Against its formula, head by head and query by query."""
    made, (first, second) = blend(d, residual), two_views(d)
    weights = {name: parameter.detach().numpy() for name, parameter in made.named_parameters()}

    def linear(x: np.ndarray, name: str) -> np.ndarray:  # type: ignore[type-arg]
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def normed(x: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        centred = x - x.mean(axis=-1, keepdims=True)
        return centred / np.sqrt(centred.var(axis=-1, keepdims=True) + 1e-5) * weights["norm.weight"] + weights["norm.bias"]

    out = made(first, second).detach().numpy()
    for sample, (one, two) in enumerate(zip(first.numpy(), second.numpy(), strict=True)):
        q, k, v = linear(normed(two), "queries"), linear(normed(one), "keys"), linear(normed(one), "values")
        chosen, width = np.zeros_like(two), d // heads
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            for query in range(len(two)):
                logits = np.exp(k[:, part] @ q[query, part] / width**0.5)
                chosen[query, part] = logits / logits.sum() @ v[:, part]
        np.testing.assert_allclose(out[sample], linear(chosen, "out") + two * residual, rtol=1e-9)


def test_what_is_decoded_comes_from_the_first_view() -> None:
    """A first view without content leaves nothing of the second, whose tokens only choose; with `residual` they are there."""
    (first, second), constant = two_views(16), torch.ones(2, 5, 16, dtype=torch.float64)
    plain = blend(16)
    empty = plain(constant, second)
    assert torch.allclose(empty, empty[:1, :1].expand_as(empty), atol=1e-12)
    assert not torch.allclose(plain(first, second), plain(first, constant), atol=0.1)  # they do choose
    shuffled = torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(plain(first[:, shuffled], second), plain(first, second))  # by content: places are in the tokens
    torch.testing.assert_close(plain(first, second[:, shuffled]), plain(first, second)[:, shuffled])
    added = blend(16, residual=True)
    torch.testing.assert_close(added(constant, second) - empty, second)


def test_the_target_is_the_second_view_itself(world: World) -> None:
    """Bit for bit, alone, and without a transformation too."""
    for changes in ({}, {"transformation": "all"}, {"transformation": None}):
        run = tiny.Run(tiny.config(method="vicreg_cross", **changes), world)
        views = run.views(0)
        assert views.targets is not None
        assert torch.equal(views.targets, views.global2[None])
        assert fractions(run.settings) == [1.0]
        output, auxiliary = run.method.step(views, 0), run.auxiliary
        assert output.equi is not None
        assert auxiliary is not None
        term, images = auxiliary(output.equi, views.targets)
        assert term.item() == pytest.approx(float((images[0] - views.global2).double().square().mean()), rel=1e-5)


def test_both_views_learn_from_it_and_the_first_moves_the_image(world: World) -> None:
    run = tiny.Run(tiny.config(method="vicreg_cross"), world)
    views = run.views(0)
    equi = run.method.step(views, 0).equi
    assert equi is not None
    assert run.auxiliary is not None
    first, second = (tokens.detach().requires_grad_() for tokens in equi)
    run.auxiliary((first, second), views.targets).term.backward()
    assert first.grad is not None
    assert second.grad is not None
    assert first.grad.norm() > 0
    assert second.grad.norm() > 0


def test_what_an_auxiliary_cannot_do_is_refused() -> None:
    for method in ("vicreg", "ibot"):
        with pytest.raises(ValueError, match="auxiliary reconstruction needs a transformation to reconstruct along; choose one of rot"):
            tiny.config(method=method, transformation=None)
        assert tiny.config(method=method, transformation=None, auxiliary={**tiny.AUXILIARIES["vicreg_cross"]}).num_targets == 1
    with pytest.raises(ValueError, match=r"cross_attention.num_images\n  Extra inputs are not permitted"):
        tiny.config(method="vicreg_cross", auxiliary__num_images=2)
    with pytest.raises(ValueError, match="'reconstruction', 'cross_attention'"):
        tiny.config(auxiliary={"name": "mae"})
    with pytest.raises(ValueError, match=r"num_images is 0, so nothing on the way .* give 1 to 8 .* lambda 0 for the control"):
        tiny.config(auxiliary__num_images=0)


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("ibot", {"auxiliary__decoder_widths": [16, -3, 8]}),
        ("ibot", {"auxiliary__decoder_widths": [16, 0, 8]}),
        ("ibot", {"method__teacher_temperature": [0.0, 0.07]}),
        ("ibot", {"method__teacher_temperature": [-0.1, 0.07]}),
        ("ibot", {"method__mask_ratio": [0.1, 1.5]}),
        ("ibot", {"method__mask_ratio": [-3, 0.5]}),
        ("ibot", {"method__ema": [1.5, 2]}),
        ("byol", {"method__ema": [-3, 1]}),
        ("ibot", {"method__optimizer__betas": [1, 2]}),
        ("ibot", {"method__optimizer__weight_decay": [-0.1, 0.4]}),
        ("vicreg", {"method__optimizer": {"name": "sgd", "weight_decay": [0, -1]}}),
        ("vicreg", {"method__views": {"global1": {"sigma": [20, 0.1]}}}),
        ("vicreg", {"method__views": {"global1": {"sigma": [-2, -0.1]}}}),
    ],
)
def test_numbers_with_which_nothing_could_be_learnt_are_refused(method: str, changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"should be (greater|less) than|must not be larger than the second"):
        tiny.config(method=method, **changes)


# --- where the split is ----------------------------------------------------------------------------------------------------


def test_equivariant_outputs_of_ibots_head_are_rows_of_its_last_layer(world: World) -> None:
    """Of the masked student's patch tokens; the loss is that of the same head without them, on plain tokens."""
    settings = tiny.config(method="ibot_head", backbone__drop_path=0.0)
    assert (settings.d_equi, settings.d_head, settings.d_split, settings.d_inv) == (16, 16, 0, 192)
    run = tiny.Run(settings, world)
    plain = tiny.Run(tiny.config(method="ibot_head", auxiliary=None, backbone__drop_path=0.0), world)
    output, without = run.method.step(run.views(0), 0), plain.method.step(plain.views(0), 0)
    assert {name: term.item() for name, term in output.terms.items()} == pytest.approx(
        {name: term.item() for name, term in without.terms.items()}, rel=1e-6
    )
    values = {name.removeprefix("student."): tensor for name, tensor in run.values().items() if name.startswith("student.")}
    assert not any("split" in name for name in values)
    views, student = run.views(0), run.method.student
    mask = run.method._masks(0, 0, 16).mask
    with torch.no_grad():
        x = student.encoder.backbone([torch.cat([views.global1, views.global2])], [mask])[0][:, 1:]
        for layer in (0, 2, 4):
            x = torch.nn.functional.linear(x, values[f"head.mlp.{layer}.weight"], values[f"head.mlp.{layer}.bias"])
            x = torch.nn.functional.gelu(x) if layer < 4 else x
        rows = values["head.equi_prototypes"]
        expected = (x / x.norm(dim=-1, keepdim=True)) @ (rows / rows.norm(dim=1, keepdim=True)).T
    assert output.equi is not None
    torch.testing.assert_close(torch.cat(output.equi).detach(), expected, rtol=1e-4, atol=1e-6)
    teacher = run.method.teacher_network
    assert torch.equal(distributed.full(teacher.head.equi_prototypes), rows), "the teacher has them for the export"


def test_vicregs_head_sees_all_tokens_as_one_batch(world: World) -> None:
    """The expander on CLS and patch tokens together, with common statistics for each view; only CLS reaches the loss."""
    run = tiny.Run(tiny.config(method="vicreg_head", backbone__drop_path=0.0), world)
    views = run.views(0)
    output = run.method.step(views, 0)
    values = {name.removeprefix("student.expander."): tensor.double() for name, tensor in run.values().items()}
    with torch.no_grad():
        tokens = run.method.student.encoder.backbone([torch.cat([views.global1, views.global2])])[0].double()
        found = []
        for x in tokens.view(2, 16 * 17, -1):
            for layer in (0, 3):
                x = x @ values[f"mlp.{layer}.weight"].T
                x = (x - x.mean(dim=0)) / (x.var(dim=0, correction=0) + 1e-5).sqrt()
                x = (x * values[f"mlp.{layer + 1}.weight"] + values[f"mlp.{layer + 1}.bias"]).relu()
            found.append(x.view(16, 17, -1))
    z = [x[:, 0] @ values["mlp.6.weight"].T for x in found]
    assert output.terms["invariance"].item() == pytest.approx(10 * float((z[0] - z[1]).square().mean()), rel=1e-4)
    assert output.equi is not None
    for mine, x in zip(output.equi, found, strict=True):
        torch.testing.assert_close(mine.detach().double(), x[:, 1:] @ values["equi.weight"].T, rtol=1e-3, atol=1e-4)


def test_a_head_that_cannot_be_split_is_refused() -> None:
    with pytest.raises(
        ValueError, match="split_at is head_output, but method sie splits the representation itself: choose split_at representation, or one"
    ):
        tiny.config(method="sie", auxiliary__split_at="head_output")
    wide = tiny.config(method="vicreg_head", auxiliary__d=64)  # wider than `representation`, which is not used
    assert (wide.d_equi, wide.d_inv) == (64, 192)


def test_where_the_split_is_leaves_earlier_runs_their_names() -> None:
    field = type(tiny.config().auxiliary).model_fields["split_at"]
    assert field.json_schema_extra == {"neutral": "representation"}
    assert field.default == "representation"


def test_the_first_auxiliary_needs_no_name() -> None:
    """As job files from before there were others have it."""
    assert tiny.config(auxiliary={"lambda": 0.5, "decoder_widths": [16, 8, 8], "d": 16}).auxiliary == Reconstruction.model_validate(
        {"lambda": 0.5, "decoder_widths": [16, 8, 8], "d": 16}
    )
