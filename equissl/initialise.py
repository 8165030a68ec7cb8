"""Initial weights: each parameter from a generator of its own, keyed by (seed, name).

A parameter is drawn in full on every rank, which keeps its slice: the values do not depend on the number of ranks, and a
parameter's do not change when another one is added. Parameters are born without values and filled with NaN first, so that one
that nobody initialises shows.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from timm.layers import LayerScale
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from equissl.batchnorm import Norm, batch_norms
from equissl.distributed import local

TOKENS = {"cls_token": 1e-6, "pos_embed": 0.02, "mask_token": 0.0, "prototypes": 0.02, "equi_prototypes": 0.02}  # standard deviations

# Which taps of a 3×3 kernel after nearest-neighbour doubling meet in those of a 4×4 transposed convolution with stride 2. Begun like
# this, the four phases of the output agree: no chequered noise, and half the error after the first 45 steps of a small run.
DOUBLING = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])


class UnitLinear(nn.Linear):
    """A linear layer that begins with the variance of its inputs: standard deviation 1/sqrt(fan in)."""


def materialise(module: nn.Module, device: torch.device) -> None:
    """Give memory to a module built on the meta device: every parameter and buffer is NaN until somebody sets it."""
    module.to_empty(device=device)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            local(tensor).fill_(float("nan"))


def initialise(module: nn.Module, seed: int) -> None:
    """Set every parameter (sharded or not) to its initial value, and the averages of batch norms to 0 and 1.

    Linear weights and position embeddings: normal with standard deviation 0.02, as in ViT and iBOT; `UnitLinear`: normal with
    1/sqrt(fan in); patch embedding: uniform within ± 1/sqrt(fan in); convolutions without bias, which are a ResNet's: normal with
    sqrt(2/fan out) (He et al. 2015); transposed convolutions: those that are nearest-neighbour doubling and a 3×3 convolution of He et
    al. 2015; norms: 1 and 0, the last one of a ResNet's block 0 and 0; biases and the mask token: 0; LayerScale: as configured.
    """
    for name, parameter in module.named_parameters():
        owner = module.get_submodule(name.rpartition(".")[0])
        place(_initial(owner, name, tuple(parameter.shape), seed), parameter)
    for norm in batch_norms(module):
        norm.reset()


def place(value: Tensor, parameter: Tensor) -> None:
    """Copy this rank's slice of `value`, which every rank holds in full, into `parameter`."""
    if isinstance(parameter, DTensor):
        value = value.to(parameter.device_mesh.device_type)
        value = local(distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None))
    with torch.no_grad():
        local(parameter).copy_(value)


def _initial(owner: nn.Module, name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    leaf = name.rpartition(".")[2]
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16])))

    def normal(std: float) -> Tensor:
        return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32)) * std

    if leaf in TOKENS:
        return normal(TOKENS[leaf])
    if leaf == "bias" and isinstance(owner, nn.Linear | nn.LayerNorm | Norm | nn.Conv2d | nn.ConvTranspose2d):
        return torch.zeros(shape)
    if leaf == "gamma" and isinstance(owner, LayerScale):
        return torch.full(shape, owner.init_values)
    if leaf == "weight":
        if isinstance(owner, nn.Linear):
            return normal(1 / math.sqrt(owner.in_features) if isinstance(owner, UnitLinear) else 0.02)
        if isinstance(owner, nn.LayerNorm):
            return torch.ones(shape)
        if isinstance(owner, Norm):
            return torch.full(shape, owner.initial_weight)
        if isinstance(owner, nn.Conv2d) and owner.bias is None:
            return normal(math.sqrt(2 / (shape[0] * math.prod(shape[2:]))))
        if isinstance(owner, nn.Conv2d):
            bound = 1 / math.sqrt(math.prod(shape[1:]))
            return torch.from_numpy(generator.uniform(-bound, bound, shape).astype(np.float32))
        if isinstance(owner, nn.ConvTranspose2d) and shape[2:] == (4, 4) and owner.stride == (2, 2):
            shape = (*shape[:2], 3, 3)
            return torch.einsum("yr,iors,xs->ioyx", DOUBLING, normal(math.sqrt(2 / (9 * shape[0]))), DOUBLING).contiguous()
    raise AssertionError(f"no rule for the initial value of {name} in a {type(owner).__name__}")
