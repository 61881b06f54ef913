"""Drafts tokens without a model: the tokens that followed earlier occurrences of the last tokens."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import cycle, islice

from llamaclust.cluster.scheduler.drafting.copies import Copy
from llamaclust.cluster.scheduler.drafting.drafter import (
    LONG,
    MIDDLE,
    NO_DRAFT,
    RESUMED,
    SHORT,
    SINGLE,
    SUBSTITUTED,
    Draft,
)
from llamaclust.cluster.scheduler.drafting.hash_chains import LONGEST, NO_MATCH, HashChains, Match, extended

_ORDER = 2
_COPIED = 8
"""Minimum number of matching tokens that count as a copy."""
_UNSURE = 3


class NgramDrafter:
    def __init__(self) -> None:
        self._chains = HashChains(_ORDER)
        self._singles = HashChains(1)
        self._distance = 0  # Number of tokens from the last match to the end of the text. 0: there was no match yet.
        self._copy = Copy()

    @property
    def size_bytes(self) -> int:
        return self._chains.size_bytes + self._singles.size_bytes

    def take_in(self, tokens: Sequence[int]) -> bool:
        self._singles.take_in(tokens)
        return self._chains.take_in(tokens)

    def draft(self, tokens: Sequence[int], most: int) -> Draft:
        """Returns a draft, which is empty until all `tokens` are indexed. Indexing a long text takes several calls."""
        if not self.take_in(tokens) or most < 1:
            return NO_DRAFT
        return self.continued(tokens, self.match(tokens), most)

    def match(self, tokens: Sequence[int]) -> Match:
        if len(tokens) <= _ORDER:
            return NO_MATCH
        tail = tokens[-LONGEST:]
        found = self._chains.longest(tokens, self._chains.before_last, tail)
        if self._distance and found.length < LONGEST:
            # The text may still copy the previous passage, even if its last two tokens match many newer places.
            aligned = len(tokens) - 1 - self._distance
            length = extended(tokens, aligned, tail, max(found.length, _ORDER - 1))
            if length >= max(found.length + 1, _ORDER):
                found = Match(aligned, length)
        return found

    def continued(self, tokens: Sequence[int], match: Match, most: int) -> Draft:
        """Drafts tokens after the match, or after the place where a copy resumes. Repeats them up to `most` tokens."""
        if match.length <= _UNSURE:
            resumed = self._copy.resumption(tokens)
            if resumed is not None and resumed.length >= match.length:
                return self._behind(tokens, resumed.place, most, RESUMED + (resumed.length > 1))
        if match.length:
            if match.length >= _COPIED:
                self._copy.begin(tokens, match.place)
            return self._behind(tokens, match.place, most, _confidence(match))
        return self._guessed(tokens, most)

    def _behind(self, tokens: Sequence[int], place: int, most: int, confidence: int) -> Draft:
        self._distance = len(tokens) - 1 - place
        return Draft(_cycled(tokens, place + 1, most), confidence)

    def _guessed(self, tokens: Sequence[int], most: int) -> Draft:
        place, before = len(tokens) - 1 - self._distance, tokens[-_COPIED - 1 : -1]
        if self._distance and place >= _COPIED and tokens[place - _COPIED : place] == before:
            return Draft(_cycled(tokens, place + 1, most), SUBSTITUTED)
        single = self._singles.longest(tokens, self._singles.before_last, tokens[-1:]) if tokens else NO_MATCH
        if single.length:
            return Draft(_cycled(tokens, single.place + 1, most), SINGLE + _votes(single))
        return NO_DRAFT


def _cycled(tokens: Sequence[int], start: int, most: int) -> tuple[int, ...]:
    drafted = tuple(tokens[start : start + most])
    return drafted if len(drafted) == most else tuple(islice(cycle(drafted), most))


def _confidence(match: Match) -> int:
    if match.length >= 8:
        return LONG + (match.length >= 16)
    return (MIDDLE if match.length >= 4 else SHORT) + _votes(match)


def _votes(match: Match) -> int:
    return 1 if match.followers == 1 else 2 if match.agree else 0


class NgramDrafters:
    def of(self, key: Hashable) -> NgramDrafter:
        return NgramDrafter()

    def ended(self, key: Hashable, tokens: Sequence[int]) -> None:
        """Does nothing, because sequences share no answers."""
