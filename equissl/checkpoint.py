"""Checkpoints: `checkpoints/step_N/`, where N updates have been applied.

Written under a temporary name by torch's distributed checkpoint (one file per rank and its metadata), renamed, and complete
only when `checksums.json` follows, which lists every file. They can be loaded on any number of ranks. The metadata is a pickle:
what is not the user's own is not read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from equissl.distributed import World
from equissl.files import sync_folder, write_json

log = logging.getLogger(__name__)

MARKER = "checksums.json"
NAME = re.compile(r"step_(\d+)")
TEMPORARY = ".writing"


class Checkpoints:
    """The checkpoints of one run. All methods are collective: every rank calls them."""

    def __init__(self, folder: Path, keep: int, world: World) -> None:
        self.folder, self.keep, self.world = folder, keep, world

    def newest(self) -> int:
        """The step of the newest complete and undamaged checkpoint, 0 where there is none; damaged ones are logged.

        Raises ValueError for checkpoints that belong to another user.
        """
        answer: list[int | str] = [0]
        if self.world.rank == 0:
            try:
                answer = [self._newest()]
            except (ValueError, OSError) as error:
                answer = [str(error)]
        dist.broadcast_object_list(answer, src=0, group=self.world.cpu_group)
        if isinstance(answer[0], str):
            raise ValueError(answer[0])
        return answer[0]

    def load(self, step: int, state: dict[str, Tensor]) -> None:
        """Read the checkpoint of `step` into the tensors of `state`. Raises ValueError where it holds other tensors."""
        reader = dcp.FileSystemReader(self._path(step))
        try:
            saved = reader.read_metadata().state_dict_metadata.keys()
        except Exception as error:  # torch's pickle: what it raises depends on the version
            written_by = json.loads((self._path(step) / MARKER).read_text())["torch"]
            error.add_note(f"{self._path(step)} was written by torch {written_by}, this is {torch.__version__}")
            raise
        if saved != state.keys():
            different = sorted(saved ^ state.keys())
            raise ValueError(f"{self._path(step)} holds other tensors than this run has, for example {', '.join(different[:3])}")
        dcp.load(state, storage_reader=reader, process_group=self.world.cpu_group)

    def save(self, step: int, state: dict[str, Tensor]) -> None:
        """Write `state` as the checkpoint of `step`, then remove the oldest beyond `keep`."""
        path, temporary = self._path(step), self.folder / f"{TEMPORARY}_{step}"
        if self.world.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left_over in self.folder.glob(f"{TEMPORARY}_*"):
                shutil.rmtree(left_over)
            temporary.mkdir()
        dist.barrier(group=self.world.cpu_group)
        writer = dcp.FileSystemWriter(temporary, single_file_per_rank=True, sync_files=True)
        dcp.save(state, storage_writer=writer, process_group=self.world.cpu_group)
        mine = [*temporary.glob(f"__{self.world.rank}_*"), *(temporary.glob(".metadata") if self.world.rank == 0 else ())]
        by_rank: list[Any] = [None] * self.world.world_size
        dist.all_gather_object(by_rank, {file.name: _describe(file) for file in mine}, group=self.world.cpu_group)
        if self.world.rank == 0:
            files = {name: described for of_rank in by_rank for name, described in of_rank.items()}
            sync_folder(temporary)
            if path.exists():  # one that could not be used
                shutil.rmtree(path)
            temporary.rename(path)
            sync_folder(self.folder)
            write_json(path / MARKER, {"step": step, "world_size": self.world.world_size, "torch": torch.__version__, "files": files})
            self._prune(step)
        dist.barrier(group=self.world.cpu_group)

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step}"

    def _steps(self) -> list[int]:
        """Newest first."""
        found = (NAME.fullmatch(path.name) for path in self.folder.glob("step_*"))
        return sorted((int(match[1]) for match in found if match), reverse=True)

    def _newest(self) -> int:
        if not self.folder.is_dir():
            return 0
        _refuse_others(self.folder)
        for step in self._steps():
            damage = self._damage(step)
            if damage is None:
                return step
            log.warning("%s cannot be used: %s; trying the one before", self._path(step), damage)
        return 0

    def _damage(self, step: int) -> str | None:
        path = self._path(step)
        for each in (path, *path.iterdir()):
            _refuse_others(each)
        try:
            files: dict[str, Any] = json.loads((path / MARKER).read_text())["files"]
        except FileNotFoundError:
            return f"it has no {MARKER}, so it was not finished"
        except (ValueError, KeyError) as error:
            return f"{MARKER} cannot be read: {error!r}"
        for name, expected in files.items():
            if not (path / name).is_file():
                return f"{name} is missing"
            if (path / name).stat().st_size != expected["bytes"] or _describe(path / name) != expected:
                return f"{name} is not what {MARKER} says"
        return None

    def _prune(self, step: int) -> None:
        """Those after `step` were found damaged when the run began; they are left until they are written anew."""
        for old in [other for other in self._steps() if other <= step][self.keep :]:
            (self._path(old) / MARKER).unlink(missing_ok=True)  # half removed must not look complete
            shutil.rmtree(self._path(old))


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _refuse_others(path: Path) -> None:
    owner = path.stat().st_uid
    if owner != os.getuid():
        raise ValueError(
            f"{path} belongs to user {owner}, not to you ({os.getuid()}); checkpoints hold a pickle, so only your own are read"
        )
