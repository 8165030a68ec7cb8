"""A job's folders as runs leave them, without running any: lambda × d × seeds, a baseline, one run that failed, one that runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from PIL import Image

from hpc.status import JobRecord, Record, RunStatus

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LAMBDAS, DIMS, SEEDS = (0.1, 1.0, 5.0), (256, 512), (0, 1)
BAD = "rank 0: ValueError: </script><b>boom</b>"


def value_of(lam: float | None, d: int | None, seed: int) -> float:
    return 0.5 + 0.01 * seed + (0.0 if lam is None or d is None else 0.02 * lam + d / 10_000)


def make(folder: Path) -> tuple[JobRecord, list[RunStatus]]:
    """`RUNS/job`: pretrainings (the last of them failed, so its test is skipped) and a test of each; the last but one test runs."""
    arms: list[tuple[float | None, int | None]] = [(None, None), *((lam, d) for lam in LAMBDAS for d in DIMS)]
    statuses = []
    for lam, d in arms:
        for seed in SEEDS:
            params: dict[str, Any] = {"train.lambda": lam, "train.d": d, "train.seed": seed}
            name = f"{lam}-{d}-{seed}"
            is_last, is_busy = name == "5.0-512-1", name == "5.0-512-0"
            for stage in ("train", "test"):
                state = (
                    ("failed" if stage == "train" else "skipped") if is_last else "running" if is_busy and stage == "test" else "complete"
                )
                record = Record(f"{stage}-{name}", f"{stage}{name}", stage, params, [f"train-{name}"] if stage == "test" else [], 100)
                path = folder / "job" / stage / record.id
                statuses.append(RunStatus(record, path, state, 100, 100, 1, BAD if state == "failed" else ""))
                _leave(path, stage, state, value_of(lam, d, seed))
    shown = {"rows": ["train.lambda", "train.d"], "columns": ["t/x", "t/y"], "baseline": {"train.lambda": None}}
    reported = [
        {"source": "Somebody & al., Table 1", "params": {"train.lambda": 1.0, "train.d": 256}, "name": None, "metrics": {"t/x": 0.75}}
    ]
    job = JobRecord(
        "job", "jobs/job.yaml", "local", None, str(folder / "ledger"), {**shown, "reported": reported}, [s.record for s in statuses]
    )
    job.rules["command"] = "equihpc submit jobs/job.yaml --set train.steps=100"
    return job, statuses


def _leave(path: Path, stage: str, state: str, value: float) -> None:
    path.mkdir(parents=True)
    code = {"hash": "c0de", "commit": COMMIT, "dirty": True, "path": "/x"}
    spec = {"entry": "toy", "config": {"value": value}, "command": "equihpc submit jobs/job.yaml", "code": code, "layout": {"nodes": 1}}
    (path / "spec.json").write_text(json.dumps(spec))
    if stage == "train":
        lines = [{"step": step, "epoch": step / 10, "loss": math.exp(-step / 50) + value, "lr": 0.1} for step in range(1, 101)]
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 101, "lo')
        (path / "pictures").mkdir()
        Image.new("RGB", (40, 20), (200, 30, 30)).save(path / "pictures" / "views.png")
    if state == "complete":
        result = (
            {"metrics": {"t/x": value, "t/y": 1 - value}, "main": {"metric": "t/x", "higher_is_better": True}} if stage == "test" else {}
        )
        (path / "result.json").write_text(json.dumps(result))
