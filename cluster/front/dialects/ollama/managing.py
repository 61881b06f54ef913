"""Ollama's requests that change models: pull, create, copy, delete."""

from __future__ import annotations

import asyncio
import json
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, suppress
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from llamaclust.cluster.config.catalog import CatalogEntry, catalog_names, find_entry, nearest_names
from llamaclust.cluster.config.values import TAG
from llamaclust.cluster.front.body import read_body
from llamaclust.cluster.front.dialects.ollama.models import OllamaNames
from llamaclust.cluster.front.dialects.ollama.schema import (
    CopyBody,
    CreateBody,
    DeleteBody,
    PullBody,
)
from llamaclust.cluster.front.errors import HttpError
from llamaclust.cluster.front.http.gates import require_first_key
from llamaclust.cluster.front.http.responses import JsonResponse
from llamaclust.cluster.front.http.sse import EventResponse, StreamFormat, line, unless_disconnected
from llamaclust.cluster.front.settings import ApiSettings
from llamaclust.core.errors import UsageError

_NO_PULL = "pull_not_allowed"
_END_S = 5.0
_MOST_OF_A_MESSAGE = 500


class CatalogPulls:
    """What a request says never becomes part of an address: it chooses an entry of the catalog."""

    def __init__(self, settings: ApiSettings) -> None:
        self._settings = settings
        self._running: str | None = None  # the model that is downloaded

    def wanted(self, request: Request, name: str) -> CatalogEntry:
        """HttpError 403 where the cluster file, the key or the catalog does not allow it."""
        if not self._settings.allows_pull:
            cure = "the API downloads no models; use `llamaclust model pull`, or set api.pull in the cluster file"
            raise HttpError(403, _NO_PULL, f"model {name[:200]!r} not found; {cure}", param="model")
        require_first_key(request.headers, self._settings, "download models")
        try:
            entry = find_entry(name.removesuffix(TAG))
        except UsageError as error:
            raise HttpError(403, _NO_PULL, str(error)[:_MOST_OF_A_MESSAGE], param="model") from error
        if entry is None:
            hint = nearest_names(name[:200], catalog_names()) or "; `llamaclust model list` shows it"
            message = f"model {name[:200]!r} is not in the catalog{hint}"
            raise HttpError(403, _NO_PULL, message, param="model")
        return entry

    async def progress(self, entry: CatalogEntry) -> AsyncGenerator[dict[str, Any], None]:
        """The download's steps, the last one "success". HttpError 409 while another one runs, 502 for one that failed.
        Its process ends with this generator; a later download of the model goes on with what it has left."""
        if self._running is not None:
            message = f"model {self._running!r} is being downloaded; try again when that is done"
            raise HttpError(409, "pull_in_progress", message, {"Retry-After": "10"}, param="model")
        self._running = entry.name
        try:
            process = await asyncio.create_subprocess_exec(
                *_command(entry.name), stdin=DEVNULL, stdout=PIPE, stderr=PIPE
            )
            try:
                async for step in _steps(process, entry):
                    yield step
            finally:
                await _end(process)
        finally:
            self._running = None
        yield {"status": "success"}


def _command(name: str) -> list[str]:
    return [sys.executable, "-P", "-m", "llamaclust", "model", "pull", name, "--json-lines"]


async def _steps(process: Process, entry: CatalogEntry) -> AsyncGenerator[dict[str, Any], None]:
    assert process.stdout is not None and process.stderr is not None
    errors = asyncio.ensure_future(process.stderr.read())
    try:
        async for line in process.stdout:
            if not line.endswith(b"\n"):  # the process was killed while it wrote
                break
            step = json.loads(line)
            sizes = {"total": step["total_bytes"], "completed": step["done_bytes"]} if step["total_bytes"] else {}
            digest = {"digest": f"sha256:{entry.sha256}"} if entry.sha256 else {}
            yield {"status": step["step"], **digest, **sizes}
        text = (await errors).decode(errors="replace").strip()
    finally:
        errors.cancel()
    if code := await process.wait():
        message = text.rpartition("\n")[2][-_MOST_OF_A_MESSAGE:] or f"its process ended with {code}"
        raise HttpError(502, "pull_failed", f"model {entry.name!r} was not downloaded: {message}", param="model")


async def _end(process: Process) -> None:
    if process.returncode is None:
        with suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), _END_S)
        except TimeoutError:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()


class OllamaManaging:
    """Works on names alone, but for downloads."""

    def __init__(self, settings: ApiSettings, names: OllamaNames) -> None:
        self._settings = settings
        self._names = names
        self._pulls = CatalogPulls(settings)

    async def pull(self, request: Request) -> Response:
        """The served model is there; others are downloaded where the cluster file allows it."""
        body = await read_body(request, PullBody, self._settings)
        if self._names.is_known(body.model):
            return _statuses(["pulling manifest", "success"], is_streamed=body.stream)
        steps = self._pulls.progress(self._pulls.wanted(request, body.model))
        async with AsyncExitStack() as cleanup:
            cleanup.push_async_callback(steps.aclose)
            if not body.stream:
                return JsonResponse(await unless_disconnected(request, _last(steps)))
            first = await unless_disconnected(request, anext(steps))  # what fails before gets a status of its own
            pulling = cleanup.pop_all()
            return EventResponse(_lines(first, steps), lambda _: pulling.aclose(), StreamFormat.LINES)

    async def create(self, request: Request) -> Response:
        """Another name of the served model."""
        body = await read_body(request, CreateBody, self._settings)
        self._names.copy(body.source, body.model)
        return _statuses(["using existing layer", "success"], is_streamed=body.stream)

    async def copy(self, request: Request) -> Response:
        """Another name of the served model."""
        body = await read_body(request, CopyBody, self._settings)
        self._names.copy(body.source, body.destination)
        return Response()

    async def delete(self, request: Request) -> Response:
        """A name that `copy` or `create` made."""
        body = await read_body(request, DeleteBody, self._settings)
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
