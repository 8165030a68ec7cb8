"""A real Slurm on this machine: munge, MariaDB, slurmdbd, slurmctld and four slurmd that emulate nodes of four GPUs.

Everything lives in one state folder (`EQUIHPC_TESTBED`, default `/var/lib/equihpc-testbed`) and on loopback ports of
its own, and is reached through `SLURM_CONF` alone: a Slurm that somebody else configured here is neither used nor
disturbed. The daemons run in the foreground, detached from the caller. Each is known by `run/NAME.pid`, which it wrote
before it became the daemon: boot id and /proc stat line with its time of birth, so that a process number which the
kernel gave away again is never taken for ours.

    STATE/etc/     slurm.conf, slurmdbd.conf, gres.conf, cgroup.conf, mariadb.cnf, init.sql, munge.key, password
    STATE/run/     NAME.pid, and a folder per daemon for its socket
    STATE/log/     NAME.log; NAME.out is what the daemon printed
    STATE/slurmctld/, spool/NODE/, db/, munged/    what the daemons keep
"""

import contextlib
import fcntl
import json
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2

import hpc
from hpc.errors import UserError

CLUSTER = "equihpc"
NODES = ("jwb0001", "jwb0002", "jwb0003", "jwb0004")
NODE_RANGE = "jwb[0001-0004]"
PARTITIONS = ("booster", "urgent")
GPUS_PER_NODE = 4
CPUS_PER_NODE = 8
MEMORY_MB_PER_NODE = 16000
REQUEUE_HOLD_SECONDS = 120
"""Slurm's own default of AuthInfo=cred_expire: how long a requeued job waits before it may start again."""

_FIRST_PORT = 26810  # below the ephemeral ports (32768 up), above the registered services in use
_DAEMONS = ("munged", "mariadbd", "slurmdbd", "slurmctld", *(f"slurmd-{node}" for node in NODES))
_PROGRAMS = ("munged", "mariadbd", "slurmdbd", "slurmctld", "slurmd", "slurmstepd")
_START_SECONDS = 60
_PACKAGES = {
    "munged": "munge",
    "mariadbd": "mariadb-server-core",  # mariadb-server is the same program, plus a service for the whole machine
    "mariadb-install-db": "mariadb-server-core",
    "my_print_defaults": "mariadb-client-core",  # mariadb-install-db calls it
    "slurmdbd": "slurmdbd",
    "slurmctld": "slurm-wlm",
    "slurmd": "slurm-wlm",
    "sacct": "slurm-wlm",
    "sacctmgr": "slurm-wlm",
    "sbatch": "slurm-wlm",
    "scancel": "slurm-wlm",
    "scontrol": "slurm-wlm",
    "sinfo": "slurm-wlm",
    "squeue": "slurm-wlm",
    "srun": "slurm-wlm",
}
_SERVICES = ("munge", "slurmdbd", "slurmctld", "slurmd")
_POLICY = Path("/usr/sbin/policy-rc.d")
_POLICY_MARK = "# equihpc testbed"


class TestbedError(UserError):
    """The testbed cannot be brought up, or is not what it should be; the text says why and what to do."""

    __test__ = False  # not a test class, whatever pytest thinks of the name


@dataclass(frozen=True)
class Testbed:
    """A running testbed. `env()` is what a process needs in its environment to use it."""

    __test__ = False

    state_dir: Path
    slurm_conf: Path
    requeue_hold_seconds: int
    nodes: tuple[str, ...] = NODES
    partitions: tuple[str, ...] = PARTITIONS

    def env(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.slurm_conf)}


@dataclass(frozen=True)
class _Settings:
    """What is chosen once, at the first `up`, and kept in STATE/testbed.json."""

    first_port: int
    account: str
    munge_account: str
    requeue_hold_seconds: int

    def ports(self) -> dict[str, int]:
        """MariaDB, slurmdbd, slurmctld, then one port per node from `slurmd` on."""
        names = ("mariadbd", "slurmdbd", "slurmctld", "slurmd")
        return {name: self.first_port + i for i, name in enumerate(names)}


