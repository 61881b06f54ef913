"""Finds the stop strings of an answer. Stop strings in its thoughts and in markers around them do not end it."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import lru_cache

from llamaclust.cluster.front.text.thought_scanner import Part, ThoughtScanner


class StopPattern:
    """A stop string with its table for Knuth-Morris-Pratt search. A state is the number of characters that match."""

    def __init__(self, text: str) -> None:
        self.text = text
        # Failure table: entry i is the length of the longest proper prefix of text[: i + 1] that is also its suffix.
        self._fallback = array("I", bytes(4 * len(text)))
        length = 0
        for i in range(1, len(text)):
            while length and text[i] != text[length]:
                length = self._fallback[length - 1]
            length += text[i] == text[length]
            self._fallback[i] = length

    def next_state(self, state: int, character: str) -> int:
        """Returns the next state. The stop string is complete if the state equals its length."""
        while state and character != self.text[state]:
            state = self._fallback[state - 1]
        return state + (character == self.text[state])


@lru_cache(maxsize=8)
def stop_patterns(strings: tuple[str, ...]) -> tuple[StopPattern, ...]:
    return tuple(map(StopPattern, strings))


class StopStrings:
    """Finds stop strings in text that arrives in pieces."""

    def __init__(self, patterns: Sequence[StopPattern]) -> None:
        self._patterns = patterns
        self._states = [0] * len(patterns)
        self._held = ""
        self.matched: str | None = None  # The stop string that was found. It ends the text.

    def takes(self, token_text: str) -> bool:
        """Returns True if a token with this text may end the answer."""
        return True

    def push(self, text: str, *, may_stop: bool = True) -> str:
        """Returns text that is certainly not part of a stop string, and holds back the rest."""
        if not may_stop:
            return text
        if not self._patterns or self.matched is not None:
            return "" if self.matched is not None else text
        text = self._held + text
        for at in range(len(self._held), len(text)):
            if complete := self._step(text[at]):
                self.matched = max(complete, key=len)
                return text[: at + 1 - len(self.matched)]
        keep = max(self._states)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _step(self, character: str) -> list[str]:
        pairs = zip(self._patterns, self._states, strict=True)
        self._states = [pattern.next_state(state, character) for pattern, state in pairs]
        pairs = zip(self._patterns, self._states, strict=True)
        return [pattern.text for pattern, state in pairs if state == len(pattern.text)]

    def flush(self) -> str:
        rest, self._held, self._states = self._held, "", [0] * len(self._patterns)
        return rest if self.matched is None else ""


class AnswerStops:
    """Finds stop strings in an answer, but not in its thoughts."""

    def __init__(self, patterns: Sequence[StopPattern], scanner: ThoughtScanner) -> None:
        self._stops = StopStrings(patterns)
        self._scanner = scanner

    @property
    def matched(self) -> str | None:
        return self._stops.matched

    def takes(self, token_text: str) -> bool:
        """Returns True if a token with this text may end the answer."""
        return self._scanner.takes(token_text)

    def push(self, text: str, *, may_stop: bool = True) -> str:
        """Returns text that is certainly not part of a stop string, and holds back the rest."""
        return self._all_pushed(self._scanner.feed(text), may_stop=may_stop)

    def flush(self) -> str:
        return self._all_pushed(self._scanner.flush(), may_stop=True) + self._stops.flush()

    def _all_pushed(self, parts: Sequence[Part], *, may_stop: bool) -> str:
        return "".join(self._pushed(part, may_stop=may_stop and is_answer) for part, is_answer in parts)

    def _pushed(self, text: str, *, may_stop: bool) -> str:
        if may_stop or self.matched is not None:
            return self._stops.push(text)
        return self._stops.flush() + text
