"""A thousand tools as libraries write their schemas: none is refused as a whole, and what is not obeyed is named."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from random import Random
from typing import Any

import pytest

from llamaclust.cluster.text.chat import ToolMode
from llamaclust.model.grammars.checker import GrammarChecker
from support.chat.bound_calls import TOKENIZER, allows, bound, call
from support.chat.library_schemas import LIBRARIES, Part, tool_schema
from support.seed import SEED

TOOLS = 1000
AT_ONCE = 20


@pytest.fixture
async def checker() -> AsyncIterator[GrammarChecker]:
    made = GrammarChecker(TOKENIZER)
    yield made
    made.close()


def tools(count: int) -> dict[str, Part]:
    source = Random(SEED)
    return {f"tool{place}": tool_schema(source, LIBRARIES[place % len(LIBRARIES)]) for place in range(count)}


def _values(part: Part) -> tuple[Any, ...]:
    return part.good, part.bad, []


async def test_a_thousand_tools_of_libraries(checker: GrammarChecker) -> None:
    parts = tools(TOOLS)
    names = [*parts]
    named: set[str] = set()
    for start in range(0, TOOLS, AT_ONCE):
        some = {name: parts[name].schema for name in names[start : start + AT_ONCE]}
        grammar, ignored = await bound(checker, some, ToolMode.AUTO)
        assert grammar is not None, "refused as a whole"
        named |= {place.split(".")[1] for place in ignored}
        values = [(name, value) for name in some for value in _values(parts[name])]
        found = allows(grammar, *(call(name, json.dumps(value, ensure_ascii=False)) for name, value in values))
        for (name, value), is_allowed in zip(values, found, strict=True):
            part = parts[name]
            is_free = "tool" in part.unobeyed and value == part.bad is not None
            assert is_allowed is (value == part.good or is_free), (part, value)
    assert named == {name for name, part in parts.items() if part.unobeyed}, "the others are obeyed"


async def test_a_thousand_tools_in_one_request(checker: GrammarChecker) -> None:
    parts = tools(TOOLS)
    grammar, ignored = await bound(checker, {name: part.schema for name, part in parts.items()}, ToolMode.AUTO)
    named = {place.split(".")[1] for place in ignored}
    assert grammar is not None and named >= {name for name, part in parts.items() if part.unobeyed}
