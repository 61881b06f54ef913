"""Sizes of a JSON text's members, counted before anything is made of it: values cost memory and time, bytes do not."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
from pydantic_core import from_json

MAX_FIELD_VALUES: Final = 1 << 15
"""JSON values of a field that holds no prompt: a grammar, a list of texts or ids."""

_BLOCK_BYTES: Final = 1 << 18
"""Counted in one go, mostly with the interpreter free for other threads."""
_MOST_MEMBERS: Final = 1024
_MOST_NAME_BYTES: Final = 1024
_NAME: Final = re.compile(rb'\s*("(?:[^"\\]|\\.)*")\s*:', re.DOTALL)


@dataclass(frozen=True, slots=True)
class Member:
    """A member of the outermost object, whose commas and brackets are its number of values or a few more."""

    name: str
    size_bytes: int
    values: int


@dataclass(frozen=True, slots=True)
class Outline:
    """`members` has the first thousand or so."""

    members: tuple[Member, ...]
    member_count: int
    values: int  # of the whole text


def outline(text: bytes) -> Outline:
    """The outline of a JSON text; of other texts, some outline."""
    counter = _Counter()
    for start in range(0, len(text), _BLOCK_BYTES):
        counter.add(np.frombuffer(text, np.uint8, min(_BLOCK_BYTES, len(text) - start), start))
    borders = counter.borders[: _MOST_MEMBERS + 1]
    members = tuple(
        Member(_name(text[start + 1 : start + 1 + _MOST_NAME_BYTES]), end - start - 1, values - before)
        for (start, before), (end, values) in pairwise(borders)
    )
    return Outline(members, max(0, counter.border_count - 1), counter.values + 1)


def _name(text: bytes) -> str:
    """The name at the beginning of a member; "" where it is none, or too long to be a field's."""
    match = _NAME.match(text)
    try:
        return "" if match is None else str(from_json(match[1]))
    except ValueError:
        return ""


class _Counter:
    """Goes through a text block by block. Strings are told by their quotes, escaped ones by the backslashes before."""

    def __init__(self) -> None:
        self.values = 0
        self.border_count = 0  # of the outermost object: its brackets, and the commas between members
        self.borders: list[tuple[int, int]] = []  # the first ones, and the values before each
        self._start = 0
        self._depth = 0
        self._is_inside = False  # a string
        self._backslashes = 0  # at the end of the block before

    def add(self, block: np.ndarray) -> None:  # uint8 [bytes]
        outside = self._outside_strings(block)
        opens = ((block == ord("[")) | (block == ord("{"))) & outside
        closes = ((block == ord("]")) | (block == ord("}"))) & outside
        places = np.flatnonzero(opens | closes | ((block == ord(",")) & outside))
        change = opens[places].astype(np.int32) - closes[places]
        depth = self._depth + np.cumsum(change)  # behind each place
        counted = self.values + np.cumsum(change >= 0)
        is_border = ((depth == 1) & ((change == 0) | ((change == 1) & (self.border_count == 0)))) | (
            (depth == 0) & (change == -1)
        )
        borders = np.flatnonzero(is_border)
        self.border_count += len(borders)
        for border in borders[: max(0, _MOST_MEMBERS + 1 - len(self.borders))]:
            self.borders.append((self._start + int(places[border]), int(counted[border])))
        if len(places):
            self._depth, self.values = int(depth[-1]), int(counted[-1])
        self._start += len(block)

    def _outside_strings(self, block: np.ndarray) -> np.ndarray:  # uint8 [bytes] -> bool [bytes]
        quotes = np.flatnonzero(block == ord('"'))
        unescaped = quotes[self._backslashes_before(block, quotes) % 2 == 0]
        flips = np.zeros(len(block), np.uint8)
        flips[unescaped] = 1
        inside: np.ndarray = np.bitwise_xor.accumulate(flips) ^ self._is_inside
        self._is_inside = bool(inside[-1])
        outside: np.ndarray = np.equal(inside, 0)
        return outside

    def _backslashes_before(self, block: np.ndarray, places: np.ndarray) -> np.ndarray:  # -> int [places]
        others = np.flatnonzero(block != ord("\\"))
        last = np.searchsorted(others, places) - 1  # the last other byte before each place, if there is one
        run = np.where(last >= 0, places - 1 - others[last], places + self._backslashes) if len(others) else places
        end = len(block) - 1 - int(others[-1]) if len(others) else len(block) + self._backslashes
        self._backslashes = end
        return run
