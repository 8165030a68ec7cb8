"""`equihpc data …`: what is passed on to the learning side, login nodes, streams in a plan, what killed ranks leave on a node."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpc.identity import DataSets
from tests.hpc.test_local import states, write

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Six images of two classes."""
    from PIL import Image

    for number in range(6):
        folder = tmp_path / "tree" / "train" / ("cat", "dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 16), (40 * number, 0, 0)).save(folder / f"{number}.png")
    return tmp_path / "tree"


def test_built_looked_at_and_verified(tree: Path, tmp_path: Path, equihpc: Run) -> None:
    done = equihpc("data", "build", str(tree), "built", "--workers", "1")
    assert done.returncode == 0, done.stderr
    found = json.loads(equihpc("data", "info", "built", "--json").stdout)
    assert found["splits"]["train"]["num_images"] == 6
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm/mine.yaml").write_text("scheduler: local\ndatasets: {pets: ./built}\n")
    assert equihpc("data", "verify", "pets", "--cluster", "mine").returncode == 0, "a name that the profile knows"
    shard = next((tmp_path / "built").glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    done = equihpc("data", "verify", "built")
    assert done.returncode == 1
    assert shard.name in done.stdout
    done = equihpc("data", "build", str(tree), "built")
    assert done.returncode == 2
    assert done.stderr.startswith("equihpc: ")
    assert "built is there already" in done.stderr
    done = equihpc("data", "info", "--help")
    assert done.returncode == 0
    assert "--batch" in done.stdout


def test_an_evaluation_s_data_set_is_faked_and_checked(tmp_path: Path, equihpc: Run) -> None:
    done = equihpc("data", "fake", "oxford_pets", "pets", "--classes", "2", "--images", "3")
    assert done.returncode == 0, done.stderr
    done = equihpc("data", "fake", "oxford_pets", "pets")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("equihpc: pets is there already")
    done = equihpc("data", "check", "oxford_pets", "pets")
    assert done.returncode == 0, done.stderr
    assert "expected: Oxford-IIIT Pet, breeds: 37 classes; images: trainval 3,680, test 3,669" in done.stdout
    assert "trainval: 6 images of 6, 2 classes of 3, 0 files missing" in done.stdout
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm/mine.yaml").write_text("scheduler: local\ndatasets: {oxford_pets: ./pets}\n")
    done = equihpc("data", "index", "pets", "--name", "oxford_pets", "--cluster", "mine")
    assert "oxford_pets" not in done.stderr, "an option's value is no place"
    assert "pets" in done.stderr
    image = tmp_path / "pets/oxford-iiit-pet/images/fake_breed_1_2.jpg"
    image.write_bytes(image.read_bytes()[:100])
    for words in (["oxford_pets", "oxford_pets"], ["--workers", "1", "--json", "oxford_pets", "oxford_pets"]):
        assert equihpc("data", "check", *words, "--cluster", "mine").returncode == 0, "a name that the profile knows"
    done = equihpc("data", "check", "oxford_pets", "pets", "--decode", "--workers", "1")
    assert done.returncode == 2
    assert done.stderr == "equihpc: pets does not fit oxford_pets: trainval: 1 images cannot be decoded: images/fake_breed_1_2\n"
    done = equihpc("data", "check", "oxford_pets", "pets", "--decode", "--workers", "1", "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout)["splits"]["trainval"]["undecodable"] == ["images/fake_breed_1_2"]


def test_heavy_work_is_refused_on_a_login_node(tree: Path, tmp_path: Path, equihpc: Run) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("sbatch", "scontrol"):
        (tools / name).write_text("#!/bin/sh\necho SlurmctldHost=x\n")
        (tools / name).chmod(0o755)
    path = {"PATH": f"{tools}:{os.environ['PATH']}"}
    for words in (("build", str(tree), "it's built"), ("verify", str(tree)), ("index", str(tree))):
        done = equihpc("data", *words, env=path)
        assert done.returncode == 2
        assert "this is a login node" in done.stderr
        assert "srun" in done.stderr
    assert "equihpc data index" in done.stderr
    assert equihpc("data", "build", str(tree), "built", "--workers", "1", env={**path, "SLURM_JOB_ID": "1"}).returncode == 0


def test_a_stream_is_named_and_not_looked_for() -> None:
    datasets = DataSets({})
    for name in ("pipe:cat /nowhere/{000..100}.tar", "s3://bucket/train.tar", "https://example.org/a.tar"):
        assert datasets.place(name, builtin=False) == name
        assert datasets.identity(name) == name
        assert not datasets.is_path(name)
    assert not datasets.problems


TIDY = """

def tidy(config):
    (Path(config["text"]) / f"tidied_{config['steps']}").touch()
    if config["steps"] == 2:
        raise OSError("it is busy")
"""


@pytest.mark.parametrize(("steps", "kill"), [(3, 1), (2, None)])
def test_an_entry_tidies_up_after_its_ranks(toy: Path, equihpc: Run, steps: int, kill: int | None) -> None:
    """Also after a rank that was killed; that it cannot is no failure of the run."""
    code = (toy / "toy.py").read_text().replace("    seed: int = 0", '    seed: int = 0\n    text: str = ""')
    (toy / "toy.py").write_text(code + TIDY)
    point: dict[str, Any] = {"text": str(toy), "kill_at": kill}
    write(toy, [point], steps=steps)
    text = (toy / "job.yaml").read_text().replace('upstream: "${a}"', f'upstream: "${{a}}", text: {toy}')
    (toy / "job.yaml").write_text(text)
    done = equihpc("submit", "job.yaml", "--wait")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {run["state"] for run in states(equihpc).values()} == {"complete"}
    assert (toy / f"tidied_{steps}").exists()
    logs = "".join(path.read_text() for path in toy.glob("runs/job/a/*/*.log"))
    assert ("tidying up after toy failed: OSError: it is busy" in logs) == (steps == 2)
