"""Divides an answer's text, as it arrives, into its thoughts with their markers and the rest."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from enum import Enum, auto
from itertools import groupby
from operator import itemgetter

from llamaclust.cluster.front.text.request import AnswerParsing
from llamaclust.model.chat.tools.call_sink import MAX_NAME_CHARACTERS
from llamaclust.model.chat.tools.channels import CUT_HEADER
from llamaclust.model.chat.tools.text_source import Markers
from llamaclust.model.chat.tools.tool_format import ChannelCalls, ReasoningTags

Part = tuple[str, bool]
"""A text, and True if it belongs to the answer without the thoughts."""


class Place(Enum):
    BEFORE = auto()  # There is nothing but white space yet, at the beginning or behind thoughts. Thoughts may begin.
    THOUGHTS = auto()
    ANSWER = auto()
    HEADER = auto()  # Text that says what follows.


class ThoughtScanner(ABC):
    """Reads text as the answer's parser does. Text that may begin a marker is held back until this is decided."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self._held = ""
        self._is_ended = False
        self._unshown = 0  # Number of characters held back that the prompt already contains.
        self._parts: list[Part] = []

    def takes(self, token_text: str) -> bool:
        """Returns True if a token with this text would belong to the answer."""
        return self.place is Place.ANSWER

    def feed(self, text: str) -> list[Part]:
        self._held += text
        while self._held and self._step():
            pass
        parts, self._parts = [*self._new_parts()], []
        return [("".join(part for part, _ in same), is_answer) for is_answer, same in groupby(parts, itemgetter(1))]

    def flush(self) -> list[Part]:
        self._is_ended = True
        return self.feed("")

    def _new_parts(self) -> Iterator[Part]:
        for text, is_answer in self._parts:
            skipped = min(self._unshown, len(text))
            self._unshown -= skipped
            yield text[skipped:], is_answer

    def _begin(self, begun: str) -> None:
        self.feed(begun)
        self._unshown = len(self._held)

    @abstractmethod
    def _step(self) -> bool:
        """Releases text that is decided. Returns False if nothing more can be decided."""

    def _release(self, count: int, *, is_answer: bool) -> str:
        text, self._held = self._held[:count], self._held[count:]
        if text:
            self._parts.append((text, is_answer))
        return text

    def _next(self, markers: Markers) -> tuple[int, int]:
        """Returns the length of the text before the next marker, and the marker's length, which is 0 if there is none
        yet. The rest of the text then may begin a marker."""
        begin, end = markers.find(self._held, 0)
        cut = len(self._held) if self._is_ended else markers.cut_at(self._held, 0)
        return (begin, end - begin) if begin < cut else (min(begin, cut), 0)


class TaggedThoughts(ThoughtScanner):
    """Thoughts between tags. Tags and dropped markers are no text of the answer, except tags behind its beginning."""

    def __init__(self, tags: ReasoningTags, ends: Sequence[str], dropped: Sequence[str], begun: str) -> None:
        super().__init__(Place.BEFORE)
        self._tags = tags
        self._ends = Markers(ends)
        self._all = (tags.begin, *tags.ends, *dropped)
        self._markers = Markers(self._all)
        self._is_begun = False  # True after text of the answer, also during thoughts behind it.
        self._begin(begun)

    def takes(self, token_text: str) -> bool:
        text = self._held + token_text.lstrip()
        is_begin = any(mark.startswith(text[: len(mark)]) for mark in self._all)
        return super().takes(token_text) or (
            self.place is Place.BEFORE and not token_text.isspace() and (self._is_begun or not is_begin)
        )

    def _step(self) -> bool:
        if self.place is Place.THOUGHTS:
            before, marker = self._next(self._ends)
            self._release(before + marker, is_answer=False)
            self.place = Place.BEFORE if marker else Place.THOUGHTS
            return bool(marker)
        before, marker = self._next(self._markers)
        self._text(before)
        return bool(marker) and self._marker(marker)

    def _text(self, count: int) -> None:
        if self.place is Place.BEFORE:
            spaces = count - len(self._held[:count].lstrip())
            self._release(spaces, is_answer=False)
            count -= spaces
        if count:
            self._is_begun, self.place = True, Place.ANSWER
            self._release(count, is_answer=True)

    def _marker(self, count: int) -> bool:
        marker, tags = self._held[:count], self._tags
        is_text = self._is_begun and not tags.repeats and marker in (tags.begin, *tags.ends)
        self._release(count, is_answer=is_text)
        if is_text:
            self.place = Place.ANSWER
        else:
            self.place = Place.THOUGHTS if marker == tags.begin else Place.BEFORE
        return True


class ChannelThoughts(ThoughtScanner):
    """Thoughts in messages of their own. Headers and ends of messages are no text of the answer."""

    def __init__(self, calls: ChannelCalls, tools: Collection[str], begun: str) -> None:
        super().__init__(Place.HEADER)
        self._calls = calls
        self._tools = tools
        ends = (*calls.message_ends, calls.message_begin)
        self._ends, self._header_ends = Markers(ends), Markers((calls.header_end, *ends))
        self._may_lack_end = calls.header_end == "\n"
        self._skips_space = False
        self._begin(begun)

    def _step(self) -> bool:
        if self.place is Place.HEADER:
            return self._header()
        before, marker = self._next(self._ends)
        self._release(before, is_answer=self.place is Place.ANSWER)
        self._end(marker)
        return bool(marker)

    def _end(self, count: int) -> None:
        if marker := self._release(count, is_answer=False):
            self.place = Place.HEADER
            self._skips_space = marker != self._calls.message_begin

    def _header(self) -> bool:
        if self._skips_space:
            self._release(len(self._held) - len(self._held.lstrip()), is_answer=False)
            self._skips_space = not self._held
        before, marker = self._next(self._header_ends)
        if before > MAX_NAME_CHARACTERS:
            self.place = Place.ANSWER  # Text without a header.
            return True
        if not (marker or self._is_ended):
            return False
        header, has_end = self._held[:before], self._held[before : before + marker] == self._calls.header_end
        self._release(before, is_answer=self._is_text(header, has_end=has_end))
        if has_end:
            self.place = self._place(header)
            self._release(marker, is_answer=False)
        else:
            self._end(marker)
        return bool(marker)

    def _is_text(self, header: str, *, has_end: bool) -> bool:
        if self._may_lack_end:
            return not self._is_call(header) and header.strip() != self._calls.content_header.strip()
        return not has_end and CUT_HEADER.match(header) is None

    def _is_call(self, header: str) -> bool:
        recipient = re.search(self._calls.recipient, header)
        return recipient is not None and (recipient[1] in self._tools or not self._may_lack_end)

    def _place(self, header: str) -> Place:
        hidden = (self._calls.reasoning, self._calls.ignored)
        is_hidden = not self._is_call(header) and any(re.search(each, header) for each in hidden)
        return Place.THOUGHTS if is_hidden else Place.ANSWER


def thought_scanner(reading: AnswerParsing) -> ThoughtScanner:
    """Returns the scanner of a form that knows reasoning."""
    form, calls = reading.form, reading.form.calls
    if form.reasoning is None:
        assert isinstance(calls, ChannelCalls), "a form without tags and channels knows no reasoning"
        return ChannelThoughts(calls, reading.tools, reading.begun)
    begins = () if calls is None or isinstance(calls, ChannelCalls) or not reading.tools else calls.frame.triggers
    ends = (*form.reasoning.ends, *begins) if form.calls_end_reasoning else form.reasoning.ends
    return TaggedThoughts(form.reasoning, ends, form.dropped, reading.begun)