@dataclass(frozen=True)
class _Process:
    pid: int
    parent: int
    start_ticks: str
    state: str


def up(progress: Callable[[str], None] = lambda _: None, *, requeue_hold_seconds: int | None = None) -> Testbed:
    """Bring the testbed up and repair it; a healthy one is left alone. Needs root; safe to call concurrently.

    Missing programs are installed on Debian and Ubuntu, without the distribution's own services. Dead daemons are
    started, nodes that are down or drained are resumed, closed partitions opened. `requeue_hold_seconds` is how long
    Slurm holds a job after `scontrol requeue`, at least 5; None keeps the testbed's setting, at first Slurm's default
    of 120. A change of it restarts the daemons, which jobs survive.

    Raises `TestbedError`.
    """
    if requeue_hold_seconds is not None and requeue_hold_seconds < 5:
        raise TestbedError(f"requeue_hold_seconds is {requeue_hold_seconds}: Slurm takes nothing below 5")
    if os.geteuid() != 0:
        raise TestbedError("`equihpc testbed up` starts daemons under several accounts and needs root")
    state = _state_dir()
    with _lock(state):
        tools = _tools(progress)
        settings = _settings(state, requeue_hold_seconds)
        _make_folders(state, settings)
        _configure(state, settings)
        if not all(_pid(state, name) for name in _DAEMONS):
            _start_missing(state, settings, tools, progress)
        _heal(state, progress)
    return Testbed(state, state / "etc" / "slurm.conf", settings.requeue_hold_seconds)


def down(*, keep: bool = False) -> None:
    """Cancel all jobs, stop the daemons, remove the state folder unless `keep`; packages stay. Idempotent."""
    state = _state_dir()
    if not (state / "testbed.json").exists():
        return
    if os.geteuid() != 0:
        raise TestbedError("`equihpc testbed down` stops daemons of other accounts and needs root")
    with _lock(state, remove=not keep):
        if not (state / "testbed.json").exists():
            return  # another process was faster
        if _pid(state, "slurmctld") and _pid(state, "munged"):
            _cancel_jobs(state)
        _stop(state)
        _kill_leftovers(state)
        if not keep:
            shutil.rmtree(state)


def slurm_conf() -> Path:
    """The testbed's slurm.conf: the value for SLURM_CONF. It exists once `up` was called."""
    return _state_dir() / "etc" / "slurm.conf"


def status() -> dict[str, Any]:
    """What runs, as plain data. Changes nothing and needs no root."""
    state = _state_dir()
    pids = {name: _pid(state, name) for name in _DAEMONS}
    nodes: list[dict[str, str]] = []
    partitions: list[dict[str, str]] = []
    if pids["slurmctld"] and pids["munged"] and _find("sinfo"):
        with contextlib.suppress(TestbedError):
            nodes = _nodes(state)
            partitions = _partitions(state)
    settings = _read_settings(state)
    return {
        "up": all(pids.values()) and len(nodes) == len(NODES) and all(_is_usable(node["state"]) for node in nodes),
        "state_dir": str(state),
        "slurm_conf": str(slurm_conf()),
        "requeue_hold_seconds": settings.requeue_hold_seconds if settings else None,
        "ports": settings.ports() if settings else {},
        "versions": _versions(),
        "daemons": {name: {"pid": pid, "alive": pid is not None} for name, pid in pids.items()},
        "nodes": nodes,
        "partitions": partitions,
    }


# ---- the state folder


def _state_dir() -> Path:
    state = Path(os.environ.get("EQUIHPC_TESTBED") or "/var/lib/equihpc-testbed")
    # Slurm's files have no quoting, and the sockets of job steps below the folder must stay within 107 characters.
    if not re.fullmatch(r"/[A-Za-z0-9._/-]{1,63}", str(state)) or ".." in state.parts:
        rule = "an absolute path of at most 64 characters, from A-Z a-z 0-9 . _ - /"
        raise TestbedError(f"EQUIHPC_TESTBED={state}: must be {rule}")
    return state


