"""The state of the reasoning in an answer, and the tokens that end the reasoning after its budget. The state depends
only on settings and tokens. Tags are found in the answer's bytes, so a tag may be split into tokens in any way."""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import Enum, auto
from typing import Final

from llamaclust.core.sampler.matchers import Reasoning

_SPACE: Final = b" \t\r\n\v\f"
_SPACES: Final = re.compile(rb"[ \t\r\n\v\f]*")
_CHARACTER_BYTES: Final = 4


class Place(Enum):
    BEFORE = auto()  # Reasoning may begin.
    INSIDE = auto()
    BEHIND = auto()  # Reasoning is over.


class ReasoningScanner:
    def __init__(self, reasoning: Reasoning) -> None:
        self.place = Place.INSIDE if reasoning.is_open else Place.BEFORE
        self.begun = int(reasoning.is_open)  # Number of times that reasoning began.
        self.ends = tuple(text.encode() for text in reasoning.ends)
        self._begins = tuple(text.encode() for text in reasoning.begins)
        self._any_end, self._any_begin = _any_of(self.ends), _any_of(self._begins)
        self._repeats = reasoning.repeats
        # Maximum bytes of an incomplete character or end tag (see `is_in_part`).
        self.longest_part = max(_CHARACTER_BYTES, *map(len, self.ends)) - 1
        self._kept = max(self.longest_part, *map(len, self._begins))
        self._tail = b""  # The answer's last bytes, but only those after its last reasoning tag.

    @property
    def is_in_part(self) -> bool:
        """True if the answer so far ends within a UTF-8 character, or possibly within the reasoning's end tag."""
        tag_parts = (end[:length] for end in self.ends for length in range(1, len(end)))
        return self._is_in_character() or any(map(self._tail.endswith, tag_parts))

    def _is_in_character(self) -> bool:
        for back, byte in enumerate(reversed(self._tail[-3:]), start=1):
            if byte >= 0xC0:
                return back < 2 + (byte >= 0xE0) + (byte >= 0xF0)
            if byte < 0x80:
                return False
        return False

    def feed(self, data: bytes) -> None:
        text, start = self._tail + data, 0
        while (tag_end := self._next_tag_end(text, start)) is not None:
            start = tag_end
            self.place = Place.INSIDE if self.place is Place.BEFORE else Place.BEFORE
            self.begun += self.place is Place.INSIDE
        if self.place is Place.BEFORE and not self._repeats:
            start = _after_spaces(text, start)
            if not any(tag.startswith(text[start : start + len(tag)]) for tag in self._begins):
                self.place = Place.BEHIND
        self._tail = text[max(start, len(text) - self._kept) :]

    def end(self) -> None:
        self.place, self._tail = Place.BEFORE, b""

    def rest_behind_end(self, data: bytes) -> bytes | None:
        """Returns the bytes of `data` after the reasoning's end tag, or None if `data` does not complete an end tag."""
        text = self._tail + data
        end = self._any_end.search(text) if self.place is Place.INSIDE else None
        return None if end is None else text[end.end() :]

    def _next_tag_end(self, text: bytes, start: int) -> int | None:
        if self.place is Place.INSIDE:
            tag = self._any_end.search(text, start)
        elif self.place is Place.BEFORE and self._repeats:
            tag = self._any_begin.search(text, start)
        elif self.place is Place.BEFORE:
            tag = self._any_begin.match(text, _after_spaces(text, start))
        else:
            tag = None
        return None if tag is None else tag.end()


class ReasoningState:
    """The reasoning of one answer. `words` has the bytes of each token. The reasoning may exceed its budget by a few
    tokens, to complete a character or its end tag."""

    def __init__(self, reasoning: Reasoning, words: Sequence[bytes]) -> None:
        self._tags = ReasoningScanner(reasoning)
        self._words = words
        self._forced = reasoning.forced
        self._budget = reasoning.budget
        self._left = reasoning.budget or 0
        self._at: int | None = None  # Index of the next forced token. None if none is forced.
        self._check_budget()

    @property
    def is_inside(self) -> bool:
        return self._tags.place is Place.INSIDE

    @property
    def forced(self) -> int | None:
        return None if self._at is None else self._forced[self._at]

    @property
    def forced_end(self) -> list[int]:
        return [] if self._at is None else [*self._forced[self._at :]]

    def take(self, token: int) -> None:
        if self._at is not None:
            self._at = self._at + 1 if self._at + 1 < len(self._forced) else None
            if self._at is None:
                self._tags.end()
            return
        was_inside, begun = self.is_inside, self._tags.begun
        self._tags.feed(self._bytes(token))
        if self._tags.begun > begun:
            self._left = self._budget or 0
        elif was_inside:
            self._left -= 1
        self._check_budget()

    def release(self) -> None:
        self._at, self._budget = None, None

    def runs_over(self, token: int) -> bool:
        return bool((self._tags.rest_behind_end(self._bytes(token)) or b"").strip(_SPACE))

    def _bytes(self, token: int) -> bytes:
        return self._words[token].removeprefix(b"\xff")

    def _check_budget(self) -> None:
        if self._budget is None or not self._forced or not self.is_inside or self._left > 0:
            return
        if not self._tags.is_in_part or self._left <= -self._tags.longest_part:
            self._at = 0


def may_run_over(words: Sequence[bytes], tag: bytes) -> tuple[int, ...]:
    """Returns the tokens that can complete a tag and contain more text after it."""
    tag_ends = tuple(tag[-length:] for length in range(1, len(tag) + 1))

    def runs_over(word: bytes) -> bool:
        behind = [word[len(part) :] for part in tag_ends if word.startswith(part)]
        return any(text.strip(_SPACE) for text in (*behind, word.partition(tag)[2]))

    candidates = ((token, word) for token, word in enumerate(words) if tag[-1:] in word)
    return tuple(token for token, word in candidates if runs_over(word.removeprefix(b"\xff")))


def _any_of(tags: Sequence[bytes]) -> re.Pattern[bytes]:
    return re.compile(b"|".join(map(re.escape, sorted(tags, key=len, reverse=True))))


def _after_spaces(text: bytes, start: int) -> int:
    spaces = _SPACES.match(text, start)
    return start if spaces is None else spaces.end()
