"""`equihpc data info DIR`: what a data set holds, and the order in which it is read. No torch."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from equissl.data.shards import find, manifest_sha256, read_manifest
from equissl.data.verify import files_of, read_receipts, states

DESCRIPTION = "What a data set holds; with --batch: the order in which such batches are read from it."


def info(folder: Path, batch: int | None = None, ranks: int = 1, workers: int = 1) -> dict[str, Any]:
    """For people and scripts. Raises ValueError for a folder that is not a data set or lacks a file, and for a batch below 1."""
    for name, number in (("batch", batch), ("ranks", ranks), ("workers", workers)):
        if number is not None and number < 1:
            raise ValueError(f"--{name} {number} must be at least 1")
    manifest = read_manifest(folder)
    known = read_receipts(folder)
    splits = {}
    for split in manifest["splits"]:
        small, shards = files_of(folder, [split])
        unverified = [state.name for state in states(folder, small + shards) if state not in known]
        splits[split] = {**_contents(folder, manifest["splits"][split], len(manifest["classes"])), "num_unverified": len(unverified)}
        if batch is not None:
            splits[split]["order"] = _order(tuple(shard["num_images"] for shard in shards), batch, ranks, workers)
    return {
        "folder": str(folder),
        "name": manifest["name"],
        "version": manifest["version"],
        "manifest_sha256": manifest_sha256(folder),
        "source": manifest["source"],
        "classes": manifest["classes"],
        "splits": splits,
    }


def _contents(folder: Path, entry: dict[str, Any], num_classes: int) -> dict[str, Any]:
    rows = np.load(folder / entry["index"]["name"], mmap_mode="r")
    sizes, labels = np.array(rows["size"]), np.array(rows["label"])
    labels = labels[labels >= 0]
    per_class = np.bincount(labels, minlength=num_classes)
    return {
        "num_images": len(rows),
        "num_shards": len(entry["shards"]),
        "bytes": sum(shard["bytes"] for shard in entry["shards"]),
        "image_bytes": {"mean": float(sizes.mean()), "min": int(sizes.min()), "max": int(sizes.max())} if len(sizes) else None,
        "images_per_class": {"min": int(per_class.min()), "max": int(per_class.max())} if len(labels) else None,
        "num_unlabelled": len(rows) - len(labels),
    }


def _order(shard_sizes: tuple[int, ...], batch: int, ranks: int, workers: int) -> dict[str, int | str]:
    from equissl.data.order import describe

    if sum(shard_sizes) < batch:
        return {"order": "none: fewer images than the batch"}
    return describe(shard_sizes, batch, ranks, workers)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DIR", help="a data set, or the name photographs")
    parser.add_argument("--batch", type=int, metavar="B", help="the global batch, to see the order's parameters")
    parser.add_argument("--ranks", type=int, default=1, metavar="R", help="that share the batch; for the memory of their workers")
    parser.add_argument("--workers", type=int, default=6, metavar="N", help="of a rank; default: %(default)s")
    parser.add_argument("--json", action="store_true", help="for scripts")


def command(arguments: argparse.Namespace) -> int:
    result = info(find(arguments.data), arguments.batch, arguments.ranks, arguments.workers)
    if arguments.json:
        print(json.dumps(result, indent=1))
        return 0
    classes = result["classes"]
    print(f"{result['name']} in {result['folder']}, version {result['version']}, manifest {result['manifest_sha256'][:12]}")
    print(f"{len(classes):,} classes: {', '.join(classes[:5])}{', …' * (len(classes) > 5)}" if classes else "no classes")
    print("source: " + ", ".join(f"{key} {value}" for key, value in result["source"].items()))
    _show({split: _texts(contents) for split, contents in result["splits"].items()})
    return 0


def _texts(contents: dict[str, Any]) -> dict[str, str]:
    from rich.filesize import decimal

    texts = {"images": f"{contents['num_images']:,}", "shards": f"{contents['num_shards']:,}", "size": decimal(contents["bytes"])}
    if image := contents["image_bytes"]:
        texts["an image, mean"] = decimal(round(image["mean"]))
        texts["smallest to largest"] = f"{decimal(image['min'])} to {decimal(image['max'])}"
    if per_class := contents["images_per_class"]:
        texts["images of a class"] = f"{per_class['min']:,} to {per_class['max']:,}"
    texts["images without a label"] = f"{contents['num_unlabelled']:,}"
    texts["files without a receipt"] = f"{contents['num_unverified']:,}"
    return {**texts, **{name.replace("_", " "): str(value) for name, value in contents.get("order", {}).items()}}


def _show(columns: dict[str, dict[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None)
    table.add_column()
    for split in columns:
        table.add_column(split, justify="right")
    for name in dict.fromkeys(name for texts in columns.values() for name in texts):
        table.add_row(name, *(texts.get(name, "") for texts in columns.values()))
    Console(width=None if sys.stdout.isatty() else 200).print(table)  # a pipe has no width: nothing is cut there
