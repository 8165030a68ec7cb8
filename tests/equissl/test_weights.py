"""What an evaluation reads its encoder from: runs, exports, published weights, unfinished runs; and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiny
import torch
from harness import run_ranks
from test_evaluate import on_ranks, settings
from test_published import shaken

from equissl import distributed, evaluate, launch, pretrain, untrained, weights
from equissl.checkpoint import Checkpoints
from equissl.config import EvaluateConfig, PretrainConfig, TimmModel
from equissl.encoder import Encoder, build_encoder, exported, load_teacher
from equissl.export import HEADS, export, heads_of
from equissl.files import write_json
from hpc.identity import identity

INV = {"name": "logistic", "num_c": 3, "max_iterations": 20, "part": "inv"}
R2 = {"name": "r2", "num_train_images": 40, "num_val_images": 20, "epochs": 2}


@pytest.fixture(scope="module")
def run_dir(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run of iBOT, of 6 steps, with the checkpoints of steps 3 and 6, whose weights differ. Do not write into it."""
    folder = tmp_path_factory.mktemp("runs") / "job" / "pretrain" / "run-0123"
    folder.mkdir(parents=True)
    config = tiny.config(str(photographs))
    write_json(folder / "config.json", config.model_dump(mode="json", by_alias=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RANK", raising=False)
        world = distributed.init()
        run = tiny.Run(config, world)
        checkpoints = Checkpoints(folder / "checkpoints", 2, world)
        for step in (3, 6):
            run.update(step // 3)
            checkpoints.save(step, run.method.state())
        checkpoints.close()
        parts = {"teacher.safetensors": exported(run.method.teacher), HEADS: heads_of(run.method.state())}
        contents = {name: {key: distributed.full(tensor.detach()) for key, tensor in tensors.items()} for name, tensors in parts.items()}
        distributed.close()
    sha256 = {}
    for name, tensors in contents.items():
        content = safetensors.torch.save(tensors)
        (folder / name).write_bytes(content)
        sha256[name] = hashlib.sha256(content).hexdigest()
    digests = {"weights_sha256": sha256["teacher.safetensors"], "heads_sha256": sha256[HEADS]}
    write_json(folder / "result.json", {**digests, "num_steps": 6, "versions": {"torch": torch.__version__}})
    (folder / "COMPLETE").touch()
    return folder


@pytest.fixture
def unfinished(run_dir: Path, tmp_path: Path) -> Path:
    """Stopped after its third step."""
    folder = Path(shutil.copytree(run_dir, tmp_path / "pretrain" / "run-0123"))
    for name in ("COMPLETE", "result.json", "teacher.safetensors", HEADS):
        (folder / name).unlink()
    shutil.rmtree(folder / "checkpoints" / "step_6")
    return folder


@pytest.fixture
def exported_to(run_dir: Path, tmp_path: Path) -> Path:
    to = tmp_path / "away" / "export"
    export(run_dir, to)
    return to


def vit_file(run_dir: Path, to: Path) -> Path:
    """The backbone of a run as timm would publish it."""
    tensors = safetensors.torch.load_file(run_dir / "teacher.safetensors")
    safetensors.torch.save_file({key.removeprefix("backbone."): t for key, t in tensors.items() if key.startswith("backbone.")}, to)
    return to


def vit(file: Path, **changes: Any) -> dict[str, Any]:
    return {"name": "vit_tiny_patch8_32.mine", "depth": 2, "file": str(file), **changes}


def evaluated(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    result = evaluate.main(config, folder, lambda: False)
    assert result is not None
    return result


def of_published(published: dict[str, Any], data: Path, task: Any = "knn", **changes: Any) -> dict[str, Any]:
    return settings(Path("x"), task, data=str(data), **changes) | {"checkpoint": None, "published": published}


# --- where it comes from ---------------------------------------------------------------------------------------------------


def test_an_export_is_evaluated_as_its_run(run_dir: Path, exported_to: Path, photographs: Path, tmp_path: Path) -> None:
    """k-NN on the backbone, logistic regression on z_inv; the features of the first one are there for the second."""
    for task in ("knn", INV):
        cached = {"cache": str(tmp_path / "cache")}
        run = evaluated(settings(run_dir, task, **cached), tmp_path)
        entries = len(list((tmp_path / "cache").iterdir()))
        other = evaluated(settings(exported_to, task, data=str(photographs), **cached), tmp_path)
        assert len(list((tmp_path / "cache").iterdir())) == entries, "the same weights, however they are packed"
        assert run.pop("encoder") == {"from": "run", "run": "run-0123"}
        assert other.pop("encoder") == {"from": "export", "folder": "export", "of": "teacher", "step": 6}
        assert other == run
        assert "incomplete" not in run


@pytest.mark.parametrize("task", ["knn", "linear", "logistic", R2], ids=["knn", "linear", "logistic", "r2"])
def test_published_weights_are_evaluated_as_a_run_with_these_weights(task: Any, run_dir: Path, photographs: Path, tmp_path: Path) -> None:
    file = vit_file(run_dir, tmp_path / "model.safetensors")
    run = evaluated(settings(run_dir, task), tmp_path)
    found = evaluated(of_published(vit(file), photographs, task), tmp_path)
    renamed = {name.replace("/", ":photographs/", 1): value for name, value in run["metrics"].items()}
    control = [name for name in renamed if name.endswith("random_encoder")]
    assert found["metrics"].keys() == renamed.keys()
    assert {n: v for n, v in found["metrics"].items() if n not in control} == {n: v for n, v in renamed.items() if n not in control}
    for name in control:  # the same architecture, untrained: of the same seed
        assert found["metrics"][name] == renamed[name]
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    assert found["encoder"] == {
        "from": "published",
        "name": "vit_tiny_patch8_32.mine",
        "file": "model.safetensors",
        "sha256": sha256,
        "notes": [],
    }
    assert found["main"]["metric"].partition("/")[0].endswith(":photographs")


@pytest.mark.parametrize("task", ["knn", R2], ids=["knn", "r2"])
def test_a_published_resnet(task: Any, photographs: Path, tmp_path: Path) -> None:
    """A folder that holds the file is the file, as the entry `untrained` leaves it."""
    config = {"name": "resnet18", "image_size": 32, "seed": 5}
    written = untrained.main(config, tmp_path, lambda: False)
    assert written is not None
    model = {key: value for key, value in config.items() if key != "seed"}
    found = evaluated(of_published({**model, "file": str(tmp_path)}, photographs, task), tmp_path)
    assert found["encoder"]["sha256"] == written["weights_sha256"]
    assert next(iter(found["metrics"])).startswith(("knn:photographs/", "r2:photographs/"))
    other = untrained.main({**config, "seed": 6}, tmp_path, lambda: False)
    assert other is not None
    assert other["weights_sha256"] != written["weights_sha256"]


def test_positions_are_interpolated_and_it_is_said(run_dir: Path, photographs: Path, tmp_path: Path) -> None:
    file = vit_file(run_dir, tmp_path / "model.safetensors")
    found = evaluated(of_published(vit(file, image_size=40), photographs), tmp_path)
    assert found["encoder"]["notes"] == ["position embeddings interpolated from 4×4 to 5×5 patches"]


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("vit_tiny_patch16_384", 384),
        ("vit_small_patch8_224.dino", 224),
        ("vit_base_patch32_224", 224),
        ("vit_small_patch14_dinov2.lvd142m", 518),
        ("vit_large_patch14_dinov2", 518),
        ("vit_huge_patch14_224.mae", 224),
        ("resnet50.anything", 224),
    ],
)
def test_timms_names_stand_for_timms_models(name: str, side: int) -> None:
    import timm

    config = TimmModel(name=name).as_pretraining()
    with torch.device("meta"):
        theirs = timm.create_model(name.removesuffix(".anything"), num_classes=0)
        ours = Encoder(config)
    shapes = {f"backbone.{key}": tensor.shape for key, tensor in theirs.state_dict().items() if not key.endswith("num_batches_tracked")}
    assert {key: tensor.shape for key, tensor in exported(ours).items()} == shapes
    assert config.side == side


# --- unfinished runs -------------------------------------------------------------------------------------------------------


def test_an_unfinished_run_is_evaluated_when_it_is_allowed_and_the_result_says_so(
    run_dir: Path, unfinished: Path, photographs: Path, tmp_path: Path
) -> None:
    config = settings(unfinished, "knn", allow_incomplete=True)
    found = evaluated(config, tmp_path)
    assert found["incomplete"] == "step 3 of 6"
    assert found["encoder"] == {"from": "checkpoint", "run": "run-0123", "step": 3}
    assert found["weights_sha256"] != json.loads((run_dir / "result.json").read_text())["weights_sha256"]
    assert run_ranks(on_ranks, 2, config, str(tmp_path), None)[0]["incomplete"] == "step 3 of 6"

    export(unfinished, tmp_path / "export")
    of_export = settings(tmp_path / "export", "knn", data=str(photographs))
    with pytest.raises(ValueError, match=r"export is an export of a run that is not complete \(step 3 of 6\); allow_incomplete: true"):
        evaluate.main(of_export, tmp_path, lambda: False)
    again = evaluated({**of_export, "allow_incomplete": True}, tmp_path)
    assert (again["incomplete"], again["weights_sha256"]) == ("step 3 of 6", found["weights_sha256"])

    assert "incomplete" not in evaluated(settings(run_dir, "knn", allow_incomplete=True), tmp_path), "nothing is missing"


def test_the_option_of_the_command_line(unfinished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    to = tmp_path / "evaluation"
    to.mkdir()
    (to / "config.json").write_text(json.dumps(settings(unfinished, "knn")))
    monkeypatch.setattr(launch.signal, "signal", lambda number, handler: None)
    monkeypatch.setattr("sys.argv", ["evaluate", str(to / "config.json")])
    with pytest.raises(
        ValueError, match=r"is not a complete run: it has no COMPLETE marker; allow_incomplete: true \(or --allow-incomplete\)"
    ):
        launch._run("equissl.evaluate", 0)
    monkeypatch.setattr("sys.argv", ["evaluate", str(to / "config.json"), "--allow-incomplete"])
    assert launch._run("equissl.evaluate", 0) == 0
    assert json.loads((to / "result.json").read_text())["incomplete"] == "step 3 of 6"


def test_the_newest_checkpoint_that_is_whole(run_dir: Path, unfinished: Path, tmp_path: Path) -> None:
    newer = Path(shutil.copytree(run_dir / "checkpoints" / "step_6", unfinished / "checkpoints" / "step_6"))
    assert evaluated(settings(unfinished, "knn", allow_incomplete=True), tmp_path)["incomplete"] == "step 6 of 6"
    damaged = next(newer.glob("__0_*"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert evaluated(settings(unfinished, "knn", allow_incomplete=True), tmp_path)["incomplete"] == "step 3 of 6"


# --- what is refused -------------------------------------------------------------------------------------------------------


def with_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = PretrainConfig.model_validate(json.loads(path.read_text()))
    path.write_text(json.dumps(config.model_dump(mode="json", by_alias=True) | changes))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", None, "is not the folder of a complete pretraining, or damaged: FileNotFoundError"),
        ("config.json", "{", "is not the folder of a complete pretraining, or damaged: JSONDecodeError"),
        ("config.json", "[]", "config.json is not the config of a pretraining"),
        ("result.json", None, "is not the folder of a complete pretraining, or damaged: FileNotFoundError"),
        ("result.json", "[]", "is not the folder of a complete pretraining, or damaged: TypeError"),
        ("result.json", "{}", r"is not the folder of a complete pretraining, or damaged: KeyError\('weights_sha256'\)"),
    ],
)
def test_a_complete_run_that_lacks_something(name: str, text: str | None, message: str, run_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run_dir, tmp_path / "run"))
    (folder / name).unlink()
    if text is not None:
        (folder / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_teacher(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "there is no such folder; give that of a pretraining, or of an export"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 20), "model.safetensors is no safetensors file, or damaged"),
        (lambda folder: (folder / "split.safetensors").unlink(), "there is no .*split.safetensors: an export is its whole folder"),
        (lambda folder: (folder / HEADS).unlink(), "there is no .*heads.safetensors"),
        (lambda folder: (folder / "config.json").unlink(), "is not the folder of a run: it has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{}"), "config.json is not the config of a pretraining"),
        (
            lambda folder: with_config(folder, image_size=48),
            r"backbone.pos_embed has the shape \(1, 17, 192\), its config says \(1, 37, 192\)",
        ),
        (
            lambda folder: with_config(folder, backbone={"name": "vit_tiny_patch16_224", "patch_size": 8, "depth": 3}),
            r"missing backbone.blocks.2.attn.proj.bias, .* and 8 more, unknown nothing",
        ),
    ],
    ids=["gone", "damaged", "no split", "no heads", "no config", "another config", "image size", "depth"],
)
def test_exports_that_are_not_what_they_should_be(spoil: Any, message: str, exported_to: Path, photographs: Path, tmp_path: Path) -> None:
    spoil(exported_to)
    with pytest.raises(ValueError, match=message):
        evaluate.main(settings(exported_to, "knn", data=str(photographs)), tmp_path, lambda: False)


