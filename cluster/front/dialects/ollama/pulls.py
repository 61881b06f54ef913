"""Downloads models of the catalog for Ollama's clients, one model at a time."""

from __future__ import annotations

import asyncio
import json
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

from starlette.requests import Request

from llamaclust.cluster.config.catalog import CatalogEntry, catalog_names, find_entry, nearest_names
from llamaclust.cluster.config.values import TAG
from llamaclust.cluster.front.errors import HttpError
from llamaclust.cluster.front.http.gates import require_first_key
from llamaclust.cluster.front.settings import ApiSettings
from llamaclust.core.errors import UsageError

_END_S: Final = 5.0
_MOST_OF_A_MESSAGE: Final = 500


class CatalogPulls:
    """Downloads models of the catalog, one at a time, each in its own process."""

    def __init__(self, settings: ApiSettings) -> None:
        self._settings = settings
        self._running: str | None = None  # Name of the model that is being downloaded, or None.

    def wanted(self, request: Request, name: str) -> CatalogEntry:
        """Returns the catalog entry for a name. Raises HttpError 403 if there is none or downloads are not allowed."""
        if not self._settings.allows_pull:
            cure = "downloads by API are off: run `llamaclust model pull`, or set api.pull in the cluster file"
            raise _not_allowed(f"model {name[:200]!r} not found; {cure}")
        require_first_key(request.headers, self._settings, "download models")
        try:
            entry = find_entry(name.removesuffix(TAG))
        except UsageError as error:
            raise _not_allowed(str(error)[:_MOST_OF_A_MESSAGE]) from error
        if entry is None:
            hint = nearest_names(name[:200], catalog_names()) or "; `llamaclust model list` shows it"
            raise _not_allowed(f"model {name[:200]!r} is not in the catalog{hint}")
        return entry

    async def progress(self, entry: CatalogEntry) -> AsyncGenerator[dict[str, Any], None]:
        """Downloads a model and yields the progress. Raises HttpError if this fails or another download is running."""
        if self._running is not None:
            message = f"model {self._running!r} is being downloaded; try again when the download is done"
            raise HttpError(409, "pull_in_progress", message, {"Retry-After": "10"}, param="model")
        self._running = entry.name
        try:
            async with _running(_command(entry.name)) as process:
                async for step in _steps(process, entry):
                    yield step
        finally:
            self._running = None
        yield {"status": "success"}


def _not_allowed(message: str) -> HttpError:
    return HttpError(403, "pull_not_allowed", message, param="model")


def _command(name: str) -> list[str]:
    return [sys.executable, "-P", "-m", "llamaclust", "model", "pull", name, "--json-lines"]


async def _steps(process: Process, entry: CatalogEntry) -> AsyncGenerator[dict[str, Any], None]:
    assert process.stdout is not None and process.stderr is not None
    errors = asyncio.ensure_future(process.stderr.read())
    digest = {"digest": f"sha256:{entry.sha256}"} if entry.sha256 else {}
    try:
        async for line in process.stdout:
            if not line.endswith(b"\n"):  # The process was killed while it wrote this line.
                break
            step = json.loads(line)
            sizes = {"total": step["total_bytes"], "completed": step["done_bytes"]} if step["total_bytes"] else {}
            yield {"status": step["step"], **digest, **sizes}
        text = (await errors).decode(errors="replace").strip()
    finally:
        errors.cancel()
    if code := await process.wait():
        message = text.rpartition("\n")[2][-_MOST_OF_A_MESSAGE:] or f"its process ended with exit code {code}"
        raise HttpError(502, "pull_failed", f"model {entry.name!r} was not downloaded: {message}", param="model")


@asynccontextmanager
async def _running(command: list[str]) -> AsyncIterator[Process]:
    process = await asyncio.create_subprocess_exec(*command, stdin=DEVNULL, stdout=PIPE, stderr=PIPE)
    try:
        yield process
    finally:
        for end in (process.terminate, process.kill):
            with suppress(ProcessLookupError, TimeoutError):
                if process.returncode is None:
                    end()
                await asyncio.wait_for(process.wait(), _END_S)
