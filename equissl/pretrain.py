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


if __name__ == "__main__":
    from equissl import launch

    launch.run("equissl.pretrain")