def test_an_export_that_does_not_tell_its_step(exported_to: Path, photographs: Path, tmp_path: Path) -> None:
    """Of an earlier version: it may be of an unfinished run."""
    tensors = safetensors.torch.load_file(exported_to / "model.safetensors")
    safetensors.torch.save_file(tensors, exported_to / "model.safetensors")
    with pytest.raises(ValueError, match="after steps that its export, of an earlier version, does not tell"):
        evaluate.main(settings(exported_to, "knn", data=str(photographs)), tmp_path, lambda: False)


def test_published_weights_that_are_not_what_they_should_be(run_dir: Path, photographs: Path, tmp_path: Path) -> None:
    file = vit_file(run_dir, tmp_path / "model.safetensors")
    for changes, message in (
        ({"depth": 3}, r"does not fit vit_tiny_patch16_224: missing backbone.blocks.2.attn.proj.bias, .*\(depth\)\?"),
        ({"name": "vit_small_patch8_32"}, r"backbone.\S+ has the shape .*192.*, that of vit_small_patch16_224 is .*384"),
        ({"layer_scale": 0.1}, "its model has no LayerScale: leave layer_scale out"),
        ({"sha256": "0" * 64}, f"model.safetensors has the sha256 .*, but {'0' * 64} was expected: it was changed, or is another file"),
        ({"file": str(tmp_path / "nowhere.pth")}, "the file of weights .*nowhere.pth cannot be read: No such file"),
        ({"name": "vit_tiny_patch16_224.augreg_in21k"}, r"was trained on images with the mean \(0.5, 0.5, 0.5\)"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate.main(of_published(vit(file) | changes, photographs), tmp_path, lambda: False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint": None}, r"give one of checkpoint \(.*\) and published \(.*\), not neither"),
        ({"published": {"name": "resnet50", "file": "/x"}, "data": "/d"}, "and published .*, not both"),
        ({"checkpoint": None, "published": {"name": "resnet50", "file": "/x"}}, "published weights know no data set of ours: give data"),
        ({"checkpoint": None, "published": {"name": "resnet50", "file": "x"}, "data": "/d"}, "file 'x' is relative"),
        ({"checkpoint": None, "published": {"name": "resnet50", "file": "/x", "kind": "ibot"}, "data": "/d"}, "resnet50 is a ResNet"),
        (
            {"checkpoint": None, "published": {"name": "resnet50", "file": "/x", "image_size": 0}, "data": "/d"},
            "greater than or equal to 1",
        ),
        ({"checkpoint": None, "published": {"name": "vit_tiny_patch16_100", "file": "/x"}, "data": "/d"}, "100 is not a multiple of .* 16"),
        ({"checkpoint": None, "published": {"name": "vit_small_patch16_siglip_224", "file": "/x"}, "data": "/d"}, "unknown model .*choose"),
        (
            {"checkpoint": None, "published": {"name": "resnet50", "file": "/x"}, "data": "/d", "allow_incomplete": True},
            "the weights are published: leave it out",
        ),
        *(
            (
                {"checkpoint": None, "published": {"name": "resnet50", "file": "/x"}, "data": "/d", "task": task},
                "published weights have no inv",
            )
            for task in ({"name": "r2", "part": "inv"}, {"name": "r2", "part": "equi"}, INV)
        ),
    ],
)
def test_settings_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluateConfig.model_validate({"checkpoint": "/run", "task": "knn", **changes})


def test_a_folder_enters_the_identity_by_its_weights(run_dir: Path, unfinished: Path, exported_to: Path, tmp_path: Path) -> None:
    """And a stage by its run, as before there were other sources."""

    def of(folder: Path | str) -> Any:
        found = identity(EvaluateConfig.model_validate({"checkpoint": str(folder), "task": "knn"}), lambda name, _: name, {"a": "0a"}, [])
        assert "published" not in found
        return found["checkpoint"]

    assert of("${a}") == {"run": "0a"}
    assert of(run_dir) == {"weights_sha256": json.loads((run_dir / "result.json").read_text())["weights_sha256"]}
    assert set(of(unfinished)) == {"step", "checkpoint"}
    before = of(exported_to)
    assert set(before) == {"model.safetensors", "split.safetensors", HEADS, "config.json"}
    assert of(exported_to.rename(tmp_path / "moved")) == before


def test_what_a_plan_refuses(run_dir: Path, tmp_path: Path) -> None:
    def check(upstream: dict[str, Any], **changes: Any) -> None:
        EvaluateConfig.model_validate({"checkpoint": "${pretrain}", "task": "knn", **changes}).check(1, upstream)

    whole = json.loads((run_dir / "config.json").read_text())
    plain = whole | {"auxiliary": None}
    check({"pretrain": whole}, task=INV)
    check({}, checkpoint=str(run_dir), task=INV, allow_incomplete=True)
    check({}, checkpoint=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"task.part is equi, but the pretraining's representation has no invariant and equivariant part"):
        check({"pretrain": plain}, task={"name": "r2", "part": "equi"})
    with pytest.raises(ValueError, match=r"checkpoint \$\{pretrain\} is a stage, which is waited for until it is complete"):
        check({"pretrain": whole}, allow_incomplete=True)
    with pytest.raises(ValueError, match="checkpoint 'runs/x' is relative, but a job runs in another folder"):
        check({}, checkpoint="runs/x")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"checkpoint .* is no pretraining: Field required"):
        check({}, checkpoint=str(tmp_path))


