"""Entry: one evaluation of one encoder: of a pretraining, of an export, or published by others.

    python -m equissl.evaluate config.json [--run-dir DIR] [--allow-incomplete]
    torchrun … -m equissl.evaluate config.json

Features are shared over the ranks, each image counted once; heads are trained and figures computed on rank 0.

Without `data_set` the images are those of a folder of shards, by default the pretraining's: trained on its split train, figures of val.
With `data_set: NAME` they are that data set's, in its authors' format or as shards: figures are of its test split (ImageNet's and
iNaturalist's are called val), and hyper-parameters are chosen on its tuning split where it has one (fgvc_aircraft, flowers102), otherwise
on held-out training images. What is chosen is then trained on all of these, as is usual for the small sets (Kornblith et al. 2019,
Chen et al. 2020, Oquab et al. 2023). The main metric is the data set's; top1 and mean_per_class are both in the result.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equissl.config import EvaluateConfig

if TYPE_CHECKING:
    from equissl.config import PretrainConfig
    from equissl.data.labelled import Sets
    from equissl.data.shards import Images
    from equissl.distributed import World
    from equissl.evals import Context
    from equissl.progress import Progress
    from equissl.weights import Source

log = logging.getLogger(__name__)

Config = EvaluateConfig

COMPARED = 64  # images at most, in bfloat16 and in float32
MAX_DIFFERENCE = 0.05
SHOWN = 100  # keys of undecodable images in the result
PACKAGES = ("equihpc", "numpy", "pillow", "timm", "torchmetrics")


def main(config: dict[str, Any], run_dir: Path, stop: Callable[[], bool]) -> dict[str, Any] | None:
    """Returns `metrics` and what they stand on; None if `stop()` said so: the next attempt goes on with the features that are cached,
    and with the heads that were being trained (linear); what else there is begins anew.

    Raises ValueError for bad settings, an encoder that is not complete or not what its config says, and a data set that is missing or
    damaged.
    """
    from equissl import distributed, evals
    from equissl.progress import Progress, Stopped
    from equissl.weights import load_source

    settings = EvaluateConfig.model_validate(config)
    evaluation = evals.get(settings.task.name)
    world = distributed.init()
    try:
        source = load_source(settings, world)
        pretraining = source.config
        data, is_fake = _open(settings, pretraining, world)
        turns = _Turns(world, stop, Progress(run_dir if world.rank == 0 else None))
        context = evals.Context(
            settings, pretraining, source.encoder, data, world, world.device, turns.tick, source.sha256, run_dir, turns.end
        )
        context, difference = _with_precision(context)
        try:
            metrics = evaluation.run(context)
            turns.end()
        except Stopped:
            return None
    finally:
        distributed.close()
    preferred = data.main if evaluation.MAIN == "top1" else evaluation.MAIN
    main = preferred if preferred in metrics else next(iter(metrics), "")  # another one where the task leaves it out
    test, splits = data.test, (data.train, data.test)
    called = settings.data_set or test.name
    name = settings.task.name + (f":{called}" if settings.data_set else _suffix(settings.data, source, test))
    higher = evaluation.HIGHER_IS_BETTER
    directions = {metric: evaluation.direction(metric) for metric in metrics} if hasattr(evaluation, "direction") else {}
    others = {f"{name}/{metric}": value for metric, value in directions.items() if value is not higher}
    left_out = {split: list(keys) for split, keys in context.undecodable.items()}
    return {
        "metrics": {f"{name}/{metric}": value for metric, value in metrics.items()},
        "main": {"metric": f"{name}/{main}", "higher_is_better": directions.get(main, higher)},
        **({"higher_is_better": others} if others else {}),
        "protocol": f"{settings.task.name}-{evaluation.PROTOCOL}",
        "weights_sha256": source.sha256,
        "encoder": source.about,
        **({"incomplete": source.incomplete} if source.incomplete else {}),
        "dataset": {"name": called, "manifest_sha256": data.manifest_sha256, **({"fake": True} if is_fake else {})},
        "num_images": {images.split: images.num_images - len(left_out.get(images.split, ())) for images in splits},
        "precision": str(context.precision).removeprefix("torch."),
        "versions": _versions(),
        **({"precision_difference": difference} if difference is not None else {}),
        **(
            {"undecodable": {split: {"num_images": len(keys), "keys": keys[:SHOWN]} for split, keys in left_out.items()}}
            if left_out
            else {}
        ),
        **({"chosen": context.chosen} if context.chosen else {}),
    }


def _open(settings: EvaluateConfig, pretraining: PretrainConfig, world: World) -> tuple[Sets, bool]:
    """The data, and on rank 0 whether they are of `equihpc data fake`. Raises ValueError where they are not as they must be."""
    from equissl.data import check, verify
    from equissl.data.labelled import open_sets, pair
    from equissl.data.shards import find

    if settings.data_set is None:
        folder = find(settings.data or pretraining.data)
        if world.rank == 0:
            verify.check(folder, ("train", "val"))
        return pair(folder), False
    path = Path(str(settings.data))
    is_fake = world.rank == 0 and check.require(settings.data_set, path).is_fake
    return open_sets(settings.data_set, path), is_fake


def _with_precision(context: Context) -> tuple[Context, float | None]:
    """The context with the precision of its forward passes, and on rank 0 how far features in bfloat16 are from those in float32.

    Raises ValueError where bfloat16 was asked for, and the first batch of the images to test on comes out too differently; with
    `auto`, which is bfloat16 on a GPU, it is float32 then.
    """
    import torch

    asked = context.settings.precision
    if asked == "float32" or (asked == "auto" and (context.device.type != "cuda" or context.settings.task.name == "equivariance")):
        return context, None
    difference = _difference(context) if context.world.rank == 0 else None
    if context.of_rank_0(difference is not None and difference <= MAX_DIFFERENCE):
        return replace(context, precision=torch.bfloat16), difference
    said = f"features in bfloat16 differ from float32 by {difference}, more than {MAX_DIFFERENCE} of their length"
    if asked == "bfloat16":
        raise ValueError(f"precision is bfloat16, but {said}: choose float32, or auto, which is float32 then")
    if context.world.rank == 0:
        log.warning("%s: float32 is used", said)
    return context, difference if difference is not None and math.isfinite(difference) else None


def _difference(context: Context) -> float:
    """Of the features of a batch in bfloat16 from float32, relative to these: Euclidean lengths over all images."""
    import torch

    from equissl.data.loader import BadSample, decode
    from equissl.features import CentreCrop, Normed

    test, side, images = context.data.test, context.pretraining.side, []
    crop = CentreCrop(round(side * 256 / 224), side)
    for i in range(min(test.num_images, context.settings.batch, COMPARED)):
        try:
            images.append(crop(decode(test, i)))
        except BadSample:
            continue
    if not images:
        raise ValueError(f"none of the first images of {test.split} of {test.folder} can be decoded")
    batch = torch.stack(images).to(context.device)
    with torch.inference_mode():
        exact, rounded = (Normed(context.encoder, dtype).cls_and_mean(batch).float() for dtype in (torch.float32, torch.bfloat16))
    return float((rounded - exact).norm() / exact.norm())


class _Turns:
    """The ranks ask `stop()` together, so that all of them stop between the same two batches; it is the heartbeat too."""

    def __init__(self, world: World, stop: Callable[[], bool], progress: Progress) -> None:
        self.world, self.stop, self.progress = world, stop, progress

    def tick(self, stage: str, step: int, num_steps: int, images: int) -> None:
        """Raises Stopped on all ranks where any was asked to stop. All ranks call it alike while features are extracted, rank 0
        alone afterwards: the others are in `end` then."""
        self.progress.show(stage, step, num_steps, images)
        self._agree(done=False)

    def end(self) -> None:
        """Returns on all ranks when rank 0 is here."""
        while not self._agree(done=self.world.rank == 0):
            pass

    def _agree(self, done: bool) -> bool:
        from equissl.progress import Stopped

        asked = self.stop()
        if self.world.world_size > 1:
            import torch
            import torch.distributed as dist

            flags = torch.tensor([asked, done], dtype=torch.int32)
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.world.cpu_group)
            asked, done = bool(flags[0]), bool(flags[1])
        if asked and not done:
            raise Stopped
        return done


def _suffix(data: str | None, source: Source, test: Images) -> str:
    """ ":name" where the data set is another than the pretraining's, by its content; nothing for the same. An export tells its name only;
    that of published weights is not known."""
    from equissl.data.shards import find, manifest_sha256

    if data is None or data == source.config.data:
        return ""
    try:
        same = test.name == source.config.data if source.is_export else manifest_sha256(find(source.config.data)) == test.manifest_sha256
    except ValueError:  # the pretraining's has gone
        same = False
    return "" if same else f":{test.name}"


def _versions() -> dict[str, str]:
    import platform
    from importlib.metadata import version

    import torch

    packages = {package: version(package) for package in PACKAGES}
    return {"python": platform.python_version(), **packages, "torch": torch.__version__}  # with the CUDA it was built for


if __name__ == "__main__":
    from equissl.launch import run

    run("equissl.evaluate")
