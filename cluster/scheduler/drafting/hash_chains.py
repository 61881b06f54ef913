"""Finds earlier occurrences of a text's last tokens, newest first, with hash chains as in LZ77 compressors."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from typing import NamedTuple

NONE = -1
LONGEST = 32
"""The most tokens of a match. Longer matches count as this long."""
CANDIDATES = 8
"""The most places that one search compares. It bounds the time that a client's repetitive tokens can cost."""
STEP_TOKENS = 1024
"""The most tokens that one call adds to an index. Adding them takes about half a millisecond."""
_FIRST_BUCKETS = 64


class Match(NamedTuple):
    """A match. The tokens at (place - length, place] equal the text's last `length` tokens."""

    place: int
    length: int
    followers: int = 1  # candidates that were looked at
    agree: bool = True  # the same token follows all of them


NO_MATCH = Match(NONE, 0, 0)


class HashChains:
    """Chains of token indices ("places"). The last `order` tokens at all places in a chain have the same hash."""

    def __init__(self, order: int) -> None:
        self._order = order
        self._newest = array("i", [NONE]) * _FIRST_BUCKETS
        self._previous = array("i")  # by place

    def __len__(self) -> int:
        return len(self._previous)

    @property
    def size_bytes(self) -> int:
        return sys.getsizeof(self._newest) + sys.getsizeof(self._previous)

    def take_in(self, text: Sequence[int]) -> bool:
        """Adds at most STEP_TOKENS new tokens of the text. Returns True once the index has the whole text."""
        assert len(text) >= len(self._previous)
        while len(self._newest) < len(text):
            self._newest.extend(self._newest)  # both halves go on with the chains so far
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
        """Returns the longest match of `tail` (at most LONGEST tokens) at `place` or earlier in its chain. Prefers the
        newest of equally long matches. A NONE in the text matches nothing and follows no match."""
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
                continue  # most others are no longer than the best so far
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
