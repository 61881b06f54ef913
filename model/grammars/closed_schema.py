"""Closes JSON schemas. Objects in a closed schema have only their named properties, as in OpenAI's strict mode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from llamaclust.model.grammars.schema_parts import DEFINED, parts

_OPEN: Final = frozenset(("additionalProperties", "patternProperties", "propertyNames", "unevaluatedProperties"))
_ALTERNATIVES: Final = ("anyOf", "oneOf", "prefixItems")
_APPLICATORS: Final = frozenset(("properties", "$ref", "anyOf", "oneOf"))
COMBINING: Final = frozenset(("allOf", "if", "dependentSchemas", "dependencies", "not", "$dynamicRef"))


def closed(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Forbids properties that an object schema does not name. Leaves schemas with `allOf` or similar unchanged."""
    try:
        return schema if _combines(schema) else _closed(schema)
    except RecursionError:  # The schema is too deep for llguidance too.
        return schema


def _combines(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_combines, value))
    if not isinstance(value, Mapping):
        return False
    is_combined = not COMBINING.isdisjoint(value) or len(_APPLICATORS & value.keys()) > 1
    return is_combined or any(map(_combines, parts(value)))


def _closed(schema: Any) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    made = dict(schema)
    for key in DEFINED:
        if isinstance(named := made.get(key), Mapping):
            made[key] = {name: _closed(part) for name, part in named.items()}
    for key in _ALTERNATIVES:
        if isinstance(alternatives := made.get(key), list):
            made[key] = [_closed(part) for part in alternatives]
    for key in ("items", "additionalProperties"):
        if key in made:
            made[key] = _closed(made[key])
    if _OPEN.isdisjoint(made) and _names_all(made):
        made["additionalProperties"] = False
    return made


def _names_all(schema: Mapping[str, Any]) -> bool:
    named, required = schema.get("properties"), schema.get("required")
    names = required if isinstance(required, list) else []
    return isinstance(named, Mapping) and all(isinstance(name, str) and name in named for name in names)
