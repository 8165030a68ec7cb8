"""Exports: plain timm loads them in a process without this package and computes the same bits; where they come from; what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiny
import torch
import typer
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from equissl import card, checkpoint, export, pretrain
from equissl.config import PretrainConfig
from equissl.encoder import WEIGHTS, build_encoder, exported_name, load_teacher
from equissl.files import DiskFull, write_json
from equissl.heads import PrototypeHead
from equissl.photometry import normalise
from hpc.commands import export as equihpc_export
from hpc.errors import UserError
from hpc.runs import RunFolder
from hpc.status import JobRecord, Record

FILES = ["README.md", "config.json", "heads.safetensors", "model.safetensors", "split.safetensors"]
CODE = {"hash": "0a1b2c", "commit": "f00", "dirty": True}


@pytest.fixture(scope="module")
def complete(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a complete run of four steps with the checkpoints of steps 2 and 4. Not to be written into."""
    run_dir = tmp_path_factory.mktemp("runs") / "job" / "pretrain" / "lambda=1-0123"
    run_dir.mkdir(parents=True)
    config = tiny.config(str(photographs), num_steps=4, checkpoint_every=2).model_dump(mode="json", by_alias=True)
    result = pretrain.main(config, run_dir, lambda: False)
    for name, content in (("config", config), ("result", result), ("spec", {"entry": "equissl.pretrain", "code": CODE})):
        write_json(run_dir / f"{name}.json", content)
    (run_dir / "COMPLETE").touch()
    return run_dir


@pytest.fixture
def run(complete: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(complete, tmp_path / "run"))


@pytest.fixture
def unfinished(run: Path) -> Path:
    """Stopped after its second step."""
    for name in ("COMPLETE", "result.json", WEIGHTS, "heads.safetensors"):
        (run / name).unlink()
    shutil.rmtree(run / "checkpoints" / "step_4")
    return run


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(path)


def whole(step: Path, scratch: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, read by torch's own tool."""
    dcp_to_torch_save(step, scratch / "whole.pt")
    return dict(torch.load(scratch / "whole.pt"))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def snippet(to: Path) -> str:
    (found,) = re.findall(r"```python\n(.*?)```", (to / "README.md").read_text(), re.DOTALL)
    return str(found)


def test_plain_timm_computes_the_same_bits_in_a_process_without_this_package(complete: Path, tmp_path: Path) -> None:
    to = tmp_path / "export"
    assert export.command([str(complete), "--to", str(to)]) == 0
    assert sorted(path.name for path in to.iterdir()) == FILES
    keep = """
import sys
from safetensors.torch import save_file
assert not any(name.startswith("equissl") for name in sys.modules)
found = dict(images=images, tokens=tokens, z_inv=z_inv, z_inv_patches=z_inv_patches, z_equi=z_equi, logits=logits)
save_file({name: value.contiguous() for name, value in found.items()}, "outputs.safetensors")
"""
    (tmp_path / "use.py").write_text(snippet(to) + keep)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, tmp_path / "use.py"], cwd=to, env=environment, check=True)
    found = tensors(to / "outputs.safetensors")

    encoder, config, _ = load_teacher(complete)
    with torch.inference_mode():
        ours = encoder(normalise(found["images"]))
        head = PrototypeHead(32, config.method.head_hidden, config.method.head_bottleneck, config.method.prototypes)
        heads = tensors(to / "heads.safetensors")
        head.load_state_dict({name.removeprefix("head."): tensor for name, tensor in heads.items() if name.startswith("head.")})
        expected = {
            "images": found["images"],
            "tokens": ours.tokens,
            "z_inv": ours.inv_cls,
            "z_inv_patches": ours.inv_patches,
            "z_equi": ours.equi,
            "logits": head(ours.inv_cls),
        }
    assert found["z_equi"].shape == (2, 16, 16)
    assert found["logits"].shape == (2, 64)
    assert same(found, expected)


