"""A queue of requests that wait for a resource such as memory. Only the first request may take from the resource."""

from __future__ import annotations

import asyncio
from collections import Counter
from types import TracebackType
from typing import Self


class Line:
    """A queue of requests that wait for a resource and hold none of it. When the first request leaves, a request of
    the owner that holds the least of the resource comes next. Not thread-safe."""

    def __init__(self, held: Counter[str]) -> None:
        self._held = held
        self._first: Place | None = None
        self._waiting: list[Place] = []

    def place(self, owner: str) -> Place:
        return Place(self, owner)

    def __len__(self) -> int:
        return len(self._waiting) + self.is_busy

    @property
    def is_busy(self) -> bool:
        return self._first is not None

    def is_first(self, place: Place) -> bool:
        return self._first is place

    def is_open(self, place: Place) -> bool:
        """True if `place` may take from the resource, because `place` is first or the queue is empty."""
        return self._first in (None, place)

    async def enter(self, place: Place) -> None:
        if self._first is None:
            self._first = place
        if self._first is not place:
            self._waiting.append(place)
            await place.called.wait()

    def leave(self, place: Place) -> None:
        if place in self._waiting:
            self._waiting.remove(place)
        if self._first is place:
            self._first = min(self._waiting, key=lambda each: self._held[each.owner], default=None)
            if self._first is not None:
                self._waiting.remove(self._first)
                self._first.called.set()


class Place:
    """A request's place in the queue. `enter` waits until this place is first. Leaving `with` gives up the place."""

    def __init__(self, line: Line, owner: str) -> None:
        self.owner = owner
        self.called = asyncio.Event()
        self._line = line

    @property
    def is_first(self) -> bool:
        return self._line.is_first(self)

    @property
    def is_open(self) -> bool:
        return self._line.is_open(self)

    async def enter(self) -> None:
        await self._line.enter(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._line.leave(self)
