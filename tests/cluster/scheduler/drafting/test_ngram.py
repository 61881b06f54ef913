"""Compares n-gram drafts with a search of all earlier positions."""

from __future__ import annotations

import random
import sys
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import SupportsIndex, overload

import pytest

from llamaclust.cluster.scheduler.drafting import hash_chains
from llamaclust.cluster.scheduler.drafting.copies import MOST_DIFFERENT
from llamaclust.cluster.scheduler.drafting.drafter import (
    CLASSES,
    LONG,
    MIDDLE,
    NO_DRAFT,
    RESUMED,
    SHORT,
    SINGLE,
    SUBSTITUTED,
    Draft,
)
from llamaclust.cluster.scheduler.drafting.hash_chains import CANDIDATES, LONGEST, STEP_TOKENS
from llamaclust.cluster.scheduler.drafting.ngram import NgramDrafter
from support.seed import SEED

SEEDS = [SEED + number for number in range(20)]
MOST_READS = 2 * CANDIDATES * (LONGEST + 4) + 4 * LONGEST + 5 * CANDIDATES + 6 * MOST_DIFFERENT
"""The most tokens that a draft may read, for a text of any length."""
BYTES_A_TOKEN = 26
"""Bytes that a drafter may take for each token; 64 would be too many."""
RESUMED_CLASSES = range(RESUMED, RESUMED + 2)
GUESSED = (SUBSTITUTED, *RESUMED_CLASSES)
"""Classes of drafts that continue a copy although a longer match may be elsewhere."""


@pytest.fixture
def all_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hash_chains, "CANDIDATES", sys.maxsize)


def matching(tokens: Sequence[int], place: int) -> int:
    last = len(tokens) - 1
    lengths = (n for n in range(min(LONGEST, place + 1)) if tokens[place - n] != tokens[last - n])
    return next(lengths, min(LONGEST, place + 1))


def following(tokens: Sequence[int], place: int, most: int) -> tuple[int, ...]:
    period = len(tokens) - 1 - place
    return tuple(tokens[place + 1 + number % period] for number in range(most))


def expected(tokens: Sequence[int], most: int) -> tuple[int, ...]:
    """Returns the continuation of the longest match, the newest one of that length."""
    places = range(len(tokens) - 1)
    length, place = max(((matching(tokens, place), place) for place in places), default=(0, 0))
    return following(tokens, place, most) if length else ()


def caught_up(tokens: Sequence[int]) -> NgramDrafter:
    drafter = NgramDrafter()
    while not drafter.take_in(tokens):
        pass
    return drafter


def drafted(tokens: Sequence[int], most: int) -> Draft:
    return caught_up(tokens).draft(tokens, most)


def random_text(draw: random.Random, length: int) -> list[int]:
    """Draws a text of few or many different tokens, with copies of its parts."""
    vocabulary = draw.choice([1, 2, 3, 10, 50_000])
    tokens: list[int] = []
    while len(tokens) < length:
        start = draw.randrange(len(tokens) + 1)
        tokens += tokens[start : start + draw.randrange(60)] if draw.random() < 0.5 else []
        tokens += [draw.randrange(vocabulary) for _ in range(draw.randrange(20))]
    return tokens[:length]


