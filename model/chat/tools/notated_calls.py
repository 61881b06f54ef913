"""Reads tool calls in Python's notation, Gemma's notation, or nested elements."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from llamaclust.model.chat.tools.argument_values import (
    PYTHON_WORDS,
    json_of,
    json_of_python,
    property_schema,
    string,
    types_of,
)
from llamaclust.model.chat.tools.call_sink import MAX_NAME_CHARACTERS, CallSink, Schema
from llamaclust.model.chat.tools.text_source import Markers, Reading, TextSource
from llamaclust.model.chat.tools.tool_format import NotatedCalls, Notation

_NAME: Final = re.compile(r"[\w.\-/]+")
_KEY: Final = re.compile(r"\w[\w.\-]*")
_KEY_PART: Final = re.compile(r"[\w.\-\s]")
_PLAIN: Final = re.compile(r"""[^"'(){}\[\],\\]+""")
_GEMMA_KEY: Final = re.compile(r"(?<![^\s{}\[\],:\"])([^\s{}\[\],:\"]++)\s*+:")
"""Matches a whole key. Possessive quantifiers make sure that a long word is scanned only once."""
_GEMMA_WORD: Final = re.compile(r"(?<=[:,\[])(\s*)(True|False|None)(?=\s*(?:[,\]]|$))")
"""Matches a value that Gemma's template writes as in Python, such as None for null."""
_MAX_DEPTH: Final = 64
_EMPTY: Final = {"array": "[]", "object": "{}"}


class NotatedReader:
    """Reads tool calls of the form `NotatedCalls`. Emits an argument only when its value is complete."""

    def __init__(self, source: TextSource, sink: CallSink, calls: NotatedCalls) -> None:
        self._source = source
        self._sink = sink
        self._mark = calls.mark
        self._read = {
            Notation.PYTHON: self._python,
            Notation.GEMMA: self._gemma,
            Notation.ELEMENTS: self._elements,
        }[calls.notation]

    def read(self) -> Reading[bool]:
        return (yield from self._read())

    def _name(self, end: str) -> Reading[str]:
        name = yield from self._source.word(Markers((end,)), MAX_NAME_CHARACTERS)
        if name is None or not _NAME.fullmatch(name.strip()):
            return ""
        yield from self._source.take_literal((end,))
        return name.strip()

    def _python(self) -> Reading[bool]:
        before = self._sink.calls
        while True:
            yield from self._source.skip_space()
            if (yield from self._source.take_literal(("[", ","))):
                continue
            if (yield from self._source.take_literal(("]",))):
                return self._sink.calls > before
            name = yield from self._name("(")
            if not name:
                return self._sink.calls > before
            self._sink.begin(name)
            yield from self._python_arguments(name)
            self._sink.end()

    def _python_arguments(self, name: str) -> Reading[None]:
        written: set[str] = set()
        while True:
            yield from self._source.skip_space()
            if (yield from self._source.take_literal((",",))):
                continue
            if is_complete := bool((yield from self._source.take_literal((")",)))):
                break
            key, begun = yield from self._key()
            if not (yield from self._source.ahead()):
                break
            key = key or self._next_parameter(name, written)
            self._sink.argument(("{" if not written else ", ") + string(key) + ": ")
            written.add(key)
            value = yield from self._python_value(begun)
            if value.strip() or (yield from self._source.ahead()):
                self._sink.argument(json_of_python(value) if value.strip() else "null")
        if is_complete or not written:
            self._sink.argument("}" if written else "{}")

    def _key(self) -> Reading[tuple[str, str]]:
        """Returns (name, "") for a keyword argument, or ("", start of the value) for a positional argument."""
        text = ""
        while len(text) < MAX_NAME_CHARACTERS and _KEY_PART.match((yield from self._source.ahead())):
            text += self._source.take(1)
        if _KEY.fullmatch(text.strip()) and (yield from self._source.take_literal(("=",))):
            return text.strip(), ""
        return "", text

    def _next_parameter(self, name: str, written: set[str]) -> str:
        """Returns the name of a positional argument's parameter: the first parameter without a value."""
        properties = self._sink.tools.get(name, {}).get("properties")
        free = (key for key in (properties if isinstance(properties, Mapping) else ()) if key not in written)
        return next(free, f"argument_{len(written) + 1}")

    def _python_value(self, text: str) -> Reading[str]:
        depth = 0
        while character := (yield from self._source.ahead()):
            if depth == 0 and character in ",)":
                break
            if character in "\"'":
                text += yield from self._quoted()
                continue
            depth = max(0, depth + (character in "([{") - (character in ")]}"))
            text += self._source.take_match(_PLAIN) or self._source.take(1)
        return text

    def _quoted(self) -> Reading[str]:
        quote = text = self._source.take(1)
        while character := (yield from self._source.ahead()):
            escaped = (yield from self._source.ahead(2)) if character == "\\" else character
            text += self._source.take(len(escaped))
            if character == quote:
                break
        return text

    def _gemma(self) -> Reading[bool]:
        name = yield from self._name("{")
        if not name:
            return False
        self._sink.begin(name)
        pieces, depth = ["{"], 1
        brackets = Markers((self._mark, "{", "}"))
        while depth:
            plain: list[str] = []
            marker = yield from self._source.until(brackets, plain.append)
            keyed = _GEMMA_KEY.sub(r'"\1":', "".join(plain))
            pieces.append(_GEMMA_WORD.sub(lambda word: word[1] + PYTHON_WORDS[word[2]], keyed))
            if not marker:
                break
            if marker == self._mark:
                quoted: list[str] = []
                yield from self._source.until(Markers((self._mark,)), quoted.append)
                pieces.append(string("".join(quoted)))
            else:
                depth += 1 if marker == "{" else -1
                pieces.append(marker)
        self._sink.argument("".join(pieces))
        self._sink.end()
        return True

    def _elements(self) -> Reading[bool]:
        name = yield from self._name('">')
        if not name:
            return False
        self._sink.begin(name)
        pieces: list[str] = []
        yield from self._source.until(Markers((f"{self._mark}</invoke>",)), pieces.append)
        schema = self._sink.tools.get(name, {})
        self._sink.argument(_Elements("".join(pieces), self._mark).members(schema))
        self._sink.end()
        return True


