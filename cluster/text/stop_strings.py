"""Finds stop strings in a text that comes piece by piece, and holds back what may be the beginning of one."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """One stream of text. Each character costs a few steps a stop string, however long the strings are."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._patterns = [_Pattern(string) for string in strings]
        self._held = ""
        self.matched: str | None = None  # the stop string that was found; the stream has ended then

    def push(self, text: str) -> str:
        """The text that is certain to stand before any stop string. Ends with the first stop string completed; of
        several completed by one character, the one that begins first."""
        if not self._patterns or self.matched is not None:
            return "" if self.matched is not None else text
        text = self._held + text
        for at in range(len(self._held), len(text)):
            complete = [pattern.text for pattern in self._patterns if pattern.step(text[at])]
            if complete:
                self.matched = max(complete, key=len)
                return text[: at + 1 - len(self.matched)]
        keep = max(pattern.state for pattern in self._patterns)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, once the text has ended without a stop string."""
        rest, self._held = self._held, ""
        return rest if self.matched is None else ""


class _Pattern:
    """Knuth, Morris and Pratt's search for one string."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.state = 0  # characters of the string that the text read so far ends with
        self._fallback = [0] * len(text)  # [i]: longest proper prefix that text[: i + 1] ends with
        length = 0
        for i in range(1, len(text)):
            while length and text[i] != text[length]:
                length = self._fallback[length - 1]
            length += text[i] == text[length]
            self._fallback[i] = length

    def step(self, character: str) -> bool:
        """Whether the string is complete with this character; no more steps after that."""
        state = self.state
        while state and character != self.text[state]:
            state = self._fallback[state - 1]
        self.state = state + (character == self.text[state])
        return self.state == len(self.text)
