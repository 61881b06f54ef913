"""JSON of large replies: rendered in parts on threads, so that the event loop serves others meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, TypeVar

from pydantic import BaseModel

from llamaclust.cluster.front.json_values import DeferredValue, to_json
from llamaclust.cluster.front.text.threads import Threads, run_on

_LARGE_ENTRIES = 1024
"""A part of a reply that has more tokens and logprobs is rendered on a thread."""
_GROUP = 16
"""Items of an iterator that are encoded in one go; no other thread runs meanwhile."""
_PART_BYTES = 1 << 16
_VALUE_BYTES = 8
_ENTRY_CHARACTERS = 64
"""Of a text, which take about as long as a number."""

_threads = Threads(2, "json")
"""Few: each waits for the interpreter beside the event loop, and more render no faster."""

_Value = TypeVar("_Value")


def is_large(entries: int) -> bool:
    return entries > _LARGE_ENTRIES


async def off_loop_if(is_large: bool, work: Callable[[], _Value]) -> _Value:
    return await run_on(_threads, work) if is_large else work()


async def off_loop_if_large(work: Callable[[], _Value], entries: int) -> _Value:
    return await off_loop_if(is_large(entries), work)


def has_many_values(value: Any) -> bool:
    """Whether to render it takes long; no more of it is counted than needed."""
    left, count = [value], 0
    while left:
        part = left.pop()
        count += 1
        if isinstance(part, str):
            count += len(part) // _ENTRY_CHARACTERS
        elif isinstance(part, dict):
            left.extend(part.values())
        elif isinstance(part, BaseModel):
            left.extend(vars(part).values())
        elif isinstance(part, list | tuple):
            left.extend(part)
        elif isinstance(part, DeferredValue):
            count += part.entries
        if is_large(count + len(left)) or isinstance(part, Iterator):
            return True
    return False


def json_parts(value: Any) -> Generator[bytes, None, None]:
    """Yields the text of `to_json` in parts. They are rendered as they are taken, and so are the items of iterators
    (arrays in JSON)."""
    held = bytearray()
    for piece in _pieces(value):
        held += piece
        if len(held) >= _PART_BYTES:
            yield bytes(held)
            held.clear()
    if held:
        yield bytes(held)


def json_size(value: Any) -> int:
    """About the bytes of a value's JSON, without rendering it: its texts, and some for each value. For deferred ones,
    those that they hold."""
    if isinstance(value, str):
        return len(value) + _VALUE_BYTES
    if isinstance(value, Mapping):
        return sum(len(key) + json_size(item) for key, item in value.items()) + _VALUE_BYTES
    if isinstance(value, list | tuple):
        return sum(map(json_size, value)) + _VALUE_BYTES
    if isinstance(value, DeferredValue):
        return value.held_bytes + _VALUE_BYTES
    return _VALUE_BYTES


def _pieces(value: Any) -> Iterator[bytes]:
    if not has_many_values(value):
        yield to_json(value)
    elif isinstance(value, dict):
        members = ((to_json(str(key)) + b":", item) for key, item in value.items())
        yield from _joined(b"{", members, b"}")
    elif isinstance(value, list | tuple):
        yield from _joined(b"[", ((b"", item) for item in value), b"]")
    elif isinstance(value, Iterator):
        yield from _array(value)
    else:
        yield to_json(value)


def _joined(begin: bytes, members: Iterable[tuple[bytes, Any]], end: bytes) -> Iterator[bytes]:
    yield begin
    for place, (key, item) in enumerate(members):
        yield b"," + key if place else key
        yield from _pieces(item)
    yield end


def _array(items: Iterator[Any]) -> Iterator[bytes]:
    comma = b"["
    while group := list(islice(items, _GROUP)):
        yield comma
        yield to_json(group)[1:-1]
        comma = b","
    yield b"[]" if comma == b"[" else b"]"
