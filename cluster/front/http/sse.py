"""Replies that are sent in parts, as server-sent events, JSON lines, or JSON. They end if the client disconnects."""

from __future__ import annotations

import asyncio
import logging
from abc import abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from enum import Enum
from typing import Any, Final, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llamaclust.cluster.front.errors import failure_of, internal_error
from llamaclust.cluster.front.http.responses import BODY_WRITER, shape_of
from llamaclust.cluster.front.json_text import has_many_values, json_body, to_json
from llamaclust.core.errors import LlamaclustError

DONE: Final = b"[DONE]"

_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
Close = Callable[[bool], Awaitable[None]]
_Value = TypeVar("_Value")

_log = logging.getLogger(__name__)


class StreamFormat(Enum):
    EVENTS = "text/event-stream"
    LINES = "application/x-ndjson"

    @property
    def has_ids(self) -> bool:
        return self is StreamFormat.EVENTS

    @property
    def keepalive(self) -> bytes:
        return b": waiting\n\n" if self is StreamFormat.EVENTS else b""

    def part(self, data: bytes, name: str = "", event_id: str = "") -> bytes:
        if self is StreamFormat.LINES:
            return data + b"\n"
        head = f"id: {event_id}\n" if event_id else ""
        return b"%bdata: %b\n\n" % ((f"{head}event: {name}\n" if name else head).encode(), data)

    def error(self, scope: Scope, error: LlamaclustError, fields: Mapping[str, Any]) -> bytes:
        """Renders an error as the last part of a stream. `fields` are those of `View.error_fields`."""
        events = shape_of(scope).ending(failure_of(error), fields)
        return b"".join(self.part(to_json(value), name) for name, value in events)


class PartsResponse(Response):
    """Sends the parts of a body as they arrive. Calls `close` at the end, with True if all parts were sent."""

    def __init__(
        self,
        parts: AsyncGenerator[bytes, None],
        close: Close | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(headers=headers)
        del self.headers["content-length"]
        self._parts = parts
        self._close = close
        self._is_cut = self._is_sent = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await first_of(self._send(scope, send), self._watch(receive))
        finally:
            await self._parts.aclose()
            if self._close is not None:
                await self._close(self._is_sent)

    @abstractmethod
    async def _send(self, scope: Scope, send: Send) -> None: ...

    async def _watch(self, receive: Receive) -> None:
        await wait_for_disconnect(receive)
        self._is_cut = True


class EventResponse(PartsResponse):
    def __init__(
        self,
        parts: AsyncGenerator[bytes, None],
        close: Close,
        form: StreamFormat,
        error_fields: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        """`error_fields` returns `View.error_fields` for an error that ends the stream."""
        self.media_type = form.value
        super().__init__(parts, close, _HEADERS)
        self._form = form
        self._error_fields = error_fields

    async def _send(self, scope: Scope, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        last, writer = b"", scope.get("extensions", {}).get(BODY_WRITER)
        try:
            async for data in self._parts:
                if writer is None or not writer.write(data):
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                if self._is_cut:  # The server accepts data even after the client has disconnected.
                    return
        except LlamaclustError as error:
            last = self._form.error(scope, error, self._error_fields())
        # An internal error must end the stream visibly, or the client would suspect the network.
        except Exception:  # noqa: BLE001
            _log.exception("a stream of %s failed", scope["path"])
            last = self._form.error(scope, internal_error(), self._error_fields())
        self._is_sent = True
        if writer is not None:
            writer.flush()
        await send({"type": "http.response.body", "body": last, "more_body": False})


class JsonParts(PartsResponse):
    """A JSON body that is sent in parts. An error in the first or second part can still set the HTTP status."""

    media_type = "application/json"

    def __init__(self, parts: AsyncGenerator[bytes, None], close: Close | None = None, size: int | None = None) -> None:
        super().__init__(parts, close)
        if size is not None:
            self.headers["content-length"] = str(size)

    async def _send(self, scope: Scope, send: Send) -> None:
        begin = [await anext(self._parts, b""), await anext(self._parts, b"")]
        if not begin[1]:
            self.headers["content-length"] = str(len(begin[0]))
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        while begin:
            await send({"type": "http.response.body", "body": begin.pop(0), "more_body": True})
        async for part in self._parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await asyncio.sleep(0)  # Lets `_watch` notice a connection that was closed earlier.
        self._is_sent = not self._is_cut
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def rendered(value: Any) -> JsonParts:
    return JsonParts(json_body(lambda: value, is_large=has_many_values(value)))


async def unless_disconnected(request: Request, work: Awaitable[_Value]) -> _Value:
    """Returns the result of `work`. Raises ClientDisconnect if the client leaves first. The body must be read first."""
    results: list[_Value] = []

    async def do_it() -> None:
        results.append(await work)

    await first_of(do_it(), wait_for_disconnect(request.receive))
    if not results:
        raise ClientDisconnect
    return results[0]


async def first_of(*works: Awaitable[None]) -> None:
    """Runs `works` until the first one ends, and cancels the others. If the first one failed, raises its error."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


async def wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
