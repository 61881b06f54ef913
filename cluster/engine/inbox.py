"""Items for one reader, in order."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Inbox(Generic[Item]):
    """Without bounds, and for one reader at a time: a queue of asyncio takes several times as long for an item."""

    __slots__ = ("_items", "_waiting")

    def __init__(self) -> None:
        self._items: deque[Item] = deque()
        self._waiting: asyncio.Future[None] | None = None

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: Item) -> None:
        self._items.append(item)
        self.wake()

    def take(self) -> Item:
        """The next item; there must be one."""
        return self._items.popleft()

    def wake(self) -> None:
        """The reader that waits goes on, item or not."""
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def wait(self) -> None:
        """Returns once there is an item, or upon `wake`."""
        if not self._items:
            self._waiting = asyncio.get_running_loop().create_future()
            try:
                await self._waiting
            finally:
                self._waiting = None

    async def get(self) -> Item:
        """The next item."""
        while not self._items:
            await self.wait()
        return self._items.popleft()
