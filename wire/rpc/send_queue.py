"""Messages on their way into a stream: the sender does not wait until the network has taken them."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import NoReturn, Protocol

from llamaclust.wire.rpc.deadlines import recurring_deadline


class Writable(Protocol):
    """Either end of a stream."""

    async def write(self, data: bytes) -> None: ...


class SendQueue:
    """Messages for one stream, sent in order by `run`. What comes after how many others is its users' matter."""

    def __init__(self, stream: Writable, what: str, seconds: float) -> None:
        """`what`: a message, for errors; `seconds`: what handing on one of them may take."""
        self._stream = stream
        self._what = what
        self._seconds = seconds
        self._waiting: deque[bytes] = deque()
        self._idle: asyncio.Future[None] | None = None

    def put(self, data: bytes) -> None:
        self._waiting.append(data)
        if self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    async def run(self) -> NoReturn:
        """Until it is cancelled. DeadlineError where the network does not take a message, or the stream's error."""
        async with recurring_deadline(self._what, self._seconds) as limit:
            while True:
                await self._filled()
                with limit:
                    await self._stream.write(self._waiting.popleft())

    async def _filled(self) -> None:
        while not self._waiting:
            self._idle = asyncio.get_running_loop().create_future()
            await self._idle
