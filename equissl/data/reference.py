"""The same views the plain way, to compare with: Pillow and torchvision for each sample on the CPU, as the dinov2 repository does.

Boxes, flips and the parameters of the photometry are those of the fast pipeline; crops, resizes and operations are Pillow's and
torchvision's own, with a rounding to 1/255 after each. Imports torchvision's transforms: seconds.

The fast pipeline's views of photographs differ from these, in 1/255, by 0.03 in the mean and 6 at most before the photometry (54
views and crops of 224 and 96 pixels), after it by 1.2 and 21: see `equissl.photometry` for the reasons.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as v2

from equissl.config import PretrainConfig
from equissl.data.loader import crop_numbers, middle_square
from equissl.data.loader import crops as crop_kinds
from equissl.photometry import NO_OPERATION, SOLARIZE_THRESHOLD, Parameters, blur_radius, parameters_of

JITTER = (v2.adjust_brightness, v2.adjust_contrast, v2.adjust_saturation, v2.adjust_hue)  # in the order of photometry.JITTER


def crops(images: Iterable[Tensor], config: PretrainConfig, epoch: int, positions: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor]:
    """Decoded images, uint8 `(3, height, width)`, one for each position -> `Batch`'s view1, source2 and local, coloured.

    Float32 in [0, 1], in steps of 1/255.
    """
    kinds, flip = crop_kinds(config), config.method.views.flip
    unit = [crop_numbers(config, epoch, positions, kind) for kind in kinds]
    drawn = [parameters_of(config, epoch, positions, number) for number in range(len(kinds))]
    sides = [config.side, *(kind.side for kind in kinds[1:])]  # with `one_crop` the first is the middle of a larger one
    made = [torch.empty(len(positions), 3, side, side) for side in sides]
    for row, image in enumerate(images):
        whole = Image.fromarray(image.permute(1, 2, 0).numpy())
        for kind, numbers, parameters, target in zip(kinds, unit, drawn, made, strict=True):
            crop = resized_crop(whole, kind.box(whole.height, whole.width, numbers[row]), kind.side, bool(numbers[row, 0] < flip))
            seen = v2.center_crop(crop, list(target.shape[-2:]))  # before the colours: contrast is about the mean of what is seen
            target[row] = v2.pil_to_tensor(coloured(seen, parameters, row)).float() / 255
    local_side = config.method.views.local_size
    return (
        made[0],
        made[1],
        torch.stack(made[2:]) if made[2:] else torch.empty(0, len(positions), 3, local_side, local_side),
    )


def plain(image: Tensor, target: Tensor) -> None:
    """One decoded image without augmentation, as `loader.PlainImages` has it, into `target` `(3, S, S)`: float32 in [0, 1]."""
    whole = Image.fromarray(image.permute(1, 2, 0).numpy())
    square = resized_crop(whole, middle_square(whole.height, whole.width), target.shape[-1], flip=False)
    target.copy_(v2.pil_to_tensor(square).float() / 255)


def resized_crop(image: Image.Image, box: tuple[int, int, int, int], side: int, flip: bool) -> Image.Image:
    """As `loader.resized_crop`."""
    top, left, height, width = box
    crop = image.crop((left, top, left + width, top + height)).resize((side, side), Image.Resampling.BICUBIC)
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else crop


def coloured(image: Image.Image, drawn: Parameters, row: int) -> Image.Image:
    """One image with the parameters of this row, as `photometry.apply`."""
    for number in drawn.order[row]:
        if number != NO_OPERATION:
            image = JITTER[number](image, float(drawn.factors[row, number]))
    if drawn.grey[row]:
        image = v2.rgb_to_grayscale(image, num_output_channels=3)
    if drawn.sigma[row] > 0:
        size = 2 * blur_radius(drawn.largest_sigma, min(image.size)) + 1
        image = v2.gaussian_blur(image, [size, size], [float(drawn.sigma[row])] * 2)
    return v2.solarize(image, round(SOLARIZE_THRESHOLD * 256)) if drawn.solarize[row] else image
