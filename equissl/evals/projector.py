"""Where transformations move features: validation images and views of them, for TensorBoard's embeddings projector.

Each image is there as it is (view 0) and transformed `views` times; a point's metadata are its class, its image and the parameters that
were drawn. `equihpc tensorboard` shows them: colour the points of z_equi by an angle, and those of z_inv by the image.

    same_image              share of the transformed views whose nearest image (cosine, among all images as they are) is their own;
                            of the CLS token after the backbone's last norm
    same_image/inv, /equi   of z_inv (CLS) and z_equi (mean patch), where the representation is split

1 says that a feature does not see the transformation, or sees the image before it; it is no figure of a paper.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from equissl import board, draws, transforms
from equissl.config import Projector
from equissl.evals import Context
from equissl.features import CentreCrop, Normed, extract, undecodable
from equissl.transforms.base import centre

PROTOCOL = 1
MAIN = "same_image"
HIGHER_IS_BETTER = True

PARTS = {"backbone": "same_image", "inv": "same_image/inv", "equi": "same_image/equi"}
NAMES = {"backbone": "cls", "inv": "z_inv", "equi": "z_equi"}


def run(context: Context) -> dict[str, float]:
    settings, task, side = context.settings, context.settings.task, context.pretraining.side
    assert isinstance(task, Projector)
    data = context.data.test
    indices = np.sort(draws.permutation(data.num_images, settings.seed, 1, draws.Stream.PROBE)[: task.num_images])
    transform, encoder = transforms.get(task.transformation), Normed(context.encoder, context.precision)
    source = transform.source_side(side)
    parts = ["backbone", *(["inv", "equi"] if context.encoder.split is not None else [])]
    views = range(1 + task.views)  # 0: as it is

    def parameters(chosen: NDArray[np.int64], view: int) -> Tensor:
        drawn = transform.draw(settings.seed, view, chosen, side)
        return drawn if view else torch.zeros_like(drawn)

    def compute(pixels: Tensor, chosen: NDArray[np.int64]) -> dict[str, Tensor]:
        images = pixels.float() / 255
        found: dict[str, Tensor] = {}
        for view in views:
            shown = transform.apply(images, parameters(chosen, view).to(images.device), 1.0, side) if view else centre(images, side)
            small = F.interpolate(shown, (task.sprite, task.sprite), mode="bilinear", antialias=True)
            found |= {f"{part}/{view}": _of_cls(encoder.part(shown, part), part, context) for part in parts}
            found[f"sprite/{view}"] = small.flatten(1)
        return found

    geometry = CentreCrop(source, source)
    found = extract(
        data, indices, geometry, compute, context.world, settings.batch, settings.num_workers, context.tick, f"features of {data.split}"
    )
    if context.world.rank != 0:
        return {}
    there = ~undecodable(found)
    context.note_undecodable(data, indices[~there.numpy()], len(indices))
    found, indices = {name: values[there] for name, values in found.items()}, indices[there.numpy()]
    if context.run_dir is not None:
        labels = [data.classes[label] if label >= 0 else "" for label in data.labels[indices].tolist()]
        drawn = [parameters(indices, view) for view in views]
        rows = [
            [labels[number], data.key(int(index)), view, *(f"{value:.4g}" for value in drawn[view][number].tolist())]
            for view in views
            for number, index in enumerate(indices)
        ]
        sprites = torch.cat([found[f"sprite/{view}"] for view in views]).unflatten(1, (3, task.sprite, task.sprite))
        with board.board(context.run_dir) as writer:
            for part in parts:
                features = torch.cat([found[f"{part}/{view}"] for view in views])
                board.add_points(writer, NAMES[part], features, rows, ["class", "image", "view", *transform.names], sprites)
    return {PARTS[part]: same_image(found[f"{part}/0"], [found[f"{part}/{view}"] for view in views if view]) for part in parts}


def _of_cls(features: Tensor, part: str, context: Context) -> Tensor:
    """CLS alone of `Normed.part`'s CLS ‖ mean patch; z_equi and a ResNet's pooled feature as they are."""
    has_mean = part != "equi" and context.pretraining.backbone.facts.kind != "resnet"
    return features[:, : features.shape[1] // 2] if has_mean else features


def same_image(originals: Tensor, views: list[Tensor]) -> float:
    """`(n, d)` and as many for each view: the share of views whose nearest original is that of their own row."""
    unit = F.normalize(originals, dim=1)
    own = torch.arange(len(unit))
    return torch.cat([(F.normalize(view, dim=1) @ unit.T).argmax(dim=1) == own for view in views]).double().mean().item()
