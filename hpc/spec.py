"""A job file, typed and frozen, and what its sweeps expand to. Nothing here looks at the disk but `load`."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from hpc import yamlfile
from hpc.errors import UserError
from hpc.messages import choices_text, explain
from hpc.yamlfile import Document

NAME = re.compile(r"^[A-Za-z][A-Za-z0-9_-]{0,63}$")
REFERENCE = re.compile(r"^\$\{([A-Za-z][A-Za-z0-9_-]*)\}$")
M = TypeVar("M", bound=BaseModel)
Overrides = dict[str, Any]  # dotted path relative to the stage's config -> value


class Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]


class Resources(Frozen):
    """What one run needs. A process has one GPU where the cluster has GPUs; `gpus: 0` is one process without."""

    nodes: Annotated[int, Field(ge=1)] = 1
    gpus: Annotated[int, Field(ge=0)] | None = None  # of a single node; such runs are packed on whole nodes
    gpus_per_node: Annotated[int, Field(ge=1)] | None = None  # None: all that the profile's nodes have
    hours: Annotated[float, Field(gt=0)] = 1.0  # per segment; a longer run continues in the next one

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.gpus is not None and (self.nodes != 1 or self.gpus_per_node is not None):
            raise ValueError("gpus is for work inside one node; for several nodes give nodes and, if not all, gpus_per_node")
        return self


class Sweep(Frozen):
    """Product of grid × zip × list, without `exclude`, plus `include`. Paths are relative to the stage's config."""

    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}
    zip: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}
    listed: list[Overrides] = Field([], alias="list")
    include: list[Overrides] = []
    exclude: list[Overrides] = []
    first: list[Overrides] = []  # points that match come first, in this order: the more important ones

    @model_validator(mode="after")
    def _makes_points(self) -> Self:
        if len({len(values) for values in self.zip.values()}) > 1:
            lengths = ", ".join(f"{path}: {len(values)}" for path, values in self.zip.items())
            raise ValueError(f"zip needs lists of one length, got {lengths}")
        axes = {*self.grid, *self.zip, *(path for point in self.listed for path in point)}
        for gone in self.exclude:
            for path in gone:
                if path not in axes:
                    raise ValueError(f"exclude names {path!r}, which is not swept; {choices_text(path, sorted(axes))}")
        if not (self.grid or self.zip or self.listed or self.include):
            raise ValueError("the sweep is empty: give grid, zip, list or include, or remove it")
        points = list(self._product())
        for wanted in self.first:
            if not any(_matches(point, wanted) for point in points):
                raise ValueError(f"first: no point of the sweep has {wanted}")
        return self

    def points(self) -> Iterator[Overrides]:
        """In the order of `first`, then as they stand."""

        def importance(point: Overrides) -> int:
            return next((rank for rank, wanted in enumerate(self.first) if _matches(point, wanted)), len(self.first))

        yield from sorted(self._product(), key=importance)

    def _product(self) -> Iterator[Overrides]:
        if self.grid or self.zip or self.listed:
            zipped = [dict(zip(self.zip, row, strict=True)) for row in zip(*self.zip.values(), strict=True)] if self.zip else [{}]
            for values in itertools.product(*self.grid.values()):
                for row in zipped:
                    for extra in self.listed or [{}]:
                        point = {**dict(zip(self.grid, values, strict=True)), **row, **extra}
                        if not any(_matches(point, gone) for gone in self.exclude):
                            yield point
        yield from self.include


def _matches(point: Overrides, wanted: Overrides) -> bool:
    return all(key in point and point[key] == value for key, value in wanted.items())


class Budgets(Frozen):
    """Ceilings. A run that reaches one of its own ends as `failed` with that reason; None: no ceiling."""

    attempts: Annotated[int, Field(ge=1)] | None = None  # executions in all
    time_limits: Annotated[int, Field(ge=1)] | None = None  # segments that ended at the time limit
    preemptions: Annotated[int, Field(ge=1)] | None = None
    node_failures: Annotated[int, Field(ge=0)] | None = 20  # ends that are the machine's fault: killed, hung, node down
    code_errors: Annotated[int, Field(ge=0)] = 0  # exceptions after which the run is tried again
    without_progress: Annotated[int, Field(ge=1)] = 3  # restarts without a new checkpoint, preemptions apart
    gpu_hours: Annotated[float, Field(gt=0)] | None = None  # of all runs of the job together (process hours without GPUs)


class Notify(Frozen):
    """Who is told when a job ends or a run fails."""

    mail: str | None = None  # address for Slurm's own mails; needs Slurm
    when: Annotated[tuple[Literal["end", "fail"], ...], BeforeValidator(_as_tuple)] = ("end", "fail")
    command: str | None = None  # shell line; EQUIHPC_JOB, EQUIHPC_EVENT (end, fail), EQUIHPC_RUN and EQUIHPC_TEXT are set

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.mail is None and self.command is None:
            raise ValueError("notify needs mail (an address) or command (a shell line)")
        return self


