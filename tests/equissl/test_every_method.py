"""What holds for every method in the folder: it survives a kill and another number of ranks, and `plan` knows its size.

The other proofs for all of them are in test_golden and test_distributed.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from harness import run_ranks
from safetensors.torch import load_file
from test_export import snippet
from test_loop import attempt, curve
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from equissl import distributed, methods
from equissl.checkpoint import read_whole
from equissl.config import SYNTHETIC
from equissl.distributed import World
from equissl.encoder import Features, exported_name, load_teacher
from equissl.estimates import pretraining_flops, pretraining_sizes
from equissl.export import DECODERS, HEADS, STUDENT, export
from equissl.files import write_json
from equissl.heads import Expander

METHODS = list(tiny.METHODS)
SGD = {"name": "sgd", "base_lr": 0.1, "warmup_epochs": 0.1}  # rounding stays rounding; Adam's state is in test_loop's runs


def test_no_method_is_forgotten() -> None:
    assert {tiny.config(method=method).method.name for method in METHODS} == set(methods.names())


@pytest.mark.parametrize("method", METHODS)
def test_killed_and_resumed_on_as_many_ranks_and_on_another_number(
    method: str, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: World
) -> None:
    settings = tiny.config(str(photographs), method=method, checkpoint_every=2, num_steps=5, method__optimizer=SGD)
    config: dict[str, Any] = settings.model_dump(mode="json", by_alias=True)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    expected = run_ranks(attempt, 2, config, whole)[0][0]
    run_ranks(attempt, 2, config, killed, 0, 4, killed=True)
    assert [record["step"] for record in curve(killed)][:2] == [1, 2]
    other = shutil.copytree(killed, tmp_path / "other")

    again = run_ranks(attempt, 2, config, killed)[0][0]
    assert curve(killed) == curve(whole)
    assert again["weights_sha256"] == expected["weights_sha256"]
    assert again["heads_sha256"] == expected["heads_sha256"]

    run_ranks(attempt, 1, config, other)
    for mine, theirs in zip(curve(other), curve(whole), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3)
    terms = methods.terms(settings)
    assert set(terms) < curve(whole)[0].keys()

    kept_for_measures(whole, settings.method.has_teacher and (settings.method.sees_plain or settings.auxiliary is not None), expected)

    # what leaves the run: read again, exported, and loaded by the code on its card
    for name, content in (("config", config), ("result", expected), ("spec", {"entry": "equissl.pretrain"})):
        write_json(whole / f"{name}.json", content)
    (whole / "COMPLETE").touch()
    encoder, _, _ = load_teacher(whole)
    told = export(whole, tmp_path / "export")
    if not settings.method.has_teacher:  # its student is what leaves the run, also where no checkpoint is left
        shutil.rmtree(whole / "checkpoints")
        asked = export(whole, tmp_path / "student", student=True)
        assert asked["of"] == told["of"]
    assert set(terms) < told["losses"].keys()
    monkeypatch.chdir(tmp_path / "export")
    loaded: dict[str, Any] = {}
    exec(snippet(tmp_path / "export"), loaded)
    features = encoder((loaded["images"] - loaded["mean"]) / loaded["std"])
    torch.testing.assert_close(loaded["z_inv"], features.inv_cls)
    expected_outputs = outputs_of_heads(tiny.Run(settings, world), loaded["heads"], features) if "heads" in loaded else {}
    if features.equi is not None:
        expected_outputs["z_equi"] = features.equi
    assert settings.auxiliary is None or "z_equi" in expected_outputs
    for name, value in expected_outputs.items():
        torch.testing.assert_close(loaded[name], value)


def outputs_of_heads(run: tiny.Run, heads: dict[str, torch.Tensor], features: Features) -> dict[str, torch.Tensor]:
    """By the method's own networks, with what was exported of them; no more than the card has code for."""
    network = run.method.teacher_network or run.method.student
    network.eval()
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if not name.startswith("encoder."):
            distributed.local(tensor).copy_(heads[name])
    num_patches = features.patches.shape[1] * len(features.tokens)
    found = {}
    with torch.no_grad():
        for name in ("expander", "inv", "equi"):
            if isinstance(getattr(network, name, None), Expander):
                read = features.split.equi(features.cls) if name == "equi" and features.split else features.inv_cls
                found[f"embedding_{name}"] = getattr(network, name)(read[None])[0]
        if hasattr(network, "head"):
            found["logits"] = network.head(features.inv_cls)
        if run.settings.d_head:
            every = torch.cat([features.cls, features.patches.flatten(0, 1)])
            equi = network.head(every, None, num_patches)[1] if hasattr(network, "head") else network.expander(every[None], num_patches)[1]
            found["z_equi"] = equi.view(*features.patches.shape[:2], -1)
    return found


