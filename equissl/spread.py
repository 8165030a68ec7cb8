"""How the parameters are spread over the ranks: what `auto` chooses, and what each way costs in memory and traffic. Imports no torch.

none: one process. replicate: whole on every rank, gradients are all-reduced. shard: over all ranks (FSDP). hybrid: shards inside a
node, replicas between nodes (HSDP). What is learnt does not depend on the way.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

Way = Literal["none", "replicate", "shard", "hybrid"]

SMALL = 0.10  # of a GPU's memory: a training state that takes no more is not worth gathering
USABLE = 0.90  # of a GPU's memory: the rest is the libraries', and lost between blocks
MASTER = 4  # bytes: parameters, gradients and moments are float32 whatever the precision of the computation
# Seconds per step of a ring and per level of a tree, inside a node and across: NCCL's own model (src/graph/tuning.cc, LL128)
RING_HOP, TREE_HOP = (1.9e-6, 4.0e-6), (1.2e-6, 8.5e-6)


class Model(NamedTuple):
    """What decides the costs. Counts are of parameters; a unit is what is gathered, computed and freed as one."""

    trained: float  # student and decoders
    averaged: float  # teacher
    largest_unit: float
    trained_units: int
    averaged_units: int
    compute_bytes: int  # of one parameter or activation in the computation
    activation_bytes: float  # of one rank
    passes: int  # micro-batches of a step
    moments: int = 2  # of the optimizer, for each parameter


class Choice(NamedTuple):
    way: Way
    reason: str


class Traffic(NamedTuple):
    """Of one step: what each rank receives from its node and from others, and how long that takes where nothing hides it."""

    inside_bytes: float
    across_bytes: float
    seconds: float | None  # None where a bandwidth is not known


def choose(asked: Literal["auto"] | Way, model: Model, world_size: int, ranks_per_node: int, memory_bytes: float | None) -> Choice:
    """`asked`, or for `auto` the way that fits model and topology. `memory_bytes`: of one GPU; None on CPUs.

    Raises ValueError where the ranks cannot be spread as asked.
    """
    nodes, rest = divmod(world_size, ranks_per_node)
    if world_size == 1 or asked == "none":
        return Choice("none", "one process")
    if asked == "hybrid" and rest:
        raise ValueError(f"sharding hybrid needs equally many ranks on all nodes: {world_size} is not a multiple of {ranks_per_node}")
    if asked == "hybrid" and nodes == 1:
        return Choice("shard", "hybrid on one node")
    if asked != "auto":
        return Choice(asked, "as asked")
    if memory_bytes is None:
        return Choice("shard", "on CPUs, whose memory is not known")
    whole, inside = (sum(memory(way, model, world_size, ranks_per_node).values()) for way in ("replicate", "hybrid"))
    state = f"a copy of the training state is {(whole - model.activation_bytes) / memory_bytes:.0%} of a GPU's memory"
    if whole - model.activation_bytes <= SMALL * memory_bytes and whole <= USABLE * memory_bytes:
        return Choice("replicate", state)
    if nodes == 1 or rest:
        return Choice("shard", f"{state}, on {'one node' if nodes == 1 else 'nodes of different size'}")
    if inside <= USABLE * memory_bytes:
        return Choice("hybrid", f"{state}, and shards inside a node fit")
    return Choice("shard", f"{state}, and shards inside a node would take {inside / memory_bytes:.0%}")


def memory(way: Way, model: Model, world_size: int, ranks_per_node: int) -> dict[str, float]:
    """Bytes of one rank at the end of a forward pass, by what they are for."""
    shards = {"shard": world_size, "hybrid": ranks_per_node}.get(way, 1)
    return {
        "parameters": MASTER * (model.trained + model.averaged) / shards,
        "gradients": MASTER * model.trained / shards,
        "optimizer": model.moments * MASTER * model.trained / shards,
        # a unit and the one fetched ahead, as computed with; the unit's gradients so, and as they are reduced
        "gathered": model.largest_unit * (3 * model.compute_bytes + MASTER),
        "activations": model.activation_bytes,
    }


def traffic(way: Way, model: Model, nodes: int, ranks_per_node: int, node_gb_s: float | None, network_gb_s: float | None) -> Traffic:
    """Of a step. Bandwidths are those of one GPU in each direction. A gathered unit is freed, and gathered again for the backward pass."""
    reduced = MASTER * model.trained
    moved = model.passes * (model.compute_bytes * (2 * model.trained + model.averaged) + reduced)
    calls = model.passes * (3 * model.trained_units + model.averaged_units)
    parts = {
        "none": [],
        "replicate": [_all_reduce(reduced, model.trained_units, nodes, ranks_per_node)],
        "shard": [_ring(moved, calls, nodes, ranks_per_node)],
        "hybrid": [
            _ring(moved, calls, 1, ranks_per_node),
            _all_reduce(reduced / ranks_per_node, model.trained_units, nodes, 1),
        ],
    }[way]
    inside, across = (sum(part[i] for part in parts) for i in range(2))
    if (inside and node_gb_s is None) or (across and network_gb_s is None):
        return Traffic(inside, across, None)
    speeds = ((node_gb_s or math.inf) * 1e9, (network_gb_s or math.inf) * 1e9)  # the links of a ring work at the same time
    return Traffic(inside, across, sum(max(part[0] / speeds[0], part[1] / speeds[1]) + part[2] for part in parts))


_Part = tuple[float, float, float]  # bytes inside, bytes across, seconds until the first byte has gone all the way


def _ring(num_bytes: float, calls: int, nodes: int, per_node: int) -> _Part:
    """All-gathers or reduce-scatters of together `num_bytes`: every rank receives all but its own from its neighbour; on its way
    round the data enters each node once, through all its adapters."""
    ranks = nodes * per_node
    inside = num_bytes * (1 - 1 / ranks) if per_node > 1 else 0.0
    hops = (ranks - nodes) * RING_HOP[0] + (nodes - 1) * RING_HOP[1]
    return inside, num_bytes * (1 - 1 / nodes) / per_node, calls * hops


def _all_reduce(num_bytes: float, calls: int, nodes: int, per_node: int) -> _Part:
    """As a reduce-scatter and an all-gather, but up and down a tree."""
    inside, across, _ = _ring(2 * num_bytes, 0, nodes, per_node)
    return inside, across, calls * 2 * ((per_node - 1) * TREE_HOP[0] + math.log2(nodes) * TREE_HOP[1])
