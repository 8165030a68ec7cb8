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

Features of all pairs are written to files in the run folder and read batch by batch, so that memory does not grow with the number of
pairs (but for their parameters and order, some 50 bytes each); on a GPU they lie in its memory where a probe's take at most half of what
is free. A stopped evaluation goes on after the last images that were written, and after the last probe that was finished.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torchmetrics.functional.regression import r2_score

from equissl import draws, transforms
from equissl.config import R2, Blur, Color, Coloured, Rotation, Transformation, Translation
from equissl.evals import Context
from equissl.features import CentreCrop, Normed, stream, undecodable
from equissl.files import write_json
from equissl.rows import Rows
from equissl.transforms.base import centre

log = logging.getLogger(__name__)

PROTOCOL = 1
MAIN = "rotation"
HIGHER_IS_BETTER = True

BORDERS = ("inside", "reflect", "zero")
VARIANTS = (*BORDERS, "second_view_only", "random_encoder")
CONTROLS = ("zero", "reflect", "second_view_only", "random_encoder")
SHORT = {"translation_x": "x", "translation_y": "y"}
FOLDER = "pairs"  # in the run folder, removed at the end
FIGURES = "figures.json"  # of the probes that are finished
CHUNK = 8192  # pairs predicted at a time


def direction(metric: str) -> bool | None:
    """Higher is better, but controls are neither."""
    return None if set(metric.split("/")) & set(CONTROLS) else True


def run(context: Context) -> dict[str, float]:
    if context.world.rank != 0:
        return _run(context, None)
    folder = Path(tempfile.mkdtemp()) if context.run_dir is None else context.run_dir / FOLDER
    if not context.weights_sha256:  # there is no telling whether what is there is of these weights
        shutil.rmtree(folder, ignore_errors=True)
    try:
        result = _run(context, folder)
    except BaseException as error:
        if context.run_dir is None or isinstance(error, ValueError):  # images that are got anew are read anew
            shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    return result


def _run(context: Context, folder: Path | None) -> dict[str, float]:
    from equissl.encoder import load_random

    task = context.settings.task
    assert isinstance(task, R2)
    both = {"trained": context.encoder, "random": load_random(context.pretraining, context.device)}
    encoders = {name: Normed(encoder, context.precision) for name, encoder in both.items()}
    pairs = {split: _Pairs(context, task, split, encoders, folder) for split in ("train", "val")}
    if folder is None:
        return {}
    finished = _Finished(folder / FIGURES, pairs["train"].key + pairs["val"].key)
    result: dict[str, float] = {}
    probes = [(name, variant) for name in task.transformations for variant in VARIANTS if pairs["val"].has(name, variant)]
    for number, (name, variant) in enumerate(probes):

        def tick(epoch: int, number: int = number, stage: str = f"probe {name}/{variant}") -> None:
            context.tick(stage, number * task.epochs + epoch, len(probes) * task.epochs, 0)

        probe = f"{name}/{variant}"
        if probe not in finished.figures:
            (train_x, train_y), (val_x, val_y) = (pairs[split].of(name, variant) for split in ("train", "val"))
            # every probe of one transformation begins with the same weights and sees the same order
            predict = fit(train_x, train_y, task, context.settings.seed, task.pairs_per_image, tick, context.device)
            parameters = pairs["val"].transforms[name, "inside"].names if variant == "inside" else ()
            finished.add(probe, _figures(predict(val_x), val_y.to(context.device), name, variant, parameters))
        result |= finished.figures[probe]
    return result


def _figures(prediction: Tensor, truth: Tensor, name: str, variant: str, parameters: Sequence[str]) -> dict[str, float]:
    """Of one probe."""
    pooled = pooled_r2(prediction, truth)
    figures = {name: pooled} if variant == "inside" else {}
    if len(parameters) > 1:
        for parameter, values in zip(parameters, r2_score(prediction, truth, multioutput="raw_values"), strict=True):
            figures[f"{name}/{SHORT.get(parameter, parameter)}"] = values.item()
    return figures | {f"{name}/{variant}": pooled}


