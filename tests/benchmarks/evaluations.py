"""What evaluations cost, against what they cannot do without, as the tables of `RESULTS.md`.

    python tests/benchmarks/evaluations.py [--only SECTION …] [--images 512] [--side 224] [--backbone vit_small_patch16_224]
                                           [--classes 1000] [--batch 64] [--workers 1] [--rounds 3]

Sections, each in turns, round after round; medians:
extraction  images/s of `features.extract` from JPEGs of 500 x 375 in shards, beside the bare forward pass on batches that lie on the
            device, decoded and normalised. On a GPU by the clock. On a CPU by the CPU time of the process that computes, without that
            of its workers, which decode: elsewhere they have cores of their own. By the clock, all together, is shown beside it
heads       seconds of an epoch of forward pass and heads, 52 and one, by DINOv2's preset without its augmentation, on noise
start       seconds from the start of `python -m equissl.evaluate` to the first step of its heads, without cached features and with them
memory      of R² on n and 4 n pairs of views, CLS and mean patch of 512 numbers each: the most memory that is not pages of files,
            and the files' size
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from equissl import features  # noqa: E402
from equissl.classify import Variant  # noqa: E402
from equissl.config import EvaluateConfig, Linear, PretrainConfig  # noqa: E402
from equissl.data.shards import ShardSet, write_manifest, write_shards  # noqa: E402
from equissl.encoder import WEIGHTS, build_encoder, exported_name  # noqa: E402
from equissl.evals import Context, r2  # noqa: E402
from equissl.evals.linear import Heads  # noqa: E402
from equissl.photometry import normalise  # noqa: E402
from tests.benchmarks.data import make_images  # noqa: E402

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
SPLITS = {"train": "train", "test": "val"}
WORLD: Any = SimpleNamespace(rank=0, world_size=1, device=DEVICE)


def main() -> None:
    sections: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
        each.__name__: each for each in (extraction, heads, start, memory)
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sections, default=list(sections))
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--backbone", default="vit_small_patch16_224")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=64, help="images per forward pass")
    parser.add_argument("--workers", type=int, default=1, help="processes that decode")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    result: dict[str, Any] = {"device": torch.cuda.get_device_name() if ON_GPU else f"CPU, {torch.get_num_threads()} thread"}
    for name in arguments.only:
        result[name] = sections[name](arguments)
    print(json.dumps(result | vars(arguments), indent=2))


def pretraining(arguments: argparse.Namespace, data: str = "photographs") -> PretrainConfig:
    values = {"data": data, "backbone": arguments.backbone, "image_size": arguments.side, "batch": 8, "num_steps": 1, "method": "ibot"}
    return PretrainConfig.model_validate(values)


def write_data(folder: Path, arguments: argparse.Namespace) -> Path:
    """As many training images as asked for, an eighth of them for validation."""
    sizes = {"train": arguments.images, "val": max(1, arguments.images // 8)}
    splits = {split: write_shards(make_images(size), folder, split, 1000) for split, size in sizes.items()}
    write_manifest(folder, "cut", [f"class {i}" for i in range(100)], splits, {})
    return folder


def now() -> float:
    """Of the device."""
    if ON_GPU:
        torch.cuda.synchronize()
        return time.monotonic()
    return time.process_time()


def extraction(arguments: argparse.Namespace) -> dict[str, Any]:
    encoder = features.Normed(build_encoder(pretraining(arguments), DEVICE))
    geometry = features.CentreCrop(round(arguments.side * 256 / 224), arguments.side)
    noise = torch.randint(0, 256, (arguments.batch, 3, arguments.side, arguments.side), dtype=torch.uint8)
    resident = normalise(noise.to(DEVICE).float() / 255)
    seconds: dict[str, list[float]] = {"bare": [], "extract": [], "by the clock": []}
    with tempfile.TemporaryDirectory() as folder:
        data = ShardSet(write_data(Path(folder), arguments), "train")

        def bare(num_images: int = arguments.images) -> None:
            with torch.inference_mode():
                for first in range(0, num_images, arguments.batch):
                    encoder.encoder(resident[: num_images - first], None)

        def ours() -> None:
            features.extract(
                data,
                np.arange(arguments.images),
                geometry,
                lambda images, _: encoder.last_blocks(images, 1),
                WORLD,
                arguments.batch,
                arguments.workers,
                lambda *_: None,
                "",
            )

        bare(arguments.batch)
        ours()
        for _ in range(arguments.rounds):
            for name, work in {"bare": bare, "extract": ours}.items():
                began, clock = now(), time.monotonic()
                work()
                seconds[name].append(now() - began)
            seconds["by the clock"].append(time.monotonic() - clock)
    found = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        **{f"{name}, images/s": round(arguments.images / value, 2) for name, value in found.items()},
        "extract / bare": round(found["bare"] / found["extract"], 4),
        "of each round": [round(bare / extract, 4) for bare, extract in zip(seconds["bare"], seconds["extract"], strict=True)],
    }


def heads(arguments: argparse.Namespace) -> dict[str, Any]:
    config = pretraining(arguments)
    encoder = features.Normed(build_encoder(config, DEVICE))
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (arguments.batch, 3, arguments.side, arguments.side), generator=generator, dtype=torch.uint8)
    labels = torch.randint(arguments.classes, (arguments.images,), generator=generator).to(DEVICE)
    grids = {"52 heads": Linear(), "1 head": Linear(base_lrs=(1e-2,), blocks=(4,), mean_patch=(True,))}

    def forward() -> torch.Tensor:
        with torch.inference_mode():
            parts = []
            for _ in range(0, arguments.images, arguments.batch):
                found = encoder.last_blocks(images.to(DEVICE), 4)
                parts.append(torch.cat([found[name] for name in ("cls", "cls-1", "cls-2", "cls-3", "mean")], dim=1).cpu())
        return torch.cat(parts)[: arguments.images]

    def epoch(task: Linear) -> tuple[float, float]:
        variants = [Variant(blocks, mean) for blocks in task.blocks for mean in task.mean_patch]
        made = Heads(variants, config.backbone.facts.dim, task, arguments.classes, arguments.images, 0, DEVICE)
        began = now()
        x = forward().to(DEVICE)
        between = now()
        for step, rows in enumerate(torch.split(torch.arange(arguments.images, device=DEVICE), made.batch)):
            made.step(x[rows], labels[rows], step)
        return now() - began, now() - between

    seconds: dict[str, list[float]] = {}
    epoch(grids["52 heads"])
    for _ in range(arguments.rounds):
        for name, task in grids.items():
            both, alone = epoch(task)
            seconds.setdefault("forward pass", []).append(both - alone)
            seconds.setdefault(name, []).append(alone)
    result: dict[str, Any] = {name: round(statistics.median(values), 4) for name, values in seconds.items()}
    forward_pass = min(seconds["forward pass"])  # the same for both: what else the machine does should not tell them apart
    result["ratio of heads"] = round((forward_pass + result["52 heads"]) / (forward_pass + result["1 head"]), 3)
    return result


def start(arguments: argparse.Namespace) -> dict[str, Any]:
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("data", "pretrained"):
            (folder / part).mkdir()
        config = pretraining(arguments, str(write_data(folder / "data", arguments)))
        content = _weights(config)
        (folder / "pretrained" / WEIGHTS).write_bytes(content)
        (folder / "pretrained" / "config.json").write_text(config.model_dump_json(by_alias=True))
        (folder / "pretrained" / "result.json").write_text(json.dumps({"weights_sha256": hashlib.sha256(content).hexdigest()}))
        (folder / "pretrained" / "COMPLETE").touch()
        task = {"name": "linear", "augment": False, "epochs": 1}
        values = {"checkpoint": str(folder / "pretrained"), "task": task, "preset": "dinov2", "num_workers": arguments.workers}
        for which in ("first", "second"):
            run_dir = folder / which
            run_dir.mkdir()
            (run_dir / "config.json").write_text(json.dumps(values | {"batch": arguments.batch, "cache": str(folder / "cache")}))
            began = time.monotonic()
            process = subprocess.Popen([sys.executable, "-m", "equissl.evaluate", str(run_dir / "config.json")], cwd=ROOT)
            while not _stage(run_dir).startswith("heads on"):
                if process.poll() is not None:
                    raise SystemExit(f"the evaluation ended with {process.returncode} before its heads began")
                time.sleep(0.02)
            seconds[f"{which}, s to the first step"] = round(time.monotonic() - began, 2)
            process.kill()
            process.wait()
        seconds["cached, MB"] = round(sum(path.stat().st_size for path in folder.glob("cache/*/*.safetensors")) / 1e6, 1)
    return seconds


def _weights(config: PretrainConfig) -> bytes:
    from safetensors.torch import save

    return save({exported_name(name): parameter.detach() for name, parameter in build_encoder(config).named_parameters()})


def _stage(run_dir: Path) -> str:
    try:
        return str(json.loads((run_dir / "progress.json").read_text())["stage"])
    except FileNotFoundError:
        return ""


class Features(torch.nn.Module):
    """CLS and mean patch of 512 numbers each, at no cost."""

    def forward(self, images: torch.Tensor, masks: torch.Tensor | None) -> Any:
        cls = images.flatten(1)[:, :512]
        return SimpleNamespace(cls=cls, patches=images.flatten(1)[:, None, 512:1024])


def memory(arguments: argparse.Namespace) -> dict[str, Any]:
    from equissl import encoder

    encoder.load_random = lambda *_: Features()  # type: ignore[assignment, return-value]
    config = pretraining(argparse.Namespace(**vars(arguments) | {"side": 32}))
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "data").mkdir()
        write_data(folder / "data", argparse.Namespace(images=max(arguments.images, 64)))
        for pairs in (1, 1, 4):  # of each image; the first one warms up
            task = {"name": "r2", "pairs_per_image": pairs, "epochs": 1, "hidden": 64}
            settings = EvaluateConfig.model_validate({"checkpoint": "x", "task": task, "num_workers": 0, "batch": 16})
            sets: Any = SimpleNamespace(**{role: ShardSet(folder / "data", split) for role, split in SPLITS.items()})
            made: Any = Features()
            context = Context(settings, config, made, sets, WORLD, DEVICE, lambda *_: None, "")
            peak, size = 0.0, 0.0

            def tick(*_: Any) -> None:
                nonlocal peak, size
                (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
                peak = max(peak, int(line.split()[1]) / 1024)
                size = max(size, sum(path.stat().st_size for path in folder.rglob("*.float32")) / 2**20)

            r2.run(dataclasses.replace(context, tick=tick, run_dir=folder))
            result[f"{pairs * max(arguments.images, 64)} pairs, MiB"] = {"memory": round(peak, 1), "files": round(size, 1)}
    return result


if __name__ == "__main__":
    main()
