from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc.errors import UserError
from hpc.spec import Sweep, get_path, is_value, load, set_path, with_overrides


def write(folder: Path, text: str, name: str = "job.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


names = st.text("abc", min_size=1, max_size=2)


@given(st.dictionaries(names, st.lists(st.integers(0, 3), min_size=1, max_size=3), min_size=1, max_size=3), st.integers(0, 3))
def test_a_grid_is_the_product_without_what_is_excluded(grid: dict[str, list[int]], gone: int) -> None:
    first = next(iter(grid))
    points = list(Sweep(grid=grid, exclude=[{first: gone}]).points())
    expected = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    assert points == [point for point in expected if point[first] != gone]


def test_kinds_of_sweeps_multiply_and_include_adds() -> None:
    sweep = Sweep.model_validate(
        {"grid": {"a": [1, 2]}, "zip": {"b": [1, 2, 3], "c": [4, 5, 6]}, "list": [{"d": 1}, {"d": 2}], "include": [{"a": 9}]}
    )
    points = list(sweep.points())
    assert len(points) == 2 * 3 * 2 + 1
    assert {"a": 2, "b": 3, "c": 6, "d": 1} in points
    assert points[-1] == {"a": 9}
    assert not any(point.get("b") == 1 and point.get("c") != 4 for point in points)


@given(st.lists(names, min_size=1, max_size=4), st.integers())
def test_set_path_is_read_back_and_leaves_the_rest(parts: list[str], value: int) -> None:
    original: dict[str, Any] = {"a": {"b": 1}, "z": "text"}
    path = ".".join(parts)
    changed = with_overrides(original, {path: value})
    assert get_path(changed, path) == value
    assert original == {"a": {"b": 1}, "z": "text"}
    assert changed["z"] == "text"


def test_a_short_form_gets_its_name() -> None:
    config = {"method": "ibot"}
    set_path(config, "method.prototypes", 3)
    assert config == {"method": {"name": "ibot", "prototypes": 3}}


JOB = """
stages:
  a: {entry: toy, config: {x: 1, y: {z: 2}}}
  b: {entry: toy, after: a, resources: {gpus: 1}}
variants:
  small: {a: {config: {y: {z: 3}}}, b: {resources: {hours: 2}}}
"""


def test_variant_then_set(tmp_path: Path) -> None:
    job = load(write(tmp_path, JOB), ["a.y.w=5e-4", "b.resources.hours=3", "a.x=[1, 2]"], "small")
    assert job.name == "job-small"
    assert job.job.stages["a"].config == {"x": [1, 2], "y": {"z": 3, "w": 5e-4}}
    assert job.job.stages["b"].resources.hours == 3
    assert job.order == ("a", "b")


def test_a_variant_may_have_its_own_seeds_and_report(tmp_path: Path) -> None:
    text = "seeds: [0, 1]\n" + JOB + "  once: {seeds: [7], report: {rows: [a.x]}, a: {config: {x: 9}}}\n"
    whole, once = load(write(tmp_path, text)).job, load(write(tmp_path, text), (), "once").job
    assert (whole.seeds, whole.report.rows, whole.stages["a"].config["x"]) == ([0, 1], (), 1)
    reported = text.replace("variants:", "report: {rows: [a.x], reported: [{source: s, name: n}]}\nvariants:")
    assert load(write(tmp_path, reported)).job.report.reported
    of_small = load(write(tmp_path, reported), (), "small").job.report
    assert (of_small.rows, of_small.reported) == (("a.x",), []), "what others report is of the file's own runs"
    assert (once.seeds, once.report.rows, once.stages["a"].config["x"]) == ([7], ("a.x",), 9)
    of_a_stage = load(write(tmp_path, "stages: {seeds: {entry: toy}}\nvariants: {v: {seeds: {config: {x: 1}}}}\n"), (), "v").job
    assert of_a_stage.stages["seeds"].config == {"x": 1}


@pytest.mark.parametrize(
    ("wrong", "line", "words"),
    [
        ("report: {rows: [a.x], column: [k/top1]}", 11, "report.column: unknown key 'column'"),
        ("seeds: [-1]", 11, "seeds."),
        ("a: {resources: {hours: -1}}", 11, "stages.a.resources.hours"),
        ("b: {after: c}", 11, "stages.b.after: unknown stage 'c'"),
    ],
)
def test_an_error_of_a_variant_names_its_own_line(tmp_path: Path, wrong: str, line: int, words: str) -> None:
    text = f"report:\n  rows: [a.x]\nseeds: [0]\n{JOB.strip()}\n  wrong:\n    # a comment\n    {wrong}\n"
    with pytest.raises(UserError, match=rf"job\.yaml:{line}: {re.escape(words)}"):
        load(write(tmp_path, text), (), "wrong")


@pytest.mark.parametrize(
    ("reported", "words"),
    [
        ("{source: s}", "give params, of the runs that it is about, or a name"),
        ("{source: s, params: {a.x: 1}, name: n}", "and not both"),
        ("{source: s, name: n, gpu_hours: 3}", "give params of the runs that they are about"),
        ("{params: {a.x: 1}}", "source: this key is missing"),
    ],
)
def test_what_is_reported_says_of_what_and_where(tmp_path: Path, reported: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load(write(tmp_path, JOB + f"report: {{reported: [{reported}]}}\n"))


def test_null_is_not_a_section_without_a_name() -> None:
    section = {"weight": 1.0}
    assert [is_value(value, None) for value in (None, section, {"name": None})] == [True, False, True]
    assert [is_value(value, "x") for value in ("x", {"name": "x", "d": 1}, section, None)] == [True, True, False, False]


def test_a_config_with_a_name_of_its_own_is_merged(tmp_path: Path) -> None:
    text = "stages: {name: {entry: toy, config: {name: mine, x: 1}}}\nvariants: {v: {name: {config: {name: theirs}}}}\n"
    assert load(write(tmp_path, text), (), "v").job.stages["name"].config == {"name": "theirs", "x": 1}


def test_a_variant_that_names_a_section_otherwise_replaces_it(tmp_path: Path) -> None:
    """The settings of one method are none of another's."""
    text = JOB.replace("x: 1", "x: {name: p, of_p: 1, both: 2}").replace("y: {z: 3}", "x: {VARIANT}")
    changes = {"name: q, both: 3": {"name": "q", "both": 3}, "name: p, both: 3": {"name": "p", "of_p": 1, "both": 3}}
    for change, expected in {**changes, "both: 3": {"name": "p", "of_p": 1, "both": 3}}.items():
        job = load(write(tmp_path, text.replace("VARIANT", change)), variant="small")
        assert job.job.stages["a"].config["x"] == expected


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("stages:\n  a: {entry: toy, confg: {}}\n", 2, "unknown key 'confg'.*did you mean 'config'"),
        ("stages:\n  a: {config: {}}\n", 2, "entry: this key is missing"),
        ("stages: 3\n", 1, "3 is not allowed"),
        ("stages:\n  a: {entry: toy, resources: {nodes: two}}\n", 2, "'two' is not allowed.*integer"),
        ("stages:\n  a: {entry: toy, resources: {nodes: 2, gpus: 1}}\n", 2, "gpus is for work inside one node"),
        ("stages:\n  a: {entry: toy, after: c}\n  b: {entry: toy}\n", 2, "unknown stage 'c'; choose from a, b"),
        ("stages:\n  a: {entry: toy, after: b}\n  b: {entry: toy, after: a}\n", 2, "a cycle"),
        ("stages:\n  a:\n    entry: toy\n    sweep:\n      grid:\n        x: []\n", 6, "x is empty"),
        ("stages:\n  a:\n    entry: toy\n    sweep: {zip: {x: [1], y: [1, 2]}}\n", 4, "lists of one length"),
        ("stages:\n  a:\n    entry: toy\n    sweep: {}\n", 4, "the sweep is empty"),
        ("stages: {}\n", 1, "at least one stage"),
        ("- 1\n", None, "is a mapping"),
    ],
)
def test_bad_files_get_one_message(tmp_path: Path, text: str, line: int | None, words: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UserError, match=words) as error:
        load(path)
    assert str(error.value).startswith(f"{path}:{line}:" if line else f"{path}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("sets", "variant", "words"),
    [
        (["a.x"], None, "write --set stage.path=value"),
        (["c.x=1"], None, "unknown stage 'c'"),
        (["a.resources.nods=1"], None, "unknown key 'nods'"),
        (["a.x=[1"], None, "not valid YAML"),
        ([], "smal", "unknown variant 'smal'.*did you mean 'small'"),
    ],
)
def test_bad_options(tmp_path: Path, sets: list[str], variant: str | None, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load(write(tmp_path, JOB), sets, variant)


def test_setting_what_is_swept_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "stages:\n  a: {entry: toy, sweep: {grid: {x.y: [1, 2]}}}\n")
    for assignment in ("a.x.y=3", "a.x=3", "a.x.y.z=1"):
        with pytest.raises(UserError, match="is swept"):
            load(path, [assignment])
