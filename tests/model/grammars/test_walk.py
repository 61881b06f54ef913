"""Checks that the walk of a grammar's check takes linear time for long texts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from llamaclust.core.errors import RequestError
from llamaclust.core.sampler.matchers import Grammar
from llamaclust.model.grammars import definitions, matcher, walk
from llamaclust.model.grammars.matcher import GrammarMatcher
from llamaclust.model.grammars.vocabulary import GrammarVocabulary

FORMS: dict[str, Callable[[str], Grammar]] = {
    "choice": lambda text: definitions.of_choice([text], "c"),
    "choices": lambda text: definitions.of_choice([f"a{text}", f"b{text}"], "c"),
    "lark": lambda text: definitions.of_lark(f'start: "{text}"', "l"),
    "repeated": lambda text: definitions.of_lark(f'start: "{text[0]}"{{{len(text)}}}', "l"),
    "regex": lambda text: definitions.of_regex(f"[ab]{text}", "r"),
    "const": lambda text: definitions.of_schema({"const": text}, "s"),
    "name": lambda text: definitions.of_schema(
        {"type": "object", "properties": {text: {"type": "string"}}, "required": [text]}, "s"
    ),
}


@pytest.fixture(scope="module")
def vocabulary() -> GrammarVocabulary:
    words = [*(bytes([byte]) for byte in range(256)), b"zz", b"zzzz", b"</s>"]
    made = GrammarVocabulary(words, [len(words) - 1], lambda text: made.native.greedy_tokenize(text))
    return made


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collects the lengths in tokens of forced texts that walks compute."""
    found: list[int] = []
    compiled = matcher.compiled

    class Counted:
        def __init__(self, native: Any) -> None:
            self._native = native

        def __getattr__(self, name: str) -> Any:
            return getattr(self._native, name)

        def compute_ff_tokens(self) -> list[int]:
            following: list[int] = self._native.compute_ff_tokens()
            found.append(len(following))
            return following

    monkeypatch.setattr(matcher, "compiled", lambda *given: Counted(compiled(*given)))
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [9_000, 100_000])
def test_a_long_text_that_must_come_is_looked_at_once(
    form: str, size: int, vocabulary: GrammarVocabulary, looks: list[int]
) -> None:
    with pytest.raises(RequestError, match=r"forces a text of at least .*; the limit is 8192"):
        walk.GrammarWalk(vocabulary).run(FORMS[form]("z" * size).definition)
    assert len([look for look in looks if look > 64]) == 1 and len(looks) <= 8


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [100, 3_000, 8_000])
def test_a_walk_looks_at_so_much_and_no_more(
    form: str, size: int, vocabulary: GrammarVocabulary, looks: list[int]
) -> None:
    walk.GrammarWalk(vocabulary).run(FORMS[form]("z" * size).definition)
    assert 0 < 4 * sum(looks) <= walk._LOOKED_BYTES + 64 * matcher._MAX_FORCED_BYTES


def test_a_text_that_comes_late_in_an_answer_is_refused_there(vocabulary: GrammarVocabulary) -> None:
    grammar = definitions.of_regex(f"[ab]{{40}}{'z' * 9_000}", "r")
    walk.GrammarWalk(vocabulary).run(grammar.definition)
    made = GrammarMatcher(grammar, vocabulary)
    for _ in range(39):
        assert made.try_take(ord("a")) is None and made.forced() == []
    made.take((ord("a"),))
    with pytest.raises(RequestError, match="forces a text of at least"):
        made.forced()
