"""Real photographs without a download: those inside the wheels of scikit-image and scikit-learn, cut into patches. No torch.

The class is the photograph. Training patches come from its left half, validation patches from its right half: no pixel is
shared. Stored as PNG, without loss: a JPEG's grid of 8 pixels would be turned together with the patch and tell its angle; and
without compression: the bytes do not depend on the zlib at hand, and decoding takes half the time (at 64 pixels 61 µs against
124 µs, for 12.4 KB against 7.2 KB).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from equissl import draws
from equissl.config import PrepareConfig
from equissl.data.shards import MANIFEST, VERSION, Sample, write_manifest, write_shards
from equissl.progress import Stopped

PHOTOGRAPHS = {  # class -> package and file; both halves of each are at least 192 pixels wide and high
    "astronaut": ("skimage", "data/astronaut.png"),
    "brick": ("skimage", "data/brick.png"),
    "camera": ("skimage", "data/camera.png"),
    "cell": ("skimage", "data/cell.png"),
    "chelsea": ("skimage", "data/chelsea.png"),
    "china": ("sklearn", "datasets/images/china.jpg"),
    "clock": ("skimage", "data/clock_motion.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "coins": ("skimage", "data/coins.png"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
    "grass": ("skimage", "data/grass.png"),
    "gravel": ("skimage", "data/gravel.png"),
    "hubble": ("skimage", "data/hubble_deep_field.jpg"),
    "ihc": ("skimage", "data/ihc.png"),
    "moon": ("skimage", "data/moon.png"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "retina": ("skimage", "data/retina.jpg"),
    "rocket": ("skimage", "data/rocket.jpg"),
}
FORMAT = 1  # raised when the same settings give other patches
TRIES = 16  # positions drawn for a patch until one is not flat
FLAT = 4.0  # grey levels of 255; a patch with a smaller standard deviation (sky, black margin) shows nothing


def load(name: str) -> NDArray[np.uint8]:
    """The photograph as `(height, width, 3)`; grey ones have three equal channels. Raises ValueError if its package lacks it."""
    package, file = PHOTOGRAPHS[name]
    spec = find_spec(package)  # found, not imported: scikit-learn takes seconds
    path = Path(spec.origin).parent / file if spec and spec.origin else None
    if path is None or not path.is_file():
        raise ValueError(f"the photograph {name!r} is missing: install {package} with its file {file}")
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def half(photograph: NDArray[np.uint8], split: str) -> NDArray[np.uint8]:
    middle = photograph.shape[1] // 2
    return photograph[:, :middle] if split == "train" else photograph[:, middle:]


def cut(part: NDArray[np.uint8], side: int, index: int, seed: int, stream: int) -> NDArray[np.uint8]:
    """Patch number `index` of this part: the first of some random positions that is not flat, else the last."""
    tries = draws.uniform(seed, 0, [index], stream, 2 * TRIES).reshape(TRIES, 2)
    corners = (tries * (part.shape[0] - side + 1, part.shape[1] - side + 1)).astype(int)
    for y, x in corners:
        patch = part[y : y + side, x : x + side]
        if patch.mean(axis=2).std() >= FLAT:
            break
    return patch


def write(config: PrepareConfig, folder: Path, stop: Callable[[], bool], report: Callable[[str, int, int], None]) -> None:
    """Write the whole data set into the empty `folder`; every 64 patches `report(split, done, of)`; raises Stopped if `stop()`."""
    names = sorted(PHOTOGRAPHS)
    splits = {}
    for split, count in (("train", config.train_patches), ("val", config.val_patches)):
        splits[split] = write_shards(_samples(config, names, split, count, stop, report), folder, split, config.samples_per_shard)
    source = {"format": FORMAT, **config.model_dump(mode="json")}
    write_manifest(folder, "photographs", names, splits, source)


def _samples(
    config: PrepareConfig, names: list[str], split: str, count: int, stop: Callable[[], bool], report: Callable[[str, int, int], None]
) -> Iterator[Sample]:
    """All patches of a split in a random order, so that a reader of the stream sees all classes from the start."""
    parts = [half(load(name), split) for name in names]
    total = len(names) * count
    streams = [draws.Stream.PREPARE + 2 * number + (split == "val") for number in range(len(names))]
    for done, position in enumerate(draws.permutation(total, config.seed, int(split == "val"), draws.Stream.PREPARE)):
        if done % 64 == 0:
            report(split, done, total)
            if stop():
                raise Stopped
        label, index = divmod(int(position), count)
        patch = cut(parts[label], config.patch_size, index, config.seed, streams[label])
        encoded = io.BytesIO()
        Image.fromarray(patch).save(encoded, "PNG", compress_level=0)
        yield Sample(f"{names[label]}-{split}-{index:06d}", encoded.getvalue(), "png", label)


def cached(config: PrepareConfig) -> Path:
    """The data set in the user's cache folder, cut if it is not there yet. Any number of processes may ask at once."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "equihpc" / "data"
    identity = json.dumps([VERSION, FORMAT, config.model_dump(mode="json")], sort_keys=True)
    folder = cache / f"photographs-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    if (folder / MANIFEST).is_file():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=cache))
    try:
        write(config, temporary, lambda: False, lambda stage, done, of: None)
        temporary.chmod(0o755)  # mkdtemp's 700 would keep a shared cache to its first user
        try:
            temporary.rename(folder)
        except OSError:  # another process was first: a folder that is not empty is never replaced
            if not (folder / MANIFEST).is_file():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
