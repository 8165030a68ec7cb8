"""Rows of numbers that may be more than the memory holds: appended to files in order, then read at random through memory maps.

    FOLDER/record.json      what the rows are of, how many are whole, and the width of each array
    FOLDER/NAME.float32     an array, row after row

What the record does not speak of is not trusted: another attempt goes on after the last row that is known to be on the disk.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from equissl.files import disk_full, told_when_full, write_json

log = logging.getLogger(__name__)

RECORD = "record.json"
SECONDS = 60.0  # between two records
BYTES = 4  # of a float32


class Rows:
    """Named arrays `(num_rows, width)`, float32. `num_done` rows of all of them are there."""

    def __init__(self, folder: Path, key: str, num_rows: int) -> None:
        """Goes on with what the folder holds of the same `key`; removes what it holds of another one."""
        self.folder, self.key, self.num_rows = folder, key, num_rows
        self._files: dict[str, BinaryIO] = {}
        self._recorded = time.monotonic()
        self.num_done, self.widths = self._found()
        if not self.num_done:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        for name, width in self.widths.items():  # rows that are only partly there, or not known to be
            os.truncate(self._path(name), self.num_done * width * BYTES)

    def append(self, parts: Mapping[str, Tensor]) -> None:
        """The next rows, `(b, width)` of each array. Raises DiskFull, at the first rows where all of them will not find room."""
        if not self.widths:
            self.widths = {name: values.shape[1] for name, values in parts.items()}
            needed = sum(self.widths.values()) * self.num_rows * BYTES
            if needed > shutil.disk_usage(self.folder).free:
                raise disk_full(errno.ENOSPC, self.folder / RECORD, "the features of all pairs", needed)
        assert parts.keys() == self.widths.keys()
        for name, values in parts.items():
            if name not in self._files:
                self._files[name] = self._path(name).open("ab")
            with told_when_full(self._path(name), values.nbytes):
                self._files[name].write(values.contiguous().numpy().data)
        self.num_done += len(next(iter(parts.values())))
        if time.monotonic() - self._recorded >= SECONDS:
            self.record()

    def record(self) -> None:
        """All that was appended is on the disk, and known to be. Raises DiskFull."""
        for name, file in self._files.items():
            with told_when_full(self._path(name), None):
                file.flush()
                os.fsync(file.fileno())
        write_json(self.folder / RECORD, {"key": self.key, "rows": self.num_done, "widths": self.widths})
        self._recorded = time.monotonic()

    def close(self) -> None:
        """Raises DiskFull for what had still to be written."""
        files, self._files = self._files, {}
        for name, file in files.items():
            with told_when_full(self._path(name), None):
                file.close()

    def __getitem__(self, name: str) -> Tensor:
        """`(num_rows, width)`, mapped: what is read stands in the page cache, which the system takes back when it needs the memory."""
        assert self.num_done == self.num_rows
        assert not self._files, "closed before it is read"
        width = self.widths[name]
        # shared: a private map that could be written to would count as memory where the system does not overcommit
        flat = torch.from_file(str(self._path(name)), shared=True, size=self.num_rows * width, dtype=torch.float32)
        return flat.view(self.num_rows, width)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name.replace('/', '.')}.float32"

    def _found(self) -> tuple[int, dict[str, int]]:
        try:
            record = json.loads((self.folder / RECORD).read_text())
            if record["key"] != self.key:
                return 0, {}
            num_done, widths = int(record["rows"]), {str(name): int(width) for name, width in record["widths"].items()}
            whole = all(self._path(name).stat().st_size >= num_done * width * BYTES for name, width in widths.items())
        except FileNotFoundError:
            return 0, {}
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            log.warning("%s cannot be read: %s; the features are extracted anew", self.folder / RECORD, error)
            return 0, {}
        return (num_done, widths) if whole and 0 < num_done <= self.num_rows else (0, {})
