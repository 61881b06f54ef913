"""Streams on Unix sockets, a connection each: calls and contexts as gRPC's, as far as `client.py` and `server.py` use
these. gRPC has threads of its own, and to change to one and back takes as long as a small stage computes a token.

    u32 length | u8 kind | content      little-endian

A caller sends CALL, messages and perhaps END; the other side ACCEPTED, messages and STATUS, its last.
"""

from __future__ import annotations

import asyncio
import json
import struct
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from enum import IntEnum
from pathlib import Path
from typing import Any, cast

import grpc
from grpc import aio

from llamaclust.wire.microbatch.frames import MAX_FRAME_BYTES

PREFIX = "unix:"
Metadata = tuple[tuple[str, str], ...]
Serve = Callable[[Any, Any], Awaitable[None]]
"""As gRPC calls handlers: with requests, which these read of the context, and the context."""

_EOF: Any = aio.EOF  # type: ignore[attr-defined]
_HEAD = struct.Struct("<IB")
_MOST_CONTROL_BYTES = 1 << 16
_MOST_UNREAD_BYTES = 1 << 22
"""More of messages waits with the sender."""
_PIECE_BYTES = 1 << 18
_RETRY_S = 0.02


class _Kind(IntEnum):
    CALL = 1  # JSON: method, metadata
    ACCEPTED = 2  # JSON: metadata
    MESSAGE = 3
    END = 4  # no more messages come
    STATUS = 5  # JSON: name of a code, details, metadata


class _EndedError(aio.BaseError, grpc.RpcError):  # type: ignore[misc]  # both are Any
    """A stream has ended otherwise than in order."""


class _Connection(asyncio.Protocol):
    """Frames both ways. `on_control` gets all but messages, `on_lost` the end."""

    def __init__(self, on_control: Callable[[_Kind, bytes], None], on_lost: Callable[[], None]) -> None:
        self._on_control = on_control
        self._on_lost = on_lost
        self._transport: asyncio.Transport | None = None
        self._writable = asyncio.Event()
        self._messages: deque[bytes] = deque()
        self._unread_bytes = 0
        self._reader: asyncio.Future[None] | None = None
        self._is_complete = False  # no more messages come
        self._parts: list[bytes] = []  # of a frame that is not here as a whole
        self._have = 0
        self._needed = _HEAD.size

    async def read(self) -> bytes | None:
        """The next message; None where no more come."""
        while not self._messages:
            if self._is_complete:
                return None
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        data = self._messages.popleft()
        if self._unread_bytes > _MOST_UNREAD_BYTES >= self._unread_bytes - len(data) and self._transport is not None:
            self._transport.resume_reading()
        self._unread_bytes -= len(data)
        return data

    def post(self, kind: _Kind, data: bytes = b"") -> None:
        """Sends a small frame, and does not wait. _EndedError where the connection has ended."""
        if self._transport is None or self._transport.is_closing():
            raise _EndedError
        self._transport.write(_HEAD.pack(len(data), kind) + data)

    async def send(self, data: bytes) -> None:
        """Returns when the system has taken nearly all of a message. One at a time; _EndedError where the connection
        has ended. One that is cancelled on its way ends it."""
        if len(data) <= _PIECE_BYTES:
            self.post(_Kind.MESSAGE, data)
            await self._writable.wait()
            return
        transport, view = self._transport, memoryview(data)
        if transport is None or transport.is_closing():
            raise _EndedError
        transport.write(_HEAD.pack(len(data), _Kind.MESSAGE))
        try:
            for start in range(0, len(data), _PIECE_BYTES):
                transport.write(view[start : start + _PIECE_BYTES])
                await self._writable.wait()
        except asyncio.CancelledError:
            transport.abort()
            raise

    def complete(self) -> None:
        """No more messages come."""
        self._is_complete = True
        self._wake()

    def close(self) -> None:
        """After what was sent."""
        if self._transport is not None:
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

    def connection_lost(self, error: Exception | None) -> None:
        self._writable.set()
        self._on_lost()
        self.complete()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def eof_received(self) -> bool:
        return False  # ends say so in a frame

    def data_received(self, data: bytes) -> None:
        if self._have + len(data) < self._needed:
            self._parts.append(data)
            self._have += len(data)
            return
        if self._parts:
            data = b"".join((*self._parts, data))
        start, size = 0, 0
        while len(data) - start >= _HEAD.size:
            size, kind = _HEAD.unpack_from(data, start)
            end = start + _HEAD.size + size
            most = MAX_FRAME_BYTES if kind == _Kind.MESSAGE else _MOST_CONTROL_BYTES
            if size > most or not _Kind.CALL <= kind <= _Kind.STATUS:
                self.abort()
                return
            if len(data) < end:
                break
            self._take(_Kind(kind), data[start + _HEAD.size : end])
            start = end
        rest = data[start:]
        self._parts, self._have = [rest] if rest else [], len(rest)
        self._needed = _HEAD.size + size if len(rest) >= _HEAD.size else _HEAD.size

    def _take(self, kind: _Kind, content: bytes) -> None:
        if kind is _Kind.MESSAGE:
            self._messages.append(content)
            if self._unread_bytes <= _MOST_UNREAD_BYTES < self._unread_bytes + len(content):
                assert self._transport is not None
                self._transport.pause_reading()
            self._unread_bytes += len(content)
            self._wake()
        elif kind is _Kind.END:
            self.complete()
        else:
            try:
                self._on_control(kind, content)
            except (ValueError, TypeError, KeyError):
                self.abort()


