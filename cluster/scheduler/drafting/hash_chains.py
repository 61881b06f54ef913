"""Finds earlier occurrences of the last tokens of a text, newest first. Uses hash chains, as LZ77 compressors do."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from typing import NamedTuple

NONE = -1
LONGEST = 32
"""Maximum length of a match in tokens. Longer matches are treated as this long."""
CANDIDATES = 8
"""Maximum number of earlier occurrences that a search compares, so that repetitive text cannot make it slow."""
STEP_TOKENS = 1024
"""Maximum number of tokens that one call adds to an index, which takes about half a millisecond."""
_FIRST_BUCKETS = 64


class Match(NamedTuple):
    """An earlier occurrence of the last `length` tokens of the text. The occurrence ends with the token at `place`."""

    place: int
    length: int
    followers: int = 1  # Number of earlier occurrences that were compared.
    agree: bool = True  # True if the same token follows all compared occurrences.


NO_MATCH = Match(NONE, 0, 0)


class HashChains:
    """An index of n-grams with `order` tokens. A chain links n-grams with the same hash. Each n-gram is represented by
    its place, which is the index of its last token."""

    def __init__(self, order: int) -> None:
        self._order = order
        self._newest = array("i", [NONE]) * _FIRST_BUCKETS
        self._previous = array("i")  # For each place, the previous place with the same hash.

    def __len__(self) -> int:
        return len(self._previous)

    @property
    def size_bytes(self) -> int:
        return sys.getsizeof(self._newest) + sys.getsizeof(self._previous)

    def take_in(self, text: Sequence[int]) -> bool:
        """Adds up to STEP_TOKENS new tokens of `text` to the index. Returns True if no token is then missing."""
        assert len(text) >= len(self._previous)
        while len(self._newest) < len(text):
            self._newest.extend(self._newest)  # Both halves of the doubled table start with the existing chains.
        previous, newest, order, mask = self._previous, self._newest, self._order, len(self._newest) - 1
        end = min(len(text), len(previous) + STEP_TOKENS)
        while len(previous) < min(order - 1, end):
            previous.append(NONE)
        for place in range(len(previous), end):
            bucket = hash(tuple(text[place - order + 1 : place + 1])) & mask
            previous.append(newest[bucket])
            newest[bucket] = place
        return end == len(text)

    @property
    def before_last(self) -> int:
        return self._previous[-1]

    def newest(self, window: tuple[int, ...]) -> int:
        return self._newest[hash(window) & len(self._newest) - 1]

    def longest(self, text: Sequence[int], place: int, tail: Sequence[int]) -> Match:
        """Returns the longest match for the end of `tail` (at most LONGEST tokens). Searches back from `place`."""
        previous, order, window = self._previous, self._order, tail[-self._order :]
        found, length, followers, follower, agree = NONE, order - 1, 0, NONE, True
        for _ in range(CANDIDATES):
            if place < order - 1 or length == LONGEST:
                break
            here, place = place, previous[place]
            if text[here - order + 1 : here + 1] != window or (next_ := text[here + 1]) == NONE:
                continue
            agree = agree and (not followers or next_ == follower)
            followers, follower = followers + 1, next_
            if length > here or length == len(tail) or text[here - length] != tail[-1 - length]:
                continue  # The match here cannot be longer than the longest match so far.
            longer = extended(text, here, tail, length)
            if longer > length:
                found, length = here, longer
        return Match(found, length, followers, agree) if found != NONE else NO_MATCH


def extended(text: Sequence[int], place: int, tail: Sequence[int], length: int) -> int:
    end = len(tail)
    most = min(end, place + 1)
    if length >= most or text[place - length : place + 1] != tail[end - length - 1 :]:
        return length
    length += 1
    while length < most and text[place - length] == tail[end - length - 1]:
        length += 1
    return length
