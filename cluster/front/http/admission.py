"""Bounds on the requests that the API holds at once and on the bytes of their bodies. Others get 503 with Retry-After;
a stopping server accepts no more, and answers all that it has."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llamaclust.cluster.front.errors import HttpError
from llamaclust.cluster.front.http.responses import error_response, has_body
from llamaclust.cluster.front.settings import ApiSettings
from llamaclust.cluster.front.text.sharing import current_owner
from llamaclust.core.sharing.shares import fits


@dataclass(slots=True, eq=False)
class _Open:
    """A request with a body, from its first byte to the end of its reply."""

    task: asyncio.Task[Any]
    owner: str
    body_bytes: int = 0
    is_answered: bool = False  # its reply has begun
    refusal: HttpError | None = None  # why it was cancelled


class Admission:
    """The open requests of one app. Use from one event loop."""

    def __init__(self, settings: ApiSettings) -> None:
        self.is_stopping = False
        self._settings = settings
        self._open: set[_Open] = set()
        self._unfinished: dict[_Open, None] = {}  # those whose bodies are still to come, the oldest first
        self._body_bytes = 0

    def stop(self) -> None:
        """From now on requests are refused, also those whose bodies are still to come."""
        self.is_stopping = True
        self._refuse([*self._unfinished], _stopping())

    async def wait_idle(self) -> None:
        """Returns once the replies of all requests are whole; its caller sets the deadline."""
        while self._open:
            await asyncio.wait([request.task for request in self._open])

    def end(self) -> None:
        """Ends requests whose replies have not begun, with the error that the cluster stops."""
        self.is_stopping = True
        self._refuse([request for request in self._open if not request.is_answered], _stopping())

    def check(self) -> None:
        """Raises HttpError where no further request of the current owner is taken."""
        if self.is_stopping:
            raise _stopping()
        whole = len(self._open) - len(self._unfinished)
        own = sum(request.owner == current_owner.get() for request in self._open - self._unfinished.keys())
        if not fits(own, whole, self._settings.max_requests):
            raise _busy(f"{own} requests")

    @contextmanager
    def held(self, *, has_body: bool) -> Iterator[_Open]:
        """A request of the current task, open meanwhile. Bodies that do not come keep no others out: the oldest
        unfinished request of the owner with the most gives way."""
        task = asyncio.current_task()
        assert task is not None
        request = _Open(task, current_owner.get())
        self._open.add(request)
        if has_body:
            self._unfinished[request] = None
        if len(self._unfinished) > self._settings.max_requests:
            counts = Counter(unfinished.owner for unfinished in self._unfinished)
            oldest = max(self._unfinished, key=lambda unfinished: counts[unfinished.owner])
            self._refuse([oldest], _busy("newer requests, and the body had not arrived"))
        try:
            yield request
        finally:
            self._open.remove(request)
            self._unfinished.pop(request, None)
            self._body_bytes -= request.body_bytes

    def count(self, request: _Open, message: Message) -> None:
        """A part of a request's body has come. Raises HttpError where all together are too much."""
        if request in self._unfinished and not message.get("more_body", False):
            self.check()
            del self._unfinished[request]
        size = len(message.get("body", b""))
        own = sum(other.body_bytes for other in self._open if other.owner == request.owner)
        if not fits(own, self._body_bytes, self._settings.max_held_bytes, size):
            raise _busy(f"{own + size} bytes of requests")
        request.body_bytes += size
        self._body_bytes += size

    def _refuse(self, requests: list[_Open], refusal: HttpError) -> None:
        for request in requests:
            self._unfinished.pop(request, None)
            request.refusal = refusal
            request.task.cancel()


class AdmissionGate:
    """Passes requests with a body to an app within its bounds; those that are cancelled for others get a 503."""

    def __init__(self, app: ASGIApp, admission: Admission) -> None:
        self._app = app
        self._admission = admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "POST" and not has_body(scope):
            await self._app(scope, receive, send)
            return
        try:
            self._admission.check()
        except HttpError as refusal:
            await error_response(refusal, scope)(scope, receive, send)
        else:
            with self._admission.held(has_body=has_body(scope)) as request:
                given_way = await self._answer(request, scope, receive, send)
            if given_way is not None:
                await error_response(given_way, scope)(scope, receive, send)

    async def _answer(self, request: _Open, scope: Scope, receive: Receive, send: Send) -> HttpError | None:
        """The refusal of a request that was cancelled for others before its reply began."""

        async def counted() -> Message:
            message = await receive()
            self._admission.count(request, message)
            return message

        async def noted(message: Message) -> None:
            request.is_answered = True
            await send(message)

        try:
            await self._app(scope, counted, noted)
        except asyncio.CancelledError:  # the task is the server's and ends here
            if request.refusal is None:
                raise
            return None if request.is_answered else request.refusal
        return None


def _stopping() -> HttpError:
    return HttpError(
        503, "cluster_stopping", "the cluster is stopping and takes no more requests", {"Connection": "close"}
    )


def _busy(what: str) -> HttpError:
    message = f"the server is busy with {what}; try again"
    return HttpError(503, "server_busy", message, {"Retry-After": "1", "Connection": "close"})
