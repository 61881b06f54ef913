"""Finds where a text continues to copy an earlier passage, after some tokens were replaced, omitted or added."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

MOST_DIFFERENT = 16
"""Maximum number of differing tokens after which a text can resume copying."""
_NEAR = 16
_MOST_SINCE = 160


class Resumption(NamedTuple):
    place: int
    length: int


class Copy:
    def __init__(self) -> None:
        self._end = 0  # Number of tokens in the text up to the end of the copy.
        self._place = -1  # Index of the last copied token in the earlier passage, or -1 if nothing was copied yet.

    def begin(self, tokens: Sequence[int], place: int) -> None:
        self._end, self._place = len(tokens), place

    def resumption(self, tokens: Sequence[int]) -> Resumption | None:
        """Returns where in the copied passage the text resumes after a few tokens that differ, or None."""
        if self._place < 0 or len(tokens) - self._end > _MOST_SINCE:
            return None
        while self._end < len(tokens) and tokens[self._end] == tokens[self._place + 1]:
            self._end += 1
            self._place += 1
        different = len(tokens) - self._end
        return self._near(tokens, different) if 0 < different <= MOST_DIFFERENT else None

    def _near(self, tokens: Sequence[int], different: int) -> Resumption | None:
        first = self._place + 1
        near = tokens[first : min(first + _NEAR + different, len(tokens) - 1)]
        new = tokens[self._end :]
        places = [index for index, token in enumerate(near) if token == new[-1]]
        if not places:
            return None
        lengths = [_same(near, index, new) for index in places]
        length, _, index = max(
            (length, -abs(index + 1 - different), index) for length, index in zip(lengths, places, strict=True)
        )
        return Resumption(first + index, length)


def _same(near: Sequence[int], index: int, new: Sequence[int]) -> int:
    length = 1
    while length < len(new) and length <= index and near[index - length] == new[-1 - length]:
        length += 1
    return length
