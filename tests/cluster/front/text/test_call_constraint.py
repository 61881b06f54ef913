"""Tests of grammars for a chat's answer: enforced and reported parts of tools' schemas, calls beside other forms."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest

from llamaclust.cluster.front.text import call_constraint as module
from llamaclust.cluster.front.text.chat import PLAIN
from llamaclust.cluster.front.text.request import AnswerParsing, ChatRequest, ToolMode
from llamaclust.core.errors import DeadlineError, ParameterError
from llamaclust.core.sampler.matchers import Grammar
from llamaclust.model.chat.tools.constraint.call_grammar import CallGrammar
from llamaclust.model.grammars import definitions
from llamaclust.model.grammars.checker import GrammarChecker, GuardedGrammarError
from llamaclust.model.grammars.checker_process import CheckLimits
from support.chat.bound_calls import TOKENIZER, allows, bound, call
from support.hanging_children import children_hang

BOUND = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
ODD: Mapping[str, Any] = {
    "unfinished pattern": {"properties": {"a": {"type": "string", "pattern": "(a"}}},
    "patterns of names that overlap": {"patternProperties": {"^a": {"type": "string"}, "b$": {"type": "integer"}}},
    "a property that cannot be": {"properties": {"a": {}}, "required": ["b"], "additionalProperties": False},
    "nothing but itself": {"allOf": [{"$ref": "#"}]},
    "a list": {"type": "array", "items": {"type": "string"}},
    "many values": {"properties": {"a": {"enum": [f"{i:0100}" for i in range(11_000)]}}},
}


@pytest.fixture
async def checker() -> AsyncIterator[GrammarChecker]:
    made = GrammarChecker(TOKENIZER)
    yield made
    made.close()


@pytest.mark.parametrize("mode", [ToolMode.AUTO, ToolMode.REQUIRED])
@pytest.mark.parametrize("odd", ODD)
async def test_one_tool_whose_schema_cannot_be_obeyed_is_free_in_its_arguments(
    checker: GrammarChecker, odd: str, mode: ToolMode
) -> None:
    tools = {"first": BOUND, "odd": ODD[odd], "last": BOUND}
    grammar, named = await bound(checker, tools, mode)
    assert named == ["tools.odd.type" if odd == "a list" else "tools.odd"]
    calls = call("odd", '{"any": [1, {"x": null}]}'), call("odd", '["a"]'), call("other", "{}")
    assert allows(grammar, *calls) == [True, False, False]
    for name in ("first", "last"):
        assert allows(grammar, call(name, '{"n": 1}'), call(name, '{"n": "1"}')) == [True, False]


class Guarded(GrammarChecker):
    """A checker that refuses the first grammar with `GuardedGrammarError`."""

    checks = 0

    async def check(self, grammar: Grammar, owner: str = "") -> Grammar:
        self.checks += 1
        if self.checks == 1:
            raise GuardedGrammarError("tools", "the grammar needs too much")
        return grammar


@pytest.mark.parametrize("count", [1, 8, 64])
async def test_a_grammar_that_meets_the_guard_costs_no_more_than_two_checks(count: int) -> None:
    guarded = Guarded(TOKENIZER)
    tools = {f"f{number}": BOUND for number in range(count)}
    _, named = await bound(guarded, tools, ToolMode.AUTO)
    assert sorted(named) == sorted(f"tools.{name}" for name in tools) and guarded.checks == 2
    guarded.close()


@pytest.mark.parametrize(
    ("keywords", "named"),
    [
        ({"uniqueItems": True}, "tools.f.properties.tags.uniqueItems"),
        ({"contains": {"const": "a"}}, "tools.f.properties.tags.contains"),
        ({"not": {"minItems": 3}}, "tools.f.properties.tags.not"),
        ({"if": {"minItems": 3}, "then": {"maxItems": 5}}, "tools.f.properties.tags.if"),
    ],
)
async def test_a_keyword_that_cannot_be_obeyed_is_named_and_the_others_bind(
    checker: GrammarChecker, keywords: dict[str, Any], named: str
) -> None:
    tags = {"type": "array", "items": {"type": "string"}, **keywords}
    grammar, names = await bound(checker, {"f": {"type": "object", "properties": {"tags": tags}}})
    assert names == [named]
    assert allows(grammar, call("f", '{"tags": ["a", "a"]}'), call("f", '{"tags": [1]}')) == [True, False]


@pytest.mark.parametrize("form", ["coder", "glm", "deepseek", "devstral", "gemma", "lfm2", "kimi-k3"])
async def test_free_arguments_in_other_forms_of_calls(checker: GrammarChecker, form: str) -> None:
    grammar, named = await bound(checker, {"odd": ODD["many values"]}, form=form)
    assert grammar is not None and named == ["tools.odd"]
    if form == "coder":
        text = "<tool_call>\n<function=odd>\n<parameter=any>\nx\n</parameter>\n</function>\n</tool_call>"
        assert allows(grammar, text, text.replace("function=odd", "function=other")) == [True, False]


async def test_many_tools_that_are_too_much_together_are_free_but_for_the_small_ones(checker: GrammarChecker) -> None:
    def listing(place: int, values: int) -> dict[str, Any]:
        return {"properties": {"a": {"enum": [f"{place} {i:0100}" for i in range(values)]}}, "required": ["a"]}

    tools = {f"t{place}": listing(place, 900) for place in range(16)} | {"small": BOUND}
    grammar, named = await bound(checker, tools)
    assert 0 < len(named) < len(tools) and "tools.small" not in named
    assert allows(grammar, call("small", '{"n": 1}'), call("small", "{}")) == [True, False]


OTHERS = {
    "schema": (definitions.of_schema({**BOUND, "additionalProperties": False}, "response_format"), '{"n": 12}'),
    "regex": (definitions.of_regex("[0-9]{4}", "guided_regex"), "2024"),
    "choice": (definitions.of_choice(["yes", "no"], "guided_choice"), "yes"),
    "gbnf": (definitions.of_gbnf('root ::= "a" root | "b"', "grammar"), "aab"),
}


@pytest.mark.parametrize("form", ["hermes", "llama", "coder", "harmony", "mistral", "functionary"])
@pytest.mark.parametrize("kind", OTHERS)
async def test_an_answer_is_calls_or_the_form_that_the_request_asks_for(
    checker: GrammarChecker, kind: str, form: str
) -> None:
    other, text = OTHERS[kind]
    grammar, named = await bound(checker, {"f": BOUND}, ToolMode.AUTO, form, other)
    assert named == [] and allows(grammar, text, "Hello") == [True, False]
    calls = {
        "hermes": call("f", '{"n": 1}'),
        "llama": '{"name": "f", "parameters": {"n": 1}}',
        "mistral": '[TOOL_CALLS][{"name": "f", "arguments": {"n": 1}}]',
        "harmony": ' to=functions.f<|channel|>commentary json<|message|>{"n": 1}',
    }
    if form in calls:
        assert allows(grammar, calls[form], calls[form].replace("1", '"1"')) == [True, False]
    required, _ = await bound(checker, {"f": BOUND}, ToolMode.REQUIRED, form, other)
    assert allows(required, text) == [False], "calls alone"


@pytest.mark.parametrize("form", ["llama", "harmony", "functionary"])
async def test_tools_whose_calls_begin_without_a_marker_are_named(checker: GrammarChecker, form: str) -> None:
    grammar, named = await bound(checker, {"f": BOUND, "g": BOUND}, ToolMode.AUTO, form)
    assert grammar is None and named == ["tools.f", "tools.g"]
    grammar, named = await bound(checker, {"f": BOUND, "g": BOUND}, ToolMode.REQUIRED, form)
    assert grammar is not None and named == []


async def test_a_form_that_cannot_be_obeyed_is_refused_beside_tools(checker: GrammarChecker) -> None:
    with pytest.raises(ParameterError, match="guided_regex: "):
        await bound(checker, {"f": BOUND}, ToolMode.AUTO, other=definitions.of_regex("(", "guided_regex"))


async def test_only_a_refusal_leaves_calls_free(monkeypatch: pytest.MonkeyPatch, checker: GrammarChecker) -> None:
    """Checks that a late check is an error, since it must not change the tokens of an answer."""
    reading = AnswerParsing(PLAIN, {"f": {"type": "object"}})
    late = GrammarChecker(TOKENIZER, CheckLimits(start_s=0.05))
    monkeypatch.setattr(module, "call_grammar", lambda *_, **__: CallGrammar("start: nothing"))
    try:
        assert await module.answer_grammar(ChatRequest(()), reading, TOKENIZER, checker) is None
        with children_hang(), pytest.raises(DeadlineError):
            await module.answer_grammar(ChatRequest(()), reading, TOKENIZER, late)
    finally:
        late.close()


async def test_equal_rules_of_tools_are_written_once(checker: GrammarChecker) -> None:
    grammar, _ = await bound(checker, {f"t{i}": BOUND for i in range(100)})
    assert grammar is not None and json.loads(grammar.definition)["grammars"][0]["lark_grammar"].count("%json") == 1


async def test_a_propertys_reference_is_found_where_arguments_are_tagged(checker: GrammarChecker) -> None:
    point = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
    schema = {"properties": {"at": {"anyOf": [{"$ref": "#/$defs/P"}, {"type": "null"}]}}, "$defs": {"P": point}}
    grammar, named = await bound(checker, {"f": {**schema, "required": ["at"]}}, form="coder")
    texts = [
        f"<tool_call>\n<function=f>\n<parameter=at>\n{value}\n</parameter>\n</function>\n</tool_call>"
        for value in ('{"x": 1}', "null", '{"x": "1"}')
    ]
    assert named == [] and allows(grammar, *texts) == [True, True, False]


async def test_rules_of_calls_have_the_limit_of_schemas(checker: GrammarChecker) -> None:
    """Checks that calls in combination with a user's grammar have that grammar's limit."""
    many = {"type": "object", "properties": {f"p{number}": {"type": "string"} for number in range(400)}}
    schema, written = definitions.of_object("json"), definitions.of_gbnf("root ::= [a-z]+", "grammar")
    for mode, other, names in (
        (ToolMode.AUTO, None, []),
        (ToolMode.REQUIRED, None, []),
        (ToolMode.AUTO, schema, []),
        (ToolMode.AUTO, written, ["tools.many"]),
    ):
        assert (await bound(checker, {"one": BOUND, "many": many}, mode, other=other))[1] == names, (mode, other)
