"""Reads cluster files and applies KEY=VALUE overrides. The YAML reader limits its input and records line numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llamaclust.core.errors import UsageError
from llamaclust.core.regular_file import decode_text, read_given

MAX_FILE_BYTES = 1 << 20
MAX_DEPTH = 16
MAX_NODES = 20_000
"""Maximum number of keys and values in a cluster file. Reading more of them would take seconds."""
_MOST_SHOWN = 100
_TEXT = "tag:yaml.org,2002:str"
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_DECIMAL = re.compile(r"[-+]?((0|[1-9]\d*)(\.\d*)?|\.\d+)(e[-+]?\d+)?|[-+]?\.inf|\.nan", re.ASCII | re.IGNORECASE)

Place = tuple[str | int, ...]
"""Path of a value in a cluster file, such as ('workers', 1, 'threads')."""


@dataclass(frozen=True, slots=True)
class Document:
    """A cluster file's values after overrides. `origins` maps each key and item to FILE:LINE or to a --set option."""

    name: str
    values: dict[str, Any]
    origins: dict[Place, str]

    def where(self, place: Place) -> str:
        """Returns the origin of a value. If it is unknown, returns that of the nearest section around the value."""
        while place and place not in self.origins:
            place = place[:-1]
        return self.origins[place] if place else self.name


_SURROGATES = re.compile("[\ud800-\udbff][\udc00-\udfff]")
"""Matches surrogate pairs. In JSON, a character above U+FFFF is a pair, which YAML reads as two characters."""


def _joined(pair: re.Match[str]) -> str:
    return pair[0].encode("utf-16-le", "surrogatepass").decode("utf-16-le")


class _Loader(yaml.SafeLoader):
    """A safe YAML loader that refuses aliases, tags, duplicate keys, deep nesting and too many values."""

    depth = 0
    nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise self._refusal("aliases (*name) are not accepted")
        if getattr(self._event(), "tag", None) is not None:
            raise self._refusal("tags (!name) are not accepted")
        if self.depth >= MAX_DEPTH:
            raise self._refusal(f"nested deeper than {MAX_DEPTH} levels")
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise self._refusal(f"there are more than {MAX_NODES} keys and values")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        if isinstance(node, yaml.ScalarNode):
            node.value = _SURROGATES.sub(_joined, node.value)
        return node

    def _refusal(self, why: str) -> yaml.MarkedYAMLError:
        return yaml.MarkedYAMLError(None, None, why, self._event().start_mark)

    def _event(self) -> Any:
        parser: Any = self  # The parser's methods have no types.
        return parser.peek_event()

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(None, None, "a key must be a plain word", key.start_mark)
            if key.tag != _TEXT:
                what = f"key {key.value[:60]!r} is not a word; put it in quotes"
                raise yaml.MarkedYAMLError(None, None, what, key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(None, None, f"duplicate key {key.value!r}", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """Refuses numbers that are not decimal, such as 0777, 0x1F, 10:20 and 1_000. Adds line numbers to errors."""
        if node.tag in _NUMBERS and not _DECIMAL.fullmatch(node.value):
            what = f"{node.value[:60]!r} is not a decimal number; write it in decimal digits, or put it in quotes"
            raise yaml.MarkedYAMLError(None, None, what, node.start_mark)
        try:
            return super().construct_object(node, deep)
        except ValueError as error:
            what = f"{node.value[:60]!r} is not a number or date; put it in quotes"
            raise yaml.MarkedYAMLError(None, None, what, node.start_mark) from error


def parse_yaml(text: str, name: str) -> tuple[Any, dict[Place, int]]:
    """Parses YAML. Returns the value and the line of each key and item. Raises UsageError if the YAML is invalid."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, {}
        return loader.construct_document(node), dict(_lines(node, ()))
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        why = ", ".join(part for part in (error.context, error.problem) if part)
        raise UsageError(f"{name}{line}: not valid YAML: {why}") from error
    except yaml.reader.ReaderError as error:
        line = f":{text.count(chr(10), 0, error.position) + 1}"
        raise UsageError(f"{name}{line}: not valid YAML: {str(error).splitlines()[0]}") from error


def _lines(node: yaml.Node, place: Place) -> Iterator[tuple[Place, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield (*place, key.value), key.start_mark.line + 1
            yield from _lines(value, (*place, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield (*place, index), item.start_mark.line + 1
            yield from _lines(item, (*place, index))


def read_document(path: Path) -> Document:
    try:
        data = read_given(path, MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{path}: cannot read the cluster file: {error.strerror or error}") from error
    if len(data) > MAX_FILE_BYTES:
        raise UsageError(f"{path}: the file is larger than {MAX_FILE_BYTES >> 10} KiB, so it is not a cluster file")
    try:
        text = decode_text(data)
    except ValueError as error:
        raise UsageError(f"{path}: not a cluster file: {error}") from error
    values, lines = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise UsageError(f"{path}: not a cluster file; it must be a mapping of keys like `model:` and `workers:`")
    return Document(str(path), values, {place: f"{path}:{line}" for place, line in lines.items()})


def override(document: Document, overrides: Sequence[str]) -> Document:
    """Applies KEY=VALUE overrides such as workers.a.threads=4. List items are named by their number or their `name`."""
    for text in overrides:
        key, separator, value = text.partition("=")
        option = f"--set {' '.join(text.split())[:_MOST_SHOWN]}"
        if not separator or not key.strip():
            raise UsageError(f"{option} must be KEY=VALUE, for example timeouts.request=60s")
        try:
            parsed, _ = parse_yaml(value, option)
        except UsageError as error:
            quoted = json.dumps(value[:_MOST_SHOWN], ensure_ascii=False)
            raise UsageError(f"{error}; put text in quotes: --set '{key.strip()}={quoted}'") from error
        place = _place(document.values, tuple(key.strip().split(".")), option)
        around = {at: origin for at, origin in document.origins.items() if at[: len(place)] != place}
        origins = around | {place: option}
        document = Document(document.name, _replaced(document.values, place, parsed), origins)
    return document


def _place(values: Any, keys: Sequence[str], text: str) -> Place:
    if not keys:
        return ()
    if isinstance(values, list):
        index = _item(values, keys[0], text)
        return (index, *_place(values[index], keys[1:], text))
    if values is not None and not isinstance(values, dict):
        raise UsageError(f"{text}: {str(values)[:_MOST_SHOWN]!r} has no keys to set")
    return (keys[0], *_place((values or {}).get(keys[0]), keys[1:], text))


def _replaced(values: Any, place: Place, value: Any) -> Any:
    if not place:
        return value
    if isinstance(values, list):
        copy = list(values)
        copy[int(place[0])] = _replaced(values[int(place[0])], place[1:], value)
        return copy
    values = values or {}
    return {**values, place[0]: _replaced(values.get(place[0]), place[1:], value)}


def _item(items: list[Any], key: str, text: str) -> int:
    for index, item in enumerate(items):
        if key == str(index) or (isinstance(item, dict) and item.get("name") == key):
            return index
    names = [str(item.get("name", index)) if isinstance(item, dict) else str(index) for index, item in enumerate(items)]
    raise UsageError(f"{text}: there is no item {key[:_MOST_SHOWN]!r}; the items are {', '.join(names) or 'none'}")
