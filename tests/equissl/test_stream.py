"""Streams through webdataset: batches of the right shape, every rank its own, failures tolerated up to a limit, promises said."""

from __future__ import annotations

import gc
import logging
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from equissl.config import PretrainConfig
from equissl.data.loader import BadSamples, Batch
from equissl.data.shards import ShardLost, ShardSet, find
from equissl.data.stream import MAX_FAILURES, Stream

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves what it has read to the garbage collector


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    yield
    gc.collect()


def config(data: str, **changes: Any) -> PretrainConfig:
    values: dict[str, Any] = {
        "data": data,
        "stream_images": 216,
        "backbone": {"name": "vit_tiny_patch16_224", "patch_size": 8, "depth": 1},
        "image_size": 24,
        "method": {"name": "ibot", "views": {"num_local": 1, "local_size": 16}},
        "batch": 16,
        "group_size": 4,
        "num_steps": 100,
        "num_workers": 0,
    }
    return PretrainConfig.model_validate({**values, **changes})


def batches(settings: PretrainConfig, rank: int = 0, world_size: int = 1, start: int = 0, stop: int = 20) -> list[Batch]:
    loader = Stream(settings).loader(rank, world_size, start, stop)
    found = list(loader)
    loader.close()
    return found


@pytest.fixture
def shards(photographs: Path) -> str:
    return f"file:{photographs}/train-{{000000..000004}}.tar"


def test_batches_of_a_stream(photographs: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = config(f"pipe:cat {shlex.quote(str(photographs))}/train-{{000000..000004}}.tar")
    with caplog.at_level(logging.WARNING):
        found = batches(settings, start=10)
    assert "is streamed: images of an epoch can repeat or be missing" in caplog.text
    assert [(batch.step, batch.epoch) for batch in found] == [(step, step // 13) for step in range(10, 20)]
    for batch in found:
        assert batch.view1.shape == batch.source2.shape == (16, 3, 24, 24)
        assert batch.local.shape == (1, 16, 3, 16, 16)
        assert batch.position.tolist() == [batch.step % 13 * 16 + i for i in range(16)]
        assert batch.label.min() >= 0
    assert len({label for batch in found for label in batch.label.tolist()}) == len(ShardSet(photographs, "train").classes)
    again, other = batches(settings, start=10, stop=12), batches(settings, 1, 2, start=10, stop=12)
    assert torch.equal(again[0].view1, found[0].view1)  # the same start, ranks and workers
    assert len(other[0].index) == 8
    assert other[0].position.tolist() == found[0].position.tolist()[8:]
    assert not torch.equal(other[0].view1, found[0].view1[8:])


def test_shards_that_fail_are_passed_over_until_all_do(photographs: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = f"{shlex.quote(str(photographs))}/train-000000.tar"
    found = batches(config(f"pipe:cat {good}::pipe:exit 3"), stop=8)
    assert len(found) == 8
    assert "failed" in caplog.text
    with pytest.raises(ShardLost, match=rf"{MAX_FAILURES + 1} shards of pipe:exit 3 failed one after the other"):
        batches(config("pipe:exit 3"), stop=1)


def test_a_stream_without_images(tmp_path: Path) -> None:
    import tarfile

    with tarfile.open(tmp_path / "text.tar", "w") as tar:
        for number in range(30):
            path = tmp_path / f"{number}.txt"
            path.write_text("no image")
            tar.add(path, path.name)
    with pytest.raises(BadSamples, match="hold no image of jpg, jpeg, png"):
        batches(config(f"file://{tmp_path}/text.tar"), stop=1)


def test_what_a_stream_needs_and_cannot_do(photographs: Path) -> None:
    with pytest.raises(ValidationError, match="needs the number of images that make an epoch"):
        config("pipe:cat x.tar", stream_images=None)
    with pytest.raises(ValidationError, match="a data set with a manifest has its own"):
        config(str(photographs))
    with pytest.raises(ValidationError, match="cannot be staged"):
        config("pipe:cat x.tar", stage={"budget_gb": 1.0})
    with pytest.raises(ValueError, match="is a stream: here a data set with a manifest is needed"):
        find("https://example.org/train.tar")
