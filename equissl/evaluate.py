"""Entry: one evaluation of one encoder: of a pretraining, of an export, or published by others.

    python -m equissl.evaluate config.json [--run-dir DIR] [--allow-incomplete]
    torchrun … -m equissl.evaluate config.json

Features are shared over the ranks, each image counted once; heads are trained and figures computed on rank 0.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equissl.config import EvaluateConfig

if TYPE_CHECKING:
    from equissl.distributed import World
    from equissl.progress import Progress
    from equissl.weights import Source

Config = EvaluateConfig

PACKAGES = ("equihpc", "numpy", "pillow", "timm", "torchmetrics")


def main(config: dict[str, Any], run_dir: Path, stop: Callable[[], bool]) -> dict[str, Any] | None:
    """Returns `metrics` and what they stand on; None if `stop()` said so: the next attempt goes on with the features that are cached,
    and with the heads that were being trained (linear); what else there is begins anew.

    Raises ValueError for bad settings, an encoder that is not complete or not what its config says, and a data set that is missing or
    damaged.
    """
    from equissl import distributed, evals
    from equissl.data import verify
    from equissl.data.shards import ShardSet, find
    from equissl.progress import Progress, Stopped
    from equissl.weights import load_source

    settings = EvaluateConfig.model_validate(config)
    evaluation = evals.get(settings.task.name)
    world = distributed.init()
    try:
        source = load_source(settings, world)
        pretraining = source.config
        folder = find(settings.data or pretraining.data)
        if world.rank == 0:
            verify.check(folder, ("train", "val"))
        data = {split: ShardSet(folder, split) for split in ("train", "val")}
        turns = _Turns(world, stop, Progress(run_dir if world.rank == 0 else None))
        try:
            context = evals.Context(
                settings, pretraining, source.encoder, folder, world, world.device, turns.tick, source.sha256, run_dir, turns.end
            )
            metrics = evaluation.run(context)
            turns.end()
        except Stopped:
            return None
    finally:
        distributed.close()
    main = evaluation.MAIN if evaluation.MAIN in metrics else next(iter(metrics), "")  # another one where the task leaves it out
    name = settings.task.name + _suffix(settings.data, source, data["val"].name, data["val"].manifest_sha256)
    return {
        "metrics": {f"{name}/{metric}": value for metric, value in metrics.items()},
        "main": {"metric": f"{name}/{main}", "higher_is_better": evaluation.HIGHER_IS_BETTER},
        "protocol": f"{settings.task.name}-{evaluation.PROTOCOL}",
        "weights_sha256": source.sha256,
        "encoder": source.about,
        **({"incomplete": source.incomplete} if source.incomplete else {}),
        "dataset": {"name": data["val"].name, "manifest_sha256": data["val"].manifest_sha256},
        "num_images": {split: images.num_images for split, images in data.items()},
        "versions": _versions(),
        **({"chosen": context.chosen} if context.chosen else {}),
    }


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


def _suffix(data: str | None, source: Source, name: str, sha256: str) -> str:
    """ ":name" where the data set is another than the pretraining's, by its content; nothing for the same. An export tells its name only;
    that of published weights is not known."""
    from equissl.data.shards import find, manifest_sha256

    if data is None or data == source.config.data:
        return ""
    try:
        same = name == source.config.data if source.is_export else manifest_sha256(find(source.config.data)) == sha256
    except ValueError:  # the pretraining's has gone
        same = False
    return "" if same else f":{name}"


def _versions() -> dict[str, str]:
    import platform
    from importlib.metadata import version

    import torch

    packages = {package: version(package) for package in PACKAGES}
    return {"python": platform.python_version(), **packages, "torch": torch.__version__}  # with the CUDA it was built for


if __name__ == "__main__":
    from equissl.launch import run

    run("equissl.evaluate")
