"""Finds which of many words a text contains."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

_FEW: Final = 64
"""Maximum number of words with the same first character that are searched for one by one."""


class WordFinder:
    """An index of words by their first character and length. Thread-safe."""

    def __init__(self, words: Iterable[str]) -> None:
        by_first: dict[str, set[str]] = {}
        for word in words:
            by_first.setdefault(word[0], set()).add(word)
        self._few = [word for group in by_first.values() if len(group) <= _FEW for word in group]
        many = {first: group for first, group in by_first.items() if len(group) > _FEW}
        self._words = frozenset(word for group in many.values() for word in group)
        self._lengths = {first: sorted(set(map(len, group))) for first, group in many.items()}
        firsts = "".join(map(re.escape, self._lengths))
        self._first = re.compile(f"[{firsts}]") if firsts else None

    def found_in(self, text: str) -> set[str]:
        found = {word for word in self._few if word in text}
        for match in self._first.finditer(text) if self._first is not None else ():
            start = match.start()
            pieces = (text[start : start + length] for length in self._lengths[match[0]])
            found.update(piece for piece in pieces if piece in self._words)
        return found
