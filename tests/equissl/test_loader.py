"""Loading: the same global batches for any ranks, workers and starting step; bad samples; workers that come and go properly."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as reference

from equissl import draws
from equissl.config import IBOT, PretrainConfig
from equissl.data.loader import (
    TRIES,
    BadSample,
    BadSamples,
    Batch,
    Loader,
    Scratch,
    crop_box,
    crop_numbers,
    crops,
    cut,
    decode,
    in_order,
    make_loader,
    resized_crop,
)
from equissl.data.order import Order
from equissl.data.shards import Sample, ShardLost, ShardSet, write_manifest, write_shards
from equissl.transforms.base import centre
from equissl.views import MakeViews

IMAGES = ("index", "position", "label", "view1", "source2", "local")


def config(**changes: Any) -> PretrainConfig:
    values: dict[str, Any] = {
        "data": "photographs",
        "backbone": {"name": "vit_tiny_patch16_224", "patch_size": 8, "depth": 1},
        "image_size": 24,
        "method": {"name": "ibot", "views": {"num_local": 2, "local_size": 16}},
        "transformation": "se2",
        "batch": 16,
        "group_size": 4,
        "num_steps": 100,
        "num_workers": 0,
    }
    return PretrainConfig.model_validate({**values, **changes})


def batches(data: ShardSet, settings: PretrainConfig, rank: int = 0, world_size: int = 1, start: int = 0, stop: int = 4) -> list[Batch]:
    loader = make_loader(data, settings, rank, world_size, start, stop)
    result = list(loader)
    loader.close()
    return result


def same(left: list[Batch], right: list[Batch]) -> bool:
    assert [(batch.step, batch.epoch) for batch in left] == [(batch.step, batch.epoch) for batch in right]
    return all(torch.equal(getattr(a, name), getattr(b, name)) for a, b in zip(left, right, strict=True) for name in IMAGES)


@pytest.fixture(scope="module")
def train(photographs: Path) -> ShardSet:
    return ShardSet(photographs, "train")


def test_shapes(train: ShardSet) -> None:
    (batch,) = batches(train, config(), start=20, stop=21)
    assert (batch.step, batch.epoch) == (20, 20 // (216 // 16))
    assert batch.view1.shape == (16, 3, 24, 24)
    assert batch.source2.shape == (16, 3, 38, 38)
    assert batch.local.shape == (2, 16, 3, 16, 16)
    assert batch.view1.dtype == batch.source2.dtype == batch.local.dtype == torch.uint8
    assert torch.equal(batch.label, torch.tensor(train.labels[batch.index.numpy()]))
    assert batch.bad == ()
    plain = config(transformation=None, method={"name": "ibot", "views": {"num_local": 0}})
    (batch,) = batches(train, plain, stop=1)
    assert batch.source2.shape == (16, 3, 24, 24)
    assert batch.local.shape[0] == 0
    assert same([batch.to("cpu")], [batch])


@pytest.mark.parametrize(("world_size", "num_workers"), [(2, 0), (4, 0), (1, 2)])
def test_global_batches_do_not_depend_on_ranks_and_workers(train: ShardSet, world_size: int, num_workers: int) -> None:
    whole = batches(train, config())
    shares = [batches(train, config(num_workers=num_workers), rank, world_size) for rank in range(world_size)]
    for step, batch in enumerate(whole):
        for name in IMAGES:
            joined = torch.cat([getattr(share[step], name) for share in shares], dim=1 if name == "local" else 0)
            assert torch.equal(joined, getattr(batch, name))


def test_a_resumed_loader_goes_on(train: ShardSet) -> None:
    whole = batches(train, config(), stop=30)  # across two ends of an epoch
    assert same(batches(train, config(), start=11, stop=30), whole[11:])
    assert not torch.equal(whole[0].view1, whole[13].view1)
    assert not same(batches(train, config(seed=1)), whole[:4])


def test_a_crop_is_a_function_of_its_key(train: ShardSet) -> None:
    """Rebuilt by hand from the drawn numbers, for one sample and each kind of crop."""
    settings_ = config()
    (batch,) = batches(train, settings_, start=15, stop=16)
    row = 5
    image = decode(train, int(batch.index[row]))
    for crop, result, scale, margin in (
        (0, batch.view1[row], (0.25, 1.0), 1.0),
        (1, batch.source2[row], (0.25, 1.0), 38 / 24),
        (3, batch.local[1, row], (0.05, 0.25), 1.0),
    ):
        unit = draws.uniform(0, 1, [int(batch.position[row])], draws.Stream.CROP + crop, 4 * TRIES + 1)[0]
        box = crop_box(48, 48, scale, margin, unit[1:])
        made = torch.empty_like(result)
        resized_crop(image, box, made, bool(unit[0] < 0.5))
        assert torch.equal(result, made)


def test_images_are_decoded_as_rgb(tmp_path: Path) -> None:
    """Grey, palette and transparent images and JPEGs too; the pixels are those that were stored."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    colour = Image.fromarray(pixels)
    versions = [("RGB", "png"), ("L", "png"), ("P", "png"), ("RGBA", "png"), ("RGB", "jpg"), ("CMYK", "jpg")]
    samples = []
    for number, (mode, extension) in enumerate(versions):
        encoded = io.BytesIO()
        colour.convert(mode).save(encoded, "PNG" if extension == "png" else "JPEG")
        samples.append(Sample(f"{number}", encoded.getvalue(), extension, 0))
    write_manifest(tmp_path, "modes", ["any"], {"train": write_shards(samples, tmp_path, "train", 10)}, {})
    data = ShardSet(tmp_path, "train")
    images = [decode(data, i) for i in range(len(samples))]
    assert all(image.shape == (3, 20, 30) and image.dtype == torch.uint8 for image in images)
    assert np.array_equal(images[0].permute(1, 2, 0), pixels)
    assert np.array_equal(images[1][0], np.asarray(colour.convert("L")))
    assert torch.equal(images[1][0], images[1][2])
    assert torch.equal(images[3], images[0])


