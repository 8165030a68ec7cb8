"""The contact sheet: what it shows is what is trained on, and what it says is what was done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as v2

from equissl import transforms
from equissl.config import PretrainConfig
from equissl.data import sample
from equissl.data.__main__ import main
from equissl.data.loader import decode, make_loader
from equissl.data.shards import Sample, ShardSet, write_manifest, write_shards
from equissl.photometry import denormalise
from equissl.views import MakeViews

CPU = torch.device("cpu")


def settings(data: Path, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "data": str(data),
        "backbone": {"name": "vit_tiny_patch16_224", "patch_size": 8, "depth": 1},
        "image_size": 24,
        "method": {"name": "ibot", "representation": 64, "views": {"num_local": 3, "local_size": 16, "global_scale": [0.1, 0.3]}},
        "transformation": "se2",
        "auxiliary": {"name": "reconstruction", "d": 32, "decoder_widths": [16, 8, 8], "include_final": True},
        "batch": 16,
        "group_size": 4,
        "num_steps": 200,
        "num_workers": 3,
    }
    return values | changes


def config(data: Path, **changes: Any) -> PretrainConfig:
    return PretrainConfig.model_validate(settings(data, **changes))


def call(folder: Path, capsys: pytest.CaptureFixture[str], values: dict[str, Any], *words: str) -> dict[str, Any]:
    (folder / "config.json").write_text(json.dumps(values))
    assert main(["sample", str(folder), *words, "--out", str(folder / "sheet.png"), "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


@pytest.mark.parametrize(
    ("batch", "group_size", "world_size", "pipeline"), [(16, 4, 1, "fast"), (16, 4, 4, "reference"), (2, 1, 2, "fast")]
)
def test_a_sample_alone_is_that_of_the_batch(photographs: Path, batch: int, group_size: int, world_size: int, pipeline: str) -> None:
    """In whole permutations and in lanes (108 batches of 2), on each rank."""
    data, values = ShardSet(photographs, "train"), config(photographs, batch=batch, group_size=group_size, pipeline=pipeline, num_workers=0)
    size = batch // world_size
    for rank, step in ((0, 0), (world_size - 1, 114)):
        loader = make_loader(data, values, rank, world_size, step, step + 1)
        expected = next(loader)
        loader.close()
        seen = MakeViews(values, CPU)(expected)
        for row in {0, size - 1}:
            alone = sample.one_by_one(data, values, step, [rank * size + row])
            assert (alone.step, alone.epoch) == (step, expected.epoch)
            for name in ("index", "position", "label", "view1", "source2"):
                assert torch.equal(getattr(alone, name), getattr(expected, name)[row : row + 1])
            assert torch.equal(alone.local, expected.local[:, row : row + 1])
            views = MakeViews(values, CPU)(alone)
            assert torch.allclose(views.global1[0], seen.global1[row], rtol=0, atol=1e-5)
            assert torch.allclose(views.global2[0], seen.global2[row], rtol=0, atol=1e-5)
            assert torch.allclose(views.local[:, 0], seen.local[:, row], rtol=0, atol=1e-5)


def test_the_sheet_shows_the_views_and_says_what_was_drawn(photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = call(tmp_path, capsys, settings(photographs), "3", "--step", "20", "--rank", "1", "--world-size", "2")
    data, values = ShardSet(photographs, "train"), config(photographs, num_workers=0)
    batch = next(make_loader(data, values, 1, 2, 20, 21))
    make_views = MakeViews(values, CPU)
    views, motion = make_views(batch), make_views.parameters(batch)
    assert {key: found[key] for key in ("step", "epoch", "rank", "world_size", "pipeline")} == {
        "step": 20,
        "epoch": batch.epoch,
        "rank": 1,
        "world_size": 2,
        "pipeline": "fast",
    }
    assert [each["row"] for each in found["samples"]] == [0, 1, 2]
    with Image.open(found["path"]) as image:
        sheet = np.asarray(image.convert("RGB"))

    for row, each in enumerate(found["samples"]):
        index = int(batch.index[row])
        label = int(data.labels[index])
        assert (each["index"], each["position"], each["epoch"]) == (index, int(batch.position[row]), batch.epoch)
        assert (each["key"], each["label"], each["class"]) == (data.key(index), label, data.classes[label])
        assert list(each["transformation"]["parameters"].values()) == pytest.approx(motion[row].tolist())
        assert each["transformation"]["units"] == {"rotation": "degrees", "translation_x": "pixels", "translation_y": "pixels"}
        assert [crop["name"] for crop in each["crops"]] == ["view1", "source2", "local1", "local2", "local3"]

        # each view made anew by torchvision from what is said, and found in the picture
        source = make_views.coloured(batch)[1][row]
        for crop, seen in zip(each["crops"], [denormalise(views.global1[row]), source, *denormalise(views.local[:, row])], strict=True):
            box = crop["box"]
            image = v2.resized_crop(
                decode(data, index), *(box[name] for name in ("top", "left", "height", "width")), [crop["side"]] * 2,
                interpolation=v2.InterpolationMode.BICUBIC,
            )  # fmt: skip
            image = (v2.horizontal_flip(image) if crop["flip"] else image).float() / 255
            for name, factor in crop["jitter"]:
                image = getattr(v2, f"adjust_{name}")(image, factor)
            image = v2.rgb_to_grayscale(image, 3) if crop["grey"] else image
            image = v2.gaussian_blur(image, [5, 5], [crop["sigma"]] * 2) if crop["sigma"] else image  # sigma of 24 pixels: 0.2
            image = v2.solarize(image, 0.5) if crop["solarize"] else image
            assert (image - seen).abs().mean() < 1e-3
        for view in (denormalise(views.global1[row]), denormalise(views.global2[row]), *denormalise(views.local[:, row])):
            assert is_in(sheet, np.asarray(sample.picture(view, 9)))
        assert is_in(sheet, np.asarray(sample.picture(source[:, 7:31, 7:31], 9)))  # before g
        assert views.targets is not None
        for target in denormalise(views.targets[:, row]):
            assert is_in(sheet, np.asarray(sample.picture(target, 9)))

    only = call(tmp_path, capsys, settings(photographs), "--index", "2", "--step", "20", "--rank", "1", "--world-size", "2")
    assert only["samples"] == found["samples"][2:3]


def test_the_paths_are_those_of_the_transformations(photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every one in the folder; the training's own with its settings; what is said is what was drawn."""
    values = settings(photographs, transformation={"name": "color", "max_hue": 0.5}, auxiliary=None)
    found = call(tmp_path, capsys, values, "3", "--paths", "--step", "20", "--rank", "1", "--world-size", "2")
    assert list(found["paths"]) == transforms.names()
    with Image.open(found["path"]) as image:
        sheet = np.asarray(image.convert("RGB"))
    for name, said in found["paths"].items():
        alone = config(photographs, transformation=values["transformation"] if name == "color" else name, auxiliary=None, num_workers=0)
        batch = next(make_loader(ShardSet(photographs, "train"), alone, 1, 2, 20, 21))
        make_views = MakeViews(alone, CPU)
        assert make_views.transform is not None
        source, parameters = make_views.coloured(batch)[1][:3], make_views.parameters(batch)[:3]
        assert [list(each) for each in said] == [list(make_views.transform.names)] * 3
        assert torch.allclose(torch.tensor([list(each.values()) for each in said]), parameters)
        for fraction in (0.0, 1 / 3, 2 / 3, 1.0):
            for image in make_views.transform.apply(source, parameters, fraction, 24):
                assert is_in(sheet, np.asarray(sample.picture(image, 9)))
    assert max(abs(each["hue"]) for each in found["paths"]["color"]) > 0.1
    two = call(tmp_path, capsys, values, "--paths", "--step", "20")
    assert two["rows"] == [0, 1]
    values["auxiliary"] = {"name": "reconstruction", "d": 32, "decoder_widths": [16, 8, 8], "num_images": 3, "include_final": True}
    with Image.open(call(tmp_path, capsys, values, "1", "--paths")["path"]) as sheet_of_five:
        assert sheet_of_five.width >= 5 * sample.CELL


