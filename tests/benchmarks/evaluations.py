"""What evaluations cost: a grid of 52 linear heads against one, and an evaluation on cached features against the first one.

    python tests/benchmarks/evaluations.py [--images 512] [--side 224] [--backbone vit_small_patch16_224] [--classes 1000] [--rounds 3]

Heads: seconds of an epoch of forward pass and heads, by DINOv2's preset without its augmentation, on noise. Cache: seconds of extracting
the same features, and of reading them. Takes turns, round after round; medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--backbone", default="vit_small_patch16_224")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=64, help="images per forward pass")
    parser.add_argument("--rounds", type=int, default=3)
    print(json.dumps(measure(parser.parse_args()), indent=2))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    import numpy as np
    import torch

    from equissl import cache, features
    from equissl.classify import Variant
    from equissl.config import EvaluateConfig, Linear, PretrainConfig
    from equissl.encoder import build_encoder
    from equissl.evals import Context
    from equissl.evals.linear import Heads

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pretraining = PretrainConfig.model_validate(
        {"data": "photographs", "backbone": arguments.backbone, "image_size": arguments.side, "batch": 8, "num_steps": 1, "method": "ibot"}
    )
    encoder = features.Normed(build_encoder(pretraining, device))
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (arguments.batch, 3, arguments.side, arguments.side), generator=generator, dtype=torch.uint8)
    labels = torch.randint(arguments.classes, (arguments.images,), generator=generator).to(device)
    width, whole = pretraining.backbone.facts.dim, Linear()
    grids = {"52 heads": whole, "1 head": Linear(base_lrs=(1e-2,), blocks=(4,), mean_patch=(True,))}

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.monotonic()

    def forward() -> torch.Tensor:
        with torch.inference_mode():
            parts = []
            for _ in range(0, arguments.images, arguments.batch):
                found = encoder.last_blocks(images.to(device), 4)
                parts.append(torch.cat([found[name] for name in ("cls", "cls-1", "cls-2", "cls-3", "mean")], dim=1).cpu())
        return torch.cat(parts)[: arguments.images]

    def epoch(task: Linear) -> tuple[float, float]:
        variants = [Variant(blocks, mean) for blocks in task.blocks for mean in task.mean_patch]
        heads = Heads(variants, width, task, arguments.classes, arguments.images, 0, device)
        began = now()
        x = forward().to(device)
        between = now()
        for step, rows in enumerate(torch.split(torch.arange(arguments.images, device=device), heads.batch)):
            heads.step(x[rows], labels[rows], step)
        return now() - began, now() - between

    seconds: dict[str, list[float]] = {}
    epoch(whole)
    for _ in range(arguments.rounds):
        for name, task in grids.items():
            both, alone = epoch(task)
            seconds.setdefault("forward pass", []).append(both - alone)
            seconds.setdefault(name, []).append(alone)
    result: dict[str, Any] = {name: round(statistics.median(values), 4) for name, values in seconds.items()}
    forward_pass = min(seconds["forward pass"])  # the same for both: what else the machine does should not tell them apart
    result["ratio of heads"] = round((forward_pass + result["52 heads"]) / (forward_pass + result["1 head"]), 3)

    with tempfile.TemporaryDirectory() as folder:
        settings = EvaluateConfig.model_validate({"checkpoint": folder, "task": "linear", "cache": folder, "preset": "dinov2"})
        world: Any = SimpleNamespace(rank=0, world_size=1, device=device)
        context = Context(settings, pretraining, encoder.encoder, None, world, device, lambda *_: None, "0" * 64)
        data: Any = SimpleNamespace(manifest_sha256="0" * 64, split="train")
        made = forward()

        def extract(*_: Any) -> dict[str, torch.Tensor]:
            return dict(zip("abcde", forward().split(width, dim=1), strict=True))

        features.extract = extract
        for name in ("extracted and written", "read"):
            began = now()
            found = cache.features(context, data, np.arange(len(made)), "noise", "last 4", encoder.last_blocks, "")  # type: ignore[arg-type]
            result[name] = round(now() - began, 4)
            assert len(found["e"]) == len(made)
    result["ratio of cache"] = round(result["read"] / result["extracted and written"], 4)
    described = {"device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread"}
    return described | vars(arguments) | result


if __name__ == "__main__":
    main()
