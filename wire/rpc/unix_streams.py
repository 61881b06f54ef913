"""Streams on Unix sockets, each on its own connection. Between processes of one machine, they are faster than gRPC. The
caller sends CALL, messages and optionally END. The server sends ACCEPTED, messages and finally STATUS."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
from grpc import aio

from llamaclust.wire.rpc.methods import METHODS
from llamaclust.wire.rpc.unix_connection import EndedError, FrameKind, UnixConnection

PREFIX = "unix:"
Metadata = tuple[tuple[str, str], ...]
Serve = Callable[[Any, Any], Awaitable[None]]
"""A handler with gRPC's signature (requests, context). It ignores the requests and reads from the context."""

_EOF: Any = aio.EOF  # type: ignore[attr-defined]
_RETRY_S = 0.02


class UnixCall:
    """A stream that this process opens, with the interface of gRPC's calls. The constructor starts to connect."""

    def __init__(self, path: str, method: str, metadata: Metadata, most_bytes: int, *, wait_for_ready: bool) -> None:
        self._connection = UnixConnection(self._control, self._lost, most_bytes)
        self._accepted: asyncio.Future[Metadata] = asyncio.get_running_loop().create_future()
        self._status: tuple[grpc.StatusCode, str, Metadata] | None = None
        self._is_done_writing = False
        self.connecting = asyncio.create_task(self._connect(path, [method, metadata], wait_for_ready))

    async def initial_metadata(self) -> Metadata:
        return await asyncio.shield(self._accepted)

    async def write(self, *messages: bytes) -> None:
        if not self.connecting.done():
            await asyncio.wait([self.connecting])
        if self._status is not None or self._is_done_writing:
            raise EndedError
        await self._connection.send(*messages)

    def try_write(self, *messages: bytes) -> bool:
        return self._status is None and not self._is_done_writing and self._connection.try_send(*messages)

    @property
    def has_message(self) -> bool:
        return self._connection.has_message

    async def read(self) -> Any:
        data = await self._connection.read()
        if data is None and await self.code() is not grpc.StatusCode.OK:
            raise EndedError
        return _EOF if data is None else data

    async def done_writing(self) -> None:
        if self._status is None:
            self._is_done_writing = True
            self._connection.post(FrameKind.END)

    def cancel(self) -> None:
        self._end(grpc.StatusCode.CANCELLED, "the stream was cancelled")
        self._connection.abort()

    async def code(self) -> grpc.StatusCode:
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
        with suppress(EndedError):  # `_lost` reports the end.
            self._connection.post(FrameKind.CALL, json.dumps(call).encode())

    def _control(self, kind: FrameKind, content: bytes) -> None:
        if kind is FrameKind.ACCEPTED:
            self._accept(_metadata(json.loads(content)))
        elif kind is FrameKind.STATUS:
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
        if (refusal := self._connection.refusal) is not None:
            self._end(grpc.StatusCode.RESOURCE_EXHAUSTED, refusal)
        self._end(grpc.StatusCode.UNAVAILABLE, "the socket was closed")

    def _end(self, code: grpc.StatusCode, details: str, metadata: Metadata = ()) -> None:
        if self._status is None:
            self._status = code, details, metadata
            self.connecting.cancel()
            self._accept(())
            self._connection.complete()


class UnixContext:
    """The server's side of a stream that a peer opened, with the interface of gRPC's contexts."""

    def __init__(self, server: UnixServer) -> None:
        self.connection = UnixConnection(self._control, self._lost, 0, awaits_call=True)
        self.task: asyncio.Task[None] | None = None  # Set when the call arrives.
        self._server = server
        self._metadata: Metadata = ()
        self._is_over = False
        server.contexts.add(self)

    def invocation_metadata(self) -> Metadata:
        return self._metadata

    def peer(self) -> str:
        return PREFIX

    async def send_initial_metadata(self, metadata: Metadata) -> None:
        self.connection.post(FrameKind.ACCEPTED, json.dumps(metadata).encode())

    async def write(self, *messages: bytes) -> None:
        await self.connection.send(*messages)

    async def read(self) -> Any:
        data = await self.connection.read()
        if data is None and self._is_over:
            raise EndedError
        return _EOF if data is None else data

    async def abort(self, code: grpc.StatusCode, details: str, metadata: Metadata = ()) -> None:
        self._end(code, details, metadata)
        raise aio.AbortError

    def cancel(self) -> None:
        self._end(grpc.StatusCode.CANCELLED, "cancelled")
        if self.task is not None:
            self.task.cancel()

    def _end(self, code: grpc.StatusCode, details: str = "", metadata: Metadata = ()) -> None:
        self._is_over = True
        with suppress(EndedError):
            self.connection.post(FrameKind.STATUS, json.dumps([code.name, details, metadata]).encode())
        self.connection.close()

    def _lost(self) -> None:
        self._server.contexts.discard(self)
        if not self._is_over:
            self.cancel()

    def _control(self, kind: FrameKind, content: bytes) -> None:
        if kind is not FrameKind.CALL or self.task is not None:
            raise ValueError(kind)
        method, metadata = json.loads(content)
        self._metadata = _metadata(metadata)
        serve = self._server.handlers.get(str(method))
        if serve is not None:
            self.connection.most_bytes = METHODS[str(method)].request_bytes
        self.task = asyncio.create_task(self._run(serve))

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
    def __init__(self, handlers: Mapping[str, Serve]) -> None:
        self.handlers = handlers
        self.contexts: set[UnixContext] = set()
        self._path = Path()
        self._server: asyncio.Server | None = None

    async def start(self, path: str) -> None:
        self._path = Path(path)
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(self._connected, path, start_serving=False)
        try:
            await self._server.start_serving()
        except BaseException:
            await self.stop(0.0)
            raise

    def _connected(self) -> asyncio.BaseProtocol:
        return UnixContext(self).connection

    async def stop(self, grace_s: float) -> None:
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
    return tuple((str(key), str(value)) for key, value in given)