@pytest.mark.parametrize("seed", SEEDS)
def test_of_few_tokens_the_longest_match_is_continued(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(200):
        tokens, most = random_text(draw, draw.randint(0, CANDIDATES + 1)), draw.randint(1, 20)
        assert drafted(tokens, most).tokens == expected(tokens, most), tokens


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.usefixtures("all_candidates")
def test_growth_in_steps_equals_growth_at_once_and_a_search(seed: int) -> None:
    draw = random.Random(seed)
    tokens, grown = random_text(draw, 400), NgramDrafter()
    ends = [*sorted(draw.sample(range(3, 400), 40)), 400]
    for end in ends:
        seen, most = tokens[:end], draw.randint(1, 40)
        draft, at_once, best = grown.draft(seen, most), caught_up(seen), expected(seen, most)
        assert grown.match(seen) == at_once.match(seen)
        assert at_once.draft(seen, most).tokens == best
        assert draft.tokens == best or draft.confidence in GUESSED


@pytest.mark.parametrize("seed", SEEDS)
def test_a_bounded_search_finds_matches_that_are_there(seed: int) -> None:
    draw = random.Random(seed)
    tokens, drafter = random_text(draw, 3000), NgramDrafter()
    found = 0
    for end in range(3, 3000, draw.randint(3, 30)):
        seen = tokens[:end]
        draft, match = drafter.draft(seen, 4), drafter.match(seen)
        if match.length:
            assert match.length == matching(seen, match.place) > 1
            assert draft.tokens == following(seen, match.place, 4) or draft.confidence in RESUMED_CLASSES
        else:
            assert draft == NO_DRAFT or draft.confidence in GUESSED or draft.confidence >= SINGLE
        assert 0 <= draft.confidence < CLASSES
        found += match.length > 1
    assert found


@pytest.mark.parametrize("period", [1, 2, 3, 7, 40])
def test_repeating_text_is_drafted_whole(period: int) -> None:
    tokens = [*range(100, 140), *list(range(period)) * 4]
    for most in (1, 2, 31, 100):
        assert drafted(tokens, most).tokens == tuple(number % period for number in range(most))


def test_no_more_is_drafted_than_asked_for() -> None:
    assert drafted([1, 2, 3, 1, 2], 0) == NO_DRAFT
    assert drafted([1, 2, 3, 1, 2], -1) == NO_DRAFT
    assert drafted([1, 2, 3, 4, 1, 2], 1).tokens == (3,)
    assert [drafted(tokens, 5) for tokens in ([], [1], [1, 2], [1, 2, 3])] == [NO_DRAFT] * 4


def copy(shared: int) -> list[int]:
    """Returns a text, another token, and a copy of the text's first `shared` tokens."""
    return [*range(100, 200), 1, *range(100, 100 + shared)]


@pytest.mark.parametrize(
    ("tokens", "confidence"),
    [
        ([1, 2, 1], SINGLE + 1),
        ([1, 2, 1, 3, 1], SINGLE),
        ([1, 2, 3, 1, 2, 4, 1], SINGLE + 2),
        ([1, 2, 3, 1, 2], SHORT + 1),
        ([1, 2, 3, 1, 2, 4, 1, 2], SHORT),
        ([1, 2, 3, 4, 1, 2, 3, 5, 1, 2], SHORT + 2),
        (copy(3), SHORT + 1),
        (copy(4), MIDDLE + 1),
        (copy(7), MIDDLE + 1),
        ([1, 2, 3, 4, 5, 6, 3, 4, 5, 1, 2, 3, 4], MIDDLE + 2),
        ([1, 2, 3, 4, 5, 6, 3, 4, 6, 1, 2, 3, 4], MIDDLE),
        (copy(8), LONG),
        (copy(15), LONG),
        (copy(16), LONG + 1),
        (copy(40), LONG + 1),
    ],
)
def test_confidence_is_of_length_and_agreement(tokens: list[int], confidence: int) -> None:
    assert drafted(tokens, 4).confidence == confidence


def test_a_copy_goes_on_behind_a_substituted_token() -> None:
    tokens, drafter = copy(10), NgramDrafter()
    assert drafter.draft(tokens, 2) == Draft((110, 111), LONG)
    tokens.append(7)  # instead of 110
    assert drafter.draft(tokens, 2) == Draft((111, 112), SUBSTITUTED)
    tokens.append(8)
    assert drafter.draft(tokens, 2) == NO_DRAFT
    short = copy(7)
    drafter = NgramDrafter()
    assert drafter.draft(short, 2) == Draft((107, 108), MIDDLE + 1)
    assert drafter.draft([*short, 7], 2) == NO_DRAFT


def test_a_copy_goes_on_where_its_last_tokens_have_many_newer_places() -> None:
    source = [50, 51, *(token for number in range(100, 200) for token in (number, 1, 2))]
    tokens, drafter = [*source, 9], NgramDrafter()
    for end in range(2, 100):
        seen = [*tokens, *source[:end]]
        assert drafter.draft(seen, 6).tokens == tuple(source[end : end + 6])


class Counted(list[int]):
    """A list that counts the tokens that are read."""

    reads = 0

    @overload
    def __getitem__(self, index: SupportsIndex) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: SupportsIndex | slice) -> int | list[int]:
        found = super().__getitem__(index)
        self.reads += len(found) if isinstance(found, list) else 1
        return found


