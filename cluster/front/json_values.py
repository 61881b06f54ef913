"""Values of replies as JSON."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any


class DeferredValue(ABC):
    """A part of a JSON value that is made each time it is rendered: it takes less memory until then."""

    __slots__ = ()

    @property
    @abstractmethod
    def entries(self) -> int:
        """About the numbers and texts in it."""

    @property
    @abstractmethod
    def held_bytes(self) -> int:
        """The memory that it takes."""

    @abstractmethod
    def made(self) -> Any:
        """The value."""


def to_json(value: Any) -> bytes:
    """A value as JSON. Iterators are arrays; numbers that JSON lacks are a mistake of ours; halves of surrogate pairs
    become '?'."""
    return _encoder.encode(value).encode("utf-8", "replace")


def _made(value: object) -> Any:
    if isinstance(value, DeferredValue):
        return value.made()
    if not isinstance(value, Iterator):
        raise TypeError(f"{type(value).__name__} is no JSON")
    return list(value)


_encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_made)