class _Finished:
    """The figures of the probes that are finished, for an evaluation that goes on."""

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        self.figures: dict[str, dict[str, float]] = {}
        try:
            found = json.loads(path.read_text())
            if found["key"] == key:
                self.figures = found["figures"]
        except (OSError, ValueError, LookupError, TypeError):  # none, or damaged: the probes are trained
            pass

    def add(self, probe: str, figures: dict[str, float]) -> None:
        self.figures[probe] = figures
        try:
            write_json(self.path, {"key": self.key, "figures": self.figures})
        except (OSError, ValueError) as error:  # a full disk, a figure that is not finite
            log.warning("the figures of %s are not kept for an attempt that goes on: %s", probe, error)


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
    into `folder` (None on other ranks than 0)."""

    def __init__(self, context: Context, task: R2, split: str, encoders: dict[str, Normed], folder: Path | None) -> None:
        settings, side = context.settings, context.pretraining.side
        data = context.data.train if split == "train" else context.data.test
        limit = task.num_train_images if split == "train" else task.num_val_images
        indices = np.sort(draws.permutation(data.num_images, settings.seed, int(split == "val"), draws.Stream.PROBE)[:limit])
        self.num_pairs = task.pairs_per_image if split == "train" else 1
        self.split, self.seed, self.side, self.encoders, self.part = split, settings.seed, side, encoders, task.part
        self.device = context.device
        every = {(name, border): transforms.get(value) for border in BORDERS for name, value in _settings(task, border).items()}
        # of all, or what is seen of an image would depend on what else is asked for
        source = max(transform.source_side(side) for transform in every.values())
        self.transforms = {key: transform for key, transform in every.items() if key[0] in task.transformations}
        stands_on = [PROTOCOL, context.weights_sha256, data.manifest_sha256, data.split, split, settings.seed, side]
        stands_on += [context.device.type, str(context.precision), task.model_dump_json(), len(indices)]
        self.key = hashlib.sha256(json.dumps(stands_on).encode()).hexdigest()
        rows = None if folder is None else Rows(folder / split, self.key, len(indices))
        missing = indices[context.of_rank_0(rows.num_done if rows else 0) :]
        parts = stream(
            data,
            missing,
            CentreCrop(source, source),
            self._encode,
            context.world,
            settings.batch,
            settings.num_workers,
            context.tick,
            f"features of {data.split}",
        )
        bad, done = np.empty(0, dtype=np.int64), 0
        try:
            for found in parts:
                if rows:
                    rows.append(found)
                    seen = missing[done : done + len(found["trained/1"])]
                    bad, done = np.append(bad, seen[undecodable(found).numpy()]), done + len(seen)
                    context.note_undecodable(data, bad, len(indices))
        finally:  # whoever stops goes on from here
            if rows:
                rows.record()
                rows.close()
        self.features, self.where = rows, torch.arange(len(indices))
        self.indices = indices
        if rows:
            there = ~undecodable({"1": rows["trained/1"]})
            context.note_undecodable(data, indices[~there.numpy()], len(indices))
            self.where, self.indices = torch.nonzero(there).flatten(), indices[there.numpy()]

    def parameters(self, name: str, indices: NDArray[np.int64], pair: int) -> Tensor:
        """`(b, p)`, keyed by the image's index, the pair and the split; the same for every border."""
        key = 2 * pair + int(self.split == "val")
        return self.transforms[name, "inside"].draw(self.seed, key, indices, self.side)

    def _encode(self, images: Tensor, indices: NDArray[np.int64]) -> dict[str, Tensor]:
        """uint8 `(b, 3, S2, S2)` -> the features of view 1 `(b, D)` and of every view 2, as `Normed.part` has them; those of an image's
        pairs beside each other, `(b, pairs · D)`."""
        source = images.float() / 255
        view1 = centre(source, self.side)
        features = {f"{which}/1": encoder.part(view1, self.part) for which, encoder in self.encoders.items()}
        for (name, border), transform in self.transforms.items():
            part = centre(source, transform.source_side(self.side))
            found: dict[str, list[Tensor]] = {}
            for pair in range(self.num_pairs):
                parameters = self.parameters(name, indices, pair).to(images.device)
                view2 = transform.apply(part, parameters, 1.0, self.side)
                for which, encoder in self.encoders.items():
                    if which == "trained" or border == "inside":
                        found.setdefault(f"{which}/{name}/{border}", []).append(encoder.part(view2, self.part))
            features |= {which: torch.cat(pairs, dim=1) for which, pairs in found.items()}
        return features

    def has(self, name: str, variant: str) -> bool:
        return variant not in BORDERS or (name, variant) in self.transforms

    def of(self, name: str, variant: str) -> tuple[Inputs, Tensor]:
        """Inputs `(pairs, F)` and parameters `(pairs, p)` of a probe; the pairs of an image lie `num images` rows apart."""
        assert self.features is not None
        which, border = ("random" if variant == "random_encoder" else "trained"), (variant if variant in BORDERS else "inside")
        view1, view2 = self.features[f"{which}/1"], self.features[f"{which}/{name}/{border}"]
        inputs = Inputs(None if variant == "second_view_only" else view1, view2, self.num_pairs, self.where)
        return inputs.near(self.device), torch.cat([self.parameters(name, self.indices, pair) for pair in range(self.num_pairs)])


