"""Fair turns at a limited number of concurrent places. An owner with much work delays only its own work."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Turns:
    """Shares places for concurrent work among owners. An owner gets up to `most` places (None: all). A free place goes
    to the waiting owner with the fewest places. Not thread-safe."""

    def __init__(self, places: int, most: int | None = None) -> None:
        self._free = places
        self._most = places if most is None else most
        self._taken: Counter[str] = Counter()  # Number of places held by each owner.
        # Events of each owner's waiting turns. The next turn comes first.
        self._waiting: dict[str, deque[asyncio.Event]] = {}

    @asynccontextmanager
    async def turn(self, owner: str) -> AsyncIterator[None]:
        if self._free and self._taken[owner] < self._most:
            self._free -= 1
            self._taken[owner] += 1
        else:
            await self._wait(owner)
        try:
            yield
        finally:
            self._leave(owner)

    async def _wait(self, owner: str) -> None:
        given = asyncio.Event()
        self._waiting.setdefault(owner, deque()).append(given)
        try:
            await given.wait()
        except asyncio.CancelledError:
            if given.is_set():
                self._leave(owner)
            else:
                self._forget(owner, given)
            raise

    def _leave(self, owner: str) -> None:
        self._taken[owner] -= 1
        self._taken += Counter()
        able = (waiting for waiting in self._waiting if self._taken[waiting] < self._most)
        following = min(able, key=lambda waiting: (self._taken[waiting], waiting == owner), default=None)
        if following is None:
            self._free += 1
            return
        self._taken[following] += 1
        waiting = self._waiting.pop(following)
        waiting.popleft().set()
        if waiting:
            self._waiting[following] = waiting

    def _forget(self, owner: str, given: asyncio.Event) -> None:
        waiting = self._waiting[owner]
        waiting.remove(given)
        if not waiting:
            del self._waiting[owner]