@pytest.mark.parametrize(
    ("method", "name"), [(method, name) for method, name, _ in tiny.variants({"auxiliary": {}, "plain": {}, "lars": {}})]
)
def test_plan_knows_parameters_checkpoints_and_flops(method: str, name: str, world: World) -> None:
    changes = {"auxiliary": {}, "plain": tiny.plain(method), "lars": {"method__optimizer": "lars"}}[name]
    settings = tiny.config(SYNTHETIC, method, backbone__drop_path=0.0, batch=32, **changes)  # without the monitor's bank
    run = tiny.Run(settings, world)
    sizes = pretraining_sizes(settings)
    assert sizes.trained == pytest.approx(sum(p.numel() for p in run.parameters.values()), rel=0.02)
    in_teacher = sum(tensor.numel() for key, tensor in run.method.state().items() if key.startswith("teacher."))
    assert sizes.averaged == pytest.approx(in_teacher, rel=0.02)

    state = run.method.state() | run.optimizer.state() | (run.auxiliary.state() if run.auxiliary else {})
    estimate = settings.estimate({}, 1, {})
    assert estimate is not None
    assert estimate.checkpoint_bytes == pytest.approx(4 * sum(tensor.numel() for tensor in state.values()), rel=0.02)

    views = run.views(0)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():  # the CPU's fused kernel is not counted
        output = run.method.step(views, 0)
        if run.auxiliary:
            assert output.equi is not None
            assert views.targets is not None
            run.auxiliary(output.equi, views.targets)
    assert counter.get_total_flops() == pytest.approx(settings.batch * sum(pretraining_flops(settings)), rel=0.03)


def kept_for_measures(run: Path, has_student: bool, result: dict[str, Any]) -> None:
    """Student, EquiMod's heads and decoders as files, bit by bit those of the last checkpoint."""
    of_checkpoint = read_whole(run / "checkpoints" / "step_5", lambda _: True)
    state = {name: tensor for name, tensor in of_checkpoint.items() if name.startswith(("student.", "auxiliary."))}
    assert (run / STUDENT).is_file() is has_student
    found = {name: load_file(run / name) for name in (STUDENT, DECODERS, HEADS) if (run / name).is_file()}
    for name in found:
        assert result[f"{name.partition('.')[0]}_sha256"] == hashlib.sha256((run / name).read_bytes()).hexdigest()
    for name, tensor in state.items():
        kind, _, key = name.partition(".")
        if kind == "auxiliary":
            assert torch.equal(found[DECODERS][key], tensor), name
        elif has_student:
            assert torch.equal(found[STUDENT][exported_name(key.removeprefix("encoder."))], tensor), name
        elif key.startswith("equimod."):
            assert torch.equal(found[HEADS][key], tensor), name
    kinds = [name.partition(".")[0] for name in state]
    assert len(found.get(DECODERS, {})) == kinds.count("auxiliary")
    assert len(found.get(STUDENT, {})) == (kinds.count("student") if has_student else 0)
