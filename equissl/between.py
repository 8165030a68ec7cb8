"""Images on a transformation's path, decoded from equivariant features at fractions that no decoder was trained for.

The auxiliary `reconstruction` has one decoder for each fraction f_k of its path, and none that could be told a fraction (Wang et al.:
"two independent decoders … operating on the concatenated equivariant features"). Nothing in the paper says how to read a fraction in
between. Ours: features are asked to vary linearly along the path. With z1 = z_equi(x) and z2 = z_equi(g x), patch by patch,

    û_t = decoder_k([z1 ; z1 + (t / f_k) · (z2 - z1)]),

where f_k is the first trained fraction that is not below t, and the last one for those beyond it (then t / f_k > 1: extrapolation).
The decoder is asked for the image at f_k of the way to a view that is itself t / f_k of the way. At t = f_k that is what was trained.

Both views are of the same middle of an image: the first as it is, the second transformed by g, with the pretraining's range and border.
Where the pretraining's augmentation is `all`, its two views were other crops in other colours: this is then an easier pair.

The error of what is shown for u_t is mean((û - u_t)²) over all images, pixels and channels, normalised as in training, divided by that of
the best single colour, the mean over all images: 0 is perfect, 1 a plain area. The same of three that need no features:

    untransformed   u_0 for u_t: nothing has moved yet
    transformed     u_1 for u_t: all has moved already
    blend           (1 - t) u_0 + t u_1: pixels cross-faded, which is what features do that only carry two images
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from equissl import cache, transforms
from equissl.data.loader import decode
from equissl.data.shards import Images
from equissl.evals import Context
from equissl.features import CentreCrop
from equissl.learnt import Student
from equissl.photometry import denormalise, normalise

CONTROLS = ("untransformed", "transformed", "blend")
SHOWN = 8  # images of the picture
PIXELS = 96  # smaller images are enlarged to about this side
HEADER = 14  # pixels above the columns, for what they are


def shown_fractions(trained: Sequence[float]) -> list[float]:
    """The trained ones, and those halfway between them and their neighbours (0 and 1 among these): of 1/3, 2/3 also 1/6, 1/2, 5/6."""
    ends = [0.0, *trained] if trained[-1] == 1 else [0.0, *trained, 1.0]
    halfway = [(low + high) / 2 for low, high in pairwise(ends)]
    return sorted([*trained, *halfway])


def choose(trained: Sequence[float], fraction: float) -> tuple[int, float]:
    """Which decoder shows this fraction, and how far its second view is on the way."""
    number = next((k for k, known in enumerate(trained) if known >= fraction - 1e-9), len(trained) - 1)
    return number, fraction / trained[number]


class Along:
    """The images and reconstructions of one pretraining along its path."""

    def __init__(self, student: Student, seed: int) -> None:
        config = student.config
        assert config.auxiliary is not None
        assert config.transformation is not None
        self.student, self.seed, self.side = student, seed, config.side
        self.trained = config.auxiliary.fractions
        self.fractions = shown_fractions(self.trained)
        self.transform = transforms.get(config.transformation)
        self.geometry = CentreCrop(*[self.transform.source_side(config.side)] * 2)

    def __call__(self, sources: Tensor, indices: NDArray[np.int64]) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        """uint8 `(b, 3, S2, S2)` -> u_0 and u_1 `(b, 3, S, S)`, and for each fraction u_t and û_t; all normalised."""
        source = sources.float() / 255
        parameters = self.transform.draw(self.seed, 1, indices, self.side).to(source.device)

        def at(fraction: float) -> Tensor:
            return self.transform.apply(source, parameters, fraction, self.side)

        first, second = at(0.0), at(1.0)
        z1, z2 = self.student.equi(first), self.student.equi(second)
        decoded = [self._decode(z1, z2, fraction) for fraction in self.fractions]
        return normalise(first), normalise(second), [normalise(at(fraction)) for fraction in self.fractions], decoded

    def _decode(self, z1: Tensor, z2: Tensor, fraction: float) -> Tensor:
        assert self.student.decoders is not None
        number, way = choose(self.trained, fraction)
        decoded: Tensor = self.student.decoders[number](torch.cat([z1, torch.lerp(z1, z2, way)], dim=-1))
        return decoded


def measure(context: Context, student: Student, data: Images, indices: NDArray[np.int64]) -> dict[str, float]:
    """Errors at every fraction on rank 0, where the picture is written too; {} elsewhere."""
    path = Along(student, context.settings.seed)

    def compute(sources: Tensor, chosen: NDArray[np.int64]) -> dict[str, Tensor]:
        return sums(*path(sources, chosen), path.fractions)

    found, indices = cache.decodable(context, data, indices, path.geometry, compute, "reconstruction")
    if context.world.rank != 0:
        return {}
    if context.run_dir is not None:
        some = indices[:: max(1, len(indices) // SHOWN)][:SHOWN]
        with torch.inference_mode():
            images = torch.stack([path.geometry(decode(data, int(i))) for i in some]).to(context.device)
            write(picture(*path(images, some), path.fractions, path.trained), context.run_dir)
    return figures(found, path.fractions, path.trained)


def sums(first: Tensor, second: Tensor, truth: list[Tensor], decoded: list[Tensor], fractions: list[float]) -> dict[str, Tensor]:
    """Of each image `(b, 3, S, S)`: by fraction the mean squared error of what was decoded and of the controls `(b, 4)`, and the
    means of the channels and of their squares `(b, 6)`."""
    found = {}
    for number, (t, u, shown) in enumerate(zip(fractions, truth, decoded, strict=True)):
        candidates = (shown, first, second, torch.lerp(first, second, t))
        found[f"errors/{number}"] = torch.stack([(each - u).square().mean(dim=(1, 2, 3)) for each in candidates], dim=1)
        found[f"moments/{number}"] = torch.cat([u.mean(dim=(2, 3)), u.square().mean(dim=(2, 3))], dim=1)
    return found


def figures(found: dict[str, Tensor], fractions: list[float], trained: Sequence[float]) -> dict[str, float]:
    """What `sums` are of all images -> `trained` and `between` (means over the fractions), their controls, and `t=…`."""
    errors = []
    for number in range(len(fractions)):
        mean, square = found[f"moments/{number}"].double().mean(dim=0).split(3)
        of_one_colour = (square - mean.square()).mean()
        errors.append(found[f"errors/{number}"].double().mean(dim=0) / of_one_colour)
    table = torch.stack(errors)  # (fractions, 4)
    is_trained = torch.tensor([t in trained for t in fractions])
    result: dict[str, float] = {}
    for name, rows in (("trained", table[is_trained]), ("between", table[~is_trained])):
        values = rows.mean(dim=0).tolist()
        result |= {name: values[0], **{f"{name}/{control}": value for control, value in zip(CONTROLS, values[1:], strict=True)}}
    return result | {f"t={t:.2f}": value for t, value in zip(fractions, table[:, 0].tolist(), strict=True)}


# --- the picture -----------------------------------------------------------------------------------------------------------


def picture(
    first: Tensor, second: Tensor, truth: list[Tensor], decoded: list[Tensor], fractions: list[float], trained: Sequence[float]
) -> Image.Image:
    """One row per image: u_0; at each fraction the true image and what was decoded; u_1. Trained fractions are marked by a star."""
    columns = [("original", first)]
    for t, u, shown in zip(fractions, truth, decoded, strict=True):
        columns += [(f"{t:.2f} true", u), (f"{t:.2f}{'*' if t in trained else ''} decoded", shown)]
    columns.append(("transformed", second))
    times = max(1, round(PIXELS / first.shape[-1]))
    step = first.shape[-1] * times + 1
    sheet = Image.new("RGB", (len(columns) * step, HEADER + len(first) * step), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (name, images) in enumerate(columns):
        draw.text((number * step + 2, 1), name, fill="black")
        pixels = denormalise(images.float()).clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).cpu()
        pixels = pixels.repeat_interleave(times, 1).repeat_interleave(times, 2)
        for row, image in enumerate(pixels):
            sheet.paste(Image.fromarray(image.numpy()), (number * step, HEADER + row * step))
    return sheet


def write(sheet: Image.Image, run_dir: Path) -> None:
    """As `pictures/fractions.png`, which the report shows, and to TensorBoard."""
    folder = run_dir / "pictures"
    folder.mkdir(exist_ok=True)
    temporary = folder / ".fractions.png"
    sheet.save(temporary, "PNG")
    temporary.replace(folder / "fractions.png")
    with SummaryWriter(str(run_dir / "tensorboard")) as board:
        board.add_image("fractions", np.asarray(sheet), dataformats="HWC")