def is_in(sheet: np.ndarray[Any, Any], part: np.ndarray[Any, Any]) -> bool:
    """Whether the picture, but for the number in its corner, is somewhere in the sheet."""
    height, width, _ = part.shape
    middle = height // 2
    line, below = part[middle, width // 2 :], part[middle:, width // 2 :]
    for y, x in zip(*np.nonzero((sheet == line[0]).all(axis=2)), strict=True):
        if np.array_equal(sheet[y, x : x + len(line)], line) and np.array_equal(sheet[y : y + len(below), x : x + len(line)], below):
            return True
    return False


def test_without_transformation_local_crops_and_labels(tmp_path: Path, photographs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And views larger than a cell, which are shown smaller."""
    source, folder = ShardSet(photographs, "train"), tmp_path / "data"
    folder.mkdir()
    write_manifest(folder, "plain", [], {"train": write_shards([Sample("only", source.read(0), "png", -1)], folder, "train", 9)}, {})
    plain = {"transformation": None, "auxiliary": None, "batch": 1, "group_size": 1, "image_size": 256}
    found = call(tmp_path, capsys, settings(folder, **plain, method={"name": "ibot", "views": {"num_local": 0}}))
    (only,) = found["samples"]
    assert (only["key"], only["label"], only["class"], only["transformation"]) == ("only", None, None, None)
    assert [crop["name"] for crop in only["crops"]] == ["view1", "source2"]
    with Image.open(found["path"]) as sheet:
        assert sheet.width >= 3 * sample.CELL


def test_targets_without_a_transformation(tmp_path: Path, photographs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    auxiliary = {"name": "cross_attention", "d": 16, "decoder_widths": [16, 8, 8]}
    found = call(tmp_path, capsys, settings(photographs, transformation=None, auxiliary=auxiliary))
    assert all(each["transformation"] is None for each in found["samples"])


def test_default_place_and_no_leftovers(photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Path("job.json").write_text(json.dumps(settings(photographs)))
    assert main(["sample", "job.json", "2"]) == 0
    assert capsys.readouterr().out == "sample_step_0_rank_0.png: 2 of the 16 samples of rank 0 of 1 at step 0\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job.json", "sample_step_0_rank_0.png"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rank", "2", "--world-size", "2"], "rank 2 of 2"),
        (["--world-size", "3"], "cannot be shared by 3"),
        (["--step", "200"], "steps 0 to 199"),
        (["0"], "N is 0"),
        (["3", "--index", "1"], "not both"),
        (["--index", "8", "--world-size", "2"], "samples 0 to 7"),
        (["--out", "nowhere/sheet.png"], "there is no folder nowhere"),
    ],
)
def test_what_the_training_does_not_have_is_refused(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(settings(photographs)))
    assert main(["sample", str(tmp_path), *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no file"),
        ("{", "is not JSON"),
        ('{"task": "knn"}', "is not the config of a pretraining: data: Field required"),
        ('{"data": "https://example.org/x.tar", "stream_images": 99, "batch": 8, "num_steps": 1}', "is a stream"),
    ],
)
def test_a_source_that_is_no_pretraining_is_refused(tmp_path: Path, content: str | None, message: str, capsys: Any) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert main(["sample", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
