"""Counter-based draws and the order of the images: pure functions with the properties that resuming and sharing rest on."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equissl import draws
from equissl.data.order import FEW_BATCHES, GROUPS, WINDOW, Order, describe

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


# --- the order -------------------------------------------------------------------------------------------------------------


def orders(max_images: int = 6000) -> st.SearchStrategy[Order]:
    """Any shards and batch: some in lanes, some permuted as a whole, some with one microbatch per batch."""

    def build(sizes: list[int], num_batches: int, seed: int) -> Order:
        return Order(tuple(sizes), max(1, sum(sizes) // num_batches), seed)

    sizes = st.lists(st.integers(1, 400), min_size=1, max_size=max_images // 400)
    return st.builds(build, sizes, st.integers(1, 250), st.integers(0, 2**64 - 1))


def epoch_of(order: Order, epoch: int) -> np.ndarray:
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    return np.concatenate([order.indices(step)[2] for step in steps])


@settings(max_examples=60, deadline=None)
@given(order=orders(), epoch=st.integers(0, 1000))
def test_an_epoch_shows_each_image_at_most_once(order: Order, epoch: int) -> None:
    seen = epoch_of(order, epoch)
    assert len(seen) == order.steps_per_epoch * order.batch > order.num_images - order.batch
    assert len(np.unique(seen)) == len(seen)
    assert 0 <= seen.min() <= seen.max() < order.num_images


@settings(max_examples=60, deadline=None)
@given(order=orders(), step=st.integers(0, 10**6), data=st.data())
def test_any_part_of_a_batch_can_be_asked_for_alone(order: Order, step: int, data: st.DataObject) -> None:
    """So the batch is the same for any number of ranks, also of one that shares microbatches."""
    epoch, positions, whole = order.indices(step)
    assert epoch == step // order.steps_per_epoch
    begin = step % order.steps_per_epoch * order.batch
    assert positions.tolist() == list(range(begin, begin + order.batch))
    start = data.draw(st.integers(0, order.batch - 1))
    stop = data.draw(st.integers(start + 1, order.batch))
    again, some, part = Order(order.shard_sizes, order.batch, order.seed).indices(step, start, stop)  # from nothing: no state
    assert again == epoch
    assert np.array_equal(some, positions[start:stop])
    assert np.array_equal(part, whole[start:stop])


def test_lanes_for_many_batches_and_a_permutation_for_few() -> None:
    assert Order((FEW_BATCHES * 16,), 16, 0).in_lanes
    assert not Order((FEW_BATCHES * 16 - 1,), 16, 0).in_lanes
    assert Order((FEW_BATCHES * 31,), 31, 0).in_lanes  # as long as a microbatch may be
    assert not Order((FEW_BATCHES * 37,), 37, 0).in_lanes  # a prime: microbatches of one image
    assert [Order((10**5,), batch, 0).microbatch for batch in (1024, 48, 100, 16, 96)] == [32, 24, 25, 16, 32]


@pytest.mark.parametrize("sizes", [(103,), (1000, 700, 34)])
def test_order_and_remainder_change_from_epoch_to_epoch(sizes: tuple[int, ...]) -> None:
    order = Order(sizes, 10 if len(sizes) == 1 else 16, 0)
    assert order.in_lanes == (len(sizes) > 1)
    epochs = [epoch_of(order, epoch) for epoch in range(20)]
    assert len({seen.tobytes() for seen in epochs}) == 20
    left_out = {frozenset(range(sum(sizes))) - frozenset(seen.tolist()) for seen in epochs}
    assert len(left_out) > 15
    assert not np.array_equal(epochs[0], epoch_of(Order(sizes, order.batch, 1), 0))


def test_every_image_comes_first_equally_often() -> None:
    first = np.bincount([int(Order((5,), 5, seed).indices(0)[2][0]) for seed in range(1000)], minlength=5)
    assert first.min() > 140  # 200 expected, standard deviation 12.6


def test_places_of_an_image_over_epochs_are_uniform() -> None:
    """In lanes too: where in an epoch an image comes is spread evenly, and two neighbours on the disk are not near each other."""
    order = Order((512,) * 8, 32, 3)
    assert order.in_lanes
    place = np.stack([np.argsort(np.append(seen, np.setdiff1d(np.arange(4096), seen))) for seen in (epoch_of(order, e) for e in range(60))])
    counts = np.stack([np.histogram(place[:, image], bins=4, range=(0, 4096))[0] for image in range(0, 4096, 7)])
    chi_square = ((counts - 15) ** 2 / 15).sum(axis=1)  # 3 degrees of freedom: mean 3, variance 6
    assert abs(chi_square.mean() - 3) < 5 * np.sqrt(6 / len(counts))
    same_batch = place[:, 1:] // 32 == place[:, :-1] // 32
    alone = np.tile(np.arange(4095) % 32 == 31, (60, 1))  # not of one run
    assert same_batch[alone].mean() < 0.02  # 32 / 4096 = 0.008 by chance
    assert 0.2 < same_batch[~alone].mean() < 0.45  # a window mixes three runs: (32 - 1) / (3 · 32 - 1) = 0.33


def test_a_worker_reads_each_lane_in_long_pieces() -> None:
    """The microbatches of a window come from few runs, and one worker of twelve meets each lane at every visit."""
    order = Order((1000,) * 50, 256, 0)
    assert (order.microbatch, order.in_lanes) == (32, True)
    for step in (0, 12, 24, 100):
        for place in order.places(step, 0, 256):
            assert place.group == step % order.steps_per_epoch % GROUPS
            window = order.window(place)
            assert window.first <= place.number < window.last <= window.first + WINDOW
            assert np.count_nonzero(np.diff(window.images) != 1) <= WINDOW + 2  # and where a shard ends with a shorter run
            assert sorted(window.order) == list(range(len(window.images)))


def test_fewer_images_than_a_batch() -> None:
    with pytest.raises(ValueError, match="15 images, fewer than one batch of 16"):
        Order((10, 5), 16, 0)


def test_description() -> None:
    assert describe((1000,) * 50, 256) == {
        "order": "lanes",
        "steps_per_epoch": 195,
        "left_out_per_epoch": 80,
        "images_held_per_worker": 12 * 8 * 128,
        "microbatch": 32,
        "lanes": 96,
        "window_images": 96,
        "runs": 50 * 32,
    }
    assert describe((1000,), 256)["order"] == "permutation"
