"""A large file over several connections at a time: ranges of it, handed on in their order."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event
from typing import Final

import httpx

CONNECTIONS: Final = 4
_PIECE_BYTES: Final = 8 << 20
_AHEAD: Final = 6
"""Pieces in memory or on their way: one that is slow does not stop the others at once."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Some bytes, and why there are no more of them where the connection was lost."""

    data: bytes
    failure: str | None


@dataclass(frozen=True, slots=True)
class RangeSource:
    """A request. `headers` are those of every request; a validator among them keeps pieces of one file."""

    client: httpx.Client
    url: str
    headers: Mapping[str, str]
    deadline: float  # of time.monotonic()

    def pieces(self, start: int, end: int) -> Iterator[Piece]:
        """Bytes [start, end) in order. After a piece with a failure there is no other."""
        stop = Event()
        ranges = iter([(at, min(at + _PIECE_BYTES, end)) for at in range(start, end, _PIECE_BYTES)])
        with ThreadPoolExecutor(CONNECTIONS, "download") as pool:
            waiting: deque[Future[Piece]] = deque()
            try:
                while True:
                    for first, last in ranges:
                        waiting.append(pool.submit(self._piece, first, last, stop))
                        if len(waiting) == _AHEAD:
                            break
                    if not waiting:
                        return
                    yield (piece := waiting.popleft().result())
                    if piece.failure is not None:
                        return
            finally:
                stop.set()
                pool.shutdown(cancel_futures=True)

    def _piece(self, start: int, end: int, stop: Event) -> Piece:
        data = bytearray()
        headers = {**self.headers, "Range": f"bytes={start}-{end - 1}"}
        try:
            with self.client.stream("GET", self.url, headers=headers) as response:
                wanted = f"bytes {start}-{end - 1}/"
                if response.status_code != httpx.codes.PARTIAL_CONTENT:
                    return Piece(b"", f"the server answered {response.status_code} for a range")
                if not response.headers.get("content-range", "").startswith(wanted):
                    return Piece(b"", "the server answered another range")
                for chunk in response.iter_raw():
                    data += chunk
                    if len(data) > end - start:
                        return Piece(b"", "the server sent more than the requested range")
                    if stop.is_set() or time.monotonic() > self.deadline:
                        return Piece(bytes(data[: end - start]), "the time for this download is over")
        except httpx.TransportError as error:
            return Piece(bytes(data[: end - start]), str(error) or type(error).__name__)
        missing = end - start - len(data)
        return Piece(bytes(data[: end - start]), f"{missing} bytes are missing" if missing > 0 else None)
