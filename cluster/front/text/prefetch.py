"""Prepares the images of a prompt in order. The next images are prepared while the caller works with one image."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, Final, Generic, Protocol, TypeVar

from llamaclust.cluster.front.text.image_rows import RowMemoryError
from llamaclust.cluster.front.text.images import ImageSource
from llamaclust.core.errors import RequestError
from llamaclust.model.images.preparation import RefusedImageError

_SIDE_BY_SIDE: Final = 2
"""Number of images to prepare at a time for one prompt."""


class Releasable(Protocol):
    def release(self) -> None: ...


_Result = TypeVar("_Result", bound=Releasable)
_Any = TypeVar("_Any")


class Prefetch(Generic[_Result]):
    """Calls `begin` for the next images ahead of time. The caller takes the results in order and releases them."""

    def __init__(
        self,
        sources: Iterable[ImageSource],
        begin: Callable[[ImageSource], Coroutine[Any, Any, _Result]],
        room: Callable[[int, int], Awaitable[None]],
    ) -> None:
        """`room(own_bytes, size)` waits for `size` bytes for a request that has `own_bytes`. Raises RowMemoryError."""
        self._sources = deque(sources)
        self._count = len(self._sources)
        self._begin = begin
        self._room = room
        self._tasks: deque[asyncio.Task[_Result]] = deque()

    async def next(self, own_bytes: int) -> _Result:
        """Returns the next image's result. Raises RequestError, which names the image, if an image is refused."""
        self._begin_tasks(_SIDE_BY_SIDE)
        try:
            result = await self.with_room(self._first, own_bytes)
        except RefusedImageError as error:
            if self._count == 1:
                raise
            raise RequestError(f"image {self._count - len(self._sources) + 1} of {self._count}: {error}") from None
        self._sources.popleft()
        self._tasks.popleft()
        self._begin_tasks(_SIDE_BY_SIDE)
        return result

    async def with_room(self, work: Callable[[], Awaitable[_Any]], own_bytes: int) -> _Any:
        """Calls `work`. If memory is short, waits for memory and calls `work` again. Raises RequestError if
        the memory never becomes free."""
        while True:
            try:
                return await work()
            except RowMemoryError as error:
                size = error.size
            await self.aclose()
            await self._room(own_bytes, size)

    async def aclose(self) -> None:
        """Drops the prepared results. `next` prepares them again."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)  # Unlike `gather`, `wait` does not hold the results.
        while self._tasks:
            task = self._tasks.popleft()
            # Reading the exception keeps asyncio from logging it.
            if not task.cancelled() and task.exception() is None:
                task.result().release()

    async def _first(self) -> _Result:
        self._begin_tasks(1)
        return await self._tasks[0]

    def _begin_tasks(self, most: int) -> None:
        while len(self._tasks) < min(most, len(self._sources)):
            self._tasks.append(asyncio.create_task(self._begin(self._sources[len(self._tasks)])))
