"""Frames on a Unix socket, in both directions. A frame is: u32 length | u8 kind | content, little-endian."""

from __future__ import annotations

import asyncio
import os
import struct
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from enum import IntEnum
from typing import cast

import grpc
from grpc import aio

_HEAD = struct.Struct("<IB")
_MOST_CONTROL_BYTES = 1 << 16
_MOST_UNREAD_BYTES = 1 << 22
"""Maximum bytes of unread messages. Above it, the connection stops receiving, so that the sender waits."""
_MESSAGE_BYTES = 64
"""The memory that a message takes in addition to its content, in bytes."""
_PIECE_BYTES = 1 << 18
CALL_S = 10.0
"""Maximum seconds until a new connection has sent its CALL frame, which names a method."""
_BUFFER_BYTES = 1 << 16


class FrameKind(IntEnum):
    CALL = 1  # Content is JSON: [method, metadata].
    ACCEPTED = 2  # Content is JSON: metadata.
    MESSAGE = 3
    END = 4  # The sender will send no more messages.
    STATUS = 5  # Content is JSON: [name of the status code, details, metadata].


class EndedError(aio.BaseError, grpc.RpcError):
    """The stream has ended, usually with an error."""


class _LargeFrame:
    __slots__ = ("_filled", "_size", "content", "kind")

    def __init__(self, kind: FrameKind, size: int, first: memoryview) -> None:
        self.kind = kind
        self.content = bytearray(first)
        self._size = size
        self._filled = len(first)

    @property
    def free(self) -> memoryview:
        """The memory for the next bytes. It grows as bytes arrive, because the size stated by the peer may be wrong."""
        if self._filled == len(self.content):
            self.content.extend(bytes(min(max(self._filled, _PIECE_BYTES), self._size - self._filled)))
        return memoryview(self.content)[self._filled :]

    def add(self, count: int) -> bool:
        self._filled += count
        return self._filled == self._size


def _joined(messages: tuple[bytes, ...]) -> bytes:
    return b"".join([part for data in messages for part in (_HEAD.pack(len(data), FrameKind.MESSAGE), data)])


def _pieces(messages: tuple[bytes, ...]) -> Iterator[bytes | memoryview]:
    for data in messages:
        yield _HEAD.pack(len(data), FrameKind.MESSAGE)
        for start in range(0, len(data), _PIECE_BYTES):
            yield memoryview(data)[start : start + _PIECE_BYTES]


