"""Files that another process may read at any time: replaced as a whole, or appended as one write of one line."""

from __future__ import annotations

import errno
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FULL = (errno.ENOSPC, errno.EDQUOT)


class DiskFull(OSError):
    """No space, no inodes or no quota left; the text tells where, how much was needed and is free, and what to do."""


def disk_full(number: int, path: Path, what: str, num_bytes: int | None) -> DiskFull:
    """`number`: the errno of the failed write; `what`, of `num_bytes` where that is known, should have been written to `path`."""
    folder = next(parent for parent in path.parents if parent.exists())
    room = os.statvfs(folder)
    free_bytes = room.f_bavail * room.f_frsize
    inodes = f"{room.f_favail:,} inodes" if room.f_files else "inodes without limit"
    needs = "cannot be written" if num_bytes is None else f"needs {num_bytes:,} bytes"
    quota = ""
    if number == errno.EDQUOT:
        quota = ": your quota or your group's is used up"
    elif free_bytes > 2 * (num_bytes or 2**20) and room.f_favail:
        quota = ": perhaps a quota is used up"
    return DiskFull(
        number,
        f"{os.strerror(number)}: {what} {needs} in {folder}, where {free_bytes:,} bytes and {inodes} are "
        f"free{quota}. Make room there, then start the same run again: what it had finished is untouched, and it goes on from there",
    )


@contextmanager
def told_when_full(path: Path, num_bytes: int | None) -> Iterator[None]:
    """Raises `DiskFull` for the errors of a write to `path` that mean this."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL or isinstance(error, DiskFull):
            raise
        raise disk_full(error.errno, path, path.name, num_bytes) from error


def write_atomic(path: Path, content: str | bytes) -> None:
    """Readers see the old content or the new one, never a part: temporary name, fsync, rename, fsync of the folder.

    Raises DiskFull.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    with told_when_full(path, len(data)):
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` of indented JSON. Raises ValueError for NaN and infinities, which JSON does not have."""
    write_atomic(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append one JSON object as one write of one line; a reader ignores a last line without its line end. Raises DiskFull."""
    line = (json.dumps(record, allow_nan=False) + "\n").encode()
    with told_when_full(path, len(line)):
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            while line:  # once, but on a disk that fills up with it: the second write then says why
                line = line[os.write(handle, line) :]
        finally:
            os.close(handle)


def sync(path: Path) -> None:
    """Make a file's content durable, or the renames inside a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
