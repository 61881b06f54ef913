"""Checks that arguments outside JSON may have any order: each at most once, and the required ones at least once."""

from __future__ import annotations

import json
from functools import cache
from itertools import permutations
from typing import Any

import pytest
from llguidance import LLMatcher

from llamaclust.model.chat.tools.constraint.arguments_schema import arguments_schema
from llamaclust.model.chat.tools.constraint.call_grammar import CallStart, call_grammar
from llamaclust.model.grammars.vocabulary import GrammarVocabulary
from support.chat.notation_templates import NOTATIONS
from support.chat.rendered_calls import NAME, of_source

_VALUES = {"path": "a.py", "limit": 7, "is_deep": False, "names": "x"}
_ORDERED = ("coder", "glm", "flat tags", "tags with types", "tags with character data", "kimi-k3", "lfm2", "minimax-m3")
_NOTATIONS = (*_ORDERED, "muse")


def schema(*required: str, is_open: bool = False, **more: Any) -> dict[str, Any]:
    types = {"path": "string", "limit": "integer", "is_deep": "boolean", "names": "string"}
    properties = {**{key: {"type": kind} for key, kind in types.items()}, **more}
    return {
        "type": "object",
        "properties": properties,
        "required": [*required],
        "additionalProperties": is_open,
    }


@cache
def vocabulary() -> GrammarVocabulary:
    return GrammarVocabulary(
        [*(bytes([byte]) for byte in range(256)), b"\xff<end>"], [256], lambda text: [*text.encode()]
    )


class Calls:
    """Calls of one tool in a notation."""

    def __init__(self, notation: str, parameters: dict[str, Any]) -> None:
        self._rendered = of_source(NOTATIONS[notation])
        tools = {NAME: arguments_schema(parameters).schema}
        grammar = call_grammar(self._rendered.form, tools, lambda text: [text], CallStart.ANSWER, is_parallel=False)
        assert grammar is not None
        definition = json.dumps({"grammars": [{"lark_grammar": grammar.lark}]})
        self._matcher = LLMatcher(vocabulary().native, definition, log_level=0)
        assert not self._matcher.is_error(), self._matcher.get_error()

    def allow(self, arguments: dict[str, Any]) -> bool:
        return self.allow_text(self._rendered.text(arguments))

    def allow_text(self, text: str) -> bool:
        ids = [*text.rstrip().removesuffix("<|eot|>").encode()]
        self._matcher.reset()
        return self._matcher.try_consume_tokens(ids) == len(ids) and self._matcher.is_accepting()


@pytest.mark.parametrize("notation", _NOTATIONS)
def test_any_order_without_optional_arguments_too(notation: str) -> None:
    calls = Calls(notation, schema("limit", "names"))
    for count in range(1, 5):
        for keys in permutations(_VALUES, count):
            assert calls.allow({key: _VALUES[key] for key in keys}) is ({"limit", "names"} <= {*keys}), keys


@pytest.mark.parametrize("notation", _NOTATIONS)
def test_optional_arguments_alone(notation: str) -> None:
    calls = Calls(notation, schema())
    for keys in [(), ("names",), ("names", "path"), ("is_deep", "limit", "path")]:
        assert calls.allow({key: _VALUES[key] for key in keys}), keys


def test_an_argument_occurs_once() -> None:
    one, other = "<parameter=limit>\n1\n</parameter>\n", "<parameter=path>\na\n</parameter>\n"
    begin, end = f"<tool_call>\n<function={NAME}>\n", "</function>\n</tool_call>"
    calls = Calls("coder", schema("limit"))
    assert calls.allow_text(begin + other + one + end)
    assert not calls.allow_text(begin + one + other + one + end)
    assert not calls.allow_text(begin + other + end)


@pytest.mark.parametrize("key", ["path", "a/b", "x-y.z", "é#&~", "p0"])
def test_other_arguments_beside_those_of_the_schema(key: str) -> None:
    """A key of the schema keeps its type where other keys are allowed."""
    calls = Calls("coder", schema("limit", is_open=True, **{key: {"type": "integer"}}))
    assert calls.allow({key: 5, "extra": "text", "limit": 1, f"{key}s": "text", "more": "text"})
    assert not calls.allow({key: "text", "limit": 1})
    assert not calls.allow({"extra": "text", key: 5})


@pytest.mark.parametrize("notation", ["lfm2", "gemma", "minimax-m3"])
def test_members_of_objects_have_any_order(notation: str) -> None:
    inner = {**schema("limit"), "properties": {"limit": {"type": "integer"}, "Zone": {"type": "string"}}}
    calls = Calls(notation, {**schema("box"), "properties": {"box": inner}})
    assert calls.allow({"box": {"Zone": "a", "limit": 1}})
    assert calls.allow({"box": {"limit": 1, "Zone": "a"}})
    assert not calls.allow({"box": {"Zone": "a"}})


def test_gemma_need_not_sort_keys() -> None:
    calls = Calls("gemma", schema("limit"))
    texts = ['limit:1,is_deep:true,path:<|"|>a<|"|>', 'path:<|"|>a<|"|>,limit:1', "limit:1"]
    assert all(calls.allow_text(f"<|tool_call>call:{NAME}{{{text}}}<tool_call|>") for text in texts)
    for text in ("limit:1,limit:1", "is_deep:true", "limit:1,"):
        assert not calls.allow_text(f"<|tool_call>call:{NAME}{{{text}}}<tool_call|>")


@pytest.mark.parametrize("notation", ["coder", "lfm2"])
def test_a_hundred_arguments(notation: str) -> None:
    keys = [f"key{place}" for place in range(100)]
    parameters = {**schema(*keys[:60:3]), "properties": {key: {"type": "integer"} for key in keys}}
    calls = Calls(notation, parameters)
    assert calls.allow(dict.fromkeys(reversed(keys), 1))
    assert calls.allow(dict.fromkeys(keys[:60:3], 1))
    assert not calls.allow(dict.fromkeys(keys[3:60:3], 1))
