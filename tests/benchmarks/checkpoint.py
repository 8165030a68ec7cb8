"""What checkpoints cost: how long the loop waits for one, written before or behind it; how soon a run goes on; bytes on the disk.

    python tests/benchmarks/checkpoint.py [--ranks 2] [--rounds 5] [--folder DIR] [--tiny]

The state is that of iBOT with ViT-S/16 and the auxiliary, sharded over gloo ranks of one thread each, on the file system of DIR. The
step is a matrix product of about 50 ms. Ways of saving take turns, round after round; medians, and the longest.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

STEP_SECONDS = 0.05
STEPS_AFTER = 20  # with nothing being written


def config(tiny: bool) -> dict[str, Any]:
    small = {
        "backbone": {"name": "vit_tiny_patch16_224", "depth": 1},
        "image_size": 32,
        "method": {"name": "ibot", "representation": 64, "head_hidden": 32, "prototypes": 64, "views": {"num_local": 1, "local_size": 16}},
        "auxiliary": {"name": "reconstruction", "d": 16, "decoder_widths": [16, 8, 8, 8]},
    }
    whole = {
        "backbone": "vit_small_patch16_224",
        "method": {"name": "ibot", "views": {"num_local": 2}},
        "auxiliary": "reconstruction",
    }
    shared = {"data": "photographs", "transformation": "se2", "batch": 8, "group_size": 2, "num_steps": 100, "num_workers": 0}
    return {**shared, **(small if tiny else whole)}


def rank_saves(arguments: argparse.Namespace) -> dict[str, Any]:
    """On each rank: both ways of saving in turn."""
    import torch

    from equissl import distributed, methods, optim
    from equissl.auxiliary import Auxiliary
    from equissl.checkpoint import Checkpoints
    from equissl.config import PretrainConfig
    from equissl.methods import Timeline

    torch.set_num_threads(1)
    settings = PretrainConfig.model_validate(config(arguments.tiny))
    world = distributed.init(settings)
    method, auxiliary = methods.get(settings, world, Timeline(100, 10)), Auxiliary(settings, world)
    method.initialise()
    auxiliary.initialise()
    optimizer = optim.get(method.parameters_by_name() | auxiliary.parameters_by_name(), settings.method.optimizer, world)
    state = method.state() | auxiliary.state() | optimizer.state()
    checkpoints = Checkpoints(arguments.folder / "checkpoints", 2, world)
    matrix = torch.rand(256, 256)

    def work(times: int) -> float:
        began = time.perf_counter()
        for _ in range(times):
            matrix @ matrix
        return time.perf_counter() - began

    work(10)
    times = max(1, round(STEP_SECONDS * 100 / work(100)))
    found: dict[str, list[float]] = {name: [] for name in ("before", "behind", "on disk", "step while writing", "step")}
    for step in range(1, 2 * arguments.rounds + 3):
        behind, is_counted = step % 2 == 0, step > 2  # the first of each way makes its memory and its files
        distributed.barrier(world)
        began = time.perf_counter()
        checkpoints.save(step, state, behind=behind)
        waited = time.perf_counter() - began
        steps = []
        while checkpoints._under_way is not None and not checkpoints._under_way.done():
            steps.append(work(times))
        on_disk = time.perf_counter() - began
        checkpoints.wait()
        if is_counted:
            found["behind" if behind else "before"].append(waited)
            if behind:
                found["on disk"].append(on_disk)
                found["step while writing"] += steps
            found["step"] += [work(times) for _ in range(STEPS_AFTER)]
    ideal = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    files = list((arguments.folder / "checkpoints" / f"step_{step}").iterdir())
    distributed.barrier(world)
    checkpoints.close()
    distributed.close()
    return {"seconds": found, "ideal": ideal, "bytes": sum(path.stat().st_size for path in files), "files": len(files)}


def rank_trains(arguments: argparse.Namespace) -> dict[str, Any]:
    """On each rank: seconds from the start of the process to the end of its first step; it is then stopped, with the state saved."""
    import torch

    from equissl import pretrain

    torch.set_num_threads(1)
    ends: list[float] = []

    def stop() -> bool:
        ends.append(time.time() - float(os.environ["STARTED"]))
        return True

    assert pretrain.main(config(arguments.tiny), arguments.folder, stop) is None
    return {"first": ends[0], "step": ends[1] - ends[0]}


def run(mode: str, folder: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What each rank, a process of its own, printed last."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, "--mode", mode, "--folder", str(folder), "--rounds", str(arguments.rounds)]
    processes = []
    for rank in range(arguments.ranks):
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": arguments.ranks, "LOCAL_WORLD_SIZE": arguments.ranks}
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "STARTED": time.time(), "OMP_NUM_THREADS": 1}
        environment = {**os.environ, **{name: str(value) for name, value in (ranks | meeting).items()}}
        processes.append(
            subprocess.Popen([*command, *(["--tiny"] if arguments.tiny else [])], env=environment, stdout=subprocess.PIPE, text=True)
        )
    outputs = [process.communicate()[0] for process in processes]
    assert not any(process.returncode for process in processes), outputs
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write; default: the system's temporary folder")
    parser.add_argument("--tiny", action="store_true", help="only to see that it runs")
    parser.add_argument("--mode", choices=["saves", "trains"], help=argparse.SUPPRESS)  # of a rank
    arguments = parser.parse_args()
    if arguments.mode:
        found = {"saves": rank_saves, "trains": rank_trains}[arguments.mode](arguments)
        print(json.dumps(found), flush=True)
        os._exit(0)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        saves = run("saves", folder, arguments)
        (folder / "run").mkdir()
        fresh, resumed = (max(run("trains", folder / "run", arguments), key=lambda rank: rank["first"]) for _ in range(2))
    longest = {kind: [max(values) for values in zip(*(s["seconds"][kind] for s in saves), strict=False)] for kind in saves[0]["seconds"]}
    middle = {kind: statistics.median(values) if values else float("nan") for kind, values in longest.items()}
    print("| save | the loop waits, s (longest) | until it is complete, s | step while it is written | step otherwise |")
    print("|---|---|---|---|---|")
    before, step = f"{middle['before']:.3f} ({max(longest['before']):.3f})", f"{middle['step'] * 1e3:.1f} ms"
    print(f"| before the loop goes on | {before} | {middle['before']:.3f} | – | {step} |")
    behind = f"{middle['behind']:.3f} ({max(longest['behind']):.3f})"
    print(f"| behind the loop | {behind} | {middle['on disk']:.3f} | {middle['step while writing'] * 1e3:.1f} ms | {step} |")
    print(f"| ratio | {middle['before'] / middle['behind']:.1f}× | | | |")
    print("\n| on the disk | bytes | of the ideal |\n|---|---|---|")
    print(f"| {saves[0]['files']} files | {saves[0]['bytes']:,} | {saves[0]['bytes'] / saves[0]['ideal']:.4f}× |")
    print(f"| the tensors alone | {saves[0]['ideal']:,} | 1 |")
    print("\n| from the start of the processes to the end of the first step | s | of that, s per step |\n|---|---|---|")
    for what, found in (("fresh: weights are drawn", fresh), ("resumed: a checkpoint is verified and read", resumed)):
        print(f"| {what} | {found['first']:.2f} | {found['step']:.2f} |")


if __name__ == "__main__":
    main()
