"""One rank: runs the entry's `main` and turns its end into a result, a marker and an exit code. Imports no torch itself.

Started by the supervisor as `python -m hpc.rank RUN_DIR` with torchrun's variables and EQUIHPC_SCRATCH, a folder on the
node where it leaves its heartbeat and, when it fails, its error.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import faulthandler
import json
import logging
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from hpc import entries
from hpc.files import read_json, write_atomic, write_json
from hpc.runs import RunFolder

EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, EXIT_DISK_FULL = 0, 1, 85, 86
HEARTBEAT_SECONDS = 1.0


class Stop:
    """The entry's `stop()`: True once the run shall end at the next step boundary. Each call is a sign of life."""

    def __init__(self, heartbeat: Path | None):
        self.asked = False
        self._heartbeat, self._beaten = heartbeat, 0.0
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, self._ask)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the supervisor's to hear

    def _ask(self, *_: object) -> None:
        self.asked = True

    def __call__(self) -> bool:
        now = time.monotonic()
        if self._heartbeat and now - self._beaten > HEARTBEAT_SECONDS:
            self._heartbeat.touch()
            self._beaten = now
        return self.asked


def _die_with_parent() -> None:
    """No rank outlives its supervisor, however that ended (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def finish(run: RunFolder, result: dict[str, Any], upstream: dict[str, str]) -> None:
    """`result.json`, then `COMPLETE`, written last. The result says which weights of other runs it was made from."""
    made_from = {Path(path).name: (read_json(Path(path) / "result.json") or {}).get("weights_sha256") for path in upstream.values()}
    write_json(run.result, {**result, "upstream_sha256": {name: found for name, found in made_from.items() if found}})
    write_atomic(run.complete, json.dumps({"time": time.time(), "config": read_json(run.config)}) + "\n")


def is_disk_full(error: BaseException | None) -> bool:
    """No space, no inodes or no quota left, also where another exception carries it or only its text."""
    while error is not None:
        is_text = any(text in str(error) for text in ("No space left on device", "Disk quota exceeded"))
        if is_text or (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)):
            return True
        error = error.__cause__ or error.__context__
    return False


def main() -> int:
    """The exit code: 0 done, 85 stopped as asked with the state saved, 86 no space to write, 1 failed."""
    _die_with_parent()
    run = RunFolder(Path(sys.argv[1]))
    rank = int(os.environ["RANK"])
    scratch = Path(os.environ["EQUIHPC_SCRATCH"])
    stop = Stop(scratch / f"heartbeat_{rank}")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # the supervisor asks a hung rank for its stacks
    spec, config = read_json(run.spec), read_json(run.config)
    try:
        result = entries.load(spec["entry"]).main(config, run.path, stop)
        if rank == 0 and result is not None:
            finish(run, result, spec["upstream"])
    except BaseException as error:
        traceback.print_exc()
        full = is_disk_full(error)
        summary = "".join(traceback.format_exception_only(error)).strip()
        record = {"rank": rank, "error": summary, "traceback": traceback.format_exc(), "disk_full": full}
        with contextlib.suppress(OSError):  # the node's own disk may be the full one; the exit code says so then
            write_json(scratch / f"error_{rank}.json", record, durable=False)
        return EXIT_DISK_FULL if full else EXIT_FAILED
    return EXIT_STOPPED if result is None else EXIT_DONE


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # torch 2.15 with gloo can abort while the interpreter shuts down; the work is done and on disk
