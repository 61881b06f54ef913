"""The parts of a schema that notations other than JSON enforce: types, bounds, enumerations and properties."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from llamaclust.model.chat.tools.argument_values import types_of
from llamaclust.model.chat.tools.call_sink import Schema

MAX_DEPTH: Final = 16
_BOUNDS: Final = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_COMBINED: Final = frozenset(("$ref", "allOf", "not", "if"))


def constants(schema: Schema) -> Sequence[Any]:
    values = schema.get("enum", [schema["const"]] if "const" in schema else ())
    is_flat = isinstance(values, list) and not any(isinstance(value, list | dict) for value in values)
    return values if is_flat else ()


def alternatives(schema: Schema) -> Sequence[Any]:
    found = schema.get("anyOf", schema.get("oneOf"))
    return found if isinstance(found, list) else ()


def kinds(schema: Any, depth: int) -> list[str]:
    if not isinstance(schema, Mapping) or depth > MAX_DEPTH or not _COMBINED.isdisjoint(schema):
        return []
    return sorted(types_of(schema))


def number(kind: str, schema: Schema) -> str:
    bounds = {key: schema[key] for key in _BOUNDS if isinstance(schema.get(key), int | float)}
    return f"%json {json.dumps({'type': kind, **bounds})}"


def properties(schema: Schema) -> list[tuple[str, Any, bool]] | None:
    """Returns (name, schema, is required) for each property, or None if others are allowed too."""
    named, required = schema.get("properties"), schema.get("required")
    if not isinstance(named, Mapping) or schema.get("additionalProperties") is not False:
        return None
    needed = {key for key in required if isinstance(key, str)} if isinstance(required, list) else set[str]()
    return [(str(key), part, key in needed) for key, part in named.items()]
