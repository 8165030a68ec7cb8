"""Files and config classes are two sides of one thing; the markers are the same however a run is started."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from equissl import config as panel
from equissl import transforms
from equissl.config import Settings

ROOT = Path(__file__).parent.parent.parent


def members(annotation: Any) -> dict[str, type[Settings]]:
    """Config classes inside an annotation by their name's default."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return {annotation.model_fields["name"].default: annotation} if "name" in annotation.model_fields else {}
    return {name: found for part in get_args(annotation) for name, found in members(part).items()}


@pytest.mark.parametrize(
    ("folder", "annotation", "shared"),
    [("methods", panel.Method, set()), ("transforms", panel.AnyTransformation, set(transforms.SHARED)), ("evals", panel.Task, set())],
)
def test_every_plug_in_has_its_file_and_its_config_class(folder: str, annotation: Any, shared: set[str]) -> None:
    files = {path.stem for path in (ROOT / "equissl" / folder).glob("*.py")} - {"__init__"} - shared
    assert files == set(members(annotation))


@pytest.mark.parametrize("name", members(panel.AnyTransformation))
def test_plan_knows_how_many_parameters_a_transformation_has(name: str) -> None:
    settings = members(panel.AnyTransformation)[name]()
    transform = transforms.get(settings)
    assert settings.num_parameters == len(transform.names) == len(transform.ranges(64))


def fields(model: type[Settings]) -> set[str]:
    return set(model.model_fields)


def test_every_setting_is_read_somewhere() -> None:
    """A setting that is accepted and ignored is worse than none."""
    code = "\n".join(path.read_text() for path in (ROOT / "equissl").rglob("*.py") if path.name != "config.py")
    checked = (ROOT / "equissl" / "config.py").read_text()
    classes = [value for value in vars(panel).values() if isinstance(value, type) and issubclass(value, Settings) and value is not Settings]
    unread = {
        f"{model.__name__}.{name}"
        for model in classes
        for name in fields(model)
        if name not in ("name", "preset") and f".{name}" not in code and not re.search(rf"\bself(\.\w+)*\.{name}\b", checked)
    }
    assert not unread


def test_hpc_and_torchrun_write_the_same_markers(tmp_path: Path) -> None:
    """`equissl.prepare` once by hand and once as a run of `hpc`: same files, same result but for what hpc adds."""
    config = panel.PrepareConfig(patch_size=16, train_patches=2, val_patches=1).model_dump()
    by_hand, by_hpc = tmp_path / "by_hand", tmp_path / "by_hpc"
    for folder in (by_hand, by_hpc):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
    subprocess.run([sys.executable, "-m", "equissl.prepare", str(by_hand / "config.json")], cwd=ROOT, check=True, capture_output=True)
    (by_hpc / "spec.json").write_text(json.dumps({"entry": "equissl.prepare", "upstream": {}}))
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "1", "EQUIHPC_SCRATCH": str(tmp_path)}
    subprocess.run([sys.executable, "-m", "hpc.rank", str(by_hpc)], cwd=ROOT, env=environment, check=True, capture_output=True)
    results = [json.loads((folder / "result.json").read_text()) for folder in (by_hand, by_hpc)]
    assert results[1].pop("upstream_sha256") == {}
    assert results[0] == results[1]
    assert set(json.loads((by_hand / "COMPLETE").read_text())) == set(json.loads((by_hpc / "COMPLETE").read_text()))
    assert {path.name for path in by_hand.iterdir()} == {path.name for path in by_hpc.iterdir()} - {"spec.json"}
