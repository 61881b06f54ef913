"""A client of the enrolment port that sends any messages."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from llamaclust.wire.rpc.deadlines import deadline
from llamaclust.wire.security.enrolment import (
    Challenge,
    Request,
    ServerMessage,
    decode_server_message,
    encode_request,
    read_message,
    write_message,
)


class Raw:
    """A client that may send any message at any time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def hear(self) -> ServerMessage | None:
        async with deadline("an answer", 60):
            data = await read_message(self.reader)
        return None if data is None else decode_server_message(data)

    async def challenge(self) -> Challenge:
        challenge = await self.hear()
        assert isinstance(challenge, Challenge)
        return challenge

    async def say(self, request: Request) -> ServerMessage | None:
        await write_message(self.writer, encode_request(request))
        return await self.hear()


@asynccontextmanager
async def raw(host: str, port: int) -> AsyncIterator[Raw]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    reader, writer = await asyncio.open_connection(host, port, ssl=context)
    try:
        yield Raw(reader, writer)
    finally:
        writer.transport.abort()