def test_what_it_costs_is_told_of_published_weights_and_of_folders(run_dir: Path) -> None:
    def hours(**changes: Any) -> float:
        found = EvaluateConfig.model_validate({"task": "knn", "data": "imagenet1k", **changes}).estimate({"tflops": 100.0}, 1, {})
        assert found is not None
        assert found.gpu_hours is not None
        return found.gpu_hours

    small, large = (hours(published={"name": f"vit_{size}_patch16_224", "file": "/x"}) for size in ("small", "large"))
    assert 10 < large / small < 16
    assert hours(checkpoint=str(run_dir)) == pytest.approx(hours(published=vit(Path("/x"))))


# --- a pretraining that begins with them ----------------------------------------------------------------------------------------


def test_a_pretraining_says_what_it_began_with_and_goes_on_without_the_file(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    model = shaken(build_encoder(tiny.config("synthetic", "vicreg", auxiliary=None)))
    file = tmp_path / "published.safetensors"
    safetensors.torch.save_file({key.removeprefix("backbone."): tensor.contiguous() for key, tensor in exported(model).items()}, file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    changes: dict[str, Any] = {"auxiliary": None, "num_steps": 4}

    def config(sha256: str | None) -> dict[str, Any]:
        with_file = tiny.config(str(photographs), "vicreg", backbone__weights={"file": str(file), "sha256": sha256}, **changes)
        return with_file.model_dump(mode="json", by_alias=True)

    with pytest.raises(ValueError, match=f"published.safetensors has the sha256 {digest}, but {'1' * 64} was expected"):
        pretrain.main(config("1" * 64), tmp_path / "other", lambda: False)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    assert pretrain.main(config(digest), run_dir, lambda: True) is None
    assert list((run_dir / "checkpoints").glob("step_*"))
    file.unlink()
    result = pretrain.main(config(digest), run_dir, lambda: False)
    assert result is not None
    assert result["began_with"] == {"file": "published.safetensors", "sha256": digest}


def test_the_source_of_a_moved_run(run_dir: Path, tmp_path: Path) -> None:
    """`~` and a link are places too."""
    (tmp_path / "link").symlink_to(run_dir)
    world = distributed.init()
    try:
        found = weights.load_source(EvaluateConfig.model_validate({"checkpoint": str(tmp_path / "link"), "task": "knn"}), world)
    finally:
        distributed.close()
    assert found.sha256 == json.loads((run_dir / "result.json").read_text())["weights_sha256"]
