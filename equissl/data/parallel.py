"""Work on many files at once, with its progress shown: a bar on a terminal, a line now and then on a pipe. No torch."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

log = logging.getLogger(__name__)

LINE_SECONDS = 30.0
HANDLED_BY_PARENT = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR2}


def usable_cores() -> int:
    """Those that this process may use, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0))


def in_parallel(function: Callable[[T], R], tasks: Sequence[T], workers: int) -> Iterator[tuple[int, R]]:
    """Number and result of every task as it is done, by processes of their own; one worker or one task: by this process.

    Raises what `function` raises, and OSError where a process was killed.
    """
    if min(workers, len(tasks)) <= 1:
        for number, task in enumerate(tasks):
            yield number, function(task)
        return
    context = multiprocessing.get_context("spawn")  # no fork of a process with threads
    pool = ProcessPoolExecutor(min(workers, len(tasks)), mp_context=context, initializer=init_worker)
    try:
        numbers = {pool.submit(function, task): number for number, task in enumerate(tasks)}
        for future in as_completed(numbers):
            yield numbers.pop(future), future.result()
    except BrokenProcessPool:
        raise OSError("a worker process was killed, most likely for want of memory: try fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def init_worker() -> None:
    """Signals are the parent's business; a worker ends with its parent, however that ends."""
    for number in HANDLED_BY_PARENT:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def progress(what: str, num_bytes: int) -> Iterator[Callable[[int], None]]:
    """Yields `advance(bytes)`. Shown on stderr: what is done of `num_bytes`, the rate, the time left."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=num_bytes)
            yield lambda count: bar.advance(task, count)
        return
    began = told = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal done, told
        done += count
        now = time.monotonic()
        if now - told >= LINE_SECONDS:
            told, rate = now, done / (now - began)
            left = (num_bytes - done) / max(rate, 1.0)
            log.info("%s: %.2f of %.2f GB, %.0f MB/s, %.0f s left", what, done / 1e9, num_bytes / 1e9, rate / 1e6, left)

    yield advance
