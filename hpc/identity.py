"""What makes a run the same run: entry and identity fields, hashed (DESIGN, decision 1).

Fields marked operational are left out, fields with a neutral value too; a reference to another run enters by that run's
hash; a data set by its known name or its manifest's hash, a file by its sha256, another run's folder by its weights, never by a path.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

from hpc.files import read_json
from hpc.runs import RunFolder
from hpc.spec import REFERENCE

Plain = Any  # JSON-able


class Format(NamedTuple):
    """What a data set's folder may hold instead of shards with a manifest, as its config says."""

    name: str
    look: Callable[[str, Path], str]  # the format's name, folder -> sha256 of what is there; raises ValueError where it does not fit


DataIdentity = Callable[[str, Format | None], Plain]


class _Rule(NamedTuple):
    """How one field of a config class enters the identity."""

    name: str
    key: str
    is_data: bool
    is_file: bool
    is_folder: bool
    neutral: tuple[Any, ...]  # empty: none
    format: str  # the field that names the data set's format; empty: none


def format_of(config: BaseModel, field: str) -> Format | None:
    """What `field` of `config` names, for the class's `look`."""
    name = getattr(config, field) if field else None
    return Format(name, type(config).look) if isinstance(name, str) else None  # type: ignore[attr-defined]


@lru_cache
def _rules(model: type[BaseModel]) -> list[_Rule]:
    """The fields that count, operational ones left out."""
    rules = []
    for name, field in model.model_fields.items():
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        if not extra.get("operational"):
            neutral = (extra["neutral"],) if "neutral" in extra else ()
            is_data, is_file, is_folder = (bool(extra.get(mark)) for mark in ("data", "file", "reference"))
            rules.append(_Rule(name, field.alias or name, is_data, is_file, is_folder, neutral, str(extra.get("format", ""))))
    return rules


