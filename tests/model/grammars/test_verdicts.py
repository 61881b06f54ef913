"""Checks that verdicts on grammars near their limits do not depend on the machine's load."""

from __future__ import annotations

import asyncio

import pytest

from llamaclust.core.errors import ParameterError
from llamaclust.core.sampler.matchers import Grammar
from llamaclust.model.grammars import definitions
from llamaclust.model.grammars.checker import GrammarChecker
from llamaclust.model.tokenizers.loading import load_tokenizer
from support.busy_machine import busy_machine
from support.models.tiny_tokenizers import byte_level


def optional(count: int) -> Grammar:
    properties = {f"p{number}": {"type": "string"} for number in range(count)}
    return definitions.of_schema({"type": "object", "properties": properties}, "schema")


def choice(count: int) -> Grammar:
    return definitions.of_choice([f"text {number}" for number in range(count)], "choice")


def absent(count: int) -> Grammar:
    return definitions.of_lark("start: " + '"x"? ' * count, "lark")


def rules(count: int) -> Grammar:
    names = "|".join(f"r{number}" for number in range(count))
    return definitions.of_lark(
        f"start: ({names})*\n" + "\n".join(f'r{number}: "{number}"' for number in range(count)), "rules"
    )


def words(count: int) -> Grammar:
    return definitions.of_schema({"type": "string", "pattern": rf"^(?:\S+\s+){{0,{count}}}\S+$"}, "words")


def gbnf(count: int) -> Grammar:
    middle = "".join(f'a{number}::="x"a{number + 1}\n' for number in range(count))
    return definitions.of_gbnf(f'root::=a0\n{middle}a{count}::="x"', "gbnf")


def grid() -> list[Grammar]:
    return [
        *map(optional, (30, 200, *range(499, 509, 2), 600)),
        *map(choice, (1, 2, 1000, 2002, 5000, 20_000)),
        *map(absent, (10, 100, *range(252, 284), 300)),
        *map(rules, range(780, 820, 2)),
        *map(words, (1, 5, 10, 20, 40, 80, 160, 320)),
        *map(gbnf, (10, 100, 200, 3000)),
    ]


async def verdicts(checker: GrammarChecker, grammars: list[Grammar]) -> list[str]:
    async def verdict(grammar: Grammar) -> str:
        try:
            return (await checker.check(grammar)).definition
        except ParameterError as error:
            return f"refused: {error}"

    return [await verdict(grammar) for grammar in grammars]


@pytest.mark.alone
def test_verdicts_near_the_limits_are_the_same_on_a_busy_machine() -> None:
    grammars, found = grid(), []
    assert len(grammars) >= 60
    for is_busy in (False, True):
        checker = GrammarChecker(load_tokenizer(byte_level(330)))
        try:
            if is_busy:
                with busy_machine():
                    found.append(asyncio.run(verdicts(checker, grammars)))
            else:
                found.append(asyncio.run(verdicts(checker, grammars)))
        finally:
            checker.close()
    assert found[0] == found[1]
    refused = [text for text in found[0] if text.startswith("refused: ")]
    assert 20 <= len(refused) <= len(grammars) - 20, "both sides of the limits"
    assert not any("s of CPU time" in text for text in refused), "by counts, not by the guard"
