"""How features answer to transformations of the image: invariance, equivariance, EquiMod's measures, images on the path.

Of each transformation g (parameters θ drawn in the task's ranges, keyed by (seed, the image's index); the middle of a larger source: no
pixel from outside the image tells of g) and each part z of the features of the encoder that leaves the run:

    inv        CLS token of z_inv, what the method's head reads; the plain CLS token where there is no split
    equi       mean patch of z_equi; only where the representation is split
    backbone   CLS ‖ mean patch after the backbone's last norm; of a ResNet the pooled feature

on the validation images x_i, n of them:

    g/z/distance    mean_i |z(g x_i) - z(x_i)|² / mean_{i≠j} |z(x_i) - z(x_j)|²: how far g moves an image as a part of how far other images
                    are. 0 is invariant; 1: as far as another image. Of inv lower is what the methods aim at; of equi neither.
    g/inv/cosine    mean_i cos(z(g x_i), z(x_i)). 1 is invariant. Of features that share a large mean it is near 1 whatever they are:
                    read the distance with it.
    g/z/explained   of equi and backbone: R² of a linear prediction of the change Δ_i = P (z(g x_i) - z(x_i)) on images it was not fitted
                    on, 1 - sum_i |Δ_i - Δ̂_i|² / sum_i |Δ_i - mean Δ|². P are the first `num_components` principal components of the
                    training images' z. Δ̂ is linear in the products of (1, scores of x_i) and (1, monomials of θ of degree 1 and 2), fitted
                    by ridge regression in closed form, its strength chosen on held-out training images. 1: the change is a function of
                    the parameters, linear in z, as a representation of a group is; 0: what g does cannot be foreseen, or nothing moves.

with their controls: `…/random_encoder`, the same architecture untrained; and `…/explained/without_parameters`, predicted from z(x_i)
alone: what a return to the mean explains. Distances and R² are scale-free: neither a factor nor a shift of z changes them. Linear
prediction of one view's features from the other's and the parameters is what SIE trains and scores (Garrido et al., ICML 2023, by
retrieval); that it is fitted afterwards, to any features, is ours.

Where the pretraining has EquiMod, `equimod/…` are its own measures (`displacements`); where it has the auxiliary `reconstruction`,
`reconstruction/…` are errors of images decoded on the path, trained fractions and others, lower is better (`between`), with a picture.
Both are of the student, from which they were learnt. Of exports and of runs that are not complete neither is measured, and the result
says so. Forward passes are float32 whatever the device: rounding to bfloat16 would be a change of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from equissl import between, cache, displacements, draws, transforms
from equissl.config import Blur, Color, Coloured, Equivariance, Rotation, Transformation, Translation
from equissl.data.shards import Images
from equissl.encoder import Encoder, Features
from equissl.evals import Context
from equissl.features import CentreCrop
from equissl.learnt import Student
from equissl.photometry import normalise
from equissl.transforms.base import centre

PROTOCOL = 1
MAIN = "rotation/backbone/explained"
HIGHER_IS_BETTER = True  # of the main metric; of the others `direction`

STRENGTHS = tuple(10.0**power for power in range(-6, 3))  # of the ridge, for each training image and standardised input
PREDICTED = ("equi", "backbone")  # parts whose change is predicted


def run(context: Context) -> dict[str, float]:
    """Raises ValueError where the run lacks heads that measures need, and for too few images."""
    from equissl.encoder import load_random

    task = context.settings.task
    assert isinstance(task, Equivariance)
    student = _student(context)
    sets = {"train": context.data.train, "val": context.data.test}
    indices = {split: _chosen(context, data.num_images, split) for split, data in sets.items()}
    encoders = {"": context.encoder, "/random_encoder": load_random(context.pretraining, context.device)}
    pairs = _Pairs(context, task, encoders)
    features, left = {}, {}
    for split, data in sets.items():
        features[split], left[split] = pairs.features(data, indices[split], split)
    of_equimod = of_path = {}
    if student is not None and student.equimod is not None:
        of_equimod = displacements.measure(context, student, sets["val"], indices["val"])
    if student is not None and student.decoders is not None:
        of_path = between.measure(context, student, sets["val"], indices["val"])
    if context.world.rank != 0:
        return {}
    result: dict[str, float] = {}
    for number, (suffix, part) in enumerate(product(encoders, (*PREDICTED, "inv"))):
        if (key := f"{part}{suffix}") not in features["val"]:
            continue
        context.tick(f"measures of {key}", number, 3 * len(encoders), 0)
        before = {split: features[split][key].to(context.device) for split in sets if key in features[split]}
        basis = Basis(before["train"], task.num_components) if part in PREDICTED else None
        for name in task.transformations:
            after = {split: features[split][f"{key}/{name}"].to(context.device) for split in before}
            if basis is not None:
                theta = {split: pairs.scaled(name, left[split], split).to(context.device) for split in sets}
                result[f"{name}/{part}/explained{suffix}"] = explained(basis, before, after, theta, task.held_out, context.settings.seed)
                if not suffix:
                    nothing = {split: values[:, :0] for split, values in theta.items()}
                    alone = explained(basis, before, after, nothing, task.held_out, context.settings.seed)
                    result[f"{name}/{part}/explained/without_parameters"] = alone
            else:
                cosine = F.cosine_similarity(before["val"].double(), after["val"].double(), dim=1)
                result[f"{name}/{part}/cosine{suffix}"] = cosine.mean().item()
            result[f"{name}/{part}/distance{suffix}"] = distance(before["val"], after["val"])
    for prefix, found in (("equimod", of_equimod), ("reconstruction", of_path)):
        result |= {f"{prefix}/{name}": value for name, value in found.items()}
    return result


def direction(metric: str) -> bool | None:
    """Whether higher is better; None where neither is: controls, and how far features move that are to answer to g."""
    if metric.endswith(("/random_encoder", "/without_parameters", *(f"/{control}" for control in between.CONTROLS))):
        return None
    if metric.startswith("reconstruction/"):
        return False
    if metric.endswith("/distance"):
        return False if metric.endswith("/inv/distance") else None
    return True


def distance(z: Tensor, moved: Tensor) -> float:
    """`(n, d)` twice: mean squared distance of the pairs over that of different rows of z; 0 where all of these are the same."""
    z, moved = z.double(), moved.double()
    among = 2 * z.var(dim=0).sum()  # the mean over i != j of |z_i - z_j|²
    return (((moved - z).square().sum(dim=1).mean() / among).item()) if among > 0 else 0.0


class Basis:
    """The first principal components of features."""

    def __init__(self, z: Tensor, num_components: int) -> None:
        """`(n, d)`; of fewer than `num_components` all."""
        z = z.double()
        self.mean = z.mean(dim=0)
        _, eigenvectors = torch.linalg.eigh((z - self.mean).T @ (z - self.mean))
        self.components = eigenvectors.flip(1)[:, : min(num_components, len(z) - 1)]  # more have no variance
        self.scale = ((z - self.mean) @ self.components).std(dim=0, correction=0)  # (c,)

    def scores(self, z: Tensor) -> Tensor:
        """`(n, d)` -> `(n, c)`, each with the variance 1 over the images of the basis."""
        found: Tensor = (z.double() - self.mean) @ self.components / self.scale.clamp(min=1e-12)
        return found

    def change(self, z: Tensor, moved: Tensor) -> Tensor:
        """`(n, d)` twice -> `(n, c)`."""
        found: Tensor = (moved.double() - z.double()) @ self.components
        return found


def explained(
    basis: Basis, z: Mapping[str, Tensor], moved: Mapping[str, Tensor], theta: Mapping[str, Tensor], held_out: float, seed: int
) -> float:
    """R² on "val" of the prediction fitted on "train": features `(n, d)` twice, and parameters `(n, p)` in [-1, 1]; p may be 0.

    0 where nothing changes. Raises ValueError for too few images.
    """
    n = len(z["train"])
    num_held = round(held_out * n)
    if num_held < 2 or n - num_held < 2:
        raise ValueError(f"task.held_out {held_out} of {n} training images: of both parts there must be 2 at least")
    inputs = {split: _inputs(basis.scores(z[split]), theta[split]) for split in ("train", "val")}
    change = {split: basis.change(z[split], moved[split]) for split in ("train", "val")}
    order = torch.from_numpy(draws.permutation(n, seed, 0, draws.Stream.PROBE + 4)).to(change["train"].device)
    held, kept = order[:num_held], order[num_held:]
    x, y = inputs["train"], change["train"]
    errors = [(x[held] @ weights + constant - y[held]).square().sum() for weights, constant in _ridge(x[kept], y[kept], STRENGTHS)]
    ((weights, constant),) = _ridge(x, y, (STRENGTHS[int(torch.stack(errors).argmin())],))
    x, y = inputs["val"], change["val"]
    spread = (y - y.mean(dim=0)).square().sum()
    if spread <= 1e-12 * len(y) * basis.scale.square().sum():  # the same up to rounding: there is nothing to explain
        return 0.0
    return (1 - (x @ weights + constant - y).square().sum() / spread).item()


def _inputs(scores: Tensor, theta: Tensor) -> Tensor:
    """`(n, c)`, `(n, p)` -> the products of (1, scores) and (1, monomials of θ of degree 1 and 2), without 1 itself."""
    one, theta, p = scores.new_ones(len(scores), 1), theta.double(), theta.shape[1]
    rows, columns = torch.triu_indices(p, p)
    monomials = torch.cat([one, theta, theta[:, rows] * theta[:, columns]], dim=1)
    return (torch.cat([one, scores], dim=1)[:, :, None] * monomials[:, None, :]).flatten(1)[:, 1:]


def _ridge(x: Tensor, y: Tensor, strengths: tuple[float, ...]) -> list[tuple[Tensor, Tensor]]:
    """`(n, f)`, `(n, c)` -> for each strength weights `(f, c)` and constant `(c,)`: the minimum of |y - xw - b|² + strength · n · |σ w|²,
    σ the inputs' standard deviations."""
    x_mean, y_mean = x.mean(dim=0), y.mean(dim=0)
    deviation = x.std(dim=0, correction=0)
    deviation = torch.where(deviation > 1e-9, deviation, 1.0)
    standard = (x - x_mean) / deviation
    eigenvalues, vectors = torch.linalg.eigh(standard.T @ standard)
    projected = vectors.T @ (standard.T @ (y - y_mean))
    found = []
    for strength in strengths:
        weights = vectors @ (projected / (eigenvalues.clamp(min=0) + strength * len(x))[:, None]) / deviation[:, None]
        found.append((weights, y_mean - x_mean @ weights))
    return found


