"""Schemas of tools' arguments as grammars of calls take them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from llamaclust.model.chat.tools.call_sink import Schema
from llamaclust.model.grammars.normal_schema import NormalSchema, normal_schema

ANY_ARGUMENTS: Final[Schema] = {"type": "object"}
"""The schema of a tool that is free in its arguments: any JSON object."""


def arguments_schema(schema: Any) -> NormalSchema:
    """A tool's schema of an object that has no properties but those it names, unless it says so. A schema that is
    nested too deeply, or of something else than an object, leaves the arguments free."""
    try:
        normal = normal_schema(schema, closes_objects=True)
    except RecursionError:
        return NormalSchema(dict(ANY_ARGUMENTS), ("",))
    types = normal.schema.get("type", "object")
    if "object" not in ([types] if isinstance(types, str) else types):
        return NormalSchema(dict(ANY_ARGUMENTS), ("type",))
    return replace(normal, schema={**normal.schema, "type": "object"})
