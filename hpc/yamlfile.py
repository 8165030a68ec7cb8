"""Safe YAML with YAML 1.2 scalars, duplicate keys refused and line numbers kept.

`5e-4` is a number, `on` and `24:00:00` are strings; tags other than YAML's own core types are refused.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hpc.errors import UserError

Key = tuple[str | int, ...]
MAX_NODES = 1_000_000  # an alias bomb stops here


@dataclass(frozen=True)
class Document:
    """Plain data of one file and the line (from 1) of every key and list item."""

    file: str
    data: Any
    lines: dict[Key, int]

    def where(self, key: Iterable[str | int]) -> str:
        """`file:line` of the deepest known part of `key`."""
        path = tuple(key)
        while path and path not in self.lines:
            path = path[:-1]
        return f"{self.file}:{self.lines[path]}" if path in self.lines else self.file

    def moved(self, section: Key, places: Mapping[str, Key], replaced: Collection[str]) -> Document:
        """With the lines of `section`'s entries also where `places` puts them; those of the top-level entries `replaced` are gone."""
        lines = {key: line for key, line in self.lines.items() if not key or key[0] not in replaced}
        for key, line in self.lines.items():
            inner = key[len(section) :]
            if key[: len(section)] == section and inner and inner[0] in places:
                lines[(*places[str(inner[0])], *inner[1:])] = line
        return Document(self.file, self.data, lines)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


for _tag, _pattern in {
    "null": r"^(?:~|null|Null|NULL|)$",
    "bool": r"^(?:true|True|TRUE|false|False|FALSE)$",
    "int": r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$",
    "float": r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
}.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), None)


def _scalar(node: yaml.ScalarNode, file: str) -> Any:
    tag, text = node.tag.removeprefix("tag:yaml.org,2002:"), node.value
    match tag:
        case "str":
            return text
        case "null":
            return None
        case "bool":
            return text.lower() == "true"
        case "int":
            return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
        case "float":
            return float(text.replace(".inf", "inf").replace(".Inf", "inf").replace(".INF", "inf").lower().replace(".nan", "nan"))
    raise UserError(f"{file}:{node.start_mark.line + 1}: tag {node.tag!r} is not allowed; job files are plain data")


def _construct(node: yaml.Node, key: Key, file: str, lines: dict[Key, int]) -> Any:
    lines.setdefault(key, node.start_mark.line + 1)
    if len(lines) > MAX_NODES:
        raise UserError(f"{file}: more than {MAX_NODES} values; is an alias repeating itself?")
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, file)
    expected = "map" if isinstance(node, yaml.MappingNode) else "seq"
    if node.tag != f"tag:yaml.org,2002:{expected}":
        raise UserError(f"{file}:{node.start_mark.line + 1}: tag {node.tag!r} is not allowed; job files are plain data")
    if isinstance(node, yaml.SequenceNode):
        return [_construct(item, (*key, i), file, lines) for i, item in enumerate(node.value)]
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        name = _scalar(key_node, file) if isinstance(key_node, yaml.ScalarNode) else None
        line = key_node.start_mark.line + 1
        if not isinstance(name, str):
            raise UserError(f"{file}:{line}: key {getattr(key_node, 'value', '?')!r} is not a string; quote it")
        if name in result:
            raise UserError(f"{file}:{line}: key {name!r} stands twice in {'.'.join(map(str, key)) or 'the file'}; keep one")
        lines[(*key, name)] = line
        result[name] = _construct(value_node, (*key, name), file, lines)
    return result


def parse(text: str, file: str) -> Document:
    """Raises UserError with file and line for invalid YAML, duplicate keys and tags."""
    lines: dict[Key, int] = {}
    try:
        node = yaml.compose(text, Loader=_Loader)
        return Document(file, None if node is None else _construct(node, (), file, lines), lines)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{file}{line}: not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{file}: not valid YAML: {error}") from None
    except RecursionError:
        raise UserError(f"{file}: nested too deeply, or an alias contains itself") from None


def load(path: Path) -> Document:
    """Raises UserError when the file cannot be read or is not valid."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"{path}: cannot be read: {reason}") from None
    return parse(text, str(path))
