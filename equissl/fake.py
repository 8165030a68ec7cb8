"""Entry: tiny data sets in the true formats of the evaluations', for rehearsals. One process, no torch.

    python -m equissl.fake config.json [--run-dir DIR]

They stand in `<run_dir>/data/NAME`, complete or not at all, as `equihpc data fake` writes them. An evaluation of any of them has the run
folder as `data`, and the set's name as `data_set`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from equissl.config import FakeConfig
from equissl.data import fake
from equissl.data.check import require
from equissl.files import sync
from equissl.progress import Progress

Config = FakeConfig


def main(config: dict[str, Any], run_dir: Path, stop: Callable[[], bool]) -> dict[str, Any] | None:
    """Returns what stands for each data set; None if `stop()` said so. Raises ValueError for bad settings."""
    settings = FakeConfig.model_validate(config)
    folder = run_dir / "data"
    if not folder.exists():
        partial, progress = run_dir / "data.partial", Progress(run_dir)
        shutil.rmtree(partial, ignore_errors=True)
        for number, name in enumerate(settings.data_sets):
            progress.show("writing", number, len(settings.data_sets))
            if stop():
                shutil.rmtree(partial, ignore_errors=True)
                return None
            fake.fake(name, partial / name, fake.Settings(settings.classes, settings.images, settings.side, settings.seed))
        partial.rename(folder)
        sync(run_dir)
    return {"manifest_sha256": {name: require(name, folder).manifest_sha256 for name in settings.data_sets}}


if __name__ == "__main__":
    from equissl.launch import run

    run("equissl.fake")
