"""A queue of messages for a stream. Its senders never wait for the network."""

from __future__ import annotations

import asyncio
from typing import NoReturn, Protocol

from llamaclust.wire.rpc.deadlines import recurring_deadline


class Writable(Protocol):
    async def write(self, *messages: bytes) -> None: ...


class Sink(Writable, Protocol):
    def try_write(self, *messages: bytes) -> bool: ...


class SendQueue:
    def __init__(self, stream: Sink, what: str, seconds: float) -> None:
        """Creates a queue. `run` raises a DeadlineError about `what` if a message takes longer than `seconds` s."""
        self._stream = stream
        self._what = what
        self._seconds = seconds
        self._waiting: asyncio.Queue[bytes] = asyncio.Queue()
        self._is_writing = False

    def put(self, *messages: bytes) -> None:
        """Sends the messages at once if the queue is empty and the stream accepts them. Otherwise queues them."""
        if self._is_writing or not self._waiting.empty() or not self._stream.try_write(*messages):
            for data in messages:
                self._waiting.put_nowait(data)

    async def run(self) -> NoReturn:
        """Sends queued messages. Raises the stream's error, or DeadlineError if one message takes too long."""
        async with recurring_deadline(self._what, self._seconds) as limit:
            while True:
                data = await self._waiting.get()
                self._is_writing = True
                with limit:
                    await self._stream.write(data)
                self._is_writing = False
