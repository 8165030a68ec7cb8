"""What the monitor says of features and targets whose collapse, rank and neighbours are known."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from equissl.data.loader import Batch
from equissl.distributed import World
from equissl.methods import Watched
from equissl.monitor import Monitor, effective_rank, is_due

DIM, CLASSES = 192, 3


def monitor(world: World, num_images: int = 64, num_classes: int = CLASSES, **changes: int) -> Monitor:
    return Monitor(tiny.config(**{"monitor_every": 1, **changes}), world, 1000, num_images, num_classes)


def batch(index: list[int], label: list[int]) -> Batch:
    none = torch.empty(0)
    return Batch(0, 0, torch.tensor(index), torch.tensor(index), torch.tensor(label), none, none, none)


def seen(which: Monitor, features: Tensor, targets: Tensor | None = None, step: int = 1, label: int = 0) -> dict[str, float]:
    b = len(features)
    observed = which.observe(step, [Watched(features, targets)], batch(list(range(b)), [label] * b))
    assert observed is not None
    return observed.read()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_feature_std_is_0_where_all_are_the_same_and_1_on_the_whole_sphere(world: World) -> None:
    watcher = monitor(world)
    assert seen(watcher, noise(1, DIM).expand(20, DIM))["feature_std"] == pytest.approx(0, abs=1e-6)
    assert seen(watcher, 5 * noise(500, DIM))["feature_std"] == pytest.approx(1, abs=0.01)
    unit = torch.nn.functional.normalize(noise(1, DIM) + 0.3 * noise(50, DIM, seed=1), dim=1)
    expected = sum(unit[:, d].std(correction=0).item() for d in range(DIM)) / DIM * math.sqrt(DIM)
    assert seen(watcher, unit)["feature_std"] == pytest.approx(expected, rel=1e-5)
    assert "target_entropy" not in seen(watcher, unit), "no prototypes"


def test_entropies_of_targets_tell_the_kinds_of_collapse_apart(world: World) -> None:
    watcher, features, one_hot = monitor(world), noise(8, DIM), torch.eye(8)
    for targets, each, of_mean in (
        (one_hot, 0.0, 1.0),  # as it should be: sure, and different
        (one_hot[:1].expand(8, 8), 0.0, 0.0),  # one prototype for all
        (torch.full((8, 8), 1 / 8), 1.0, 1.0),  # they say nothing
        (one_hot[:2].repeat(4, 1), 0.0, 1 / 3),
    ):
        figures = seen(watcher, features, targets)
        assert figures["target_entropy"] == pytest.approx(each, abs=1e-6)
        assert figures["mean_target_entropy"] == pytest.approx(of_mean, abs=1e-6)


@settings(max_examples=20)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 99))
def test_effective_rank_is_that_of_the_singular_values(rows: int, columns: int, seed: int) -> None:
    matrix = noise(rows, columns, seed=seed).double()
    singular = torch.linalg.svdvals(matrix)
    part = singular / singular.sum()
    expected = math.exp(-(part * part.log()).sum())
    assert effective_rank(matrix @ matrix.T) == pytest.approx(expected, rel=1e-5)
    assert effective_rank(matrix.T @ matrix) == pytest.approx(expected, rel=1e-5)


def test_effective_rank_counts_directions(world: World) -> None:
    watcher = monitor(world)
    directions = torch.linalg.qr(noise(DIM, 5))[0].T
    assert seen(watcher, directions.repeat(6, 1))["effective_rank"] == pytest.approx(5, rel=1e-3)
    assert seen(watcher, directions[:1].expand(30, DIM))["effective_rank"] == pytest.approx(1, abs=1e-3)
    assert "effective_rank" not in seen(watcher, torch.zeros(4, DIM)), "there is none"


def test_neighbours_are_earlier_views_of_other_images(world: World) -> None:
    """Three clusters; a class each. The bank gives what went before, never a view of an image of the batch, nor what has no label."""
    watcher, centres = monitor(world), 10 * noise(CLASSES, DIM)

    def look(index: list[int], label: list[int], cluster: list[int], step: int) -> float | None:
        features = centres[cluster] + noise(len(index), DIM, seed=step)
        observed = watcher.observe(step, [Watched(features, None)], batch(index, label))
        assert observed is not None
        return observed.read().get("knn_top1")

    clusters = [0, 1, 2] * 4
    assert look(list(range(12)), clusters, clusters, 1) is None, "no neighbours yet"
    assert look(list(range(12)), clusters, clusters, 2) is None, "only views of themselves"
    assert look(list(range(12, 24)), clusters, clusters, 3) == 1.0
    assert look(list(range(24, 36)), [1, 2, 0] * 4, clusters, 4) == 0.0, "by label, not by cluster"
    watcher = monitor(world)
    look(list(range(12)), [0, 1, -1] * 4, clusters, 1)
    assert look([12, 13, 14], [0, 1, -1], [0, 1, 2], 2) == 1.0, "without a label neither voter nor question"
    assert look([12, 13], [-1, -1], [0, 1], 3) is None


def test_the_bank_keeps_the_newest_and_is_the_runs_state(world: World) -> None:
    watcher = monitor(world, num_images=10)
    for step in range(4):
        watcher.observe(step + 1, [Watched(noise(4, DIM, seed=step), None)], batch([4 * step + i for i in range(4)], [step % 3] * 4))
    assert watcher.state()["monitor.image"].tolist() == [12, 13, 14, 15, 8, 9, 10, 11, 4, 5]
    assert watcher.state()["monitor.label"].tolist() == [0] * 4 + [2] * 4 + [1] * 2
    other = monitor(world, num_images=10)
    for name, tensor in other.state().items():
        tensor.copy_(watcher.state()[name])
    question = [Watched(noise(3, DIM, seed=9), None)], batch([50, 51, 52], [0, 1, 2])
    mine, others = (each.observe(9, *question) for each in (watcher, other))
    assert mine is not None
    assert others is not None
    assert mine.read() == others.read()
    assert monitor(world, num_classes=0).state() == {}, "a stream: nobody knows its classes"


@given(st.integers(1, 40), st.integers(1, 100), st.integers(1, 300))
def test_dear_figures_come_once_in_each_stretch(log_every: int, monitor_every: int, num_steps: int) -> None:
    """At logged steps only, and the last; the same steps for a run that is resumed, for the step alone decides."""
    due = [step for step in range(1, num_steps + 1) if is_due(step, log_every, num_steps)]
    dear = [step for step in due if step == num_steps or step // monitor_every > (step - log_every) // monitor_every]
    assert due[-1] == dear[-1] == num_steps
    stretches = [step // monitor_every for step in dear[:-1]]
    assert len(set(stretches)) == len(stretches)
    if log_every <= monitor_every:
        assert set(range(1, (due[-2] if len(due) > 1 else 0) // monitor_every + 1)) <= set(stretches)


def test_figures_are_measured_at_logged_steps_only(world: World) -> None:
    watcher = monitor(world, log_every=5, monitor_every=20)
    found = {}
    for step in range(1, 41):
        observed = watcher.observe(step, [Watched(noise(4, DIM, seed=step), None)], batch([4 * step + i for i in range(4)], [0, 1, 2, 0]))
        if observed is not None:
            found[step] = set(observed.read())
    cheap, dear = {"feature_std"}, {"feature_std", "effective_rank", "knn_top1"}
    assert found == {step: dear if step in (20, 40) else cheap for step in range(5, 41, 5)}
