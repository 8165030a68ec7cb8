"""What the guards cost: the heartbeat in every step, and the supervisor beside the ranks.

    python tests/benchmarks/guards.py [--seconds 20] [--ranks 4]

The figures are shares of a step of 100 ms. GPU time is not touched: `stop()` neither asks the device nor waits for another rank.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))
from hpc.rank import Stop  # noqa: E402

STEP_SECONDS = 0.1
ENTRY = """
import time
def main(config, run_dir, stop):
    end = time.monotonic() + config["seconds"]
    while time.monotonic() < end and not stop():
        time.sleep(0.1)
    return {}
"""
SUPERVISE = """
import sys, time
from pathlib import Path
from hpc.runs import RunFolder
from hpc.supervisor import Place, Signals, Supervisor
cpu, wall = time.process_time(), time.monotonic()
assert Supervisor(RunFolder(Path(sys.argv[1])), Place(), Signals())() == "complete"
print(time.process_time() - cpu, time.monotonic() - wall)
"""


def stop_seconds(calls: int) -> float:
    """Per call, with a heartbeat each second as in a run: the calls are spread over steps of 100 ms."""
    with tempfile.TemporaryDirectory() as folder:
        stop = Stop(Path(folder) / "heartbeat")
        began = time.perf_counter()
        for _ in range(calls):
            stop()
            stop._beaten -= STEP_SECONDS  # as if a step had passed
        return (time.perf_counter() - began) / calls


def supervisor_share(seconds: float, ranks: int) -> float:
    """CPU seconds of the supervisor per second of a run of sleeping ranks, the start and the end included."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "sleeper.py").write_text(ENTRY)
        run = folder / "runs" / "job" / "a" / "run"
        run.mkdir(parents=True)
        spec = {
            "id": "run",
            "hash": "0",
            "entry": "sleeper",
            "upstream": {},
            "layout": {"nodes": 1, "processes": ranks, "gpus": 0},
            "cluster": "local",
            "environment": {},
            "startup_seconds": 60,
            "hang_seconds": 60,
            "code": {"path": str(folder), "environment": ""},
            "ledger": str(folder / "ledger"),
            "config": {"seconds": seconds},
        }
        (run / "spec.json").write_text(json.dumps(spec))
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}
        done = subprocess.run(
            [sys.executable, "-c", SUPERVISE, str(run)], env=environment, cwd=folder, check=True, stdout=subprocess.PIPE, text=True
        )
        cpu, wall = map(float, done.stdout.split())
        return cpu / wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--ranks", type=int, default=4)
    arguments = parser.parse_args()
    per_step = stop_seconds(100_000)
    share = supervisor_share(arguments.seconds, arguments.ranks)
    print("| guard | cost | share of a 100 ms step |\n|---|---|---|")
    print(f"| stop() with its heartbeat | {per_step * 1e6:.2f} µs per step | {per_step / STEP_SECONDS:.5%} |")
    print(f"| supervisor of {arguments.ranks} ranks | {share * 1000:.2f} ms of one core per second | {share:.3%} of one core |")


if __name__ == "__main__":
    main()
