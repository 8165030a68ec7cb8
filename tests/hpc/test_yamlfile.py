from __future__ import annotations

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hpc.errors import UserError
from hpc.yamlfile import parse


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-4", 5e-4),
        ("1e6", 1e6),
        ("on", "on"),
        ("no", "no"),
        ("24:00:00", "24:00:00"),
        ("0o17", 15),
        ("017", 17),
        ("1_000", "1_000"),
        ("true", True),
        ("~", None),
        ("", None),
        ("'5'", "5"),
        ("2026-11-21", "2026-11-21"),
        ("[1, .5, -3.]", [1, 0.5, -3.0]),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    found = parse(text, "f").data
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "stands twice"),
        ("a:\n  b: !!python/object/apply:os.system ['true']\n", 2, "not allowed"),
        ("a: !mine 3\n", 1, "not allowed"),
        ("a: 1\n  b: 2\n", 2, "not valid YAML"),
        ("a: [1, 2\n", 2, "not valid YAML"),
        ("? [1]\n: 2\n", 1, "not a string"),
        ("1: 2\n", 1, "not a string"),
        ("a: *unknown\n", 1, "not valid YAML"),
    ],
)
def test_refusals_name_file_and_line(text: str, line: int, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        parse(text, "job.yaml")
    assert str(error.value).startswith(f"job.yaml:{line}:")


def test_an_alias_bomb_is_refused() -> None:
    bomb = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))
    with pytest.raises(UserError, match="alias"):
        parse(bomb, "f")


def test_an_alias_that_contains_itself_is_refused() -> None:
    with pytest.raises(UserError, match="alias contains itself"):
        parse("a: &a [*a]", "f")


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), plain, max_size=4))
def test_what_pyyaml_writes_is_read_back(data: dict[str, object]) -> None:
    """Numbers may come back as text where YAML 1.1 and 1.2 differ in writing them; nothing else may change."""
    text = yaml.safe_dump(data, allow_unicode=False, default_style='"')
    read = parse(text, "f").data or {}

    def as_text(value: object) -> object:
        if isinstance(value, dict):
            return {k: as_text(v) for k, v in value.items()}
        if isinstance(value, list):
            return [as_text(v) for v in value]
        return value if isinstance(value, str) else float(value) if isinstance(value, int | float) else value

    assert as_text(read) == as_text(data)


def test_lines_are_known() -> None:
    document = parse("stages:\n  a:\n    config:\n      x: 1\n", "f")
    assert document.where(("stages", "a", "config", "x")) == "f:4"
    assert document.where(("stages", "a", "config", "missing")) == "f:3"
