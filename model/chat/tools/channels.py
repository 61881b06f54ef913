"""Parses answers that consist of messages with headers. A header marks reasoning, content or a tool call."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from llamaclust.model.chat.tools.call_sink import MAX_NAME_CHARACTERS, CallSink
from llamaclust.model.chat.tools.json_reading import raw_value
from llamaclust.model.chat.tools.named_calls import TaggedReader, skip_lines
from llamaclust.model.chat.tools.text_run import TextRun
from llamaclust.model.chat.tools.text_source import Markers, Reading, TextSource
from llamaclust.model.chat.tools.tool_format import ChannelCalls

CUT_HEADER: Final = re.compile(r"\s*(<\||to=|<?$|to?$)")
"""Matches the beginning of a header that the token limit may have cut. Content may lack a header."""


@dataclass(frozen=True, slots=True)
class _Texts:
    content: TextRun
    reasoning: TextRun | None  # None means that reasoning stays in the content with its markers.


class ChannelReader:
    """Parses an answer that consists of messages with headers. The prompt ends inside the first header."""

    def __init__(
        self, source: TextSource, sink: CallSink, calls: ChannelCalls, content: TextRun, reasoning: TextRun | None
    ) -> None:
        self._source = source
        self._sink = sink
        self._calls = calls
        self._texts = _Texts(content, reasoning)
        self._ends = Markers((*calls.message_ends, calls.message_begin))
        self._header_ends = Markers((calls.header_end, *calls.message_ends, calls.message_begin))
        self._body = None if calls.calls is None else TaggedReader(source, sink, calls.calls)

    def read(self) -> Reading[None]:
        while (yield from self._source.ahead()):
            end = yield from self._message()
            while end and end != self._calls.message_begin:
                yield from self._source.skip_space()
                end = yield from self._source.take_literal((*self._calls.message_ends, self._calls.message_begin))

    def _message(self) -> Reading[str]:
        header = yield from self._source.word(self._header_ends, MAX_NAME_CHARACTERS)
        content, reasoning = self._texts.content, self._texts.reasoning
        if header is None:
            return (yield from self._source.until(self._ends, content.push))
        end = yield from self._source.take_literal((self._calls.header_end,))
        may_be_content = self._calls.header_end == "\n"
        if not (end or may_be_content or CUT_HEADER.match(header)):
            content.push(header)
            return (yield from self._source.until(self._ends, content.push))
        recipient = re.search(self._calls.recipient, header)
        if recipient and (recipient[1] in self._sink.tools or not may_be_content):
            return (yield from self._call(recipient[1]))
        if re.search(self._calls.reasoning, header):
            if reasoning is None:
                return (yield from self._unsplit(header + end))
            reasoning.cut()
            return (yield from self._source.until(self._ends, reasoning.push))
        if re.search(self._calls.ignored, header):
            return (yield from self._source.until(self._ends, _drop))
        if header.strip() != self._calls.content_header.strip() and may_be_content:
            content.push(header + end)
        return (yield from self._source.until(self._ends, content.push))

    def _unsplit(self, header: str) -> Reading[str]:
        put: Callable[[str], None] = self._texts.content.push
        put(header)
        end = yield from self._source.until(self._ends, put)
        put(end)
        return end

    def _call(self, name: str) -> Reading[str]:
        self._texts.content.cut()
        yield from self._source.skip_space()
        if self._body is not None and self._calls.calls is not None:
            yield from skip_lines(self._source, self._calls.calls.frame.lines)
            yield from self._body.read()
        else:
            self._sink.begin(name)
            if (yield from self._source.ahead()) != "{":  # It may be the text of a custom tool.
                end = yield from self._source.until(self._ends, self._sink.argument)
                self._sink.end()
                return end
            yield from raw_value(self._source, self._sink.argument)
            self._sink.end()
        return (yield from self._source.until(self._ends, _drop))


def _drop(_: str) -> None:
    pass