class Inputs:
    """What a probe reads, as a tensor `(n · pairs, F)` of which rows can be taken; nothing else of it is in memory.

    View 1 `(m, D)` or None, view 2 `(m, pairs · D)`, of which the images `where` `(n,)` are read; row i is of the one i mod n.
    """

    def __init__(self, view1: Tensor | None, view2: Tensor, num_pairs: int, where: Tensor) -> None:
        self.view1, self.view2, self.num_pairs = view1, view2.view(num_pairs * len(view2), -1), num_pairs
        self.num_images, self.where = len(where), where.to(view2.device)
        self.shape = (num_pairs * len(where), self.view2.shape[1] + (0 if view1 is None else view1.shape[1]))
        self.device = view2.device

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Tensor) -> Tensor:
        """`(b,)` -> `(b, F)`."""
        image, pair = self.where[rows % self.num_images], torch.div(rows, self.num_images, rounding_mode="floor")
        second = self.view2[image * self.num_pairs + pair]
        return second if self.view1 is None else torch.cat([self.view1[image], second], dim=1)

    def near(self, device: torch.device) -> Inputs:
        """On a GPU that has room for it: at most half of its free memory. Else where it is."""
        if device.type != "cuda" or 4 * len(self) * self.shape[1] > torch.cuda.mem_get_info(device)[0] / 2:
            return self
        view1 = None if self.view1 is None else self.view1.to(device)
        return Inputs(view1, self.view2.to(device).view(len(self.view2) // self.num_pairs, -1), self.num_pairs, self.where)


# --- the probe -----------------------------------------------------------------------------------------------------------


def fit(
    x: Tensor | Inputs,
    y: Tensor,
    task: R2,
    seed: int,
    pairs_per_image: int,
    tick: Callable[[int], None],
    device: torch.device | None = None,
) -> Callable[[Tensor | Inputs], Tensor]:
    """Inputs `(n, F)`, targets `(n, p)` in native units -> the trained probe, from `(m, F)` to `(m, p)`, on `device` (None: where x is).

    With `task.held_out` that part of the *images* (all pairs of an image together) is not trained on; the epoch with the
    smallest error there is taken, and where none beats it the targets' mean. `tick(epoch)` is called before every epoch.
    """
    num_images, device = len(x) // pairs_per_image, device or x.device
    order = draws.permutation(num_images, seed, 0, draws.Stream.PROBE + 1)
    num_held = round(task.held_out * num_images)
    if num_images - num_held < 2:
        raise ValueError(f"task.held_out {task.held_out} of {num_images} images leaves {num_images - num_held} to train on, fewer than 2")
    held, kept = (
        torch.from_numpy(_all_pairs(part, num_images, pairs_per_image)).to(x.device) for part in (order[:num_held], order[num_held:])
    )
    y = y.to(x.device)
    mean, std = y[kept].mean(dim=0), y[kept].std(dim=0, unbiased=False)
    targets = (y - mean) / std
    probe = _mlp(x.shape[1], task.hidden, y.shape[1], seed).to(device)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=task.base_lr, weight_decay=task.weight_decay)
    best, best_error = None, targets[held].square().mean().to(device) if num_held else None
    for epoch in range(task.epochs):
        tick(epoch)
        shuffled = kept[torch.from_numpy(draws.permutation(len(kept), seed, epoch, draws.Stream.PROBE + 2)).to(x.device)]
        for rows in torch.split(shuffled, task.batch):
            optimizer.zero_grad(set_to_none=True)
            loss = F.mse_loss(probe(x[rows].to(device)), targets[rows].to(device))
            loss.backward()
            optimizer.step()
        if best_error is not None:
            error = torch.zeros((), device=device)
            for rows, predicted in _predicted(probe, x, held, device):
                error += F.mse_loss(predicted, targets[rows].to(device)) * (len(rows) / len(held))
            if error < best_error:
                best, best_error = copy.deepcopy(probe.state_dict()), error
    if best_error is None:
        best = probe.state_dict()
    mean, std = mean.to(device), std.to(device)
    if best is None:
        return lambda inputs: mean.expand(len(inputs), -1)
    probe.load_state_dict(best)

    def predict(inputs: Tensor | Inputs) -> Tensor:
        everything = torch.arange(len(inputs), device=inputs.device)
        return torch.cat([predicted * std + mean for _, predicted in _predicted(probe, inputs, everything, device)])

    return predict


def _predicted(probe: nn.Module, x: Tensor | Inputs, rows: Tensor, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Some of the rows and what the probe makes of them, until all are done."""
    for chunk in torch.split(rows, CHUNK):
        with torch.no_grad():
            predicted: Tensor = probe(x[chunk].to(device))
        yield chunk, predicted


def _all_pairs(images: NDArray[np.int64], num_images: int, pairs_per_image: int) -> NDArray[np.int64]:
    return (images[:, None] + num_images * np.arange(pairs_per_image)).ravel()


def _mlp(width: int, hidden: int, out: int, seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):  # torch's own initialisation, drawn on the CPU, without touching the global state
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, out))
