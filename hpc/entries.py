"""Entries: modules with `main(config, run_dir, stop)` and, if they have one, a pydantic `Config`. Imported without torch."""

from __future__ import annotations

import importlib
import re
import sys
from functools import lru_cache
from types import ModuleType
from typing import Any

from pydantic import BaseModel

from hpc.errors import UserError
from hpc.messages import suggest

MODULE = re.compile(r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$")


@lru_cache
def load(entry: str) -> ModuleType:
    """The entry's module. Raises UserError when it does not exist, cannot be imported or has no `main`."""
    if not MODULE.match(entry):
        raise UserError(f"entry {entry!r} is not a module's name such as equissl.pretrain")
    had_torch = "torch" in sys.modules
    try:
        module = importlib.import_module(entry)
    except ModuleNotFoundError as error:
        if error.name and (entry == error.name or entry.startswith(error.name + ".")):
            raise UserError(f"unknown entry {entry!r}: no module {error.name!r}{_neighbours(entry)}") from None
        raise UserError(f"entry {entry!r} cannot be imported: {error}") from error
    except Exception as error:  # anything may happen in somebody's module; it is shown, not hidden
        raise UserError(f"entry {entry!r} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, "main", None)):
        raise UserError(f"entry {entry!r} has no function main(config, run_dir, stop){_neighbours(entry)}")
    if "torch" in sys.modules and not had_torch:
        raise UserError(f"entry {entry!r} imports torch at its top; import it inside main, so that planning stays quick")
    return module


def _neighbours(entry: str) -> str:
    """A hint to a module of the same package with a similar name."""
    package, _, name = entry.rpartition(".")
    try:
        folders = list(importlib.import_module(package).__path__) if package else []
    except (ImportError, AttributeError):
        return ""
    from pathlib import Path

    found = [path.stem for folder in folders for path in Path(folder).glob("*.py") if "\ndef main(" in path.read_text(encoding="utf-8")]
    return suggest(name, found) or (f"; {package} has {', '.join(sorted(found))}" if found else "")


def config_class(entry: str) -> type[BaseModel] | None:
    found = getattr(load(entry), "Config", None)
    return found if isinstance(found, type) and issubclass(found, BaseModel) else None


def dump(model: BaseModel) -> dict[str, Any]:
    """The resolved config as JSON-able data, under the names that people write."""
    result = model.model_dump(mode="json", by_alias=True)
    assert isinstance(result, dict)
    return result