class UnixConnection(asyncio.BufferedProtocol):
    """Sends and receives frames. Calls `on_control` with each frame other than MESSAGE and END, and `on_lost` when the
    connection ends. A message longer than `most_bytes` ends the connection."""

    def __init__(
        self,
        on_control: Callable[[FrameKind, bytes], None],
        on_lost: Callable[[], None],
        most_bytes: int,
        *,
        awaits_call: bool = False,
    ) -> None:
        self.most_bytes = most_bytes
        self.refusal: str | None = None  # Error text if a received message was too large.
        self._awaits_call = awaits_call
        self._on_control = on_control
        self._on_lost = on_lost
        self._transport: asyncio.Transport | None = None
        self._writable = asyncio.Event()
        self._is_sending = False  # True while a large message is being sent in pieces.
        self._behind = bytearray()  # Small frames to send after the large message.
        self._is_closing = False  # True if the connection closes when everything has been sent.
        self._messages: deque[bytes] = deque()
        self._unread_bytes = 0
        self._reader: asyncio.Future[None] | None = None
        self._is_complete = False  # True if no more messages will come.
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        self._filled = 0
        self._large: _LargeFrame | None = None  # Large frame that is being received.

    @property
    def has_message(self) -> bool:
        return bool(self._messages)

    async def read(self) -> bytes | None:
        while not self._messages:
            if self._is_complete:
                return None
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        data = self._messages.popleft()
        size = len(data) + _MESSAGE_BYTES
        if self._unread_bytes > _MOST_UNREAD_BYTES >= self._unread_bytes - size and self._transport is not None:
            self._transport.resume_reading()
        self._unread_bytes -= size
        return data

    def post(self, kind: FrameKind, data: bytes = b"") -> None:
        """Sends or queues a small frame without waiting. Raises EndedError if the connection has ended."""
        frame = _HEAD.pack(len(data), kind) + data
        if self._is_sending:
            self._behind += frame
        else:
            self._write(frame)

    def _write(self, data: bytes) -> None:
        if self._transport is None or self._transport.is_closing():
            raise EndedError
        self._transport.write(data)

    def try_send(self, *messages: bytes) -> bool:
        """Sends small messages with one system call. Returns False and sends nothing if sending would have to wait."""
        transport = self._transport
        if transport is None or transport.is_closing() or self._is_sending or not self._writable.is_set():
            return False
        if sum(map(len, messages)) > _PIECE_BYTES:
            return False
        self._write(_joined(messages))
        return True

    async def send(self, *messages: bytes) -> None:
        """Sends messages and waits until the operating system has accepted nearly all bytes. Only one call may run at a
        time. A cancelled call may end the connection."""
        if sum(map(len, messages)) > _PIECE_BYTES:
            await self._send_in_pieces(messages)
            return
        self._write(_joined(messages))
        await self._writable.wait()

    async def _send_in_pieces(self, messages: tuple[bytes, ...]) -> None:
        transport = self._transport
        if transport is None or transport.is_closing():
            raise EndedError
        self._is_sending = True
        try:
            for piece in _pieces(messages):
                transport.write(piece)
                await self._writable.wait()
                if transport.is_closing():
                    raise EndedError
            behind, self._behind = self._behind, bytearray()
            if behind:
                transport.write(behind)
        except asyncio.CancelledError:
            transport.abort()
            raise
        finally:
            self._is_sending = False
            if self._is_closing:
                transport.close()

    def complete(self) -> None:
        self._is_complete = True
        self._wake()

    def close(self) -> None:
        self._is_closing = True
        if self._transport is not None and not self._is_sending:
            self._transport.close()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    # -- called by the event loop ----------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._writable.set()
        if self._awaits_call:
            asyncio.get_running_loop().call_later(CALL_S, self._end_silent)

    def _end_silent(self) -> None:
        if self._awaits_call:
            self.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._writable.set()
        if error is not None:
            self._take_rest()
        self._on_lost()
        self.complete()

    def _take_rest(self) -> None:
        """Receives an ended connection's last frames, because the event loop stops reading after a failed write."""
        assert self._transport is not None
        descriptor = self._transport.get_extra_info("socket").fileno()
        with suppress(OSError):  # Nothing more can be read.
            while self._unread_bytes <= _MOST_UNREAD_BYTES and (count := os.readv(descriptor, [self.get_buffer(-1)])):
                self.buffer_updated(count)

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def eof_received(self) -> bool:
        return False  # Closes the transport. A regular end was announced by a frame before.

    def get_buffer(self, _: int) -> memoryview:
        return self._buffer[self._filled :] if self._large is None else self._large.free

    def buffer_updated(self, count: int) -> None:
        if self._large is None:
            self._filled += count
            self._take_frames()
        elif self._large.add(count):
            large, self._large = self._large, None
            self._take(large.kind, bytes(large.content))

    def _take_frames(self) -> None:
        buffer, start, end = self._buffer, 0, self._filled
        while end - start >= _HEAD.size:
            size, kind = _HEAD.unpack_from(buffer, start)
            most = self.most_bytes if kind == FrameKind.MESSAGE else _MOST_CONTROL_BYTES
            is_first = not self._awaits_call or kind == FrameKind.CALL
            if kind == FrameKind.MESSAGE and size > most:
                self.refusal = f"a message has {size} bytes; the limit is {most}"
            if size > most or not is_first or not FrameKind.CALL <= kind <= FrameKind.STATUS:
                self.abort()
                return
            content = buffer[start + _HEAD.size : min(end, start + _HEAD.size + size)]
            if len(content) < size:
                if _HEAD.size + size > len(buffer):
                    self._large = _LargeFrame(FrameKind(kind), size, content)
                    end = start
                break
            start += _HEAD.size + size
            self._take(FrameKind(kind), bytes(content))
        buffer[: end - start] = buffer[start:end]
        self._filled = end - start

    def _take(self, kind: FrameKind, content: bytes) -> None:
        if kind is FrameKind.MESSAGE:
            self._messages.append(content)
            size = len(content) + _MESSAGE_BYTES
            if self._unread_bytes <= _MOST_UNREAD_BYTES < self._unread_bytes + size:
                assert self._transport is not None
                self._transport.pause_reading()
            self._unread_bytes += size
            self._wake()
        elif kind is FrameKind.END:
            self.complete()
        else:
            self._awaits_call = False
            try:
                self._on_control(kind, content)
            except (ValueError, TypeError, KeyError, RecursionError):
                self.abort()
