"""Finds the parts of a JSON schema that may be schemas: values of all keywords except those for data (`enum`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

DEFINED: Final = ("properties", "$defs", "definitions")
_BY_NAME: Final = frozenset((*DEFINED, "patternProperties", "dependentRequired", "dependentSchemas", "dependencies"))
_DATA: Final = frozenset(("const", "enum", "default", "examples"))


def parts(schema: Mapping[str, Any]) -> Iterator[Any]:
    for key, value in schema.items():
        if _is_by_name(key, value):
            yield from value.values()
        elif key not in _DATA:
            yield value


def property_names(schema: Any) -> Iterator[str]:
    pending = [schema]
    while pending:
        part = pending.pop()
        if isinstance(part, Mapping):
            named = part.get("properties")
            yield from filter(lambda name: isinstance(name, str), named if isinstance(named, Mapping) else ())
            pending += reversed([*parts(part)])
        elif isinstance(part, list):
            pending += reversed(part)


def _is_by_name(key: str, value: Any) -> bool:
    return key in _BY_NAME and isinstance(value, Mapping)
