"""The long campaign: many injected faults on the testbed, as the tables of `RESULTS.md`. Needs root, as the testbed does.

    python tests/benchmarks/faults.py [--rehearsals 6] [--runs 8] [--pretraining] [--hold]

Each rehearsal draws every fault of the testbed once. Slurm's hold of requeued jobs is set to 5 s; `--hold` measures what its
default of 120 s does, `--pretraining` rehearses the quickstart's training in small.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
TOOLS = ("sbatch", "squeue", "scontrol", "scancel", "sacct", "sinfo", "srun")

ENTRY = '''
"""An entry that a lost or doubled step changes for good: each step's value is a hash of the one before.

The ranks go in step and agree on when to stop, over sockets. Checkpoints every so many steps, each with a checksum; rank 0
writes. `careless`: a resume skips a step.
"""
import hashlib, json, logging, os, socket, time
from pathlib import Path
from pydantic import BaseModel, ConfigDict, Field

log = logging.getLogger(__name__)

class Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    steps: int = Field(40, ge=1)
    checkpoint_every: int = Field(10, ge=1)
    keep: int = 3
    value: int = 0
    seconds: float = Field(0.05, json_schema_extra={"operational": True})
    careless: bool = Field(False, json_schema_extra={"operational": True})
    upstream: str | None = None
    def check(self, world_size, upstream_configs):
        pass

def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()

def number(path):
    return int(path.name.partition("_")[2])

def load(folder):
    """(step, value) of the newest checkpoint that is what its checksum says."""
    for path in sorted(folder.glob("step_*"), key=number, reverse=True):
        try:
            state = (path / "state").read_text()
            if (path / "checksum").read_text() == digest(state):
                return number(path), json.loads(state)["value"]
        except (OSError, ValueError):
            pass
        log.warning("%s cannot be used; trying the one before", path)
    return 0, ""

def save(folder, step, value, keep):
    path = folder / f"step_{step}"
    path.mkdir(parents=True, exist_ok=True)
    (path / "checksum").unlink(missing_ok=True)
    state = json.dumps({"step": step, "value": value, "padding": "x" * 2000})
    (path / "state").write_text(state)
    (path / "checksum").write_text(digest(state))
    for old in sorted(folder.glob("step_*"), key=number)[:-keep]:
        (old / "checksum").unlink(missing_ok=True)
        (old / "state").unlink(missing_ok=True)
        old.rmdir()

class Ranks:
    """`any_of(flag)` is a collective: it blocks while a rank does, and raises where one has gone."""

    def __init__(self):
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.is_first, self.others = rank == 0, []
        if self.is_first:
            with socket.create_server(place, backlog=size) as server:
                self.others = [server.accept()[0] for _ in range(size - 1)]
        while not self.is_first and not self.others:
            try:
                self.others = [socket.create_connection(place)]
            except ConnectionRefusedError:
                time.sleep(0.05)

    def any_of(self, flag):
        if self.is_first:
            flag = max([flag, *map(receive, self.others)])
        for other in self.others:
            other.sendall(bytes([flag]))
        return bool(flag if self.is_first else receive(self.others[0]))

def receive(other):
    found = other.recv(1)
    if not found:
        raise ConnectionError("another rank has gone")
    return found[0]

def main(config, run_dir, stop):
    ranks = Ranks()
    is_first = ranks.is_first
    folder, metrics = run_dir / "checkpoints", run_dir / "metrics.jsonl"
    saves = config["upstream"] is None
    step, value = load(folder) if saves else (0, str(config["upstream"] is None))
    if is_first and metrics.exists():
        lines = [line for line in metrics.read_text().splitlines() if line.endswith("}") and json.loads(line)["step"] <= step]
        temporary = run_dir / ".metrics"
        temporary.write_text("".join(line + "\\n" for line in lines))
        os.replace(temporary, metrics)
    if step and config["careless"]:
        step += 1
    while step < config["steps"]:
        time.sleep(config["seconds"])
        step += 1
        value = digest(f"{value} {step} {config['value']}")
        if is_first:
            with open(metrics, "a") as file:
                file.write(json.dumps({"step": step, "loss": int(value[:8], 16) / 2**32}) + "\\n")
            temporary = run_dir / ".progress"
            temporary.write_text(json.dumps({"step": step, "num_steps": config["steps"], "time": time.time()}))
            os.replace(temporary, run_dir / "progress.json")
        asked = ranks.any_of(stop())
        if is_first and saves and (asked or step % config["checkpoint_every"] == 0):
            save(folder, step, value, config["keep"])
        if asked and step < config["steps"]:
            return None
    ranks.any_of(False)
    return {"metrics": {"drill/value": int(value[:8], 16) / 2**32}, "weights_sha256": value}
'''
JOB = """
stages:
  train:
    entry: drill_entry
    resources: {nodes: 2, gpus_per_node: 1, hours: 1}
    config: {steps: %(steps)d, seconds: %(seconds)g, checkpoint_every: %(every)d}
    sweep: {grid: {value: [%(values)s]}}
  evaluate:
    entry: drill_entry
    after: train
    resources: {gpus: 1, hours: 1}
    config: {steps: %(evaluation_steps)d, seconds: %(seconds)g, upstream: "${train}"}
