"""`python -m equissl.export RUN_DIR --to DIR`: what a run has learnt, for others: plain timm loads it, without this package.

A folder with `model.safetensors` (timm's own keys), `split.safetensors` where there is a split, `heads.safetensors` (the heads, the mask
token and what else the method's outputs need), `config.json`, and a model card `README.md` with the code that loads all of it.

The teacher of a complete run comes from the safetensors in its folder, which every torch reads. The student, and what an unfinished run
has so far, come from the newest checkpoint: it is read with the torch that wrote it. One process, on the CPU.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from equissl.card import card, timm_arguments, without_places
from equissl.config import PretrainConfig, is_stream
from equissl.files import DiskFull, write_atomic

if TYPE_CHECKING:
    from torch import Tensor

HEADS = "heads.safetensors"  # a complete run has one too, beside its encoder's weights; the mask token is in the export's only
MODEL, SPLIT, CONFIG, CARD = "model.safetensors", "split.safetensors", "config.json", "README.md"
NO_NETWORK = ("auxiliary", "exp_avg", "exp_avg_sq", "momentum", "monitor")  # beginnings of names in a checkpoint, besides the method's own


@dataclass
class Weights:
    encoder: dict[str, Tensor]  # with the keys of `teacher.safetensors`, see `encoder`
    heads: dict[str, Tensor]
    step: int  # updates
    torch: str  # that wrote them
    notes: list[str] = field(default_factory=list)


def export(run_dir: Path, to: Path, student: bool = False, force: bool = False, about: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Write the folder `to`; returns what is in it, for people and scripts.

    `about`, for the card: `evaluations`, each with `id`, `metrics`, `protocol` and `dataset`, and a `warning`. `force`: replace an
    earlier export. Raises ValueError for a folder that is not a pretraining's or lacks what is asked for, and DiskFull.
    """
    import safetensors.torch

    _refuse_to_overwrite(to, force)
    config, is_complete = config_of(run_dir), (run_dir / "COMPLETE").is_file()
    student = student and config.method.has_teacher  # without one the student is what leaves the run
    weights = _of_complete(run_dir) if is_complete and not student else of_checkpoint(run_dir, student, is_complete)
    model = {name.removeprefix("backbone."): tensor for name, tensor in weights.encoder.items() if name.startswith("backbone.")}
    split = {name.removeprefix("split."): tensor for name, tensor in weights.encoder.items() if name.startswith("split.")}
    mask_token = {"mask_token": weights.encoder["mask_token"]} if config.method.has_masks else {}
    heads = mask_token | weights.heads
    _check_with_timm(model, config, run_dir)

    result = _json(run_dir / "result.json") if is_complete else {}
    data = _data(config) if is_stream(config.data) else result.get("data") or _data(config)  # a URL may hold a password
    shared = config.model_dump(mode="json", by_alias=True) | {
        "data": data["name"],
        "backbone": without_places(config),
        "stage": None,
        "stream_images": None,
    }  # no places of this machine
    tensors = {MODEL: model, **({SPLIT: split} if split else {}), HEADS: heads}
    num_steps = result.get("num_steps") or num_steps_of(config, run_dir)
    about_model = {
        "of": "student" if student else "teacher",  # the encoder that leaves a run is called teacher, whatever its method
        "step": str(weights.step),
        "num_steps": str(num_steps or ""),
    }
    contents = {name: safetensors.torch.save(values, about_model if name == MODEL else None) for name, values in tensors.items()}
    contents[CONFIG] = (json.dumps(shared, indent=2, allow_nan=False) + "\n").encode()
    told = {
        "run": run_dir.name,
        "of": about_model["of"],
        "step": weights.step,
        "num_steps": num_steps,
        "is_complete": is_complete,
        "losses": _losses(run_dir, config, weights.step),
        "data": data,
        "versions": result.get("versions") or {"torch": weights.torch},
        "code": _json(run_dir / "spec.json").get("code") or {},
        "files": {name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in contents.items()},
        "notes": weights.notes,
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in heads.items()}
    _write(to, {**contents, CARD: card(config, told, shapes, about or {}).encode()})
    return {"to": str(to), **told}