def colliding(draw: random.Random) -> list[int]:
    """Draws pairs of tokens that share one hash chain."""
    pairs = ((draw.randrange(1 << 20), draw.randrange(1 << 20)) for _ in count())
    same = (pair for pair in pairs if hash(pair) % 512 == 5)
    return [token for _ in range(250) for token in next(same)]


def rising(draw: random.Random) -> list[int]:
    """Returns tokens whose newer positions match in fewer tokens than older ones."""
    base = [draw.randrange(1 << 20) for _ in range(LONGEST)]
    return [token for length in range(LONGEST - 1, 1, -1) for token in (-length - 2, *base[-length:])] + [-2, *base]


ADVERSARIAL: dict[str, Callable[[random.Random], list[int]]] = {
    "one token": lambda _: [7] * 9000,
    "two in turns": lambda _: [1, 2] * 4500,
    "one pair": lambda _: [token for number in range(3000) for token in (number + 5, 1, 2)],
    "31 alike": lambda _: [token for number in range(300) for token in (number + 100, *range(31))],
    "random": lambda draw: [draw.randrange(50_000) for _ in range(9000)],
    "two at random": lambda draw: [draw.randrange(2) for _ in range(9000)],
    "colliding": colliding,
    "rising": rising,
}


@pytest.mark.parametrize("kind", ADVERSARIAL)
def test_a_draft_reads_a_bounded_number_of_tokens(kind: str) -> None:
    tokens = Counted(ADVERSARIAL[kind](random.Random(SEED)))
    drafter = caught_up(tokens)
    for token in tokens[:50]:
        tokens.append(token)
        tokens.reads = 0
        drafter.draft(tokens, 8)
        assert 0 < tokens.reads <= MOST_READS + 2 * 8


def test_a_long_prompt_is_taken_in_a_part_at_each_call() -> None:
    tokens, drafter = Counted([*range(5 * STEP_TOKENS), 0, 1]), NgramDrafter()
    for _ in range(5):
        tokens.reads = 0
        assert drafter.draft(tokens, 4) == NO_DRAFT
        assert tokens.reads <= 3 * STEP_TOKENS
    assert drafter.draft(tokens, 4).tokens == (2, 3, 4, 5)


def lengths(draw: random.Random) -> Iterator[int]:
    end = 0
    while end < 40_000:
        end += draw.choice([1, 3, 20, 3000])
        yield end


def test_bytes_a_token_are_bounded_at_every_length() -> None:
    draw = random.Random(SEED)
    tokens, drafter = [draw.randrange(50_000) for _ in range(43_000)], NgramDrafter()
    for end in lengths(draw):
        drafter.draft(tokens[:end], 4)
        assert drafter.size_bytes <= BYTES_A_TOKEN * end + 1024, end
    assert drafter.size_bytes > 8 * 40_000


def test_bytes_that_it_tells_are_those_that_it_takes() -> None:
    draw = random.Random(SEED)
    tokens = [draw.randrange(50_000) for _ in range(20_000)]
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        drafter = caught_up(tokens)
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert drafter.size_bytes <= taken <= drafter.size_bytes + 4096
