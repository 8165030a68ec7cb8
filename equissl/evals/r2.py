"""R² of a transformation's parameters, predicted from the frozen features of the original and the transformed view.

Protocol of SIE (Garrido et al., ICML 2023), as in the paper: view 1 is the original, view 2 the transformed image; the features of
both (each: CLS ‖ mean patch token after the backbone's last norm, so `(4 D,)`; of a ResNet the pooled feature, so `(2 D,)`; or what
`part` says) go through an MLP hidden-hidden-out with ReLU, mean squared error on standardised parameters, Adam with constant rate. R² is
in native units on the validation split, of a named data set on its test split. No labels are read.

Its weakness: the border of a warped image tells the angle without any understanding. So with every figure come its controls,
each with a probe of its own, on the same images and parameters:

    rotation, rotation/inside     both views, no pixel from outside the image (view 2 is cut from a warped larger source)
    translation/x, colour/hue, …  the same probe, each parameter alone, where there are several
    rotation/reflect, …/zero      both views, border reflected or black
    rotation/second_view_only     border inside, but the probe never sees the original: what the angle alone cannot explain
    rotation/random_encoder       border inside, the same architecture untrained

The figure without a variant is pooled as SIE does: one mean over all parameters, so that of `colour` says little about the hue,
whose range is a quarter of the others'. Colour has no border, and no variants of it. View 1 is the same for all of them, and
whichever of them are asked for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torchmetrics.functional.regression import r2_score

from equissl import cache, draws, transforms
from equissl.config import R2, Blur, Color, Coloured, Rotation, Transformation, Translation
from equissl.evals import Context
from equissl.features import CentreCrop, Normed, undecodable
from equissl.transforms.base import centre

PROTOCOL = 1
MAIN = "rotation"
HIGHER_IS_BETTER = True

BORDERS = ("inside", "reflect", "zero")
VARIANTS = (*BORDERS, "second_view_only", "random_encoder")
SHORT = {"translation_x": "x", "translation_y": "y"}


def run(context: Context) -> dict[str, float]:
    from equissl.encoder import load_random

    task = context.settings.task
    assert isinstance(task, R2)
    both = {"trained": context.encoder, "random": load_random(context.pretraining, context.device)}
    encoders = {name: Normed(encoder, context.precision) for name, encoder in both.items()}
    pairs = {"train": _Pairs(context, task, "train", encoders), "val": _Pairs(context, task, "val", encoders)}
    if context.world.rank != 0:
        return {}
    result: dict[str, float] = {}
    probes = [(name, variant) for name in task.transformations for variant in VARIANTS if pairs["val"].has(name, variant)]
    for number, (name, variant) in enumerate(probes):

        def tick(epoch: int, number: int = number, stage: str = f"probe {name}/{variant}") -> None:
            context.tick(stage, number * task.epochs + epoch, len(probes) * task.epochs, 0)

        (train_x, train_y), (val_x, val_y) = (
            [tensor.to(context.device) for tensor in pairs[split].of(name, variant)] for split in ("train", "val")
        )
        # every probe of one transformation begins with the same weights and sees the same order
        predict = fit(train_x, train_y, task, context.settings.seed, task.pairs_per_image, tick)
        prediction = predict(val_x)
        pooled = pooled_r2(prediction, val_y)
        if variant == "inside":
            result[name] = pooled
            parameters = pairs["val"].transforms[name, "inside"].names
            if len(parameters) > 1:
                for parameter, values in zip(parameters, r2_score(prediction, val_y, multioutput="raw_values"), strict=True):
                    result[f"{name}/{SHORT.get(parameter, parameter)}"] = values.item()
        result[f"{name}/{variant}"] = pooled
    return result


def pooled_r2(prediction: Tensor, truth: Tensor) -> float:
    """`(n, p)` twice -> 1 - squared error / squared distance from one mean over all n · p values."""
    return r2_score(prediction.flatten(), truth.flatten()).item()


def _settings(task: R2, border: str) -> dict[str, Transformation]:
    """Of all that can be asked for, with this border; colour, which has none, stands with "inside": it too shows nothing from outside."""
    rotation = Rotation(max_degrees=task.max_degrees, border=border)  # type: ignore[arg-type]
    translation = Translation(max_pixels=task.max_pixels, border=border)  # type: ignore[arg-type]
    blur = Blur(sigma=task.sigma, border=border)  # type: ignore[arg-type]
    every: dict[str, Transformation] = {"rotation": rotation, "translation": translation, "blur": blur}
    if border == "inside":
        every["colour"] = Color(**{name: getattr(task, name) for name in Coloured.model_fields})
    return every


# --- pairs of views ------------------------------------------------------------------------------------------------------


class _Pairs:
    """Features and parameters of all pairs of one split ("train", or "val": what is reported), extracted in one pass over the images
    (on rank 0; elsewhere empty)."""

    def __init__(self, context: Context, task: R2, split: str, encoders: dict[str, Normed]) -> None:
        settings, side = context.settings, context.pretraining.side
        data = context.data.train if split == "train" else context.data.test
        limit = task.num_train_images if split == "train" else task.num_val_images
        indices = np.sort(draws.permutation(data.num_images, settings.seed, int(split == "val"), draws.Stream.PROBE)[:limit])
        self.num_pairs = task.pairs_per_image if split == "train" else 1
        self.split, self.seed, self.side, self.encoders, self.part = split, settings.seed, side, encoders, task.part
        every = {(name, border): transforms.get(value) for border in BORDERS for name, value in _settings(task, border).items()}
        # of all, or what is seen of an image would depend on what else is asked for
        source = max(transform.source_side(side) for transform in every.values())
        self.transforms = {key: transform for key, transform in every.items() if key[0] in task.transformations}
        found = cache.features(
            context, data, indices, CentreCrop(source, source), "", self._encode, f"features of {data.split}", keep=False
        )
        there = ~undecodable(found) if found else torch.ones(len(indices), dtype=torch.bool)
        self.indices = indices[there.numpy()]
        self.features = found if there.all() else {name: found.pop(name)[there] for name in list(found)}

    def parameters(self, name: str, indices: NDArray[np.int64], pair: int) -> Tensor:
        """`(b, p)`, keyed by the image's index, the pair and the split; the same for every border."""
        key = 2 * pair + int(self.split == "val")
        return self.transforms[name, "inside"].draw(self.seed, key, indices, self.side)

    def _encode(self, images: Tensor, indices: NDArray[np.int64]) -> dict[str, Tensor]:
        """uint8 `(b, 3, S2, S2)` -> the features of view 1 and of every view 2, as `Normed.part` has them."""
        source = images.float() / 255
        view1 = centre(source, self.side)
        features = {f"{which}/1": encoder.part(view1, self.part) for which, encoder in self.encoders.items()}
        for (name, border), transform in self.transforms.items():
            part = centre(source, transform.source_side(self.side))
            for pair in range(self.num_pairs):
                parameters = self.parameters(name, indices, pair).to(images.device)
                view2 = transform.apply(part, parameters, 1.0, self.side)
                for which, encoder in self.encoders.items():
                    if which == "trained" or border == "inside":
                        features[f"{which}/{name}/{border}/{pair}"] = encoder.part(view2, self.part)
        return features

    def has(self, name: str, variant: str) -> bool:
        return variant not in BORDERS or (name, variant) in self.transforms

    def of(self, name: str, variant: str) -> tuple[Tensor, Tensor]:
        """Inputs `(pairs, F)` and parameters `(pairs, p)` of a probe; the pairs of an image lie `num images` rows apart."""
        which, border = ("random" if variant == "random_encoder" else "trained"), (variant if variant in BORDERS else "inside")
        rows = []
        for pair in range(self.num_pairs):
            view1, view2 = self.features[f"{which}/1"], self.features[f"{which}/{name}/{border}/{pair}"]
            rows.append(view2 if variant == "second_view_only" else torch.cat([view1, view2], dim=1))
        return torch.cat(rows), torch.cat([self.parameters(name, self.indices, pair) for pair in range(self.num_pairs)])


