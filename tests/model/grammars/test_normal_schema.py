"""Tests of the normalization of schemas from libraries and drafts: results, allowed values, unobeyed keywords."""

from __future__ import annotations

import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from llamaclust.core.errors import ParameterError
from llamaclust.core.sampler.matchers import Grammar
from llamaclust.model.grammars import definitions
from llamaclust.model.grammars.matcher import compiled
from llamaclust.model.grammars.normal_schema import normal_schema
from llamaclust.model.grammars.vocabulary import GrammarVocabulary

BYTES = GrammarVocabulary([*(bytes([byte]) for byte in range(256)), b"\xff<end>"], [256], lambda text: [*text.encode()])
MOST = 2**63 - 1024


def allows(grammar: Grammar, *texts: str) -> list[bool]:
    matcher, found = compiled(grammar.definition, BYTES), []
    assert not matcher.is_error(), matcher.get_error()
    for text in texts:
        matcher.reset()
        found.append(matcher.try_consume_tokens([*text.encode()]) == len(text.encode()) and matcher.is_accepting())
    return found


@pytest.mark.parametrize(
    ("schema", "normal"),
    [
        (
            {"type": "string", "$comment": "a", "default": 1, "examples": [1], "readOnly": True, "x-a": 1},
            {"type": "string"},
        ),
        ({"type": "array", "items": True, "uniqueItems": False, "minItems": 0}, {"type": "array"}),
        (
            {"type": "Integer", "minimum": -(2**63), "maximum": 2**63 - 1},
            {"type": "integer", "minimum": -MOST, "maximum": MOST},
        ),
        ({"type": "number", "minimum": 0, "exclusiveMinimum": True}, {"type": "number", "exclusiveMinimum": 0}),
        ({"type": ["dict", "none"], "required": []}, {"type": ["object", "null"]}),
        ({"type": "double", "nullable": True}, {"type": ["number", "null"]}),
        ({"enum": ["a"], "nullable": True}, {"anyOf": [{"enum": ["a"]}, {"type": "null"}]}),
        ({"properties": [], "additionalProperties": []}, {"properties": {}, "additionalProperties": True}),
        ({"allOf": [{"type": "string"}], "minLength": 2.0}, {"type": "string", "minLength": 2}),
        ({"propertyNames": {"enum": ["a"]}}, {"properties": {"a": True}, "additionalProperties": False}),
        ({"unevaluatedProperties": False, "properties": {}}, {"properties": {}, "additionalProperties": False}),
        ({"items": [{"type": "null"}], "additionalItems": False}, {"prefixItems": [{"type": "null"}], "items": False}),
        ({"$schema": "https://spec.openapis.org/oas/3.1/dialect/base", "id": 5}, {}),
        ({"not": {}}, {"allOf": [False]}),
        ({"unevaluatedItems": {"type": "null"}}, {"items": {"type": "null"}}),
    ],
)
def test_normal_forms(schema: dict[str, Any], normal: dict[str, Any]) -> None:
    found = normal_schema(schema)
    assert (found.schema, found.unobeyed) == (normal, ())


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#/definitions/a%20b", "definitions": {"a b": {"const": 1}}},
        {"$ref": "#/components/schemas/a~1b", "components": {"schemas": {"a/b": {"const": 1}}}},
        {"$ref": "#here", "$defs": {"a": {"$anchor": "here", "const": 1}}},
        {"$ref": "https://example.org/a#/$defs/b", "$id": "https://example.org/a", "$defs": {"b": {"const": 1}}},
        {"$ref": "#/anyOf/0", "anyOf": [{"const": 1}, {"const": 2}]},
        {"allOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"const": 1}}},
    ],
)
def test_references_are_found_wherever_they_point(schema: dict[str, Any]) -> None:
    assert allows(definitions.of_schema(schema, "s"), "1", "2") == [True, False]


_A = {"properties": {"a": {"type": "integer"}}}
_LIST = {"prefixItems": [{"type": "integer"}]}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "propertyNames": {"enum": ["a", "b"]}, "allOf": [{"properties": {"a": {}, "c": {}}}]},
        {"additionalProperties": False, "allOf": [_A]},
        {**_A, "allOf": [{"additionalProperties": False}]},
        {**_A, "allOf": [{"patternProperties": {"^[ab]$": {"minimum": 3}}}]},
        {**_LIST, "allOf": [{"items": {"type": "string"}}]},
        {"items": {"minimum": 3}, "allOf": [{**_LIST, "minItems": 1}]},
        {**_A, "description": "An object", "allOf": [{"required": ["a"]}]},
        {**_A, "required": ["a"], "allOf": [{"$ref": "#/$defs/d"}], "$defs": {"d": {"properties": {"b": {}}}}},
        {"allOf": [{"$ref": "#/$defs/d"}], "default": {}, "description": "D", "$defs": {"d": _A}},
    ],
)
def test_keywords_beside_all_of_mean_what_they_mean_alone(schema: dict[str, Any]) -> None:
    objects = [{}, {"a": 1}, {"a": "x"}, {"b": 1}, {"c": 1}, {"a": 1, "c": 1}, {"a": 4, "b": 4}]
    values = [*objects, [], [1], [4], ["x"], [1, "x"], [1, 1], [1, 4], [4, 4], 1]
    known = [Draft202012Validator(schema).is_valid(value) for value in values]
    assert allows(definitions.of_schema(schema, "s"), *map(json.dumps, values)) == known


