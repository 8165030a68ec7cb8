"""The entry from the command line, as torchrun starts it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny

from equissl.launch import BAD_INPUT, PROFILED, STOPPED

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1")  # what the command torchrun is


def start(config: Path, run_dir: Path, *options: str, launcher: tuple[str, ...] = (), **environment: str) -> subprocess.Popen[str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "equissl.pretrain", str(config), "--run-dir", str(run_dir), *options],
        env={**clean, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def end(process: subprocess.Popen[str], timeout: float = 90) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, output


def write(path: Path, photographs: Path, **changes: object) -> Path:
    path.write_text(tiny.config(str(photographs), num_steps=100, **changes).model_dump_json(by_alias=True))
    return path


def test_two_processes_stop_at_a_signal_to_one_and_one_goes_on(photographs: Path, tmp_path: Path) -> None:
    config, run_dir = write(tmp_path / "config.json", photographs), tmp_path / "run"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [start(config, run_dir, RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(2)]
    deadline = time.monotonic() + 60
    while not (run_dir / "progress.json").exists() and time.monotonic() < deadline and ranks[0].poll() is None:
        time.sleep(0.05)
    ranks[1].send_signal(signal.SIGTERM)
    ends = [end(rank) for rank in ranks]
    assert [code for code, _ in ends] == [STOPPED, STOPPED], ends
    assert "stopped as asked by signal 15" in ends[1][1]
    assert not (run_dir / "COMPLETE").exists()
    (checkpoint,) = (run_dir / "checkpoints").iterdir()
    step = int(checkpoint.name.removeprefix("step_"))
    assert 0 < step < 100

    write(config, photographs, seed=1)
    code, output = end(start(config, run_dir))
    assert code == BAD_INPUT
    assert "holds a run with other values of seed: give another --run-dir" in output

    write(config, photographs, log_every=50)  # operational: may change
    code, output = end(start(config, run_dir, "--profile", launcher=TORCHRUN))
    assert code == 0, output
    first, last = step + PROFILED[0], step + PROFILED[1]
    assert [path.name for path in (run_dir / "profile").iterdir()] == [f"steps_{first}_to_{last}.pt.trace.json.gz"]
    assert json.loads((run_dir / "config.json").read_text())["profile_steps"] is None, "asked for once, not kept"
    result = json.loads((run_dir / "result.json").read_text())
    assert result["num_steps"] == 100
    assert (run_dir / "COMPLETE").exists()
    steps = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert steps == [*range(1, step + 1), *(each for each in (50, 100) if each > step)]
    assert end(start(config, run_dir)) == (0, f"{run_dir} is complete\n")
    write(config, photographs, log_every=10)
    assert end(start(config, run_dir)) == (0, f"{run_dir} is complete\n")
    write(config, photographs, seed=1)
    code, output = end(start(config, run_dir))
    assert (code, output) == (BAD_INPUT, f"error: {run_dir} is complete, with other values of seed: give another --run-dir\n")


def test_a_complete_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    """Of one that an earlier version wrote nothing is known: it is complete."""
    (tmp_path / "config.json").write_text(tiny.config().model_dump_json(by_alias=True))
    (tmp_path / "COMPLETE").write_text(json.dumps({"time": 1.0, "config": {"task": "knn"}}))
    code, output = end(start(tmp_path / "config.json", tmp_path))
    assert (code, output) == (BAD_INPUT, f"error: {tmp_path} holds a complete run of something else: give another --run-dir\n")
    for marker in ("", '{"time": 1.0}'):
        (tmp_path / "COMPLETE").write_text(marker)
        assert end(start(tmp_path / "config.json", tmp_path)) == (0, f"{tmp_path} is complete\n")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ('{"data": "photographs", "batch": 8, "num_steps": 1, "bach": 3}', "error: bach: Extra inputs are not permitted"),
        ('{"data": "/nowhere", "batch": 8, "num_steps": 1, "num_workers": 0}', "error: data '/nowhere': there is no such folder"),
    ],
)
def test_bad_input_ends_with_one_message(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    code, output = end(start(tmp_path / "config.json", tmp_path / "run"))
    assert code == BAD_INPUT
    assert said in output
    assert "Traceback" not in output
