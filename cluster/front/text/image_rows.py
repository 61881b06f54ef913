"""Caches rows, the embeddings that the image encoder computes, and limits the memory for rows and image tiles."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from llamaclust.core.errors import ParameterError, QueueFullError
from llamaclust.core.sharing.line import Line
from llamaclust.core.sharing.shares import Shares

Rows = NDArray[np.float32]  # [rows, levels * width]
_RETRY_S: Final = 5.0
_MOST_BYTES: Final = 1 << 30
_SHARE: Final = 16
"""Rows and tiles may take 1 / `_SHARE` of the machine's free memory."""
_KEPT: Final = 4
"""Rows that no request uses may take 1 / `_KEPT` of the memory for rows and tiles."""


@dataclass(frozen=True, slots=True)
class RowLimits:
    """Memory limits. `kept_bytes` limits rows that no request uses, and `held_bytes` limits all rows and tiles."""

    kept_bytes: int = _MOST_BYTES // _KEPT
    held_bytes: int = _MOST_BYTES

    @classmethod
    def of(cls, free_bytes: int) -> Self:
        held_bytes = min(_MOST_BYTES, free_bytes // _SHARE)
        return cls(held_bytes // _KEPT, held_bytes)


class RowMemoryError(QueueFullError):
    """Raised if other requests' images leave too little memory for `size` bytes of rows or tiles."""

    def __init__(self, held_bytes: int, size: int) -> None:
        super().__init__(f"images of other requests take {held_bytes >> 20} MiB; try again", _RETRY_S)
        self.held_bytes = held_bytes
        self.size = size


class RowCache:
    """Limits the memory for images. Caches unused rows by the digest of their image. Not thread-safe."""

    def __init__(self, limits: RowLimits | None = None) -> None:
        self._limits = limits or RowLimits()
        self._kept: OrderedDict[bytes, Rows] = OrderedDict()
        self._freed = asyncio.Event()
        self.owned = Shares(self._limits.held_bytes)
        self.line = Line(self.owned.held)
        self.used_bytes = 0
        self.kept_bytes = 0

    @property
    def held_bytes(self) -> int:
        return self.used_bytes + self.kept_bytes

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._kept

    def reuse(self, digest: bytes) -> Rows | None:
        rows = self._kept.pop(digest, None)
        if rows is not None:
            self.kept_bytes -= rows.nbytes
            self.used_bytes += rows.nbytes
        return rows

    def keep(self, digest: bytes, rows: Rows) -> None:
        """Keeps rows that no request uses any more. The array must own its memory."""
        assert rows.base is None
        self.used_bytes -= rows.nbytes
        if digest not in self._kept:
            self._kept[digest] = rows
            self.kept_bytes += rows.nbytes
        self._kept.move_to_end(digest)
        while self.kept_bytes > self._limits.kept_bytes:
            self._drop()
        self._freed.set()

    def use(self, size: int) -> None:
        self.make_room(size)
        self.used_bytes += size

    def free(self, size: int) -> None:
        self.used_bytes -= size
        self._freed.set()

    def make_room(self, size: int) -> None:
        """Drops unused rows until `size` bytes fit. Raises ParameterError or RowMemoryError."""
        self.check(size)
        if self.used_bytes + size > self._limits.held_bytes:
            raise RowMemoryError(self.held_bytes, size)
        while self.held_bytes + size > self._limits.held_bytes:
            self._drop()

    async def wait_for(self, size: int) -> None:
        """Waits until there is room for `size` bytes. Only the first request in `line` may call this method."""
        while self.used_bytes + size > self._limits.held_bytes:
            self._freed.clear()
            await self._freed.wait()

    def check(self, size: int) -> None:
        """Raises ParameterError if `size` exceeds the limit. `size` is the memory that one request needs at once."""
        most = self._limits.held_bytes
        if size > most:
            what = f"have images that take {size >> 20} MiB; the limit is {most >> 20} MiB"
            raise ParameterError("messages", f"{what}: send fewer or smaller images, or set detail to low")

    def _drop(self) -> None:
        _, rows = self._kept.popitem(last=False)
        self.kept_bytes -= rows.nbytes


class RowLeases:
    def __init__(self) -> None:
        self._held = ExitStack()
        self.own_bytes: dict[bytes, int] = {}  # Bytes of one request's rows, by digest of the image.

    def add(self, release: Callable[[], None]) -> None:
        self._held.callback(release)

    def close(self) -> None:
        self._held.close()
        self.own_bytes = {}

    def moved(self) -> RowLeases:
        other = RowLeases()
        other._held, other.own_bytes, self.own_bytes = self._held.pop_all(), self.own_bytes, {}
        return other

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