# --- what is exported ------------------------------------------------------------------------------------------------------


def heads_of(state: Mapping[str, Tensor], student: bool = False) -> dict[str, Tensor]:
    """What else than the encoder the outputs of a method need, by its name in `heads.safetensors`: the network's other parts, and
    what belongs to no network (centres). `state`: the method's."""
    own = f"{network_of(state, student)}."
    found = {name.removeprefix(own): tensor for name, tensor in state.items() if name.startswith(own)}
    found = {name: tensor for name, tensor in found.items() if not name.startswith("encoder.")}
    return found | {name: tensor for name, tensor in state.items() if not name.startswith(("student.", "teacher."))}


def network_of(names: Iterable[str], student: bool = False) -> str:
    """A method without a teacher has a student only."""
    return "teacher" if not student and any(name.startswith("teacher.") for name in names) else "student"


def _of_complete(run_dir: Path) -> Weights:
    """What the run itself exported."""
    from safetensors.torch import load

    from equissl.encoder import exported, load_teacher

    encoder, _, _ = load_teacher(run_dir)
    result = _json(run_dir / "result.json")
    tensors = {name: tensor.detach() for name, tensor in exported(encoder).items()}
    found = Weights(tensors, {}, result["num_steps"], result["versions"]["torch"])
    if "heads_sha256" in result:
        content = (run_dir / HEADS).read_bytes()
        if hashlib.sha256(content).hexdigest() != result["heads_sha256"]:
            raise ValueError(f"{run_dir / HEADS} has another sha256 than result.json says: it was changed or damaged")
        found.heads = load(content)
    else:
        try:
            found.heads = of_checkpoint(run_dir, False, True).heads
        except ValueError as error:
            reason = str(error).replace(str(run_dir), run_dir.name)  # the card tells no places
            found.notes.append(f"Without heads: an earlier version made this run, which left them in checkpoints only, and {reason}.")
    return found


