"""Work on many files at once, with its progress shown: a bar on a terminal, a line now and then on a pipe. No torch."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from typing import Any, Protocol, TypeVar

from equissl.progress import Stopped

R = TypeVar("R")

log = logging.getLogger(__name__)

LINE_SECONDS = 10.0  # between two lines about the progress
POLL_SECONDS = 1.0  # between two looks whether to stop
HANDLED_BY_PARENT = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR2}

Stop = Callable[[], bool]
Report = Callable[[str, int, int | None, int], None]  # stage, images done, of so many (None: not known yet), bytes done


class Parallel(Protocol):
    def __call__(self, function: Callable[..., R], tasks: Iterable[tuple[Any, ...]]) -> Iterator[R]: ...


def usable_cores() -> int:
    """Those that this process may use, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0))


@contextmanager
def processes(workers: int, stop: Stop = lambda: False) -> Iterator[Parallel]:
    """Yields `parallel(function, tasks)`: `function(*task)` of each task, in order, by processes of their own; one: by this one.

    At most two tasks for each process are out at a time. Raises what `function` raises, Stopped if `stop()`, and OSError where a
    process was killed. At the end nothing runs any more.
    """
    context = multiprocessing.get_context("forkserver")  # no fork of a process with threads
    pool = ProcessPoolExecutor(max(workers, 1), mp_context=context, initializer=init_worker)

    def parallel(function: Callable[..., R], tasks: Iterable[tuple[Any, ...]]) -> Iterator[R]:
        context.set_forkserver_preload([function.__module__])
        remaining, out = iter(tasks), deque[Future[R]]()
        while True:
            for task in islice(remaining, 2 * workers - len(out)):
                # workers inherit the blocked signals: one that arrives before their first line does not end them either
                blocked = signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED_BY_PARENT)
                try:
                    out.append(pool.submit(function, *task))
                finally:
                    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            if not out:
                return
            is_done = False
            while not is_done:
                _go_on(stop)
                is_done = bool(wait([out[0]], POLL_SECONDS).done)
            yield out.popleft().result()

    def alone(function: Callable[..., R], tasks: Iterable[tuple[Any, ...]]) -> Iterator[R]:
        for task in tasks:
            _go_on(stop)
            yield function(*task)

    try:
        yield parallel if workers > 1 else alone
    except BrokenProcessPool:
        raise OSError(
            "a worker process was killed, most likely for want of memory: try again with fewer workers. (A script that calls this must"
            " do so under if __name__ == '__main__', for the processes import it)"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _go_on(stop: Stop) -> None:
    if stop():
        raise Stopped


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
def shown(unit: str = "images") -> Iterator[Report]:
    """On stderr what is done of each stage, with the rates since it began and the time left. In the unit GB bytes stand for images."""
    began: dict[str, tuple[float, int, int]] = {}
    scale, form = (1e9, ",.2f") if unit == "GB" else (1, ",.0f")

    def text(stage: str, done: int, of: int | None, num_bytes: int) -> str:
        start, done_before, bytes_before = began.setdefault(stage, (time.monotonic(), done, num_bytes))
        seconds = max(time.monotonic() - start, 1e-9)
        rate = (done - done_before) / seconds
        parts = [f"{done / scale:{form}} {unit}" if of is None else f"{done / scale:{form}} of {of / scale:{form}} {unit}"]
        if rate:
            parts += [f"{rate:,.0f} {unit}/s"] * (unit != "GB") + [f"{(num_bytes - bytes_before) / seconds / 1e6:,.1f} MB/s"]
            if of is not None:
                left = round((of - done) / rate)
                parts.append(f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left")
        return ", ".join(parts)

    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"))
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("", text="")
            yield lambda stage, done, of, num_bytes: bar.update(
                task, description=stage, completed=done, total=of, text=text(stage, done, of, num_bytes)
            )
        return
    told = time.monotonic()

    def line(stage: str, done: int, of: int | None, num_bytes: int) -> None:
        nonlocal told
        said = text(stage, done, of, num_bytes)
        if time.monotonic() - told >= LINE_SECONDS:
            told = time.monotonic()
            log.info("%s: %s", stage, said)

    yield line


@contextmanager
def progress(stage: str, of: int) -> Iterator[Callable[[int], None]]:
    """Yields `advance(bytes)`: `shown`, of `of` bytes."""
    with shown("GB") as report:
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            report(stage, done, of, done)

        advance(0)
        yield advance
