"""The code that queued work will run: a copy made at submission, found through PYTHONPATH (DESIGN, decision 14).

Beside the copy stand what differs from the commit (`HASH.diff`) and the installed packages (`environment-HASH.txt`).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hpc.files import write_atomic


def take(packages: Iterable[str], folder: Path) -> dict[str, Any]:
    """Copy the packages' files to `folder/HASH` unless they are there. Returns path, hash, commit, dirty, environment."""
    sources: dict[str, Path] = {}
    for package in sorted(set(packages)):
        spec = importlib.util.find_spec(package)
        assert spec is not None, package  # the entries were imported while planning
        for root in spec.submodule_search_locations or []:
            for path in sorted(Path(root).rglob("*")):
                if path.is_file() and "__pycache__" not in path.parts:
                    sources[f"{package}/{path.relative_to(root)}"] = path
        if not spec.submodule_search_locations and spec.origin:
            sources[Path(spec.origin).name] = Path(spec.origin)
    digest = hashlib.sha256()
    for name, path in sorted(sources.items()):
        digest.update(f"{name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    code_hash = digest.hexdigest()[:12]
    target = folder / code_hash
    if not target.is_dir():
        temporary = folder / f".{code_hash}.{uuid.uuid4().hex[:8]}"
        for name, path in sources.items():
            copy = temporary / name
            copy.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            shutil.copyfile(path, copy)
        try:
            os.rename(temporary, target)
        except OSError:  # somebody else was quicker; theirs is the same
            shutil.rmtree(temporary, ignore_errors=True)
    commit, diff = _commit(Path(__file__).parent)
    environment = environment_hash()
    for name, text in ((f"{code_hash}.diff", diff), (f"environment-{environment}.txt", "".join(f"{line}\n" for line in _installed()))):
        if text and not (folder / name).exists():
            write_atomic(folder / name, text, durable=False)
    return {"path": str(target), "hash": code_hash, "commit": commit, "dirty": bool(diff), "environment": environment}


def packages_of(entries: Iterable[str]) -> set[str]:
    """What to copy for these entries: `hpc`, their packages, and what else they imported from the folder people stand in."""
    here = Path.cwd().resolve()
    beside = set()
    for name, module in list(sys.modules.items()):
        top, file = name.partition(".")[0], getattr(module, "__file__", None)
        if file and Path(file).resolve() in (here / f"{top}.py", here / top / "__init__.py"):
            beside.add(top)
    return {"hpc", *(entry.partition(".")[0] for entry in entries), *(beside - {"__main__"})}


def _commit(folder: Path) -> tuple[str | None, str]:
    """(commit, what differs from it as a patch, new files by name); (None, "") where this is no checkout."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True)
        return done.stdout

    try:
        new = git("ls-files", "--others", "--exclude-standard", ":/").splitlines()
        return git("rev-parse", "HEAD").strip(), git("diff", "HEAD") + "".join(f"# new file, not in this patch: {name}\n" for name in new)
    except (OSError, subprocess.SubprocessError):
        return None, ""


def _installed() -> list[str]:
    return sorted(f"{found.name}=={found.version}" for found in importlib.metadata.distributions())


def environment_hash() -> str:
    """Of the names and versions of everything installed: another one on resume is said."""
    return hashlib.sha256("\n".join(_installed()).encode()).hexdigest()[:12]
