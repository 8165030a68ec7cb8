"""From a job file to runs and arrays. Pure but for reading the manifests of data sets: nothing is written or submitted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ValidationError

from hpc import cluster as clusters
from hpc import entries
from hpc.cluster import Cluster, Layout
from hpc.errors import UserError
from hpc.identity import DataSets, format_of, identity, readable, run_hash, with_sha256
from hpc.messages import choices_text, explain
from hpc.spec import REFERENCE, JobFile, Stage, get_path, is_value, with_overrides


@dataclass(frozen=True, slots=True)
class Cost:
    """What the entry's `estimate` says of one run."""

    num_steps: int = 0
    gpu_hours: float | None = None
    memory_bytes: float = 0.0
    checkpoint_bytes: float = 0.0
    note: str = ""
    num_checkpoints: int = 2  # that a complete run has
    memory: Mapping[str, float] = field(default_factory=dict)  # parts of memory_bytes
    sharding: str = ""  # how the entry spreads its state over the processes, and why
    reason: str = ""
    recipe: str = ""  # what the entry makes of the learning rate and its like
    traffic: Any = None  # of a step and process: inside_bytes, across_bytes, seconds
    scaling: Mapping[str, Mapping[int, float]] = field(default_factory=dict)  # way of sharding -> nodes -> seconds of traffic of a step


@dataclass(slots=True, eq=False)
class Run:
    """An identified config. `upstream` maps each stage that it builds on to that stage's run."""

    id: str
    hash: str
    stage: str
    entry: str
    params: dict[str, Any]
    config: dict[str, Any]  # resolved; references still `${stage}`
    upstream: dict[str, Run]
    direct: tuple[str, ...]  # the stages named in `after`
    layout: Layout
    hours: float
    cost: Cost
    given: str = ""  # hash of what the file says, before defaults: equal where another `hash` is not the file's doing
    blocked: str = ""  # why the run cannot start: a data set or a file is not there
    data: tuple[str, ...] = ()  # the data sets that the config names

    @property
    def num_segments(self) -> int:
        """Estimated; 1 where the entry gives no estimate."""
        hours = self.cost.gpu_hours
        return 1 if hours is None else max(1, math.ceil(hours / self.layout.world_size / self.hours))

    @property
    def after(self) -> list[str]:
        return [self.upstream[stage].id for stage in self.direct]


@dataclass(slots=True, eq=False)
class Array:
    """One sbatch call: elements that each carry a list of runs. `mirrors`: element i waits for element i of that array."""

    stage: str
    elements: list[list[Run]]
    layout: Layout
    hours: float
    slots: int  # runs of one element that run side by side
    mirrors: Array | None = None
    waits_for: list[Array] = field(default_factory=list)
    in_flight: tuple[str, ...] = ()  # Slurm's names of upstream jobs of an earlier submission
    indices: tuple[int, ...] = ()  # of the one array in `waits_for`: only these elements; empty: all

    @property
    def runs(self) -> list[Run]:
        return [run for element in self.elements for run in element]


@dataclass(slots=True)
class Plan:
    job: JobFile
    cluster: Cluster
    runs: list[Run]
    warnings: list[str]
    data_problems: dict[str, str]  # data set -> why runs that need it are blocked


def expand(job: JobFile, cluster: Cluster) -> Plan:
    """Every run of the job, validated and identified. Raises UserError at the first problem."""
    datasets = DataSets(cluster.datasets)
    warnings: list[str] = []
    by_stage: dict[str, list[Run]] = {}
    stage_of: dict[str, str] = {}
    for name in job.order:
        by_stage[name] = list(_stage_runs(job, name, job.job.stages[name], cluster, by_stage, datasets, warnings))
        for run in by_stage[name]:
            if stage_of.setdefault(run.hash, name) != name:
                raise job.fail(
                    ("stages", name), f"{run.id} is the same run as one of stage {stage_of[run.hash]}; use ${{{stage_of[run.hash]}}}"
                )
    _check_seeds(job, by_stage)
    for name, problem in datasets.problems.items():
        if datasets.is_unknown_path(name):  # the run has no identity
            raise UserError(f"{job.document.file}: data set {name!r}: {problem}")
    runs = [run for name in job.order for run in by_stage[name]]
    _check_report(job, runs)
    return Plan(job, cluster, runs, warnings, datasets.problems)