class _Elements:
    """Converts a call's XML-like elements to JSON. An element that may be a string is text, whatever it contains."""

    def __init__(self, text: str, mark: str) -> None:
        self._text = text
        self._mark = mark

    def members(self, schema: Schema) -> str:
        return self._members(self._text, schema, 0)

    def _members(self, text: str, schema: Schema, depth: int) -> str:
        members = [
            f"{string(tag)}: {self._value(inner, property_schema(schema, tag), depth + 1)}"
            for tag, inner in self._children(text)
        ]
        return "{" + ", ".join(members) + "}"

    def _value(self, text: str, schema: Schema, depth: int) -> str:
        types = types_of(schema)
        children = self._children(text) if depth < _MAX_DEPTH and "string" not in types else []
        if not children:
            empty = [] if text.strip() or "string" in types else [_EMPTY[kind] for kind in _EMPTY if kind in types]
            return empty[0] if empty else json_of(text, types)
        if {tag for tag, _ in children} == {"item"} and types != {"object"}:
            items = _alternative(schema, "array").get("items")
            item_schema = items if isinstance(items, Mapping) else {}
            return "[" + ", ".join(self._value(inner, item_schema, depth + 1) for _, inner in children) + "]"
        return self._members(text, _alternative(schema, "object"), depth)

    def _children(self, text: str) -> list[tuple[str, str]]:
        found, at = [], 0
        opening = re.compile(re.escape(self._mark) + r"<([^/<>\s][^<>]*)>")
        while element := opening.search(text, at):
            tag, start = element[1], element.end()
            at = self._closing(text, tag, start)
            found.append((tag, text[start:at]))
            at += len(self._mark) + len(tag) + 3
        return found

    def _closing(self, text: str, tag: str, start: int) -> int:
        depth = 1
        for element in re.compile(re.escape(self._mark) + f"<(/?){re.escape(tag)}>").finditer(text, start):
            depth += -1 if element[1] else 1
            if depth == 0:
                return element.start()
        return len(text)


def _alternative(schema: Schema, kind: str) -> Schema:
    if schema.get("type") == kind:
        return schema
    alternatives: list[Any] = [member for key in ("anyOf", "oneOf") for member in schema.get(key) or ()]
    return next(
        (member for member in alternatives if isinstance(member, Mapping) and member.get("type") == kind), schema
    )
