"""Ollama's endpoints that change which models there are: names of the served model come and go, models do not."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response

from llamaclust.cluster.api.body import read_body
from llamaclust.cluster.api.errors import HttpError, JsonResponse
from llamaclust.cluster.api.ollama.bodies import CREATE, DELETE, PULL, CopyBody, CreateBody, DeleteBody, PullBody
from llamaclust.cluster.api.ollama.names import OllamaNames
from llamaclust.cluster.api.replies.stream_format import StreamFormat, line
from llamaclust.cluster.api.schema import NOTHING_FOREIGN
from llamaclust.cluster.api.settings import ApiSettings


class OllamaManaging:
    """Works on names alone: no request makes this process read a file or open a connection."""

    def __init__(self, settings: ApiSettings, names: OllamaNames) -> None:
        self._settings = settings
        self._names = names

    async def pull(self, request: Request) -> Response:
        """The served model is there; others are downloaded on the command line."""
        body = await read_body(request, PullBody, PULL, self._settings)
        try:
            self._names.check_known(body.model)
        except HttpError as unknown:
            cure = "the API downloads no models; use `llamaclust model pull`, and name it in the cluster file"
            raise HttpError(403, "pull_not_allowed", f"{unknown}; {cure}", param="model") from unknown
        return _statuses(["pulling manifest", "success"], is_streamed=body.stream)

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


def _statuses(statuses: Sequence[str], *, is_streamed: bool) -> Response:
    """The progress of work that is done at once."""
    if not is_streamed:
        return JsonResponse({"status": statuses[-1]})
    return Response(b"".join(line({"status": status}) for status in statuses), media_type=StreamFormat.LINES.value)
