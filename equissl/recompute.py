"""Activation checkpointing: some blocks keep their input only, and compute the rest again in the backward pass (Chen et al. 2016)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

_under_way = False


def is_under_way() -> bool:
    """Whether what runs now has run before: what a layer notes of a batch it has noted then."""
    return _under_way


@contextmanager
def _again() -> Iterator[None]:
    global _under_way
    _under_way = True
    try:
        yield
    finally:
        _under_way = False


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _again()


def recompute(blocks: Iterable[nn.Module], which: str, is_compiled: bool) -> None:
    """Change these modules in place, before they are sharded and after they are compiled. `which`: as `activation_checkpointing`.

    Names of parameters stay. FSDP's hooks come before and after `forward`, so that a block is gathered for its backward pass once.
    The computation ends early, by an exception, where the last tensor asked for is there: in a compiled block it would pass through
    the compiler's code, and save nothing.
    """
    for number, block in enumerate(blocks):
        if which == "full" or (which == "selective" and number % 2):
            block.forward = partial(_recomputed, block.forward, not is_compiled)


def _recomputed(forward: Callable[..., Any], ends_early: bool, *args: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args)
    with set_checkpoint_early_stop(ends_early):
        # nothing is drawn in a block
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, context_fn=_contexts)
