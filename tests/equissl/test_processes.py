"""Work by several processes: its order, how much of it is out, its end; and how its progress is shown."""

from __future__ import annotations

import logging
import operator
import os
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from equissl.data import parallel as module
from equissl.data.parallel import processes, progress, shown
from equissl.progress import Stopped


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_results_come_in_order_and_few_tasks_are_out(workers: int) -> None:
    taken = []

    def tasks() -> Iterator[tuple[int, int]]:
        for number in range(20):
            taken.append(number)
            yield number, 3

    with processes(workers) as parallel:
        for number, result in enumerate(parallel(operator.mul, tasks())):
            assert result == 3 * number
            assert len(taken) <= number + 1 + max(1, 2 * workers)
        assert list(parallel(os.getpid, [()] * 3)).count(os.getpid()) == (0 if workers > 1 else 3)
    assert len(taken) == 20


@pytest.mark.parametrize("workers", [1, 2])
def test_what_a_task_raises_is_raised(workers: int) -> None:
    with pytest.raises(ZeroDivisionError), processes(workers) as parallel:
        list(parallel(operator.floordiv, [(1, 1), (1, 0)]))
    with processes(workers) as parallel:
        assert list(parallel(operator.floordiv, [])) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_stop_ends_it(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_SECONDS", 0.01)
    asked, done = threading.Event(), []
    with processes(workers, asked.is_set) as parallel:
        results = parallel(operator.mul, ((number, asked.is_set()) for number in range(100)))
        done.append(next(results))
        asked.set()
        with pytest.raises(Stopped):
            done.extend(results)
    assert done == [0]


def test_stop_is_asked_while_a_task_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_SECONDS", 0.01)
    asked = iter([False] * 5)
    with processes(2, lambda: next(asked, True)) as parallel, pytest.raises(Stopped):
        list(parallel(time.sleep, [(0.5,)]))


def test_a_process_that_ends_is_an_error() -> None:
    with pytest.raises(OSError, match="a worker process was killed, most likely for want of memory"), processes(2) as parallel:
        list(parallel(os._exit, [(1,)]))


def test_a_line_now_and_then_on_a_pipe(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    with caplog.at_level(logging.INFO), shown() as report:
        for second in range(30):
            clock.now = 1000.0 + second
            report("scan", 100 * second, None, 10**6 * second)
        for second in range(31):
            clock.now = 1030.0 + second
            report("write", 5000 + 100 * second, 1_005_000, 2 * 10**6 * second)  # 5 000 are of an earlier attempt
    assert caplog.messages == [
        "scan: 1,000 images, 100 images/s, 1.0 MB/s",
        "scan: 2,000 images, 100 images/s, 1.0 MB/s",
        "write: 5,000 of 1,005,000 images",
        "write: 6,000 of 1,005,000 images, 100 images/s, 2.0 MB/s, 2:46:30 left",
        "write: 7,000 of 1,005,000 images, 100 images/s, 2.0 MB/s, 2:46:20 left",
        "write: 8,000 of 1,005,000 images, 100 images/s, 2.0 MB/s, 2:46:10 left",
    ]


def test_lines_about_bytes(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    with caplog.at_level(logging.INFO), progress("verify", 3 * 10**9) as advance:
        for _ in range(3):
            clock.now += 15
            advance(6 * 10**8)
    assert caplog.messages == [
        "verify: 0.60 of 3.00 GB, 40.0 MB/s, 0:01:00 left",
        "verify: 1.20 of 3.00 GB, 40.0 MB/s, 0:00:45 left",
        "verify: 1.80 of 3.00 GB, 40.0 MB/s, 0:00:30 left",
    ]