class Stage(Frozen):
    entry: str
    after: Names = ()
    resources: Resources = Resources()
    config: dict[str, Any] = {}
    sweep: Sweep | None = None


def is_value(value: Any, wanted: Any) -> bool:
    """Whether a parameter has the value that a report names; what has settings of its own may be named by its name."""
    return bool(value == wanted or (isinstance(value, dict) and "name" in value and value["name"] == wanted))


class Reported(Frozen):
    """What a publication says of some runs, or of work that is not in this job: shown beside what is measured, never mixed with it."""

    source: Annotated[str, Field(min_length=1)]  # the publication, and the table or page in it
    params: dict[str, Any] = {}  # `stage.path` -> value, of the runs that it is about
    name: str | None = None  # instead of params: what it is about, a row of its own
    nodes: Annotated[int, Field(ge=1)] | None = None  # that a run used
    gpu_hours: Annotated[float, Field(gt=0)] | None = None  # of a run
    metrics: dict[str, float] = {}

    @model_validator(mode="after")
    def _of_something(self) -> Self:
        if bool(self.params) == bool(self.name):
            raise ValueError("give params, of the runs that it is about, or a name for a row of its own, and not both")
        if self.name and (self.nodes or self.gpu_hours):
            raise ValueError("nodes and gpu_hours stand beside this job's own estimate: give params of the runs that they are about")
        return self


DIGITS = 3


class Report(Frozen):
    rows: Names = ()  # params, `stage.path`; empty: whatever is swept
    columns: Names = ()  # metrics; empty: all
    means: dict[str, Annotated[Names, Field(min_length=1)]] = {}  # name of one more column -> columns, of which it is the mean
    digits: Annotated[int, Field(ge=0, le=9)] = DIGITS  # after the point, wherever people read the table
    baseline: dict[str, Any] = {}  # params of the row that differences are taken to
    reported: list[Reported] = []

    @model_validator(mode="after")
    def _means_of_columns(self) -> Self:
        for name, parts in self.means.items():
            if "/" in name:
                raise ValueError(f"means has {name!r}, which is the name of a metric: call the mean by a word without /")
            for part in parts if self.columns else ():
                if part not in self.columns or part in self.means:
                    raise ValueError(f"means.{name} has {part!r}, which is none of the columns that runs give: {', '.join(self.columns)}")
        return self


Seeds = list[Annotated[int, Field(ge=0)]]


class Job(Frozen):
    stages: dict[str, Stage]
    seeds: Seeds | dict[str, Seeds] = []  # a root stage with a `seed` runs once per value; or stage -> values
    report: Report = Report()
    budgets: Budgets = Budgets()
    notify: Notify | None = None
    container: str | None = None  # image for the profile's container command, instead of the profile's own
    variants: dict[str, dict[str, Any]] = {}  # name -> what it changes in the stages, and its own `seeds` and `report`


@dataclass(frozen=True)
class JobFile:
    """A checked job: stages in topological order, `set` and variant applied."""

    name: str
    job: Job
    document: Document
    order: tuple[str, ...]

    def fail(self, key: Sequence[str | int], message: str) -> UserError:
        return UserError(f"{self.document.where(key)}: {'.'.join(map(str, key))}: {message}")


def set_path(config: dict[str, Any], path: str, value: Any) -> None:
    """Set `a.b.c` in place. A parent that is text is the short form of `{name: text}`; one that is missing is made."""
    *parents, last = path.split(".")
    for part in parents:
        child = config.get(part)
        child = {"name": child} if isinstance(child, str) else dict(child) if isinstance(child, dict) else {}
        config[part] = child
        config = child
    config[last] = value


def get_path(config: Any, path: str, default: Any = None) -> Any:
    """The value at `a.b.c`, or the default."""
    for part in path.split("."):
        if not isinstance(config, dict) or part not in config:
            return default
        config = config[part]
    return config


def with_overrides(config: dict[str, Any], overrides: Overrides) -> dict[str, Any]:
    """A copy of `config` with the overrides; what they do not touch is shared. Shorter paths first."""
    result = dict(config)
    for path in sorted(overrides, key=lambda path: path.count(".")):
        set_path(result, path, overrides[path])
    return result


def _merge(base: Any, change: Any, path: tuple[str, ...] = ()) -> Any:
    """A section of a stage's config that the change names otherwise is another thing, with other settings: it is replaced."""
    if not isinstance(base, dict) or not isinstance(change, dict):
        return change
    is_section = len(path) > 2 and path[1] == "config"
    if is_section and base.get("name") not in (None, change.get("name", base.get("name"))):
        return change
    return {**base, **{k: _merge(base[k], v, (*path, k)) if k in base else v for k, v in change.items()}}


