"""`POST /v1/responses`, and what clients do with stored responses."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from llamaclust.cluster.front.body import converted, parse_body, read_body
from llamaclust.cluster.front.dialects.openai.responses.items import REFERENCE, Item, has_references, messages_of
from llamaclust.cluster.front.dialects.openai.responses.output import (
    ID_PREFIX,
    ResponseHead,
    Status,
    cancelled,
    failed,
)
from llamaclust.cluster.front.dialects.openai.responses.schema import ResponsesBody
from llamaclust.cluster.front.dialects.openai.responses.store import (
    CompactionBody,
    CompactionView,
    Messages,
    ResponseStore,
    StoredResponse,
)
from llamaclust.cluster.front.dialects.openai.responses.view import ResponseView, Storing
from llamaclust.cluster.front.errors import HttpError
from llamaclust.cluster.front.fields.model import ModelNames
from llamaclust.cluster.front.http.responses import JsonResponse
from llamaclust.cluster.front.http.security import owner
from llamaclust.cluster.front.http.sse import rendered, unless_disconnected
from llamaclust.cluster.front.json_text import to_json
from llamaclust.cluster.front.replies.handlers import Replies
from llamaclust.cluster.front.replies.kept_reply import KeptReply
from llamaclust.cluster.front.replies.reply import Position, Reply, Ticket, read_position
from llamaclust.cluster.front.settings import ApiSettings
from llamaclust.cluster.front.text.answer_log import Timed
from llamaclust.cluster.front.text.request import CompletionRequest
from llamaclust.cluster.front.text.service import TextService
from llamaclust.core.errors import ClusterStoppingError

_MOST_LISTED = 100
_LISTED = 20
_RUNNING = (Status.QUEUED, Status.IN_PROGRESS)


class ResponsesEndpoint:
    """Makes responses."""

    def __init__(self, service: TextService, settings: ApiSettings, models: ModelNames, store: ResponseStore) -> None:
        self._service = service
        self._settings = settings
        self._models = models
        self._store = store

    async def create(self, data: bytes, ticket: Ticket) -> Reply:
        body = await parse_body(data, ResponsesBody, self._settings)
        adapters, model = self._models.adapters(body.model, body.lora, ticket.scales), self._models.shown(body.model)
        body.check()
        items, messages = self._chat(body, ticket)
        chat = (await converted(body, body.request, messages)).admitted(ticket.created, adapters)
        head, details = ResponseHead(ticket.id, ticket.created, model, body.shown()), body.details
        storing = Storing(self._store, ticket.identity.owner, items, messages) if body.store else None

        async def requests() -> list[CompletionRequest]:
            completion = await self._service.chat(chat)
            if storing is not None and body.background:
                storing.begin(head)
            return [completion]

        return Reply(
            service=self._service,
            requests=requests,
            view=partial(ResponseView, head, self._service.tokenizer, storing, details),
            is_streamed=body.stream,
            timed=Timed.ALWAYS if details.timings else Timed.NEVER,
            with_progress=details.progress,
            keeps_chunks=details.logprobs,
            has_measurements=details.timings or details.progress,
            acknowledgement=to_json(head.shown(head.first_status)) if body.background else None,
            is_stored=body.store,
        )

    async def compact(self, data: bytes, ticket: Ticket) -> Reply:
        """A summary of a chat."""
        body = await parse_body(data, CompactionBody, self._settings)
        adapters = self._models.adapters(body.model, body.lora, ticket.scales)
        _, messages = self._chat(body, ticket)
        chat = (await converted(body, body.request, messages)).admitted(ticket.created, adapters)

        async def requests() -> list[CompletionRequest]:
            return [await self._service.chat(chat)]

        view = partial(CompactionView, ticket.id, ticket.created)
        return Reply(service=self._service, requests=requests, view=view, is_streamed=False)

    async def count(self, request: Request) -> Response:
        """The tokens of a response's prompt."""
        body = await read_body(request, ResponsesBody, self._settings)
        self._models.adapters(body.model, body.lora)
        body.check()
        own = owner(request.headers, self._settings.api_keys)
        items = self._store.resolved(own, body.input, self._settings.max_body_bytes)
        messages = (*self._earlier(body.previous_response_id, own), *messages_of(items))
        chat = await converted(body, body.request, messages)
        completion = await unless_disconnected(request, self._service.chat_prompt(chat))
        return JsonResponse({"object": "response.input_tokens", "input_tokens": len(completion.prompt)})

    def _chat(self, body: ResponsesBody | CompactionBody, ticket: Ticket) -> tuple[list[Item], Messages]:
        """The input's items, and all messages of the chat. What is in the store now, a later computation has from the
        ticket: earlier messages, or all where the input has references."""
        own = ticket.identity.owner
        if not has_references(body.input):
            ticket.earlier = ticket.earlier or self._earlier(body.previous_response_id, own)
            return body.input, (*ticket.earlier, *messages_of(body.input))
        if ticket.earlier:
            return [item for item in body.input if item["type"] != REFERENCE], tuple(ticket.earlier)
        items = self._store.resolved(own, body.input, self._settings.max_body_bytes)
        ticket.earlier = messages = (*self._earlier(body.previous_response_id, own), *messages_of(items))
        return items, messages

    def _earlier(self, response_id: str | None, owner_digest: str) -> Messages:
        """The messages of the chat that the input continues."""
        return () if response_id is None else self._store.followed(owner_digest, response_id).messages


