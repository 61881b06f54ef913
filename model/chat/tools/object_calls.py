"""Reads tool calls that are JSON objects. They have a name, arguments and perhaps an id, in any order."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from llamaclust.model.chat.tools.call_sink import MAX_NAME_CHARACTERS, CallSink
from llamaclust.model.chat.tools.json_reading import decoded_string, raw_value
from llamaclust.model.chat.tools.text_source import Reading, TextSource
from llamaclust.model.chat.tools.tool_format import ObjectCalls

_NAME_KEYS: Final = ("name", "tool_name", "function", "function_name", "tool")
_ARGUMENT_KEYS: Final = ("arguments", "parameters", "args", "input")
_ID_KEYS: Final = ("id", "tool_call_id", "call_id")
_OTHER_KEYS: Final = ("type", "function", "index")


@dataclass(slots=True)
class _Call:
    name: str = ""
    call_id: str = ""
    held: list[str] = field(default_factory=list)  # Arguments that came before the name.
    has_arguments: bool = False


class ObjectReader:
    """Reads tool calls that are JSON objects. Accepts common keys besides the template's, since models may use them."""

    def __init__(self, source: TextSource, sink: CallSink, calls: ObjectCalls, *, is_bare: bool) -> None:
        """Creates a reader. If `is_bare`, objects have no markers, and only those that name a known tool are calls."""
        self._source = source
        self._sink = sink
        self._calls = calls
        self._is_bare = is_bare

    def read(self) -> Reading[bool]:
        """Reads a tool call or a list of tool calls. Returns False, and emits no event, if there is no call."""
        yield from self._source.skip_space()
        first = yield from self._source.ahead()
        if first == "[":
            return (yield from self._list())
        return first == "{" and (yield from self._call())

    def _list(self) -> Reading[bool]:
        self._source.take(1)
        before = self._sink.calls
        while True:
            yield from self._source.skip_space()
            first = yield from self._source.ahead()
            if first == "{":
                if not (yield from self._call()):
                    return self._sink.calls > before
            elif first == ",":
                self._source.take(1)
            else:
                self._source.take(int(first == "]"))
                return self._sink.calls > before

    def _call(self) -> Reading[bool]:
        call = _Call()
        is_read = yield from self._members(call, depth=0)
        if not self._sink.is_open:
            if not call.name or not self._may_call(call.name) or (self._is_bare and not is_read):
                return False
            self._begin(call)
        self._sink.end(call.call_id, is_read=is_read)
        return True

    def _members(self, call: _Call, depth: int) -> Reading[bool]:
        self._source.take(1)
        while True:
            yield from self._source.skip_space()
            first = yield from self._source.ahead()
            if first == ",":
                self._source.take(1)
            elif first == '"':
                if not (yield from self._member(call, depth)):
                    return False
            else:
                self._source.take(int(first == "}"))
                return first == "}"

    def _member(self, call: _Call, depth: int) -> Reading[bool]:
        key = yield from self._string()
        yield from self._source.skip_space()
        if (yield from self._source.ahead()) != ":":
            return False
        self._source.take(1)
        yield from self._source.skip_space()
        first = yield from self._source.ahead()
        if key in (self._calls.name_key, *_NAME_KEYS) and first == '"' and not call.name:
            call.name = yield from self._string()
            return self._may_call(call.name)
        if key in (self._calls.id_key, *_ID_KEYS):
            call.call_id = yield from self._scalar(first)
        elif key in (self._calls.arguments_key, *_ARGUMENT_KEYS) and not call.has_arguments:
            yield from self._arguments(call, first)
        elif first == "{" and depth == 0 and key in (self._calls.wrapper_key, "function"):
            return (yield from self._members(call, depth + 1))
        elif first == "{" and not call.name and (self._calls.name_is_key or key in self._sink.tools):
            call.name = key
            yield from self._arguments(call, first)
        elif self._is_bare and not self._sink.is_open and key not in _OTHER_KEYS:
            return False
        else:
            yield from raw_value(self._source, lambda _: None)
        return True

    def _arguments(self, call: _Call, first: str) -> Reading[None]:
        call.has_arguments = True
        if call.name:
            self._begin(call)
        put = self._sink.argument if call.name else call.held.append
        yield from (decoded_string if first == '"' else raw_value)(self._source, put)

    def _begin(self, call: _Call) -> None:
        self._sink.begin(call.name, call.call_id)
        self._sink.argument("".join(call.held))

    def _may_call(self, name: str) -> bool:
        return 0 < len(name) <= MAX_NAME_CHARACTERS and (not self._is_bare or name in self._sink.tools)

    def _scalar(self, first: str) -> Reading[str]:
        pieces: list[str] = []
        yield from (decoded_string if first == '"' else raw_value)(self._source, pieces.append)
        return "".join(pieces)[:MAX_NAME_CHARACTERS]

    def _string(self) -> Reading[str]:
        pieces: list[str] = []
        yield from decoded_string(self._source, pieces.append)
        return "".join(pieces)
