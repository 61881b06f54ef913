"""Random compositions of tool schemas as libraries and servers write them, with valid and invalid values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final

_ZOD_EMAIL: Final = r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$"
_DECIMAL: Final = r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"
_INT64: Final = {"minimum": -9223372036854775808, "maximum": 9223372036854775807}


@dataclass(frozen=True, slots=True)
class Part:
    """A schema, a valid value, an invalid one (None: all are valid), and the keywords that grammars ignore."""

    schema: Any
    good: Any
    bad: Any = None
    unobeyed: str = ""
    definitions: Mapping[str, Any] = field(default_factory=dict)


def _either(*schemas: Any, key: str = "anyOf", **more: Any) -> dict[str, Any]:
    return {key: [*schemas], **more}


_TEXT: Final = {"type": "string"}
_NULL: Final = {"type": "null"}
_POINT: Final = {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}
_CAT: Final = {"type": "object", "properties": {"kind": {"const": "cat"}}, "required": ["kind"]}
_DOG: Final = {"type": "object", "properties": {"kind": {"const": "dog"}}, "required": ["kind"]}
_TREE: Final = {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/Tree"}, _NULL]}}}

_PARTS: Final[Mapping[str, tuple[Part, ...]]] = {
    "zod 3": (
        Part({"type": "string", "minLength": 1}, "a", ""),
        Part({"type": "string", "format": "email"}, "a@b.org", "a"),
        Part({"type": "integer", "exclusiveMinimum": 0}, 3, 0),
        Part(_either(_TEXT, _NULL), None, 1),
        Part({"type": ["string", "null"]}, None, 1),
        Part({"type": "object", "additionalProperties": {"type": "number"}}, {"a": 1}, {"a": "b"}),
        Part(
            {"type": "object", "additionalProperties": _TEXT, "propertyNames": {"enum": ["a", "b"]}},
            {"a": "x"},
            {"c": "x"},
        ),
        Part({"type": "array", "minItems": 2, "maxItems": 2, "items": [_TEXT, {"type": "number"}]}, ["a", 1], [1, "a"]),
        Part({"type": "string", "const": "a"}, "a", "b"),
        Part({"description": "anything"}, [1]),
        Part({"type": "array", "uniqueItems": True, "items": _TEXT}, ["a"], [1], "uniqueItems"),
        Part({"type": "integer", "format": "int64"}, 9, 0.5),
        Part(
            {"type": "object", "properties": {"a": _TEXT}, "additionalProperties": True}, {"a": "b", "c": 1}, {"a": 1}
        ),
    ),
    "zod 4": (
        Part({"type": "integer", "minimum": -9007199254740991, "maximum": 9007199254740991}, -4, 1e300),
        Part(
            {"type": "object", "propertyNames": _TEXT, "additionalProperties": {"type": "number"}}, {"a": 1}, {"a": ""}
        ),
        Part({"type": "string", "format": "email", "pattern": _ZOD_EMAIL}, "a@b.org", "@"),
        Part({"type": "array", "prefixItems": [_TEXT, {"type": "boolean"}]}, ["a", True], [True]),
        Part(_either(_CAT, _DOG, key="oneOf"), {"kind": "dog"}, {"kind": "cow"}),
        Part({"type": "object", "properties": {"a": _TEXT}, "additionalProperties": {}}, {"a": "b", "c": 1}, {"a": 1}),
        Part(
            {"type": "string", "format": "base64", "contentEncoding": "base64", "pattern": "^[A-Za-z0-9+/=]*$"},
            "YQ",
            "*",
        ),
        Part({"$ref": "#/$defs/__schema0"}, "a", 1, definitions={"$defs": {"__schema0": _TEXT}}),
    ),
    "pydantic": (
        Part({"$ref": "#/$defs/Point"}, {"x": 1}, {"x": "1"}, definitions={"$defs": {"Point": _POINT}}),
        Part(_either(_TEXT, _NULL, default=None, title="Name"), None, 2),
        Part({"items": _TEXT, "title": "Tags", "type": "array", "uniqueItems": True}, ["a"], [1], "uniqueItems"),
        Part(_either({"type": "number"}, {"type": "string", "pattern": _DECIMAL}), 1.5, [], "pattern"),
        Part({"maxItems": 2, "minItems": 2, "prefixItems": [_TEXT, _TEXT], "type": "array"}, ["a", "b"], ["a"]),
        Part({"format": "path", "title": "Path", "type": "string"}, "/x", 1),
        Part({"format": "duration", "type": "string"}, "P1D", "1"),
        Part(
            {
                "discriminator": {"mapping": {"cat": "#/$defs/Cat", "dog": "#/$defs/Dog"}, "propertyName": "kind"},
                "oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}],
            },
            {"kind": "cat"},
            {"kind": "cow"},
            definitions={"$defs": {"Cat": _CAT, "Dog": _DOG}},
        ),
        Part(
            {"allOf": [{"$ref": "#/$defs/Color"}], "default": "red"},
            "red",
            "blue",
            definitions={"$defs": {"Color": {"enum": ["red"], "title": "Color", "type": "string"}}},
        ),
        Part({"$ref": "#/$defs/Tree"}, {"next": {"next": None}}, {"next": 1}, definitions={"$defs": {"Tree": _TREE}}),
        Part({"exclusiveMaximum": 1.0, "minimum": 0.0, "type": "number"}, 0.25, 2),
    ),
    "C#": (
        Part({"type": "integer", "format": "int64", **_INT64}, -12, "12"),
        Part(
            {"oneOf": [_NULL, {"$ref": "#/definitions/Point"}]}, None, 1, definitions={"definitions": {"Point": _POINT}}
        ),
        Part({"type": "integer", "x-enumNames": ["A", "B"], "enum": [0, 1]}, 1, 2),
        Part({"type": "string", "format": "guid"}, "123e4567-e89b-42d3-a456-426614174000", "x"),
        Part({"type": "number", "format": "decimal", "minimum": 0.0, "exclusiveMinimum": True}, 0.5, -1),
        Part({"type": "number", "minimum": -1.7976931348623157e308, "maximum": 1.7976931348623157e308}, 1, "1"),
        Part({"type": ["string", "integer"], "pattern": r"^-?(?:0|[1-9]\d*)$"}, "-12", "x"),
        Part({"enum": ["A", "B", None]}, None, "C"),
        Part({"type": ["array", "null"], "items": {"type": ["string", "null"]}, "default": None}, [None], [1]),
        Part(True, {"a": 1}),
    ),
    "PHP": (
        Part({"type": "object", "properties": []}, {}, 1),
        Part({"type": "string", "enum": {"0": "a", "2": "b"}}, "b", "c"),
        Part({"type": "array", "items": []}, [1, "a"], "a"),
        Part({"type": "object", "additionalProperties": []}, {"a": 1}, 1),
        Part({"type": "bool", "default": []}, True, 0),
        Part({"type": "int", "nullable": True}, None, "a"),
        Part({"type": "mixed"}, "a"),
        Part([], 1),
    ),
    "OpenAPI": (
        Part({"type": "STRING", "nullable": True, "example": "a"}, None, 1),
        Part({"type": "string", "enum": ["a"], "nullable": True}, None, "b"),
        Part(
            {"$ref": "#/components/schemas/P", "nullable": True},
            None,
            1,
            definitions={"components": {"schemas": {"P": _POINT}}},
        ),
        Part({"type": "integer", "format": "int32", "maximum": 10, "exclusiveMaximum": True, "readOnly": True}, 9, 10),
        Part({"type": "string", "format": "binary", "xml": {"name": "a"}, "deprecated": True}, "a", 1),
    ),
    "by hand": (
        Part({"type": "string", "required": True}, "a", 1),
        Part({"type": "any"}, [1]),
        Part({"type": "file"}, "a", None, "type"),
        Part({"type": "object", "patternProperties": {"^(.*)$": {"type": "number"}}}, {"a": 1}, {"a": "b"}),
        Part({"type": "object", "propertyNames": {"pattern": "^x_"}}, {"x_a": 1}, {"a": 1}),
        Part(
            {"type": "object", "properties": {"a": _TEXT, "b": _TEXT}, "minProperties": 1},
            {"a": "b"},
            {"a": 1},
            "minProperties",
        ),
        Part(
            {"type": "object", "properties": {"a": _TEXT}, "dependentRequired": {"a": ["b"]}},
            {"a": "b"},
            {"a": 1},
            "dependentRequired",
        ),
        Part({"type": "string", "not": {"const": "a"}}, "b", 1, "not"),
        Part({"type": "string", "pattern": "^(a"}, "b", 1, "tool"),
        Part({"type": "array", "items": _TEXT, "minItems": 1.0, "uniqueItems": False, "contains": {}}, ["a"], []),
        Part({"type": "string", "maxLength": 8, "$comment": "x", "examples": ["a"], "writeOnly": False}, "a", "a" * 9),
    ),
}
LIBRARIES: Final = tuple(_PARTS)
_HEADS: Final[Mapping[str, Mapping[str, Any]]] = {
    "zod 3": {"$schema": "http://json-schema.org/draft-07/schema#", "additionalProperties": False},
    "zod 4": {"$schema": "https://json-schema.org/draft/2020-12/schema", "additionalProperties": False},
    "pydantic": {"title": "Arguments"},
    "C#": {"$schema": "http://json-schema.org/draft-04/schema#", "title": "Arguments", "additionalProperties": False},
    "PHP": {},
    "OpenAPI": {},
    "by hand": {"$id": "https://example.org/tool", "strict": True},
}


def tool_schema(source: Random, library: str) -> Part:
    """Composes a schema of a tool's arguments; `good` and `bad` are objects with properties in the schema's order."""
    names = [
        f"{name}{place}"
        for place, name in enumerate(source.choices(("path", "a b", "größe", "$x"), k=source.randrange(6)))
    ]
    parts = {name: _part(source, library) for name in names}
    required = [name for name in names if source.random() < 0.5]
    good = {name: parts[name].good for name in names if name in required or source.random() < 0.5}
    wrong = [name for name in names if parts[name].bad is not None]
    bad: dict[str, Any] | None = None
    if wrong:
        name = source.choice(wrong)
        bad = {key: parts[key].bad if key == name else part.good for key, part in parts.items()}
    definitions: dict[str, dict[str, Any]] = {}
    for part in parts.values():
        for key, named in part.definitions.items():
            definitions.setdefault(key, {}).update(named)
    properties: Any = {name: part.schema for name, part in parts.items()}
    schema = {"type": "object", "properties": properties or ([] if library == "PHP" else {}), **_HEADS[library]}
    if library == "PHP" and required:
        schema["required"] = {str(2 * place): name for place, name in enumerate(required)}
    elif required or library == "by hand":
        schema["required"] = required
    unobeyed = " ".join(dict.fromkeys(part.unobeyed for part in parts.values() if part.unobeyed))
    needed = {
        name for name, part in parts.items() if isinstance(part.schema, dict) and part.schema.get("required") is True
    }
    good = {name: parts[name].good for name in names if name in good or name in needed}
    return Part({**schema, **definitions}, good, bad, unobeyed)


def _part(source: Random, library: str) -> Part:
    part = source.choice(_PARTS[library])
    wrap: Callable[[Part], Part] = source.choice((_alone, _alone, _alone, _in_list, _in_object))
    return wrap(part)


def _alone(part: Part) -> Part:
    return part


def _in_list(part: Part) -> Part:
    bad = None if part.bad is None else [part.bad]
    return Part({"type": "array", "items": part.schema}, [part.good], bad, part.unobeyed, part.definitions)


def _in_object(part: Part) -> Part:
    if not isinstance(part.schema, dict) or part.schema.get("required") is True:
        return part
    schema = {"type": "object", "properties": {"inner": part.schema}, "required": ["inner"]}
    bad = {} if part.bad is None else {"inner": part.bad}
    return Part(schema, {"inner": part.good}, bad, part.unobeyed, part.definitions)
