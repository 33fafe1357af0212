"""Keys of the configuration tree: their types, and a list of them."""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

KeyRow = tuple[str, str, str]  # name, default, documentation


def takes(annotation: Any, *kinds: type) -> bool:
    """Return True if a value may be of one of these types."""
    return any(alternative in kinds for alternative in _alternatives(annotation))


def section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the section that a key holds; None if it holds a value."""
    found = (kind for kind in _alternatives(annotation) if isinstance(kind, type) and issubclass(kind, BaseModel))
    return next(found, None)


def element_of(annotation: Any) -> Any:
    """Return the type of the elements of a list; None for any other type."""
    lists = (kind for kind in _alternatives(annotation) if get_origin(kind) is list)
    return next((get_args(kind)[0] for kind in lists), None)


def type_at(schema: type[BaseModel], names: list[str]) -> Any:
    """Return the type of a key; None if the schema does not fix it."""
    annotation: Any = schema
    for name in names:
        fields = getattr(section_of(annotation), "model_fields", {})
        if name not in fields:
            return None
        annotation = fields[name].annotation
    return annotation


def describe_keys(schema: type[BaseModel], more: Mapping[str, Iterable[KeyRow]]) -> list[str]:
    """Return a line for each key: its name, its default, and its documentation.

    Args:
        more: rows that follow the row of a key, for keys that the schema leaves open.
    """
    rows = [found for row in _rows(schema, "") for found in (row, *more.get(row[0], ()))]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return [f"{key:<{widths[0]}}  {default:<{widths[1]}}  {about}" for key, default, about in rows]


def _rows(schema: type[BaseModel], prefix: str) -> Iterator[KeyRow]:
    for name, field in schema.model_fields.items():
        section = section_of(field.annotation)
        default = "" if field.is_required() else written(field.default)
        choices = _choices(field.annotation)
        about = (field.description or "") + (f" ({', '.join(choices)})" if choices else "")
        if section is None or field.default is None:  # a section that is absent by default is a key, too
            yield f"{prefix}{name}", default, about
        if section is not None:
            yield from _rows(section, f"{prefix}{name}.")


def _choices(annotation: Any) -> list[str]:
    found = (kind for kind in _alternatives(annotation) if get_origin(kind) is Literal)
    return [written(value) for kind in found for value in get_args(kind)]


def written(value: Any) -> str:
    """Return a value as YAML writes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _alternatives(annotation: Any) -> list[Any]:
    """Return the types that a value may have."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _alternatives(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [kind for each in get_args(annotation) for kind in _alternatives(each)]
    return [annotation]
