"""Entry: an encoder with drawn weights, in a file as others publish theirs: `RUN_DIR/model.safetensors`, with timm's keys.

    python -m equissl.untrained config.json [--run-dir DIR]

A control for every evaluation: `published: {name: vit_small_patch16_224.untrained, file: RUN_DIR}`. One process, on the CPU.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from equissl.config import UntrainedConfig

Config = UntrainedConfig


def main(config: dict[str, Any], run_dir: Path, stop: Callable[[], bool]) -> dict[str, Any] | None:
    """Returns the file's sha256; None if `stop()` said so. Raises ValueError for bad settings."""
    import safetensors.torch

    from equissl.encoder import build_encoder, exported
    from equissl.files import write_atomic
    from equissl.published import FILE

    settings = UntrainedConfig.model_validate(config)
    if stop():
        return None
    encoder = build_encoder(settings.as_pretraining().model_copy(update={"seed": settings.seed}))
    content = safetensors.torch.save({name.removeprefix("backbone."): tensor for name, tensor in exported(encoder).items()})
    write_atomic(run_dir / FILE, content)
    return {"file": FILE, "weights_sha256": hashlib.sha256(content).hexdigest()}


if __name__ == "__main__":
    from equissl.launch import run

    run("equissl.untrained")
