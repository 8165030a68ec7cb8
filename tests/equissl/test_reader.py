"""Reading ahead: the bytes are those of the order for any share, stride and start; few reads, bounded memory, shards that vanish."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equissl.data import shards
from equissl.data.order import Order
from equissl.data.reader import Reader
from equissl.data.shards import Sample, ShardLost, ShardSet, write_manifest, write_shards

NUM_IMAGES, PER_SHARD, BATCH = 3700, 300, 32


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each "image" holds its own number, at lengths that differ; with one shard that is shorter than the others."""
    folder = tmp_path_factory.mktemp("numbered")
    samples = (Sample(f"{i}", f"{i}".encode() * (1 + i % 50), "png", i % 10) for i in range(NUM_IMAGES))
    write_manifest(folder, "numbered", list("abcdefghij"), {"train": write_shards(samples, folder, "train", PER_SHARD)}, {})
    return folder


@pytest.fixture(scope="module")
def data(numbered: Path) -> Iterator[ShardSet]:
    found = ShardSet(numbered, "train")
    yield found
    found.close()


def content(i: int) -> bytes:
    return f"{i}".encode() * (1 + i % 50)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.sampled_from([32, 36, 24, 64]),
    world_size=st.sampled_from([1, 2, 3, 4]),
    stride=st.integers(1, 14),
    start=st.integers(0, 400),
    jumps=st.lists(st.integers(0, 400), max_size=3),
    seed=st.integers(0, 3),
)
def test_any_share_stride_and_start_gives_the_bytes_of_the_order(
    data: ShardSet, batch: int, world_size: int, stride: int, start: int, jumps: list[int], seed: int
) -> None:
    order = Order(data.shard_sizes, batch, seed)
    size = batch // world_size
    rank = seed % world_size
    mine = rank * size, (rank + 1) * size
    reader = Reader(data, order, *mine, stride)
    try:
        steps = [*range(start, start + 12 * stride, stride), *jumps, *range(start, start + 2 * stride, stride)]
        for step in steps:
            epoch, positions, images, encoded = reader.read(step)
            expected = order.indices(step, *mine)
            assert epoch == expected[0]
            assert np.array_equal(positions, expected[1])
            assert np.array_equal(images, expected[2])
            assert encoded == [content(int(i)) for i in images]
            held = sum(len(part.images) for held in reader._held.values() for part in held.result().values())
            assert jumps or held <= order.held_images(world_size, stride)
    finally:
        reader.close()


@pytest.mark.parametrize("stride", [1, 4, 12])
def test_reads_are_long_and_each_image_is_read_once(data: ShardSet, stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    order = Order(data.shard_sizes, BATCH, 0)
    assert order.in_lanes
    sizes: list[int] = []
    lock, preadv = threading.Lock(), os.preadv

    def counted(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        with lock:
            sizes.append(sum(map(len, buffers)))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    most = 0
    for worker in range(stride):
        reader = Reader(data, order, 0, BATCH, stride)
        for step in range(worker, order.steps_per_epoch, stride):
            reader.read(step)
            most = max(most, reader.num_bytes() // 250)  # the longest has 4 * 50 bytes
        reader.close()
    num_read = order.steps_per_epoch * BATCH
    assert len(sizes) < num_read / 20  # a run has 32, and windows cut some
    whole = sum(path.stat().st_size for path in data.folder.glob("train-*.tar"))
    assert sum(sizes) < whole * 1.01
    assert most <= order.held_images(1, stride)


def test_buffers_of_imagenet_stay_small() -> None:
    """16 ranks, a batch of 1024: below 64 MB for images of 115 KB at 6 and at 12 workers."""
    order = Order((1281,) * 1000 + (167,), 1024, 0)
    assert [order.held_images(16, num_workers) for num_workers in (12, 6)] == [2 * 128, 4 * 128]
    assert 4 * 128 * 115_000 < 64e6
    assert Order((500,), 64, 0).held_images(4, 3) == 16  # a permutation: what is being decoded


def test_a_shard_that_comes_back_is_waited_for_and_one_that_does_not_is_named(
    numbered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for path in numbered.iterdir():
        (folder / path.name).hardlink_to(path)
    copy = ShardSet(folder, "train")
    shard = folder / "train-000003.tar"
    away = tmp_path / "away.tar"
    pauses: list[float | None] = []

    wait = threading.Event.wait

    def come_back(event: threading.Event, pause: float | None = None) -> bool:
        if pause not in shards.RETRY_SECONDS:
            return wait(event, pause)
        pauses.append(pause)
        if len(pauses) == 3:
            away.rename(shard)
        return False

    monkeypatch.setattr(threading.Event, "wait", come_back)
    shard.rename(away)
    reader = Reader(copy, Order(copy.shard_sizes, BATCH, 0), 0, BATCH)
    for step in range(5):
        _, _, images, encoded = reader.read(step)
        assert encoded == [content(int(i)) for i in images]
    reader.close()
    assert pauses == list(shards.RETRY_SECONDS[:3])
    assert "train-000003.tar cannot be read" in caplog.text
    copy.close()
    shard.unlink()
    pauses.clear()
    reader = Reader(copy, Order(copy.shard_sizes, BATCH, 0), 0, BATCH)
    monkeypatch.setattr(shards, "RETRY_SECONDS", (0.0,))
    with pytest.raises(ShardLost, match=r"train-000003\.tar cannot be read any more: .*No such file.*copy it again"):
        list(map(reader.read, range(100)))
    reader.close()


def test_closing_does_not_wait_for_a_lost_shard(numbered: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for path in numbered.iterdir():
        (folder / path.name).hardlink_to(path)
    reader = Reader(ShardSet(folder, "train"), Order((PER_SHARD,) * 12 + (100,), BATCH, 0), 0, BATCH)
    for path in folder.glob("*.tar"):
        path.unlink()
    place = reader.order.places(0, 0, BATCH)[0]
    reading = reader._fetch(place)
    start = time.monotonic()
    reader.close()
    assert isinstance(reading.exception(timeout=10), ShardLost)
    assert time.monotonic() - start < sum(shards.RETRY_SECONDS) / 2
