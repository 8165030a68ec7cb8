"""How fast a pretraining is on this machine, and where the time goes; `equihpc bench FILE` calls it.

    python -m equissl.bench config.json [--steps N] [--input synthetic|real|both] [--scratch FOLDER] [--json]
    torchrun --nproc-per-node 4 -m equissl.bench config.json …

The trainer's own objects work through a few steps: on noise, which is on the device already, and on the config's data. Nothing is left
behind. The parts of a step are timed on the device's own clock, and no part waits for another that would not wait in training. Exit
codes: 0 done; 2 bad input, one message; 1 anything else.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor

from equissl import distributed, guards, methods, optim
from equissl.auxiliary import Auxiliary
from equissl.checkpoint import Checkpoints
from equissl.compiled import wants_compilation
from equissl.config import SYNTHETIC, PretrainConfig, is_stream
from equissl.data import source
from equissl.data.shards import find
from equissl.distributed import World
from equissl.estimates import pretraining_flops
from equissl.logs import Logs, forget_peak, memory_bytes, peak_flops
from equissl.methods import Timeline
from equissl.optim import Report
from equissl.views import MakeViews, Views

WARM_UP = 3  # steps: the first compiles, the second fills the allocator's pools
PHASES = ("data", "views", "forward", "backward", "optimizer", "ema")
LR, WEIGHT_DECAY = 1e-6, 0.04  # small: the model must stay finite


class Trainer:
    """What the loop puts together; a step as in `loop`, without logs and monitors."""

    def __init__(self, config: PretrainConfig, world: World) -> None:
        assert config.num_steps is not None
        self.config, self.world = config, world
        self.make_views = MakeViews(config, world.device)
        self.method = methods.get(config, world, Timeline(config.num_steps, config.num_steps))
        self.auxiliary = Auxiliary(config, world) if config.auxiliary else None
        parameters = self.method.parameters_by_name() | (self.auxiliary.parameters_by_name() if self.auxiliary else {})
        self.optimizer = optim.get(parameters, config.method.optimizer, world)
        self.method.initialise()
        if self.auxiliary:
            self.auxiliary.initialise()

    def state(self) -> dict[str, Tensor]:
        return self.method.state() | (self.auxiliary.state() if self.auxiliary else {}) | self.optimizer.state()

    def update(self, step: int, views: Views, mark: Callable[[str], None]) -> Report:
        """`mark` is called at the end of each phase."""
        parts = self.config.accumulate
        for part, some in enumerate(views.split(parts)):
            output = self.method.step(some, step, part)
            terms, objective = dict(output.terms), torch.stack(list(output.terms.values())).sum()
            if self.auxiliary:
                assert output.equi is not None
                assert some.targets is not None
                terms["reconstruction"] = self.auxiliary(output.equi, some.targets).term
                objective = objective + self.auxiliary.objective_weight * terms["reconstruction"]
            mark("forward")
            distributed.reduce_over_replicas(self.world, now=part + 1 == parts)
            (objective / parts).backward()
            mark("backward")
        report = self.optimizer.step(step, LR, WEIGHT_DECAY, terms, self.method.frozen(step))
        mark("optimizer")
        self.method.after_update(step, report.applied)
        mark("ema")
        return report


class Stopwatch:
    """Seconds between marks, by phase, on the device's clock: the host does not wait for the device."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []

    def mark(self, phase: str) -> None:
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((phase, event))
        else:
            self._marks.append((phase, time.perf_counter()))

    def seconds(self) -> dict[str, float]:
        """Totals of the phases that were marked, after the first mark. The device must be through with all of them."""
        totals = dict.fromkeys(PHASES, 0.0)
        for (_, begin), (phase, end) in zip(self._marks, self._marks[1:], strict=False):
            totals[phase] += begin.elapsed_time(end) / 1000 if self._on_gpu else end - begin
        return totals


