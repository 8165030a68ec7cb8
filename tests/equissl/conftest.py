from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from equissl import distributed, prepare
from equissl.distributed import World


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def small() -> dict[str, Any]:
    """Settings of equissl.prepare."""
    return {"patch_size": 48, "train_patches": 12, "val_patches": 5, "samples_per_shard": 50}


@pytest.fixture(scope="session")
def photographs(small: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set: 18 classes, 216 training and 90 validation images of 48 pixels, several shards. Do not write into it."""
    run_dir = tmp_path_factory.mktemp("prepare")
    assert prepare.main(small, run_dir, lambda: False) is not None
    return run_dir / "data"


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """Of one rank."""
    monkeypatch.delenv("RANK", raising=False)
    yield distributed.init()
    distributed.close()
