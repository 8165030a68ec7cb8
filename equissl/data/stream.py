"""Streams that cannot be indexed: `pipe:…`, `https://…`, object stores, through webdataset's own pipeline.

What is promised is less than for a data set of ours, and said in the log: shards are drawn at random, with replacement, by each
worker of each rank, so that images of an epoch repeat or are missing, another number of ranks or workers sees other images, and
a resumed run does not see those that the interrupted one would have seen. The draws of crops and colours stay those of the step.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import webdataset
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from equissl.config import PretrainConfig
from equissl.data.loader import BadSamples, Batch, Loader, PlainImages, cut, decode_image, in_turn
from equissl.data.shards import NO_LABEL, DataError, ShardLost

log = logging.getLogger(__name__)

SHUFFLE = 1000  # samples of a worker that are mixed
EXTENSIONS = ("jpg", "jpeg", "png", "webp", "ppm")
MAX_FAILURES = 10  # of shards, in a row, until the stream is given up
MAX_BAD_IN_BATCH = 10  # and as many as there are good ones


class Stream:
    """A `Source` of one training split."""

    def __init__(self, config: PretrainConfig) -> None:
        assert config.stream_images is not None
        self.config, self.name, self.num_images, self.manifest_sha256 = config, config.data, config.stream_images, None
        self.num_classes = 0

    def keys(self, index: Tensor) -> list[str]:
        return []

    def loader(self, rank: int, world_size: int, start_step: int, num_steps: int) -> Loader:
        log.warning(
            "%s cannot be indexed and is streamed: images of an epoch can repeat or be missing, and neither a resumed run nor one on"
            " another number of ranks or workers sees the same images; equihpc data build makes shards that keep all of this",
            self.name,
        )
        config = self.config
        steps = _Steps(config, rank, config.batch // world_size, start_step, num_steps)
        return Loader(in_turn(steps, config.num_workers), config.max_bad_samples, lambda: None)


class _Steps(IterableDataset[Batch | DataError]):
    """The batches of the steps that are this worker's turn."""

    def __init__(self, config: PretrainConfig, rank: int, size: int, start: int, stop: int) -> None:
        self.config, self.rank, self.size, self.start, self.stop = config, rank, size, start, stop

    def __iter__(self) -> Iterator[Batch | DataError]:
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        # keyed by where the run stands: a resumed one does not begin with the same shards again
        samples = self._samples(hash((self.config.seed, self.rank, first, stride, self.start)) & 0x7FFFFFFF)
        for step in range(self.start + first, self.stop, stride):
            try:
                yield self._batch(step, samples)
            except DataError as error:
                yield error

    def _batch(self, step: int, samples: Iterator[dict[str, Any]]) -> Batch:
        assert self.config.stream_images is not None
        epoch, step_in_epoch = divmod(step, self.config.steps_per_epoch(self.config.stream_images))
        position = np.arange(self.size) + step_in_epoch * self.config.batch + self.rank * self.size
        plain = PlainImages(self.config, epoch, position)
        labels: list[int] = []
        bad: list[str] = []

        def images() -> Iterator[Tensor]:
            while len(labels) < self.size:
                sample = next(samples)
                content = next((sample[name] for name in EXTENSIONS if name in sample), b"")
                try:
                    image = torch.from_numpy(decode_image(content)).permute(2, 0, 1)
                except Exception:  # Pillow's readers raise what they like
                    bad.append(sample["__key__"])
                    if len(bad) > MAX_BAD_IN_BATCH + self.size:
                        raise BadSamples(f"most samples of {self.config.data} hold no image of {', '.join(EXTENSIONS)}") from None
                    continue
                label = sample.get("cls", b"").strip()
                labels.append(int(label) if label.isdigit() else NO_LABEL)
                yield image

        view1, source2, local = cut(plain.on_the_way(images()), self.config, epoch, position)
        where = torch.from_numpy(position)
        return Batch(step, epoch, where, where, torch.tensor(labels), view1, source2, local, plain.images, plain.boxes, tuple(bad))

    def _samples(self, seed: int) -> Iterator[dict[str, Any]]:
        """Raw samples without end. Raises ShardLost where shard after shard fails."""
        failures = 0

        def tolerate(error: Exception) -> bool:
            nonlocal failures
            failures += 1
            log.warning("a shard of %s failed: %s", self.config.data, error)
            if failures > MAX_FAILURES:
                raise ShardLost(f"{failures} shards of {self.config.data} failed one after the other, the last: {error}") from error
            return True

        shards = webdataset.ResampledShards(self.config.data, seed=seed, worker_seed=lambda: 0, deterministic=True)
        for sample in webdataset.shuffle(SHUFFLE, seed=seed)(webdataset.tarfile_to_samples(handler=tolerate)(shards)):
            failures = 0
            yield sample
