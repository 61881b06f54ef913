"""Performs handshakes with all connections that claim to come from a member, so that a false claim delays no member."""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

from llamaclust.kernels._native import Link, LinkError
from llamaclust.worker.groups.callers import caller_of, of_the_most

MOST_HANDSHAKES = 8
"""Maximum number of concurrent handshakes for one member of a group. Each handshake takes a thread."""


@dataclass(frozen=True, slots=True)
class _Claim:
    host: str
    connection: socket.socket  # A copy, because the handshake owns the original descriptor.

    def end(self) -> None:
        with suppress(OSError):  # The other end has closed the connection.
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()


class Handshakes:
    """Performs handshakes concurrently. At the end of the context, closes connections whose handshake is incomplete."""

    def __init__(self, prove: Callable[[socket.socket], Awaitable[Link]], failed: Callable[[LinkError], None]) -> None:
        self._prove, self._failed = prove, failed
        self._claims: dict[asyncio.Task[Link], _Claim] = {}
        self._proven: asyncio.LifoQueue[Link] = asyncio.LifoQueue()

    def take(self, connection: socket.socket) -> None:
        """Begins a handshake. If there are too many, ends another one. Raises OSError if no file descriptor is free."""
        claim = _Claim(caller_of(connection), connection.dup())
        if len(self._claims) >= MOST_HANDSHAKES:
            crowd = of_the_most({task: each.host for task, each in self._claims.items()})
            # A random choice, because the oldest may be the real member's.
            self._claims.pop(secrets.choice(crowd)).end()
        task = asyncio.ensure_future(self._prove(connection))
        self._claims[task] = claim
        task.add_done_callback(self._ended)

    async def proven(self) -> Link:
        """Waits for a completed handshake. Returns the newest link, because the member no longer uses older links."""
        return await self._proven.get()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        while self._claims:
            self._claims.popitem()[1].end()

    def _ended(self, task: asyncio.Task[Link]) -> None:
        claim = self._claims.pop(task, None)
        if claim is not None:
            claim.connection.close()
        if task.cancelled():
            return
        error = task.exception()
        if error is None and claim is not None:
            self._proven.put_nowait(task.result())
        elif isinstance(error, LinkError):
            self._failed(error)
        elif error is not None:
            raise error
