"""Endpoints that retrieve, cancel and delete existing responses of the Responses API."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from llamaclust.cluster.front.dialects.openai.endpoints import Responses
from llamaclust.cluster.front.dialects.openai.response_schema import (
    ID_PREFIX,
    Status,
)
from llamaclust.cluster.front.dialects.openai.response_store import ResponseStore, stored_response
from llamaclust.cluster.front.errors import HttpError, failure_of, response_error
from llamaclust.cluster.front.http.gates import owner
from llamaclust.cluster.front.http.responses import EVENTS, JSON, JsonResponse, QueryParameter, Route
from llamaclust.cluster.front.http.sse import rendered
from llamaclust.cluster.front.replies.handlers import Replies
from llamaclust.cluster.front.replies.kept_reply import KeptReply
from llamaclust.cluster.front.replies.reply import Position, read_position
from llamaclust.core.errors import ClusterStoppingError

_MOST_LISTED: Final = 100
_LISTED: Final = 20
_RUNNING: Final = (Status.QUEUED, Status.IN_PROGRESS)
_RETRIEVED: Final = (
    QueryParameter(
        "stream", "boolean", "true to stream the events of a response that was created with background and stream"
    ),
    QueryParameter("starting_after", "integer", "the number of the last event that the client has"),
)
_ITEMS: Final = (
    QueryParameter("limit", "integer", "the maximum number of items, from 1 to 100 (default: 20)"),
    QueryParameter("order", "string", "asc for the oldest item first, desc for the newest item first (default)"),
    QueryParameter("after", "string", "the id of the item after which the list begins"),
)


class CreatedResponses:
    def __init__(self, replies: Replies, store: ResponseStore) -> None:
        self.replies = replies
        self._store = store

    def routes(self) -> Iterator[Route]:
        for path in Responses.paths:
            one = f"{path}/{{id}}"
            yield Route("GET", f"{one}/input_items", self.input_items, query=_ITEMS)
            yield Route("POST", f"{one}/cancel", self.cancel)
            yield Route("GET", one, self.retrieve, query=_RETRIEVED, types=(JSON, EVENTS))
            yield Route("DELETE", one, self.delete)

    async def retrieve(self, request: Request) -> Response:
        """Returns a response. With `?stream=true`, streams the events after the event number `starting_after`."""
        if request.query_params.get("stream", "false").lower() not in ("true", "1"):
            return rendered(await self._shown(request))
        kept = self._kept(request)
        if kept is None or not kept.context.is_streamed:
            await self._shown(request)
            message = "only responses with background: true and stream: true can be streamed again"
            raise HttpError(400, "not_streamed", message)
        after = Position()
        if "starting_after" in request.query_params:
            after = read_position(str(_number(request, "starting_after", 0) + 1), "starting_after")
        return await self.replies.respond(request, kept, after)

    async def cancel(self, request: Request) -> Response:
        """Cancels a response that is computed in the background."""
        kept, response = self._kept(request), await self._shown(request)
        if not response["background"]:
            message = f"response {response['id']} cannot be cancelled: it was not created with background: true"
            raise HttpError(400, "not_in_background", message)
        if kept is not None and response["status"] in _RUNNING:
            response = {**response, "status": Status.CANCELLED}
            key = self._key(request)
            begun = self._store.get(*key)
            self._store.replace(key[0], await stored_response(response, [] if begun is None else begun.input_items, ()))
            await self.replies.cache.forget(kept)
        return rendered(response)

    async def delete(self, request: Request) -> Response:
        """Deletes a response. If the response is still being computed, it is also cancelled."""
        kept, is_stored = self._named(request), self._store.delete(*self._key(request))
        if kept is not None:
            await self.replies.cache.forget(kept)
        elif not is_stored:
            raise _not_found(request)
        return JsonResponse({"id": request.path_params["id"], "object": "response", "deleted": True})

    async def input_items(self, request: Request) -> Response:
        """Lists a response's input items. The newest item comes first, unless the query has `order=asc`."""
        stored = self._store.get(*self._key(request))
        if stored is None:
            raise _not_found(request)
        items = stored.input_items if request.query_params.get("order") == "asc" else stored.input_items[::-1]
        after = request.query_params.get("after")
        place = next((place for place, item in enumerate(items) if item["id"] == after), -1)
        if after is not None and place < 0:
            raise HttpError(400, "bad_item_id", f"after: {after[:60]!r} is not an item of this response", param="after")
        most = _number(request, "limit", _LISTED)
        if not 1 <= most <= _MOST_LISTED:
            raise HttpError(400, "bad_limit", f"limit: {most} is not possible; give 1 to {_MOST_LISTED}", param="limit")
        rest = items[place + 1 :]
        shown = rest[:most]
        ids = [item["id"] for item in shown] or [None]
        ends = {"first_id": ids[0], "last_id": ids[-1]}
        return rendered({"object": "list", "data": shown, **ends, "has_more": len(rest) > most})

    async def _shown(self, request: Request) -> dict[str, Any]:
        stored = self._store.get(*self._key(request))
        if stored is not None and stored.response["status"] not in _RUNNING:
            return stored.response
        kept = self._kept(request)
        if kept is None:
            raise _not_found(request)
        kept.resume()
        # The response is complete but not in the store: the store deleted it, or will get it soon.
        if kept.log.is_over and kept.error is None:
            complete: dict[str, Any] = await kept.value()
            return complete
        return _unended(kept, request.path_params["id"])

    def _kept(self, request: Request) -> KeptReply | None:
        kept = self._named(request)
        return kept if kept is not None and kept.context.is_background else None

    def _named(self, request: Request) -> KeptReply | None:
        key = self._key(request)
        kept = self.replies.cache.named(*key) if key[1].startswith(ID_PREFIX) else None
        return kept if kept is not None and kept.context.endpoint.startswith(Responses.paths) else None

    def _key(self, request: Request) -> tuple[str, str]:
        return owner(request.headers, self.replies.settings.api_keys), request.path_params["id"]


def _not_found(request: Request) -> HttpError:
    return HttpError(
        404, "response_not_found", f"no response {request.path_params['id'][:60]!r} is stored on this server"
    )


def _unended(kept: KeptReply, response_id: str) -> dict[str, Any]:
    """Returns the JSON of a response that is not complete."""
    known = kept.acknowledgement
    shown: dict[str, Any] = {"id": response_id, "object": "response", "created_at": kept.context.created}
    shown |= {"background": True, "output": []} if known is None else known
    if isinstance(kept.error, ClusterStoppingError):  # The next coordinator continues the computation.
        raise kept.error
    if kept.error is not None:
        return {**shown, "status": Status.FAILED, "error": response_error(failure_of(kept.error))}
    return {**shown, "status": Status.QUEUED if known is None else Status.IN_PROGRESS}


def _number(request: Request, name: str, default: int) -> int:
    text = request.query_params.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 12):
        raise HttpError(400, "bad_number", f"{name}: {text[:60]!r} is not a whole number", param=name)
    return int(text)