def bench(config: PretrainConfig, world: World, steps: int, inputs: list[str], scratch: Path) -> dict[str, Any]:
    """Figures of `steps` steps on each of `inputs` (synthetic, real), and of a checkpoint in `scratch`. Collective.

    Raises ValueError for data that are missing or damaged.
    """
    assert steps >= 1
    config = _of(config, config.data, (WARM_UP + steps) * len(inputs))
    config.check(world.world_size, {})
    trainer = Trainer(config, world)
    student, teacher = pretraining_flops(config)
    flops, peak = 3 * student + teacher, peak_flops(world.device)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "world_size": world.world_size,
        "batch": config.batch,
        "steps": steps,
        "precision": str(world.compute_dtype).removeprefix("torch."),
        "flops_per_image": flops,
        "peak_flops": peak,
        "inputs": {},
    }
    for number, name in enumerate(inputs):
        settings = config if name == "real" else _of(config, SYNTHETIC, config.num_steps)
        seconds, phases = _timed(trainer, settings, number * (WARM_UP + steps), steps)
        rate = flops * config.batch * steps / seconds
        result["inputs"][name] = {
            "images_per_s": config.batch * steps / seconds,
            "seconds_per_step": seconds / steps,
            "flops_per_s": rate,  # of all ranks
            "mfu": rate / (peak * world.world_size) if peak else None,
            "memory_bytes": memory_bytes(world.device),
            "phases": {phase: total / steps for phase, total in phases.items()},
        }
    result["checkpoint"] = _checkpoint(trainer, scratch)
    fell_back = distributed.any_of(world.compiler.has_failed, world, lambda: None)
    result["compiled"] = wants_compilation(config, world.device) and not fell_back  # on all ranks
    return result


def _of(config: PretrainConfig, data: str, num_steps: int | None) -> PretrainConfig:
    """The same pretraining of so many steps, on other data."""
    values = config.model_dump(mode="json", by_alias=True) | {"data": data, "epochs": None, "num_steps": num_steps}
    if data == SYNTHETIC:
        values |= {"stage": None, "pipeline": "fast", "stream_images": None}
    return PretrainConfig.model_validate(values)


def _timed(trainer: Trainer, config: PretrainConfig, first: int, steps: int) -> tuple[float, dict[str, float]]:
    """Seconds of the steps after the warm-up, and of their phases.

    Raises FloatingPointError with the number of the step on these data, from 1 on, whose update was refused.
    """
    world = trainer.world
    with ExitStack() as cleanup:
        data = source.open_source(config, world, lambda: False, cleanup)
        ahead = 2 * config.num_workers + 2  # batches that are there before the clock starts would flatter the input
        batches = data.loader(world.rank, world.world_size, 0, WARM_UP + ahead + steps)
        cleanup.callback(batches.close)
        collect = cleanup.enter_context(guards.garbage_collected_by_hand())
        watch, began = Stopwatch(world.device), 0.0
        late: Report | None = None
        for step in range(first, first + WARM_UP + steps):
            if step == first + WARM_UP:
                for _ in range(ahead if data.name != SYNTHETIC else 0):
                    next(batches)
                _wait(world)
                forget_peak(world.device)  # compiling and choosing kernels are the first input's alone
                watch, began = Stopwatch(world.device), time.perf_counter()
                watch.mark("ema")
            batch = next(batches)
            watch.mark("data")
            views = trainer.make_views(batch)
            watch.mark("views")
            report = trainer.update(step, views, watch.mark)
            if late is not None:
                _stop_where_refused(late, step - first, data.name)  # as the loop does, one step late
            late = report
            collect(step + 1, False)
        _wait(world)
        seconds = time.perf_counter() - began
        _stop_where_refused(report, WARM_UP + steps, data.name)
        return seconds, watch.seconds()


def _stop_where_refused(report: Report, number: int, data: str) -> None:
    if refused := report.read().refused:
        raise FloatingPointError(f"step {number} on {data}: {refused}")


def _wait(world: World) -> None:
    """Until the devices of all ranks are through."""
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    distributed.barrier(world)


def _checkpoint(trainer: Trainer, scratch: Path) -> dict[str, float]:
    """Of one save: its size, how long the loop would wait for it and for the logs to be on the disk before it, and how long it took."""
    world = trainer.world
    with _shared_folder(world, scratch) as folder, ExitStack() as cleanup:
        checkpoints = Checkpoints(folder / "checkpoints", 1, world)
        cleanup.callback(checkpoints.close)
        logs = Logs(folder, 0, Timeline(1, 1), trainer.config, world, lambda: 0.0) if world.rank == 0 else None
        if logs:
            cleanup.callback(logs.close)
            logs.step(1, {"loss": 0.0})
        _wait(world)
        began = time.perf_counter()
        with checkpoints.waiting():
            if logs:
                logs.flush()
        checkpoints.save(1, trainer.state(), behind=True)
        found = {"stall_seconds": checkpoints.waited_s}
        checkpoints.wait()
        found["seconds"] = time.perf_counter() - began
        found["bytes"] = sum(path.stat().st_size for path in checkpoints.folder.rglob("*") if path.is_file())
    return found