@pytest.mark.parametrize("reference", ["#", "#/$defs/missing", "other.json", "#/$defs/circle", "#/$defs/0/x"])
def test_references_to_nothing_are_named(reference: str) -> None:
    schema = {"$ref": reference, "$defs": {"circle": {"$ref": "#/$defs/circle"}}}
    schema = {"$ref": "#"} if reference == "#" else schema
    assert normal_schema(schema).unobeyed == ("$ref",)


@pytest.mark.parametrize(
    "schema", [{"type": "integer"}, {"type": ["integer", "null"]}, {"type": "integer", "minimum": 3}]
)
def test_integers_have_at_most_nineteen_digits(schema: dict[str, Any]) -> None:
    texts = ("9" * 18, str(2**53 + 1), str(MOST), "9" * 19, "9" * 20)
    assert allows(definitions.of_schema(schema, "s"), *texts) == [True, True, True, False, False]


@pytest.mark.parametrize(
    "inner",
    [
        {"type": "object", "properties": {"a": {}}},
        {"anyOf": [{"type": "object", "properties": {"a": {}}}, {"type": "null"}]},
        {"$ref": "#/$defs/inner"},
    ],
)
def test_strict_closes_objects_that_say_nothing_of_others(inner: dict[str, Any]) -> None:
    defs = {"inner": {"type": "object", "properties": {"a": {}}}}
    schema = {"type": "object", "properties": {"inner": inner}, "$defs": defs}
    texts = '{"inner":{"a":1}}', '{"inner":{"a":1,"b":1}}', '{"inner":{"a":1},"b":1}'
    assert allows(definitions.of_schema(schema, "s", closes_objects=True), *texts) == [True, False, False]
    assert allows(definitions.of_schema(schema, "s"), *texts) == [True, True, True]
    is_open = {**schema, "additionalProperties": {}}
    assert allows(definitions.of_schema(is_open, "s", closes_objects=True), texts[0], texts[2]) == [True, True]


@pytest.mark.parametrize(
    "schema", [{"type": "object", "properties": {}}, {"properties": []}, {"type": "array", "maxItems": 0}]
)
def test_white_space_in_what_is_empty_ends(schema: dict[str, Any]) -> None:
    grammar = definitions.of_schema(schema, "s", closes_objects=True)
    begin, end = ("[", "]") if schema.get("type") == "array" else ("{", "}")
    assert allows(grammar, begin + end, begin + " " + end, begin + "  " + end) == [True, True, False]


def test_a_normal_schema_is_its_own_normal_form() -> None:
    schema = {"type": "object", "properties": {"a": {"$ref": "#/$defs/n"}}, "$defs": {"n": {"type": "integer"}}}
    once = normal_schema(schema, closes_objects=True).schema
    assert normal_schema(json.loads(json.dumps(once)), closes_objects=True).schema == once


@pytest.mark.parametrize("value", [10**309, -(10**400), 10**4000])
@pytest.mark.parametrize("key", ["minimum", "exclusiveMaximum", "multipleOf", "maxLength", "minItems", "maxProperties"])
def test_numbers_that_no_decimal_number_holds_are_named(key: str, value: int) -> None:
    with pytest.raises(ParameterError, match=f"a grammar cannot express properties.a.{key}:"):
        definitions.of_schema({"type": "object", "properties": {"a": {key: value}}}, "s")


@pytest.mark.parametrize(
    ("schema", "names"),
    [
        ({"properties": {"a": {}}, "patternProperties": {"^x": {}}, "additionalProperties": False}, "maxProperties"),
        ({"type": "array", "contains": {}, "minItems": 2, "minContains": 3}, "contains"),
        ({"type": "array", "contains": {}}, "contains"),
        ({"type": "array", "contains": True, "minItems": 1, "maxItems": 3, "maxContains": 2}, "contains"),
        ({"type": "array", "contains": {"const": 1}, "minContains": "many"}, ""),
        ({"type": "array", "contains": {}, "minContains": 0, "maxContains": 2, "maxItems": 2}, ""),
    ],
)
def test_keywords_that_a_grammar_does_not_obey_are_named(schema: dict[str, Any], names: str) -> None:
    limited = schema | ({"maxProperties": 1} if "properties" in schema else {})
    assert normal_schema(limited).unobeyed == ((names,) if names else ())


@pytest.mark.parametrize("step", [0, -1, -0.5])
def test_steps_that_are_not_above_zero_are_named(step: float) -> None:
    with pytest.raises(ParameterError, match="a grammar cannot express multipleOf:"):
        definitions.of_schema({"type": "number", "multipleOf": step}, "s")
