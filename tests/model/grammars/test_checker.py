"""Grammars of requests are refused with a reason, and none takes long or ends the process that asks."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections.abc import Iterator
from contextlib import suppress
from hashlib import sha256
from time import monotonic
from typing import Any
from unittest.mock import Mock

import pytest
from llguidance import LLMatcher

from llamaclust.core.errors import DeadlineError, ParameterError
from llamaclust.core.sampling import Grammar
from llamaclust.model.grammars import checker as module
from llamaclust.model.grammars import checker_child, definitions
from llamaclust.model.grammars.checker import GrammarChecker
from llamaclust.model.grammars.checker_process import CheckLimits
from llamaclust.model.grammars.vocabulary import GrammarVocabulary
from llamaclust.model.tokenizers.loading import load_tokenizer
from support.models.tiny_tokenizers import byte_level


@pytest.fixture(scope="module")
def checker() -> Iterator[GrammarChecker]:
    made = GrammarChecker(load_tokenizer(byte_level(330)))
    yield made
    made.close()


def refusal(checker: GrammarChecker, grammar: Grammar) -> str:
    """ "" where the grammar is taken."""
    try:
        asyncio.run(checker.check(grammar))
    except ParameterError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    "grammar",
    [
        definitions.of_object("o"),
        definitions.of_schema({"type": "array", "items": {"$ref": "#/$defs/a"}, "$defs": {"a": {"const": 1}}}, "s"),
        definitions.of_schema(True, "s"),
        definitions.of_schema(
            {"type": "object", "properties": {"format": {"type": "string", "format": "binary"}}}, "s"
        ),
        definitions.of_regex(r"a/b\/[/]\d{3}(é|ü)", "r"),
        definitions.of_lark('start: "a" | "b" start', "l"),
        definitions.of_gbnf('root ::= item+\nitem ::= "- " [^\\n]+ "\\n"', "g"),
        definitions.of_choice(['qu"ote', "line\nbreak", "back\\slash", "é/"], "c"),
        definitions.lazy(definitions.of_lark("start: <|im_start|> /a+/", "t"), ["<|im_start|>"]),
    ],
)
def test_forms_that_are_taken(checker: GrammarChecker, grammar: Grammar) -> None:
    assert refusal(checker, grammar) == ""


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (definitions.of_schema(False, "s"), "s: Unsatisfiable schema"),
        (definitions.of_schema({"not": {}}, "s"), "s: Unsatisfiable schema"),
        (definitions.of_regex("(?=a)", "guided_regex"), "look-around"),
        (definitions.of_regex("(", "guided_regex"), "guided_regex: "),
        (definitions.of_lark("start: nothing", "grammar"), 'unknown name: "nothing"'),
        (definitions.of_lark("start: <|nothing|>", "grammar"), "grammar: "),
    ],
)
def test_forms_that_are_refused(checker: GrammarChecker, grammar: Grammar, reason: str) -> None:
    assert reason in refusal(checker, grammar)


@pytest.mark.parametrize(
    ("schema", "places"),
    [
        ({"type": "nonsense"}, "type"),
        ({"$ref": "https://example.org/schema"}, "$ref"),
        (
            {"properties": {"a": {"uniqueItems": True, "not": {"const": 1}}}},
            "properties.a.not, properties.a.uniqueItems",
        ),
        ({"items": {"$ref": "#/$defs/a"}, "$defs": {"a": {"pattern": "(?=a)b"}}}, "$defs.d0.pattern"),
    ],
)
def test_keywords_that_no_grammar_obeys_are_refused_by_place(schema: dict[str, Any], places: str) -> None:
    with pytest.raises(ParameterError, match=re.escape(f"s: no grammar can obey {places}: leave it out")):
        definitions.of_schema(schema, "s")


def _nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"], "additionalProperties": False}
    return schema


_HOSTILE = {
    "deep schema": lambda: definitions.of_schema(_nested(60), "s"),
    "deeper schema": lambda: definitions.of_schema(_nested(300), "s"),
    "huge enum": lambda: definitions.of_schema({"enum": [f"value {i}" for i in range(30_000)]}, "s"),
    "exponential regex": lambda: definitions.of_regex("(a|b)*a(a|b){500}", "r"),
    "nested repetitions": lambda: definitions.of_regex("((((a{1,99}){1,99}){1,99}){1,99}){1,99}", "r"),
    "deep regex": lambda: definitions.of_regex("(" * 100_000 + "a" + ")" * 100_000, "r"),
    "deep lark": lambda: definitions.of_lark("start: " + "(" * 200_000 + '"a"' + ")" * 200_000, "l"),
    "many rules": lambda: definitions.of_lark(
        "start: r0\n" + "\n".join(f'r{i}: "{i}" r{i + 1}' for i in range(20_000)) + '\nr20000: "x"', "l"
    ),
    "recursive reference": lambda: definitions.of_schema({"allOf": [{"$ref": "#"}]}, "s"),
    "many combinations": lambda: definitions.of_schema(
        {"allOf": [{"anyOf": [{"pattern": f"a{i}.*b{j}"} for j in range(20)]} for i in range(40)]}, "s"
    ),
}


@pytest.mark.parametrize("name", _HOSTILE)
def test_hostile_grammars_are_bounded(checker: GrammarChecker, name: str) -> None:
    began = monotonic()
    with suppress(ParameterError):  # before it is compiled
        refusal(checker, _HOSTILE[name]())
    assert monotonic() - began < 30, name
    assert refusal(checker, definitions.of_object("o")) == "", "the next grammar is checked as before"


def test_a_grammar_whose_first_token_takes_too_much_is_refused(checker: GrammarChecker) -> None:
    assert "s: the grammar is too complex: " in refusal(checker, _HOSTILE["recursive reference"]())


def test_a_check_compiles_once(monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = GrammarVocabulary([*(bytes([byte]) for byte in range(256)), b""], [256], lambda text: [*text.encode()])
    native = Mock(wraps=LLMatcher)
    monkeypatch.setattr("llguidance.LLMatcher", native)
    assert checker_child._checked(definitions.of_object("o").definition, vocabulary, 0.0)["error"] == ""
    native.assert_called_once()


def test_grammars_that_are_too_long_are_refused() -> None:
    with pytest.raises(ParameterError, match="at most 1048576 are taken"):
        definitions.of_schema({"enum": ["x" * (1 << 20)]}, "s")
    with pytest.raises(ParameterError, match="at most 131072 are taken"):
        definitions.of_gbnf("root ::= " + '"a" ' * 50_000, "g")


@pytest.mark.parametrize("text", ["", "root ::= (", "rot ::= 'a'", "root ::= nothing", "root ::= " + "(" * 5000, "[\\"])
def test_gbnf_that_is_wrong_is_refused(checker: GrammarChecker, text: str) -> None:
    assert refusal(checker, definitions.of_gbnf(text, "grammar")).startswith("grammar: ")


def test_gbnf_is_converted_by_the_check(checker: GrammarChecker) -> None:
    given = definitions.lazy(definitions.of_gbnf('root ::= "a" | [b-c]', "g"), ["a"])
    for _ in range(2):  # the second from what is kept
        taken = asyncio.run(checker.check(given))
        assert (taken.triggers, taken.origin) == (given.triggers, given.origin)
        assert json.loads(taken.definition)["grammars"][0]["lark_grammar"].endswith('start: "a"\n     | /[b-c]/\n\n')


def _chain(rules: int) -> str:
    """GBNF that takes its converter quadratic time."""
    middle = "".join(f'a{i}::="x""x"a{i + 1}\n' for i in range(rules))
    return f'root::=a0\n{middle}a{rules}::="x"'


def test_gbnf_that_takes_long_to_convert_is_refused_and_blocks_nothing() -> None:
    checker = GrammarChecker(load_tokenizer(byte_level(330)), CheckLimits(convert_cpu_s=0.3))
    grammar = definitions.of_gbnf(_chain(6000), "grammar")

    async def check() -> None:
        checks = asyncio.gather(checker.check(grammar), return_exceptions=True)
        await asyncio.sleep(0)  # the first one starts
        await checker.check(definitions.of_object("o"))  # the other process
        (error,) = await checks
        assert isinstance(error, ParameterError) and "the grammar needs more than" in str(error)
        assert await asyncio.wait_for(asyncio.gather(checker.check(grammar), return_exceptions=True), 0.1), "kept"

    try:
        asyncio.run(check())
    finally:
        checker.close()


def test_a_check_that_takes_too_much_of_a_processor_is_a_refusal() -> None:
    checker = GrammarChecker(load_tokenizer(byte_level(330)), CheckLimits(compile_cpu_s=0.001))
    try:
        grammar = definitions.of_schema({"enum": [f"value {i}" for i in range(10_000)]}, "s")
        assert "the grammar needs more than 0.001 s" in refusal(checker, grammar)
    finally:
        checker.close()


def test_a_check_that_is_late_says_nothing_about_the_grammar() -> None:
    checker = GrammarChecker(load_tokenizer(byte_level(330)), CheckLimits(wall_s=0.0))
    try:
        with pytest.raises(DeadlineError, match="did not end within 0 s; try again"):
            refusal(checker, definitions.of_object("o"))
    finally:
        checker.close()


def test_a_process_that_others_end_is_started_again(checker: GrammarChecker) -> None:
    assert refusal(checker, definitions.of_regex("first", "r")) == ""
    for process in checker._processes:
        if process.child.pid is not None:
            os.kill(process.child.pid, signal.SIGKILL)
    assert refusal(checker, definitions.of_regex("second", "r")) == ""


def test_verdicts_are_kept_by_digest_and_the_oldest_used_goes(
    checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_KEPT_VERDICTS", 2)
    checker._verdicts.clear()
    first, second, third = (definitions.of_regex(f"kept{i}", "r") for i in range(3))
    for grammar in (first, second, first, third):
        assert refusal(checker, grammar) == ""
    assert [*checker._verdicts] == [sha256(grammar.definition.encode()).digest() for grammar in (first, third)]


def test_formats_that_are_not_known_are_annotations() -> None:
    schema = {"properties": {"format": {"format": "uuid"}, "b": {"format": "binary"}}, "const": {"format": "binary"}}
    known = {"properties": {"format": {"format": "uuid"}, "b": {}}, "const": {"format": "binary"}}
    assert definitions.of_schema(schema, "s") == definitions.of_schema(known, "s")


@pytest.mark.parametrize("name", ["default", "const", "enum", "examples", "format", "properties"])
@pytest.mark.parametrize("keyword", ["properties", "$defs", "patternProperties"])
def test_names_of_properties_are_no_keywords(keyword: str, name: str) -> None:
    schema = {keyword: {name: {"type": "string", "format": "phone"}}, "default": {keyword: {name: {"format": "phone"}}}}
    known = {keyword: {name: {"type": "string"}}, "default": {keyword: {name: {"format": "phone"}}}}
    assert definitions.of_schema(schema, "s") == definitions.of_schema(known, "s")


def test_definitions_are_llguidances_own_form() -> None:
    (grammar,) = json.loads(definitions.of_schema({"type": "integer"}, "s").definition)["grammars"]
    assert grammar["json_schema"]["type"] == "integer"
