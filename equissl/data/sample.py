"""`equihpc data sample SOURCE [N]`: a contact sheet of the augmented views as the trainer sees them, with what was drawn for each;
with `--paths` instead what each transformation would make of the second view, from 0 to 1 of its path.

A sample is re-made alone: a loader of as many ranks as the batch has samples gives each rank one of them, the same as in any
other split of the batch.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import math
import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from equissl import transforms
from equissl.config import AnyTransformation, PretrainConfig, is_stream
from equissl.data.loader import Batch, crop_numbers, crops, decode, make_loader
from equissl.data.shards import ShardSet, find
from equissl.files import write_atomic
from equissl.photometry import JITTER, NO_OPERATION, denormalise, parameters_of
from equissl.transforms.base import centre
from equissl.views import MakeViews, fractions

DESCRIPTION = "Draw a contact sheet of augmented views as the trainer sees them, with their parameters."
# as `Transform.names` says: the unit, and how a value is written
UNITS = {
    "rotation": ("degrees", "{:.1f}°"),
    **dict.fromkeys(("translation_x", "translation_y"), ("pixels", "{:.1f} px")),
    "sigma": ("pixels", "{:.2f} px"),
    **dict.fromkeys(("brightness", "contrast", "saturation"), ("factor - 1", "{:+.2f}")),
    "hue": ("turns", "{:+.3f}"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # argparse takes N only directly after SOURCE
    parser.usage = "%(prog)s SOURCE [N] [--step S] [--rank R] [--world-size W] [--index I] [--paths] [--out FILE.png] [--json]"
    parser.add_argument("source", metavar="SOURCE", type=Path, help="config.json of a pretraining, or the run folder that holds it")
    parser.add_argument("num", metavar="N", nargs="?", type=int, help="samples, the first of the rank's batch; default: 8, of paths 2")
    parser.add_argument("--step", type=int, default=0, metavar="S", help="default: 0")
    parser.add_argument("--rank", type=int, default=0, metavar="R", help="default: 0")
    parser.add_argument("--world-size", type=int, default=1, metavar="W", help="ranks that share the batch; default: 1")
    parser.add_argument("--index", type=int, metavar="I", help="only the I-th sample of the rank's batch, from 0")
    parser.add_argument("--paths", action="store_true", help="the path of every transformation, in place of the views")
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="default: sample_step_S_rank_R.png, here")
    parser.add_argument("--json", action="store_true", help="print the parameters as JSON")


def command(arguments: argparse.Namespace) -> int:
    config = read_config(arguments.source)
    if is_stream(config.data):
        raise ValueError(f"data {config.data!r} is a stream: which images a step sees is not known before")
    data = ShardSet(find(config.data), "train")
    step, rank, world_size = arguments.step, arguments.rank, arguments.world_size
    default = 2 if arguments.paths else 8
    rows = chosen_rows(config, data, step, rank, world_size, arguments.num, arguments.index, default)
    out = arguments.out or Path(f"sample_step_{step}_rank_{rank}.png")
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}")

    of_all = [rank * (config.batch // world_size) + row for row in rows]
    batch = one_by_one(data, config, step, of_all)
    where = {"data": data.name, "seed": config.seed, "step": step, "epoch": batch.epoch, "rank": rank, "world_size": world_size}
    title = f"{data.name}, seed {config.seed}: step {step}, epoch {batch.epoch}, rank {rank} of {world_size}; {config.pipeline} pipeline"
    if arguments.paths:
        kinds = every_transformation(config)
        drawn = {settings.name: path_of(data, config, settings, step, of_all) for settings in kinds}
        sheet = draw_sheet(title, PATHS_LEGEND, list(map(path_header, kinds)), [path.cells for path in drawn.values()])
        shown: dict[str, Any] = {"paths": {name: path.parameters for name, path in drawn.items()}, "rows": rows}
    else:
        samples = [{"row": row, **values} for row, values in zip(rows, describe(data, config, batch), strict=True)]
        sheet = draw_sheet(title, LEGEND, [header(sample) for sample in samples], cells_of(data, config, batch, samples))
        shown = {"samples": samples}
    encoded = io.BytesIO()
    sheet.save(encoded, "PNG", optimize=True)
    write_atomic(out, encoded.getvalue())
    if arguments.json:
        print(json.dumps({"path": str(out.resolve()), **where, "pipeline": config.pipeline, **shown}, indent=2))
    else:
        print(f"{out}: {len(rows)} of the {config.batch // world_size} samples of rank {rank} of {world_size} at step {step}")
    return 0


def read_config(source: Path) -> PretrainConfig:
    """Raises ValueError for what is not the config of a pretraining."""
    path = source / "config.json" if source.is_dir() else source
    try:
        return PretrainConfig.model_validate(json.loads(path.read_text()))
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}: give a config.json, or a run folder that holds one") from None
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, each['loc'])) or 'config'}: {each['msg']}" for each in error.errors())
        raise ValueError(f"{path} is not the config of a pretraining: {wrong}") from None
    except ValueError as error:  # UnicodeDecodeError too
        raise ValueError(f"{path} is not JSON: {error}") from None


def chosen_rows(
    config: PretrainConfig, data: ShardSet, step: int, rank: int, world_size: int, num: int | None, index: int | None, default: int
) -> list[int]:
    """Of the rank's batch; `default` of them, where neither `num` nor `index` is given.

    Raises ValueError for what the training does not have.
    """
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size}: ranks are 0 to world size - 1")
    config.check(world_size, {})
    num_steps, size = config.total_steps(data.num_images), config.batch // world_size
    if not 0 <= step < num_steps:
        raise ValueError(f"--step {step}: the training has the steps 0 to {num_steps - 1}")
    if index is None:
        num = default if num is None else num
        if num < 1:
            raise ValueError(f"N is {num}; it must be at least 1")
        return list(range(min(num, size)))
    if num is not None:
        raise ValueError("give N or --index, not both")
    if not 0 <= index < size:
        raise ValueError(f"--index {index}: a rank's batch has the samples 0 to {size - 1}")
    return [index]


def one_by_one(data: ShardSet, config: PretrainConfig, step: int, rows: Sequence[int]) -> Batch:
    """These samples of the global batch of `step`, without the others."""
    alone = config.model_copy(update={"num_workers": 0})
    parts = []
    for row in rows:
        loader = make_loader(data, alone, row, config.batch, step, step + 1)
        try:
            parts.append(next(loader))
        finally:
            loader.close()
    joined: dict[str, Any] = {}
    for field in dataclasses.fields(Batch):
        values = [getattr(part, field.name) for part in parts]
        if isinstance(values[0], Tensor):
            joined[field.name] = torch.cat(values, dim=1 if field.name == "local" else 0)
    return dataclasses.replace(parts[0], **joined, bad=tuple(key for part in parts for key in part.bad))


# --- what was drawn ---------------------------------------------------------------------------------------------------------


def describe(data: ShardSet, config: PretrainConfig, batch: Batch) -> list[dict[str, Any]]:
    """Of each sample: what it is, and of each crop what was drawn for it."""
    position, kinds = batch.position.numpy(), crops(config)
    names = ["view1", "source2", *(f"local{number}" for number in range(1, len(kinds) - 1))]
    numbers = [crop_numbers(config, batch.epoch, position, kind) for kind in kinds]
    drawn = [parameters_of(config, batch.epoch, position, crop) for crop in range(len(kinds))]
    make_views = MakeViews(config, torch.device("cpu"))
    motions = make_views.parameters(batch).tolist() if make_views.transform else []
    samples: list[dict[str, Any]] = []
    for row, index in enumerate(batch.index.tolist()):
        height, width = decode(data, index).shape[1:]
        label = int(batch.label[row])
        sample: dict[str, Any] = {
            "index": index,
            "key": data.key(index),
            "label": label if label >= 0 else None,
            "class": data.classes[label] if 0 <= label < len(data.classes) else None,
            "epoch": batch.epoch,
            "position": int(position[row]),
            "height": height,
            "width": width,
            "crops": [],
            "transformation": None,
        }
        for crop, (name, kind) in enumerate(zip(names, kinds, strict=True)):
            top, left, h, w = kind.box(height, width, numbers[crop][row])
            parameters = drawn[crop]
            turns = [int(turn) for turn in parameters.order[row] if turn != NO_OPERATION]
            sample["crops"].append(
                {
                    "name": name,
                    "side": kind.side,
                    "seen": kind.seen,
                    "box": {"top": top, "left": left, "height": h, "width": w},
                    "flip": bool(numbers[crop][row, 0] < config.method.views.flip),
                    "jitter": [[JITTER[turn].__name__, float(parameters.factors[row, turn])] for turn in turns],  # in this order
                    "grey": bool(parameters.grey[row]),
                    "sigma": float(parameters.sigma[row]),  # pixels; 0: no blur
                    "solarize": bool(parameters.solarize[row]),
                }
            )
        if make_views.transform and config.transformation:
            values = dict(zip(make_views.transform.names, motions[row], strict=True))
            units = {name: UNITS[name][0] for name in values if name in UNITS}
            sample["transformation"] = {"name": config.transformation.name, "parameters": values, "units": units}
        samples.append(sample)
    return samples


def header(sample: dict[str, Any]) -> str:
    name = "no class" if sample["label"] is None else f"class {sample['label']}" + (f" {sample['class']}" if sample["class"] else "")
    return f"{sample['row']}:  {sample['key']},  {name},  image {sample['index']},  epoch {sample['epoch']}, position {sample['position']}"


def motion_text(transformation: dict[str, Any], fraction: float = 1.0) -> list[str]:
    return [
        f"{name.replace('_', ' ')} {UNITS.get(name, ('', '{:.3g}'))[1].format(value * fraction + 0.0)}"  # not -0
        for name, value in transformation["parameters"].items()
    ]


def box_text(crop: dict[str, Any]) -> str:
    box = crop["box"]
    return f"{box['width']} x {box['height']} at ({box['left']}, {box['top']}){', mirrored' if crop['flip'] else ''}"


def seen_text(crop: dict[str, Any]) -> list[str]:
    return [f"shown: its middle, {crop['seen']} of {crop['side']} px"] if crop["seen"] < crop["side"] else []


def as_text(fraction: float) -> str:
    return str(Fraction(fraction).limit_denominator(16))


def colour_text(crop: dict[str, Any]) -> list[str]:
    texts = [", ".join(f"{name} {value:+.2f}" if name == "hue" else f"{name} {value:.2f}" for name, value in crop["jitter"])]
    texts += ["grey"] * crop["grey"]
    texts += [f"blur {crop['sigma']:.2f} px"] if crop["sigma"] else []
    texts += ["solarized"] * crop["solarize"]
    return [text for text in texts if text] or ["no change of colour"]


# --- the sheet --------------------------------------------------------------------------------------------------------------

CELL, GAP, EDGE, LINE = 224, 12, 24, 16  # pixels: an image, between images, around the sheet, a line of text
INK, PALE, PAPER, RULE = "#222222", "#666666", "#ffffff", "#d0d0d0"
FIRST, SECOND, LOCAL = "#1864ab", "#d9480f", "#2b8a3e"  # of titles and boxes
LEGEND = (
    "Boxes in the image: view 1 blue, view 2 orange, local crops green. Below a view: width x height at (left, top) in the image,"
    " then its colour changes in their order."
)


PATHS_LEGEND = (
    "What each transformation would make of the second view of these samples, after its crop and colours: at 0 nothing, at 1 all of"
    " what was drawn. A rotation and a translation need a larger crop for the border inside."
)


class Cell(NamedTuple):
    """One column of a row: an image under its title, and text below it, or text alone."""

    title: str
    colour: str
    image: Image.Image | None
    lines: list[str]
    width: int


def cells_of(data: ShardSet, config: PretrainConfig, batch: Batch, samples: list[dict[str, Any]]) -> list[list[Cell]]:
    """A list for each sample: the image, its un-augmented middle where the method sees it, the first view, the second on its way
    through g, local crops."""
    make_views, side = MakeViews(config, torch.device("cpu")), config.side
    views, (_, source, _) = make_views(batch), make_views.coloured(batch)
    scale = max(1, CELL // side)  # small crops are magnified, all of them alike
    middle = centre(source, side)
    rows = []
    for row, sample in enumerate(samples):
        first, second, *local = sample["crops"]
        motion = sample["transformation"]
        original = Image.fromarray(decode(data, sample["index"]).permute(1, 2, 0).contiguous().numpy())
        size = f"image, {original.width} x {original.height}"
        cells = [Cell(size, INK, with_boxes(original, sample["crops"]), [], CELL)]
        if views.plain is not None:
            cells.append(cell("un-augmented", INK, picture(denormalise(views.plain[row]), scale), []))
        texts, second_texts = ([box_text(crop), *seen_text(crop), *colour_text(crop)] for crop in (first, second))
        cells.append(cell("view 1", FIRST, picture(denormalise(views.global1[row]), scale), texts))
        cells.append(cell("view 2 before g" if motion else "view 2", SECOND, picture(middle[row], scale), second_texts))
        for number, fraction in enumerate(fractions(config)):
            assert views.targets is not None
            name, lines = (f"target at {as_text(fraction)} of g", motion_text(motion, fraction)) if motion else ("target", [])
            cells.append(cell(name, SECOND, picture(denormalise(views.targets[number, row]), scale), lines))
        if motion:
            after = picture(denormalise(views.global2[row]), scale)
            cells.append(cell(f"view 2 after g: {motion['name']}", SECOND, after, motion_text(motion)))
        if local:
            grid = numbered_grid([picture(denormalise(image), scale) for image in views.local[:, row]])
            lines = [f"{number}: {'; '.join([box_text(crop), *colour_text(crop)])}" for number, crop in enumerate(local, start=1)]
            cells.append(Cell("local crops", LOCAL, grid, [], grid.width))
            cells.append(Cell("", LOCAL, None, lines, math.ceil(max(font(12).getlength(line) for line in lines))))
        rows.append(cells)
    return rows


class Course(NamedTuple):
    """Of one transformation: the cells of a row of the sheet, and for each sample the parameters by their names."""

    cells: list[Cell]
    parameters: list[dict[str, float]]


def every_transformation(config: PretrainConfig) -> list[AnyTransformation]:
    """Those of the folder as they are by default; the config's own with its settings."""
    own: dict[str, AnyTransformation] = {config.transformation.name: config.transformation} if config.transformation else {}
    adapter: TypeAdapter[AnyTransformation] = TypeAdapter(AnyTransformation)
    return [own.get(name) or adapter.validate_python({"name": name}) for name in transforms.names()]


