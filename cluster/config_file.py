"""Reading a cluster file: bounded, safe YAML with the line of every key, and KEY=VALUE overrides."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llamaclust.errors import UsageError

MAX_FILE_BYTES = 1 << 20
MAX_DEPTH = 16

Place = tuple[str | int, ...]
"""Where a value stands: ('workers', 1, 'threads')."""


@dataclass(frozen=True, slots=True)
class Document:
    """A mapping as it was read, with the line (from 1) of each key and item, and a name for messages."""

    name: str
    values: dict[str, Any]
    lines: dict[Place, int]

    def where(self, place: Place) -> str:
        """'FILE:LINE' of the nearest enclosing value that has a line."""
        while place and place not in self.lines:
            place = place[:-1]
        return f"{self.name}:{self.lines[place]}" if place else self.name


class _Loader(yaml.SafeLoader):
    """Safe YAML without aliases (they multiply), double keys (one is lost) or deep nesting (it recurses)."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise self._refusal("aliases (*name) are not accepted")
        if self.depth >= MAX_DEPTH:
            raise self._refusal(f"nested deeper than {MAX_DEPTH} levels")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def _refusal(self, why: str) -> yaml.MarkedYAMLError:
        parser: Any = self  # its methods are untyped
        return yaml.MarkedYAMLError(None, None, why, parser.peek_event().start_mark)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(None, None, "a key must be a plain word", key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(None, None, f"key {key.value!r} stands here twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, name: str) -> tuple[Any, dict[Place, int]]:
    """The value of a YAML text and the lines of its parts. Raises UsageError with the line of a mistake."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, {}
        return loader.construct_document(node), dict(_lines(node, ()))
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UsageError(f"{name}{line}: not valid YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UsageError(f"{name}: not valid YAML: {str(error).splitlines()[0]}") from error


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
    """Reads a cluster file. Raises UsageError where it is missing, too large or not a YAML mapping."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{path}: cannot read the cluster file: {error.strerror or error}") from error
    if len(data) > MAX_FILE_BYTES:
        raise UsageError(f"{path}: larger than {MAX_FILE_BYTES >> 10} KiB; this is not a cluster file")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text (byte {error.start}); this is not a cluster file") from error
    values, lines = parse_yaml(text, str(path))
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UsageError(f"{path}: not a cluster file; it must be a mapping of keys like `model:` and `workers:`")
    return Document(str(path), values, lines)


def override(document: Document, overrides: Sequence[str]) -> Document:
    """The document with each KEY=VALUE set: dotted keys, list items by number or by name."""
    values, lines = document.values, document.lines
    for text in overrides:
        key, separator, value = text.partition("=")
        if not separator or not key.strip():
            raise UsageError(f"--set {text}: write it as KEY=VALUE, for instance timeouts.request=60s")
        parsed, _ = parse_yaml(value, f"--set {key}")
        place = tuple(key.strip().split("."))
        values = _replaced(values, place, parsed, f"--set {text}")
        lines = {at: line for at, line in lines.items() if str(at[0]) != place[0]}
    return Document(document.name, values, lines)


def _replaced(values: Any, place: tuple[str, ...], value: Any, text: str) -> Any:
    """A copy of values, a mapping or a list, with the value at place."""
    if not place:
        return value
    if isinstance(values, list):
        index = _item(values, place[0], text)
        return [*values[:index], _replaced(values[index], place[1:], value, text), *values[index + 1 :]]
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UsageError(f"{text}: {values!r} has no parts to set")
    return {**values, place[0]: _replaced(values.get(place[0]), place[1:], value, text)}


def _item(items: list[Any], key: str, text: str) -> int:
    for index, item in enumerate(items):
        if key == str(index) or (isinstance(item, dict) and item.get("name") == key):
            return index
    names = [str(item.get("name", index)) if isinstance(item, dict) else str(index) for index, item in enumerate(items)]
    raise UsageError(f"{text}: no item {key!r}; there are {', '.join(names) or 'none'}")
