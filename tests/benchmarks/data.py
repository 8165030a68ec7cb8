"""The data path against its alternatives in the same run, as the tables of `RESULTS.md`. CPU time of one core unless said.

    uv run --with mosaicml-streaming python tests/benchmarks/data.py [--only SECTION …] [--images 1000] [--rounds 5]

Sections: decode (shard to crops), reader (bytes alone), build, imagenet (an index of its size over sparse files), shuffle,
photometry. The images are cut from scikit-image's and scikit-learn's photographs, 500 x 375, about 93 KB each. Variants are
measured in turn, round after round; the medians are shown. Without mosaicml-streaming its rows are left out.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import io
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
import torchvision
import webdataset
from PIL import Image
from torchvision import transforms as v1
from torchvision.transforms import v2

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from equissl import draws  # noqa: E402
from equissl.config import Photometry, PretrainConfig  # noqa: E402
from equissl.data import photographs  # noqa: E402
from equissl.data.loader import make_loader  # noqa: E402
from equissl.data.order import GROUPS, Order  # noqa: E402
from equissl.data.reader import Reader  # noqa: E402
from equissl.data.shards import (  # noqa: E402
    INDEX_DTYPE,
    Sample,
    Shard,
    ShardSet,
    shard_name,
    write_index,
    write_manifest,
    write_shards,
)

HAS_MOSAIC = importlib.util.find_spec("streaming") is not None
NORMALISE = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def make_images(count: int, quality: int = 95) -> Iterator[Sample]:
    """Photographs' random parts at ImageNet's size, with a grain that gives them ImageNet's bytes."""
    rng = np.random.default_rng(0)
    sources = [Image.fromarray(photographs.load(name)) for name in sorted(photographs.PHOTOGRAPHS)]
    for number in range(count):
        label = number % len(sources)
        width, height = sources[label].size
        w = int(width * rng.uniform(0.5, 1))
        h = min(height, int(w * 0.75))
        x, y = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
        part = sources[label].crop((x, y, x + w, y + h)).resize((500, 375), Image.Resampling.BICUBIC)
        pixels = np.asarray(part) + rng.normal(0, 4, (375, 500, 1))
        encoded = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(encoded, "JPEG", quality=quality)
        yield Sample(f"{number:06d}", encoded.getvalue(), "jpg", label)


def interleaved(variants: dict[str, Callable[[], int]], rounds: int, clock: Callable[[], float] = time.process_time) -> dict[str, float]:
    """Items per second of each variant (which returns how many it went through): the median over rounds."""
    rates: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, variant in variants.items():
            gc.collect()
            start = clock()
            count = variant()
            if number:  # the first warms up
                rates[name].append(count / (clock() - start))
    return {name: statistics.median(values) for name, values in rates.items()}


def table(title: str, rates: dict[str, float], base: str, unit: str) -> None:
    print(f"\n{title}\n\n| what | {unit} | against {base} |\n|---|---|---|")
    for name, rate in rates.items():
        print(f"| {name} | {rate:,.0f} | {rate / rates[base]:.2f}× |", flush=True)


# --- from shards to crops -----------------------------------------------------------------------------------------------