def path_header(settings: AnyTransformation) -> str:
    values = settings.model_dump()
    return f"{values.pop('name')}:  " + ",  ".join(f"{name} {value}" for name, value in values.items())


def path_of(data: ShardSet, config: PretrainConfig, settings: AnyTransformation, step: int, rows: Sequence[int]) -> Course:
    """At the fractions of the auxiliary's targets on the way, or at 1/3 and 2/3; and at 0 and 1."""
    on_the_way = [fraction for fraction in fractions(config) if fraction < 1]
    points = [0.0, *(on_the_way or (1 / 3, 2 / 3)), 1.0]
    alone = config.model_copy(update={"transformation": settings, "auxiliary": None})
    batch, make_views, side = one_by_one(data, alone, step, rows), MakeViews(alone, torch.device("cpu")), config.side
    transform, source, parameters = transforms.get(settings), make_views.coloured(batch)[1], make_views.parameters(batch)
    seen = [transform.apply(source, parameters, point, side) for point in points]
    named = [dict(zip(transform.names, values, strict=True)) for values in parameters.tolist()]
    cells = [
        cell(f"{as_text(point)} of g", SECOND, picture(images[row], max(1, CELL // side)), motion_text({"parameters": values}, point))
        for row, values in enumerate(named)
        for point, images in zip(points, seen, strict=True)
    ]
    return Course(cells, named)


def cell(title: str, colour: str, image: Image.Image, texts: list[str]) -> Cell:
    return Cell(title, colour, image, [line for text in texts for line in wrapped(text, CELL)], CELL)


def draw_sheet(title: str, legend: str, headers: list[str], rows: list[list[Cell]]) -> Image.Image:
    """Rows, each with its header, below the title and a legend."""
    heights = [max((CELL + 6 if cell.image else 0) + LINE * len(cell.lines) for cell in cells) + 4 * LINE + GAP for cells in rows]
    width = max(font(12).getlength(legend), *(sum(cell.width + GAP for cell in cells) - GAP for cells in rows))
    sheet = Image.new("RGB", (2 * EDGE + math.ceil(width), 2 * EDGE + 3 * LINE + sum(heights)), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((EDGE, EDGE), title, INK, font(18))
    pen.text((EDGE, EDGE + 25), legend, PALE, font(12))
    y = EDGE + 3 * LINE + 6
    for header, cells, height in zip(headers, rows, heights, strict=True):
        pen.line((EDGE, y, sheet.width - EDGE, y), RULE)
        pen.text((EDGE, y + LINE // 2), header, INK, font(15))
        x, top = EDGE, y + 3 * LINE + LINE // 2
        for each in cells:
            pen.text((x, top - LINE - 2), each.title, each.colour, font(13))
            below = top
            if each.image:
                sheet.paste(each.image, (x, top))
                below += CELL + 6
            for number, line in enumerate(each.lines):
                pen.text((x, below + LINE * number), line, PALE, font(12))
            x += each.width + GAP
        y += height
    return sheet


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def wrapped(text: str, width: int) -> list[str]:
    """Lines of at most `width` pixels, broken after commas, where there are any."""
    lines = [""]
    for part in re.split(r"(?<=,) (?=[a-z])", text):
        longer = f"{lines[-1]} {part}" if lines[-1] else part
        if lines[-1] and font(12).getlength(longer) > width:
            lines.append(part)
        else:
            lines[-1] = longer
    return lines


def picture(image: Tensor, scale: int) -> Image.Image:
    """`(3, s, s)` in [0, 1] -> magnified `scale` times, and made smaller where it does not fit into a cell."""
    levels = (image * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous()
    result = Image.fromarray(levels.numpy())
    result = result.resize((result.width * scale, result.height * scale), Image.Resampling.NEAREST)
    result.thumbnail((CELL, CELL))
    return result


def with_boxes(original: Image.Image, crops: list[dict[str, Any]]) -> Image.Image:
    """The image fitted into a cell, with what each crop shows of it."""
    scale = CELL / max(original.size)
    fitted = max(1, round(original.width * scale)), max(1, round(original.height * scale))
    result = original.resize(fitted, Image.Resampling.BICUBIC if scale < 1 else Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(result)
    colours = [FIRST, SECOND, *[LOCAL] * (len(crops) - 2)]
    for crop, colour in reversed(list(zip(crops, colours, strict=True))):
        box, outside = crop["box"], (1 - crop["seen"] / crop["side"]) / 2
        left, top = box["left"] + outside * box["width"], box["top"] + outside * box["height"]
        right, bottom = left + box["width"] * (1 - 2 * outside), top + box["height"] * (1 - 2 * outside)
        corners = [round(scale * value) for value in (left, top, right, bottom)]
        shown = (corners[0], corners[1], max(corners[0], corners[2] - 1), max(corners[1], corners[3] - 1))
        pen.rectangle(shown, outline=colour, width=1 if colour == LOCAL else 2)
    return result


def numbered_grid(images: list[Image.Image]) -> Image.Image:
    """Local crops in columns, as many below each other as fit into a cell, numbered from 1."""
    side, gap = images[0].width, 4
    rows = max(1, (CELL + gap) // (side + gap))
    columns = -(-len(images) // rows)
    grid = Image.new("RGB", (columns * (side + gap) - gap, CELL), PAPER)
    pen = ImageDraw.Draw(grid)
    for number, image in enumerate(images):
        x, y = number // rows * (side + gap), number % rows * (side + gap)
        grid.paste(image, (x, y))
        pen.text((x + 4, y + 2), str(number + 1), "#ffffff", font(13), stroke_width=2, stroke_fill="#000000")
    return grid
