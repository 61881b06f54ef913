"""Parses answers that consist of tool calls without markers. They are JSON objects, perhaps in a code fence."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Final

from llamaclust.model.chat.tools.argument_values import arguments_object
from llamaclust.model.chat.tools.call_sink import MAX_NAME_CHARACTERS, Tools
from llamaclust.model.chat.tools.events import ToolCall
from llamaclust.model.chat.tools.json_reading import decoded_string, raw_value
from llamaclust.model.chat.tools.text_source import Markers, Reading, TextSource
from llamaclust.model.chat.tools.tool_format import Calls, ObjectCalls

_FENCE: Final = ("```",)
_LANGUAGE: Final = re.compile(r"\w{0,16}\s*")
_LINE_END: Final = Markers(("\n",))
_MOST_LANGUAGE_CHARACTERS: Final = 20
_TYPES: Final = ("function",)


class _NoCallError(Exception):
    """The text so far cannot be a tool call."""


class UnmarkedReader:
    """Parses an answer that may be tool calls without markers. Holds back text only while calls are possible."""

    def __init__(self, source: TextSource, tools: Tools, calls: Calls | None, dropped: Iterable[str]) -> None:
        """Accepts calls with keys `name` and `arguments`, or with the keys in `calls`. Skips `dropped` after calls."""
        self._source = source
        self._tools = tools
        form = calls if isinstance(calls, ObjectCalls) else None
        self._name_keys = frozenset(("name", form.name_key if form else "name"))
        self._argument_keys = frozenset(("arguments", "parameters", form.arguments_key if form else "arguments"))
        self._dropped = tuple(dropped)

    def read(self) -> Reading[list[ToolCall]]:
        """Returns the tool calls if the answer consists of them. Otherwise, gives the text back and returns []."""
        self._source.record()
        try:
            calls = yield from self._whole()
        except _NoCallError:
            calls = []
        text = self._source.recorded()
        if not calls:
            self._source.give_back(text)
        return calls

    def _whole(self) -> Reading[list[ToolCall]]:
        yield from self._source.skip_space()
        is_fenced = bool((yield from self._source.take_literal(_FENCE)))
        if is_fenced:
            language = yield from self._source.word(_LINE_END, _MOST_LANGUAGE_CHARACTERS)
            _require(language is not None and _LANGUAGE.fullmatch(language) is not None)
        calls = yield from self._calls()
        if is_fenced:
            _require((yield from self._source.take_literal(_FENCE)) != "")
        yield from self._source.skip_space()
        while (yield from self._source.take_literal(self._dropped)):
            yield from self._source.skip_space()
        _require(not (yield from self._source.ahead()))
        return calls

    def _calls(self) -> Reading[list[ToolCall]]:
        yield from self._source.skip_space()
        is_list = (yield from self._source.ahead()) == "["
        if is_list:
            yield from self._take("[")
        calls = [(yield from self._call())]
        while (following := (yield from self._source.ahead())) == ("," if is_list else "{"):
            if is_list:
                yield from self._take(following)
            calls.append((yield from self._call()))
        if is_list:
            yield from self._take("]")
        return calls

    def _call(self) -> Reading[ToolCall]:
        found: dict[str, str] = {}
        yield from self._members(found, depth=0)
        _require(found.keys() >= {"name", "arguments"})
        return ToolCall(found["name"], found.get("id", ""), found["arguments"])

    def _members(self, found: dict[str, str], depth: int) -> Reading[None]:
        yield from self._take("{")
        while True:
            key = yield from self._text(("id", "type", "function", *self._name_keys, *self._argument_keys))
            yield from self._take(":")
            if key == "function" and depth == 0:
                yield from self._members(found, depth + 1)
            else:
                kind = "name" if key in self._name_keys else "arguments" if key in self._argument_keys else key
                _require(kind not in found)
                found[kind] = yield from self._value(kind)
                yield from self._source.skip_space()
            if (yield from self._source.ahead()) != ",":
                yield from self._take("}")
                return
            yield from self._take(",")

    def _value(self, kind: str) -> Reading[str]:
        if kind == "name":
            return (yield from self._text(self._tools))
        if kind == "type":
            return (yield from self._text(_TYPES))
        pieces: list[str] = []
        first = yield from self._source.ahead()
        if kind == "id":
            _require(first == '"')
            yield from decoded_string(self._source, _bounded(pieces))
            return "".join(pieces)
        _require(kind == "arguments" and first in ("{", '"'))
        yield from (decoded_string if first == '"' else raw_value)(self._source, pieces.append)
        arguments = "".join(pieces)
        _require(arguments_object(arguments) is not None)
        return arguments

    def _text(self, allowed: Iterable[str]) -> Reading[str]:
        _require((yield from self._source.ahead()) == '"')
        pieces: list[str] = []

        def add(piece: str) -> None:
            pieces.append(piece)
            begun = "".join(pieces)
            _require(any(text.startswith(begun) for text in allowed))

        yield from decoded_string(self._source, add)
        _require("".join(pieces) in allowed)
        return "".join(pieces)

    def _take(self, character: str) -> Reading[None]:
        _require((yield from self._source.ahead()) == character)
        self._source.take(1)
        yield from self._source.skip_space()


def _require(is_so: bool) -> None:
    if not is_so:
        raise _NoCallError


def _bounded(pieces: list[str]) -> Callable[[str], None]:
    def add(piece: str) -> None:
        pieces.append(piece)
        _require(sum(map(len, pieces)) <= MAX_NAME_CHARACTERS)

    return add