def test_images_may_be_decoded_over_one_another(tmp_path: Path) -> None:
    """Of any size and kind in turn, into memory that grows: the pixels are those of memory of their own."""
    rng, samples = np.random.default_rng(0), []
    for number, (side, kind) in enumerate([(20, "JPEG"), (50, "JPEG"), (30, "PNG"), (10, "JPEG"), (50, "JPEG")]):
        encoded = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (side, side + 7, 3), dtype=np.uint8)).save(encoded, kind)
        samples.append(Sample(f"{number}", encoded.getvalue(), "jpg", 0))
    write_manifest(tmp_path, "sizes", ["any"], {"train": write_shards(samples, tmp_path, "train", 10)}, {})
    data, scratch = ShardSet(tmp_path, "train"), Scratch()
    for _ in range(2):
        for number in range(len(samples)):
            assert torch.equal(decode(data, number, scratch=scratch), decode(data, number))
    first, second = decode(data, 1, scratch=scratch), decode(data, 4, scratch=scratch)
    assert first.data_ptr() == second.data_ptr(), "nothing was allocated"


def test_crops_are_those_of_torchvision() -> None:
    image = torch.randint(0, 256, (3, 60, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    theirs = reference.resized_crop(image, 3, 5, 40, 30, [24, 24], interpolation=reference.InterpolationMode.BICUBIC, antialias=True)
    for source in (image, image.permute(1, 2, 0).contiguous().permute(2, 0, 1)):
        for flip, expected in ((False, theirs), (True, reference.horizontal_flip(theirs))):
            ours = torch.empty(24, 24, 3, dtype=torch.uint8).permute(2, 0, 1)
            resized_crop(source, (3, 5, 40, 30), ours, flip)
            assert torch.equal(ours, expected)


@settings(max_examples=200, deadline=None)
@given(
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    low=st.floats(0.01, 1),
    high=st.floats(0.01, 1),
    margin=st.floats(1, 2),
    seed=st.integers(0, 10**6),
)
def test_boxes_lie_in_the_image(height: int, width: int, low: float, high: float, margin: float, seed: int) -> None:
    low, high = sorted((low, high))
    top, left, h, w = crop_box(height, width, (low, high), margin, draws.uniform(seed, 0, [0], 0, 4 * TRIES)[0])
    assert top >= 0
    assert left >= 0
    assert h >= 1
    assert w >= 1
    assert top + h <= height
    assert left + w <= width


def test_scale_and_aspect_of_the_boxes() -> None:
    """What is seen has the area asked for, also inside the larger source of a warp; places and aspects are spread evenly."""
    unit = draws.uniform(0, 0, range(3000), 1, 4 * TRIES)
    for margin in (1.0, 1.4):
        boxes = np.array([crop_box(400, 500, (0.1, 0.3), margin, row) for row in unit], dtype=float)
        area = boxes[:, 2] * boxes[:, 3] / margin**2 / (400 * 500)
        assert 0.098 < area.min() < 0.105
        assert 0.295 < area.max() < 0.302
        assert abs(area.mean() - 0.2) < 0.005
        aspect = np.log(boxes[:, 3] / boxes[:, 2])
        assert np.abs(aspect).max() < math.log(4 / 3) + 0.02
        assert abs(aspect.mean()) < 0.02
        assert abs((boxes[:, 0] / (400 - boxes[:, 2])).mean() - 0.5) < 0.02
    # of a range of which only a part fits, that part
    boxes = np.array([crop_box(400, 500, (0.1, 1.0), 1.4, row) for row in unit], dtype=float)
    area = boxes[:, 2] * boxes[:, 3] / 1.4**2 / (400 * 500)
    assert area.max() < 0.42  # (400 / 1.4)² / (400 · 500) = 0.408
    assert 0.22 < area.mean() < 0.26
    assert np.std(boxes[:, 0]) > 30
    # too large for the margin: the largest box there is, in the middle
    assert crop_box(64, 64, (1.0, 1.0), 1.4, unit[0]) == (0, 0, 64, 64)
    assert crop_box(64, 200, (1.0, 1.0), 1.4, unit[0]) == (0, 57, 64, 85)


def test_square_boxes() -> None:
    """Aspect ratios in other bounds; of the whole area, the largest that they allow, in the middle."""
    unit = draws.uniform(0, 0, range(2000), 1, 4 * TRIES)
    assert {crop_box(40, 60, (1.0, 1.0), 1.0, row, 1.0) for row in unit} == {(0, 10, 40, 40)}
    assert {crop_box(60, 40, (1.0, 1.0), 1.5, row, 1.0) for row in unit} == {(10, 0, 40, 40)}
    some = np.array([crop_box(400, 500, (0.1, 0.3), 1.0, row, 1.1) for row in unit], dtype=float)
    aspect = np.log(some[:, 3] / some[:, 2])
    assert math.log(1.1) - 0.01 < np.abs(aspect).max() < math.log(1.1) + 0.01


@pytest.mark.parametrize("pipeline", ["fast", "reference"])
@pytest.mark.parametrize("transformation", [{"name": "rot"}, {"name": "rot", "border": "reflect"}])
def test_rotation_alone(train: ShardSet, pipeline: str, transformation: dict[str, Any]) -> None:
    """Of both views before g: the largest square of the image, bit for bit the same, at every step and seed."""
    alone = {"augmentation": "rot", "transformation": transformation, "method": "ibot", "pipeline": pipeline}
    (batch,), (later,) = batches(train, config(**alone), stop=1), batches(train, config(**alone, seed=1), start=30, stop=31)
    make_views = MakeViews(config(**alone), torch.device("cpu"))
    view1, source, local = make_views.coloured(batch)
    assert torch.equal(view1, centre(source, 24))
    assert local.shape[0] == 0
    rows = {int(index): row for row, index in enumerate(later.index)}
    again = [(row, rows[int(index)]) for row, index in enumerate(batch.index) if int(index) in rows]
    for one, other in again:
        assert torch.equal(batch.source2[one], later.source2[other])
    if pipeline == "fast":
        side = source.shape[-1]
        for row, index in enumerate(batch.index.tolist()):
            whole = reference.resize(decode(train, index), [side, side], reference.InterpolationMode.BICUBIC, antialias=True)
            assert (source[row] - whole / 255).abs().max() <= 1.01 / 255
    views = make_views(batch)
    assert not torch.allclose(views.global1, views.global2, atol=0.1)


def test_one_crop_is_shared_and_coloured_twice(train: ShardSet) -> None:
    """What `augmentation: rot` fills is under the settings' own: crops at random, mirrored alike, each view with its colours."""
    views = {"global_scale": [0.2, 0.5], "flip": 0.5, "global1": {"jitter": 1.0}, "num_local": 1, "local_size": 16}
    own = config(augmentation="g", transformation="blur", method={"name": "ibot", "views": views})
    (batch,) = batches(train, own, stop=1)
    assert torch.equal(batch.view1, centre(batch.source2, 24))
    view1, source, _ = MakeViews(own, torch.device("cpu")).coloured(batch)
    assert torch.equal(source, batch.source2 / 255)
    assert not torch.allclose(view1, centre(source, 24), atol=0.05)
    mirrored = own.model_copy(update={"method": own.method.model_copy(update={"views": own.method.views.model_copy(update={"flip": 1.0})})})
    (always,) = batches(train, mirrored, stop=1)
    same = [torch.equal(one, other) for one, other in zip(always.source2, batch.source2, strict=True)]
    assert 0 < sum(same) < len(same)
    assert len({tuple(row.flatten().tolist()) for row in batch.source2}) == len(batch.source2)


@pytest.mark.parametrize("border", ["inside", "reflect"])
def test_one_crop_is_resized_once(train: ShardSet, monkeypatch: pytest.MonkeyPatch, border: str) -> None:
    """The first view has the pixels of a crop of its own, and memory of its own, no more than it needs."""
    own = config(
        augmentation="g",
        transformation={"name": "rot", "border": border},
        method={"name": "ibot", "views": {"global_scale": [0.2, 0.5], "flip": 0.5, "num_local": 1, "local_size": 16}},
    )
    resized: list[int] = []

    def counted(image: torch.Tensor, box: tuple[int, int, int, int], out: torch.Tensor, flip: bool) -> None:
        resized.append(out.shape[-1])
        resized_crop(image, box, out, flip)

    monkeypatch.setattr("equissl.data.loader.resized_crop", counted)
    positions, images = np.arange(6), [decode(train, index) for index in range(6)]
    view1, source2, _ = cut(images, own, 0, positions)
    first = crops(own)[0]
    assert resized == [first.side, 16] * 6
    for row, (image, numbers) in enumerate(zip(images, crop_numbers(own, 0, positions, first), strict=True)):
        made = torch.empty(3, first.side, first.side, dtype=torch.uint8)
        resized_crop(image, first.box(48, 48, numbers), made, bool(numbers[0] < 0.5))
        assert torch.equal(view1[row], centre(made, 24))
    assert view1.is_contiguous(memory_format=torch.channels_last)
    assert view1.untyped_storage().nbytes() == 6 * 3 * 24**2
    assert view1.untyped_storage().data_ptr() != source2.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"augmentation": "rot", "transformation": "se2"}, "rotation alone, but the transformation is se2"),
        ({"augmentation": "rot", "transformation": None}, "rotation alone, but the transformation is None"),
        ({"augmentation": "g", "transformation": None}, "choose one of rot, trans"),
        ({"augmentation": "none"}, "'all', 'rot' or 'g'"),
        ({"augmentation": "rot", "transformation": "rot", "method": {"name": "ibot", "views": 3}}, "views"),
    ],
)
def test_augmentations_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_the_filled_views_are_the_identity() -> None:
    """Of a job file with `rot`, of the config that it resolves to, and of an instance in place of a table."""
    short = config(augmentation="rot", transformation="rot", method="ibot")
    views = short.method.views
    assert (views.global_scale, views.max_aspect, views.one_crop, views.flip, views.num_local) == ((1, 1), 1, True, 0, 0)
    for photometry in (views.global1, views.global2):
        assert (photometry.jitter, photometry.grey, photometry.blur, photometry.solarize) == (0, 0, 0, 0)
    assert PretrainConfig.model_validate(short.model_dump(by_alias=True)) == short
    assert PretrainConfig.model_validate(json.loads(short.model_dump_json(by_alias=True))) == short
    assert config(augmentation="rot", transformation="rot", method=IBOT()) == short
    hidden = config(augmentation="rot", transformation="rot", method=IBOT(head_hidden=64))
    assert hidden.method == short.method.model_copy(update={"head_hidden": 64})