@contextlib.contextmanager
def _lock(state: Path, *, remove: bool = False) -> Iterator[None]:
    """One `up` or `down` at a time. The lock lies beside the folder; `down` removes both, the lock last (`remove`)."""
    path = state.with_name(state.name + ".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            if _is_open_as(fd, path):  # else its last holder removed it, and it locks nothing
                yield
                if remove:
                    path.unlink()
                return
        finally:
            os.close(fd)


def _is_open_as(fd: int, path: Path) -> bool:
    try:
        return path.stat().st_ino == os.fstat(fd).st_ino
    except FileNotFoundError:
        return False


def _read_settings(state: Path) -> _Settings | None:
    try:
        return _Settings(**json.loads((state / "testbed.json").read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise TestbedError(f"{state}/testbed.json is damaged ({error}): remove the folder {state}") from None


def _settings(state: Path, requeue_hold_seconds: int | None) -> _Settings:
    old = _read_settings(state)
    if old is None and state.exists() and any(state.iterdir()):
        raise TestbedError(f"{state} exists and is no testbed: set EQUIHPC_TESTBED to another place, or remove it")
    running = old is not None and any(_pid(state, name) for name in _DAEMONS)
    if old is None:
        _kill_leftovers(state)  # of a testbed whose folder was removed under its daemons
    new = _Settings(
        first_port=old.first_port if old and (running or _are_free(old.first_port)) else _free_ports(),
        account=old.account if old else _account("slurm", state),
        munge_account=old.munge_account if old else _account("munge", state),
        requeue_hold_seconds=requeue_hold_seconds or (old.requeue_hold_seconds if old else REQUEUE_HOLD_SECONDS),
    )
    if new != old:
        state.mkdir(mode=0o755, exist_ok=True)
        _write(state / "testbed.json", json.dumps(asdict(new), indent=2) + "\n")
    return new


def _account(name: str, state: Path) -> str:
    """`name` if there is such an account and it can enter the state folder, else root."""
    try:
        pwd.getpwnam(name)
    except KeyError:
        return "root"
    return "root" if _is_private(state) else name


def _is_private(state: Path) -> bool:
    """Whether some folder on the way, like /root, keeps other accounts out."""
    return not all(parent.stat().st_mode & stat.S_IXOTH for parent in state.parents if parent.exists())


def _free_ports() -> int:
    for first in range(_FIRST_PORT, 32768 - 10, 10):
        if _are_free(first):
            return first
    raise TestbedError(f"no free block of ports between {_FIRST_PORT} and 32768")


def _are_free(first: int) -> bool:
    for port in range(first, first + 3 + len(NODES)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("0.0.0.0", port))
            except OSError:
                return False
    return True


def _make_folders(state: Path, settings: _Settings) -> None:
    """Folders, empty logs, emulated GPUs and secrets, each with the owner that its daemon needs."""
    state.chmod(0o755)
    slurm, munge = settings.account, settings.munge_account
    folders = dict.fromkeys(("etc", "run", "log", "gpu", "spool", "run/slurmd", "prolog.d"), "root")
    folders |= {f"spool/{node}": "root" for node in NODES}
    folders |= {"slurmctld": slurm, "run/slurmctld": slurm, "run/slurmdbd": slurm, "run/mariadbd": slurm}
    folders |= {"munged": munge, "run/munged": munge}
    for name, account in folders.items():
        (state / name).mkdir(exist_ok=True)
        (state / name).chmod(0o755)  # whatever the umask
        shutil.chown(state / name, account)
    for name, account in (("slurmctld", slurm), ("slurmdbd", slurm), ("munged", munge)):
        log = state / "log" / f"{name}.log"
        log.touch(mode=0o640)
        shutil.chown(log, account)
    for i in range(GPUS_PER_NODE):
        with contextlib.suppress(FileExistsError):  # Slurm sets CUDA_VISIBLE_DEVICES for character devices only
            (state / "gpu" / f"gpu{i}").symlink_to("/dev/null")
    prolog = state / "prolog.d" / "fine"  # Slurm takes a pattern without a file for a prolog that failed
    if not prolog.exists():
        _write(prolog, "#!/bin/sh\n", mode=0o755)
    if not (state / "etc" / "munge.key").exists():
        _write(state / "etc" / "munge.key", secrets.token_bytes(1024), mode=0o600, account=munge)
    if not (state / "etc" / "password").exists():
        _write(state / "etc" / "password", secrets.token_hex(24), mode=0o600)


def _configure(state: Path, settings: _Settings) -> None:
    """Render the configuration. If it changed, the daemons are stopped before it is written."""
    password = (state / "etc" / "password").read_text()
    values = {
        "state": state,
        "cluster": CLUSTER,
        "account": settings.account,
        "munge_socket": _munge_socket(state),
        "requeue_hold_seconds": settings.requeue_hold_seconds,
        "ports": settings.ports(),
        "password": password,
        "node_range": NODE_RANGE,
        "num_nodes": len(NODES),
        "cpus": CPUS_PER_NODE,
        "gpus": GPUS_PER_NODE,
        "memory_mb": MEMORY_MB_PER_NODE,
        "cgroup_plugin": _cgroup_plugin(_version("slurmctld", "-V")),
    }
    loader = jinja2.FileSystemLoader(_templates())
    templates = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    changed = {}
    for name in ("slurm.conf", "slurmdbd.conf", "gres.conf", "cgroup.conf", "mariadb.cnf", "init.sql"):
        path, text = state / "etc" / name, templates.get_template(f"{name}.j2").render(values)
        if not path.exists() or path.read_text() != text:
            changed[path] = text
    if changed:
        _stop(state)
    for path, text in changed.items():
        if password in text:
            _write(path, text, mode=0o600, account=settings.account)
        else:
            _write(path, text)


def _cgroup_plugin(version: str) -> str:
    """cgroup/v1 loads anywhere and does nothing unless asked; `disabled` is documented from Slurm 24.05 on."""
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    return "disabled" if numbers >= (24, 5) else "cgroup/v1"


def _templates() -> Path:
    package = Path(hpc.__file__).parent
    installed = package / "_slurm" / "testbed"
    return installed if installed.is_dir() else package.parent / "slurm" / "testbed"


def _munge_socket(state: Path) -> Path:
    return state / "run" / "munged" / "munge.sock"


def _write(path: Path, content: str | bytes, *, mode: int = 0o644, account: str = "root") -> None:
    """Atomic, and never for a moment readable by more people than `mode` says."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        os.fchmod(file.fileno(), mode)
    shutil.chown(temporary, account)
    temporary.replace(path)


# ---- processes


def _process(pid: int) -> _Process | None:
    """None if there is no such process, or nothing but a zombie that its parent did not collect."""
    try:
        return _parse_stat(Path(f"/proc/{pid}/stat").read_text())
    except (FileNotFoundError, ProcessLookupError):
        return None


def _parse_stat(text: str) -> _Process | None:
    head, _, tail = text.rpartition(")")  # the name between the parentheses may contain anything
    fields = tail.split()
    if len(fields) < 20 or fields[0] in "ZX":
        return None
    return _Process(pid=int(head.split()[0]), parent=int(fields[1]), start_ticks=fields[19], state=fields[0])


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _pid(state: Path, name: str) -> int | None:
    """The process id of this daemon if it lives, checked against its time of birth."""
    try:
        boot, _, line = (state / "run" / f"{name}.pid").read_text().partition(" ")
    except FileNotFoundError:
        return None
    born = _parse_stat(line)
    now = _process(born.pid) if born and boot == _boot_id() else None
    return now.pid if born and now and now.start_ticks == born.start_ticks else None


CRASHED = "equihpc: crashed and is started again:"


def _spawn(state: Path, name: str, command: Sequence[str], account: str = "root") -> None:
    """Start a daemon as an orphan: no descriptor, variable or ignored signal of the caller, a session of its own."""
    record = state / "run" / f"{name}.pid"
    record.unlink(missing_ok=True)
    script = (
        "ulimit -c 0; read -r boot </proc/sys/kernel/random/boot_id; read -r stat </proc/$$/stat; "
        'echo "$boot $stat" >"$0"; exec "$@"'  # the same process, with another program
    )
    if name.startswith("slurmd-"):  # that of Slurm 22.05 dies of SIGSEGV now and then (its heap is damaged); its steps live on
        script = (
            "ulimit -c 0; read -r boot </proc/sys/kernel/random/boot_id; "
            'while :; do "$@" & child=$!; read -r stat </proc/$child/stat; echo "$boot $stat" >"$0.new"; mv "$0.new" "$0"; '
            f'wait $child; code=$?; case $code in 134|139) echo "{CRASHED} exit code $code";; *) exit $code;; esac; sleep 0.5; done'
        )
    drop = [] if account == "root" else ["setpriv", f"--reuid={account}", f"--regid={account}", "--clear-groups", "--"]
    with (state / "log" / f"{name}.out").open("ab") as log:
        subprocess.run(
            ["env", "--default-signal", "setsid", "--fork", "sh", "-c", script, record, *drop, *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={"PATH": _PATH, "LC_ALL": "C", "HOME": "/", "SLURM_CONF": str(state / "etc" / "slurm.conf")},
            cwd="/",
            umask=0o022,
            check=True,
        )
    end = time.monotonic() + 10
    while not (record.exists() and record.read_text().endswith("\n")):
        if time.monotonic() > end:
            raise _failure(state, name, f"{name} was not started")
        time.sleep(0.01)


def _wait(ready: Callable[[], bool], state: Path, name: str) -> None:
    """Wait until daemon `name` is ready, for as long as it lives and for at most a minute."""
    end = time.monotonic() + _START_SECONDS
    while not ready():
        if _pid(state, name) is None:
            raise _failure(state, name, f"{name} ended")
        if time.monotonic() > end:
            raise _failure(state, name, f"{name} does not answer within {_START_SECONDS} s")
        time.sleep(0.03)


def _failure(state: Path, name: str, message: str) -> TestbedError:
    logs = [path for suffix in (".log", ".out") if (path := state / "log" / f"{name}{suffix}").exists()]
    tails = [f"{path}:\n{_tail(path.read_text(errors='replace'))}" for path in logs]
    return TestbedError("\n".join([message, *tails]))


def _stop(state: Path) -> None:
    """Stop all daemons: those that use another one before it, so that nobody complains or loses what it has to say."""
    nodes = tuple(f"slurmd-{node}" for node in NODES)
    for names in (("slurmctld", *nodes), ("slurmdbd",), ("mariadbd",), ("munged",)):
        for kind, seconds in ((signal.SIGTERM, 15.0), (signal.SIGKILL, 5.0)):
            for name in names:
                if pid := _pid(state, name):
                    os.kill(pid, kind)
            end = time.monotonic() + seconds
            while any(_pid(state, name) for name in names) and time.monotonic() < end:
                time.sleep(0.03)
        for name in names:
            if pid := _pid(state, name):
                raise TestbedError(f"{name} (process {pid}) cannot be killed")
            (state / "run" / f"{name}.pid").unlink(missing_ok=True)


def _kill_leftovers(state: Path) -> None:
    """Kill the job steps with all that runs below them, and daemons that lost their record: who writes to STATE/log."""
    end = time.monotonic() + 10
    killed: set[int] = set()
    while time.monotonic() < end:
        processes = [process for path in Path("/proc").glob("[0-9]*") if (process := _process(int(path.name)))]
        doomed = {process.pid for process in processes if _writes_to(f"{state}/log/", process.pid)}
        while more := {process.pid for process in processes if process.parent in doomed} - doomed:
            doomed |= more
        killed |= doomed
        if not killed & {process.pid for process in processes}:  # a dying process has no files open any more
            return
        for pid in doomed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _writes_to(folder: str, pid: int) -> bool:
    """Whether a daemon or job step has a file in `folder` open. (Slurm writes its titles over environments.)"""
    with contextlib.suppress(OSError):
        program = re.match(r"\w*", Path(f"/proc/{pid}/exe").readlink().name)  # Debian's is called slurmd-wlm
        if program and program.group() in _PROGRAMS:
            files = [str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir()]
            return any(file.startswith(folder) for file in files)
    return False


# ---- the daemons


def _start_missing(state: Path, settings: _Settings, tools: Mapping[str, str], progress: Callable[[str], None]) -> None:
    """Each daemon needs those before it, but MariaDB's slow first start overlaps with the nodes'."""
    conf = state / "etc" / "slurm.conf"
    ports = settings.ports()

    def missing(name: str) -> bool:
        if _pid(state, name):
            return False
        progress(f"starting {name}")
        return True

    if missing("munged"):
        _start_munged(state, settings, tools)
    if missing("mariadbd"):
        _make_database(state, settings, tools, progress)
        _spawn(state, "mariadbd", [tools["mariadbd"], f"--defaults-file={state}/etc/mariadb.cnf"])
    for node in NODES:
        if missing(f"slurmd-{node}"):
            _spawn(state, f"slurmd-{node}", [tools["slurmd"], "-D", "-f", str(conf), "-N", node])
    _wait(lambda: _answers(ports["mariadbd"]), state, "mariadbd")
    if missing("slurmdbd"):
        _spawn(state, "slurmdbd", [tools["slurmdbd"], "-D"], settings.account)
    _wait(lambda: _answers(ports["slurmdbd"]), state, "slurmdbd")
    known = _slurm(state, "sacctmgr", "--noheader", "--parsable2", "show", "cluster", "format=cluster", seconds=60)
    if CLUSTER not in known.split():
        _slurm(state, "sacctmgr", "--immediate", "add", "cluster", CLUSTER, seconds=60)
    if missing("slurmctld"):
        _spawn(state, "slurmctld", [tools["slurmctld"], "-D", "-f", str(conf)], settings.account)


def _start_munged(state: Path, settings: _Settings, tools: Mapping[str, str]) -> None:
    path = _munge_socket(state)
    for old in (path, path.with_name(path.name + ".lock")):
        old.unlink(missing_ok=True)
    options = {
        "key-file": state / "etc" / "munge.key",
        "socket": path,
        "pid-file": path.with_name("munged.pid"),
        "seed-file": state / "munged" / "seed",
        "log-file": state / "log" / "munged.log",
    }
    command = [tools["munged"], "--foreground", *(f"--{name}={value}" for name, value in options.items())]
    if _is_private(state):
        command.append("--force")  # it insists on a socket that everybody can reach; here nobody but root needs to
    _spawn(state, "munged", command, settings.munge_account)
    _wait(path.exists, state, "munged")


def _make_database(state: Path, settings: _Settings, tools: Mapping[str, str], progress: Callable[[str], None]) -> None:
    """Fill STATE/db once; built beside it and renamed, so that a crash in between leaves nothing half done."""
    if (state / "db").exists():
        return
    progress("creating the database")
    new = state / "db.new"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(mode=0o700)
    shutil.chown(new, settings.account)
    place = ["--no-defaults", f"--datadir={new}", f"--user={settings.account}"]  # --no-defaults must be the first
    options = ["--skip-test-db", "--skip-name-resolve", "--auth-root-authentication-method=socket"]
    done = _run([tools["mariadb-install-db"], *place, *options, "--innodb-log-file-size=16M"])
    if done.returncode != 0:
        raise TestbedError(f"mariadb-install-db failed:\n{_tail(done.stdout)}")
    new.rename(state / "db")


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def _heal(state: Path, progress: Callable[[str], None]) -> None:
    """Wait until every node is usable; resume what a drill (or an accident) left down or drained; open partitions."""
    end = time.monotonic() + _START_SECONDS
    resumed: set[str] = set()
    while True:
        try:
            nodes = _nodes(state)
        except TestbedError as error:  # the controller does not answer yet
            nodes, problem = [], str(error)
        else:
            problem = "nodes do not come up: " + ", ".join(f"{node['name']} {node['state']}" for node in nodes)
        if len(nodes) == len(NODES) and all(_is_usable(node["state"]) for node in nodes):
            break
        for node in nodes:
            if re.match(r"down|drain|fail", node["state"]):
                if node["name"] not in resumed:
                    progress(f"resuming {node['name']} ({node['state']}: {node['reason']})")
                resumed.add(node["name"])
                with contextlib.suppress(TestbedError):  # its state may have changed since; the loop looks again
                    _slurm(state, "scontrol", "update", f"nodename={node['name']}", "state=resume")
        for name in _DAEMONS:
            if _pid(state, name) is None:
                raise _failure(state, name, f"{name} ended")
        if time.monotonic() > end:
            raise _failure(state, "slurmctld", problem)
        time.sleep(0.1)
    for partition in _partitions(state):
        if partition["state"] != "up":
            progress(f"opening partition {partition['name']} ({partition['state']})")
            _slurm(state, "scontrol", "update", f"partitionname={partition['name']}", "state=up")


def _is_usable(node_state: str) -> bool:
    """Of `sinfo`'s %T: a trailing * means that slurmd does not answer, a - that backfill has plans for the node."""
    return re.fullmatch(r"(idle|mixed|allocated|completing|planned|reserved)[-+]?", node_state) is not None


def _nodes(state: Path) -> list[dict[str, str]]:
    output = _slurm(state, "sinfo", "--noheader", "--Node", f"--partition={PARTITIONS[0]}", "--format=%N|%T|%E")
    keys = ("name", "state", "reason")
    return [dict(zip(keys, line.split("|", 2), strict=True)) for line in output.splitlines()]


def _partitions(state: Path) -> list[dict[str, str]]:
    output = _slurm(state, "sinfo", "--noheader", "--summarize", "--format=%R|%a|%l|%N|%p")
    keys = ("name", "state", "time_limit", "nodes", "priority_tier")
    return [dict(zip(keys, line.split("|"), strict=True)) for line in output.splitlines()]


def _cancel_jobs(state: Path) -> None:
    """All jobs end, if they can within Slurm's KillWait; what remains is killed with the daemons."""
    with contextlib.suppress(TestbedError):
        for user in set(_slurm(state, "squeue", "--noheader", "--format=%u").split()):
            _slurm(state, "scancel", f"--user={user}")
        end = time.monotonic() + 8
        while _slurm(state, "squeue", "--noheader", "--format=%i") and time.monotonic() < end:
            time.sleep(0.1)


# ---- programs

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def _find(name: str) -> str | None:
    return shutil.which(name, path=_PATH + ":" + os.environ.get("PATH", ""))


def _run(command: Sequence[str], env: Mapping[str, str] | None = None, seconds: float | None = None) -> subprocess.CompletedProcess[str]:
    """Output and errors together, in English; by default without the caller's variables (SLURM_, SINFO_, SACCT_...)."""
    return subprocess.run(
        command,
        env={"PATH": _PATH, "LC_ALL": "C", "HOME": "/"} if env is None else env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
        timeout=seconds,
    )


def _slurm(state: Path, name: str, *arguments: str, seconds: float = 10) -> str:
    """Slurm's own commands would wait longer for a daemon that just died."""
    program = _find(name)
    if program is None:
        raise TestbedError(f"{name} is not installed")
    env = {"PATH": _PATH, "LC_ALL": "C", "HOME": "/", "SLURM_CONF": str(state / "etc" / "slurm.conf")}
    try:
        done = _run([program, *arguments], env, seconds)
    except subprocess.TimeoutExpired:
        raise TestbedError(f"{name} {' '.join(arguments)}: no answer within {seconds:.0f} s") from None
    if done.returncode != 0:
        raise TestbedError(f"{name} {' '.join(arguments)}: {done.stdout.strip()}")
    return done.stdout


def _tail(text: str) -> str:
    return "\n".join(text.splitlines()[-15:])


def _versions() -> dict[str, str]:
    commands = {"slurm": ("slurmctld", "-V"), "munge": ("munged", "--version"), "mariadb": ("mariadbd", "--version")}
    return {name: version for name, command in commands.items() if (version := _version(*command))}


def _version(program: str, option: str) -> str:
    """Empty if it is not installed."""
    path = _find(program)
    found = re.search(r"\d+(\.\d+)+", _run([path, option]).stdout) if path else None
    return found.group() if found else ""


def _tools(progress: Callable[[str], None]) -> dict[str, str]:
    """The path of every program needed, installed first where that is possible."""
    _remove_stale_policy()
    found = {name: _find(name) for name in _PACKAGES}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        _install(missing, progress)
        found = {name: _find(name) for name in _PACKAGES}
    if absent := [name for name, path in found.items() if path is None]:
        raise TestbedError(f"still missing after the installation: {', '.join(absent)}")
    return {name: path for name, path in found.items() if path is not None}


def _install(missing: Sequence[str], progress: Callable[[str], None]) -> None:
    packages = sorted({_PACKAGES[name] for name in missing})
    apt = _find("apt-get")
    advice = f"apt-get install --no-install-recommends {' '.join(packages)}"
    problem = f"missing programs: {', '.join(missing)}"
    if apt is None:
        raise TestbedError(f"{problem}. There is no apt-get here: install Slurm with slurmdbd, munge, MariaDB yourself")
    if found := [path for path in ("/etc/slurm/slurm.conf", "/etc/slurm-llnl/slurm.conf") if Path(path).exists()]:
        raise TestbedError(f"{problem}. {found[0]} says that a Slurm is in use here, so install them yourself: {advice}")
    progress(f"installing {' '.join(packages)}")
    env = {**os.environ, "PATH": _PATH, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive", "NEEDRESTART_SUSPEND": "1"}
    options = ["-y", "-q", "-o", "DPkg::Lock::Timeout=120", "-o", "Dpkg::Options::=--force-confold"]
    command = [apt, "install", "--no-install-recommends", *options, *packages]
    before = {name for name in _SERVICES if Path(f"/etc/init.d/{name}").exists()}
    with _no_services():
        done = _run(command, env)
        if done.returncode != 0 and "dpkg --configure -a" in done.stdout:
            progress("finishing an interrupted installation")
            _run(["dpkg", "--force-confold", "--configure", "-a"], env)
            done = _run(command, env)
        if done.returncode != 0 and re.search(r"Unable to locate|no installation candidate|to fetch", done.stdout):
            progress("apt-get update")
            _run([apt, "update", "-q"], env)
            done = _run(command, env)
        for name in _SERVICES:
            if name not in before and Path(f"/etc/init.d/{name}").exists():
                _run(["service", name, "stop"])  # a policy-rc.d that was here before may have let it start
                _run(["update-rc.d", name, "disable"])
    if done.returncode != 0:
        raise TestbedError(f"{problem}, and this failed: {advice}\n{_tail(done.stdout)}")


@contextlib.contextmanager
def _no_services() -> Iterator[None]:
    """Debian's packages ask policy-rc.d whether they may start services: no, as long as this process lives.

    One that exists stays. Ours allows everything, and removes itself, when asked after the death of its maker.
    """
    me = _process(os.getpid())
    assert me is not None
    script = f"""#!/bin/sh
{_POLICY_MARK}: no service starts while process {me.pid} installs packages.
born=$(sed 's/.*) //' /proc/{me.pid}/stat 2>/dev/null | cut -d' ' -f20)
[ "$born" = {me.start_ticks} ] && exit 101
rm -f "$0"
exit 0
"""
    try:
        fd = os.open(_POLICY, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o755)
    except FileExistsError:
        yield
        return
    try:
        with os.fdopen(fd, "w") as file:
            file.write(script)
            os.fchmod(file.fileno(), 0o755)
        yield
    finally:
        _POLICY.unlink(missing_ok=True)


def _remove_stale_policy() -> None:
    """Ours, of a process that was killed while it installed."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        found = re.search(rf"{_POLICY_MARK}.* process (\d+) ", _POLICY.read_text())
        if found and _process(int(found.group(1))) is None:
            _POLICY.unlink()
