"""What evaluations show in TensorBoard, read back: points with their metadata and pictures, precision over recall."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from google.protobuf import text_format
from PIL import Image
from sklearn.metrics import precision_score, recall_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig
from tensorboard.util.tensor_util import make_ndarray

from equissl import board, evals
from equissl.config import EvaluateConfig, Rotation
from equissl.data.labelled import pair
from equissl.data.shards import ShardSet
from equissl.distributed import World
from equissl.encoder import build_encoder
from equissl.evals import knn, projector


def context(world: World, folder: Path, run_dir: Path | None, task: Any) -> evals.Context:
    pretraining = tiny.config(str(folder))
    settings = EvaluateConfig.model_validate(
        {"checkpoint": "x", "task": task, "preset": "smoke", "num_workers": 0, "batch": 16, "cache": "none"}
    )
    return evals.Context(
        settings, pretraining, build_encoder(pretraining), pair(folder), world, world.device, lambda *_: None, run_dir=run_dir
    )


def test_points_have_their_class_parameters_and_pictures(world: World, photographs: Path, tmp_path: Path) -> None:
    task = {"name": "projector", "num_images": 12, "views": 2, "sprite": 8, "transformation": "rot"}
    stale = tmp_path / "tensorboard" / "of-an-attempt-before"
    stale.mkdir(parents=True)
    figures = projector.run(context(world, photographs, tmp_path, task))
    assert set(figures) == {"same_image", "same_image/inv", "same_image/equi"}
    assert all(0 <= value <= 1 for value in figures.values())
    assert not stale.exists()
    folder = tmp_path / "tensorboard"
    config = text_format.Parse((folder / "projector_config.pbtxt").read_text(), ProjectorConfig())
    assert [info.tensor_name for info in config.embeddings] == ["cls:00000", "z_inv:00000", "z_equi:00000"]
    data, degrees = ShardSet(photographs, "val"), Rotation().max_degrees
    for info in config.embeddings:
        tensors = np.loadtxt(folder / info.tensor_path, delimiter="\t")
        assert len(tensors) == 12 * 3
        head, *rows = [line.split("\t") for line in (folder / info.metadata_path).read_text().splitlines()]
        assert head == ["class", "image", "view", "rotation"]
        assert [row[2] for row in rows] == ["0"] * 12 + ["1"] * 12 + ["2"] * 12
        angles = np.array([float(row[3]) for row in rows])
        assert (angles[:12] == 0).all()
        assert len(set(angles[12:])) == 24, "each view has its own"
        assert np.abs(angles).max() <= degrees
        assert [row[:2] for row in rows[:12]] == [row[:2] for row in rows[12:24]], "the same images"
        keys = {data.key(i): data.classes[data.label(i)] for i in range(data.num_images)}
        assert all(keys[row[1]] == row[0] for row in rows)
        with Image.open(folder / info.sprite.image_path) as sprite:
            assert sprite.size == (6 * 8, 6 * 8)  # 36 points
            assert np.asarray(sprite)[:16].std() > 10, "pictures, not black"
        assert list(info.sprite.single_image_dim) == [8, 8]


def test_the_views_of_an_image_are_nearest_to_it_where_the_feature_does_not_move() -> None:
    originals = torch.eye(4)
    assert projector.same_image(originals, [originals * 3, originals + 0.1]) == 1.0
    assert projector.same_image(originals, [originals, originals.roll(1, dims=0)]) == 0.5


def test_wide_features_are_shown_by_their_principal_axes(tmp_path: Path) -> None:
    """Distances stay what they were, where there are not more points than axes."""
    features = torch.randn(20, 1000, generator=torch.Generator().manual_seed(0))
    rows = [[f"a\tb\n{number}"] for number in range(20)]
    with board.board(tmp_path) as writer:
        board.add_points(writer, "x", features, rows, ["name"], torch.rand(20, 3, 4, 4))
    shown = torch.from_numpy(np.loadtxt(tmp_path / "tensorboard" / "00000" / "x" / "tensors.tsv", delimiter="\t")).float()
    assert shown.shape == (20, 20)
    assert torch.allclose(torch.cdist(shown, shown), torch.cdist(features, features), rtol=1e-3, atol=1e-2)
    assert (tmp_path / "tensorboard" / "00000" / "x" / "metadata.tsv").read_text().splitlines()[1:3] == ["a b 0", "a b 1"]


def test_precision_and_recall_are_those_of_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    probabilities, truth = torch.rand(300, 5, generator=generator).softmax(dim=1), torch.randint(0, 5, (300,), generator=generator)
    found = board.PrecisionRecall()
    for rows in torch.arange(300).split(77):
        found.add(probabilities[rows], truth[rows])
    found.add(probabilities[:3], torch.full((3,), -100))  # images that cannot be decoded
    curve = found.curve()
    one_hot = torch.nn.functional.one_hot(truth, 5).flatten()
    for number in (0, 20, 25, 30):
        predicted = (probabilities.flatten() >= number / (board.NUM_THRESHOLDS - 1)).int()
        assert curve["precision"][number].item() == pytest.approx(precision_score(one_hot, predicted))
        assert curve["recall"][number].item() == pytest.approx(recall_score(one_hot, predicted))
    counts = torch.stack(
        [curve[name] for name in ("true_positive_counts", "false_positive_counts", "true_negative_counts", "false_negative_counts")]
    )
    assert (counts.sum(dim=0) == 1500).all()
    assert curve["precision"][-1] == 0, "nothing is positive there"


def test_the_classifiers_curve_is_in_their_run(world: World, photographs: Path, tmp_path: Path) -> None:
    figures = knn.run(context(world, photographs, tmp_path, "knn"))
    assert figures == knn.run(context(world, photographs, None, "knn"))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert list(events.PluginTagToContent("pr_curves")) == [board.PRECISION_RECALL]
    values = make_ndarray(events.Tensors(board.PRECISION_RECALL)[0].tensor_proto)
    assert values.shape == (6, board.NUM_THRESHOLDS)
    num_val, num_classes = 90, len(ShardSet(photographs, "val").classes)
    assert values[:4, 0].tolist() == [num_val, num_val * (num_classes - 1), 0, 0], "at 0 all are positive"
