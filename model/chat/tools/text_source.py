"""Text that arrives in pieces, and generators that parse it and wait for more. Results do not depend on the pieces."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from typing import Final, TypeVar

Result = TypeVar("Result")
Reading = Generator[None, None, Result]

_SPACE: Final = re.compile(r"\s+")


class Markers:
    """Texts to search for. A search finds the leftmost match and, among matches at the same position, the longest."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = tuple(sorted({text for text in texts if text}, key=len, reverse=True))
        self._pattern = re.compile("|".join(map(re.escape, self._texts)) or r"(?!)")
        self._longest = len(self._texts[0]) if self._texts else 0

    def find(self, text: str, start: int) -> tuple[int, int]:
        found = self._pattern.search(text, start)
        return (found.start(), found.end()) if found else (len(text), len(text))

    def cut_at(self, text: str, start: int) -> int:
        """Returns the position in `text` where an incomplete marker may begin, or else the length of `text`."""
        for place in range(max(start, len(text) - self._longest + 1), len(text)):
            rest = text[place:]
            if any(len(marker) > len(rest) and marker.startswith(rest) for marker in self._texts):
                return place
        return len(text)


class TextSource:
    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._is_ended = False
        self._recorded: list[str] | None = None

    def feed(self, text: str) -> None:
        self._text = self._text[self._at :] + text
        self._at = 0

    def end(self) -> None:
        self._is_ended = True

    def drop_beginning(self, markers: Sequence[str]) -> None:
        rest = self._text[self._at :].strip()
        if rest and any(marker.startswith(rest) for marker in markers):
            self._at = len(self._text)

    def record(self) -> None:
        self._recorded = []

    def recorded(self) -> str:
        text = "".join(self._recorded or ())
        self._recorded = None
        return text

    def give_back(self, text: str) -> None:
        self._text, self._at = text + self._text[self._at :], 0

    def take(self, count: int) -> str:
        text = self._text[self._at : self._at + count]
        self._at += len(text)
        if self._recorded is not None:
            self._recorded.append(text)
        return text

    def ahead(self, count: int = 1) -> Reading[str]:
        while len(self._text) - self._at < count and not self._is_ended:
            yield
        return self._text[self._at : self._at + count]

    def skip_space(self) -> Reading[None]:
        while (yield from self.ahead()).isspace():
            found = _SPACE.match(self._text, self._at)
            assert found is not None
            self.take(found.end() - self._at)

    def take_match(self, pattern: re.Pattern[str]) -> str:
        found = pattern.match(self._text, self._at)
        return self.take(found.end() - self._at) if found else ""

    def take_literal(self, literals: Sequence[str]) -> Reading[str]:
        candidates = sorted(literals, key=len, reverse=True)
        while True:
            text = self._text[self._at : self._at + len(candidates[0])] if candidates else ""
            for literal in candidates:
                if text.startswith(literal):
                    return self.take(len(literal))
                if literal.startswith(text) and not self._is_ended:
                    break  # More text may complete this literal.
            else:
                return ""
            yield

    def until(self, markers: Markers, sink: Callable[[str], None]) -> Reading[str]:
        """Passes the text before the next marker to `sink`. Consumes and returns the marker. Returns "" at the end."""
        while True:
            begin, end = markers.find(self._text, self._at)
            cut = len(self._text) if self._is_ended else markers.cut_at(self._text, self._at)
            if begin < cut:
                sink(self.take(begin - self._at))
                return self.take(end - begin)
            sink(self.take(min(begin, cut) - self._at))
            if self._is_ended:
                return ""
            yield

    def word(self, markers: Markers, most: int) -> Reading[str | None]:
        """Takes the text before the next marker or the end. Returns None if it has more than `most` characters."""
        while True:
            begin, end = markers.find(self._text, self._at)
            cut = len(self._text) if self._is_ended else markers.cut_at(self._text, self._at)
            if min(begin, cut) - self._at > most:
                return None
            if begin < cut:
                return self.take(begin - self._at)
            if self._is_ended:
                return self.take(begin - self._at) if begin == end else None
            yield