def test_a_complete_run_is_exported_from_its_safetensors(run: Path, tmp_path: Path) -> None:
    state = whole(run / "checkpoints" / "step_4", tmp_path)
    shutil.rmtree(run / "checkpoints")  # as gc does
    told = export.export(run, tmp_path / "export")
    assert (told["of"], told["step"], told["num_steps"], told["is_complete"], told["notes"]) == ("teacher", 4, 4, True, [])
    encoder = {exported_name(name.removeprefix("teacher.encoder.")): t for name, t in state.items() if name.startswith("teacher.encoder.")}
    heads = {name.removeprefix("teacher."): tensor for name, tensor in state.items() if name.startswith("teacher.head.")}
    assert same(
        tensors(tmp_path / "export" / "heads.safetensors"), {**heads, "centres": state["centres"], "mask_token": encoder["mask_token"]}
    )
    model, split = tensors(tmp_path / "export" / "model.safetensors"), tensors(tmp_path / "export" / "split.safetensors")
    assert same(
        {f"backbone.{name}": t for name, t in model.items()} | {f"split.{name}": t for name, t in split.items()},
        {name: tensor for name, tensor in encoder.items() if name != "mask_token"},
    )
    for name, file in told["files"].items():
        content = (tmp_path / "export" / name).read_bytes()
        assert file == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        assert file["sha256"] in (tmp_path / "export" / "README.md").read_text()

    (run / "heads.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"heads\.safetensors has another sha256 than result\.json says"):
        export.export(run, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_runs_of_earlier_versions_have_their_heads_in_checkpoints(run: Path, tmp_path: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    write_json(run / "result.json", {name: value for name, value in result.items() if name != "heads_sha256"})
    heads = tensors(run / "heads.safetensors")
    (run / "heads.safetensors").unlink()
    assert export.export(run, tmp_path / "with")["notes"] == []
    assert same(tensors(tmp_path / "with" / "heads.safetensors") | heads, tensors(tmp_path / "with" / "heads.safetensors"))
    shutil.rmtree(run / "checkpoints")
    (note,) = export.export(run, tmp_path / "without")["notes"]
    assert "Without heads: an earlier version" in note
    assert "the checkpoints of run are gone" in note
    assert tensors(tmp_path / "without" / "heads.safetensors").keys() == {"mask_token"}
    assert "logits" not in snippet(tmp_path / "without")
    assert str(tmp_path) not in (tmp_path / "without" / "README.md").read_text()


def test_the_student_and_unfinished_runs_come_from_checkpoints(run: Path, tmp_path: Path) -> None:
    state = whole(run / "checkpoints" / "step_4", tmp_path)
    assert export.export(run, tmp_path / "student", student=True)["of"] == "student"
    backbone = "student.encoder.backbone.vit."
    expected = {name.removeprefix(backbone): tensor for name, tensor in state.items() if name.startswith(backbone)}
    assert same(tensors(tmp_path / "student" / "model.safetensors"), expected)
    assert torch.equal(tensors(tmp_path / "student" / "heads.safetensors")["head.prototypes"], state["student.head.prototypes"])
    assert not same(expected, {name: state[backbone.replace("student", "teacher") + name] for name in expected})
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ValueError, match="export without --student, or have the pretraining run again") as caught:
        export.export(run, tmp_path / "no", student=True)
    assert "equihpc gc removes those of complete runs" in str(caught.value)


def test_an_unfinished_run_says_so(unfinished: Path, tmp_path: Path) -> None:
    state = whole(unfinished / "checkpoints" / "step_2", tmp_path)
    told = export.export(unfinished, tmp_path / "export", about={"evaluations": []})
    assert (told["step"], told["num_steps"], told["is_complete"]) == (2, 4, False)
    record = json.loads((unfinished / "metrics.jsonl").read_text().splitlines()[1])
    assert told["losses"] == {name: record[name] for name in ("step", "loss", "cls", "patch", "reconstruction")}
    text = (tmp_path / "export" / "README.md").read_text()
    assert "**The run is not finished: these are the weights of its newest checkpoint, after step 2 of 4.**" in text
    assert "there are none of these weights" in text
    model = tensors(tmp_path / "export" / "model.safetensors")
    assert torch.equal(model["pos_embed"], state["teacher.encoder.backbone.vit.pos_embed"])

    step = unfinished / "checkpoints" / "step_2"
    (step / ".metadata").write_bytes(b"of a torch to come")
    marker = json.loads((step / checkpoint.MARKER).read_text())
    marker["files"][".metadata"] = checkpoint._describe(step / ".metadata").model_dump()
    write_json(step / checkpoint.MARKER, {**marker, "torch": "9.9.9"})
    with pytest.raises(ValueError, match=r"was written by torch 9\.9\.9, and torch .* cannot read it .*: go on with torch 9\.9\.9"):
        export.export(unfinished, tmp_path / "no")
    shutil.rmtree(unfinished / "checkpoints")
    with pytest.raises(ValueError, match="is not complete and has no checkpoint yet"):
        export.export(unfinished, tmp_path / "no")
    (unfinished / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is not the config of a pretraining"):
        export.export(unfinished, tmp_path / "no")
    with pytest.raises(ValueError, match=r"is not the folder of a run: it has no config\.json"):
        export.export(tmp_path, tmp_path / "no")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("scale", [None, 1e-5])
def test_without_a_split_the_tokens_are_z_inv(scale: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny.config(auxiliary=None, transformation=None, backbone__layer_scale=scale)
    encoder = build_encoder(config)
    named = {exported_name(name): parameter for name, parameter in encoder.named_parameters()}
    model = {name.removeprefix("backbone."): tensor for name, tensor in named.items() if name.startswith("backbone.")}
    export._check_with_timm(model, config, tmp_path)
    safetensors.torch.save_file(model, tmp_path / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(card.code(config, {"mask_token": (192,)}), names)
    with torch.inference_mode():
        ours = encoder(normalise(names["images"]))
    assert torch.equal(names["z_inv"], ours.inv_cls)
    assert torch.equal(names["z_inv_patches"], ours.inv_patches)
    model.pop("cls_token")
    with pytest.raises(ValueError, match=r'do not fit its config\.json: [^"]*Missing key\(s\) in state_dict: "cls_token"'):
        export._check_with_timm(model, config, tmp_path)


def test_nothing_is_overwritten_but_an_earlier_export_when_asked(
    complete: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    to = tmp_path / "export"
    words = [str(complete), "--to", str(to)]
    to.mkdir()
    assert export.command(words) == 2
    assert f"equihpc: {to} exists: give another place with --to, or --force to replace an earlier export" in capsys.readouterr().err
    (to / "README.md").write_text("an earlier one")
    (to / "thesis.tex").write_text("years of work")
    assert export.command([*words, "--force"]) == 2
    assert "is not an earlier export, for there is thesis.tex: it is not replaced" in capsys.readouterr().err
    (to / "thesis.tex").unlink()

    def full(path: Path, content: bytes) -> None:
        if path.name == "README.md":
            raise DiskFull(28, "No space left on device: README.md needs more")
        path.write_bytes(content)

    with monkeypatch.context() as patch:
        patch.setattr(export, "write_atomic", full)
        assert export.command([*words, "--force"]) == 1
    assert capsys.readouterr().err == "equihpc: No space left on device: README.md needs more\n"
    assert [path.name for path in to.iterdir()] == ["README.md"]
    assert export.command([*words, "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"].keys() == set(FILES) - {"README.md"}
    assert sorted(path.name for path in to.iterdir()) == FILES
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


# --- as a command of equihpc ---------------------------------------------------------------------------------------------


@pytest.fixture
def equihpc(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`equihpc export` on a job of that run and its evaluations; what it starts runs in this process."""
    runs = tmp_path / "runs"
    records = [Record("lambda=1-0123", "0123", "pretrain", {}, [], 4)]
    folder = runs / "job" / "pretrain" / "lambda=1-0123"
    folder.parent.mkdir(parents=True)
    run.rename(folder)
    for name, hash, metrics in (("knn-45", "45", {"knn/top1": 0.4375}), ("r2-67", "67", {"r2/rotation": 0.125}), ("linear-89", "89", None)):
        records.append(Record(name, hash, "evaluate", {}, ["lambda=1-0123"], 0))
        evaluation = RunFolder(runs / "job" / "evaluate" / name)
        evaluation.create({"entry": "equissl.evaluate"})
        if metrics:
            write_json(evaluation.result, {"metrics": metrics, "protocol": "x-1", "dataset": {"name": "photographs"}})
            evaluation.complete.touch()
    (runs / "job" / ".equihpc").mkdir()
    write_json(
        runs / "job" / ".equihpc" / "job.json", JobRecord("job", "job.yaml", "x", None, str(tmp_path / "ledger"), {}, records).to_json()
    )

    def here(command: list[str]) -> subprocess.CompletedProcess[str]:
        assert command[:3] == [sys.executable, "-m", "equissl.export"]
        return subprocess.CompletedProcess(command, export.command(command[3:]))

    monkeypatch.setattr(equihpc_export.subprocess, "run", here)
    monkeypatch.chdir(tmp_path)

    def call(run_id: str, **options: Any) -> int:
        with pytest.raises(typer.Exit) as caught:
            equihpc_export.export_command(run_id, runs, **{"to": None, "student": False, "force": False, "json_": False, **options})
        return caught.value.exit_code

    return call


def test_the_card_tells_where_it_comes_from_and_how_good_it_is(
    equihpc: Callable[..., int], photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert equihpc("0123") == 0
    to = tmp_path / "lambda=1-0123"
    listed = "model.safetensors, split.safetensors, heads.safetensors, config.json, README.md"
    assert capsys.readouterr().out == f"teacher of lambda=1-0123 after step 4 (complete): {listed} in {to}\n"
    text = (to / "README.md").read_text()
    result = json.loads((tmp_path / "runs/job/pretrain/lambda=1-0123/result.json").read_text())
    for told in (
        "The teacher of a pretraining: vit_tiny_patch16_224 as in timm, images of 32 pixels in patches of 8, 2 blocks, 192 dimensions",
        "by ibot with intermediate reconstruction along se2 (lambda 1): of 48 linear features of each token 16 are equivariant, z_equi",
        "The run is complete: 4 steps.",
        f"| loss | {result['final_loss']:.6g} |",
        "| knn/top1 | 0.4375 | photographs, x-1, run knn-45 |\n| r2/rotation | 0.125 | photographs, x-1, run r2-67 |",
        f"- Images: photographs, sha256 of the manifest {result['data']['manifest_sha256']}",
        "- Code: commit f00, with uncommitted changes, hash 0a1b2c",
        f"- Trained with torch {result['versions']['torch']}",
        '"base_lr": 0.02',
        "Licence: Apache-2.0",
    ):
        assert told in text
    assert "linear-89" not in text
    shared = json.loads((to / "config.json").read_text())
    assert PretrainConfig.model_validate(shared).data == "photographs"
    assert str(photographs) not in text + (to / "config.json").read_text(), "places are nobody's business"

    (tmp_path / "runs/job/pretrain/lambda=1-0123/.invalid").write_text("a bug")
    assert equihpc("0123") == 2, "it is there"
    assert equihpc("0123", force=True, json_=True) == 0
    assert json.loads(capsys.readouterr().out)["to"] == str(to)
    assert "**The result of this run is stale: invalidated: a bug.**" in (to / "README.md").read_text()
    with pytest.raises(UserError, match=r"knn-45 is a run of equissl\.evaluate; only those of equissl\.pretrain have weights to export"):
        equihpc("knn-45")
    shutil.rmtree(tmp_path / "runs/job/pretrain")
    with pytest.raises(UserError, match="its folder is not here"):
        equihpc("0123")
