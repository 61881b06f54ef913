"""Tests of drafts from answers to other requests."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence

import pytest

from llamaclust.cluster.scheduler.drafting import hash_chains
from llamaclust.cluster.scheduler.drafting.drafter import LONG, NO_DRAFT, SHARED, Draft
from llamaclust.cluster.scheduler.drafting.hash_chains import LONGEST, STEP_TOKENS
from llamaclust.cluster.scheduler.drafting.shared import SharedAnswers, SharedDrafter
from support.seed import SEED

SEEDS = [SEED + number for number in range(20)]
BYTES_A_TOKEN = 24


def drafted(answers: SharedAnswers, tokens: Sequence[int], most: int = 4, key: str = "") -> Draft:
    """Returns the draft of a new sequence, after its drafter has read all tokens."""
    drafter = SharedDrafter(answers, key)
    for _ in range(len(tokens) // STEP_TOKENS):
        drafter.draft(tokens, most)
    return drafter.draft(tokens, most)


def test_an_answer_is_drafted_for_others() -> None:
    answers = SharedAnswers(10_000)
    answers.add(range(100, 200), "")
    assert drafted(answers, [1, 2, *range(120, 124)]) == Draft((124, 125, 126, 127), SHARED)
    assert drafted(answers, [*range(120, 135)], 1) == Draft((135,), SHARED)
    assert drafted(answers, [*range(120, 136)], 2) == Draft((136, 137), SHARED + 1)
    assert drafted(answers, [1, 2, *range(120, 123)]) == NO_DRAFT
    assert drafted(answers, [*range(120, 130)], 0) == NO_DRAFT


def test_requests_of_another_key_see_nothing_of_it() -> None:
    answers = SharedAnswers(10_000)
    answers.add(range(100, 200), "a")
    answers.add(range(150, 130, -1), "b")
    for key in ("", "b", "A"):
        assert drafted(answers, [*range(110, 150)], key=key) == NO_DRAFT
    assert drafted(answers, [*range(110, 150)], key="a").tokens == (150, 151, 152, 153)


def test_the_longer_match_is_drafted() -> None:
    answers = SharedAnswers(10_000)
    answers.add([*range(100, 120), 7, 8], "")
    own = [*range(110, 120), 9, 10, 1]
    assert drafted(answers, [*own, *range(110, 120)], 2) == Draft((9, 10), LONG)  # equal lengths: its own
    assert drafted(answers, [*own, *range(109, 120)], 2) == Draft((7, 8), SHARED)
    assert drafted(answers, [*own, 4, *range(111, 120)], 2) == Draft((9, 10), LONG)


def test_matches_and_drafts_end_with_their_answer() -> None:
    answers = SharedAnswers(10_000)
    answers.add([1, 2, 3, 4, 5], "")
    answers.add([6, 7, 8, 9, 10], "")
    assert drafted(answers, [1, 2, 3, 4]) == Draft((5,), SHARED)
    assert drafted(answers, [2, 3, 4, 5]) == NO_DRAFT
    assert drafted(answers, [4, 5, 6, 7]) == NO_DRAFT
    assert drafted(answers, [6, 7, 8, 9]) == Draft((10,), SHARED)


def test_the_older_half_is_dropped() -> None:
    answers = SharedAnswers(2000)
    texts = [range(start, start + 300) for start in range(0, 3000, 300)]
    for number, text in enumerate(texts):
        answers.add(text, "")
        kept = [bool(drafted(answers, text[:8]).tokens) for text in texts[: number + 1]]
        first = kept.index(True)
        assert all(kept[first:]) and sum(kept) in ([number + 1] if number < 3 else [3, 4])


def test_the_longer_match_of_both_halves_is_drafted() -> None:
    answers = SharedAnswers(2000)
    answers.add([1, 2, 3, 4, 5, 6], "")
    answers.add(range(1000, 1700), "")
    answers.add([*range(2000, 2300), 2, 3, 4, 5, 7], "")
    assert drafted(answers, [1, 2, 3, 4, 5]).tokens == (6,)
    assert drafted(answers, [9, 2, 3, 4, 5]).tokens == (7,)
    assert drafted(answers, [2299, 2, 3, 4, 5]).tokens == (7,)


def test_of_an_answer_that_is_too_long_the_end_is_kept() -> None:
    answers = SharedAnswers(2000)
    answers.add(range(5000), "")
    assert drafted(answers, range(4900, 4990), 1).tokens == (4990,)
    assert drafted(answers, range(3000, 3090), 1) == NO_DRAFT
    for most in (0, 1, 100, 257, 260, 266):
        nothing = SharedAnswers(most)
        nothing.add(range(5000), "")
        assert drafted(nothing, range(4990, 4999)) == NO_DRAFT and nothing.size_bytes < 300


def test_a_long_answer_is_taken_in_a_part_at_each_call() -> None:
    answers = SharedAnswers(100_000)
    answers.add(range(4 * STEP_TOKENS), "")
    end = 4 * STEP_TOKENS - 8
    drafter = SharedDrafter(answers, "")
    tries = [drafter.draft(range(end - 8, end), 1).tokens for _ in range(4)]
    assert tries == [(), (), (end,), (end,)]


@pytest.mark.parametrize("seed", SEEDS)
def test_bytes_are_bounded_whatever_is_added(seed: int) -> None:
    draw = random.Random(seed)
    most_tokens = draw.choice([600, 5000, 40_000])
    answers, largest = SharedAnswers(most_tokens), draw.choice([1, 10, 1000, 10_000])
    keys = draw.choice([1, 3, 100_000])
    for _ in range(400):
        answers.add(range(draw.randint(0, largest)), draw.randrange(keys))
        assert answers.size_bytes <= BYTES_A_TOKEN * most_tokens + 1024


def longest(texts: Sequence[Sequence[int]], tokens: Sequence[int], most: int) -> tuple[int, set[tuple[int, ...]]]:
    """Returns the length of the longest match with a continuation, and the continuations of this length."""
    found: dict[int, set[tuple[int, ...]]] = {0: set()}
    for text in texts:
        for place in range(len(text) - 1):
            length = 0
            while length < min(place + 1, len(tokens), LONGEST) and text[place - length] == tokens[-1 - length]:
                length += 1
            found.setdefault(length, set()).add(tuple(text[place + 1 : place + 1 + most]))
    return max(found), found[max(found)]


@pytest.mark.parametrize("seed", SEEDS)
def test_drafts_are_those_of_a_search_of_all_answers(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hash_chains, "CANDIDATES", sys.maxsize)
    draw = random.Random(seed)
    vocabulary, answers = draw.choice([2, 3, 10]), SharedAnswers(100_000)
    texts: dict[int, list[list[int]]] = {0: [], 1: []}
    for _ in range(60):
        text = [draw.randrange(vocabulary) for _ in range(draw.randint(0, 30))]
        key = draw.randrange(2)
        answers.add(text, key)
        texts[key] += [text] if len(text) > 4 else []
        start = draw.randrange(20)
        tokens = draw.choice(texts[key] or [[0]])[start : start + 9]
        tokens += [draw.randrange(vocabulary) for _ in range(draw.randrange(3))]
        length, followers = longest(texts[key], tokens, 5)
        draft = answers.draft(tokens, 5, key, 4)
        assert draft.tokens in followers if length >= 4 else draft == NO_DRAFT
