"""Readers of tool calls that begin with the tool's name, followed by a JSON object or by marked arguments."""

from __future__ import annotations

import re
from typing import Final

from llamaclust.model.chat.tools.argument_values import STRING, TextValue, json_of, property_schema, string, types_of
from llamaclust.model.chat.tools.call_sink import MAX_NAME_CHARACTERS, CallSink
from llamaclust.model.chat.tools.json_reading import raw_value
from llamaclust.model.chat.tools.text_source import Markers, Reading, TextSource
from llamaclust.model.chat.tools.tool_format import CDATA_BEGIN, CDATA_END, NamedCalls, TaggedCalls

_NAME: Final = re.compile(r"[\w.\-/: ]+")
_NAME_IN_ID: Final = re.compile(r"(?:functions\.)?(.+?)(?::\d+)?")


class NamedReader:
    def __init__(self, source: TextSource, sink: CallSink, calls: NamedCalls) -> None:
        self._source = source
        self._sink = sink
        self._calls = calls
        self._name_end = lines_of(calls.name_end)
        first_end = self._name_end[0] if self._name_end else ""
        self._name_markers = Markers((calls.id_begin, first_end, "{", *calls.frame.ends))

    def read(self) -> Reading[bool]:
        call_id = yield from self._first_id()
        name = yield from self._source.word(self._name_markers, MAX_NAME_CHARACTERS)
        name = (name or "").strip()
        if not _NAME.fullmatch(name):
            return False
        if self._calls.has_name_in_id:
            call_id, found = name, _NAME_IN_ID.fullmatch(name)
            name = found[1] if found else name
        elif self._calls.id_begin and (yield from self._source.take_literal((self._calls.id_begin,))):
            call_id = ((yield from self._source.word(self._name_markers, MAX_NAME_CHARACTERS)) or "").strip()
        yield from skip_lines(self._source, self._name_end)
        first = yield from self._source.ahead()
        has_arguments = first == "{"
        if not has_arguments and self._calls.name_end and name not in self._sink.tools:
            return False
        self._sink.begin(name, call_id)
        if has_arguments:
            yield from raw_value(self._source, self._sink.argument)
        self._sink.end(call_id, is_read=not first or any(end.startswith(first) for end in self._calls.frame.ends))
        return True

    def _first_id(self) -> Reading[str]:
        begin = self._calls.name_begin
        if not begin:
            return ""
        call_id = yield from self._source.word(Markers((begin, "{")), MAX_NAME_CHARACTERS)
        yield from self._source.take_literal((begin,))
        yield from self._source.skip_space()
        return (call_id or "").strip()


class TaggedReader:
    def __init__(self, source: TextSource, sink: CallSink, calls: TaggedCalls) -> None:
        self._source = source
        self._sink = sink
        self._calls = calls
        self._name_end = lines_of(calls.name_end)
        self._argument_begin = lines_of(calls.argument_begin)
        self._key_end = lines_of(calls.key_end)
        self._name_markers = Markers(
            self._name_end[:1] or (self._argument_begin[0], "\n", *(end for end in calls.frame.ends))
        )
        self._first_markers = Markers((self._argument_begin[0], *calls.frame.ends))
        value_end = calls.value_end.strip()
        self._value_end = Markers((value_end,))
        self._cdata_end = Markers(tuple(f"{CDATA_END}{space}{value_end}" for space in ("", " ", "\n")))

    def read(self) -> Reading[bool]:
        name = yield from self._source.word(self._name_markers, MAX_NAME_CHARACTERS)
        name = (name or "").strip()
        if not _NAME.fullmatch(name):
            return False
        yield from skip_lines(self._source, self._name_end)
        yield from self._source.word(self._first_markers, MAX_NAME_CHARACTERS)  # Skips attributes of the call.
        self._sink.begin(name)
        written = 0
        while (yield from self._argument(name, written)):
            written += 1
        self._sink.argument("}" if written else "{}")
        self._sink.end()
        return True

    def _argument(self, name: str, place: int) -> Reading[bool]:
        yield from self._source.skip_space()
        if not (yield from self._source.take_literal(self._argument_begin[:1])):
            return False
        yield from skip_lines(self._source, self._argument_begin[1:])
        key = yield from self._source.word(Markers(self._key_end[:1]), MAX_NAME_CHARACTERS)
        if key is None:
            return False
        yield from self._source.take_literal(self._key_end[:1])
        schema = property_schema(self._sink.tools.get(name, {}), key)
        types = types_of(schema)
        if self._calls.value_begin:
            attribute = yield from self._source.word(Markers((self._calls.value_begin,)), MAX_NAME_CHARACTERS)
            yield from self._source.take_literal((self._calls.value_begin,))
            types = STRING if attribute == self._calls.string_attribute else types - STRING
        for line in self._key_end[1:]:
            yield from self._source.skip_space()
            yield from self._source.take_literal((line,))
        self._sink.argument(("{" if place == 0 else ", ") + string(key) + ": ")
        yield from self._value(types)
        return True

    def _value(self, types: frozenset[str]) -> Reading[None]:
        calls = self._calls
        is_cdata = calls.has_cdata and bool((yield from self._source.take_literal((CDATA_BEGIN,))))
        end = self._cdata_end if is_cdata else self._value_end
        indent, dedent = ("", "") if is_cdata else (calls.value_indent, calls.value_dedent)
        if types == STRING:
            yield from self._text_value(end, indent, dedent)
        else:
            pieces: list[str] = []
            yield from self._source.until(end, pieces.append)
            self._sink.argument(json_of("".join(pieces).removeprefix(indent).removesuffix(dedent), types))

    def _text_value(self, end: Markers, indent: str, dedent: str) -> Reading[None]:
        value = TextValue(self._sink.argument, indent, dedent)
        yield from self._source.until(end, value.push)
        value.end()


def lines_of(marker: str) -> tuple[str, ...]:
    return tuple(line for line in map(str.strip, marker.split("\n")) if line)


def skip_lines(source: TextSource, lines: tuple[str, ...]) -> Reading[None]:
    yield from source.skip_space()
    for line in lines:
        yield from source.take_literal((line,))
        yield from source.skip_space()