def of_checkpoint(run_dir: Path, student: bool, is_complete: bool, step: int | None = None) -> Weights:
    """Of the checkpoint after `step`, or of the newest one. Raises ValueError where there is none."""
    from equissl.checkpoint import find_newest, read_marker, read_whole
    from equissl.encoder import exported_name

    folder = run_dir / "checkpoints"
    step = find_newest(folder) if step is None else step
    if step == 0 and is_complete:
        raise ValueError(
            f"the checkpoints of {run_dir} are gone, and only they held the student (equihpc gc removes those of complete runs, archives"
            " leave them out): export without --student, or have the pretraining run again (equihpc invalidate RUN, then submit) and"
            " export before gc"
        )
    if step == 0:
        raise ValueError(f"{run_dir} is not complete and has no checkpoint yet: there is nothing to export")
    path = folder / f"step_{step}"
    tensors = {name: tensor.float() for name, tensor in read_whole(path, lambda name: name.partition(".")[0] not in NO_NETWORK).items()}
    prefix = f"{network_of(tensors, student)}.encoder."
    encoder = {exported_name(name.removeprefix(prefix)): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return Weights(encoder, heads_of(tensors, student), step, read_marker(path).torch)


def config_of(run_dir: Path) -> PretrainConfig:
    """Raises ValueError for a folder that is not a pretraining's."""
    path = run_dir / "config.json"
    if not path.is_file():
        raise ValueError(f"{run_dir} is not the folder of a run: it has no config.json")
    try:
        return PretrainConfig.model_validate(_json(path))
    except ValidationError as error:
        raise ValueError(f"{path} is not the config of a pretraining: {error}") from None


def num_steps_of(config: PretrainConfig, run_dir: Path) -> int | None:
    """Of a run that is not complete; None where nothing says it."""
    return config.num_steps or _json(run_dir / "progress.json").get("num_steps")


def _check_with_timm(model: dict[str, Tensor], config: PretrainConfig, run_dir: Path) -> None:
    """What is written is what plain timm loads."""
    import timm
    import torch

    from equissl.resnet import change_stem

    with torch.device("meta"):
        plain = timm.create_model(config.backbone.name, **timm_arguments(config))
        change_stem(plain, config.backbone.facts)
    try:
        plain.load_state_dict(model, strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(f"the weights of {run_dir} do not fit its config.json: {error}") from None


def _losses(run_dir: Path, config: PretrainConfig, step: int) -> dict[str, float]:
    """The last record of the losses until `step`, and its step."""
    from equissl import methods

    names = ("step", "loss", *methods.terms(config), "reconstruction")
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    last: dict[str, float] = next((record for record in reversed(records) if record["step"] <= step), {})
    return {name: last[name] for name in names if name in last}


def _data(config: PretrainConfig) -> dict[str, Any]:
    """Name and manifest's hash where the data set is here, else what is known of it; never a path."""
    from equissl.data.shards import find, manifest_sha256, read_manifest

    if is_stream(config.data):
        return {"name": "a stream", "manifest_sha256": None}
    try:
        folder = find(config.data)
        return {"name": read_manifest(folder)["name"], "manifest_sha256": manifest_sha256(folder)}
    except ValueError:
        return {"name": Path(config.data).name, "manifest_sha256": None}


def _json(path: Path) -> dict[str, Any]:
    """{} where there is no such file."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    except FileNotFoundError:
        return {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


# --- the folder ----------------------------------------------------------------------------------------------------------------


def _refuse_to_overwrite(to: Path, force: bool) -> None:
    if not os.path.lexists(to):
        return
    if not force:
        raise ValueError(f"{to} exists: give another place with --to, or --force to replace an earlier export")
    known = {MODEL, SPLIT, HEADS, CONFIG, CARD}
    others = sorted({path.name for path in to.iterdir()} - known) if to.is_dir() and not to.is_symlink() else [to.name]
    if others:
        raise ValueError(f"{to} is not an earlier export, for there is {others[0]}: it is not replaced")


def _write(to: Path, contents: Mapping[str, bytes]) -> None:
    """The folder appears with all of it, in the place of an earlier one."""
    to.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (to.with_name(f".{to.name}.{secrets.token_hex(4)}") for _ in range(2))
    temporary.mkdir()
    try:
        for name, content in contents.items():
            write_atomic(temporary / name, content)
        if to.exists():
            to.rename(old)
        temporary.rename(to)
    finally:
        for left_over in (temporary, old):
            shutil.rmtree(left_over, ignore_errors=True)


# --- command line --------------------------------------------------------------------------------------------------------------


def command(words: list[str]) -> int:
    """The exit code: 0 done; 2 bad input, one message; 1 anything else."""
    parser = argparse.ArgumentParser(prog="python -m equissl.export", description="Write what a run has learnt for plain timm.")
    parser.add_argument("run_dir", type=Path, help="a pretraining's folder")
    parser.add_argument("--to", type=Path, required=True, help="the folder to write")
    parser.add_argument("--student", action="store_true", help="the student instead of the teacher")
    parser.add_argument("--force", action="store_true", help="replace an earlier export")
    parser.add_argument("--about", type=Path, help="JSON for the card: evaluations, warning")
    parser.add_argument("--json", action="store_true", help="for scripts")
    arguments = parser.parse_args(words)
    try:
        about = _json(arguments.about) if arguments.about else None
        done = export(arguments.run_dir.absolute(), arguments.to.absolute(), arguments.student, arguments.force, about)
    except ValueError as error:
        print(f"equihpc: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"equihpc: {error.strerror if isinstance(error, DiskFull) else error}", file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps(done, indent=1, allow_nan=False))
        return 0
    state = "complete" if done["is_complete"] else "not finished"
    print(f"{done['of']} of {done['run']} after step {done['step']} ({state}): {', '.join((*done['files'], CARD))} in {done['to']}")
    for note in done["notes"]:
        print(f"note: {note}")
    return 0


if __name__ == "__main__":
    os.umask(0o077)
    sys.exit(command(sys.argv[1:]))
