"""What is wrong with a configuration, in terms of the keys that its user wrote."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a value of this annotation may be: one, or, told apart by their `kind`, several."""
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [section for part in typing.get_args(annotation) for section in _sections(part)]


def _kind(section: type[BaseModel]) -> str | None:
    field = section.model_fields.get("kind")
    return typing.get_args(field.annotation)[0] if field else None


def _keys(location: Sequence[int | str], root: type[BaseModel]) -> tuple[str, list[str], Any]:
    """The part of an error's location that the user wrote, the keys allowed beside its last one, and its annotation."""
    sections: list[type[BaseModel]] = [root]
    path, allowed, annotation = "", list[str](), None
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
            annotation = next(iter(typing.get_args(annotation)), None)
            continue
        if typing.get_origin(annotation) is dict:
            path += f"[{part!r}]"
            annotation = typing.get_args(annotation)[1]
            continue
        if len(sections) > 1:
            sections = [section for section in sections if _kind(section) == part]
            continue
        if not sections:
            break
        path += f".{part}" if path else part
        allowed = list(sections[0].model_fields)
        field = sections[0].model_fields.get(part)
        annotation = field.annotation if field else None
        sections = _sections(annotation)
    return path, allowed, annotation


def _type_name(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null"}
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_type_name(part) for part in typing.get_args(annotation)))
    if typing.get_origin(annotation) is Literal:
        return "one of " + ", ".join(typing.get_args(annotation))
    if typing.get_origin(annotation) is list:
        return f"a list (each entry {_type_name(typing.get_args(annotation)[0])})"
    if typing.get_origin(annotation) is dict:
        key, value = typing.get_args(annotation)
        return f"a section (each key {_type_name(key)}, each value {_type_name(value)})"
    return names.get(annotation, "a section with keys of its own")


def explain(problem: dict[str, Any], root: type[BaseModel]) -> str:
    """One of pydantic's errors in the user's words: the key, its value and what was expected. `root` is the schema."""
    key, allowed, annotation = _keys(problem["loc"], root)
    kind, value = problem["type"], problem["input"]
    if kind == "extra_forbidden":
        close = difflib.get_close_matches(key.split(".")[-1], allowed, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        return f"{key} = {value!r}: unknown key; {hint}expected one of {', '.join(allowed)}"
    if kind.startswith("union_tag"):
        kinds = ", ".join(name for section in _sections(annotation) if (name := _kind(section)))
        given = value.get("kind") if isinstance(value, dict) else value
        return f"{key}.kind = {given!r}: expected one of {kinds}"
    if kind == "missing":
        return f"{key} is missing: expected {_type_name(annotation)}"
    message = str(problem["msg"])
    if kind == "value_error":
        message = message.removeprefix("Value error, ")
        return f"{key} = {value!r}: {message}" if key else message
    if kind.endswith(("_type", "_parsing")) or kind in ("literal_error", "int_from_float"):
        return f"{key} = {value!r}: expected {_type_name(annotation)}"
    message = (
        message.replace("Input should be a ", "expected a ")
        .replace("Input should be", "expected a value")
        .replace("String should", "expected to")
    )
    return f"{key} = {value!r}: {message}"
