"""JSON of bodies and replies: rendering in parts, sizes, outlines of large texts, and llama.cpp's timings."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise
from threading import Lock
from typing import Any, Final, TypeAlias, TypeVar

import numpy as np
from pydantic import BaseModel
from pydantic_core import from_json

from llamaclust.cluster.front.text.sharing import Threads, run_on
from llamaclust.cluster.scheduler.requests import PromptProgress, Timings


class DeferredValue(ABC):
    """A part of a JSON value that is computed only while it is rendered, to save memory."""

    __slots__ = ()

    @property
    @abstractmethod
    def entries(self) -> int:
        """Approximate count of numbers and texts in the value."""

    @property
    @abstractmethod
    def held_bytes(self) -> int:
        """Bytes that this object takes in memory."""

    @abstractmethod
    def made(self) -> Any:
        """Returns the JSON value."""


_LINE_ENDS: Final = {
    mark.encode(): f"\\u{ord(mark):04x}".encode()
    for mark in ("\u0085", "\N{LINE SEPARATOR}", "\N{PARAGRAPH SEPARATOR}")
}
"""Characters at which some clients, such as httpx's `iter_lines`, divide lines of a stream, and their JSON escapes."""


def to_json(value: Any) -> bytes:
    """Renders JSON, with iterators as arrays and lone surrogates as '?'. Raises ValueError for NaN and infinity."""
    data = _encoder.encode(value).encode("utf-8", "replace")
    for mark, escape in _LINE_ENDS.items():
        data = data.replace(mark, escape)
    return data


def _made(value: object) -> Any:
    if isinstance(value, DeferredValue):
        return value.made()
    if not isinstance(value, Iterator):
        raise TypeError(f"{type(value).__name__} cannot be written as JSON")
    return list(value)


_encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_made)


MAX_FIELD_VALUES: Final = 1 << 15
"""Maximum number of JSON values in a field that holds no prompt, such as a grammar or a list of texts."""

_BLOCK_BYTES: Final = 1 << 18
"""Number of bytes of a JSON text to scan at a time. NumPy releases the interpreter lock for most of this work."""
_MOST_MEMBERS: Final = 1024
_MOST_NAME_BYTES: Final = 1024
_IS_MARK: Final = np.isin(np.arange(256), [*b"[]{},"])
_DEPTH_CHANGE: Final = np.select([np.isin(np.arange(256), [*b"[{"]), np.isin(np.arange(256), [*b"]}"])], [1, -1])
_NAME: Final = re.compile(rb'\s*("(?:[^"\\]|\\.)*")\s*:', re.DOTALL)


@dataclass(frozen=True, slots=True)
class Member:
    """A field of a top-level JSON object. `values` is the number of JSON values in it, and may be slightly too high."""

    name: str
    size_bytes: int
    values: int
    is_null: bool


@dataclass(frozen=True, slots=True)
class Outline:
    """The sizes of the first 1,024 fields of a top-level JSON object, and the number of all JSON values."""

    members: tuple[Member, ...]
    member_count: int
    values: int  # Number of values in the whole text.


def outline(text: bytes) -> Outline:
    """Counts the values of a JSON object and of its members without parsing it. The result for invalid JSON is
    arbitrary."""
    values = depth = border_count = 0
    # Position of each border between members of the outermost object, and number of values before it.
    borders: list[tuple[int, int]] = []
    is_inside = is_escaped = False  # True if the previous block ended inside a string, or with a backslash.
    for start in range(0, len(text), _BLOCK_BYTES):
        part = b"_" * is_escaped + text[start + is_escaped : start + _BLOCK_BYTES]
        part = part.replace(rb"\\", b"__")
        is_escaped = part.endswith(b"\\")
        block = np.frombuffer(part.replace(rb"\"", b"__"), np.uint8)
        inside = np.logical_xor.accumulate(block == ord('"')) ^ is_inside
        is_inside = bool(inside[-1])
        marks = np.flatnonzero(_IS_MARK[block] & ~inside)
        change = _DEPTH_CHANGE[block[marks]]
        depths = depth + np.cumsum(change)  # Nesting depth after each bracket or comma.
        counts = values + np.cumsum(change >= 0)
        is_begin = (change == 1) & (border_count == 0)
        is_border = ((depths == 1) & ((change == 0) | is_begin)) | ((depths == 0) & (change == -1))
        found = np.flatnonzero(is_border)
        border_count += len(found)
        for border in found[: max(0, _MOST_MEMBERS + 1 - len(borders))]:
            borders.append((start + int(marks[border]), int(counts[border])))
        if len(marks):
            depth, values = int(depths[-1]), int(counts[-1])
    members = tuple(
        Member(
            _name(text[start + 1 : start + 1 + _MOST_NAME_BYTES]),
            end - start - 1,
            values_before_end - before,
            text[max(start + 1, end - _MOST_NAME_BYTES) : end].rstrip().endswith(b"null"),
        )
        for (start, before), (end, values_before_end) in pairwise(borders)
    )
    return Outline(members, max(0, border_count - 1), values + 1)


def _name(text: bytes) -> str:
    match = _NAME.match(text)
    try:
        return "" if match is None else str(from_json(match[1]))
    except ValueError:
        return ""