def test_flips(train: ShardSet) -> None:
    never = config(transformation=None, method={"name": "ibot", "views": {"num_local": 0, "flip": 0.0}})
    always = config(transformation=None, method={"name": "ibot", "views": {"num_local": 0, "flip": 1.0}})
    half = config(transformation=None, method={"name": "ibot", "views": {"num_local": 0}})
    plain, flipped, mixed = (torch.cat([b.view1 for b in batches(train, c, stop=13)]) for c in (never, always, half))
    assert torch.equal(flipped, plain.flip(-1))
    share = (mixed == flipped).flatten(1).all(dim=1).float().mean()
    assert 0.4 < share < 0.6


def test_fewer_images_than_a_batch(train: ShardSet) -> None:
    with pytest.raises(ValueError, match="216 images, fewer than one batch of 220"):
        make_loader(train, config(batch=220), 0, 1, 0, 10)


# --- bad samples -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def with_bad_samples(photographs: Path, tmp_path: Path) -> ShardSet:
    """Numbers 3 and 4 are overwritten: no image, and a truncated one."""
    folder = Path(shutil.copytree(photographs, tmp_path / "data"))
    data = ShardSet(folder, "train")
    for i in (3, 4):
        row = data._index[i]
        size, offset = int(row["size"]), int(row["offset"])
        kept = data.read(i)[: size // 2] if i == 4 else b""
        with (folder / "train-000000.tar").open("r+b") as file:
            file.seek(offset)
            file.write(kept.ljust(size, b"\0"))
    data.close()
    return data


def test_bad_samples_are_replaced_and_named_once(with_bad_samples: ShardSet, caplog: pytest.LogCaptureFixture) -> None:
    data = with_bad_samples
    loader = make_loader(data, config(), 0, 1, 0, 26)
    with caplog.at_level(logging.WARNING):
        seen = list(loader)
    used = torch.cat([batch.index for batch in seen])
    assert len(used) == 26 * 16
    assert not {3, 4} & set(used.tolist())
    assert all(torch.equal(batch.label, torch.tensor(data.labels[batch.index.numpy()])) for batch in seen)
    assert loader.bad_keys == {data.key(3), data.key(4)}
    assert sorted(record.args[0] for record in caplog.records if record.args) == sorted(loader.bad_keys)  # type: ignore[index]
    clean = batches(ShardSet(data.folder, "train"), config(), rank=1, world_size=2, stop=26)
    assert torch.equal(torch.cat([batch.index for batch in clean]), torch.cat([batch.index[8:] for batch in seen]))
    for i in (3, 4):
        with pytest.raises(BadSample, match=data.key(i)):
            decode(data, i)


def test_too_many_bad_samples_end_it(with_bad_samples: ShardSet) -> None:
    """Ten may always be; here each epoch meets three: the second bad one also in place of the first."""
    loader = make_loader(with_bad_samples, config(max_bad_samples=0.001), 0, 1, 0, 200)
    seen: list[Batch] = []
    with pytest.raises(BadSamples, match=r"12 of \d+ samples could not be decoded, more than max_bad_samples 0.001, such as"):
        seen.extend(loader)
    assert 3 * 13 <= len(seen) < 4 * 13
    assert loader.has_failed()
    loader.close()
    loader = make_loader(with_bad_samples, config(max_bad_samples=0.02), 0, 1, 0, 100)
    assert len(list(loader)) == 100
    assert not loader.has_failed()
    loader.close()


def test_a_failure_is_known_two_batches_early(train: ShardSet) -> None:
    whole = batches(train, config(), stop=6)

    def failing() -> Iterator[Batch]:
        yield from whole[:5]
        raise ShardLost("gone")

    released: list[bool] = []
    loader = Loader(failing(), 0.01, lambda: released.append(True))
    known = []
    for _ in range(5):
        next(loader)
        known.append(loader.has_failed())
    assert known == [False, False, False, True, True]
    with pytest.raises(ShardLost, match="gone"):
        next(loader)
    with pytest.raises(ShardLost, match="gone"):
        loader.raise_error()
    loader.close()
    assert released == [True]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Enough images for lanes."""
    folder = tmp_path_factory.mktemp("many")
    rng = np.random.default_rng(0)

    def samples() -> Iterator[Sample]:
        for number in range(850):
            encoded = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(encoded, "PNG")
            yield Sample(f"{number}", encoded.getvalue(), "png", number % 7)

    write_manifest(folder, "many", list("abcdefg"), {"train": write_shards(samples(), folder, "train", 100)}, {})
    return ShardSet(folder, "train")


@pytest.mark.parametrize(("world_size", "num_workers"), [(2, 0), (1, 3), (4, 0)])
def test_lanes_do_not_depend_on_ranks_and_workers_and_go_on_anywhere(many: ShardSet, world_size: int, num_workers: int) -> None:
    small = {"image_size": 8, "method": {"name": "ibot", "views": {"num_local": 1, "local_size": 8}}, "transformation": None, "batch": 8}
    whole = batches(many, config(**small), start=60, stop=140)  # across the end of an epoch
    assert Order(many.shard_sizes, 8, 0).in_lanes
    settings_ = config(**small, num_workers=num_workers)
    shares = [batches(many, settings_, rank, world_size, start=60, stop=140) for rank in range(world_size)]
    for step, batch in enumerate(whole):
        for name in IMAGES:
            joined = torch.cat([getattr(share[step], name) for share in shares], dim=1 if name == "local" else 0)
            assert torch.equal(joined, getattr(batch, name))
    assert same(batches(many, config(**small), start=97, stop=140), whole[37:])


def test_what_workers_find_wrong_is_one_message(tmp_path: Path) -> None:
    """Whatever Pillow's readers raise is a bad sample; a hundred of them in a row end it."""
    samples = [Sample(f"{number}", (b"P6 abc", b"", b"\xff\xd8\xff", b"BM")[number % 4], "ppm", 0) for number in range(120)]
    write_manifest(tmp_path, "strange", ["any"], {"train": write_shards(samples, tmp_path, "train", 200)}, {})
    data = ShardSet(tmp_path, "train")
    for number in range(4):
        with pytest.raises(BadSample, match=f"the sample {number} of .* cannot be decoded"):
            decode(data, number)
    loader = make_loader(data, config(batch=4, num_workers=1), 0, 1, 0, 10)
    with pytest.raises(BadSamples, match=r"^100 samples in a row of .* cannot be decoded, the first is \d+: write the data set anew$"):
        next(loader)
    loader.close()


# --- workers ---------------------------------------------------------------------------------------------------------------


class Report(Dataset[tuple[int, bool, list[bool]]]):
    """What a worker looks like from inside."""

    def __getitem__(self, _: int) -> tuple[int, bool, list[bool]]:
        ignored = [signal.getsignal(number) == signal.SIG_IGN for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)]
        return os.getpid(), "timm" in sys.modules, ignored


