"""EquiMod's two measures on held-out images, for the whole augmentation and for each of its operations alone.

y_0 is the embedding of the un-augmented image, y_t that of the augmented one, ŷ_t what is predicted of it from y_0 and the
augmentation's parameters, all by EquiMod's own projector (Devillers & Lefort, ICLR 2023; `eval_eqgain` and `eval_eqgain_bis` of the
authors' code), means over images and both views' recipes:

    absolute   cos(y_t, ŷ_t) - cos(y_t, y_0)               0 where the module fell back to invariance; more is more equivariant
    relative   (1 - cos(y_t, y_0)) / (1 - cos(y_t, ŷ_t))   1 there; more is more equivariant

The network is the student as in the authors' code, of BYOL the online one, with the moving statistics of its batch norms. `all` is the
augmentation as it is trained with, g included, what the authors log. By operation (crop, flip, colour, grey, blur, solarize) only that
one is applied, always, with parameters drawn as in the recipe; of what is not applied the parameters are those of the identity. An
operation is measured on the views whose recipe has it.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from equissl import cache, transforms
from equissl.augmentation import Augmentation, described, names
from equissl.config import Photometry, PretrainConfig
from equissl.data.loader import PlainImages, crops, cut, middle_square
from equissl.data.shards import Images
from equissl.equimod import EquiMod
from equissl.evals import Context
from equissl.learnt import Student
from equissl.photometry import Parameters, apply, parameters
from equissl.transforms.base import centre

OPERATIONS = {"colour": "jitter", "grey": "grey", "blur": "blur", "solarize": "solarize"}  # of Photometry: its probability
NOTHING = dict.fromkeys(OPERATIONS.values(), 0.0)
SMALLEST = 1e-12  # of 1 - cos: where both embeddings are y_t itself the ratio is 1


def measure(context: Context, student: Student, data: Images, indices: NDArray[np.int64]) -> dict[str, float]:
    """`absolute` and `relative`, and with each operation `absolute/crop`, …; on rank 0, {} elsewhere."""
    augmented = Augmented(student.config, context.settings.seed)

    def compute(packed: Tensor, chosen: NDArray[np.int64]) -> dict[str, Tensor]:
        return of_images(student, augmented, packed, chosen)

    found, _ = cache.decodable(context, data, indices, augmented, compute, "EquiMod")
    result: dict[str, float] = {}
    for operation in dict.fromkeys(name.partition("/")[0] for name in found):
        both = torch.cat([values for name, values in found.items() if name.partition("/")[0] == operation]).double().mean(dim=0)
        suffix = "" if operation == "all" else f"/{operation}"
        result |= {f"{name}{suffix}": value for name, value in zip(("absolute", "relative"), both.tolist(), strict=True)}
    return result


def of_images(student: Student, augmented: Augmented, packed: Tensor, indices: NDArray[np.int64]) -> dict[str, Tensor]:
    """`{operation/view: (b, 2)}`, absolute and relative of each image."""
    assert student.equimod is not None
    plain, views = augmented.views(packed, indices)
    y0 = _embed(student, student.equimod, plain)
    found = {}
    for name, (images, vector) in views.items():
        y = _embed(student, student.equimod, images)
        of_parameters = student.equimod.of_parameters(vector.to(y0))
        predicted = student.equimod.predictor(torch.cat([y0, of_parameters], dim=1))
        found[name] = torch.stack(measures(y, predicted, y0), dim=1)
    return found


def measures(y: Tensor, predicted: Tensor, y0: Tensor) -> tuple[Tensor, Tensor]:
    """As `equimod.measures`, in double precision, and defined where y is y0."""
    y, predicted, y0 = y.double(), predicted.double(), y0.double()
    with_prediction, with_plain = F.cosine_similarity(y, predicted, dim=-1), F.cosine_similarity(y, y0, dim=-1)
    return with_prediction - with_plain, (1 - with_plain).clamp(min=SMALLEST) / (1 - with_prediction).clamp(min=SMALLEST)


def _embed(student: Student, equimod: EquiMod, images: Tensor) -> Tensor:
    found: Tensor = equimod.projector(student.inv(images))
    return found


class Augmented:
    """A decoded image -> what of its views depends on its pixels before the device, in one row of bytes; and that -> the views.

    Crops are drawn as in pretraining, keyed by (the evaluation's seed, the image's index).
    """

    def __init__(self, config: PretrainConfig, seed: int) -> None:
        self.config = config.model_copy(update={"seed": seed, "pipeline": "fast"})
        self.source_side, self.augmentation = crops(self.config)[1].side, Augmentation(self.config)

    def __call__(self, image: Tensor, index: int) -> Tensor:
        """uint8 `(3, H, W)` -> `(bytes,)`: the un-augmented image; both crops; their boxes and its own, as `PlainImages.boxes`."""
        position = np.array([index])
        plain = PlainImages(self.config, 0, position)
        view1, source2, _ = cut(plain.on_the_way([image]), self.config, 0, position)
        assert plain.images is not None
        assert plain.boxes is not None
        height, width = image.shape[1:]
        top, left, side, _ = middle_square(height, width)
        whole = torch.tensor([[top / height, left / width, side / height, side / width, 0.0]])
        boxes = torch.cat([plain.boxes[0], whole]).view(torch.uint8)
        return torch.cat([plain.images[0].reshape(-1), view1[0].reshape(-1), source2[0].reshape(-1), boxes.reshape(-1)])

    def unpack(self, packed: Tensor) -> tuple[Tensor, Tensor, Tensor, NDArray[np.float32]]:
        """`(b, bytes)` -> un-augmented, first crop `(b, 3, S, S)`, source of the second `(b, 3, S2, S2)` in [0, 1]; boxes `(b, 3, 5)`."""
        sides = [self.config.side, self.config.side, self.source_side]
        *images, boxes = packed.split([*(3 * side**2 for side in sides), 3 * 5 * 4], dim=1)
        plain, first, source = (part.view(-1, 3, side, side).float() / 255 for part, side in zip(images, sides, strict=True))
        return plain, first, source, boxes.cpu().contiguous().view(torch.float32).view(-1, 3, 5).numpy()

    def views(self, packed: Tensor, indices: NDArray[np.int64]) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """The un-augmented images, and by operation and view the augmented ones, both `(b, 3, S, S)` in [0, 1], with what describes the
        augmentation, `(b, p)`, standardised."""
        plain, first, source, boxes = self.unpack(packed)
        config, settings = self.config, self.config.method.views
        known = names(config)
        transform = None if config.transformation is None else transforms.get(config.transformation)
        motion = None if transform is None else transform.draw(config.seed, 0, indices, config.side)
        found = {}

        def add(operation: str, view: int, images: Tensor, box: NDArray[np.float32], drawn: Parameters, moved: bool = False) -> None:
            of_g = None if motion is None else motion.numpy() * moved
            vector = self.augmentation.standardised(described(known, box, drawn, of_g))
            found[f"{operation}/{view + 1}"] = images, vector.to(images.device)

        def g(source: Tensor, fraction: float) -> Tensor:
            if transform is None or motion is None:
                return centre(source, config.side)
            return transform.apply(source, motion.to(source.device), fraction, config.side)

        def draw(view: int, recipe: Photometry) -> Parameters:
            return parameters(recipe, config.seed, 0, indices, view, config.side)

        for view, recipe in enumerate((settings.global1, settings.global2)):
            everything, nothing = draw(view, recipe), draw(view, recipe.model_copy(update=NOTHING))
            coloured = apply(source if view else first, everything)
            add("all", view, g(coloured, 1.0) if view else coloured, boxes[:, view], everything, moved=bool(view))
            mirrored = torch.from_numpy(boxes[:, view, 4] > 0).to(plain.device)[:, None, None, None]
            cropped = centre(source, config.side) if view else first
            unmirrored = boxes[:, view] * np.array([1, 1, 1, 1, 0], dtype=np.float32)
            add("crop", view, torch.where(mirrored, cropped.flip(-1), cropped), unmirrored, nothing)
            if settings.flip > 0:
                add("flip", view, plain.flip(-1), boxes[:, 2] + np.array([0, 0, 0, 0, 1], dtype=np.float32), nothing)
            for operation, probability in OPERATIONS.items():
                if getattr(recipe, probability) > 0:
                    drawn = draw(view, recipe.model_copy(update={**NOTHING, probability: 1.0}))
                    add(operation, view, apply(plain, drawn), boxes[:, 2], drawn)
        return plain, found