def _stage_runs(
    job: JobFile,
    name: str,
    stage: Stage,
    cluster: Cluster,
    by_stage: Mapping[str, list[Run]],
    datasets: DataSets,
    warnings: list[str],
) -> Iterator[Run]:
    try:
        model = entries.config_class(stage.entry)
    except UserError as error:
        raise job.fail(("stages", name, "entry"), str(error)) from None
    try:
        layout = clusters.layout(stage.resources, cluster)
    except ValueError as error:
        raise job.fail(("stages", name, "resources"), str(error)) from None
    points = list(stage.sweep.points()) if stage.sweep else [{}]
    if not points:
        raise job.fail(("stages", name, "sweep"), "nothing is left after `exclude`")
    seeds = [{"seed": seed} for seed in _seeds(job, name, stage, model)]
    unset: list[str] = []
    base = clusters.substitute(stage.config, unset)
    seen: dict[str, dict[str, Any]] = {}
    for lineage in _lineages(stage, by_stage):
        upstream_configs = {upstream: run.config for upstream, run in lineage.items()}
        references = {upstream: run.hash for upstream, run in lineage.items()}
        inherited = {key: value for upstream in stage.after for key, value in lineage[upstream].params.items()}
        for point in points:
            for seed in seeds or [{}]:
                overrides = {**clusters.substitute(point, unset), **seed}
                raw = with_overrides(base, overrides)
                _check_references(job, name, raw, lineage)
                checked: BaseModel | dict[str, Any]
                if model is None:
                    checked, config, cost = raw, raw, Cost()
                else:
                    checked = _validated(job, name, model, raw, overrides)
                    config = entries.dump(checked)
                    try:
                        checked.check(layout.world_size, upstream_configs)  # type: ignore[attr-defined]
                    except ValueError as error:
                        raise job.fail(("stages", name, "config"), str(error)) from None
                    cost = _estimate(checked, cluster, layout, upstream_configs)
                missing: list[str] = []
                fields = identity(checked, datasets.identity, references, missing)
                try:
                    config = with_sha256(config, checked)
                except ValueError as error:
                    raise job.fail(("stages", name, "config"), str(error)) from None
                hashed = run_hash(stage.entry, fields)
                own = {f"{name}.{path}": value for path, value in overrides.items()}
                if hashed in seen:
                    if seen[hashed] == own:
                        raise job.fail(("stages", name, "sweep"), f"{_point(own)} stands twice in the sweep")
                    raise job.fail(
                        ("stages", name, "sweep"), f"{_point(own)} and {_point(seen[hashed])} are the same run; one of them is enough"
                    )
                seen[hashed] = own
                data: tuple[str, ...] = ()
                if isinstance(checked, BaseModel):
                    config, data = _placed(config, checked, datasets)
                label = readable({**own, **inherited})
                run_id = f"{label}-{hashed}" if label else hashed
                yield Run(
                    run_id,
                    hashed,
                    name,
                    stage.entry,
                    {**inherited, **own},
                    config,
                    lineage,
                    stage.after,
                    layout,
                    stage.resources.hours,
                    cost,
                    _given(stage.entry, raw, lineage),
                    "; ".join([f"data set {each!r}: {datasets.problems[each]}" for each in data if each in datasets.problems] + missing),
                    data,
                )
    warnings += [f"stages.{name}: environment variable {variable} is not set" for variable in dict.fromkeys(unset)]