"""


def write_job(
    folder: Path, num_runs: int = 4, steps: int = 100, seconds: float = 0.05, every: int = 10, evaluation_steps: int = 40
) -> Path:
    """The entry and a job file of `num_runs` trainings over two nodes and an evaluation of each; returns the file."""
    (folder / "drill_entry.py").write_text(ENTRY)
    values = ", ".join(map(str, range(num_runs)))
    text = JOB % {"steps": steps, "seconds": seconds, "every": every, "values": values, "evaluation_steps": evaluation_steps}
    (folder / "job.yaml").write_text(text)
    return folder / "job.yaml"


def equihpc(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, "-m", "hpc.cli", *arguments], cwd=folder, env=env, stdout=subprocess.PIPE, text=True)


def rehearse(folder: Path, file: Path, *options: str) -> dict[str, Any]:
    """The verdict; the live view goes to standard error."""
    command = ("rehearse", str(file), "--cluster", "testbed", "--variant", "none", "--node-hours", "100", "--json", *options)
    verdict: dict[str, Any] = json.loads(equihpc(folder, *command).stdout)
    print(f"{verdict['folder']}: ok {verdict['ok']}", *verdict["differences"], sep="\n  ", file=sys.stderr, flush=True)
    for hit in verdict["hits"]:
        if hit["problem"]:
            print(f"  {hit['fault']} -> {hit['run']}: {hit['problem']}", file=sys.stderr, flush=True)
    return verdict


def table(verdicts: list[dict[str, Any]]) -> None:
    hits = [(hit, verdict) for verdict in verdicts for hit in verdict["hits"]]
    print("\n| fault | count | survived | evaluations early or twice | lost steps at most | s from requeue to the next step (median) |")
    print("|---|---|---|---|---|---|")
    for name in sorted({hit["fault"] for hit, _ in hits}):
        mine = [(hit, verdict) for hit, verdict in hits if hit["fault"] == name]
        wrong = sum(early_or_twice(verdict, hit["run"]) for hit, verdict in mine)
        lost = [hit["lost_steps"] for hit, _ in mine if hit["lost_steps"] is not None]
        seconds = [hit["seconds_from_end"] for hit, _ in mine if hit["seconds_from_end"] is not None]
        cells = (name, len(mine), sum(hit["survived"] for hit, _ in mine), wrong, max(lost, default="–"))
        print("|", " | ".join(map(str, cells)), "|", f"{statistics.median(seconds):.1f} |" if seconds else "– |")
    wrong = sum(early_or_twice(verdict) for verdict in verdicts)
    accidents = Counter(name for verdict in verdicts for name in verdict["accidents"])
    others = sum(len(verdict["differences"]) for verdict in verdicts) - wrong
    num_runs = sum(verdict["num_runs"] for verdict in verdicts)
    print(f"\n{len(hits)} faults, {sum(hit['survived'] for hit, _ in hits)} survived; {num_runs} runs: {wrong} early or twice, ", end="")
    print(f"{others} other differences; daemons of Slurm that crashed by themselves: {dict(accidents) or 'none'}", flush=True)


def early_or_twice(verdict: dict[str, Any], run: str = "") -> int:
    """Findings that name this run; of the submission all."""
    found = [text for text in verdict["differences"] if "began before" in text or "came to its end" in text]
    return sum(run in text or run == "job" for text in found)


# --- Slurm calls -------------------------------------------------------------------------------------------------------


def counted(folder: Path) -> tuple[str, Callable[[], Counter[str]]]:
    """(a PATH whose Slurm commands count their calls, the counts so far by place and command)."""
    tools, calls = folder / "counted", folder / "calls"
    tools.mkdir()
    for tool in TOOLS:
        real = shutil.which(tool)
        words = f'echo "${{SLURM_JOB_ID:+node }}{tool}" $(printf "%s" "$1" | grep -E "^[a-z]+$") >> {calls}'
        (tools / tool).write_text(f'#!/bin/sh\n{words}\nexec {real} "$@"\n')
        (tools / tool).chmod(0o755)
    return f"{tools}{os.pathsep}{os.environ['PATH']}", lambda: Counter(calls.read_text().splitlines())


def wait_for(what: Callable[[], bool], seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.1)


def preempt_all(slurm_conf: str) -> None:
    options = ["--partition=urgent", "--nodes=4", "--exclusive", "--time=1", "--output=/dev/null", "--wrap=sleep 1"]
    subprocess.run(["sbatch", *options], env={**os.environ, "SLURM_CONF": slurm_conf}, check=True, capture_output=True)


def calls_per_run(folder: Path, num_runs: int, slurm_conf: str) -> None:
    """Undisturbed, and preempted once; nobody watches but one `status` that lets the requeued go on."""
    for what in ("undisturbed", "preempted once"):
        place = folder / what.replace(" ", "_")
        place.mkdir()
        write_job(place, num_runs)
        path, count = counted(place)
        equihpc(place, "submit", "job.yaml", "--cluster", "testbed", PATH=path)
        wait_for(lambda place=place: len(list(place.glob("runs/job/train/*/progress.json"))) == num_runs)  # type: ignore[misc]
        if what != "undisturbed":
            preempt_all(slurm_conf)
            wait_for(
                lambda place=place: sum("preempted" in a.read_text() for a in place.glob("runs/job/train/*/attempts.jsonl")) == num_runs
            )  # type: ignore[misc]
            time.sleep(8)
            equihpc(place, "status", "job", "--json", PATH=path)
        wait_for(lambda place=place: len(list(place.glob("runs/job/*/*/COMPLETE"))) == 2 * num_runs)  # type: ignore[misc]
        time.sleep(3)
        found = count()
        each = found.total() / num_runs / 2
        print(f"\nSlurm calls of {num_runs} trainings and their evaluations, {what}: {found.total()}, {each:.1f} per run")
        for name, number in sorted(found.items()):
            print(f"- {name}: {number}")


# --- the hold of requeued jobs -----------------------------------------------------------------------------------------


def hold(folder: Path, slurm_conf: str) -> None:
    """From the end of a preempted attempt to the next step, with and without a live equihpc process that lifts the hold."""
    for who in ("submit --wait", "nobody"):
        place = folder / who.replace(" ", "_")
        place.mkdir()
        write_job(place, 1, steps=200)
        equihpc(place, "submit", "job.yaml", "--cluster", "testbed")
        wait_for(lambda place=place: bool(list(place.glob("runs/job/train/*/progress.json"))))  # type: ignore[misc]
        preempt_all(slurm_conf)
        if who != "nobody":
            equihpc(place, "submit", "job.yaml", "--cluster", "testbed", "--wait")
        wait_for(lambda place=place: bool(list(place.glob("runs/job/train/*/COMPLETE"))))  # type: ignore[misc]
        records = [json.loads(line) for line in next(place.glob("runs/job/train/*/attempts.jsonl")).read_text().splitlines()]
        end = next(record["time"] for record in records if record["event"] == "end")
        start = next(record["time"] for record in records if record["event"] == "start" and record["attempt"] == 2)
        print(f"Slurm's hold of 120 s, {who} watching: {start - end:.0f} s from the end of an attempt to the next one", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearsals", type=int, default=6)
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--pretraining", action="store_true")
    parser.add_argument("--hold", action="store_true")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from hpc import faults, testbed

    was_up = testbed.status()["up"]
    found = testbed.up(progress=lambda text: print(text, file=sys.stderr), requeue_hold_seconds=5)
    slurm_conf, possible = str(found.slurm_conf), sum(faults.TESTBED in fault.places for fault in faults.CATALOGUE)
    base = Path(tempfile.mkdtemp(prefix="faults-", dir="/var/tmp"))
    try:
        verdicts = []
        file = write_job(base, arguments.runs, steps=500, evaluation_steps=80)
        for seed in range(arguments.first_seed, arguments.first_seed + arguments.rehearsals):
            verdicts.append(rehearse(base, file, "--faults", str(possible), "--seed", str(seed), "--hang-seconds", "6"))
            table(verdicts)
        if arguments.pretraining:
            sets = ("pretrain.num_steps=40", "pretrain.log_every=1", "pretrain.checkpoint_every=10", "pretrain.picture_every=40")
            sets = (*sets, "prepare.train_patches=24", "prepare.val_patches=8")
            names = ("preempted", "rank-killed", "rank-stopped", "checkpoint-truncated", "step-killed")
            options = [word for text in sets for word in ("--set", text)] + [word for name in names for word in ("--only", name)]
            verdicts.append(rehearse(base, ROOT / "jobs/quickstart.yaml", "--faults", "5", "--hang-seconds", "20", *options))
            table(verdicts[-1:])
        calls_per_run(base, arguments.runs, slurm_conf)
        if arguments.hold:
            testbed.up(requeue_hold_seconds=testbed.REQUEUE_HOLD_SECONDS)
            hold(base, slurm_conf)
        if all(verdict["ok"] for verdict in verdicts):
            shutil.rmtree(base)
    finally:
        if not was_up:
            testbed.down()


if __name__ == "__main__":
    main()
