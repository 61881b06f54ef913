"""Checks that argument values of models become JSON that every client can read."""

from __future__ import annotations

import json
import re
from random import Random
from typing import Any

import pytest

from llamaclust.model.chat.tools.argument_values import TextValue, json_of, json_of_python
from support.seed import SEED


def _strict(constant: str) -> Any:
    raise AssertionError(constant)


@pytest.mark.parametrize("text", ["NaN", "-Infinity", "[1, NaN]", "1e999", '{"a": [Infinity]}', "[1e999]"])
def test_what_is_no_number_of_json_is_a_string(text: str) -> None:
    assert json.loads(json_of_python(text), parse_constant=_strict) == text
    for types in (frozenset[str](), frozenset({"number"}), frozenset({"array", "object"})):
        json.loads(json_of(text, types), parse_constant=_strict)
    assert json_of("NaN", frozenset({"number"})) == '"NaN"'


def test_literals_of_python() -> None:
    assert json_of_python("{'a': (1, True, None)}") == '{"a": [1, true, null]}'
    assert json_of_python("[true, {'a': null, \"b\": False}]") == '[true, {"a": null, "b": false}]'
    assert json_of_python("[true, other]") == '"[true, other]"'
    long = "['" + "a" * 20_000 + "']"
    assert json.loads(json_of_python(long)) == long


@pytest.mark.parametrize(
    ("text", "known"),
    [
        (r'"C:\Users\me"', r"C:\Users\me"),
        (r"'C:\\Users\xml\u12'", r"C:\Users\xml\u12"),
        (r"'it\'s \x41\u00e9'", "it's Aé"),
        (r'"\d+\N"', r"\d+\N"),
        ("'a\nb'", "a\nb"),
        ("'" + "a" * 20_000 + "'", "a" * 20_000),
        ("'" + r"\'\n\\\d\x41" * 5_000 + "'", "'\n\\\\dA" * 5_000),
    ],
)
def test_strings_lose_their_quotation_marks(text: str, known: str) -> None:
    assert json.loads(json_of_python(text)) == known


def test_strings_of_the_grammar_are_read() -> None:
    draw = Random(SEED)
    for _ in range(2000):
        quote = draw.choice("\"'")
        inner = "".join(draw.choices("\\\\\\UuxN01fd{} \"'é", k=draw.randrange(12)))
        text = f"{quote}{inner}{quote}"
        if re.fullmatch(rf"{quote}([^{quote}\\\n]|\\.)*{quote}", text):
            assert [*json.loads(json_of_python(f"{{'k': {text}}}"))] == ["k"], text
            assert len(json.loads(json_of_python(text))) <= len(inner), text


@pytest.mark.parametrize("text", ["x\n  ", "\n  ", "", "\n", "a\n  b\n   ", "ab\n  \n  "])
def test_a_text_does_not_depend_on_its_pieces(text: str) -> None:
    for pieces in ([text], [*text]):
        put: list[str] = []
        value = TextValue(put.append, "", "\n  ")
        for piece in pieces:
            value.push(piece)
        value.end()
        assert json.loads("".join(put)) == text.removesuffix("\n  ")
