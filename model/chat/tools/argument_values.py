"""Converts the plain text of a call's argument to JSON of the type in the tool's schema."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from llamaclust.model.chat.tools.call_sink import Schema

STRING: Final = frozenset({"string"})
_UNIONS: Final = ("anyOf", "oneOf", "allOf")
_MAX_DEPTH: Final = 8
_MAX_LITERAL_CHARACTERS: Final = 1 << 14
"""The maximum length of a text that Python's parser reads. The parser needs 100 times as much memory as the text."""
PYTHON_WORDS: Final = {"True": "true", "False": "false", "None": "null"}
_NAMES: Final = {"true": True, "false": False, "null": None}
_HEX: Final = "[0-9a-fA-F]"
_BACKSLASHES: Final = re.compile(
    rf"""\\\\|\\(?!["'abfnrtv0-7]|x{_HEX}{{2}}|u{_HEX}{{4}}|U000{_HEX}{{5}}|U0010{_HEX}{{4}})"""
)
"""Matches a pair of backslashes, or a backslash that begins no escape sequence of Python, as in C:\\Users."""
_ESCAPE: Final = re.compile(
    rf"""\\(?:["'\\abfnrtv]|[0-7]{{1,3}}|x{_HEX}{{2}}|u{_HEX}{{4}}|U000{_HEX}{{5}}|U0010{_HEX}{{4}})"""
)
"""Matches an escape sequence of Python."""


def arguments_object(text: str) -> dict[str, Any] | None:
    """Parses the arguments of a tool call. Returns None unless they are a JSON object whose numbers fit in float64."""
    try:
        value = json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def property_schema(schema: Schema, key: str) -> Schema:
    properties = schema.get("properties")
    found = properties.get(key) if isinstance(properties, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def types_of(schema: Schema, depth: int = 0) -> frozenset[str]:
    """Returns the JSON types that the schema allows for a value. An empty set means any type."""
    declared = schema.get("type")
    if isinstance(declared, str):
        return frozenset({declared})
    if isinstance(declared, Sequence):
        return frozenset(kind for kind in declared if isinstance(kind, str))
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(values, Sequence) and not isinstance(values, str):
        return frozenset(map(type_name, values))
    unions = [schema.get(key) for key in _UNIONS]
    members = [member for union in unions if isinstance(union, Sequence) for member in union]
    if depth == _MAX_DEPTH:
        return frozenset()
    return frozenset().union(*(types_of(member, depth + 1) for member in members if isinstance(member, Mapping)))


def type_name(value: Any) -> str:
    match value:
        case bool():
            return "boolean"
        case None:
            return "null"
        case int():
            return "integer"
        case float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
        case _:
            return "object"


def json_of(text: str, types: frozenset[str]) -> str:
    """Returns `text` itself if it is JSON of one of the types, the JSON of a Python list or dict, or else `text` as a
    JSON string. An empty set of types means any type."""
    if types == STRING:
        return string(text)
    bare = text.strip()
    for candidate in (bare, PYTHON_WORDS.get(bare, "")):
        try:
            kind = type_name(json.loads(candidate, parse_constant=_refuse))
        except (ValueError, RecursionError):
            continue
        if not types or kind in types or (kind == "integer" and "number" in types):
            return string(text) if kind == "string" and "string" in types else candidate
        if "string" not in types:
            return candidate
    if "string" not in types and bare[:1] in ("[", "{"):
        return _json_of_literal(bare) or string(text)
    return string(text)


def string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def string_inside(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def json_of_python(text: str) -> str:
    text = text.strip()
    if found := _json_of_literal(text):
        return found
    is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
    return string(_ESCAPE.sub(_unescaped, text[1:-1]) if is_quoted else text)


def _json_of_literal(text: str) -> str:
    """Converts JSON or a Python literal to JSON. Returns "" if the text is neither."""
    readers = (json.loads, _literal) if len(text) <= _MAX_LITERAL_CHARACTERS else (json.loads,)
    for read in readers:
        try:
            return json.dumps(read(text), ensure_ascii=False, allow_nan=False)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    return ""


def _unescaped(escape: re.Match[str]) -> str:
    return str(ast.literal_eval(f'"{escape[0]}"'))


class _JsonNames(ast.NodeTransformer):
    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(_NAMES[node.id]) if node.id in _NAMES else node


def _literal(text: str) -> Any:
    parsed = ast.parse(_BACKSLASHES.sub(r"\\\\", text), mode="eval")
    return ast.literal_eval(_JsonNames().visit(parsed))


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not valid JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:60]} is too large")
    return number


class TextValue:
    """Converts a string to JSON while its text arrives. Removes the white space that the format adds around strings."""

    def __init__(self, put: Callable[[str], None], indent: str, dedent: str) -> None:
        self._put = put
        self._indent = indent
        self._dedent = dedent
        self._held = ""
        self._has_begun = False

    def push(self, text: str) -> None:
        text = self._held + text
        if not self._has_begun:
            if len(text) < len(self._indent):
                self._held = text
                return
            self._begin()
            text = text.removeprefix(self._indent)
        cut = max(0, len(text) - len(self._dedent))
        self._held = text[cut:]
        self._put(string_inside(text[:cut]))

    def end(self) -> None:
        if not self._has_begun:
            self._begin()
            self._held = self._held.removeprefix(self._indent)
        self._put(string_inside(self._held.removesuffix(self._dedent)) + '"')

    def _begin(self) -> None:
        self._has_begun = True
        self._put('"')