def identity(value: Any, data: DataIdentity, references: Mapping[str, str], problems: list[str]) -> Plain:
    """The identity of a resolved config: nested plain data. `problems` gets what is said of files and folders that are not there; for
    the time being they are known by their paths."""
    if isinstance(value, str):
        match = REFERENCE.match(value)
        return {"run": references[match[1]]} if match else value
    if value is None or isinstance(value, int | float):
        return value
    if isinstance(value, BaseModel):
        kept = {}
        for name, key, is_data, is_file, is_folder, neutral, format_field in _rules(type(value)):
            item = getattr(value, name)
            if neutral and item == neutral[0]:
                continue
            if is_data and isinstance(item, str) and not REFERENCE.match(item):
                kept[key] = data(item, format_of(value, format_field))
            elif (is_file or is_folder) and isinstance(item, str) and not REFERENCE.match(item):
                try:
                    kept[key] = {"sha256": sha256_of(item)} if is_file else of_folder(item)
                except ValueError as error:
                    kept[key] = {"missing": item}
                    problems.append(str(error))
            else:
                kept[key] = identity(item, data, references, problems)
        return kept
    if isinstance(value, dict):
        return {k: identity(v, data, references, problems) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [identity(v, data, references, problems) for v in value]
    return value


def with_sha256(config: Any, model: Any) -> Any:
    """The resolved config with the sha256 of each file in the field that its class has for it: what the entry finds is to be that.

    Raises ValueError where another one is given. Files that are not there, or come from another stage, are left out.
    """
    if not isinstance(model, BaseModel):
        return config
    changed = dict(config)
    for name, field in type(model).model_fields.items():
        key, extra = field.alias or name, field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        value, of = getattr(model, name), extra.get("sha256_of")
        if isinstance(value, BaseModel):
            changed[key] = with_sha256(config[key], value)
        elif isinstance(of, str) and isinstance(file := getattr(model, of), str) and not REFERENCE.match(file):
            with contextlib.suppress(ValueError):
                changed[key] = sha256_of(file)
            if value not in (None, changed[key]):
                raise ValueError(f"{of} {file} has the sha256 {changed[key]}, but {key} is {value}: it is another file")
    return changed


def of_folder(name: str) -> Plain:
    """What identifies the folder of a run that is not one of this job, or an export: its weights; of a run that is not complete its newest
    checkpoint. Raises ValueError for a folder without any."""
    folder = Path(name).expanduser()
    result = read_json(folder / "result.json")
    if (folder / "COMPLETE").is_file() and isinstance(result, dict) and result.get("weights_sha256"):
        return {"weights_sha256": result["weights_sha256"]}
    run = RunFolder(folder)
    if run.saved_step:
        return {"step": run.saved_step, "checkpoint": sha256_of(str(folder / "checkpoints" / f"step_{run.saved_step}" / "checksums.json"))}
    files = [*sorted(folder.glob("*.safetensors")), folder / "config.json"]
    if len(files) > 1 and files[-1].is_file():
        return {path.name: sha256_of(str(path)) for path in files}
    what = "has no weights: no run and no export" if folder.is_dir() else "does not exist"
    raise ValueError(f"folder {name!r} {what}, and the weights in it name the run: is the path right?")


def sha256_of(name: str) -> str:
    """Of the file's content, or of model.safetensors in the folder. Raises ValueError where it is not there."""
    path = Path(name).expanduser()
    path = path / "model.safetensors" if path.is_dir() else path
    try:
        status = path.stat()
        return _sha256_of(path, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise ValueError(f"file {name!r} cannot be read ({error.strerror}), and its content names the run: is the path right?") from None


@lru_cache
def _sha256_of(path: Path, size: int, mtime_ns: int) -> str:
    """Once for each state of a file: a sweep names it in every run."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def run_hash(entry: str, fields: Plain) -> str:
    """12 hex digits."""
    text = json.dumps({"entry": entry, "config": fields}, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def readable(params: Mapping[str, Any]) -> str:
    """`lambda-1_d-256` of `{pretrain.auxiliary.lambda: 1, pretrain.auxiliary.d: 256}`; safe in any file name."""
    parts = []
    for path, value in params.items():
        name = path.rpartition(".")[2]
        if isinstance(value, dict):
            value = value.get("name", "")
        text = "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
        parts.append(re.sub(r"[^A-Za-z0-9.]+", "-", f"{name}-{text}" if not isinstance(value, str) else text).strip("-."))
    return "_".join(part for part in parts if part)[:80].strip("-._")


class DataSets:
    """Resolves the data sets that configs name: to a place (for the run) and to what identifies them."""

    def __init__(self, places: Mapping[str, str]):
        self.places = places
        self.problems: dict[str, str] = {}  # data set, as `label` has it -> why a run cannot start with it
        self._contents: dict[tuple[Path, Format | None], str | None] = {}  # sha256; None: there is nothing that could be identified
        self._unknown: set[str] = set()

    def is_stream(self, name: str) -> bool:
        """A URL or a pipe of the entry's: nothing that could be looked at here; it is what it is called."""
        return name.startswith("pipe:") or "://" in name

    def is_path(self, name: str) -> bool:
        return not self.is_stream(name) and ("/" in name or name.startswith(("~", ".")))

    def is_unknown_path(self, label: str) -> bool:
        """A folder with neither a readable manifest nor its format: there is nothing that could identify the data."""
        return label in self._unknown

    @staticmethod
    def label(name: str, format: Format | None) -> str:
        """A folder may hold several data sets."""
        return name if format is None or format.name == name else f"{format.name} in {name}"

    def place(self, name: str, builtin: bool, format: Format | None = None) -> str:
        """The folder of `name`, or the name itself where the entry finds it; notes missing or damaged shards."""
        label = self.label(name, format)
        if self.is_stream(name):
            return name
        if self.is_path(name):
            folder = Path(name).expanduser().absolute()
        elif name in self.places:
            if "${env:" in self.places[name]:
                self.problems[label] = f"its place {self.places[name]} needs an environment variable that is not set"
                return name
            folder = Path(self.places[name]).expanduser()
        else:
            if not builtin:
                known = ", ".join(sorted(self.places)) or "none"
                self.problems.setdefault(label, f"the profile knows no place for it (it knows: {known}); a path also works")
            return name
        self._content(name, folder, format)
        return str(folder)

    def identity(self, name: str, format: Format | None = None) -> Plain:
        if not self.is_path(name):
            return name
        content = self._content(name, Path(name).expanduser().absolute(), format)
        return {"manifest": content} if content else name

    def _content(self, name: str, folder: Path, format: Format | None) -> str | None:
        """The sha256 that stands for what is there; problems are noted. Once per folder and format."""
        key = folder, format
        if key not in self._contents:
            self._contents[key] = None
            try:
                if format is None:
                    self._manifest(folder)
                else:
                    self._contents[key] = format.look(format.name, folder)
            except (ValueError, OSError) as error:
                self.problems[self.label(name, format)] = str(error)
            if self._contents[key] is None and self.is_path(name):
                self._unknown.add(self.label(name, format))
        return self._contents[key]

    def _manifest(self, folder: Path) -> None:
        """The manifest is read and every shard's size compared with it."""
        inner = folder / "data" / "manifest.json"
        path = inner if inner.is_file() else folder / "manifest.json"
        manifest = read_json(path)
        if not isinstance(manifest, dict):
            raise ValueError(f"{path} does not exist or is not a manifest; is the path right, are the shards built?")
        self._contents[folder, None] = hashlib.sha256(path.read_bytes()).hexdigest()
        for split in manifest.get("splits", {}).values():
            for shard in split.get("shards", []):
                shard_path = path.parent / str(shard["name"])
                size = shard_path.stat().st_size if shard_path.is_file() else None
                if size != shard["bytes"]:
                    found = "is missing" if size is None else f"has {size} bytes"
                    raise ValueError(f"shard {shard_path} {found}, the manifest says {shard['bytes']} bytes; build or copy it again")
