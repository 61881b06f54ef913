"""Checks that none of a thousand tools with libraries' schemas is refused and that unenforced keywords are named."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncIterator
from random import Random
from typing import Any

import pytest

from llamaclust.cluster.front.text.request import ToolMode
from llamaclust.model.grammars.checker import GrammarChecker
from support.chat.bound_calls import TOKENIZER, allows, bound, call
from support.chat.library_schemas import LIBRARIES, Part, tool_schema
from support.paths import DATA
from support.seed import SEED

TOOLS = 1000
AT_ONCE = 20
UNOBEYED = {"pattern": 16, "uniqueItems": 5}
"""Counts of keywords that grammars cannot express: patterns with look-around, and unique items."""


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
            is_free = "tool" in part.unobeyed  # allows any object
            assert is_allowed is (value == part.good or (is_free and isinstance(value, dict))), (part, value)
    assert named == {name for name, part in parts.items() if part.unobeyed}, "the others are obeyed"


def recorded() -> list[tuple[str, str, Any]]:
    """Returns the source, name and schema of each recorded tool (see the file's README)."""
    lines = (DATA / "schemas" / "tools.jsonl").read_text(encoding="utf-8").splitlines()
    return [(source, name, schema) for source, name, schema in map(json.loads, lines)]


def kind_of(source: str) -> str:
    if source.startswith(("@", "mcp-server")):
        return "MCP"
    return "pydantic" if source.endswith("pydantic") else "zod" if source.startswith("zod") else "C# and PHP"


async def unobeyed(checker: GrammarChecker, schemas: list[Any]) -> list[str]:
    """Returns the unenforced parts of tools, offered twenty at a time; only objects are allowed as arguments."""
    named: list[str] = []
    for start in range(0, len(schemas), AT_ONCE):
        some = {f"tool{start + place}": schema for place, schema in enumerate(schemas[start : start + AT_ONCE])}
        grammar, ignored = await bound(checker, some, ToolMode.AUTO)
        assert grammar is not None, f"refused as a whole: {some}"
        assert not any(allows(grammar, *(call(name, wrong) for name in some for wrong in ("[]", "1", '{"": }'))))
        named += ignored
    return named


async def test_a_thousand_recorded_tools(checker: GrammarChecker) -> None:
    """Checks that no tool is refused and that only parts within arguments are unenforced."""
    found = recorded()
    counts = Counter(kind_of(source) for source, *_ in found)
    assert len(found) >= 1000 and counts["pydantic"] >= 400 and counts["zod"] >= 300
    assert counts["MCP"] >= 150 and counts["C# and PHP"] >= 70
    named = await unobeyed(checker, [schema for *_, schema in found])
    keywords = Counter(place.rpartition(".")[2] for place in named)
    assert all(place.count(".") > 1 for place in named), "none as a whole"
    assert keywords == UNOBEYED


async def test_a_thousand_tools_in_one_request(checker: GrammarChecker) -> None:
    parts = tools(TOOLS)
    grammar, ignored = await bound(checker, {name: part.schema for name, part in parts.items()}, ToolMode.AUTO)
    named = {place.split(".")[1] for place in ignored}
    assert grammar is not None and named >= {name for name, part in parts.items() if part.unobeyed}