class StoredResponses:
    """Reads responses, also those that are computed in the background, and ends them."""

    def __init__(self, replies: Replies, store: ResponseStore) -> None:
        self._replies = replies
        self._store = store

    async def retrieve(self, request: Request) -> Response:
        """A response as it is; `?stream=true`: the events of one that was streamed in the background, after the one of
        number `starting_after`."""
        if request.query_params.get("stream", "false").lower() in ("true", "1"):
            return await self._events(request)
        return rendered(await self._shown(request))

    async def cancel(self, request: Request) -> Response:
        """Ends a response that is computed in the background."""
        kept, response = self._kept(request), await self._shown(request)
        if not response["background"]:
            raise HttpError(
                400, "not_in_background", f"response {response['id']} was not created with background: true"
            )
        if kept is not None and response["status"] in _RUNNING:
            response = cancelled(response)
            begun = self._store.get(self._owner(request), response["id"])
            items = [] if begun is None else begun.input_items
            self._store.put(self._owner(request), StoredResponse(response, items, ()))
            await self._replies.cache.forget(kept)
        return rendered(response)

    async def delete(self, request: Request) -> Response:
        """Ends a response that runs, and forgets it."""
        kept = self._kept(request)
        is_stored = self._store.delete(self._owner(request), request.path_params["id"])
        if kept is not None:
            await self._replies.cache.forget(kept)
        elif not is_stored:
            raise self._not_found(request)
        return JsonResponse({"id": request.path_params["id"], "object": "response", "deleted": True})

    async def input_items(self, request: Request) -> Response:
        """What a response answered; the newest item first unless `order=asc`."""
        stored = self._store.get(self._owner(request), request.path_params["id"])
        if stored is None:
            raise self._not_found(request)
        items = stored.input_items if request.query_params.get("order") == "asc" else stored.input_items[::-1]
        after = request.query_params.get("after")
        place = next((place for place, item in enumerate(items) if item["id"] == after), -1)
        if after is not None and place < 0:
            raise HttpError(400, "bad_item_id", f"after: {after[:60]!r} is no item of this response", param="after")
        most = _number(request, "limit", _LISTED)
        if not 1 <= most <= _MOST_LISTED:
            raise HttpError(400, "bad_limit", f"limit: {most} is not within 1..{_MOST_LISTED}", param="limit")
        rest = items[place + 1 :]
        shown = rest[:most]
        ends = (
            {"first_id": shown[0]["id"], "last_id": shown[-1]["id"]} if shown else {"first_id": None, "last_id": None}
        )
        return rendered({"object": "list", "data": shown, **ends, "has_more": len(rest) > most})

    async def _events(self, request: Request) -> Response:
        kept = self._kept(request)
        if kept is None or not kept.is_streamed:
            await self._shown(request)
            raise HttpError(
                400, "not_streamed", "only responses of background: true and stream: true can be streamed again"
            )
        after = Position()
        if "starting_after" in request.query_params:
            after = read_position(str(_number(request, "starting_after", 0) + 1), "starting_after")
        return await self._replies.respond(request, kept, after)

    async def _shown(self, request: Request) -> dict[str, Any]:
        """HttpError where there is none."""
        stored = self._store.get(self._owner(request), request.path_params["id"])
        if stored is not None and stored.response["status"] not in _RUNNING:
            return stored.response
        kept = self._kept(request)
        if kept is None:
            raise self._not_found(request)
        kept.resume()
        if kept.is_complete:  # the store has no room for it any more, or gets it now
            complete: dict[str, Any] = await kept.value()
            return complete
        return _unended(kept, request.path_params["id"])

    def _kept(self, request: Request) -> KeptReply | None:
        """The reply of a response in the background; others are kept too."""
        name = request.path_params["id"]
        kept = self._replies.cache.named(self._owner(request), name) if name.startswith(ID_PREFIX) else None
        return kept if kept is not None and kept.is_background else None

    def _owner(self, request: Request) -> str:
        return owner(request.headers, self._replies.settings.api_keys)

    def _not_found(self, request: Request) -> HttpError:
        return HttpError(404, "response_not_found", f"no response {request.path_params['id'][:60]!r} is stored here")


def _unended(kept: KeptReply, response_id: str) -> dict[str, Any]:
    """A response that is not stored yet. One that waits for its turn after a restart is known by its id alone."""
    known = kept.acknowledgement
    shown: dict[str, Any] = {"id": response_id, "object": "response", "created_at": kept.ticket.created}
    shown |= {"background": True, "output": []} if known is None else json.loads(known)
    if isinstance(kept.error, ClusterStoppingError):  # the next coordinator computes it on
        raise kept.error
    if kept.error is not None:
        return failed(shown, kept.error)
    return {**shown, "status": Status.QUEUED if known is None else Status.IN_PROGRESS}


def _number(request: Request, name: str, default: int) -> int:
    text = request.query_params.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 12):
        raise HttpError(400, "bad_number", f"{name}: {text[:60]!r} is not a number", param=name)
    return int(text)
