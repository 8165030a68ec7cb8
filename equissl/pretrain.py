"""Entry: one self-supervised pretraining. `torchrun --nproc-per-node 2 -m equissl.pretrain config.json --run-dir FOLDER`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from equissl.config import PretrainConfig

Config = PretrainConfig


def main(config: dict[str, Any], run_dir: Path, stop: Callable[[], bool]) -> dict[str, Any] | None:
    """See `loop.train`; writes into `run_dir`, resumes from what is there."""
    from equissl import loop  # torch and timm: seconds

    return loop.train(Config.model_validate(config), run_dir, stop)


def tidy(config: dict[str, Any]) -> None:
    """Called on each node when the ranks have ended, however they did: staged data that nobody uses go."""
    stage = Config.model_validate(config).stage
    if stage is not None:
        from equissl.data.stage import sweep

        sweep(Path(stage.to))


if __name__ == "__main__":
    from equissl import launch

    launch.run("equissl.pretrain")
