"""Prepares the schemas of tool arguments for the grammar of calls."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from llamaclust.model.chat.tools.call_sink import Schema
from llamaclust.model.grammars.normal_schema import NormalSchema, normal_schema

ANY_ARGUMENTS: Final[Schema] = {"type": "object"}


def arguments_schema(schema: Any) -> NormalSchema:
    """Returns a tool's schema without unnamed properties, or `ANY_ARGUMENTS` if it is too deep or allows no object."""
    try:
        normal = normal_schema(schema, closes_objects=True)
    except RecursionError:
        return NormalSchema(dict(ANY_ARGUMENTS), ("",))
    types = normal.schema.get("type", "object")
    if "object" not in ([types] if isinstance(types, str) else types):
        return NormalSchema(dict(ANY_ARGUMENTS), ("type",))
    return replace(normal, schema={**normal.schema, "type": "object"})