class Crops:
    """The dinov2 repository's augmentation: everything per sample, on PIL images with torchvision v1 or with v2."""

    def __init__(self, module: Any, num_local: int, photometry: bool = True) -> None:
        tensor = [module.ToTensor()] if module is v1 else [module.ToImage(), module.ToDtype(torch.float32, scale=True)]
        jitter = [
            module.RandomApply([module.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            module.RandomGrayscale(p=0.2),
            module.RandomApply([module.GaussianBlur(9, (0.1, 2.0))], p=0.5),
        ]
        after = [*jitter, *tensor, module.Normalize(*NORMALISE)] if photometry else []

        def crop(side: int, scale: tuple[float, float]) -> Any:
            resize = module.RandomResizedCrop(side, scale, interpolation=v1.InterpolationMode.BICUBIC, antialias=True)
            return module.Compose([resize, module.RandomHorizontalFlip(), *after])

        self.crops = [crop(224, (0.25, 1.0))] * 2 + [crop(96, (0.05, 0.25))] * num_local

    def __call__(self, image: Any) -> list[Any]:
        return [crop(image) for crop in self.crops]


def our_config(data: Path, num_local: int, batch: int, **changes: Any) -> PretrainConfig:
    values: dict[str, Any] = {
        "data": str(data),
        "method": {"name": "ibot", "views": {"num_local": num_local}},
        "batch": batch,
        "num_steps": 10**6,
        "num_workers": 0,
    }
    return PretrainConfig.model_validate(values | changes)


def ours(data: ShardSet, num_local: int, count: int, **changes: Any) -> Callable[[], int]:
    settings = our_config(data.folder, num_local, 40, **changes)
    loader = make_loader(data, settings, 0, 1, 0, 10**6)
    steps = min(count // 40, 25)

    def run() -> int:
        for _ in range(steps):
            next(loader)
        return steps * 40

    return run


def decode_section(data: ShardSet, mosaic: Path | None, count: int, rounds: int) -> None:
    encoded = [data.read(i) for i in range(min(count, 400))]
    urls = [str(data.folder / name) for name in data.shards]

    def bare() -> int:
        for content in encoded:
            simplejpeg.decode_jpeg(content)
        return len(encoded)

    def pil(crops: Crops, num: int) -> Callable[[], int]:
        def run() -> int:
            for i in range(num):
                crops(Image.open(io.BytesIO(data.read(i))).convert("RGB"))
            return num

        return run

    def wds(crops: Crops, num: int) -> Callable[[], int]:
        def run() -> int:
            for sample in webdataset.WebDataset(urls, shardshuffle=100).shuffle(1000).decode("pil").slice(num):
                crops(sample["jpg"])
            return num

        return run

    def streaming(crops: Crops, num: int) -> Callable[[], int]:
        from streaming import StreamingDataset

        found = StreamingDataset(local=str(mosaic), shuffle=True, batch_size=40)

        def run() -> int:
            for number, sample in enumerate(found):
                crops(sample["image"])
                if number + 1 == num:
                    break
            return num

        return run

    for num_local in (0, 8):
        num = 120 if num_local else 200
        plain, with_v2 = Crops(v1, num_local), Crops(v2, num_local)
        variants = {
            "PIL + torchvision v1, as dinov2": pil(plain, num),
            "PIL + torchvision v1, crops alone": pil(Crops(v1, num_local, photometry=False), num),
            "webdataset + torchvision v2": wds(with_v2, num),
            **({"MosaicML Streaming + torchvision v2": streaming(with_v2, num)} if mosaic else {}),
            "ours, pipeline: reference": ours(data, num_local, num, pipeline="reference"),
            "ours, shard to uint8 batch": ours(data, num_local, count),
            "decode alone (libjpeg-turbo)": bare,
        }
        title = f"Shard to crops, 2×224{f' + {num_local}×96' if num_local else ''}; ours leaves the photometry to the device"
        table(title, interleaved(variants, rounds), "PIL + torchvision v1, as dinov2", "images/s/core")


# --- bytes alone ---------------------------------------------------------------------------------------------------------


def reader_section(images: ShardSet, base: Path, rounds: int) -> None:
    """Each image stands eight times in the shards: an epoch has more than a hundred batches of 64, as a real one has."""
    folder = base / "many"
    folder.mkdir()
    samples = [Sample(f"{i:06d}_{copy}", images.read(i), "jpg", images.label(i)) for copy in range(8) for i in range(images.num_images)]
    write_manifest(folder, "many", list(images.classes), {"train": write_shards(samples, folder, "train", 500)}, {})
    data = ShardSet(folder, "train")
    if HAS_MOSAIC:
        from streaming import MDSWriter, StreamingDataset

        with MDSWriter(out=str(base / "many-mosaic"), columns={"image": "bytes", "label": "int"}, size_limit=2**26) as out:
            for sample in samples:
                out.write({"image": sample.image, "label": sample.label})
    urls = [str(data.folder / name) for name in data.shards]
    order = Order(data.shard_sizes, 64, 0)
    assert order.in_lanes

    def lanes() -> int:
        reader = Reader(data, order, 0, 64)
        for step in range(order.steps_per_epoch):
            reader.read(step)
        reader.close()
        return order.steps_per_epoch * 64

    def single() -> int:
        for i in draws.permutation(data.num_images, 0, 0):
            data.read(int(i))
        return data.num_images

    def wds() -> int:
        return sum(1 for _ in webdataset.WebDataset(urls, shardshuffle=100).shuffle(1000))

    def streaming() -> Callable[[], int]:
        found = StreamingDataset(local=str(base / "many-mosaic"), shuffle=True, batch_size=64)
        return lambda: sum(1 for _ in found)

    variants = {
        "webdataset, shuffle(1000)": wds,
        **({"MosaicML Streaming (its format, bytes)": streaming()} if HAS_MOSAIC else {}),
        "ours, one read per image": single,
        "ours, lanes": lanes,
    }
    table(
        "Encoded images from shards in the page cache, shuffled, not decoded",
        interleaved(variants, rounds),
        "webdataset, shuffle(1000)",
        "images/s/core",
    )
    gc.collect()


# --- building ------------------------------------------------------------------------------------------------------------


def build_section(data: ShardSet, base: Path, rounds: int) -> None:
    """Wall-clock time on all cores, against `cp -r` and `sha256sum` of the same bytes."""
    tree = base / "tree"
    for i in range(data.num_images):
        folder = tree / "train" / data.classes[data.label(i)]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:06d}.JPEG").write_bytes(data.read(i))
    num_bytes = sum(path.stat().st_size for path in tree.rglob("*.JPEG"))

    def command(*words: str) -> Callable[[], int]:
        def run() -> int:
            for left in ("built", "copied"):
                shutil.rmtree(base / left, ignore_errors=True)
            subprocess.run(words, check=True, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            return num_bytes // 10**6

        return run

    python = (sys.executable, "-m", "equissl.data")
    shell = f"cp -r {tree} {base / 'copied'} && find {base / 'copied'} -name '*.JPEG' -print0 | xargs -0 sha256sum && sync -f {base}"
    variants = {
        "cp -r, sha256sum, sync": command("sh", "-c", shell),
        "equihpc data build from a folder": command(*python, "build", str(tree), str(base / "built")),
        "sha256sum of the shards": command("sh", "-c", f"sha256sum {data.folder}/*.tar"),
        "equihpc data verify": command(*python, "verify", str(data.folder)),
        "equihpc data verify --decode": command(*python, "verify", "--decode", str(data.folder)),
    }
    table(
        f"Building and verifying {num_bytes / 1e6:.0f} MB, wall-clock",
        interleaved(variants, max(2, rounds - 2), time.perf_counter),
        "cp -r, sha256sum, sync",
        "MB/s",
    )


# --- ImageNet's size --------------------------------------------------------------------------------------------------------


def fake_imagenet(folder: Path) -> ShardSet:
    """1.28 million samples of about 115 KB in shards that are holes on the disk."""
    rng = np.random.default_rng(0)
    shards = []
    for number in range(1001):
        num = 1281 if number < 1000 else 167
        sizes = np.exp(rng.normal(math.log(105e3), 0.4, num)).astype(np.int64)
        steps = 512 + -(-sizes // 512) * 512 + 1024
        rows = np.zeros(num, dtype=INDEX_DTYPE)
        rows["offset"], rows["size"], rows["label"] = np.cumsum(steps) - steps + 512, sizes, rng.integers(0, 1000, num)
        entry = {"name": shard_name("train", number), "bytes": int(steps.sum()), "sha256": "0" * 64, "num_images": num}
        with (folder / entry["name"]).open("wb") as file:
            file.truncate(entry["bytes"])
        shards.append(Shard(entry, rows, np.array([f"{number}_{i}".encode() for i in range(num)])))
    write_manifest(folder, "fake", [str(i) for i in range(1000)], {"train": write_index(folder, "train", shards)}, {})
    return ShardSet(folder, "train")


def imagenet_section(base: Path) -> None:
    folder = base / "imagenet"
    folder.mkdir()
    mean = int(fake_imagenet(folder)._index["size"].mean())
    print(f"\nAn index of ImageNet's size: 1,281,167 images of {mean / 1e3:.0f} KB on average in 1,001 shards, batch 1024 on 16 ranks\n")
    code = "import sys; sys.path.insert(0, sys.argv[1]); from tests.benchmarks.data import start; start(*sys.argv[2:])"
    print("| start | s from the first line to the first batch's bytes |\n|---|---|")
    for what, epoch, step in (
        ("epoch 0", 0, 0),
        ("epoch 80", 80, 0),
        ("in the middle of epoch 80", 80, 625),
        ("at the end of epoch 80", 80, 1240),
    ):
        seconds = [
            float(
                subprocess.run(
                    [sys.executable, "-c", code, str(ROOT), str(folder), str(epoch * 1251 + step)],
                    check=True,
                    stdout=subprocess.PIPE,
                    text=True,
                ).stdout
            )
            for _ in range(3)
        ]
        print(f"| {what} | {statistics.median(seconds):.2f} |", flush=True)
    print("\n| workers per rank | images held at most | MB held at most | the bound |\n|---|---|---|---|")
    data = ShardSet(folder, "train")
    order = Order(data.shard_sizes, 1024, 0)
    for num_workers in (12, 6, 4, 1):
        reader, most, images = Reader(data, order, 0, 64, num_workers), 0, 0
        for step in range(0, num_workers * 24 * GROUPS // num_workers, num_workers):
            reader.read(step)
            most = max(most, reader.num_bytes())
            images = max(images, sum(len(part.images) for held in reader._held.values() for part in held.result().values()))
        reader.close()
        print(f"| {num_workers} | {images} | {most / 1e6:.1f} | {order.held_images(16, num_workers)} images |", flush=True)


def start(folder: str, step: str) -> None:
    """In a process of its own: how long until the first bytes are there."""
    begin = time.perf_counter()
    data = ShardSet(Path(folder), "train")
    reader = Reader(data, Order(data.shard_sizes, 1024, 0), 0, 64, 12)
    reader.read(int(step))
    print(time.perf_counter() - begin)
    reader.close()


# --- shuffling -----------------------------------------------------------------------------------------------------------


def shuffle_section() -> None:
    """50 000 images of 100 classes, batch 256, 10 epochs, in lanes and as one permutation."""
    sizes, batch, classes, epochs = (500,) * 100, 256, 100, 10
    num = sum(sizes)
    lanes, whole = Order(sizes, batch, 0), Order(sizes, batch, 0)
    assert lanes.in_lanes
    whole.in_lanes = False
    rng = np.random.default_rng(0)
    labels = {"shuffled shards": rng.permutation(num) % classes, "shards sorted by class": np.arange(num) // (num // classes)}
    print("\nShuffling: 50,000 images of 100 classes in 100 shards, batch 256, 10 epochs\n")
    print("| shards | order | neighbours in a batch of one class | … of one shard | classes in a batch | place in the epoch: χ² / d.o.f. |")
    print("|---|---|---|---|---|---|")
    for name, label in labels.items():
        for kind, order in (("lanes", lanes), ("permutation", whole)):
            same_class, same_shard, present = [], [], []
            place = np.zeros((epochs, num))
            for epoch in range(epochs):
                for step in range(order.steps_per_epoch):
                    images = order.indices(epoch * order.steps_per_epoch + step)[2]
                    place[epoch, images] = step / order.steps_per_epoch
                    found = label[images]
                    same_class.append((found[1:] == found[:-1]).mean())
                    same_shard.append((images[1:] // 500 == images[:-1] // 500).mean())
                    present.append(len(np.unique(found)))
            counts = np.stack([((place >= i / 5) & (place < (i + 1) / 5)).sum(axis=0) for i in range(5)])
            chi = ((counts - epochs / 5) ** 2 / (epochs / 5)).sum(axis=0).mean() / 4
            print(
                f"| {name} | {kind} | {np.mean(same_class):.4f} | {np.mean(same_shard):.4f} | {np.mean(present):.1f} | {chi:.3f} |",
                flush=True,
            )


# --- photometry ------------------------------------------------------------------------------------------------------------


def photometry_section(rounds: int) -> None:
    from equissl.photometry import augment

    settings = Photometry()
    positions = np.arange(32)
    on_cpu = torch.randint(0, 256, (32, 3, 224, 224), dtype=torch.uint8)
    per_sample = v2.Compose(
        [
            v2.ToDtype(torch.float32, scale=True),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            v2.RandomGrayscale(p=0.2),
            v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], p=0.5),
            v2.RandomApply([v2.RandomSolarize(0.5, p=1.0)], p=0.2),
        ]
    )
    steps = iter(range(10**9))

    def theirs() -> int:
        for image in on_cpu:
            per_sample(image)
        return 32

    def mine(device: str) -> Callable[[], int]:
        images = on_cpu.to(device)

        def run() -> int:
            augment(images.float() / 255, settings, 0, next(steps), positions, 0, 224)
            if device == "cuda":
                torch.cuda.synchronize()
            return 32

        return run

    variants = {"torchvision v2, per sample": theirs, "ours, in batch": mine("cpu")}
    rates = interleaved(variants, rounds * 3)
    table("Photometry of 224 crops on one core", rates, "torchvision v2, per sample", "crops/s/core")
    print("\nms per crop: " + ", ".join(f"{name} {1000 / rate:.2f}" for name, rate in rates.items()))
    if torch.cuda.is_available():
        rates = interleaved({"ours, in batch": mine("cuda")}, 30, time.perf_counter)
        print(f"on {torch.cuda.get_device_name()}: {1e6 / rates['ours, in batch']:.1f} µs per crop (batches of 32)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sections = ("decode", "reader", "build", "imagenet", "shuffle", "photometry")
    parser.add_argument("--only", action="append", choices=sections)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    chosen = arguments.only or sections
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    used = (torch, torchvision, webdataset, simplejpeg)
    print(", ".join(f"{module.__name__} {module.__version__}" for module in used))
    if not HAS_MOSAIC:
        print("mosaicml-streaming is not installed: its rows are left out")
    with ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="data-bench-")))
        if {"decode", "reader", "build"} & set(chosen):
            folder = base / "data"
            folder.mkdir()
            samples = list(make_images(arguments.images))
            write_manifest(folder, "bench", sorted(photographs.PHOTOGRAPHS), {"train": write_shards(samples, folder, "train", 100)}, {})
            data = ShardSet(folder, "train")
            print(f"{len(samples)} images of {sum(len(s.image) for s in samples) / len(samples) / 1e3:.0f} KB")
            mosaic = None
            if HAS_MOSAIC:
                from streaming import MDSWriter

                mosaic = base / "mosaic"
                with MDSWriter(out=str(mosaic), columns={"image": "jpeg", "label": "int"}, size_limit=10**7) as out:
                    for sample in samples:
                        out.write({"image": Image.open(io.BytesIO(sample.image)), "label": sample.label})
            if "decode" in chosen:
                decode_section(data, mosaic, arguments.images, arguments.rounds)
            if "reader" in chosen:
                reader_section(data, base, arguments.rounds)
            if "build" in chosen:
                build_section(data, base, arguments.rounds)
        if "imagenet" in chosen:
            imagenet_section(base)
        if "shuffle" in chosen:
            shuffle_section()
        if "photometry" in chosen:
            photometry_section(arguments.rounds)
    print(f"\npeak memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB; {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
