"""Entry: write a data set as WebDataset shards from images that are somewhere already (`equihpc data build` as a job). No torch.

    python -m equissl.build config.json [--run-dir DIR]

The data set stands in `<run_dir>/data`, complete or not at all. What an attempt that was stopped or killed has finished lies in
`<run_dir>/data.partial`; the next goes on with it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from equissl.config import BuildConfig
from equissl.data import build
from equissl.progress import Progress, Stopped

Config = BuildConfig


def main(config: dict[str, Any], run_dir: Path, stop: Callable[[], bool]) -> dict[str, Any] | None:
    """Returns the number of images per split, of classes and the manifest's sha256; None if `stop()` said so.

    Raises ValueError for bad settings and for a source that is not as it must be, DiskFull.
    """
    settings = BuildConfig.model_validate(config)
    folder = run_dir / "data"
    if folder.exists():
        shutil.rmtree(run_dir / "data.partial", ignore_errors=True)  # a kill in the last moment leaves it
    else:
        progress = Progress(run_dir)

        def show(stage: str, images: int, of: int | None, num_bytes: int) -> None:
            progress.show(stage, images, images + 1 if of is None else of, images)

        try:
            build.build(settings, folder, stop, show, default_name=Path(settings.source.rpartition(":")[2]).stem)
        except Stopped:
            return None
    return build.summary(folder)


if __name__ == "__main__":
    from equissl.launch import run

    run("equissl.build")
