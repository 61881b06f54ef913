"""Finds which of many words a text contains, in a time that hardly depends on the number of words."""

from __future__ import annotations

import re
from collections.abc import Iterable


class WordFinder:
    """An index of words by their first character and length. Thread-safe."""

    def __init__(self, words: Iterable[str]) -> None:
        self._words = frozenset(words)
        by_first: dict[str, set[int]] = {}
        for word in self._words:
            by_first.setdefault(word[0], set()).add(len(word))
        self._lengths = {first: sorted(lengths) for first, lengths in by_first.items()}
        firsts = "".join(map(re.escape, self._lengths))
        self._first = re.compile(f"[{firsts}]") if firsts else None

    def found_in(self, text: str) -> set[str]:
        found: set[str] = set()
        for match in self._first.finditer(text) if self._first is not None else ():
            start = match.start()
            pieces = (text[start : start + length] for length in self._lengths[match[0]])
            found.update(piece for piece in pieces if piece in self._words)
        return found
