"""Normalizes JSON schema keywords for types, sizes, texts and numbers, which differ between libraries and drafts."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeGuard

FORMATS: Final = frozenset(
    ["date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid"]
)
_OTHER_FORMATS: Final = {"guid": "uuid", "url": "uri"}
_TYPES: Final = frozenset(("string", "integer", "number", "boolean", "null", "array", "object"))
_OTHER_TYPES: Final = {
    **dict.fromkeys(("str", "text", "char"), "string"),
    **dict.fromkeys(("int", "int32", "int64", "long", "short", "byte", "uint"), "integer"),
    **dict.fromkeys(("float", "double", "decimal", "numeric"), "number"),
    **dict.fromkeys(("list", "tuple", "set"), "array"),
    **dict.fromkeys(("dict", "map", "record"), "object"),
    **dict.fromkeys(("none", "nil"), "null"),
    "bool": "boolean",
}
_ANY_TYPE: Final = frozenset(("any", "mixed", "unknown"))
SIZES: Final = ("minLength", "maxLength", "minItems", "maxItems")
_NUMBERS: Final = (
    *SIZES,
    *("minProperties", "maxProperties", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
)
_LOOK_AROUND: Final = re.compile(r"\(\?(?:=|!|<=|<!)|\\[1-9]|\\k<")
_ANY_TEXT: Final = frozenset(("", ".*", "^.*$", "^(.*)$", r"[\s\S]*", r"^[\s\S]*$"))
MOST_OF_AN_INTEGER: Final = 2**63 - 1024
"""The largest integer, because a small model might write digits without end. llguidance's bounds are float64 numbers
below 2^63."""


def normal_types(given: Any) -> tuple[list[str], bool]:
    """Returns the allowed types (an empty list means any type), and True if all given types are known."""
    names = [name.lower() for name in given if isinstance(name, str)] if isinstance(given, list) else []
    if isinstance(given, str):
        names = [given.lower()]
    known = [_OTHER_TYPES.get(name, name) for name in names]
    if not _ANY_TYPE.isdisjoint(known):
        return [], True
    is_known = _TYPES.issuperset(known) and (given is None or isinstance(given, str | list))
    return ([*dict.fromkeys(known)] if is_known else []), is_known


def as_list(given: Any) -> list[Any] | None:
    """Returns `given` as a list, or None if it is not a list. PHP may write a list as an object with numeric keys."""
    if isinstance(given, Mapping) and all(isinstance(key, str) and key.isdigit() for key in given):
        return [*given.values()]
    return given if isinstance(given, list) else None


def as_object(given: Any) -> Mapping[str, Any]:
    """Returns `given` if it is an object, and otherwise {}, because PHP writes an empty object as a list."""
    return given if isinstance(given, Mapping) else {}


def texts(given: Any) -> list[str]:
    return [name for name in as_list(given) or () if isinstance(name, str)]


def matches_all(pattern: Any) -> bool:
    return pattern in _ANY_TEXT


def count(schema: Mapping[str, Any], key: str) -> int | None:
    """Returns a limit on a length or on an item count, such as `minLength`, or None if it has no effect."""
    value = schema.get(key)
    if not _is_number(value) or value < (0 if key.startswith("max") else 1):
        return None
    return int(value)


def text_forms(schema: Mapping[str, Any]) -> tuple[dict[str, str], bool]:
    """Returns the usable `pattern` and `format`, and a flag. The flag is False if a pattern with look-around was
    dropped and no usable `format` remains."""
    form, pattern = schema.get("format"), schema.get("pattern")
    made: dict[str, str] = {}
    if isinstance(form, str) and (form := _OTHER_FORMATS.get(form, form)) in FORMATS:
        made["format"] = form
    if not isinstance(pattern, str) or matches_all(pattern):
        return made, True
    if _LOOK_AROUND.search(pattern):
        return made, "format" in made
    return {**made, "pattern": pattern}, True


def bounds(schema: Mapping[str, Any], types: Sequence[str]) -> dict[str, Any]:
    """Returns the numeric limits of a schema. Draft 4's Boolean limits become numbers. A missing minimum or
    maximum of an integer becomes `MOST_OF_AN_INTEGER`."""
    made: dict[str, Any] = {}
    for limit, exclusive, sign in (("minimum", "exclusiveMinimum", -1), ("maximum", "exclusiveMaximum", 1)):
        value, other = schema.get(limit), schema.get(exclusive)
        if _is_number(value):
            made[exclusive if other is True else limit] = value
        if _is_number(other):
            made[exclusive] = other
        for key in (limit, exclusive):
            if key in made and sign * made[key] > MOST_OF_AN_INTEGER:  # The range of a type, not a real bound.
                del made[key]
    step = schema.get("multipleOf")
    if _is_number(step) and step > 0:
        made["multipleOf"] = step
    if "integer" in types and "number" not in types:
        _bound_digits(made)
    return made


def _bound_digits(made: dict[str, Any]) -> None:
    lower = [made[key] for key in ("minimum", "exclusiveMinimum") if key in made]
    upper = [made[key] for key in ("maximum", "exclusiveMaximum") if key in made]
    if not lower and all(value > -MOST_OF_AN_INTEGER for value in upper):
        made["minimum"] = -MOST_OF_AN_INTEGER
    if not upper and all(value < MOST_OF_AN_INTEGER for value in lower):
        made["maximum"] = MOST_OF_AN_INTEGER


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def unusable_numbers(schema: Mapping[str, Any]) -> list[str]:
    return [
        key
        for key in _NUMBERS
        if isinstance(value := schema.get(key), int | float)
        and not isinstance(value, bool)
        and (not _is_number(value) or (key == "multipleOf" and value <= 0))
    ]
