"""Entry: write a labelled data set as WebDataset shards with an index and a manifest. One process, no torch.

    python -m equissl.prepare config.json [--run-dir DIR]

The data set stands in `<run_dir>/data`, complete or not at all: it is written under a temporary name and renamed. What a killed
attempt left is removed by the next, which begins anew and writes the same bytes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from equissl.config import PrepareConfig
from equissl.data import photographs
from equissl.data.shards import ShardSet, manifest_sha256
from equissl.files import sync
from equissl.progress import Progress, Stopped

Config = PrepareConfig
SOURCES = {"photographs": photographs.write}


def main(config: dict[str, Any], run_dir: Path, stop: Callable[[], bool]) -> dict[str, Any] | None:
    """Returns the number of images per split, of classes and the manifest's sha256; None if `stop()` said so.

    Raises ValueError for bad settings and for a photograph that is not installed.
    """
    settings = PrepareConfig.model_validate(config)
    folder = run_dir / "data"
    if not folder.exists():
        partial = run_dir / "data.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        progress = Progress(run_dir)
        try:
            SOURCES[settings.source](settings, partial, stop, lambda split, done, of: progress.show(f"writing {split}", done, of, done))
        except Stopped:
            shutil.rmtree(partial)
            return None
        partial.rename(folder)
        sync(run_dir)
    splits = {split: ShardSet(folder, split) for split in ("train", "val")}
    return {
        "num_images": {split: data.num_images for split, data in splits.items()},
        "num_classes": len(splits["train"].classes),
        "manifest_sha256": manifest_sha256(folder),
    }


if __name__ == "__main__":
    from equissl.launch import run

    run("equissl.prepare")
