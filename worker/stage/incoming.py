"""Receives a stream's microbatches. A microbatch is received while the previous microbatch is computed."""

from __future__ import annotations

import asyncio

from llamaclust.wire.rpc.server import ServerStream


class Incoming:
    def __init__(self, stream: ServerStream) -> None:
        self._stream = stream
        self._reading: asyncio.Task[bytes | None] | None = None

    @property
    def is_there(self) -> bool:
        return self._stream.has_message if self._reading is None else self._reading.done()

    def prepare(self) -> None:
        if self._reading is None and not self._stream.is_local:
            self._reading = asyncio.create_task(self._stream.read())

    async def next(self, sending: asyncio.Future[None]) -> bytes | None:
        """Returns the next message, or None at the stream's end. Raises the error of `sending` as soon as it fails."""
        if sending.done():
            sending.result()
        if self._reading is None and (sending.done() or self._stream.has_message):
            return await self._stream.read()
        reading = self._reading = self._reading or asyncio.create_task(self._stream.read())
        if not sending.done():
            await asyncio.wait((reading, sending), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        data = await reading
        self._reading = None
        return data

    async def wait(self, timeout_s: float) -> None:
        if not self.is_there:
            self._reading = self._reading or asyncio.create_task(self._stream.read())
            await asyncio.wait([self._reading], timeout=timeout_s)

    async def close(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)
