"""Processes and their devices: groups, sharding, and the one small agreement at each step boundary.

Ranks come through torchrun's variables; this file and `launch` are the only readers of the environment.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from equissl.compiled import Compiler
from equissl.config import PretrainConfig

log = logging.getLogger(__name__)

MESH = ("replicas", "ranks")  # the dimensions of a mesh, or the last one


@dataclass(frozen=True)
class World:
    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    mesh: DeviceMesh  # all ranks; a second dimension is over the ranks of a replica, and the first over the replicas
    cpu_group: dist.ProcessGroup  # gloo, for what must not wait for the device
    compute_dtype: torch.dtype = torch.float32  # of what is sharded, while it computes
    units: list[FSDPModule] = field(default_factory=list)  # what has been sharded
    compiler: Compiler = field(default_factory=Compiler)

    @property
    def group(self) -> dist.ProcessGroup:
        """All ranks, for tensors on the device."""
        assert dist.group.WORLD is not None
        return dist.group.WORLD

    @property
    def num_replicas(self) -> int:
        """How many ranks hold the same shard."""
        return self.mesh.size(0) if self.mesh.ndim == 2 else 1


def init(config: PretrainConfig | None = None) -> World:
    """Join the other ranks that RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT speak of; without them: one process.

    With a GPU for every rank of the node LOCAL_RANK chooses the rank's own and NCCL connects them; otherwise CPUs and gloo.
    `config` says how parameters are spread and in what precision they compute; without one: over all ranks, in the precision of `auto`.
    Raises ValueError where only a part of the variables is set, or the ranks cannot be spread as the config says.
    """
    assert not dist.is_initialized()
    rank, world_size = _number("RANK", 0), _number("WORLD_SIZE", 1)
    local_rank, local_size = _number("LOCAL_RANK", rank), _number("LOCAL_WORLD_SIZE", world_size)
    device = _device(local_rank, local_size)
    backend = "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo"
    bound = device if device.type == "cuda" else None
    if "RANK" in os.environ:
        missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise ValueError(f"RANK is set but {', '.join(missing)} not: start the processes with torchrun or equihpc")
        dist.init_process_group(backend, init_method="env://", device_id=bound)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, device_id=bound)
    cpu_group = dist.new_group(backend="gloo")
    assert isinstance(cpu_group, dist.ProcessGroup)
    places: list[Place] = [Place(0, 0, None)] * world_size
    dist.all_gather_object(places, Place(local_rank, local_size, _memory(device)), group=cpu_group)
    shape = mesh_shape(config, places)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=MESH[-len(shape) :])
    asked = config.precision if config else "auto"
    precision = ("bfloat16" if device.type == "cuda" else "float32") if asked == "auto" else asked
    return World(rank, world_size, local_rank, device, mesh, cpu_group, getattr(torch, precision))


class Place(NamedTuple):
    """Of a rank: its number on its node, how many there are, and its GPU's memory in bytes (None: a CPU)."""

    local_rank: int
    local_size: int
    memory_bytes: int | None