def test_workers_ignore_signals_and_do_not_import_timm() -> None:
    reports = in_order(Report(), range(3), 1)
    pid, timm, ignored = next(reports)
    assert pid != os.getpid()
    assert not timm
    assert ignored == [True, True, True]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        os.kill(pid, number)
    assert next(reports)[0] == pid
    assert next(reports)[0] == pid
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()  # the parent's own signals are as before


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pids: list[int], within_s: float = 20) -> bool:
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if not any(running(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def test_close_ends_the_workers(train: ShardSet) -> None:
    loader = make_loader(train, config(num_workers=2), 0, 1, 0, 50)
    next(loader)
    workers = [worker.pid for worker in loader._batches._workers]  # type: ignore[union-attr]
    assert all(running(pid) for pid in workers)
    loader.close()
    assert gone(workers)
    with pytest.raises(StopIteration):
        next(loader)
    loader.close()  # a second time does nothing


ORPHAN = """
import sys, time
from pathlib import Path
from equissl.config import PretrainConfig
from equissl.data.loader import make_loader
from equissl.data.shards import Sample, ShardSet, write_manifest, write_shards
if __name__ == "__main__":
    config = PretrainConfig.model_validate_json(sys.argv[2])
    loader = make_loader(ShardSet(Path(sys.argv[1]), "train"), config, 0, 1, 0, 100)
    next(loader)
    print(*(worker.pid for worker in loader._batches._workers), flush=True)
    time.sleep(60)
"""


def test_workers_end_with_a_killed_parent(photographs: Path, tmp_path: Path) -> None:
    script = tmp_path / "orphan.py"
    script.write_text(ORPHAN)
    command = [sys.executable, str(script), str(photographs), config(num_workers=1).model_dump_json(by_alias=True)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as parent:
        assert parent.stdout is not None
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        assert workers
        parent.kill()
    assert gone(workers)
