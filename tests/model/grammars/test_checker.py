"""Checks that bad grammars of requests are refused with a reason, in bounded time, without ending the process."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import suppress
from hashlib import sha256
from time import monotonic
from typing import Any
from unittest.mock import Mock

import pytest
from llguidance import LLMatcher

from llamaclust.core.errors import DeadlineError, ParameterError
from llamaclust.core.sampler.matchers import Grammar
from llamaclust.model.grammars import checker as module
from llamaclust.model.grammars import checker_child, definitions
from llamaclust.model.grammars.checker import GrammarChecker
from llamaclust.model.grammars.checker_process import CheckerProcess, CheckLimits, Verdict
from llamaclust.model.grammars.recursion import endless_reference
from llamaclust.model.grammars.schema_references import MISSING, SchemaReferences
from llamaclust.model.grammars.vocabulary import GrammarVocabulary
from llamaclust.model.grammars.walk import GrammarWalk
from llamaclust.model.tokenizers.loading import load_tokenizer
from support.chat.large_vocabulary import LARGE, large_vocabulary
from support.hanging_children import children_hang
from support.models.tiny_tokenizers import byte_level


@pytest.fixture(scope="module")
def checker() -> Iterator[GrammarChecker]:
    made = GrammarChecker(load_tokenizer(byte_level(330)))
    yield made
    made.close()


def refusal(checker: GrammarChecker, grammar: Grammar) -> str:
    """Returns the error, or "" if the grammar is accepted."""
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
    with pytest.raises(ParameterError, match=re.escape(f"s: a grammar cannot express {places}: remove it")):
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
    with suppress(ParameterError):  # raised before compilation
        refusal(checker, _HOSTILE[name]())
    assert monotonic() - began < 30, name
    assert refusal(checker, definitions.of_object("o")) == "", "the next grammar is checked as before"


_ENDLESS: dict[str, dict[str, Any]] = {
    "itself": {"$ref": "#"},
    "an optional property": {"type": "object", "properties": {"a": {"$ref": "#/properties/a"}}},
    "a required property": {
        "type": "object",
        "properties": {"n": {"type": "object", "properties": {"n": {"$ref": "#/properties/n"}}, "required": ["n"]}},
    },
    "each other": {
        "properties": {"x": {"$ref": "#/$defs/a"}},
        "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/b"}]}, "b": {"allOf": [{"$ref": "#/$defs/a"}]}},
    },
    "items": {"$ref": "#/$defs/t", "$defs": {"t": {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/t"}}}},
    "escaped names": {"properties": {"a/b %": {"oneOf": [{"$ref": "#/properties/a~1b%20%25"}]}}},
}


@pytest.mark.parametrize("name", _ENDLESS)
def test_references_that_lead_back_to_themselves_are_refused(checker: GrammarChecker, name: str) -> None:
    """Checks that such schemas are refused on their own and in a rule, as in grammars of tools."""
    with pytest.raises(ParameterError, match=r"^json_schema: .*(the reference '#.* leads back to itself|\$ref)"):
        asyncio.run(checker.check(definitions.of_schema(_ENDLESS[name], "json_schema")))
    rule = definitions.of_lark(f'start: "call " %json {json.dumps(_ENDLESS[name])}', "tools")
    assert refusal(checker, rule).startswith("tools: the reference '#")


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"next": {"$ref": "#"}}},
        {"type": "object", "properties": {"n": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}, "required": ["n"]},
        {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "string"}]}}, "$ref": "#/$defs/a"},
        {"$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}}}, "$ref": "#/$defs/t"},
        {"$defs": {"unused": {"$ref": "#/$defs/unused"}}, "type": "string"},
        {"type": ["object", "string"], "properties": {"n": {"$ref": "#"}}, "required": ["n"]},
    ],
)
def test_references_that_may_end_are_taken(checker: GrammarChecker, schema: dict[str, Any]) -> None:
    assert refusal(checker, definitions.of_schema(schema, "s")) == ""


def test_references_are_followed_in_linear_time() -> None:
    chain: dict[str, Any] = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(5000)}
    assert endless_reference({"$ref": "#/$defs/a0", "$defs": {**chain, "a5000": {}}}) is None
    assert endless_reference({"$ref": "#/$defs/a0", "$defs": {**chain, "a5000": {"$ref": "#/$defs/a2500"}}}) is not None


@pytest.mark.parametrize(
    ("reference", "named"),
    [("#/$defs/a~1b%25", {}), ("#here", {"$anchor": "here"}), ("https://x/y", {"$id": "https://x/y"}), ("#", {})],
)
def test_references_by_pointer_anchor_and_identifier_are_found_alike(reference: str, named: dict[str, str]) -> None:
    """Checks endless references and references that end, and that `find` resolves the latter."""
    for part, is_endless in (({"$ref": reference}, True), ({"type": "array", "items": {"$ref": reference}}, False)):
        schema: dict[str, Any] = {"$defs": {"a/b%": {**named, **part}}, "$ref": reference}
        if reference == "#":
            schema = {"allOf": [part]}
        assert (endless_reference(schema) == reference) is is_endless
        assert is_endless or SchemaReferences(schema).find(reference) is not MISSING


_OPTIONAL = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(800)}}
_FAILS_LATER = {
    "many optional properties": lambda: definitions.of_schema(_OPTIONAL, "s"),
    "many optional properties of items": lambda: definitions.of_schema({"type": "array", "items": _OPTIONAL}, "s"),
    "in a property": lambda: definitions.of_schema({"properties": {"a": {"const": 1}, "b": _OPTIONAL}}, "s"),
    "a rule without an end": lambda: definitions.of_lark('start: "a" rule | "b"\nrule: rule "x"', "s"),
    "repetitions of words": lambda: definitions.of_schema(
        {"type": "string", "pattern": r"^(?:\S+\s+){0,290}\S+$", "maxLength": 4000}, "s"
    ),
    "endless forced text": lambda: definitions.of_lark('start: "a" start', "s"),
    "many parts that may be absent": lambda: definitions.of_lark("start: " + '"x"? ' * 5000, "s"),
}


@pytest.mark.parametrize("name", _FAILS_LATER)
def test_what_would_fail_within_an_answer_is_refused_with_its_reason(checker: GrammarChecker, name: str) -> None:
    reason = refusal(checker, _FAILS_LATER[name]())
    assert reason.startswith("s: ") and " after " in reason
    assert any(part in reason for part in ("became too complex", "the answer cannot continue", "forces a text"))


def test_a_check_compiles_once(monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = GrammarVocabulary([*(bytes([byte]) for byte in range(256)), b""], [256], lambda text: [*text.encode()])
    native = Mock(wraps=LLMatcher)
    monkeypatch.setattr("llguidance.LLMatcher", native)
    assert checker_child._checked(definitions.of_object("o").definition, GrammarWalk(vocabulary))["error"] == ""
    native.assert_called_once()


def test_grammars_that_are_too_long_are_refused() -> None:
    with pytest.raises(ParameterError, match="the limit is 1048576"):
        definitions.of_schema({"enum": ["x" * (1 << 20)]}, "s")
    with pytest.raises(ParameterError, match="the limit is 131072"):
        definitions.of_gbnf("root ::= " + '"a" ' * 50_000, "g")


@pytest.mark.parametrize("text", ["", "root ::= (", "rot ::= 'a'", "root ::= nothing", "root ::= " + "(" * 5000, "[\\"])
def test_gbnf_that_is_wrong_is_refused(checker: GrammarChecker, text: str) -> None:
    assert refusal(checker, definitions.of_gbnf(text, "grammar")).startswith("grammar: ")


def test_gbnf_is_converted_by_the_check(checker: GrammarChecker) -> None:
    given = definitions.lazy(definitions.of_gbnf('root ::= "a" | [b-c]', "g"), ["a"])
    for _ in range(2):  # the second check uses the kept result
        taken = asyncio.run(checker.check(given))
        assert (taken.triggers, taken.origin) == (given.triggers, given.origin)
        assert json.loads(taken.definition)["grammars"][0]["lark_grammar"].endswith('start: "a"\n     | /[b-c]/\n\n')


def _chain(rules: int) -> str:
    """Returns GBNF whose conversion takes quadratic time."""
    middle = "".join(f'a{i}::="x""x"a{i + 1}\n' for i in range(rules))
    return f'root::=a0\n{middle}a{rules}::="x"'


def test_rules_and_characters_of_gbnf_decide_whether_it_is_converted(checker: GrammarChecker) -> None:
    assert "6002 rules times 117804 characters" in refusal(checker, definitions.of_gbnf(_chain(6000), "grammar"))
    assert refusal(checker, definitions.of_gbnf(_chain(300), "grammar")) == ""


def test_gbnf_that_takes_long_to_convert_is_refused_and_blocks_nothing() -> None:
    checker = GrammarChecker(load_tokenizer(byte_level(330)), CheckLimits(guard_cpu_s=0.1))
    grammar = definitions.of_gbnf(_chain(1000), "grammar")

    async def check() -> None:
        checks = asyncio.gather(checker.check(grammar), return_exceptions=True)
        await asyncio.sleep(0)  # lets the first check start
        await checker.check(definitions.of_object("o"))  # runs in the other process
        (error,) = await checks
        assert isinstance(error, ParameterError) and "the grammar needs more than" in str(error)
        assert len(checker._verdicts) == 1, "the guard's answer is no verdict"

    try:
        asyncio.run(check())
    finally:
        checker.close()


async def test_a_client_that_leaves_keeps_its_turn_until_the_process_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = dict[str, Future[Verdict]]()
    monkeypatch.setattr(CheckerProcess, "submit", lambda self, text: checks.setdefault(text, Future()))

    async def begin(*names: str) -> list[Future[Verdict]]:
        """Waits until the checks of these names have begun, and no others."""
        while len(checks) < len(names):  # noqa: ASYNC110  a mock has no event
            await asyncio.sleep(0)
        assert [*checks] == [definitions.of_regex(name, "r").definition for name in names]
        return [*checks.values()]

    checker = GrammarChecker(load_tokenizer(byte_level(330)))
    left = asyncio.create_task(checker.check(definitions.of_regex("left", "r"), "a"))
    (work,) = await begin("left")
    left.cancel()
    further = asyncio.create_task(checker.check(definitions.of_regex("further", "r"), "a"))
    other = asyncio.create_task(checker.check(definitions.of_regex("other", "r"), "b"))
    await begin("left", "other")
    work.set_result(Verdict(""))
    for each in await begin("left", "other", "further"):
        if not each.done():
            each.set_result(Verdict(""))
    await asyncio.gather(further, other)
    assert left.cancelled()
    checker.close()


@pytest.mark.parametrize("limits", [CheckLimits(guard_cpu_s=0.001), CheckLimits(memory_bytes=1 << 20)])
def test_a_grammar_that_ends_its_process_is_refused_and_checked_anew(limits: CheckLimits) -> None:
    checker = GrammarChecker(load_tokenizer(byte_level(330)), limits)
    try:
        grammar = definitions.of_schema({"enum": [f"value {i}" for i in range(10_000)]}, "s")
        for _ in range(2):
            assert "s: the grammar needs more than " in refusal(checker, grammar)
            assert not checker._verdicts
    finally:
        checker.close()


@pytest.mark.parametrize("words", [LARGE, 151_936])
def test_the_preparation_of_a_large_vocabulary_is_no_part_of_a_check(words: int) -> None:
    """Checks that a preparation longer than the limit of checks does not fail them."""
    checker = GrammarChecker(load_tokenizer(large_vocabulary(words)), CheckLimits(guard_cpu_s=0.15))
    try:
        for grammar in (
            definitions.of_choice(["yes", "no"], "guided_choice"),
            definitions.of_object("response_format"),
            definitions.of_regex(r"\d{3}-[a-z]+", "guided_regex"),
            definitions.of_lark('start: "a" | "b" start', "grammar"),
            definitions.of_gbnf('root ::= "x" | [0-9]+', "grammar"),
        ):
            assert refusal(checker, grammar) == ""
        assert len(checker._verdicts) == 5
    finally:
        checker.close()


def test_a_check_that_is_late_says_nothing_about_the_grammar() -> None:
    checker = GrammarChecker(load_tokenizer(byte_level(330)), CheckLimits(start_s=0.05))
    try:
        with children_hang(), pytest.raises(DeadlineError, match=r"did not reply within 0\.05 s; try again"):
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
