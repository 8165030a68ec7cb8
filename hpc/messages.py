"""Turns pydantic's errors into one line each: place, value, rule, choices."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Sequence
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError


def suggest(name: str, choices: Iterable[str]) -> str:
    """`; did you mean 'lambda'?` or nothing."""
    close = difflib.get_close_matches(name, list(choices), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def choices_text(name: str, choices: Sequence[str]) -> str:
    """`choose from a, b, c` with the closest first where there is one."""
    return f"choose from {', '.join(sorted(choices)) or '(none)'}{suggest(name, choices)}"


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The pydantic models inside an annotation such as `A | B | None` or `Annotated[A, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType, dict, list, tuple) or hasattr(annotation, "__metadata__"):
        return [model for part in get_args(annotation) for model in _models(part)]
    return []


def allowed_keys(model: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    """The keys that stand beside `location`'s last part; the union over all members where the model is a union."""
    models = [model]
    for part in location[:-1]:
        following = [
            found
            for current in models
            for name, field in current.model_fields.items()
            if part in (name, field.alias)
            for found in _models(field.annotation)
        ]
        # a part that is no field is an index, a dictionary's key or the tag of a union's member: stay
        tagged = [m for m in models if any(f.default == part for n, f in m.model_fields.items() if n == "name")]
        models = following or tagged or models
    return sorted({field.alias or name for current in models for name, field in current.model_fields.items()})


def explain(error: ValidationError, model: type[BaseModel]) -> list[tuple[tuple[str | int, ...], str]]:
    """(path, message) of every problem; messages say the value, the rule and the choices."""
    found = []
    for problem in error.errors(include_url=False):
        path, value, kind = problem["loc"], problem["input"], problem["type"]
        if kind == "extra_forbidden":
            name, keys = str(path[-1]), allowed_keys(model, path)
            message = f"unknown key {name!r}; allowed here: {', '.join(keys)}{suggest(name, keys)}"
        elif kind == "missing":
            message = "this key is missing"
        elif kind == "too_short" and not value:
            message = f"{path[-1]} is empty: give at least one value, or remove the line"
        elif kind == "value_error":
            message = problem["msg"].removeprefix("Value error, ")
        else:
            text = problem["msg"].removeprefix("Input should be ")
            message = f"{_short(value)} is not allowed: it must be {text}" if text != problem["msg"] else f"{_short(value)}: {text}"
            expected = problem.get("ctx", {}).get("expected", "")
            if isinstance(value, str) and expected:
                message += suggest(value, [part.strip(" '") for part in expected.replace(" or ", ", ").split(",")])
        found.append((_without_tags(path, model), message))
    return found


def _without_tags(path: tuple[str | int, ...], model: type[BaseModel]) -> tuple[str | int, ...]:
    """pydantic puts the tag of a union's member into the path; people did not write it."""
    kept: list[str | int] = []
    models = [model]
    for part in path:
        fields = [field for current in models for name, field in current.model_fields.items() if part in (name, field.alias)]
        is_tag = not fields and any(f.default == part for m in models for n, f in m.model_fields.items() if n == "name")
        if is_tag:
            models = [m for m in models if any(f.default == part for n, f in m.model_fields.items() if n == "name")]
            continue
        if fields:
            models = [found for field in fields for found in _models(field.annotation)] or models
        kept.append(part)
    return tuple(kept)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
