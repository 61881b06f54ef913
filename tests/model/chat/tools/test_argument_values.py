"""Checks that argument values of models become JSON that every client can read."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llamaclust.model.chat.tools.argument_values import json_of, json_of_python


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
    long = "['" + "a" * 20_000 + "']"
    assert json.loads(json_of_python(long)) == long
