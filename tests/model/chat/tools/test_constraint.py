"""Tests of grammars of tool calls with accepted and refused answers."""

from __future__ import annotations

import json
import time
from functools import cache
from typing import Any

import pytest
from llguidance import LLMatcher

from llamaclust.model.chat.tools.constraint.call_grammar import CallStart
from llamaclust.model.grammars.vocabulary import GrammarVocabulary, read_vocabulary
from llamaclust.model.tokenizers.loading import load_tokenizer
from llamaclust.model.tokenizers.tokenizer import Tokenizer
from support.chat.call_grammars import calls_of
from support.chat.sample_answers import SAMPLES, TOOLS
from support.chat.sample_templates import KNOWN_MARKS, TEMPLATES
from support.models.tiny_tokenizers import byte_level

FORMS = [*TEMPLATES, *KNOWN_MARKS]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rom", "days": 2}}\n</tool_call>'


@cache
def tokenizer() -> Tokenizer:
    return load_tokenizer(byte_level(320))


@cache
def vocabulary() -> GrammarVocabulary:
    return read_vocabulary(tokenizer(), 320)


def split(text: str) -> list[str | int]:
    return tokenizer().split_special(text, parse_special=True)


def matcher(form: str, start: CallStart = CallStart.ANSWER, *, is_parallel: bool = True) -> LLMatcher:
    grammar = calls_of(form, TOOLS, split, start, is_parallel=is_parallel)
    assert grammar is not None
    definition = json.dumps({"grammars": [{"lark_grammar": grammar.lark}]})
    made = LLMatcher(vocabulary().native, definition, log_level=0)
    assert not made.is_error(), made.get_error()
    return made


def takes(made: LLMatcher, text: str) -> bool:
    """Tells whether the grammar allows the text as a whole answer."""
    made.reset()
    ids = tokenizer().encode(text, add_special=False)
    return made.try_consume_tokens(ids) == len(ids) and made.is_accepting()


@pytest.mark.parametrize("form", FORMS)
def test_required_calls_have_a_grammar_in_every_form(form: str) -> None:
    matcher(form)


@pytest.mark.parametrize("form", FORMS)
def test_calls_that_a_trigger_begins(form: str) -> None:
    grammar = calls_of(form, TOOLS, split, CallStart.TRIGGER)
    samples = [sample for sample in SAMPLES if sample.form == form and sample.calls]
    if grammar is None:
        assert form in ("llama", "harmony", "muse", "functionary")
        return
    made = matcher(form, CallStart.TRIGGER)
    for sample in samples:
        place = sample.text.rfind(grammar.triggers[0] if form != "coder" else grammar.triggers[0] + "\n<function=get")
        is_usual = '"type": "function"' not in sample.text and '{"arguments"' not in sample.text
        if place >= 0 and is_usual and sample.content in ("", sample.text[: len(sample.content)]):
            assert takes(made, sample.text[place:]), sample.text[place:]


@pytest.mark.parametrize("form", ["coder", "gemma", "lfm2", "minimax-m3"])
@pytest.mark.parametrize("required", [[f"p{i}" for i in range(15_000)], "p1", [["p1"], {}]])
def test_many_properties_take_linear_time(form: str, required: Any) -> None:
    tools = {"f": {"properties": {f"p{i}": {"type": "string"} for i in range(15_000)}, "required": required}}
    start = time.process_time()
    grammar = calls_of(form, tools, lambda text: [text])
    assert grammar is not None and time.process_time() - start < 20


def test_arguments_obey_the_schema() -> None:
    made = matcher("hermes")
    assert takes(made, CALL) and takes(made, CALL + "\n" + CALL)
    assert takes(made, "<think>So.</think>\n" + CALL)
    assert not takes(made, CALL.replace("2", '"2"'))
    assert not takes(made, CALL.replace("get_weather", "other"))
    assert not takes(made, CALL.replace('"city": "Rom", ', ""))
    assert not takes(made, "Hi " + CALL) and not takes(made, "<think>So.</think>\nHi")


def test_arguments_that_a_schema_does_not_name_are_refused_unless_it_allows_them() -> None:
    assert not takes(matcher("hermes"), CALL.replace('"days"', '"hours"'))
    nothing: dict[str, Any] = {"type": "object", "properties": {}}
    for schema, arguments, is_allowed in (
        (nothing, "{}", True),
        (nothing, '{"a": 1}', False),
        ({**nothing, "additionalProperties": True}, '{"a": 1}', True),
        ({"type": "object"}, '{"a": 1}', True),
        ({**nothing, "required": ["a"]}, '{"a": 1}', True),
        ({"properties": {"a": {"anyOf": [{"properties": {"b": {}}}, {"type": "null"}]}}}, '{"a": {"c": 1}}', False),
        ({"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]}, '{"a": 1, "b": 1}', True),
        ({"properties": {"not": {}, "dependencies": {}}}, '{"a": 1}', False),
        ({"properties": {"properties": {}, "$ref": {}}}, '{"a": 1}', False),
        ({"properties": {"b": {"default": {"if": 1}, "examples": [{"allOf": 1}]}}}, '{"a": 1}', False),
        (
            {"properties": {"b": {"patternProperties": {"if": {"allOf": [{"minLength": 1}, {"maxLength": 2}]}}}}},
            '{"a": 1}',
            True,
        ),
    ):
        grammar = calls_of("hermes", {"f": schema}, split, is_parallel=False)
        assert grammar is not None
        definition = json.dumps({"grammars": [{"lark_grammar": grammar.lark}]})
        made = LLMatcher(vocabulary().native, definition, log_level=0)
        call = f'<tool_call>\n{{"name": "f", "arguments": {arguments}}}\n</tool_call>'
        assert takes(made, call) is is_allowed, f"{schema} {arguments}"


def test_one_call_where_calls_are_not_parallel() -> None:
    made = matcher("hermes", is_parallel=False)
    assert takes(made, CALL) and not takes(made, CALL + "\n" + CALL)


def test_reasoning_that_the_prompt_has_begun_comes_first() -> None:
    made = matcher("hermes", CallStart.THOUGHT)
    assert takes(made, "So.</think>\n" + CALL) and not takes(made, CALL)


def test_tagged_arguments_obey_their_types() -> None:
    made = matcher("coder")
    head, tail = (
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nRom\n</parameter>\n",
        "</function>\n</tool_call>",
    )
    assert takes(made, head + tail) and takes(made, head + "<parameter=days>\n2\n</parameter>\n" + tail)
    assert not takes(made, head + "<parameter=days>\ntwo\n</parameter>\n" + tail)
    assert not takes(made, "<tool_call>\n<function=get_weather>\n" + tail)


def test_without_tools_there_is_no_grammar() -> None:
    assert calls_of("hermes", {}, split, CallStart.TRIGGER) is None


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"a": {"type": "string", "enum": 5}}, "required": "a"},
        {"properties": {"a": 5, 'b"\n': {"type": ["string", {}]}}, "required": [{}, "b"]},
        {"properties": [1], "required": None},
        {"type": 5, "properties": {"a": {"anyOf": [5, {"anyOf": [{"enum": [[]]}]}]}}},
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_schemas_that_are_none_make_a_grammar_or_none(form: str, schema: dict[str, Any]) -> None:
    """Checks that invalid schemas raise nothing here; llguidance reports their errors as errors of the request."""
    calls_of(form, {"f": schema}, split)
