"""Counter-based draws and the order of the images: pure functions with the properties that resuming and sharing rest on."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equissl import draws
from equissl.data.order import batch_positions

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the authors' known answers for philox4x32-10 (Random123, kat_vectors)
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((ONES,) * 4, (ONES,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(counter: tuple[int, int, int, int], key: tuple[int, int], expected: str) -> None:
    assert " ".join(f"{word:08x}" for word in draws.philox(counter, key)) == expected


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 2**32 - 1),
    positions=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=8),
    stream=st.integers(0, 2**32 - 1),
    n=st.integers(1, 9),
)
def test_draws_of_a_sample_depend_on_nothing_else(seed: int, epoch: int, positions: list[int], stream: int, n: int) -> None:
    together = draws.uniform(seed, epoch, positions, stream, n)
    assert together.shape == (len(positions), n)
    assert np.all((together > 0) & (together < 1))
    for row, position in zip(together, positions, strict=True):
        assert np.array_equal(row, draws.uniform(seed, epoch, [position], stream, n)[0])
        assert np.array_equal(row, draws.uniform(seed, epoch, [position], stream, n + 5)[0, :n])


def test_every_part_of_the_key_matters_and_numbers_are_uniform() -> None:
    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (2**40, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    values = [draws.uniform(seed, epoch, [position], stream, 4).tobytes() for seed, epoch, position, stream in keys]
    assert len(set(values)) == len(keys)
    sample = draws.uniform(7, 3, np.arange(20_000), draws.Stream.CROP, 5)
    counts = np.stack([np.histogram(column, bins=20, range=(0, 1))[0] for column in sample.T])
    chi_square = ((counts - 1000) ** 2 / 1000).sum(axis=1)  # 19 degrees of freedom: above 50 once in 8000
    assert chi_square.max() < 50
    assert np.abs(np.corrcoef(sample.T) - np.eye(5)).max() < 0.03


def test_streams_do_not_overlap() -> None:
    assert all(stream % (1 << 16) == 0 for stream in draws.Stream)
    assert len(set(draws.Stream)) == len(draws.Stream.__members__)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seed_out_of_range(seed: int) -> None:
    with pytest.raises(ValueError, match="seed"):
        draws.uniform(seed, 0, [0], 0, 1)
    with pytest.raises(ValueError, match="seed"):
        draws.permutation(3, seed, 0)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), batch=st.integers(1, 40), seed=st.integers(0, 2**64 - 1), first_epoch=st.integers(0, 1000))
def test_an_epoch_shows_each_image_at_most_once(data: st.DataObject, batch: int, seed: int, first_epoch: int) -> None:
    num_images = data.draw(st.integers(batch, 200))
    steps = num_images // batch
    for epoch in (first_epoch, first_epoch + 1):
        seen = []
        for step in range(epoch * steps, (epoch + 1) * steps):
            which, positions, images = batch_positions(num_images, batch, seed, step)
            assert which == epoch
            assert positions.tolist() == list(range((step - epoch * steps) * batch, (step - epoch * steps + 1) * batch))
            seen += images.tolist()
        assert len(seen) == len(set(seen)) == steps * batch
        assert 0 <= min(seen) <= max(seen) < num_images


def test_order_and_remainder_change_from_epoch_to_epoch() -> None:
    epochs = [np.concatenate([batch_positions(103, 10, 0, 10 * epoch + step)[2] for step in range(10)]) for epoch in range(20)]
    assert len({order.tobytes() for order in epochs}) == 20
    left_out = {frozenset(range(103)) - frozenset(order.tolist()) for order in epochs}
    assert len(left_out) > 15
    first = np.bincount([int(order[0]) for order in (batch_positions(5, 5, seed, 0)[2] for seed in range(1000))], minlength=5)
    assert first.min() > 140  # 200 expected, standard deviation 12.6


def test_order_is_pure() -> None:
    forward = [batch_positions(50, 7, 3, step)[2].tolist() for step in range(30)]
    backward = [batch_positions(50, 7, 3, step)[2].tolist() for step in reversed(range(30))][::-1]
    assert forward == backward
    assert forward != [batch_positions(50, 7, 4, step)[2].tolist() for step in range(30)]


def test_fewer_images_than_a_batch() -> None:
    with pytest.raises(ValueError, match="15 images, fewer than one batch of 16"):
        batch_positions(15, 16, 0, 0)