class UnixCall:
    """A stream that this process opens; it connects at once. As gRPC's calls."""

    def __init__(self, path: str, method: str, metadata: Metadata, *, wait_for_ready: bool) -> None:
        """`wait_for_ready`: until the other side is there."""
        self._connection = _Connection(self._control, self._lost)
        self._accepted: asyncio.Future[Metadata] = asyncio.get_running_loop().create_future()
        self._status: tuple[grpc.StatusCode, str, Metadata] | None = None
        self._is_done_writing = False
        self.connecting = asyncio.create_task(self._connect(path, [method, metadata], wait_for_ready))

    async def initial_metadata(self) -> Metadata:
        return await asyncio.shield(self._accepted)

    async def write(self, data: bytes) -> None:
        if not self.connecting.done():
            await asyncio.wait([self.connecting])
        if self._status is not None or self._is_done_writing:
            raise _EndedError
        await self._connection.send(data)

    async def read(self) -> Any:
        data = await self._connection.read()
        if data is None and await self.code() is not grpc.StatusCode.OK:
            raise _EndedError
        return _EOF if data is None else data

    async def done_writing(self) -> None:
        if self._status is None:
            self._is_done_writing = True
            self._connection.post(_Kind.END)

    def cancel(self) -> None:
        self._end(grpc.StatusCode.CANCELLED, "the stream was cancelled")
        self._connection.abort()

    async def code(self) -> grpc.StatusCode:
        """Known once `read` or `write` has failed."""
        return grpc.StatusCode.UNKNOWN if self._status is None else self._status[0]

    async def details(self) -> str:
        return "" if self._status is None else self._status[1]

    async def trailing_metadata(self) -> Metadata:
        return () if self._status is None else self._status[2]

    async def _connect(self, path: str, call: list[Any], wait_for_ready: bool) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                await loop.create_unix_connection(lambda: self._connection, path)
                break
            except OSError as error:
                if not wait_for_ready:
                    self._end(grpc.StatusCode.UNAVAILABLE, str(error))
                    return
                await asyncio.sleep(_RETRY_S)
        self._connection.post(_Kind.CALL, json.dumps(call).encode())

    def _control(self, kind: _Kind, content: bytes) -> None:
        if kind is _Kind.ACCEPTED:
            self._accept(_metadata(json.loads(content)))
        elif kind is _Kind.STATUS:
            code, details, metadata = json.loads(content)
            self._end(grpc.StatusCode[code], str(details), _metadata(metadata))
            self._connection.complete()
            self._connection.close()
        else:
            raise ValueError(kind)

    def _accept(self, metadata: Metadata) -> None:
        if not self._accepted.done():
            self._accepted.set_result(metadata)

    def _lost(self) -> None:
        self._end(grpc.StatusCode.UNAVAILABLE, "the socket was closed")

    def _end(self, code: grpc.StatusCode, details: str, metadata: Metadata = ()) -> None:
        if self._status is None:
            self._status = code, details, metadata
            self.connecting.cancel()
            self._accept(())
            self._connection.complete()


