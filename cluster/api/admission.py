"""How many requests, and how much of their bodies, the API holds at once; more are told to come back."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llamaclust.cluster.api.errors import HttpError, error_response
from llamaclust.cluster.api.settings import ApiSettings


class Admission:
    """Counts requests with a body from their first byte to the end of their reply."""

    def __init__(self, app: ASGIApp, settings: ApiSettings) -> None:
        self._app = app
        self._settings = settings
        self._requests = 0
        self._body_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
        elif self._requests >= self._settings.max_requests:
            await error_response(_busy(f"{self._requests} requests"))(scope, receive, send)
        else:
            await self._admit(scope, receive, send)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        held_bytes = 0

        async def counted() -> Message:
            nonlocal held_bytes
            message = await receive()
            size = len(message.get("body", b""))
            held_bytes += size
            self._body_bytes += size
            if self._body_bytes > self._settings.max_held_bytes:
                raise _busy(f"{self._body_bytes} bytes of requests")
            return message

        self._requests += 1
        try:
            await self._app(scope, counted, send)
        finally:
            self._requests -= 1
            self._body_bytes -= held_bytes


def _busy(what: str) -> HttpError:
    message = f"the server is busy with {what}; try again"
    return HttpError(503, "server_busy", message, {"Retry-After": "1", "Connection": "close"})