@contextmanager
def _shared_folder(world: World, parent: Path) -> Iterator[Path]:
    """A folder that all ranks see, removed by the first when all are through with it."""
    name: list[str | None] = [tempfile.mkdtemp(prefix="equissl-bench-", dir=parent) if world.rank == 0 else None]
    dist.broadcast_object_list(name, src=0, group=world.cpu_group)
    assert name[0] is not None
    try:
        yield Path(name[0])
        distributed.barrier(world)
    finally:
        if world.rank == 0:
            shutil.rmtree(name[0])


# --- the command -----------------------------------------------------------------------------------------------------------


def show(result: dict[str, Any]) -> None:
    """As tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else int(os.environ.get("COLUMNS", 120)))
    ranks = f"{result['world_size']} × {result['device']}"
    how = "compiled" if result["compiled"] else "eager"
    console.print(f"{ranks}: batch {result['batch']}, {result['precision']}, {how}, {result['steps']} steps", markup=False)
    if result["data_problem"]:
        console.print(f"real input was not measured: {result['data_problem']}", markup=False, soft_wrap=True)
    columns = list(result["inputs"])
    speed = Table("", *(f"{name} input" for name in columns), box=None, pad_edge=False, header_style="bold")
    for column in speed.columns[1:]:
        column.justify = "right"
    found = result["inputs"]
    speed.add_row("images/s", *(f"{found[name]['images_per_s']:.1f}" for name in columns))
    speed.add_row("TFLOP/s", *(f"{found[name]['flops_per_s'] / 1e12:.3g}" for name in columns))
    if result["peak_flops"]:
        speed.add_row("MFU", *(f"{found[name]['mfu']:.1%}" for name in columns))
    speed.add_row("peak memory, GB", *(f"{found[name]['memory_bytes'] / 1e9:.2f}" for name in columns))
    speed.add_row("ms per step", *(f"{1000 * found[name]['seconds_per_step']:.1f}" for name in columns))
    for phase in PHASES:
        share = ((found[name]["phases"][phase], found[name]["seconds_per_step"]) for name in columns)
        speed.add_row(f"  {phase}", *(f"{1000 * part:.1f} ({part / whole:4.0%})" for part, whole in share))
    console.print(speed)
    saved = result["checkpoint"]
    console.print(
        f"checkpoint: {saved['bytes'] / 1e6:.1f} MB in {saved['seconds']:.2f} s, of which training waits {saved['stall_seconds']:.2f} s"
    )


def command(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m equissl.bench", description="How fast a pretraining is here.")
    parser.add_argument("config", type=Path, help="JSON file with the config of equissl.pretrain")
    parser.add_argument("--steps", type=int, default=20, help=f"steps to measure, after {WARM_UP} others")
    parser.add_argument("--input", choices=["both", "synthetic", "real"], default="both", help="noise on the device, the config's data")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="where a checkpoint is written and removed")
    parser.add_argument("--json", action="store_true", help="for scripts")
    arguments = parser.parse_args(words)
    if arguments.steps < 1:
        parser.error(f"--steps is {arguments.steps}; it must be at least 1")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    rank = int(os.environ.get("RANK", "0"))
    try:
        config = PretrainConfig.model_validate(json.loads(arguments.config.read_text()))
        wanted = {"both": ["synthetic", "real"]}.get(arguments.input, [arguments.input])
        problem = _problem(config)
        if problem and arguments.input != "synthetic":
            if arguments.input == "real":
                raise ValueError(problem)
            wanted.remove("real")
        world = distributed.init(config)
        try:
            result = bench(config, world, arguments.steps, wanted, arguments.scratch) | {"data_problem": problem}
        finally:
            distributed.close()
    except ValidationError as error:
        message = "; ".join(f"{'.'.join(map(str, each['loc'])) or 'config'}: {each['msg']}" for each in error.errors())
        return _refuse(rank, message)
    except (ValueError, FileNotFoundError, NotADirectoryError) as error:
        return _refuse(rank, str(error))
    except OSError as error:
        print(f"equihpc: {error}", file=sys.stderr)
        return 1
    if rank == 0:
        if arguments.json:
            print(json.dumps(result, indent=1, allow_nan=False))
        else:
            show(result)
    return 0


def _problem(config: PretrainConfig) -> str | None:
    """Why there is no real input."""
    if config.data == SYNTHETIC:
        return "the config's data are synthetic"
    if not is_stream(config.data):
        try:
            find(config.data)
        except ValueError as error:
            return str(error)
    return None


def _refuse(rank: int, message: str) -> int:
    if rank == 0:
        print(f"equihpc: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    os.umask(0o077)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # not without removing the checkpoint
    try:
        code = command(sys.argv[1:])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # torch 2.15 with gloo aborts now and then while the interpreter ends (SPEED, trap 4)
