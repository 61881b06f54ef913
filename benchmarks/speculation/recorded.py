"""A drafter that knows the answer: it replays a recorded one, and is wrong as often as it is told to be."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence

from llamaclust.cluster.scheduler.drafting.drafter import NO_DRAFT, Draft, Drafter
from llamaclust.cluster.scheduler.drafting.ngram import NgramDrafter

_CONFIDENCE = 0
"""A class that n-gram drafters do not use."""


def chosen_right(count: int, acceptance: float, draw: random.Random) -> list[bool]:
    """Which tokens are drafted right: this share of them, rounded, wherever they are."""
    wrong = set(draw.sample(range(count), round((1 - acceptance) * count)))
    return [place not in wrong for place in range(count)]


class RecordedDrafters:
    """Sequences whose prompt has a recorded answer draft from that, others from their own n-grams."""

    def __init__(self) -> None:
        self._drafts: dict[tuple[int, ...], tuple[int, ...]] = {}

    def record(self, prompt: tuple[int, ...], answer: Sequence[int], is_right: Sequence[bool], vocabulary: int) -> None:
        """From now on. A token that is drafted wrong is the one after it in the vocabulary."""
        pairs = zip(answer, is_right, strict=True)
        self._drafts[prompt] = tuple(token if right else (token + 1) % vocabulary for token, right in pairs)

    def of(self, key: Hashable) -> Drafter:
        return _RecordedDrafter(self._drafts)

    def ended(self, key: Hashable, tokens: Sequence[int]) -> None:
        """Nothing more is recorded."""


class NoDrafters:
    """Nothing is drafted without a model."""

    def of(self, key: Hashable) -> Drafter:
        return self

    def draft(self, tokens: Sequence[int], most: int) -> Draft:
        return NO_DRAFT

    def ended(self, key: Hashable, tokens: Sequence[int]) -> None:
        """Nothing is kept."""


class _RecordedDrafter:
    """Of one sequence."""

    def __init__(self, drafts: dict[tuple[int, ...], tuple[int, ...]]) -> None:
        self._drafts = drafts
        self._prompt_length = 0
        self._answer: tuple[int, ...] = ()
        self._other: NgramDrafter | None = None

    def draft(self, tokens: Sequence[int], most: int) -> Draft:
        if not self._prompt_length and self._other is None:
            self._find(tokens)
        if self._other is not None:
            return self._other.draft(tokens, most)
        start = len(tokens) - self._prompt_length
        drafted = self._answer[start : start + most]
        return Draft(drafted, _CONFIDENCE) if drafted else NO_DRAFT

    def _find(self, tokens: Sequence[int]) -> None:
        for prompt, answer in self._drafts.items():
            if tuple(tokens[: len(prompt)]) == prompt:
                self._prompt_length, self._answer = len(prompt), answer
                return
        self._other = NgramDrafter()
