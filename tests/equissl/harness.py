"""Runs a function on several ranks, each a process of its own, and fails on a hang, a signal or a non-zero exit code of any.

Importing torch and timm takes ten seconds, so one server imports them once and forks the ranks. (Not multiprocessing's own
fork server: there is one per process, and the loader's tests need theirs without timm.)
"""

from __future__ import annotations

import atexit
import importlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PRELOAD = ["equissl.loop", "equissl.methods.ibot"]
GRACE_SECONDS = 20  # for the others, once a rank has failed

_server: Server | None = None


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 90, killed: bool = False) -> list[Any]:
    """Call the module-level `function(*args)` on every rank with torchrun's variables set; returns the results, rank by rank.

    `killed`: the ranks are meant to die of SIGKILL; then it is an error when one does not, and there are no results.
    """
    global _server
    if _server is None:
        _server = Server()
        atexit.register(_server.close)
    return _server.run(function, world_size, args, timeout, killed)


class Server:
    def __init__(self) -> None:
        mine, theirs = socket.socketpair()
        command = [sys.executable, __file__, str(theirs.fileno())]
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env={**os.environ, "OMP_NUM_THREADS": "1"})
        theirs.close()
        self.connection = Connection(mine.detach())
        self.results = tempfile.TemporaryDirectory(prefix="ranks-")

    def close(self) -> None:
        self.connection.close()
        self.process.wait(30)
        self.results.cleanup()

    def run(self, function: Callable[..., Any], world_size: int, args: tuple[Any, ...], timeout: float, killed: bool) -> list[Any]:
        from torch.distributed import TCPStore

        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # here, as torchrun does: no race for the port
        environment = {
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
        }
        call = (sys.path, function.__module__, function.__qualname__, args)
        ranks = []
        for rank in range(world_size):
            self.connection.send((environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, pickle.dumps(call), self.results.name))
            ranks.append(self.connection.recv())
        ended: dict[int, int] = {}
        deadline = time.monotonic() + timeout
        while len(ended) < world_size and time.monotonic() < deadline:
            time.sleep(0.02)
            self.connection.send(None)
            ended |= {pid: status for pid, status in self.connection.recv().items() if pid in ranks}
            if any(ended.values()):
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        for pid in ranks:
            if pid not in ended:
                os.kill(pid, signal.SIGKILL)
        problems, results = [], [self._result(pid) for pid in ranks]
        for rank, pid in enumerate(ranks):
            status = ended.get(pid)
            if status is None:
                problems.append(f"rank {rank} hung and was killed")
            elif killed and status != -signal.SIGKILL:
                problems.append(f"rank {rank} was meant to be killed but ended with {status}: {results[rank]}")
            elif status and not killed:
                problems.append(f"rank {rank} ended with {status}:\n{results[rank]}")
        assert not problems, "\n".join(problems)
        return results

    def _result(self, pid: int) -> Any:
        file = Path(self.results.name) / str(pid)
        return pickle.loads(file.read_bytes()) if file.exists() else None


def serve(connection: Connection) -> None:
    """Fork a child for each request; tell which have ended. Ends, with all children, when the other side does."""
    for module in PRELOAD:
        importlib.import_module(module)
    children: set[int] = set()
    while True:
        try:
            request = connection.recv()
        except EOFError:
            break
        if request is None:
            ended = {pid: os.waitstatus_to_exitcode(status) for pid in children for done, status in [os.waitpid(pid, os.WNOHANG)] if done}
            children -= ended.keys()
            connection.send(ended)
            continue
        pid = os.fork()
        if pid == 0:
            connection.close()
            _child(*request)
        children.add(pid)
        connection.send(pid)
    for pid in children:
        os.kill(pid, signal.SIGKILL)


def _child(environment: dict[str, str], call: bytes, results: str) -> None:
    code = 1
    try:
        os.environ.update(environment)
        path, module, name, args = pickle.loads(call)
        sys.path[:] = path
        result = getattr(importlib.import_module(module), name)(*args)
        code = 0
    except BaseException:
        result = traceback.format_exc()
    (Path(results) / str(os.getpid())).write_bytes(pickle.dumps(result))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
