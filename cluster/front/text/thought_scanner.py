"""Divides an answer's text, as it arrives, into its thoughts with their markers and the rest."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from enum import Enum, auto
from itertools import groupby
from operator import itemgetter

from llamaclust.cluster.front.text.request import AnswerParsing
from llamaclust.model.chat.tools.call_sink import MAX_NAME_CHARACTERS
from llamaclust.model.chat.tools.tool_format import ChannelCalls, ReasoningTags

Part = tuple[str, bool]
"""A text, and True if it belongs to the answer without the thoughts."""


class Place(Enum):
    BEFORE = auto()  # There is nothing but white space yet, at the beginning or behind thoughts. Thoughts may begin.
    THOUGHTS = auto()
    ANSWER = auto()
    HEADER = auto()  # Text that says what follows.


class ThoughtScanner(ABC):
    """Reads characters. Text that may be the beginning of a marker is held back until this is decided."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self._held = ""

    def takes(self, token_text: str) -> bool:
        """Returns True if a token with this text would belong to the answer."""
        return self.place is Place.ANSWER

    def feed(self, text: str) -> list[Part]:
        parts: list[Part] = []
        for character in text:
            self._held += character
            parts += self._step()
        return [("".join(part for part, _ in same), is_answer) for is_answer, same in groupby(parts, itemgetter(1))]

    def flush(self) -> Part:
        text, self._held = self._held, ""
        return text, self.place is Place.ANSWER

    @abstractmethod
    def _step(self) -> list[Part]:
        """Returns text that is decided, and removes it from the text held back."""

    def _release(self, *, is_answer: bool, keep: int = 0) -> list[Part]:
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return [(text, is_answer)]

    def _begun_length(self, markers: Sequence[str]) -> int:
        """Returns the length of the longest end of the text held back that may be the beginning of a marker."""
        lengths = range(len(self._held), 0, -1)
        return next((each for each in lengths if any(mark.startswith(self._held[-each:]) for mark in markers)), 0)


class TaggedThoughts(ThoughtScanner):
    """Thoughts between tags."""

    def __init__(self, tags: ReasoningTags, ends: Sequence[str], begun: str) -> None:
        super().__init__(Place.BEFORE)
        self._begin, self._ends, self._repeats = tags.begin, ends, tags.repeats
        self.feed(begun)

    def takes(self, token_text: str) -> bool:
        text = self._held + token_text.lstrip()
        return super().takes(token_text) or (
            self.place is Place.BEFORE
            and not token_text.isspace()
            and not self._begin.startswith(text[: len(self._begin)])
        )

    def _step(self) -> list[Part]:
        if self.place is Place.THOUGHTS:
            return self._thoughts()
        if self.place is Place.BEFORE and self._held.isspace():
            return self._release(is_answer=False)
        if self._held.endswith(self._begin) and (self._repeats or self.place is Place.BEFORE):
            before = self._release(is_answer=True, keep=len(self._begin))
            self.place = Place.THOUGHTS
            return before + self._release(is_answer=False)
        if self.place is Place.BEFORE and self._begin.startswith(self._held):
            return []
        self.place = Place.ANSWER
        return self._release(is_answer=True, keep=self._kept)

    @property
    def _kept(self) -> int:
        return self._begun_length((self._begin,)) if self._repeats else 0

    def _thoughts(self) -> list[Part]:
        if any(map(self._held.endswith, self._ends)):
            self.place = Place.BEFORE
            return self._release(is_answer=False)
        return self._release(is_answer=False, keep=self._begun_length(self._ends))


class ChannelThoughts(ThoughtScanner):
    """Thoughts in messages of their own. Headers and ends of messages are no text of the answer."""

    def __init__(self, calls: ChannelCalls, begun: str) -> None:
        super().__init__(Place.HEADER)
        self._calls = calls
        self._ends = (*calls.message_ends, calls.message_begin)
        self.feed(begun)

    def _step(self) -> list[Part]:
        if self.place is not Place.HEADER:
            return self._body()
        if self._held.endswith(self._calls.header_end):
            is_thought = re.search(self._calls.reasoning, self._held) is not None
            self.place = Place.THOUGHTS if is_thought else Place.ANSWER
            return self._release(is_answer=False)
        if any(map(self._held.endswith, self._ends)):
            return self._release(is_answer=False)
        if len(self._held) <= MAX_NAME_CHARACTERS:
            return []
        self.place = Place.ANSWER  # Text without a header.
        return self._release(is_answer=True)

    def _body(self) -> list[Part]:
        is_answer = self.place is Place.ANSWER
        end = next(filter(self._held.endswith, self._ends), None)
        if end is None:
            return self._release(is_answer=is_answer, keep=self._begun_length(self._ends))
        before = self._release(is_answer=is_answer, keep=len(end))
        self.place = Place.HEADER
        return before + self._release(is_answer=False)


def thought_scanner(reading: AnswerParsing) -> ThoughtScanner:
    """Returns the scanner of a form that knows reasoning."""
    form, calls = reading.form, reading.form.calls
    if form.reasoning is None:
        assert isinstance(calls, ChannelCalls), "a form without tags and channels knows no reasoning"
        return ChannelThoughts(calls, reading.begun)
    begins = () if calls is None or isinstance(calls, ChannelCalls) or not reading.tools else calls.frame.triggers
    ends = (*form.reasoning.ends, *begins) if form.calls_end_reasoning else form.reasoning.ends
    return TaggedThoughts(form.reasoning, ends, reading.begun)
