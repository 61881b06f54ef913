"""Drafts from recent answers to other requests. Only requests with equal keys share answers, because a faster answer
would reveal that another client received the same text."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Hashable, Sequence

from llamaclust.cluster.scheduler.drafting.drafter import NO_DRAFT, SHARED, Draft
from llamaclust.cluster.scheduler.drafting.hash_chains import LONGEST, NO_MATCH, NONE, HashChains, Match
from llamaclust.cluster.scheduler.drafting.ngram import NgramDrafter

_ORDER = 4
"""Minimum match length in tokens. Shorter matches between answers are often accidental."""
_KEY_TOKENS = 128
"""Size of an empty index (about 2 KiB), as a number of stored tokens."""


class _Answers:
    def __init__(self) -> None:
        self.tokens = array("i")
        self._chains = HashChains(_ORDER)

    @property
    def size_bytes(self) -> int:
        return sys.getsizeof(self.tokens) + self._chains.size_bytes

    def add(self, tokens: Sequence[int]) -> None:
        self.tokens.extend(tokens)
        self.tokens.append(NONE)  # NONE separates two answers, so that no match spans both.
        self._chains.take_in(self.tokens)

    def match(self, tail: array[int]) -> Match:
        self._chains.take_in(self.tokens)
        return self._chains.longest(self.tokens, self._chains.newest(tuple(tail[-_ORDER:])), tail)

    def after(self, place: int, most: int) -> tuple[int, ...]:
        drafted = tuple(self.tokens[place + 1 : place + 1 + most])
        return drafted[: drafted.index(NONE)] if NONE in drafted else drafted


class SharedAnswers:
    """A bounded store of answers in two halves. When the newer half is full, it replaces the older half."""

    def __init__(self, most_tokens: int) -> None:
        self._half_tokens = most_tokens // 2
        self._newer: dict[Hashable, _Answers] = {}
        self._older: dict[Hashable, _Answers] = {}
        self._count = 0  # Number of tokens in the newer half. Each key counts as `_KEY_TOKENS`.

    @property
    def size_bytes(self) -> int:
        halves = (self._newer, self._older)
        return sum(sys.getsizeof(half) + sum(answers.size_bytes for answers in half.values()) for half in halves)

    def add(self, tokens: Sequence[int], key: Hashable) -> None:
        kept = tokens[-max(self._half_tokens - _KEY_TOKENS - 1, 0) :]
        added = len(kept) + 1 + _KEY_TOKENS * (key not in self._newer)
        if len(kept) <= _ORDER or added > self._half_tokens:
            return
        if self._count + added > self._half_tokens:
            self._older, self._newer, self._count = self._newer, {}, 0
            added = len(kept) + 1 + _KEY_TOKENS
        self._newer.setdefault(key, _Answers()).add(kept)
        self._count += added

    def draft(self, tokens: Sequence[int], most: int, key: Hashable, least: int) -> Draft:
        tail, found, place = array("i", tokens[-LONGEST:]), NO_MATCH, None
        for half in (self._newer, self._older):
            answers = half.get(key)
            match = NO_MATCH if answers is None else answers.match(tail)
            if match.length > found.length:
                found, place = match, answers
        if place is None or found.length < least:
            return NO_DRAFT
        return Draft(place.after(found.place, most), SHARED + (found.length >= 16))


class SharedDrafter:
    def __init__(self, answers: SharedAnswers, key: Hashable) -> None:
        self._answers, self._key = answers, key
        self._own = NgramDrafter()

    def draft(self, tokens: Sequence[int], most: int) -> Draft:
        if not self._own.take_in(tokens) or most < 1:
            return NO_DRAFT
        match = self._own.match(tokens)
        if match.length < LONGEST:
            shared = self._answers.draft(tokens, most, self._key, max(match.length + 1, _ORDER))
            if shared.tokens:
                return shared
        return self._own.continued(tokens, match, most)


class SharedDrafters:
    def __init__(self, most_tokens: int) -> None:
        self._answers = SharedAnswers(most_tokens)

    def of(self, key: Hashable) -> SharedDrafter:
        return SharedDrafter(self._answers, key)

    def ended(self, key: Hashable, tokens: Sequence[int]) -> None:
        self._answers.add(tokens, key)
