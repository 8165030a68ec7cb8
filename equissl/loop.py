"""The training loop. Nothing in it knows a method, an architecture or a cluster."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from equissl import distributed, guards, methods, optim, published, schedules
from equissl.auxiliary import Auxiliary
from equissl.checkpoint import Checkpoints
from equissl.config import PretrainConfig
from equissl.data import source
from equissl.distributed import Agreement, World
from equissl.encoder import WEIGHTS, exported
from equissl.export import HEADS, heads_of
from equissl.files import write_atomic, write_json
from equissl.logs import Late, Logs
from equissl.methods import Timeline
from equissl.monitor import Monitor
from equissl.progress import Stopped
from equissl.trace import traced
from equissl.views import MakeViews

log = logging.getLogger(__name__)

BEGAN_WITH = "began_with.json"  # which published weights: a run that goes on does not need the file


def train(config: PretrainConfig, run_dir: Path, stop: Callable[[], bool]) -> dict[str, Any] | None:
    """Pretrain from the newest checkpoint on. On rank 0 the result, on others {}; on all None where `stop` asked for an end.

    Raises ValueError for a config that does not fit the data or the number of processes, FloatingPointError where an update
    would not have been finite.
    """
    guards.record_collectives(run_dir)
    world = distributed.init(config)
    try:
        guards.limit_waiting(config.startup_timeout_s, world)
        config.check(world.world_size, {})
        with ExitStack() as cleanup:
            return _train(config, run_dir, stop, world, cleanup)
    except Stopped:  # before the first step: there is nothing to save
        return None
    finally:
        distributed.close()


def _train(config: PretrainConfig, run_dir: Path, stop: Callable[[], bool], world: World, cleanup: ExitStack) -> dict[str, Any] | None:
    data = source.open_source(config, world, stop, cleanup)
    timeline = Timeline(config.total_steps(data.num_images), config.steps_per_epoch(data.num_images))
    num_steps, recipe = timeline.num_steps, config.method.optimizer
    checkpoints = Checkpoints(run_dir / "checkpoints", config.keep_checkpoints, world, config.milestone_every)
    cleanup.callback(checkpoints.close)
    start = checkpoints.newest()
    batches = data.loader(world.rank, world.world_size, start, num_steps)  # workers start while the model is built
    cleanup.callback(batches.close)

    make_views = MakeViews(config, world.device)
    method = methods.get(config, world, timeline)
    auxiliary = Auxiliary(config, world) if config.auxiliary else None
    parameters = method.parameters_by_name() | (auxiliary.parameters_by_name() if auxiliary else {})
    optimizer = optim.get(parameters, recipe, world)
    monitor = Monitor(config, world, num_steps, data.num_images, data.num_classes)

    def state() -> dict[str, Tensor]:
        """Asked for anew each time: FSDP moves shards that cannot be divided evenly at the first forward (always in torch 2.9)."""
        return method.state() | (auxiliary.state() if auxiliary else {}) | optimizer.state() | monitor.state()

    if start:
        checkpoints.load(start, state())
    else:
        if config.backbone.weights and world.rank == 0:
            write_json(run_dir / BEGAN_WITH, published.described(config.backbone.weights))
        method.initialise()
        if auxiliary:
            auxiliary.initialise()

    logs = Logs(run_dir, start, timeline, config, world, lambda: batches.waited_s) if world.rank == 0 else None
    if logs:
        cleanup.callback(logs.close)
    late = Late(logs, {"reconstruction": auxiliary.weight} if auxiliary else {}, run_dir, world.rank, data.keys)
    profile = cleanup.enter_context(traced(config.profile_steps if world.rank == 0 else None, run_dir, start))
    collect = cleanup.enter_context(guards.garbage_collected_by_hand())
    agreement = Agreement(world)
    may_write = config.checkpoint_every // 10  # steps that a save may take; few steps are too short to write behind them
    save_every = config.checkpoint_every - may_write
    log.info("%s: steps %d to %d on %d %s ranks", data.name, start, num_steps, world.world_size, world.device.type)

    for step in range(start, num_steps):
        lr = schedules.warmup_cosine(step, num_steps, timeline.steps(recipe.warmup_epochs), recipe.lr(config.batch), recipe.final_lr)
        weight_decay = schedules.cosine(step, num_steps, *recipe.weight_decay)
        batch = next(batches)
        views = make_views(batch)

        of_parts, watched = [], []
        for part, some in enumerate(views.split(config.accumulate)):
            output = method.step(some, step, part)
            terms, objective = dict(output.terms), torch.stack(list(output.terms.values())).sum()
            reconstructions = []
            if auxiliary:
                assert output.equi is not None
                assert some.targets is not None
                terms["reconstruction"], reconstructions = auxiliary(output.equi, some.targets)
                objective = objective + auxiliary.objective_weight * terms["reconstruction"]
            distributed.reduce_over_replicas(world, now=part + 1 == config.accumulate)
            (objective / config.accumulate).backward()
            of_parts.append(terms)
            watched.append(output.watched)
        terms = {name: torch.stack([each[name].detach() for each in of_parts]).mean() for name in terms}

        report = optimizer.step(step, lr, weight_decay, terms, method.frozen(step))
        method.after_update(step, report.applied)
        scheduled = {"lr": lr, "weight_decay": weight_decay, "checkpoint_wait_s": checkpoints.waited_s, **method.numbers(step)}
        late.put(step + 1, batch, report, scheduled, monitor.observe(step + 1, watched, batch))
        if step == start + 1:  # the first one's numbers have been read: all ranks are through with it
            guards.limit_waiting(config.step_timeout_s, world)
        is_last = step + 1 == num_steps
        if logs and (is_last or (step + 1) % config.picture_every == 0):
            logs.pictures(step + 1, some, reconstructions)

        stopping = agreement.exchange(stop() or batches.has_failed() or checkpoints.has_failed())
        saves = stopping or is_last or (step + 1) % save_every == 0 or checkpoints.is_milestone(step + 1)
        if saves:
            late.read()  # raises where the update was refused: that is not saved
            with checkpoints.waiting():
                late.flush()
            checkpoints.save(step + 1, state(), behind=may_write > 0 and not (stopping or is_last))
        elif (step + 1) % save_every == may_write:
            checkpoints.wait()  # or more than `checkpoint_every` steps could be lost
        collect(step + 1, saves)
        profile()
        if stopping and not is_last:
            agreement.finish()
            distributed.barrier(world)
            batches.raise_error()  # this rank's data are the reason, and all have saved
            return None

    agreement.finish()
    weights_sha256 = _export(exported(method.teacher), run_dir / WEIGHTS, world)
    heads_sha256 = _export(heads_of(method.state()), run_dir / HEADS, world)
    distributed.barrier(world)
    if logs is None:
        return {}
    metrics = {name: logs.last[name] for name in ("loss", *method.terms, *(("reconstruction",) if auxiliary else ()))}
    if "knn_top1" in logs.last:
        metrics["knn_top1"] = logs.last["knn_top1"]
    if (speed := logs.images_per_s()) is not None:
        metrics["images_per_s"] = speed
    return {
        "metrics": {f"pretrain/{name}": value for name, value in metrics.items()},
        "final_loss": logs.last["loss"],
        "num_steps": num_steps,
        "weights_sha256": weights_sha256,
        "heads_sha256": heads_sha256,
        **({"began_with": json.loads((run_dir / BEGAN_WITH).read_text())} if (run_dir / BEGAN_WITH).is_file() else {}),
        "world_size": world.world_size,
        "device": world.device.type,
        "data": {"name": data.name, "manifest_sha256": data.manifest_sha256},
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "timm", "numpy")},
    }


def _export(tensors: Mapping[str, Tensor], path: Path, world: World) -> str:
    """Write whole tensors as float32 safetensors; collective. Returns the file's sha256."""
    wholes = {}
    for name, tensor in tensors.items():
        whole = distributed.full(tensor)
        if world.rank == 0:
            wholes[name] = whole.float().cpu().contiguous()
    if world.rank:
        return ""
    content = safetensors.torch.save(wholes)
    write_atomic(path, content)
    return hashlib.sha256(content).hexdigest()
