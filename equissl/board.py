"""What an evaluation shows in TensorBoard: `tensorboard/` in its run folder, of the last attempt alone. Rank 0 writes."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

NUM_THRESHOLDS = 127
MAX_DIMS = 256  # of a point in the projector
PRECISION_RECALL = "precision_recall"


@contextlib.contextmanager
def board(run_dir: Path) -> Iterator[SummaryWriter]:
    from torch.utils.tensorboard import SummaryWriter

    folder = run_dir / "tensorboard"
    shutil.rmtree(folder, ignore_errors=True)
    with SummaryWriter(str(folder)) as writer:
        yield writer


class PrecisionRecall:
    """Of a classifier, each image × class one decision (micro-averaged), over thresholds 0, 1 / 126, …, 1 of the class's probability.

    Counts alone are kept, however many images there are.
    """

    def __init__(self) -> None:
        self.right = torch.zeros(NUM_THRESHOLDS, dtype=torch.int64)  # decisions on the true class, by the last threshold reached
        self.every = torch.zeros(NUM_THRESHOLDS, dtype=torch.int64)

    def add(self, probabilities: Tensor, truth: Tensor) -> None:
        """`(b, classes)` in [0, 1] and classes `(b,)`; a row of no class, below 0, does not count."""
        probabilities, truth = probabilities[truth >= 0], truth[truth >= 0]
        bins = (probabilities.float() * (NUM_THRESHOLDS - 1)).floor().long()
        self.every += torch.bincount(bins.flatten(), minlength=NUM_THRESHOLDS).cpu()
        self.right += torch.bincount(bins.gather(1, truth[:, None]).flatten(), minlength=NUM_THRESHOLDS).cpu()

    def curve(self) -> dict[str, Tensor]:
        """By threshold `(127,)`: counts of true and false positives and negatives; precision and recall, precision 0 of no positives."""
        right, wrong = (counts.flip(0).cumsum(0).flip(0) for counts in (self.right, self.every - self.right))
        return {
            "true_positive_counts": right,
            "false_positive_counts": wrong,
            "true_negative_counts": wrong[0] - wrong,
            "false_negative_counts": right[0] - right,
            "precision": right / (right + wrong).clamp(min=1),
            "recall": right / right[0].clamp(min=1),
        }

    def write(self, run_dir: Path | None) -> None:
        if run_dir is not None:
            with board(run_dir) as writer:
                counts: dict[str, Any] = {name: values.numpy() for name, values in self.curve().items()}
                writer.add_pr_curve_raw(PRECISION_RECALL, **counts, global_step=0, num_thresholds=NUM_THRESHOLDS)


def add_points(
    writer: SummaryWriter, name: str, features: Tensor, rows: Sequence[Sequence[object]], header: Sequence[str], sprites: Tensor
) -> None:
    """A point of the projector for each of `features` `(n, d)`, with a row of metadata and a picture `(n, 3, s, s)` in [0, 1].

    Of more than `MAX_DIMS` dimensions the principal ones are shown: the projector is a browser.
    """
    centred = features.float() - features.float().mean(dim=0)
    if centred.shape[1] > MAX_DIMS:
        _, _, axes = torch.linalg.svd(centred, full_matrices=False)
        centred = centred @ axes[:MAX_DIMS].T
    texts = [[" ".join(str(value).split()) for value in row] for row in rows]
    writer.add_embedding(centred, texts, sprites, global_step=0, tag=name, metadata_header=list(header))