def mesh_shape(config: PretrainConfig | None, places: Sequence[Place]) -> tuple[int, ...]:
    """(ranks,), or (replicas, ranks of each); the same on all ranks, which are at `places`."""
    world_size = len(places)
    if config is None:
        return (world_size,)
    sizes = {place.local_size for place in places}
    goes_node_by_node = len(sizes) == 1 and all(rank % place.local_size == place.local_rank for rank, place in enumerate(places))
    if config.sharding == "hybrid" and not goes_node_by_node:
        raise ValueError(
            f"sharding hybrid: the nodes have {sorted(sizes)} ranks, or ranks do not go node by node: all nodes need the same number"
        )
    # nodes that cannot be told apart by the rank's number count as one: nothing is shared inside them alone
    local_size = places[0].local_size if goes_node_by_node else world_size
    memories = [place.memory_bytes for place in places if place.memory_bytes is not None]
    way, reason = config.choose_sharding(world_size, local_size, min(memories, default=None))
    log.info("sharding %s: %s", way, reason)
    return {"replicate": (world_size, 1), "hybrid": (world_size // local_size, local_size)}.get(way, (world_size,))


def _memory(device: torch.device) -> int | None:
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def close() -> None:
    """Leave the groups; `init` may be called again."""
    dist.destroy_process_group()


def _number(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


def _device(local_rank: int, local_size: int) -> torch.device:
    found = torch.cuda.device_count()
    if found >= local_size:
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    log.warning("%d GPUs for %d processes on this node: training on the CPU", found, local_size)
    return torch.device("cpu")


# --- sharding ----------------------------------------------------------------------------------------------------------


def shard(units: Iterable[nn.Module], world: World) -> None:
    """Spread the parameters of each unit over the world's mesh (FSDP2), children before their parents.

    One mechanism for all ways: a replica of a single rank is gathered by copying, and its gradients are all-reduced only. Parameters
    and gradients are float32, and reduced so; the units compute in the world's precision.
    """
    is_mixed = world.compute_dtype != torch.float32
    policy = MixedPrecisionPolicy(param_dtype=world.compute_dtype, reduce_dtype=torch.float32) if is_mixed else MixedPrecisionPolicy()
    for unit in units:
        # True for roots too: a root that stays unsharded after a forward without backward (the teacher's) would go on
        # computing with its old weights when the shards are changed under it
        sharded: FSDPModule = fully_shard(unit, mesh=world.mesh, reshard_after_forward=True, mp_policy=policy)
        if world.device.type != "cuda":
            # gloo's reduce-scatter in torch 2.8 to 2.9 takes AVG and returns the sum (pytorch#162338)
            sharded.set_force_sum_reduction_for_comms(True)
        world.units.append(sharded)


def reduce_over_replicas(world: World, now: bool) -> None:
    """Whether the next backward pass sums gradients over the replicas, or leaves that to a later one. Shards are reduced by each."""
    for unit in world.units:
        unit.set_requires_all_reduce(now, recurse=False)


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """This rank's shard, sharing memory with `tensor`; a plain tensor is its own. Without a gradient graph.

    Not to be kept from before the first forward: FSDP then moves shards that cannot be divided evenly to padded memory.
    """
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()  # detaching a DTensor is slow


def full(tensor: Tensor) -> Tensor:
    """The whole tensor on every rank; collective for a sharded one."""
    detached = tensor.detach()
    return detached.full_tensor() if isinstance(detached, DTensor) else detached


def send(values: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor to the device without waiting for it."""
    if device.type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


# --- losses that couple the ranks ------------------------------------------------------------------------------------------


def gather(mine: Tensor, world: World) -> Tensor:
    """`(b, …)` on each rank -> `(ranks · b, …)`, the rows of the joined batch in its order, on all of them; differentiable.

    The gradient of `mine` is the sum over the ranks of their gradients of its copies. With the mean over ranks that the loop takes of the
    gradients, parameters get the gradient of the mean over ranks of the losses, whether these are the same on all ranks or not: nothing
    is to be multiplied by the number of ranks.
    """
    rows: Tensor = _Gather.apply(mine, world.group)
    return rows


def total(mine: Tensor, world: World) -> Tensor:
    """The sum over the ranks, on all of them; differentiable, with the gradient as in `gather`."""
    summed: Tensor = _Total.apply(mine, world.group)
    return summed


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mine: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        rows = mine.new_empty(group.size() * len(mine), *mine.shape[1:])
        dist.all_gather_into_tensor(rows, mine.contiguous(), group=group)
        return rows

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (of_rows,) = gradients
        mine = of_rows.new_empty(len(of_rows) // ctx.group.size(), *of_rows.shape[1:])
        dist.reduce_scatter_tensor(mine, of_rows.contiguous(), group=ctx.group)
        return mine, None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mine: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _summed(mine, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _summed(gradients[0], ctx.group), None


def _summed(mine: Tensor, group: dist.ProcessGroup) -> Tensor:
    summed = mine.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(summed, group=group)
    return summed


# --- agreement ---------------------------------------------------------------------------------------------------------


class Agreement:
    """Whether any rank has raised its flag, one step late: nobody waits for the slowest, and all stop at the same step."""

    def __init__(self, world: World) -> None:
        self._group = world.cpu_group
        self._pending: tuple[dist.Work, Tensor] | None = None

    def exchange(self, flag: bool) -> bool:
        """Send this step's flag; returns whether any rank's flag of the call before was raised (False at the first call)."""
        answer = self.finish()
        raised = torch.tensor([int(flag)], dtype=torch.int32)
        work = dist.all_reduce(raised, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        self._pending = work, raised
        return answer

    def finish(self) -> bool:
        """Wait for the last exchange and return its answer."""
        if self._pending is None:
            return False
        work, raised = self._pending
        work.wait()
        self._pending = None
        return bool(raised.item())


def any_of(flag: bool, world: World, beat: Callable[[], object]) -> bool:
    """Whether any rank's flag is raised. Calls `beat` about every second while ranks that are not there yet are waited for."""
    raised = torch.tensor([int(flag)], dtype=torch.int32)
    work = dist.all_reduce(raised, op=dist.ReduceOp.MAX, group=world.cpu_group, async_op=True)
    assert work is not None
    while not work.is_completed():
        beat()
        time.sleep(0.05 if world.world_size == 1 else 0.5)
    work.wait()
    return bool(raised.item())


def barrier(world: World) -> None:
    dist.barrier(group=world.cpu_group)