# What a variant may replace besides its changes in the stages. What publications report is of the file's own runs: without a report of its
# own a variant has the file's, but for that
OF_THE_JOB = ("seeds", "report")


def load(path: Path, sets: Sequence[str] = (), variant: str | None = None) -> JobFile:
    """Read, apply the variant and then `--set stage.path=value`, check the graph. Raises UserError."""
    document = yamlfile.load(path)
    data = document.data
    if not isinstance(data, dict):
        raise UserError(f"{path}: a job file is a mapping with the key 'stages', not {type(data).__name__}")
    validate(Job, data, document)  # the file itself first: messages name its own lines
    data = copy.deepcopy(data)
    name = path.stem
    if not NAME.match(name):
        raise UserError(f"{path}: the file's name is the job's name: letters, digits, '_' and '-', starting with a letter")
    if variant is not None:
        variants = data.get("variants", {})
        if variant not in variants:
            raise UserError(f"{path}: unknown variant {variant!r}; {choices_text(variant, list(variants))}")
        changes = {key: value for key, value in variants[variant].items() if key not in OF_THE_JOB or key in data["stages"]}
        for stage, change in changes.items():
            if stage not in data["stages"] and not (isinstance(change, dict) and "entry" in change):
                where = document.where(("variants", variant, stage))
                raise UserError(f"{where}: variants.{variant}.{stage}: unknown stage; {choices_text(stage, list(data['stages']))}")
        data["stages"] = _merge(data["stages"], changes)
        data["report"] = {key: value for key, value in data.get("report", {}).items() if key != "reported"}
        own = [key for key in variants[variant] if key not in changes]
        data |= {key: variants[variant][key] for key in own}
        document = document.moved(
            ("variants", variant), {**{stage: ("stages", stage) for stage in changes}, **{key: (key,) for key in own}}, own
        )
        name = f"{name}-{variant}"
    for assignment in sets:
        _apply_set(data, assignment)
    job = validate(Job, data, document)
    return JobFile(name, job, document, _topological(job, document))


def _apply_set(data: dict[str, Any], assignment: str) -> None:
    path, equals, text = assignment.partition("=")
    stage, dot, inner = path.partition(".")
    if not equals or not dot or not inner:
        raise UserError(f"--set {assignment}: write --set stage.path=value, for example --set pretrain.batch=64")
    if stage not in data["stages"]:
        raise UserError(f"--set {assignment}: unknown stage {stage!r}; {choices_text(stage, list(data['stages']))}")
    target = data["stages"][stage]
    sweep = target.get("sweep") or {}
    swept = {*sweep.get("grid", {}), *sweep.get("zip", {}), *(k for point in sweep.get("list", []) for k in point)}
    for other in swept:
        if inner == other or inner.startswith(other + ".") or other.startswith(inner + "."):
            raise UserError(f"--set {assignment}: {stage}.{other} is swept, so this would change nothing; edit the sweep instead")
    value = yamlfile.parse(text, f"--set {path}").data
    if inner.startswith("resources."):
        target["resources"] = with_overrides(target.get("resources") or {}, {inner.removeprefix("resources."): value})
    else:
        target["config"] = with_overrides(target.get("config") or {}, {inner: value})


def validate(model: type[M], data: Any, document: Document, prefix: tuple[str | int, ...] = ()) -> M:
    """`data` as a model; the first problem becomes a UserError that names file, line and key."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        path, message = explain(error, model)[0]
        key = (*prefix, *path)
        raise UserError(f"{document.where(key)}: {'.'.join(map(str, key))}: {message}") from None


def _topological(job: Job, document: Document) -> tuple[str, ...]:
    if not job.stages:
        raise UserError(f"{document.where(('stages',))}: stages: a job needs at least one stage")
    for name, stage in job.stages.items():
        if not NAME.match(name):
            raise UserError(f"{document.where(('stages', name))}: stages.{name}: a stage's name is letters, digits, '_' and '-'")
        for upstream in stage.after:
            if upstream not in job.stages:
                where = document.where(("stages", name, "after"))
                raise UserError(f"{where}: stages.{name}.after: unknown stage {upstream!r}; {choices_text(upstream, list(job.stages))}")
    order: list[str] = []
    remaining = list(job.stages)
    while remaining:
        ready = [name for name in remaining if all(upstream in order for upstream in job.stages[name].after)]
        if not ready:
            where = document.where(("stages", remaining[0], "after"))
            raise UserError(f"{where}: stages {', '.join(sorted(remaining))} wait for each other in `after`: a cycle; remove one of them")
        order += ready
        remaining = [name for name in remaining if name not in ready]
    return tuple(order)