# --- the images --------------------------------------------------------------------------------------------------------------


def _student(context: Context) -> Student | None:
    """Where the pretraining has something that is measured with it."""
    pretraining = context.pretraining
    if not pretraining.method.sees_plain and (pretraining.auxiliary is None or pretraining.auxiliary.name != "reconstruction"):
        return None
    run_dir = Path(context.settings.checkpoint or "").expanduser()
    if context.settings.checkpoint is None or not (run_dir / "COMPLETE").is_file():
        context.chosen["not_measured"] = "EquiMod's measures and reconstructions: only a complete run has the student and its decoders"
        return None
    result = json.loads((run_dir / "result.json").read_text())
    needed = ["student"] * pretraining.method.has_teacher
    needed += ["decoders"] * (pretraining.auxiliary is not None and pretraining.auxiliary.name == "reconstruction")
    if any(f"{file}_sha256" not in result for file in needed):  # an earlier version made the run
        context.chosen["not_measured"] = "EquiMod's measures and reconstructions: an earlier version made this run, which did not keep them"
        return None
    return Student(run_dir, pretraining, context.encoder, context.world)


def _chosen(context: Context, num_images: int, split: str) -> NDArray[np.int64]:
    task, seed = context.settings.task, context.settings.seed
    assert isinstance(task, Equivariance)
    limit = task.num_train_images if split == "train" else task.num_val_images
    return np.sort(draws.permutation(num_images, seed, int(split == "val"), draws.Stream.PROBE)[:limit])