_LARGE_ENTRIES = 1024
"""Values with more numbers and texts than this are rendered on a thread."""
_GROUP = 16
"""Number of array items to encode at a time. The encoder holds the interpreter lock during this time."""
_PART_BYTES = 1 << 16
_VALUE_BYTES = 8
_ENTRY_CHARACTERS = 64
"""Rendering this number of characters takes about as long as rendering one number."""

_threads = Threads(2, "json")

_Value = TypeVar("_Value")


def is_large(entries: int) -> bool:
    return entries > _LARGE_ENTRIES


async def off_loop_if(is_large: bool, work: Callable[[], _Value]) -> _Value:
    return await run_on(_threads, work) if is_large else work()


def has_many_values(value: Any) -> bool:
    return is_large(entries_of(value))


def entries_of(value: Any) -> int:
    """Estimates how many numbers and texts a value contains. Stops counting when the number is large."""
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
        if isinstance(part, Iterator):
            return _LARGE_ENTRIES + 1
        if is_large(count + len(left)):
            return count + len(left)
    return count


def json_parts(value: Any) -> Generator[bytes, None, None]:
    held = bytearray()
    for piece in _pieces(value):
        held += piece
        if len(held) >= _PART_BYTES:
            yield bytes(held)
            held.clear()
    if held:
        yield bytes(held)


JsonBody: TypeAlias = AsyncGenerator[bytes, None]


async def json_body(make: Callable[[], Any], *, is_large: bool) -> JsonBody:
    """Yields the JSON of the value `make()` in parts. Renders each part on a thread if `is_large`."""
    rendering, parts = Lock(), _made_parts(make)

    def locked(step: Callable[[], _Value]) -> _Value:
        with rendering:
            return step()

    try:
        while part := await off_loop_if(is_large, partial(locked, partial(next, parts, b""))):
            yield part
    finally:
        await off_loop_if(is_large, partial(locked, parts.close))


def _made_parts(make: Callable[[], Any]) -> Generator[bytes, None, None]:
    yield from json_parts(make())


def json_size(value: Any) -> int:
    """Estimates the size of a value's JSON in bytes."""
    if isinstance(value, str):
        return len(value) + _VALUE_BYTES
    if isinstance(value, Mapping):
        return sum(len(key) + json_size(item) for key, item in value.items()) + _VALUE_BYTES
    if isinstance(value, list | tuple):
        return sum(map(json_size, value)) + _VALUE_BYTES
    if isinstance(value, DeferredValue):
        return value.held_bytes + _VALUE_BYTES
    return _VALUE_BYTES


async def size_of_json(value: Any) -> int:
    return await off_loop_if(has_many_values(value), partial(json_size, value)) if value else 0


def _pieces(value: Any) -> Iterator[bytes]:
    if isinstance(value, dict) and has_many_values(value):
        for place, (key, item) in enumerate(value.items()):
            yield (b"," if place else b"{") + to_json(str(key)) + b":"
            yield from _pieces(item)
        yield b"}"
    elif isinstance(value, list | tuple | Iterator) and has_many_values(value):
        yield from _array(value)
    else:
        yield to_json(value)


def _array(value: list[Any] | tuple[Any, ...] | Iterator[Any]) -> Iterator[bytes]:
    begin, items, is_lazy = b"[", iter(value), isinstance(value, Iterator)
    while group := list(islice(items, _GROUP)):
        is_small = is_lazy or not has_many_values(group)
        for part in [[to_json(group)[1:-1]]] if is_small else map(_pieces, group):
            yield begin
            yield from part
            begin = b","
    yield b"[]" if begin == b"[" else b"]"


def shown_timings(timings: Timings) -> dict[str, float]:
    computed = timings.prompt_tokens - timings.cached_tokens
    drafts = {"draft_n": timings.drafted_tokens, "draft_n_accepted": timings.accepted_tokens}
    return {
        "cache_n": timings.cached_tokens,
        **_phase("prompt", computed, computed, timings.prefill_tok_s),
        **_phase("predicted", timings.generated_tokens, max(0, timings.generated_tokens - 1), timings.decode_tok_s),
        **(drafts if timings.drafted_tokens else {}),
    }


def shown_progress(progress: PromptProgress, *, with_timings: bool) -> dict[str, Any]:
    shown = {
        "total": progress.total,
        "cache": progress.cached,
        "processed": progress.processed,
        "time_ms": progress.since_ms,
    }
    computed, seconds = progress.processed - progress.cached, progress.since_ms / 1e3
    prompt = _phase("prompt", computed, computed, computed / seconds if seconds else 0.0)
    timings = {"timings": {"cache_n": progress.cached, **prompt, **_phase("predicted", 0, 0, 0.0)}}
    return {"prompt_progress": shown, **(timings if with_timings else {})}


def _phase(name: str, tokens: int, measured: int, per_second: float) -> dict[str, float]:
    ms = measured / per_second * 1e3 if per_second else 0.0
    return {
        f"{name}_n": tokens,
        f"{name}_ms": ms,
        f"{name}_per_token_ms": ms / measured if measured else 0.0,
        f"{name}_per_second": per_second,
    }
