"""Whether torch works here: its build against the driver, a bfloat16 product, sums over the ranks and their bandwidth.

    python -m equissl.selftest [--gpu]
    torchrun --nproc-per-node 4 -m equissl.selftest --gpu

With --gpu every rank needs one. Every rank prints one line of JSON. Exit codes: 0 all is right, 1 something is not
(`problems` says what).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import Any

import torch
import torch.distributed as dist

from equissl import distributed
from equissl.distributed import World

MAX_PRODUCT_ERROR = 0.01  # relative; bfloat16 keeps 8 bits, and the errors of a long sum cancel
BYTES = {"cuda": 2**28, "cpu": 2**24}
REPEATS = {"cuda": 20, "cpu": 5}


def run(needs_gpu: bool) -> dict[str, Any]:
    """This rank's findings. Collective."""
    world = distributed.init()
    problems: list[str] = []
    built_for = torch.version.cuda or getattr(torch.version, "hip", None)
    on_gpu = world.device.type == "cuda"
    if needs_gpu and not on_gpu:
        why = f"built for {built_for}: the driver is too old, or too few GPUs are assigned" if built_for else "built for CPUs only"
        problems.append(f"torch {torch.__version__} uses no GPU; it is {why}")
    error = product_error(world.device)
    if not error <= MAX_PRODUCT_ERROR:
        problems.append(f"a bfloat16 product differs from float32 by {error:.2g}, more than {MAX_PRODUCT_ERROR}")
    bandwidth: dict[str, float | None] = {}
    for name, size in (("node", int(os.environ.get("LOCAL_WORLD_SIZE", world.world_size))), ("world", world.world_size)):
        bandwidth[name] = all_reduce_gb_s(world, size, problems)
    distributed.close()
    return {
        "rank": world.rank,
        "world_size": world.world_size,
        "device": torch.cuda.get_device_name(world.device) if on_gpu else "cpu",
        "num_gpus": torch.cuda.device_count(),
        "torch": torch.__version__,
        "built_for": built_for,
        "backend": "nccl" if on_gpu else "gloo",
        "product_error": error,
        "all_reduce_gb_s": bandwidth,
        "problems": problems,
    }


def product_error(device: torch.device) -> float:
    """Relative difference of a bfloat16 matrix product from the float32 one."""
    size = 2048 if device.type == "cuda" else 256
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, size, generator=generator).bfloat16().to(device) for _ in range(2))
    exact = left.float() @ right.float()
    return float((torch.linalg.norm((left @ right).float() - exact) / torch.linalg.norm(exact)).item())


def all_reduce_gb_s(world: World, group_size: int, problems: list[str]) -> float | None:
    """Bus bandwidth of a sum over groups of consecutive ranks, as nccl-tests define it: 2 (n - 1) / n · bytes / s. None for n = 1."""
    if group_size == 1 or world.world_size % group_size:
        return None
    group, _ = dist.new_subgroups(group_size=group_size)
    first = world.rank // group_size * group_size
    small = torch.full((1024,), float(world.rank + 1), device=world.device)
    dist.all_reduce(small, group=group)
    expected = float(sum(range(first + 1, first + group_size + 1)))
    if not bool((small == expected).all().item()):
        problems.append(f"the sum over ranks {first} to {first + group_size - 1} is {small[0].item():g} instead of {expected:g}")
    kind = world.device.type
    large = torch.zeros(BYTES[kind] // 4, device=world.device)
    dist.all_reduce(large, group=group)  # the first one sets up the connections
    _wait(world)
    began = time.perf_counter()
    for _ in range(REPEATS[kind]):
        dist.all_reduce(large, group=group)
    _wait(world)
    seconds = (time.perf_counter() - began) / REPEATS[kind]
    return 2 * (group_size - 1) / group_size * BYTES[kind] / seconds / 1e9


def _wait(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    distributed.barrier(world)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m equissl.selftest")
    parser.add_argument("--gpu", action="store_true", help="every rank needs a GPU")
    found = run(parser.parse_args().gpu)
    print(json.dumps(found), flush=True)
    sys.stderr.flush()
    os._exit(1 if found["problems"] else 0)  # torch 2.15 with gloo aborts now and then while the interpreter ends
