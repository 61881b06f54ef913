"""Checks that arguments of calls in the notations of Gemma, LFM2 and MiniMax M3 obey the schema and are parsed
correctly."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from itertools import compress, product
from random import Random
from typing import Any

import pytest
from llguidance import LLMatcher

from llamaclust.model.chat.tools.answer_parser import AnswerParser, parsed
from llamaclust.model.grammars.vocabulary import GrammarVocabulary, read_vocabulary
from llamaclust.model.tokenizers.loading import load_tokenizer
from llamaclust.model.tokenizers.tokenizer import Tokenizer
from support.chat.call_grammars import calls_of
from support.chat.random_schemas import random_instance, random_schema
from support.chat.sample_templates import form_of
from support.models.tiny_tokenizers import byte_level
from support.seed import SEED

MARK = "]<]minimax[>["
FORMS = ("gemma", "lfm2", "minimax-m3")
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer", "minimum": 1, "maximum": 5},
        "unit": {"enum": ["C", "F"]},
        "exact": {"type": "boolean"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "place": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]},
        "other": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
    },
    "required": ["city"],
}


@cache
def tokenizer() -> Tokenizer:
    return load_tokenizer(byte_level(320))


@cache
def vocabulary() -> GrammarVocabulary:
    return read_vocabulary(tokenizer(), 320)


def matcher(form: str, schema: Mapping[str, Any], *, is_parallel: bool = True) -> LLMatcher:
    def split(text: str) -> list[str | int]:
        return tokenizer().split_special(text, parse_special=True)

    grammar = calls_of(form, {"f": schema}, split, is_parallel=is_parallel)
    assert grammar is not None
    made = LLMatcher(vocabulary().native, json.dumps({"grammars": [{"lark_grammar": grammar.lark}]}), log_level=0)
    assert not made.is_error(), made.get_error()
    return made


def takes(made: LLMatcher, text: str) -> bool:
    made.reset()
    ids = tokenizer().encode(text, add_special=False)
    return made.try_consume_tokens(ids) == len(ids) and made.is_accepting()


def gemma(value: Any) -> str:
    match value:
        case dict():
            members = sorted(value.items(), key=lambda member: str(member[0]).lower())
            return "{" + ",".join(f"{key}:{gemma(item)}" for key, item in members) + "}"
        case list():
            return "[" + ",".join(map(gemma, value)) + "]"
        case str():
            return f'<|"|>{value}<|"|>'
        case _:
            return json.dumps(value)


def elements(value: Any) -> str:
    match value:
        case dict():
            return "".join(f"{MARK}<{key}>{elements(item)}{MARK}</{key}>" for key, item in value.items())
        case list():
            return "".join(f"{MARK}<item>{elements(item)}{MARK}</item>" for item in value)
        case str():
            return value
        case _:
            return json.dumps(value)


WRITERS: Mapping[str, Callable[[dict[str, Any]], str]] = {
    "gemma": lambda arguments: f"<|tool_call>call:f{gemma(arguments)}<tool_call|>",
    "lfm2": lambda arguments: (
        "<|tool_call_start|>[f("
        + ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        + ")]<|tool_call_end|>"
    ),
    "minimax-m3": lambda arguments: (
        f'{MARK}<tool_call>\n{MARK}<invoke name="f">{elements(arguments)}{MARK}</invoke>\n{MARK}</tool_call>'
    ),
}


def with_needed_first(value: Any, schema: Mapping[str, Any]) -> Any:
    """Returns the instance with required properties first, the order in which they are written."""
    if isinstance(value, dict):
        keys = sorted(value, key=lambda key: key not in schema.get("required", ()))
        return {key: with_needed_first(value[key], schema["properties"][key]) for key in keys}
    return [with_needed_first(item, schema["items"]) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("arguments", "is_allowed"),
    [
        ({"city": "Rom"}, True),
        ({"city": "Rom", "days": 2, "unit": "C", "exact": True, "tags": ["a", "b"], "place": {"x": 1.5}}, True),
        ({"city": "Rom", "other": None}, True),
        ({"city": "Rom", "tags": []}, True),
        ({}, False),
        ({"days": 2}, False),
        ({"city": "Rom", "days": "two"}, False),
        ({"city": "Rom", "days": 9}, False),
        ({"city": "Rom", "unit": "K"}, False),
        ({"city": "Rom", "exact": 1}, False),
        ({"city": "Rom", "tags": {"a": 1}}, False),
        ({"city": "Rom", "place": {"y": 1}}, False),
        ({"city": "Rom", "place": {}}, False),
        ({"city": "Rom", "other": "a"}, False),
        ({"city": "Rom", "hours": 2}, False),
    ],
)
def test_arguments_obey_the_schema(form: str, arguments: dict[str, Any], is_allowed: bool) -> None:
    assert takes(matcher(form, SCHEMA), WRITERS[form](arguments)) is is_allowed


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("needed", [(), ("b",), ("c",), ("a", "c"), ("a", "b", "c")])
def test_needed_arguments_may_have_any_names(form: str, needed: tuple[str, ...]) -> None:
    """Gemma's notation sorts arguments by name, so that needed ones may follow others."""
    names = [*needed, *sorted({*"abc"}.difference(needed))]
    schema = {"type": "object", "properties": {key: {"type": "integer"} for key in "abc"}, "required": [*needed]}
    made = matcher(form, schema)
    for chosen in product([False, True], repeat=3):
        arguments = dict.fromkeys(compress(names, chosen), 1)
        is_allowed = arguments.keys() >= {*needed}
        assert takes(made, WRITERS[form](arguments)) is is_allowed, arguments


