"""Run folders of earlier versions: today's code finds the same runs in them, calls them complete and starts nothing again.

`python -m tests.contracts.test_earlier` stores those of today's version, once per version: small files only, without machine names
and paths. A stored folder is never written anew; where one no longer fits, users' folders do not fit either.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

STORE = Path(__file__).parents[1] / "golden" / "earlier"
VERSIONS = sorted(path.name for path in STORE.glob("*"))
RUNS, HOST = "@RUNS@", "@HOST@"
KEPT = ("spec.json", "config.json", "result.json", "COMPLETE", "attempts.jsonl", "progress.json", "metrics.jsonl", "manifest.json")
KEPT_BESIDE = (".equihpc/job.json", ".equihpc/journal.jsonl")

JOB = """\
stages:
  prepare:
    entry: equissl.prepare
    resources: {gpus: 0}
    config: {source: photographs, patch_size: 48, train_patches: 12, val_patches: 5}
  pretrain:
    entry: equissl.pretrain
    after: prepare
    resources: {gpus: 1, hours: 1}
    config:
      data: "${prepare}"
      backbone: {name: vit_tiny_patch16_224, patch_size: 8, depth: 1, drop_path: 0.0}
      image_size: 32
      method: {name: ibot, representation: 64, head_hidden: 32, head_bottleneck: 16, prototypes: 32, views: {num_local: 1, local_size: 16}}
      transformation: se2
      auxiliary: {name: reconstruction, d: 32, decoder_widths: [16, 8, 8]}
      batch: 16
      num_steps: 4
      num_workers: 0
      log_every: 1
  evaluate:
    entry: equissl.evaluate
    after: pretrain
    resources: {gpus: 1, hours: 1}
    config: {checkpoint: "${pretrain}", task: knn, preset: smoke, num_workers: 0}
"""
BY_PATH = """\
stages:
  pretrain:
    entry: equissl.pretrain
    resources: {gpus: 1, hours: 1}
    config: {data: %s, backbone: vit_small_patch16_224, method: ibot, batch: 16, num_steps: 4, transformation: se2}
"""

Command = Callable[..., "subprocess.CompletedProcess[str]"]


def ids(command: Command, file: str) -> dict[str, str]:
    """Of the runs that today's code plans, by stage."""
    planned = command("plan", file, "--cluster", "local", "--json")
    assert planned.returncode == 0, planned.stderr
    return {run["stage"]: run["id"] for run in json.loads(planned.stdout)["runs"]}


def record() -> Path:
    """Run the job with today's code and store what identity and reading depend on. Raises FileExistsError for a stored version."""
    store = STORE / importlib.metadata.version("equihpc")
    if store.exists():
        raise FileExistsError(f"{store} is a record of that version: it is not made again")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch).resolve()

        def command(*arguments: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run([sys.executable, "-m", "hpc.cli", *arguments], cwd=folder, capture_output=True, text=True)

        (folder / "earlier.yaml").write_text(JOB)
        done = command("submit", "earlier.yaml", "--cluster", "local", "--wait")
        assert done.returncode == 0, done.stdout + done.stderr
        runs = folder / "runs"
        job = runs / "earlier"
        kept = [path for path in job.rglob("*") if path.name in KEPT and ".equihpc" not in path.parts]
        for path in [*kept, *(job / name for name in KEPT_BESIDE), *(runs / ".ledger").iterdir()]:
            stored = store / "runs" / path.relative_to(runs)
            stored.parent.mkdir(parents=True, exist_ok=True)
            text = path.read_text().replace(str(runs), RUNS).replace(json.dumps(socket.gethostname()), json.dumps(HOST))
            assert len(text) < 100_000
            assert str(folder) not in text
            stored.write_text(text)
        (store / "earlier.yaml").write_text(JOB)
        (store / "by_path.yaml").write_text(BY_PATH)
        (manifest,) = job.glob("prepare/*/data/manifest.json")
        (folder / "by_path.yaml").write_text(BY_PATH % json.dumps(str(manifest.parent)))
        (store / "by_path.json").write_text(json.dumps(ids(command, "by_path.yaml")) + "\n")
    return store


@pytest.fixture(params=VERSIONS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The record, with the job file copied to where the command is called."""
    found = STORE / str(request.param)
    shutil.copy(found / "earlier.yaml", tmp_path)
    return found


def put(store: Path, runs: Path) -> None:
    """The folders as they were, under another root."""
    shutil.copytree(store / "runs", runs)
    for path in runs.rglob("*"):
        if path.is_file():
            path.write_text(path.read_text().replace(RUNS, str(runs)).replace(HOST, "node-1"))


def stored_ids(store: Path) -> dict[str, str]:
    return {stage: next((store / "runs" / "earlier" / stage).iterdir()).name for stage in ("prepare", "pretrain", "evaluate")}


def check_complete(command: Command, runs: Path) -> None:
    """`status` calls all complete, `submit` starts nothing and writes no attempt."""
    before = {path: path.read_bytes() for name in ("attempts.jsonl", "result.json", "COMPLETE") for path in runs.rglob(name)}
    assert len(before) == 9
    status = command("status", "earlier", "--runs", str(runs), "--json")
    assert status.returncode == 0, status.stderr
    assert [(run["state"], run["attempts"]) for run in json.loads(status.stdout)["runs"]] == [("complete", 1)] * 3
    again = command("submit", "earlier.yaml", "--cluster", "local", "--runs", str(runs), "--wait")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "0 runs started" in again.stdout
    assert "left alone: 3 complete" in again.stdout
    assert "knn/top1" in again.stdout, "the report reads the earlier results"
    assert {path: path.read_bytes() for path in before} == before


def test_there_is_a_record() -> None:
    assert VERSIONS


def test_nothing_is_identified_anew(store: Path, equihpc: Command) -> None:
    assert ids(equihpc, "earlier.yaml") == stored_ids(store)


def test_earlier_folders_are_complete_and_start_nothing(store: Path, tmp_path: Path, equihpc: Command) -> None:
    put(store, tmp_path / "runs")
    check_complete(equihpc, tmp_path / "runs")


def test_moved_folders_are_the_same_runs(store: Path, tmp_path: Path, equihpc: Command) -> None:
    put(store, tmp_path / "runs")
    (tmp_path / "scratch").mkdir()
    moved = (tmp_path / "runs").rename(tmp_path / "scratch" / "other")
    check_complete(equihpc, moved)


def test_moved_data_are_the_same_data(store: Path, tmp_path: Path, equihpc: Command) -> None:
    """By the manifest, wherever it lies; another manifest is other data."""
    expected = json.loads((store / "by_path.json").read_text())
    (manifest,) = store.glob("runs/earlier/prepare/*/data/manifest.json")
    for name, text in (("here", manifest.read_text()), ("there/data", manifest.read_text()), ("other", manifest.read_text() + " ")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "manifest.json").write_text(text)
        (tmp_path / "by_path.yaml").write_text((store / "by_path.yaml").read_text() % json.dumps(str(tmp_path / name)))
        assert (ids(equihpc, "by_path.yaml") == expected) == (name != "other")


if __name__ == "__main__":
    print(record())