def _seeds(job: JobFile, name: str, stage: Stage, model: type[BaseModel] | None) -> list[int]:
    """Of this stage: its own where `seeds` names stages, otherwise those of a root stage that has a seed."""
    seeds = job.job.seeds
    if isinstance(seeds, dict):
        return seeds.get(name, [])
    has_seed = model is None or "seed" in model.model_fields
    return seeds if not stage.after and has_seed else []


def _check_seeds(job: JobFile, by_stage: Mapping[str, list[Run]]) -> None:
    seeds = job.job.seeds
    if isinstance(seeds, dict):
        for name in seeds:
            if name not in by_stage:
                raise job.fail(("seeds", name), f"unknown stage; {choices_text(name, list(by_stage))}")
    elif seeds and not any(f"{run.stage}.seed" in run.params for runs in by_stage.values() for run in runs):
        raise job.fail(("seeds",), "no root stage has a seed; name the stage, as in seeds: {pretrain: [0, 1]}")


def _point(params: Mapping[str, Any]) -> str:
    return "{" + ", ".join(f"{key}: {value}" for key, value in params.items()) + "}"


def _lineages(stage: Stage, by_stage: Mapping[str, list[Run]]) -> Iterator[dict[str, Run]]:
    """All combinations of upstream runs that agree on their common ancestors."""
    lineages: list[dict[str, Run]] = [{}]
    for upstream in stage.after:
        following = []
        for lineage in lineages:
            for run in by_stage[upstream]:
                other = {**run.upstream, upstream: run}
                if all(lineage.get(stage, ancestor) is ancestor for stage, ancestor in other.items()):
                    following.append({**lineage, **other})
        lineages = following
    yield from lineages


def _check_references(job: JobFile, name: str, config: Any, lineage: Mapping[str, Run], path: tuple[str | int, ...] = ()) -> None:
    if isinstance(config, dict):
        for key, value in config.items():
            _check_references(job, name, value, lineage, (*path, key))
    elif isinstance(config, list):
        for index, value in enumerate(config):
            _check_references(job, name, value, lineage, (*path, index))
    elif isinstance(config, str) and "${" in config and "${env:" not in config:
        match = REFERENCE.match(config)
        if match is None:
            message = f"{config!r}: a reference stands alone, as in ${{stage}}; it is that run's folder"
            raise job.fail(("stages", name, "config", *path), message)
        if match[1] not in lineage:
            message = f"{config} is not a stage that {name} comes after; {choices_text(match[1], list(lineage))}"
            raise job.fail(("stages", name, "config", *path), message)


def _validated(job: JobFile, name: str, model: type[BaseModel], raw: dict[str, Any], overrides: Mapping[str, Any]) -> BaseModel:
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        path, message = explain(error, model)[0]
        key: tuple[str | int, ...] = ("stages", name, "config", *path)
        dotted = ".".join(map(str, path))
        for swept in overrides:
            if dotted == swept or dotted.startswith(swept + ".") or (swept.startswith(dotted + ".") and dotted):
                for kind in ("grid", "zip"):
                    if (*key[:2], "sweep", kind, swept) in job.document.lines:
                        key = (*key[:2], "sweep", kind, swept)
                where = job.document.where(key if "sweep" in key else (*key[:2], "sweep"))
                raise UserError(f"{where}: stages.{name}.config.{dotted}: {message} (in the sweep at {_point(overrides)})") from None
        raise job.fail(key, message) from None


def _estimate(config: BaseModel, cluster: Cluster, layout: Layout, upstream_configs: Mapping[str, Any]) -> Cost:
    estimate = getattr(config, "estimate", None)
    gpu = {**(cluster.gpu.model_dump() if cluster.gpu and layout.gpus else {}), "ranks_per_node": layout.processes}
    found = estimate(gpu, layout.world_size, upstream_configs) if estimate else None
    if found is None:
        return Cost()
    names = ("num_checkpoints", "memory", "sharding", "reason", "recipe", "traffic", "scaling")
    more = {name: value for name in names if (value := getattr(found, name, None))}
    return Cost(found.num_steps, found.gpu_hours, found.memory_bytes, found.checkpoint_bytes, found.note, **more)


