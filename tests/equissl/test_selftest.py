"""The check of torch that `equihpc doctor` runs on the nodes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest
import torch

from equissl import selftest


def start(*arguments: str, **variables: str) -> subprocess.Popen[str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "-m", "equissl.selftest", *arguments]
    return subprocess.Popen(command, env={**clean, "OMP_NUM_THREADS": "1", **variables}, stdout=subprocess.PIPE, text=True)


def last_line(process: subprocess.Popen[str]) -> str:
    """Of what it prints: gloo of torch 2.9 has lines of its own before."""
    return process.communicate(timeout=90)[0].splitlines()[-1]


def test_ranks_of_two_nodes_sum_within_and_across_them() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": ""}
    ranks = [start(RANK=str(rank), LOCAL_RANK=str(rank % 2), **shared) for rank in range(4)]
    try:
        found = [json.loads(last_line(rank)) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * 4, found
    assert [each["rank"] for each in found] == [0, 1, 2, 3]
    for each in found:
        assert each["torch"] == torch.__version__
        assert 0 < each["product_error"] < selftest.MAX_PRODUCT_ERROR
        assert each["all_reduce_gb_s"]["node"] > 0
        assert each["all_reduce_gb_s"]["world"] > 0


def test_a_missing_gpu_is_a_problem_where_one_is_needed() -> None:
    process = start("--gpu", CUDA_VISIBLE_DEVICES="")
    (problem,) = json.loads(last_line(process))["problems"]
    assert "uses no GPU" in problem
    assert process.returncode == 1


def test_a_wrong_sum_and_a_wrong_product_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    world = selftest.World(0, 2, 0, torch.device("cpu"), None, None)  # type: ignore[arg-type]
    monkeypatch.setattr(selftest.dist, "new_subgroups", lambda group_size: (None, []))
    monkeypatch.setattr(selftest.dist, "all_reduce", lambda tensor, group: None)  # nobody sums
    monkeypatch.setattr(selftest.distributed, "barrier", lambda world: None)
    problems: list[str] = []
    selftest.all_reduce_gb_s(world, 2, problems)
    assert problems == ["the sum over ranks 0 to 1 is 1 instead of 3"]
    product = torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor, "__matmul__", lambda left, right: product(left, right) * (1.05 if left.dtype == torch.bfloat16 else 1)
    )
    assert selftest.product_error(torch.device("cpu")) > selftest.MAX_PRODUCT_ERROR
