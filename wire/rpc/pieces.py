"""Sends long messages on gRPC streams in pieces, so that a receiver can limit the number of bytes that it accepts."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from grpc import aio

from llamaclust.core.errors import ProtocolError
from llamaclust.wire.rpc.methods import PIECE_BYTES

_EOF: Any = aio.EOF  # type: ignore[attr-defined]


def pieces_of(message: bytes) -> Iterator[bytes]:
    """Yields the message in pieces of PIECE_BYTES bytes. The last piece is shorter and may be empty."""
    if len(message) < PIECE_BYTES:
        yield message
        return
    for start in range(0, len(message) + 1, PIECE_BYTES):
        yield message[start : start + PIECE_BYTES]


async def read_message(read: Callable[[], Awaitable[Any]], most_bytes: int) -> bytes | None:
    """Reads a message, or returns None at the stream's end. Raises ProtocolError if it is too long or incomplete."""
    data: Any = await read()
    if data is _EOF:
        return None
    if len(data) < PIECE_BYTES:
        return whole(data, most_bytes)
    parts, size = [data], len(data)
    # An error must not keep the message's bytes in memory.
    del data
    while len(parts[-1]) == PIECE_BYTES:
        if size > most_bytes:
            parts.clear()
            raise too_large(size, most_bytes)
        if (piece := await read()) is _EOF:
            parts.clear()
            raise ProtocolError(f"the stream ended inside a message, after {size} bytes")
        parts.append(piece)
        size += len(piece)
    joined = b"".join(parts)
    parts.clear()
    return whole(joined, most_bytes)


def whole(data: bytes, most_bytes: int) -> bytes:
    if (size := len(data)) > most_bytes:
        del data
        raise too_large(size, most_bytes)
    return data


def too_large(size: int, most_bytes: int) -> ProtocolError:
    return ProtocolError(f"a message has {size} bytes or more; the limit is {most_bytes}")
