"""Recorded losses of the first steps, for every method. A change of numbers is then meant, and recorded with its reason:

python tests/equissl/test_golden.py --record NAME …
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from equissl import distributed
from equissl.batchnorm import batch_norms

FOLDER = Path(__file__).parent.parent / "golden"
NUM_STEPS = 5
# Adam divides by their own size gradients that batch norm cancels, which are rounding and nothing else: of what has both, other versions of
# torch would have other losses from the second step on
ON_SGD = ("vicreg", "sie")
CONFIGS = {
    f"{method}_{name}": tiny.config(
        method=method, **changes, **({"method__optimizer": "sgd"} if method.partition("_")[0] in ON_SGD else {})
    )
    for method, name, changes in tiny.variants({"auxiliary": {}, "baseline": {"auxiliary": None}})
}


def fingerprint() -> dict[str, Any]:
    """What must be the same for the same bits: torch, the instruction set and processor, the number of threads."""
    processor = "".join(sorted(set(re.findall(r"^(?:vendor_id|cpu family|model|flags)\s*:.*$", Path("/proc/cpuinfo").read_text(), re.M))))
    return {
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "processor": hashlib.sha256(processor.encode()).hexdigest()[:12],
        "threads": torch.get_num_threads(),
    }


def losses(name: str) -> list[dict[str, float]]:
    world = distributed.init()
    run = tiny.Run(CONFIGS[name], world)
    assert CONFIGS[name].method.optimizer.name != "adamw" or not batch_norms(run.method.student)  # type: ignore[attr-defined]
    found = [run.update(step, lr=2e-3).read().terms for step in range(NUM_STEPS)]
    distributed.close()
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_losses_are_those_recorded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    golden = json.loads((FOLDER / f"{name}.json").read_text())
    found = losses(name)
    assert len(found) == len(golden["losses"]) == NUM_STEPS
    for step, expected in zip(found, golden["losses"], strict=True):
        assert step == pytest.approx(expected, rel=1e-4)
    if fingerprint() == golden["fingerprint"]:
        assert found == golden["losses"]


def test_every_record_has_its_configuration() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == set(CONFIGS)


if __name__ == "__main__":
    assert sys.argv[1:2] == ["--record"], __doc__
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    for each in sys.argv[2:]:
        record = {"fingerprint": fingerprint(), "losses": losses(each)}
        (FOLDER / f"{each}.json").write_text(json.dumps(record, indent=1) + "\n")