@pytest.mark.parametrize("form", FORMS)
def test_arguments_of_open_schemas_are_free(form: str) -> None:
    arguments = {"a": 1, "b": {"c": ["d", None]}, "e": True}
    for schema in ({}, {"type": "object"}, {**SCHEMA, "additionalProperties": True}):
        assert takes(matcher(form, schema), WRITERS[form](arguments)), schema
        assert takes(matcher(form, schema), WRITERS[form]({})), schema


@pytest.mark.parametrize("form", FORMS)
def test_one_call_where_calls_are_not_parallel(form: str) -> None:
    one = WRITERS[form]({"city": "Rom"})
    two = one.replace(")]", '), f(city="Ulm")]').replace(f"{MARK}</tool_call>", f"{one.partition(chr(10))[2]}")
    two = one + one if form == "gemma" else two
    assert takes(matcher(form, SCHEMA), two), two
    alone = matcher(form, SCHEMA, is_parallel=False)
    assert takes(alone, one) and not takes(alone, two)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(SEED, SEED + 40))
def test_random_instances_are_taken_and_read(form: str, seed: int) -> None:
    source = Random(seed)
    schema = json.loads(
        json.dumps(random_schema(source)).replace("many-people", "people").replace('quote\\"d', "quoted")
    )
    arguments = with_needed_first(random_instance(schema, source), schema)
    text = WRITERS[form](arguments)
    assert takes(matcher(form, schema), text), f"seed {seed}: {schema} {text}"
    (call,) = parsed(AnswerParser(form_of(form), {"f": schema}), text).calls
    found = json.loads(call.arguments)
    assert found == arguments, f"seed {seed}: {arguments} is read as {found}"


@pytest.mark.parametrize("form", FORMS)
def test_schemas_that_refer_to_themselves_or_are_deep_are_free_there(form: str) -> None:
    deep: dict[str, Any] = {"type": "integer"}
    for _ in range(40):
        deep = {"type": "array", "items": deep}
    schema = {"type": "object", "properties": {"a": {"$ref": "#"}, "b": deep}}
    assert takes(matcher(form, schema), WRITERS[form]({"a": {"a": 1}, "b": [[[]]]}))


@pytest.mark.parametrize(
    ("schema", "known"),
    [
        ({"type": "array", "items": {"type": "integer"}}, []),
        ({"type": ["array", "null"]}, []),
        ({"anyOf": [{"type": "object"}, {"type": "null"}]}, {}),
        ({"type": ["string", "array"]}, ""),
        ({}, ""),
    ],
)
def test_empty_elements_are_values_of_their_types(schema: dict[str, Any], known: Any) -> None:
    tools = {"f": {"type": "object", "properties": {"a": schema, "b": {"type": "array", "items": schema}}}}
    text = WRITERS["minimax-m3"]({"a": "", "b": [""]})
    (call,) = parsed(AnswerParser(form_of("minimax-m3"), tools), text).calls
    assert json.loads(call.arguments) == {"a": known, "b": [known]}
