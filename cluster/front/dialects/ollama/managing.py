"""Ollama's endpoints that change which models there are: names of the served model come and go, models do not."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from llamaclust.cluster.front.body import read_body
from llamaclust.cluster.front.dialects.ollama.bodies import (
    CREATE,
    DELETE,
    PULL,
    CopyBody,
    CreateBody,
    DeleteBody,
    PullBody,
)
from llamaclust.cluster.front.dialects.ollama.names import OllamaNames
from llamaclust.cluster.front.dialects.ollama.pulling import CatalogPulls
from llamaclust.cluster.front.errors import HttpError
from llamaclust.cluster.front.http.error_responses import JsonResponse
from llamaclust.cluster.front.http.sse import EventResponse, StreamFormat, line, unless_disconnected
from llamaclust.cluster.front.schema import NOTHING_FOREIGN
from llamaclust.cluster.front.settings import ApiSettings


class OllamaManaging:
    """Works on names alone, but for downloads."""

    def __init__(self, settings: ApiSettings, names: OllamaNames) -> None:
        self._settings = settings
        self._names = names
        self._pulls = CatalogPulls(settings)

    async def pull(self, request: Request) -> Response:
        """The served model is there; others are downloaded where the cluster file allows it."""
        body = await read_body(request, PullBody, PULL, self._settings)
        if self._names.is_known(body.model):
            return _statuses(["pulling manifest", "success"], is_streamed=body.stream)
        steps = self._pulls.progress(self._pulls.wanted(request, body.model))
        async with AsyncExitStack() as cleanup:
            cleanup.push_async_callback(steps.aclose)
            if not body.stream:
                return JsonResponse(await unless_disconnected(request, _last(steps)))
            first = await unless_disconnected(request, anext(steps))  # what fails before gets a status of its own
            return EventResponse(_lines(first, steps), cleanup.pop_all().aclose, StreamFormat.LINES)

    async def create(self, request: Request) -> Response:
        """Another name of the served model."""
        body = await read_body(request, CreateBody, CREATE, self._settings)
        self._names.copy(body.source, body.model)
        return _statuses(["using existing layer", "success"], is_streamed=body.stream)

    async def copy(self, request: Request) -> Response:
        """Another name of the served model."""
        body = await read_body(request, CopyBody, NOTHING_FOREIGN, self._settings)
        self._names.copy(body.source, body.destination)
        return Response()

    async def delete(self, request: Request) -> Response:
        """A name that `copy` or `create` made."""
        body = await read_body(request, DeleteBody, DELETE, self._settings)
        self._names.delete(body.model)
        return Response()

    async def blob(self, request: Request) -> Response:
        """There are no blobs."""
        raise HttpError(404, "not_found", f"blob {request.path_params['digest'][:100]!r} not found")


async def _lines(first: dict[str, Any], steps: AsyncGenerator[dict[str, Any], None]) -> AsyncGenerator[bytes, None]:
    yield line(first)
    async for step in steps:
        yield line(step)


async def _last(steps: AsyncGenerator[dict[str, Any], None]) -> dict[str, Any]:
    last: dict[str, Any] = {}
    async for step in steps:
        last = step
    return last


def _statuses(statuses: Sequence[str], *, is_streamed: bool) -> Response:
    """The progress of work that is done at once."""
    if not is_streamed:
        return JsonResponse({"status": statuses[-1]})
    return Response(b"".join(line({"status": status}) for status in statuses), media_type=StreamFormat.LINES.value)
