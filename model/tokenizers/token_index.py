from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class TokenIndex:
    """Finds tokens by parts of their bytes. 256 Ki tokens are indexed in a second and searched in milliseconds."""

    def __init__(self, words: Sequence[bytes]) -> None:
        self._bytes: NDArray[np.uint8] = np.frombuffer(b"".join(words), np.uint8)
        self._ends = np.cumsum([len(word) for word in words])  # End of each word in `_bytes` [tokens].
        by_ending = sorted((word[::-1], token) for token, word in enumerate(words))
        self._reversed = [word for word, _ in by_ending]
        self._tokens = [token for _, token in by_ending]

    def containing(self, text: bytes) -> list[int]:
        starts = np.flatnonzero(self._bytes[: max(0, len(self._bytes) - len(text) + 1)] == text[0])
        for place in range(1, len(text)):
            starts = starts[self._bytes[starts + place] == text[place]]
        tokens = np.searchsorted(self._ends, starts, side="right")
        found: list[int] = np.unique(tokens[starts + len(text) <= self._ends[tokens]]).tolist()
        return found

    def ending_with(self, text: bytes) -> list[int]:
        wanted = text[::-1]
        start = bisect_left(self._reversed, wanted)
        end = bisect_right(self._reversed, wanted, lo=start, key=lambda word: word[: len(wanted)])
        return self._tokens[start:end]
