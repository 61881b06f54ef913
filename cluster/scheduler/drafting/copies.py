"""Where a copy goes on behind a difference: tokens that it replaces, leaves out or adds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

MOST_DIFFERENT = 16
"""Tokens that differ; behind more of them, what is copied is not known any more."""
_NEAR = 16
"""Tokens that a copy leaves out, at most."""
_MOST_SINCE = 160
"""Tokens since the copy was last looked at: more than a draft has."""


class Resumption(NamedTuple):
    """Tokens (place - length, place] are the last ones, and lie behind those that were copied."""

    place: int
    length: int


class Copy:
    """The end of a text, as far as it repeats a place of it."""

    def __init__(self) -> None:
        self._end = 0  # tokens of the text up to the copy's end
        self._place = -1  # of the last token that was copied

    def begin(self, tokens: Sequence[int], place: int) -> None:
        """All tokens up to the last one repeat those up to this place."""
        self._end, self._place = len(tokens), place

    def resumption(self, tokens: Sequence[int]) -> Resumption | None:
        """The place near the copied tokens with most of the last ones; of several, the one where as many tokens are
        left out as were added. None while the copy goes on, and where it does not."""
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
    """How many tokens up to the index are the last new ones."""
    length = 1
    while length < len(new) and length <= index and near[index - length] == new[-1 - length]:
        length += 1
    return length