# --- the probe -----------------------------------------------------------------------------------------------------------


def fit(x: Tensor, y: Tensor, task: R2, seed: int, pairs_per_image: int, tick: Callable[[int], None]) -> Callable[[Tensor], Tensor]:
    """Inputs `(n, F)`, targets `(n, p)` in native units -> the trained probe, from `(m, F)` to `(m, p)`.

    With `task.held_out` that part of the *images* (all pairs of an image together) is not trained on; the epoch with the
    smallest error there is taken, and where none beats it the targets' mean. `tick(epoch)` is called before every epoch.
    """
    num_images = len(x) // pairs_per_image
    order = draws.permutation(num_images, seed, 0, draws.Stream.PROBE + 1)
    num_held = round(task.held_out * num_images)
    if num_images - num_held < 2:
        raise ValueError(f"task.held_out {task.held_out} of {num_images} images leaves {num_images - num_held} to train on, fewer than 2")
    held, kept = (
        torch.from_numpy(_all_pairs(part, num_images, pairs_per_image)).to(x.device) for part in (order[:num_held], order[num_held:])
    )
    mean, std = y[kept].mean(dim=0), y[kept].std(dim=0, unbiased=False)
    targets = (y - mean) / std
    probe = _mlp(x.shape[1], task.hidden, y.shape[1], seed).to(x.device)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=task.base_lr, weight_decay=task.weight_decay)
    best, best_error = None, targets[held].square().mean() if num_held else None
    for epoch in range(task.epochs):
        tick(epoch)
        shuffled = kept[torch.from_numpy(draws.permutation(len(kept), seed, epoch, draws.Stream.PROBE + 2)).to(x.device)]
        for rows in torch.split(shuffled, task.batch):
            optimizer.zero_grad(set_to_none=True)
            loss = F.mse_loss(probe(x[rows]), targets[rows])
            loss.backward()
            optimizer.step()
        if best_error is not None:
            with torch.no_grad():
                error = F.mse_loss(probe(x[held]), targets[held])
            if error < best_error:
                best, best_error = copy.deepcopy(probe.state_dict()), error
    if best_error is None:
        best = probe.state_dict()
    if best is None:
        return lambda inputs: mean.expand(len(inputs), -1)
    probe.load_state_dict(best)

    def predict(inputs: Tensor) -> Tensor:
        with torch.no_grad():
            standardised: Tensor = probe(inputs)
        return standardised * std + mean

    return predict


def _all_pairs(images: NDArray[np.int64], num_images: int, pairs_per_image: int) -> NDArray[np.int64]:
    return (images[:, None] + num_images * np.arange(pairs_per_image)).ravel()


def _mlp(width: int, hidden: int, out: int, seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):  # torch's own initialisation, drawn on the CPU, without touching the global state
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, out))
