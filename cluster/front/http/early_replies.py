"""Replies to requests whose bodies are still being sent, such as refusals: the rest of the body is taken in first."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_DISCARD_S = 0.9
"""For the rest of a body, of which nothing is kept. A server that ends waits a little longer."""


def has_body(scope: Scope) -> bool:
    """Whether a request has a body, by its head."""
    headers = Headers(scope=scope)
    return headers.get("content-length", "0") != "0" or "transfer-encoding" in headers


class EarlyReplies:
    """Sends a reply at once, but ends it only behind the request's body, or a while later: a connection that is closed
    while the client sends is reset, and the reply on its way is lost."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not has_body(scope) or "expect" in Headers(scope=scope):  # waits before it sends
            await self._app(scope, receive, send)
            return
        is_read = False

        async def read() -> Message:
            nonlocal is_read
            message = await receive()
            is_read = message["type"] != "http.request" or not message.get("more_body", False)
            return message

        async def reply(message: Message) -> None:
            is_end = message["type"] == "http.response.body" and not message.get("more_body", False)
            if not is_end or is_read:
                await send(message)
                return
            await send({**message, "more_body": True})
            with suppress(TimeoutError):
                async with asyncio.timeout(_DISCARD_S):
                    while not is_read:
                        await read()
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        await self._app(scope, read, reply)
