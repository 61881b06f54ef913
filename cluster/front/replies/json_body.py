"""Bodies of JSON whose parts are rendered when the client has taken those before."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator, Iterable
from contextlib import AsyncExitStack, aclosing
from functools import partial
from threading import Lock
from typing import Any, TypeAlias, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llamaclust.cluster.front.http.sse import first_of, wait_for_disconnect
from llamaclust.cluster.front.json_parts import has_many_values, json_parts, off_loop_if

JsonBody: TypeAlias = AsyncGenerator[bytes, None]
_Value = TypeVar("_Value")


async def json_body(make: Callable[[], Any], *, is_large: bool) -> JsonBody:
    """Makes a value and renders each part of its JSON when it is taken, on a thread where it is large. A body that is
    cancelled ends after the part that is being rendered."""
    rendering, parts = Lock(), _parts(make)

    def locked(step: Callable[[], _Value]) -> _Value:
        with rendering:
            return step()

    try:
        while part := await off_loop_if(is_large, partial(locked, partial(next, parts, b""))):
            yield part
    finally:
        await off_loop_if(is_large, partial(locked, parts.close))


def _parts(make: Callable[[], Any]) -> Generator[bytes, None, None]:
    yield from json_parts(make())


async def rendered_body(parts: Iterable[bytes]) -> JsonBody:
    """Parts that are there."""
    for part in parts:
        yield part


class JsonParts(Response):
    """Has a Content-Length where the body is one part, or its length is known."""

    media_type = "application/json"

    def __init__(self, body: JsonBody, held: AsyncExitStack | None = None) -> None:
        """`held`: what the reply takes of a budget; it is closed once the client has the body."""
        super().__init__()
        del self.headers["content-length"]
        self._body = body
        self._held = held or AsyncExitStack()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._held, aclosing(self._body):
            await first_of(self._send(send), wait_for_disconnect(receive))

    async def _send(self, send: Send) -> None:
        await self.send_parts(send)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def send_parts(self, send: Send) -> None:
        """Sends all but the end. What rendering the first parts raises comes before the head."""
        begin = [await anext(self._body, b""), await anext(self._body, b"")]
        if not begin[1]:
            self.headers["content-length"] = str(len(begin[0]))
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        while begin:
            await send({"type": "http.response.body", "body": begin.pop(0), "more_body": True})
        async for part in self._body:
            await send({"type": "http.response.body", "body": part, "more_body": True})


def rendered(value: Any) -> JsonParts:
    """A value as a body."""
    return JsonParts(json_body(lambda: value, is_large=has_many_values(value)))