def _given(entry: str, raw: dict[str, Any], lineage: Mapping[str, Run]) -> str:
    return run_hash(entry, identity(raw, lambda name, _: name, {stage: run.given for stage, run in lineage.items()}, []))


def _placed(config: dict[str, Any], model: BaseModel, datasets: DataSets) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The config with data sets' names replaced by the profile's places (top level fields), and those names."""
    placed, names = config, []
    for name, info in type(model).model_fields.items():
        extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
        value = getattr(model, name)
        if extra.get("data") and isinstance(value, str) and not REFERENCE.match(value):
            builtin = extra.get("builtin", [])
            held_as = format_of(model, str(extra.get("format", "")))
            place = datasets.place(value, isinstance(builtin, list) and value in builtin, held_as)
            if place != value:
                placed = {**placed, info.alias or name: place}
            names.append(datasets.label(value, held_as))
    return placed, tuple(names)


def _check_report(job: JobFile, runs: list[Run]) -> None:
    """Rows and the baseline name parameters that exist."""
    known = {key for run in runs for key in run.params}
    named: list[tuple[tuple[str | int, ...], str]] = [(("rows", index), row) for index, row in enumerate(job.job.report.rows)]
    named += [(("baseline", key), key) for key in job.job.report.baseline]
    for index, reported in enumerate(job.job.report.reported):
        named += [(("reported", index, "params", key), key) for key in reported.params]
    for where, parameter in named:
        stage, _, path = parameter.partition(".")
        candidates = [run for run in runs if run.stage == stage]
        if parameter not in known and not any(get_path(run.config, path, known) is not known for run in candidates):
            message = f"{parameter!r} is no parameter of this job; {choices_text(parameter, sorted(known))}"
            raise job.fail(("report", *where), message)


def described_by(params: Mapping[str, Any], runs: Iterable[Run]) -> list[Run]:
    """The runs with these values, of the last stage that is named."""

    def value(run: Run, key: str) -> Any:
        stage, _, path = key.partition(".")
        of = run if run.stage == stage else run.upstream.get(stage)
        return None if of is None else of.params[key] if key in of.params else get_path(of.config, path, None)

    stages = {key.partition(".")[0] for key in params}
    candidates = [run for run in runs if run.stage in stages and stages <= {run.stage, *run.upstream}]
    return [run for run in candidates if all(is_value(value(run, key), wanted) for key, wanted in params.items())]


MAX_BLOCKS = 50  # arrays that a packed stage is split into so that each waits for a few upstream elements only
MAX_GROUPS = 20  # arrays that a stage is split into so that each waits for one job of an earlier submission


def arrays(runs: Iterable[Run], cluster: Cluster, in_flight: Mapping[str, str] | None = None) -> list[Array]:
    """Group what is to be started. Elements whose upstream also starts now mirror its elements; others wait for nothing.

    Small runs share an element on clusters that give whole nodes; arrays are split at the site's size. `in_flight`: run hash
    -> Slurm's name of the job that an earlier submission started for it; runs that wait for different ones are kept apart.
    """
    in_flight = in_flight or {}
    place: dict[str, tuple[Array, int]] = {}  # run hash -> where it starts
    result: list[Array] = []
    by_stage: dict[str, list[Run]] = {}

    def add(array: Array) -> None:
        result.append(array)
        for index, element in enumerate(array.elements):
            for run in element:
                place[run.hash] = (array, index)

    for run in runs:
        by_stage.setdefault(run.stage, []).append(run)
    for stage, todo in by_stage.items():
        layout = todo[0].layout
        slots = max(1, int(1 / layout.fraction)) if cluster.whole_nodes and layout.nodes == 1 else 1
        groups: dict[tuple[Any, ...], list[Run]] = {}
        waits: dict[tuple[Any, ...], tuple[list[Array], tuple[str, ...]]] = {}
        earlier = {
            run.hash: tuple(sorted({in_flight[run.upstream[s].hash] for s in run.direct if run.upstream[s].hash in in_flight}))
            for run in todo
        }
        if len(set(earlier.values())) > MAX_GROUPS:
            together = tuple(sorted({name.partition("_")[0] for names in earlier.values() for name in names}))
            earlier = {run_hash: together if names else () for run_hash, names in earlier.items()}
        for run in todo:
            upstream = {
                id(place[run.upstream[s].hash][0]): place[run.upstream[s].hash][0] for s in run.direct if run.upstream[s].hash in place
            }
            key = (*sorted(upstream), *earlier[run.hash])
            groups.setdefault(key, []).append(run)
            waits[key] = (list(upstream.values()), earlier[run.hash])
        for key, members in groups.items():
            waits_for, names = waits[key]
            mirrors = _mirror_of(waits_for)
            if mirrors is None:
                if slots > 1:  # side by side what takes equally long
                    members.sort(key=lambda run: -(run.cost.gpu_hours or 0.0))
                chunks = [members[i : i + slots] for i in range(0, len(members), slots)]
                layers = [chunks[i : i + cluster.max_array_size] for i in range(0, len(chunks), cluster.max_array_size)]
            elif slots == 1:
                layers = _mirrored(members, mirrors, place, slots)
            else:
                layers = []
                for indices, block in _blocks(members, mirrors, place, slots):
                    chunks = [block[i : i + slots] for i in range(0, len(block), slots)]
                    for start in range(0, len(chunks), cluster.max_array_size):
                        part = chunks[start : start + cluster.max_array_size]
                        add(Array(stage, part, layout, todo[0].hours, slots, None, waits_for, names, indices))
            for elements in layers:
                add(Array(stage, elements, layout, todo[0].hours, slots, mirrors, waits_for, names))
    return result


def _mirror_of(waits_for: list[Array]) -> Array | None:
    """The array whose elements the next one follows one by one: the only one, or the one that mirrors all others itself."""
    for candidate in waits_for:
        above = candidate.mirrors
        others = {id(other) for other in waits_for if other is not candidate}
        while above is not None:
            others.discard(id(above))
            above = above.mirrors
        if not others:
            return candidate if len(candidate.elements) > 1 else None
    return None


def _blocks(
    members: list[Run], mirrors: Array, place: Mapping[str, tuple[Array, int]], slots: int
) -> Iterator[tuple[tuple[int, ...], list[Run]]]:
    """Neighbouring upstream elements, as many as fill whole nodes with what follows them; what takes equally long side by side."""
    size = max(slots, math.ceil(len(mirrors.elements) / MAX_BLOCKS))
    blocks: dict[int, list[tuple[int, Run]]] = {}
    for run in members:
        index = next(place[run.upstream[s].hash][1] for s in run.direct if place.get(run.upstream[s].hash, (None, 0))[0] is mirrors)
        blocks.setdefault(index // size, []).append((index, run))
    for block in blocks.values():
        runs = sorted((run for _, run in block), key=lambda run: -(run.cost.gpu_hours or 0.0))
        yield tuple(sorted({index for index, _ in block})), runs


def _mirrored(members: list[Run], mirrors: Array, place: Mapping[str, tuple[Array, int]], slots: int) -> list[list[list[Run]]]:
    """Layers of elements, each as long as the mirrored array; layer k holds the k-th `slots` runs of every element."""
    waiting: list[list[Run]] = [[] for _ in mirrors.elements]
    for run in members:
        index = next(place[run.upstream[s].hash][1] for s in run.direct if place.get(run.upstream[s].hash, (None, 0))[0] is mirrors)
        waiting[index].append(run)
    depth = max(math.ceil(len(runs) / slots) for runs in waiting)
    return [[runs[layer * slots : (layer + 1) * slots] for runs in waiting] for layer in range(depth)]
