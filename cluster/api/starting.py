"""Replies of the API's port while a cluster starts: 503 to every request."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from typing import Self

from llamaclust.cluster.api.errors import HttpError, error_body, to_json

_MOST = 64  # connections at a time
_HEAD_BYTES = 65536
_READ_S = 5.0
_LEAVE_S = 1.0  # for a client that still sends: one that is cut off sees a reset and no reply


class StartingReplies:
    """Answers on a listening socket, which stays open, while it is entered; `close` it when the API itself answers."""

    def __init__(self, listener: socket.socket) -> None:
        body = to_json(error_body(HttpError(503, "cluster_starting", "the cluster is starting: try again later")))
        head = f"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        self._reply = f"{head}Retry-After: 5\r\nConnection: close\r\n\r\n".encode() + body
        self._listener = listener
        self._open = 0
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._answer, sock=self._listener.dup(), limit=_HEAD_BYTES)
        return self

    async def __aexit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        if self._server is not None:
            self._server.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open += 1
        try:
            if self._open <= _MOST:
                await self._reply_to(reader, writer)
        finally:
            self._open -= 1
            writer.close()

    async def _reply_to(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, OSError):
            async with asyncio.timeout(_READ_S):
                await reader.readuntil(b"\r\n\r\n")
                writer.write(self._reply)
                await writer.drain()
                writer.write_eof()
            async with asyncio.timeout(_LEAVE_S):
                while await reader.read(_HEAD_BYTES):
                    pass
