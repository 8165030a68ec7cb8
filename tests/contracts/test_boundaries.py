"""What may import what, checked on the code and on a running interpreter."""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
HEAVY = {"torch", "torchvision", "timm"}
HPC_MAY = {"hpc", "pydantic", "yaml", "submitit", "typer", "rich", "jinja2", "PIL", "tensorboard"}
EQUISSL_NEVER = {"hpc", "submitit", "typer"}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "hpc").rglob("*.py")), ids=lambda path: path.stem)
def test_hpc_imports_only_what_it_may(path: Path) -> None:
    foreign = imports(path) - set(sys.stdlib_module_names) - HPC_MAY
    assert not foreign
    if path.stem != "submit":
        assert "submitit" not in imports(path), "hpc/submit.py is the only importer of submitit"


@pytest.mark.parametrize("path", sorted((ROOT / "equissl").rglob("*.py")), ids=lambda path: path.stem)
def test_equissl_knows_nothing_of_slurm(path: Path) -> None:
    assert not imports(path) & EQUISSL_NEVER
    assert "SLURM" not in path.read_text().upper() or path.stem == "__init__"


@pytest.mark.parametrize(
    "statement",
    ["import hpc.cli, hpc.plan, hpc.submit, hpc.status, hpc.report, hpc.view, hpc.worker", "import equissl.config"]
    + [
        f"import {path.relative_to(ROOT).with_suffix('').as_posix().replace('/', '.')}"
        for path in sorted((ROOT / "equissl").glob("*.py"))
        if "\ndef main(" in path.read_text()
    ],
)
def test_planning_imports_no_torch(statement: str) -> None:
    code = f"{statement}; import sys, json; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert not HEAVY & set(loaded)


def test_plan_of_every_job_on_every_profile_imports_no_torch(tmp_path: Path) -> None:
    """Every job file plans where its resources fit; the smallest proof that profiles, jobs and entries agree."""
    code = """
import sys, json
from pathlib import Path
from hpc import spec, cluster, plan
from hpc.errors import UserError
for job in sorted(Path('jobs').rglob('*.yaml')):
    for name in cluster.names():
        try:
            found = plan.expand(spec.load(job), cluster.load(name)[0])
            assert plan.arrays(found.runs, found.cluster)
            print(job, name, len(found.runs))
        except UserError as error:
            assert 'asked for' in str(error), (job, name, error)
            print(job, name, error)
assert not {'torch', 'torchvision', 'timm'} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "sweep_lambda_d.yaml juwels-booster 209" in done.stdout


def test_what_a_training_measures_of_the_machine_is_not_compared_by_a_rehearsal() -> None:
    from equissl.logs import MEASURED
    from hpc import rehearse

    assert all(rehearse.MEASURED.search(name) for name in MEASURED)
    assert not any(rehearse.MEASURED.search(name) for name in ("loss", "lr", "grad_norm", "knn_top1", "effective_rank"))


def test_data_knows_the_flags_of_the_commands_that_it_passes_on() -> None:
    """To tell a flag from an option whose value may be called like a data set."""
    from hpc.commands import data

    flags = {"--help"}
    for name in data.PASSED_ON:
        parser = argparse.ArgumentParser()
        importlib.import_module(f"equissl.data.{name}").add_arguments(parser)
        flags |= {option for action in parser._actions if action.nargs == 0 for option in action.option_strings if len(option) > 2}
    assert set(data.FLAGS) == flags


def test_gc_knows_the_cache_of_features() -> None:
    """By name alone: neither package may import the other."""
    from equissl import cache
    from hpc import gc

    assert (gc.CACHE, gc.CACHE_LOCK) == (cache.NAME, cache.LOCK)
