"""Options and fixtures of the whole suite. `--slurm` is the consent to install and start a real Slurm on this machine, and to install
a Chromium beside it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slurm", action="store_true", help="run the tests on a real Slurm; installs and starts it where that can be done")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Quick tests first; those on Slurm last, and left out without the flag."""
    items.sort(key=lambda item: item.get_closest_marker("slurm") is not None)
    if not config.getoption("--slurm"):
        for item in items:
            if item.get_closest_marker("slurm"):
                item.add_marker(pytest.mark.skip(reason="needs --slurm: a real Slurm is installed and started"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n`: the tests on Slurm share one testbed and run one after the other, from the start and in one process. They wait more
    than they compute; the others run beside them."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            if nodeid.startswith("tests/equissl/test_distributed.py"):  # its fixture takes minutes: once, not in each process
                return "distributed"
            # the browser's tests too: both may install packages, and two installations get into each other's way
            return "slurm" if nodeid.startswith(("tests/slurm/", "tests/hpc/test_browser.py")) else nodeid

    return Scheduling(config, log)


MENDED: list[str] = []  # what had to be mended at the testbed


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Of one of several processes: handed to the one that shows the summary."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["mended"] = MENDED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    MENDED.extend(getattr(node, "workeroutput", {}).get("mended", []))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if MENDED:
        terminalreporter.section("the testbed was mended")
        for text in MENDED:
            terminalreporter.write_line(text)


@pytest.fixture(autouse=True)
def _own_places(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test reads or writes the user's own configuration, caches or runs, nor leaves to the next what a command called in this
    process sets for its own: umask and module path."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.getbasetemp() / "config"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    for name in ("EQUIHPC_RUNS", "SLURM_JOB_ID", "SLURM_CONF", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    umask = os.umask(0o022)
    yield
    os.umask(umask)


@pytest.fixture(scope="session")
def _testbed_kept_up() -> Iterator[None]:
    from hpc import testbed as module

    was_up = any(daemon["alive"] for daemon in module.status()["daemons"].values())
    found = module.up(progress=lambda text: print(text, file=sys.stderr))
    yield
    crashes = sum(path.read_text(errors="replace").count(module.CRASHED) for path in (found.state_dir / "log").glob("slurmd-*.out"))
    if crashes > 1:  # one test makes it crash
        MENDED.append(f"slurmd crashed {crashes - 1} times by itself and was started again by its keeper")
    if not was_up:
        module.down()


@pytest.fixture
def testbed(_testbed_kept_up: None) -> Any:
    """A real Slurm of four emulated nodes, whole at the start of each test. One that was up before stays up.

    Its daemons are programs that can crash: what was mended is shown at the end, with the log of the one that died.
    """
    from hpc import testbed as module

    mended: list[str] = []
    found = module.up(progress=mended.append)
    for text in mended:
        log = found.state_dir / "log" / f"{text.removeprefix('starting ')}.log"
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-40:-3]) if log.is_file() else ""
        MENDED.append(f"{text}\n{tail}")
    return found


CHROMIUM = ("chromium-headless-shell", "chromium", "google-chrome", "chromium-browser")


@pytest.fixture(scope="session")
def chromium(request: pytest.FixtureRequest) -> str:
    """The path of a Chromium; with `--slurm` Debian's is installed where there is none."""
    found = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if found is None and request.config.getoption("--slurm"):
        apt = ["apt-get", "-q", "-y", "-o", "DPkg::Lock::Timeout=600"]
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update"], ["install", "--no-install-recommends", CHROMIUM[0]]):
            done = subprocess.run([*apt, *command], env=environment, capture_output=True, text=True, timeout=500)
        if "Unable to locate" in done.stdout + done.stderr and platform.freedesktop_os_release()["ID"] != "debian":
            pytest.skip(f"only Debian has a package {CHROMIUM[0]}: install a Chromium")  # Ubuntu's is a snap
        assert done.returncode == 0, done.stdout + done.stderr
        found = shutil.which(CHROMIUM[0])
        assert found, f"{CHROMIUM[0]} was installed and is not there"
    if found is None:
        pytest.skip("no Chromium here: apt-get install chromium-headless-shell, or --slurm, which installs it")
    return found


@pytest.fixture
def equihpc(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the command in an empty folder, as a person would."""

    def run(*arguments: str, timeout: float = 120, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "hpc.cli", *arguments],
            cwd=tmp_path,
            env={**os.environ, "COLUMNS": "200", **(env or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )

    return run


TOY = '''
"""An entry for tests of the orchestration: counts steps, saves when asked to stop, fails or dies where it is told."""
import json, os, signal, time
from pathlib import Path
from pydantic import BaseModel, ConfigDict, Field

class Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    steps: int = Field(5, ge=1)
    seconds: float = Field(0.02, json_schema_extra={"operational": True})
    value: float = 1.0
    seed: int = 0
    upstream: str | None = None
    fail_at: int | None = None
    kill_at: int | None = None
    hang_at: int | None = None
    silent_seconds: float = 0.0
    data: str | None = Field(None, json_schema_extra={"data": True})
    later: int = Field(7, json_schema_extra={"neutral": 7})
    def check(self, world_size, upstream_configs):
        if self.steps % world_size and self.steps > 1000:
            raise ValueError(f"steps {self.steps} is not a multiple of {world_size} processes")

def main(config, run_dir, stop):
    rank = int(os.environ["RANK"])
    saved = sorted(run_dir.glob("checkpoints/step_*/state.json"), key=lambda path: json.loads(path.read_text())["step"])
    at = json.loads(saved[-1].read_text()) if saved else {"step": 0, "x": 0.0}
    print(f"from step {at['step']} of {config['steps']}, world {os.environ['WORLD_SIZE']}", flush=True)
    first = run_dir / "been_here"
    if config["silent_seconds"] and not first.exists() and rank == 0:
        first.touch()
        time.sleep(config["silent_seconds"])
    while at["step"] < config["steps"]:
        time.sleep(config["seconds"])
        at["step"] += 1
        at["x"] += config["value"] * at["step"] + config["seed"]
        if config["fail_at"] == at["step"]:
            raise RuntimeError(f"boom at step {at['step']}")
        if config["kill_at"] == at["step"] and not first.exists() and rank == 0:
            first.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if config["hang_at"] == at["step"] and not first.exists() and rank == 0:
            first.touch()
            time.sleep(1000)
        if rank == 0:
            temporary = run_dir / ".progress"
            temporary.write_text(json.dumps({"step": at["step"], "num_steps": config["steps"], "loss": at["x"], "time": time.time()}))
            os.replace(temporary, run_dir / "progress.json")
        if stop():
            if rank == 0:
                folder = run_dir / "checkpoints" / f"step_{at['step']}"
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "state.json").write_text(json.dumps(at))
            return None
    return {"metrics": {"toy/x": at["x"]}, "weights_sha256": str(at["x"])}
'''


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which `toy.py` is an entry and job files are written."""
    (tmp_path / "toy.py").write_text(TOY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    from hpc import entries

    entries.load.cache_clear()
    sys.modules.pop("toy", None)
    return tmp_path
