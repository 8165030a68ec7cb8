"""The long campaign: many injected faults on the testbed, as the table of `RESULTS.md`.

    python tests/benchmarks/faults.py [--faults 110] [--per-rehearsal 22] [--runs-per-rehearsal 8] [--pretraining]

`testbed.up(requeue_hold_seconds=5)` keeps it short; `--requeue-hold-seconds 120` is Slurm's default.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent

ENTRY = '''
"""An entry that a lost or doubled step changes for good: each step's value is a hash of the one before.

The ranks go in step and agree on when to stop, over sockets. Checkpoints every so many steps, each with a checksum; rank 0
writes. `careless`: a resume skips a step.
"""
import hashlib, json, logging, os, socket, time
from pathlib import Path
from pydantic import BaseModel, ConfigDict, Field

log = logging.getLogger(__name__)

class Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    steps: int = Field(40, ge=1)
    checkpoint_every: int = Field(10, ge=1)
    keep: int = 3
    value: int = 0
    seconds: float = Field(0.05, json_schema_extra={"operational": True})
    careless: bool = Field(False, json_schema_extra={"operational": True})
    upstream: str | None = None
    def check(self, world_size, upstream_configs):
        pass

def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()

def number(path):
    return int(path.name.partition("_")[2])

def load(folder):
    """(step, value) of the newest checkpoint that is what its checksum says."""
    for path in sorted(folder.glob("step_*"), key=number, reverse=True):
        try:
            state = (path / "state").read_text()
            if (path / "checksum").read_text() == digest(state):
                return number(path), json.loads(state)["value"]
        except (OSError, ValueError):
            pass
        log.warning("%s cannot be used; trying the one before", path)
    return 0, ""

def save(folder, step, value, keep):
    path = folder / f"step_{step}"
    path.mkdir(parents=True, exist_ok=True)
    (path / "checksum").unlink(missing_ok=True)
    state = json.dumps({"step": step, "value": value, "padding": "x" * 2000})
    (path / "state").write_text(state)
    (path / "checksum").write_text(digest(state))
    for old in sorted(folder.glob("step_*"), key=number)[:-keep]:
        (old / "checksum").unlink(missing_ok=True)
        (old / "state").unlink(missing_ok=True)
        old.rmdir()

class Ranks:
    """`any_of(flag)` is a collective: it blocks while a rank does, and raises where one has gone."""

    def __init__(self):
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.is_first, self.others = rank == 0, []
        if self.is_first:
            with socket.create_server(place, backlog=size) as server:
                self.others = [server.accept()[0] for _ in range(size - 1)]
        while not self.is_first and not self.others:
            try:
                self.others = [socket.create_connection(place)]
            except ConnectionRefusedError:
                time.sleep(0.05)

    def any_of(self, flag):
        if self.is_first:
            flag = max([flag, *map(receive, self.others)])
        for other in self.others:
            other.sendall(bytes([flag]))
        return bool(flag if self.is_first else receive(self.others[0]))

def receive(other):
    found = other.recv(1)
    if not found:
        raise ConnectionError("another rank has gone")
    return found[0]

def main(config, run_dir, stop):
    ranks = Ranks()
    is_first = ranks.is_first
    folder, metrics = run_dir / "checkpoints", run_dir / "metrics.jsonl"
    saves = config["upstream"] is None
    step, value = load(folder) if saves else (0, str(config["upstream"] is None))
    if is_first and metrics.exists():
        lines = [line for line in metrics.read_text().splitlines() if line.endswith("}") and json.loads(line)["step"] <= step]
        temporary = run_dir / ".metrics"
        temporary.write_text("".join(line + "\\n" for line in lines))
        os.replace(temporary, metrics)
    if step and config["careless"]:
        step += 1
    while step < config["steps"]:
        time.sleep(config["seconds"])
        step += 1
        value = digest(f"{value} {step} {config['value']}")
        if is_first:
            with open(metrics, "a") as file:
                file.write(json.dumps({"step": step, "loss": int(value[:8], 16) / 2**32}) + "\\n")
            temporary = run_dir / ".progress"
            temporary.write_text(json.dumps({"step": step, "num_steps": config["steps"], "time": time.time()}))
            os.replace(temporary, run_dir / "progress.json")
        asked = ranks.any_of(stop())
        if is_first and saves and (asked or step % config["checkpoint_every"] == 0):
            save(folder, step, value, config["keep"])
        if asked and step < config["steps"]:
            return None
    ranks.any_of(False)
    return {"metrics": {"drill/value": int(value[:8], 16) / 2**32}, "weights_sha256": value}
'''
JOB = """
stages:
  train:
    entry: drill_entry
    resources: {nodes: 2, gpus_per_node: 1, hours: 1}
    config: {steps: %(steps)d, seconds: %(seconds)g, checkpoint_every: %(every)d}
    sweep: {grid: {value: [%(values)s]}}
  evaluate:
    entry: drill_entry
    after: train
    resources: {gpus: 1, hours: 1}
    config: {steps: %(evaluation_steps)d, seconds: %(seconds)g, upstream: "${train}"}
"""


def write_job(
    folder: Path, num_runs: int = 4, steps: int = 100, seconds: float = 0.05, every: int = 10, evaluation_steps: int = 40
) -> Path:
    """The entry and a job file of `num_runs` trainings over two nodes and an evaluation of each; returns the file."""
    (folder / "drill_entry.py").write_text(ENTRY)
    values = ", ".join(map(str, range(num_runs)))
    text = JOB % {"steps": steps, "seconds": seconds, "every": every, "values": values, "evaluation_steps": evaluation_steps}
    (folder / "job.yaml").write_text(text)
    return folder / "job.yaml"