class _Context:
    """A stream that another process has opened. As gRPC's contexts; its handler is cancelled where the other side goes
    before it has ended."""

    def __init__(self, server: UnixServer) -> None:
        self.connection = _Connection(self._control, self._lost)
        self.task: asyncio.Task[None] | None = None  # from the call on
        self._server = server
        self._metadata: Metadata = ()
        self._is_over = False
        server.contexts.add(self)

    def invocation_metadata(self) -> Metadata:
        return self._metadata

    def peer(self) -> str:
        return PREFIX

    async def send_initial_metadata(self, metadata: Metadata) -> None:
        self.connection.post(_Kind.ACCEPTED, json.dumps(metadata).encode())

    async def write(self, data: bytes) -> None:
        await self.connection.send(data)

    async def read(self) -> Any:
        data = await self.connection.read()
        if data is None and self._is_over:
            raise _EndedError
        return _EOF if data is None else data

    async def abort(self, code: grpc.StatusCode, details: str, metadata: Metadata = ()) -> None:
        """Always raises."""
        self._end(code, details, metadata)
        raise aio.AbortError

    def cancel(self) -> None:
        self._end(grpc.StatusCode.CANCELLED, "cancelled")
        if self.task is not None:
            self.task.cancel()

    def _end(self, code: grpc.StatusCode, details: str = "", metadata: Metadata = ()) -> None:
        self._is_over = True
        with suppress(_EndedError):
            self.connection.post(_Kind.STATUS, json.dumps([code.name, details, metadata]).encode())
        self.connection.close()

    def _lost(self) -> None:
        self._server.contexts.discard(self)
        if not self._is_over:
            self.cancel()

    def _control(self, kind: _Kind, content: bytes) -> None:
        if kind is not _Kind.CALL or self.task is not None:
            raise ValueError(kind)
        method, metadata = json.loads(content)
        self._metadata = _metadata(metadata)
        self.task = asyncio.create_task(self._run(self._server.handlers.get(str(method))))

    async def _run(self, serve: Serve | None) -> None:
        try:
            if serve is None:
                self._end(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
            else:
                await serve(None, self)
                self._end(grpc.StatusCode.OK)
        except aio.AbortError:
            pass
        except asyncio.CancelledError:
            self._end(grpc.StatusCode.CANCELLED, "cancelled")
            raise


class UnixServer:
    """Listens on a path; as gRPC's servers."""

    def __init__(self, handlers: Mapping[str, Serve]) -> None:
        self.handlers = handlers
        self.contexts: set[_Context] = set()
        self._path = Path()
        self._server: asyncio.Server | None = None

    async def start(self, path: str) -> None:
        """OSError where it cannot be had."""
        self._path = Path(path)
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(self._connected, path, start_serving=False)
        try:
            await self._server.start_serving()
        except BaseException:
            await self.stop(0.0)
            raise

    def _connected(self) -> asyncio.Protocol:
        return _Context(self).connection

    async def stop(self, grace_s: float) -> None:
        """Ends streams after that time at the latest."""
        if self._server is not None:
            self._server.close()
            self._path.unlink(missing_ok=True)
        tasks = [context.task for context in self.contexts if context.task is not None]
        if tasks and grace_s:
            await asyncio.wait(tasks, timeout=grace_s)
        for context in tuple(self.contexts):
            context.cancel()
        await asyncio.sleep(0)


def _metadata(given: Any) -> Metadata:
    """ValueError or TypeError for what is none."""
    return tuple((str(key), str(value)) for key, value in given)