def _transformations(task: Equivariance) -> dict[str, Transformation]:
    every: dict[str, Transformation] = {
        "rotation": Rotation(max_degrees=task.max_degrees),
        "translation": Translation(max_pixels=task.max_pixels),
        "colour": Color(**{name: getattr(task, name) for name in Coloured.model_fields}),
        "blur": Blur(sigma=task.sigma),
    }
    return {name: every[name] for name in task.transformations}


class _Pairs:
    """Features of images and of what each transformation makes of them."""

    def __init__(self, context: Context, task: Equivariance, encoders: dict[str, Encoder]) -> None:
        self.context, self.side, self.encoders = context, context.pretraining.side, encoders
        settings = _transformations(task)
        self.transforms = {name: transforms.get(value) for name, value in settings.items()}
        # of all there are, or what is seen of an image would depend on what else is asked for
        every = task.model_copy(update={"transformations": ("rotation", "translation", "colour", "blur")})
        self.source = max(transforms.get(value).source_side(self.side) for value in _transformations(every).values())

    def features(self, data: Images, indices: NDArray[np.int64], split: str) -> tuple[dict[str, Tensor], NDArray[np.int64]]:
        """`(n, d)` by part and encoder; of transformed images the key ends with the transformation. And the n images. On rank 0."""
        parts = PREDICTED if split == "train" else (*PREDICTED, "inv")

        def compute(images: Tensor, chosen: NDArray[np.int64]) -> dict[str, Tensor]:
            source = images.float() / 255
            found: dict[str, Tensor] = {}
            views = {"": centre(source, self.side)}
            for name, transform in self.transforms.items():
                needed = centre(source, transform.source_side(self.side))
                views[f"/{name}"] = transform.apply(needed, self._draw(name, chosen, split).to(source.device), 1.0, self.side)
            for suffix, encoder in self.encoders.items():
                for name, view in views.items():
                    found |= {f"{part}{suffix}{name}": z for part, z in _parts(encoder, view).items() if part in parts}
            return found

        return cache.decodable(self.context, data, indices, CentreCrop(self.source, self.source), compute, f"features of {data.split}")

    def scaled(self, name: str, indices: NDArray[np.int64], split: str) -> Tensor:
        """`(n, p)`: the parameters, their range mapped to [-1, 1]."""
        low, high = torch.tensor(self.transforms[name].ranges(self.side)).T
        found: Tensor = (2 * self._draw(name, indices, split) - (low + high)) / (high - low)
        return found

    def _draw(self, name: str, indices: NDArray[np.int64], split: str) -> Tensor:
        return self.transforms[name].draw(self.context.settings.seed, int(split == "val"), indices, self.side)


def _parts(encoder: Encoder, images: Tensor) -> dict[str, Tensor]:
    """`(b, 3, S, S)` in [0, 1] -> `(b, d)` each."""
    features: Features = encoder(normalise(images), None)
    patches: Tensor = features.patches
    found = {"inv": features.inv_cls}
    found["backbone"] = torch.cat([features.cls, patches.mean(dim=1)], dim=1) if patches.shape[1] else features.cls
    if features.equi is not None:
        found["equi"] = features.equi.mean(dim=1)
    return found
