"""Parts of the networks by torch.compile, each once for each shape; where it cannot be done, as they are, and said once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from equissl.config import PretrainConfig

log = logging.getLogger(__name__)


def wants_compilation(config: PretrainConfig, device: torch.device) -> bool:
    return device.type == "cuda" if config.compile is None else config.compile


class Compiler:
    """Of one run on one rank."""

    def __init__(self) -> None:
        self.has_failed = False  # at a module; since then all run as they are

    def in_place(self, modules: Iterable[nn.Module]) -> None:
        """Compile `forward` of these modules at its first call, for the shapes that it then sees; before they are sharded.

        Names of parameters stay, and FSDP's hooks, which come before and after `forward`, are not traced.
        """
        for module in modules:
            module.forward = self._with_a_way_back(module.forward)

    def _with_a_way_back(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        compiled = torch.compile(forward, dynamic=False, fullgraph=True)

        def call(*args: Any) -> Any:
            if not self.has_failed:
                try:
                    return compiled(*args)
                except torch.OutOfMemoryError:  # it would be no better uncompiled
                    raise
                except Exception as error:  # of the compiler, of what it calls and of its caches: no list of them would be complete
                    self.has_failed = True
                    reason = str(error).strip().partition("\n")[0]
                    log.warning("the networks cannot be compiled and run slower: %s: %s", type(error).__name__, reason)
            return forward(*args)

        return call
