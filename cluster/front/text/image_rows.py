"""Rows of images from an encoder: computed once, shared by requests, and bounded together with prepared tiles."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from sys import getrefcount
from typing import Any, Final, Generic, Protocol, Self, TypeVar
from weakref import WeakSet, WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from llamaclust.core.errors import ParameterError, QueueFullError

Rows = NDArray[np.float32]  # [rows, levels * width]
_RETRY_S: Final = 5.0
_MOST_BYTES: Final = 1 << 30
_SHARE: Final = 16
"""The part of a machine's free memory that rows may take is one in this number."""
_KEPT: Final = 4
"""The part of that memory for rows that no request uses is one in this number."""
_REFERENCES: Final = 2
"""The number of references to rows that only the cache has: its own, and that of the call that counts them."""
_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class RowLimits:
    """Limits of memory. `kept_bytes`: rows that no request uses. `held_bytes`: all rows and prepared tiles."""

    kept_bytes: int = _MOST_BYTES // _KEPT
    held_bytes: int = _MOST_BYTES

    @classmethod
    def of(cls, free_bytes: int) -> Self:
        held_bytes = min(_MOST_BYTES, free_bytes // _SHARE)
        return cls(held_bytes // _KEPT, held_bytes)


class RowMemoryError(QueueFullError):
    """Memory for `size` bytes of rows or tiles is short. Requests with images hold the rest."""

    def __init__(self, held_bytes: int, size: int) -> None:
        super().__init__(f"images of other requests take {held_bytes >> 20} MiB; try again", _RETRY_S)
        self.size = size


class Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


class RowCache:
    """Rows of images by digest: the latest, and those in use. Waiting tiles count in the limit. Not thread-safe."""

    def __init__(self, limits: RowLimits | None = None) -> None:
        self._limits = limits or RowLimits()
        self._kept: OrderedDict[bytes, Rows] = OrderedDict()
        self._live: WeakValueDictionary[bytes, Rows] = WeakValueDictionary()
        self._tiles: WeakSet[Sized] = WeakSet()
        self._reserved_bytes = 0
        self.kept_bytes = 0

    @property
    def held_bytes(self) -> int:
        """The memory of kept rows, of those that requests use, of those that are being computed, and of tiles."""
        held = (each.nbytes for each in chain(self._live.values(), self._tiles))
        return sum(held) + self._reserved_bytes

    def get(self, digest: bytes) -> Rows | None:
        rows = self._live.get(digest)
        if rows is not None:
            self._keep(digest, rows)
        return rows

    def put(self, digest: bytes, rows: Rows) -> None:
        """Takes rows that own their memory, so that they live as long as any part of them."""
        assert rows.base is None
        rows.flags.writeable = False
        self._live[digest] = rows
        self._keep(digest, rows)

    def count_tiles(self, tiles: Sized) -> None:
        """Counts the memory of an image's tiles as long as they live. Raises RowMemoryError if there is too little."""
        self.make_room(tiles.nbytes)
        self._tiles.add(tiles)

    @contextmanager
    def reserving(self, size: int) -> Iterator[None]:
        """Reserves memory for rows while they are computed. Raises RowMemoryError if there is too little."""
        self.make_room(size)
        self._reserved_bytes += size
        try:
            yield
        finally:
            self._reserved_bytes -= size

    def make_room(self, size: int) -> None:
        """Forgets unused rows. Raises ParameterError if `size` exceeds the limit, RowMemoryError if others take it."""
        self.check(size)
        lacking_bytes = self.held_bytes + size - self._limits.held_bytes
        if lacking_bytes <= 0:
            return
        unused = dict(self._unused())
        if lacking_bytes > sum(unused.values()):
            raise RowMemoryError(self.held_bytes, size)
        for digest, n_bytes in unused.items():
            if lacking_bytes > 0:
                self._drop(digest)
                lacking_bytes -= n_bytes

    def _unused(self) -> Iterator[tuple[bytes, int]]:
        """Yields the bytes of kept rows that no request uses, the oldest first."""
        for digest in self._kept:
            if getrefcount(self._kept[digest]) <= _REFERENCES:
                yield digest, self._kept[digest].nbytes

    def check(self, size: int) -> None:
        """Raises ParameterError if the images of one request need `size` bytes at a time, more than all may have."""
        most = self._limits.held_bytes
        if size > most:
            what = f"have images that take {size >> 20} MiB; the limit is {most >> 20} MiB"
            raise ParameterError("messages", f"{what}: send fewer or smaller images, or set detail to low")

    def _keep(self, digest: bytes, rows: Rows) -> None:
        self.kept_bytes += 0 if digest in self._kept else rows.nbytes
        self._kept[digest] = rows
        self._kept.move_to_end(digest)
        while self.kept_bytes > self._limits.kept_bytes:
            self._drop(next(iter(self._kept)))

    def _drop(self, digest: bytes) -> None:
        self.kept_bytes -= self._kept.pop(digest).nbytes


@dataclass(slots=True)
class _Running(Generic[_Value]):
    task: asyncio.Task[_Value]
    waiters: int = 0


class SharedComputations(Generic[_Value]):
    """Computations by key, shared by callers with equal keys. A computation without callers is cancelled."""

    def __init__(self) -> None:
        self._running: dict[bytes, _Running[_Value]] = {}

    def __contains__(self, key: bytes) -> bool:
        return key in self._running

    async def get(self, key: bytes, compute: Callable[[], Coroutine[Any, Any, _Value]]) -> _Value:
        running = self._running.get(key)
        if running is None:
            running = self._running[key] = _Running(asyncio.create_task(compute()))
            running.task.add_done_callback(lambda task: self._forget(key, task))
        running.waiters += 1
        try:
            return await asyncio.shield(running.task)
        finally:
            running.waiters -= 1
            if not running.waiters and not running.task.done():
                running.task.cancel()
                self._forget(key, running.task)

    def _forget(self, key: bytes, task: asyncio.Task[_Value]) -> None:
        if (running := self._running.get(key)) is not None and running.task is task:
            del self._running[key]
        if task.done() and not task.cancelled():
            task.exception()  # else it is logged if all callers are cancelled
