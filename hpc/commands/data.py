"""`equihpc data …`: what a job needs of data; the building, checking and looking itself is `python -m equissl.data`."""

from __future__ import annotations

import json
import os
import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from hpc.commands.common import (
    CLUSTER,
    DEFAULT_RUNS,
    FILE,
    JSON,
    RUNS,
    SET,
    VARIANT,
    call,
    find_cluster,
    first_pretraining,
    make_console,
    make_plan,
    print_json,
)

app = typer.Typer(help="Data sets: build, check, look at; what a job needs.", no_args_is_help=True, rich_markup_mode=None)

# name -> (help, whether it is too much for a login node)
PASSED_ON = {
    "build": ("Write images as shards: an ImageFolder, ImageNet's archives, CIFAR, a list, other shards.", True),
    "check": ("Is an evaluation's data set as it must be? --decode: every image too.", False),
    "fake": ("Write a tiny data set in the true format of an evaluation's.", False),
    "index": ("Make a data set of shards that were built elsewhere.", True),
    "info": ("What a data set holds, and the order it is read in.", False),
    "stage": ("Copy a data set to this node and hold it there.", True),
    "verify": ("Compare shards with their checksums and index; --decode: every image too.", True),
}
FLAGS = ("--decode", "--force", "--help", "--json", "--sweep")  # of theirs, those without a value
OPEN = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}  # the rest is `python -m equissl.data`'s


def _passed_on(name: str, is_heavy: bool) -> Callable[..., None]:
    def command(context: typer.Context, cluster: CLUSTER = None) -> None:
        words = list(context.args) or ["--help"]
        if (is_heavy or "--decode" in words) and "--help" not in words:
            _refuse_on_login_node(name, words)
        if cluster is not None and name not in ("build", "fake"):
            _put_place(name, words, cluster)
        _become(name, words)

    return command


for _name, (_help, _is_heavy) in PASSED_ON.items():
    app.command(_name, help=_help, context_settings=OPEN)(_passed_on(_name, _is_heavy))


@app.command("sample", context_settings=OPEN)
def sample_command(
    context: typer.Context, cluster: CLUSTER = None, runs: RUNS = DEFAULT_RUNS, set_: SET = None, variant: VARIANT = None
) -> None:
    """A picture of augmented views as the trainer sees them: of a job file, a config or a run folder."""
    words = list(context.args) or ["--help"]
    if not words[0].endswith(".yaml"):
        _become("sample", words)
    with tempfile.TemporaryDirectory(prefix="equihpc-") as scratch:
        words[0] = _config_of(Path(words[0]), cluster, runs, set_, variant, Path(scratch))
        raise typer.Exit(call([*LEARNING_SIDE, "sample", *words]))


LEARNING_SIDE = (sys.executable, "-m", "equissl.data")


def _become(name: str, words: list[str]) -> None:
    """In place of this process: signals reach it once, and its exit code is ours."""
    os.execv(sys.executable, [*LEARNING_SIDE, name, *words])


def _put_place(name: str, words: list[str], cluster: str) -> None:
    """The folder of the data set that `words` name, if the profile knows it. Raises UserError where it is not whole."""
    from hpc.errors import UserError
    from hpc.identity import DataSets

    datasets = DataSets(find_cluster(cluster)[1].datasets)
    befores = ["", *words]  # of each word the one before it
    arguments = [
        at
        for at, word in enumerate(words)
        if not word.startswith("-") and (not befores[at].startswith("-") or "=" in befores[at] or befores[at] in FLAGS)
    ]
    number = 1 if name == "check" else 0  # TASK PATH, and PATH may be no shards
    if len(arguments) <= number:
        return  # the command itself says what is missing
    at, word = arguments[number], words[arguments[number]]
    if word not in datasets.places or Path(word).exists():
        return
    words[at] = datasets.places[word] if name == "check" else datasets.place(word, builtin=False)
    if name != "check" and words[at] == word:
        raise UserError(f"data set {word!r}: {datasets.problems[word]}")


def _refuse_on_login_node(name: str, words: list[str]) -> None:
    from hpc import slurm
    from hpc.errors import UserError

    if slurm.found_here() and not slurm.inside_allocation():
        other = ", or as a stage of a job file with entry equissl.build" if name == "build" else ""
        raise UserError(
            f"this is a login node (Slurm is here and no allocation), and data {name} is heavy work. Run it on a node, with your account"
            f" and partition: srun --ntasks=1 --cpus-per-task=16 --time=4:00:00 {shlex.join(['equihpc', 'data', name, *words])}{other}"
        )


def _config_of(file: Path, cluster: str | None, runs: Path, sets: list[str] | None, variant: str | None, scratch: Path) -> str:
    """A file with the config of the job's first pretraining."""
    path = scratch / "config.json"
    path.write_text(json.dumps(first_pretraining(file, cluster, runs, sets, variant)[1]))
    return os.fspath(path)


@app.command("needed")
def needed_command(file: FILE, cluster: CLUSTER = None, set_: SET = None, variant: VARIANT = None, json_: JSON = False) -> None:
    """The data sets that a job's runs name: where they should be, whether they are there. Exit code 1 if one is missing."""
    name, profile, _ = find_cluster(cluster)
    plan = make_plan(file, profile, set_ or [], variant)
    found: dict[str, dict[str, Any]] = {}
    for run in plan.runs:
        for data in run.data:
            entry = found.setdefault(
                data, {"place": profile.datasets.get(data, data), "problem": plan.data_problems.get(data), "runs": 0, "stages": []}
            )
            entry["runs"] += 1
            if run.stage not in entry["stages"]:
                entry["stages"].append(run.stage)
    if json_:
        print_json({"cluster": name, "data": found})
    else:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="bold")
        for heading in ("data set", "runs", "stages", "place", "state"):
            table.add_column(heading, overflow="fold")
        for data, entry in found.items():
            state = Text(entry["problem"] or "there", style="red" if entry["problem"] else "green")
            table.add_row(data, str(entry["runs"]), ", ".join(entry["stages"]), Text(entry["place"]), state)
        make_console().print(table if found else "the job's runs name no data sets: they come from its own stages")
    if any(entry["problem"] for entry in found.values()):
        raise typer.Exit(1)
