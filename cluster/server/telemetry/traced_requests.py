"""Wraps the API's ASGI app. Begins a trace for each request that may compute, and records how the request ends."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic_ns

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llamaclust.cluster.engine.trace_context import current_trace
from llamaclust.cluster.front.http.responses import traced_names
from llamaclust.cluster.server.telemetry.records import ServedRequest
from llamaclust.cluster.server.telemetry.trace_sampler import RequestTrace, TraceSampler


class TracedRequests:
    """An ASGI middleware that calls `ended` after each traced request, unless the client had no access to the API."""

    def __init__(self, app: ASGIApp, sampler: TraceSampler, ended: Callable[[ServedRequest], None]) -> None:
        self._app = app
        self._sampler = sampler
        self._ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        trace = self._begin(scope)
        if trace is None:
            await self._app(scope, receive, send)
            return
        start_ns, status, names = monotonic_ns(), None, traced_names(scope)

        async def note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        token = current_trace.set(trace.own)
        try:
            await self._app(scope, receive, note_status)
        finally:
            current_trace.reset(token)
            if names:
                self._ended(ServedRequest(trace, scope["method"], names[0], start_ns, monotonic_ns(), status))

    def _begin(self, scope: Scope) -> RequestTrace | None:
        """Begins a trace. Returns None if the request is not sampled or not a POST. Other methods compute nothing."""
        if scope["type"] != "http" or scope["method"] != "POST":
            return None
        return self._sampler.begin(_values(scope, b"traceparent"), _values(scope, b"tracestate"))


def _values(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for header, value in scope["headers"] if header == name]
