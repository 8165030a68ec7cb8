"""Features of images shared over ranks: each exactly once, in order, whatever their number, the ranks and the batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from harness import run_ranks

from equissl import distributed, features

NUMBERS, BATCHES = (1, 2, 3, 5, 6, 7, 12, 13), (1, 2, 3, 5, 20)


def seen_on_this_rank() -> list[tuple[Any, ...]]:
    """Of each number of images and batch: the images that passed `compute` here, the ticks, and what came out."""
    world, found = distributed.init(), []
    features.decode = lambda data, i: torch.full((3, 2, 2), i, dtype=torch.uint8)  # type: ignore[assignment]
    for n in NUMBERS:
        for batch in BATCHES:
            indices, passed, ticks = np.arange(n) * 3 + 1, [], []

            def compute(images: Any, chosen: Any, passed: list[int] = passed) -> dict[str, Any]:
                passed.extend(chosen.tolist())
                return {"seen": images.flatten(1)[:, :2], "index": torch.from_numpy(chosen)[:, None].double()}

            made = features.extract(
                None,  # type: ignore[arg-type]
                indices,
                lambda image, _: image,
                compute,
                world,
                batch,
                0,
                lambda *values, ticks=ticks: ticks.append(values),
                "",
            )
            found.append((n, batch, passed, ticks, {name: values.tolist() for name, values in made.items()}))
    distributed.close()
    return found


def test_each_image_once_and_in_order() -> None:
    for ranks in (2, 3):
        first, *others = run_ranks(seen_on_this_rank, ranks)
        for number, (n, batch, passed, ticks, made) in enumerate(first):
            rest = [other[number] for other in others]
            images = [3 * i + 1 for i in range(n)]
            assert sorted(sum((each[2] for each in rest), passed)) == images, (n, batch, ranks)
            assert all(each[3] == ticks for each in rest), "ticks are collective"
            assert [images_so_far for *_, images_so_far in ticks] == sorted({min(batch * ranks * i, n) for i in range(len(ticks))})
            assert all(each[4] == {} for each in rest)
            assert made == {"seen": [[i, i] for i in images], "index": [[i] for i in images]}
