"""Drafters of known answers, and drafters of random tokens."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Sequence
from math import inf

import pytest

from llamaclust.cluster.scheduler.drafting.drafter import CLASSES, Draft, Drafter
from llamaclust.cluster.scheduler.drafting.ngram import NgramDrafters
from llamaclust.cluster.scheduler.speculation import speculation
from llamaclust.cluster.scheduler.speculation.candidates import Candidate, Chain
from llamaclust.cluster.scheduler.speculation.windows import RoundTimes

Says = Callable[[Sequence[int], int], tuple[int, ...]]
"""A function that returns a draft of about the given length for the given tokens."""


class SaidDrafters:
    """Drafters that use one function for all sequences."""

    def __init__(self, says: Says) -> None:
        self._says = says

    def of(self, key: Hashable) -> Drafter:
        return _Said(self._says)

    def ended(self, key: Hashable, tokens: Sequence[int]) -> None:
        pass


class _Said:
    def __init__(self, says: Says) -> None:
        self._says = says

    def draft(self, tokens: Sequence[int], most: int) -> Draft:
        return Draft(self._says(tokens, most), len(tokens) % CLASSES)


def replayed(answers: Sequence[Sequence[int]], right: float, source: random.Random, vocabulary: int) -> Says:
    """Returns a function that drafts from known texts, each token right with probability `right`; 1 draft in 8 is
    nonsense."""

    def says(tokens: Sequence[int], most: int) -> tuple[int, ...]:
        if source.random() < 0.125:
            return nonsense(source, vocabulary)(tokens, most)
        known = next((each for each in answers if list(each[: len(tokens)]) == list(tokens)), ())
        following = known[len(tokens) : len(tokens) + most]
        return tuple(token if source.random() < right else (token + 1) % vocabulary for token in following)

    return says


def nonsense(source: random.Random, vocabulary: int) -> Says:
    """Returns a function that drafts no, few or too many random tokens, also outside the vocabulary."""

    def says(tokens: Sequence[int], most: int) -> tuple[int, ...]:
        lowest, highest = source.choice([(0, vocabulary - 1), (-3, vocabulary + 3)])
        return tuple(source.randint(lowest, highest) for _ in range(source.choice([0, 1, most, 3 * most])))

    return says


class AnyWindows:
    """Replaces `best_windows` by windows of random size, even if they do not pay."""

    def __init__(self, source: random.Random, most: int) -> None:
        self._source = source
        self._most = most
        self.rows = 0  # drafted rows so far

    def __call__(self, candidates: Sequence[Candidate], times: RoundTimes, groups: int, most_rows: int) -> list[int]:
        chosen: list[int] = []
        for each in candidates:
            left = min(len(each.tokens), self._most, most_rows - sum(chosen))
            chosen.append(self._source.randint(0, left) if self._source.random() < 0.8 else left)
        self.rows += sum(chosen)
        return chosen


class AnyChains:
    """Replaces `best_chain` by a random number of windows in flight, of random size."""

    def __init__(self, source: random.Random, most: int) -> None:
        self._source = source
        self._most = most

    def __call__(self, rate: float, length: int, times: RoundTimes, most: int) -> Chain | None:
        most = min(most, self._most, length)
        if most < 1 or self._source.random() < 0.2:
            return None
        return Chain(self._source.randint(1, most), self._source.randint(2, 6), rate, inf)


def draft(
    texts: Sequence[Sequence[int]], source: random.Random, vocabulary: int, monkeypatch: pytest.MonkeyPatch
) -> AnyWindows:
    """Makes engines of this process compute windows of random size. Nine of ten drafted tokens are those of `texts`,
    prompts with their answers."""
    drafters, windows = SaidDrafters(replayed(texts, 0.9, source, vocabulary)), AnyWindows(source, 32)
    monkeypatch.setattr(NgramDrafters, "of", lambda self, key: drafters.of(key))
    monkeypatch.setattr(speculation, "best_windows", windows)
    monkeypatch.setattr(speculation, "best_chain", AnyChains(source, 8))
    return windows
