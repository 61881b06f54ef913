"""Parses an answer while its text arrives, and emits events. The events do not depend on how the text is split."""

from __future__ import annotations

from llamaclust.model.chat.tools.call_sink import CallSink, Tools
from llamaclust.model.chat.tools.channels import ChannelReader
from llamaclust.model.chat.tools.events import AnswerEvent, ContentText, ParsedAnswer, ReasoningText, merged
from llamaclust.model.chat.tools.named_calls import NamedReader, TaggedReader
from llamaclust.model.chat.tools.notated_calls import NotatedReader
from llamaclust.model.chat.tools.object_calls import ObjectReader
from llamaclust.model.chat.tools.text_run import TextRun
from llamaclust.model.chat.tools.text_source import Markers, Reading, TextSource
from llamaclust.model.chat.tools.tool_format import (
    Calls,
    ChannelCalls,
    NamedCalls,
    NotatedCalls,
    ObjectCalls,
    TaggedCalls,
    ToolFormat,
)
from llamaclust.model.chat.tools.unmarked_calls import UnmarkedReader

CallReader = ObjectReader | NamedReader | TaggedReader | NotatedReader


class AnswerParser:
    """A parser for answers of any form. Text that is neither a tool call nor reasoning is content."""

    def __init__(
        self,
        form: ToolFormat,
        tools: Tools,
        *,
        splits_reasoning: bool = True,
        most_calls: int | None = None,
        begun: str = "",
        reads_unmarked: bool = False,
    ) -> None:
        """Creates a parser. Tool calls are read only if there are `tools`. `begun` is the part of the answer that
        the prompt already contains. Unless `splits_reasoning`, reasoning stays in the content with its markers. If
        `reads_unmarked`, an answer may consist of calls without markers."""
        self._form = form
        self._source = TextSource()
        self._sink = CallSink(tools, most_calls)
        self._content = TextRun(self._sink.put, ContentText)
        self._reasoning = TextRun(self._sink.put, ReasoningText)
        self._tags = form.reasoning if splits_reasoning else None
        self._splits_reasoning = splits_reasoning
        self._dropped = tuple(mark for mark in form.dropped if splits_reasoning or not _is_of_reasoning(form, mark))
        self._frame = None if form.calls is None or isinstance(form.calls, ChannelCalls) else form.calls.frame
        self._triggers = self._frame.triggers if self._frame is not None and tools else ()
        self._unmarked = UnmarkedReader(self._source, tools, form.calls, self._dropped) if reads_unmarked else None
        self._reading = self._answer()
        self._is_over = False
        self._source.feed(begun)
        self._read_on()
        self._sink.drop_begun()

    def feed(self, text: str) -> list[AnswerEvent]:
        self._source.feed(text)
        return self._advance()

    def end(self, *, is_cut: bool = False) -> list[AnswerEvent]:
        """Ends the answer. `is_cut` is true if the model itself did not end the answer."""
        if self._sink.calls and not self._sink.is_open and self._content.is_cut:
            # The token limit may have ended the answer inside the first marker of one more call.
            self._source.drop_beginning(self._triggers)
        self._source.end()
        self._sink.is_cut = is_cut
        return self._advance()

    def _advance(self) -> list[AnswerEvent]:
        self._read_on()
        return merged(self._sink.take_events())

    def _read_on(self) -> None:
        if not self._is_over:
            try:
                next(self._reading)
            except StopIteration:
                self._is_over = True

    def _answer(self) -> Reading[None]:
        if isinstance(self._form.calls, ChannelCalls):
            reasoning = self._reasoning if self._splits_reasoning else None
            yield from ChannelReader(self._source, self._sink, self._form.calls, self._content, reasoning).read()
        else:
            if self._sink.tools and self._frame is not None and not self._frame.lines:
                yield from self._bare_calls()
            while (yield from self._next()):
                pass
        self._content.end()
        self._reasoning.end()

    def _next(self) -> Reading[bool]:
        if (yield from self._unmarked_calls()):
            return True
        tags = self._tags
        marker = yield from self._source.until(self._content_markers(), self._content.push)
        if not marker:
            return False
        if marker in self._triggers:
            yield from self._call(marker)
        elif tags is not None and marker == tags.begin and not (self._content.has_begun and not tags.repeats):
            yield from self._reasoning_text()
        elif tags is not None and marker in (tags.begin, *tags.ends) and self._content.has_begun and not tags.repeats:
            self._content.push(marker)
        else:
            self._content.cut()
        return True

    def _unmarked_calls(self) -> Reading[bool]:
        if self._unmarked is None or self._content.has_begun or self._sink.calls:
            return False
        calls = yield from self._unmarked.read()
        for call in calls:
            self._sink.begin(call.name, call.call_id)
            self._sink.argument(call.arguments)
            self._sink.end(call.call_id)
        if calls:
            self._content.cut()
        return bool(calls)

    def _content_markers(self) -> Markers:
        tags = () if self._tags is None else (self._tags.begin, *self._tags.ends)
        return Markers((*self._triggers, *tags, *self._dropped))

    def _reasoning_text(self) -> Reading[None]:
        assert self._tags is not None
        self._content.cut()
        self._reasoning.cut()
        triggers = self._triggers if self._form.calls_end_reasoning else ()
        marker = yield from self._source.until(Markers((*self._tags.ends, *triggers)), self._reasoning.push)
        if not marker:
            return
        self._reasoning.cut()
        if marker in triggers and marker not in self._tags.ends:
            yield from self._call(marker)

    def _call(self, trigger: str) -> Reading[None]:
        assert self._frame is not None and self._form.calls is not None
        self._source.record()
        lines = self._frame.lines
        begin = lines.index(trigger) + 1
        yield from self._source.skip_space()
        for line in lines[begin:]:
            yield from self._source.take_literal((line,))
            yield from self._source.skip_space()
        is_call = yield from self._reader(self._form.calls, is_bare=False).read()
        text = self._source.recorded()
        if not is_call:
            is_cut = self._sink.calls > 0 and not (yield from self._source.ahead())
            # The token limit may have ended the answer inside this call. An incomplete call is not content.
            self._content.push("" if is_cut else trigger + text)
            return
        self._content.cut()
        yield from self._call_ends()

    def _bare_calls(self) -> Reading[None]:
        assert self._form.calls is not None
        is_first = True
        while True:
            self._source.record()
            yield from self._source.skip_space()
            if not is_first and (yield from self._source.take_literal((";", ","))):
                continue
            is_call = yield from self._reader(self._form.calls, is_bare=True).read()
            text = self._source.recorded()
            if not is_call:
                self._content.push(text)
                return
            self._content.cut()
            is_first = False

    def _call_ends(self) -> Reading[None]:
        assert self._frame is not None
        yield from self._source.skip_space()
        while (yield from self._source.take_literal(self._frame.ends)):
            yield from self._source.skip_space()

    def _reader(self, calls: Calls, *, is_bare: bool) -> CallReader:
        match calls:
            case ObjectCalls():
                return ObjectReader(self._source, self._sink, calls, is_bare=is_bare)
            case NamedCalls():
                return NamedReader(self._source, self._sink, calls)
            case TaggedCalls():
                return TaggedReader(self._source, self._sink, calls)
            case NotatedCalls():
                return NotatedReader(self._source, self._sink, calls)
            case ChannelCalls():
                raise AssertionError("ChannelCalls are read by ChannelReader")


def _is_of_reasoning(form: ToolFormat, mark: str) -> bool:
    return form.reasoning is not None and form.reasoning.begin.startswith(mark)


def parsed(parser: AnswerParser, text: str) -> ParsedAnswer:
    answer = ParsedAnswer()
    answer.add(parser.feed(text))
    answer.add(parser.end())
    return answer
