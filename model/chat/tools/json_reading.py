"""Reads JSON values piece by piece."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Final

from llamaclust.model.chat.tools.text_source import Reading, TextSource

_PLAIN: Final = re.compile(r'[^"{}\[\]]+')
_IN_STRING: Final = re.compile(r'[^"\\]+')
_SCALAR: Final = re.compile(r'[^\s,:"{}\[\]]+')
_ESCAPE_CHARACTERS: Final = 6

Sink = Callable[[str], None]


def raw_value(source: TextSource, sink: Sink) -> Reading[None]:
    """Reads a JSON value, and passes its text to `sink` while it arrives. Stops at text that is not JSON."""
    first = yield from source.ahead()
    if first == '"':
        yield from _raw_string(source, sink)
    elif first in ("{", "["):
        yield from _raw_container(source, sink)
    else:
        while (yield from source.ahead()) and (text := source.take_match(_SCALAR)):
            sink(text)


def _raw_container(source: TextSource, sink: Sink) -> Reading[None]:
    depth = 0
    while character := (yield from source.ahead()):
        if character == '"':
            yield from _raw_string(source, sink)
        elif character in "{}[]":
            depth += 1 if character in "{[" else -1
            sink(source.take(1))
            if depth == 0:
                return
        else:
            sink(source.take_match(_PLAIN))


def _raw_string(source: TextSource, sink: Sink) -> Reading[None]:
    sink(source.take(1))
    while character := (yield from source.ahead()):
        if character == "\\":
            yield from source.ahead(2)
            sink(source.take(2))
        elif character == '"':
            sink(source.take(1))
            return
        else:
            sink(source.take_match(_IN_STRING))


def decoded_string(source: TextSource, sink: Sink) -> Reading[None]:
    source.take(1)
    while character := (yield from source.ahead()):
        if character == "\\":
            sink((yield from _escaped(source)))
        elif character == '"':
            source.take(1)
            return
        else:
            sink(source.take_match(_IN_STRING))


def _escaped(source: TextSource) -> Reading[str]:
    is_code = (yield from source.ahead(2))[1:] == "u"
    length = _ESCAPE_CHARACTERS if is_code else 2
    text = yield from source.ahead(length)
    if is_code and text[2:4].lower() in ("d8", "d9", "da", "db"):
        pair = yield from source.ahead(2 * length)
        if pair[length : length + 4].lower() in ("\\udc", "\\udd", "\\ude", "\\udf"):
            text = pair
    source.take(len(text))
    try:
        return str(json.loads(f'"{text}"')).encode("utf-8", "replace").decode()
    except ValueError:
        return text
