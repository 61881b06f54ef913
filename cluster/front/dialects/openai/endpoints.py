"""OpenAI's endpoints: chats, completions, responses, and the served models."""

from __future__ import annotations

import json
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Final, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from llamaclust.cluster.front.body import converted, parse_object_in_time, read_bytes
from llamaclust.cluster.front.dialects.dialect import Asked, Dialect
from llamaclust.cluster.front.dialects.openai.response_items import REFERENCE, Item, has_references, messages_of
from llamaclust.cluster.front.dialects.openai.response_schema import (
    ID_PREFIX,
    CompactionBody,
    ResponseHead,
    ResponsesBody,
    Status,
)
from llamaclust.cluster.front.dialects.openai.response_store import Messages, ResponseStore, StoredResponse, Storing
from llamaclust.cluster.front.dialects.openai.response_view import CompactionView, ResponseView
from llamaclust.cluster.front.dialects.openai.schema import ChatBody, CompletionBody
from llamaclust.cluster.front.dialects.openai.view import AnyGeneration, ChatView, CompletionView, OpenAiView
from llamaclust.cluster.front.errors import ErrorShape, HttpError, openai_error
from llamaclust.cluster.front.http.gates import owner
from llamaclust.cluster.front.http.responses import EVENTS, JSON, JsonResponse, QueryParameter, Route, unsupported
from llamaclust.cluster.front.http.sse import rendered
from llamaclust.cluster.front.json_text import to_json
from llamaclust.cluster.front.models import ApiModel, ModelRouter
from llamaclust.cluster.front.replies.handlers import Replies
from llamaclust.cluster.front.replies.kept_reply import KeptReply
from llamaclust.cluster.front.replies.reply import Position, Reply, read_position
from llamaclust.cluster.front.sampling import chat_sampling
from llamaclust.cluster.front.settings import ModelNames
from llamaclust.cluster.front.text.answer_log import Timed
from llamaclust.cluster.front.text.request import ChatRequest, CompletionRequest
from llamaclust.cluster.state.adapters import ServedAdapter
from llamaclust.cluster.state.journal_records import RequestContext
from llamaclust.core.errors import ClusterStoppingError, ParameterError
from llamaclust.wire.rpc.deadlines import deadline

_COUNT: Final = "response.input_tokens"
_MOST_LISTED: Final = 100
_LISTED: Final = 20
_RUNNING: Final = (Status.QUEUED, Status.IN_PROGRESS)
_RETRIEVED: Final = (
    QueryParameter("stream", "boolean", "the events of a response that is streamed in the background"),
    QueryParameter("starting_after", "integer", "the number of the last event that the client has"),
)
_ITEMS: Final = (
    QueryParameter("limit", "integer", "items at most, up to 100"),
    QueryParameter("order", "string", "asc: the oldest first"),
    QueryParameter("after", "string", "the id of the item before the first one"),
)
_ONE_MODEL: Final = "one model is served, which stays loaded; list several as `models` in the cluster file"
_UNLOAD_S: Final = 60.0
"""A reply waits so long for the end of a load, which is not cancelled."""


class _Generating(Dialect[AnyGeneration]):
    """An endpoint whose replies have choices."""

    view: type[OpenAiView[AnyGeneration]]

    async def reply(self, asked: Asked[AnyGeneration]) -> Reply:
        body = asked.body
        return Reply(
            service=self.service,
            requests=partial(self._requests, asked),
            view=partial(self.view, body, asked.context, asked.model, self.service.tokenizer),
            is_streamed=body.stream,
            timed=Timed.ALWAYS if body.timings_per_token else Timed.NEVER,
            with_progress=body.return_progress,
            has_measurements=body.has_measurements,
        )

    @abstractmethod
    async def _requests(self, asked: Asked[AnyGeneration]) -> list[CompletionRequest]: ...


class TextCompletions(_Generating[CompletionBody]):
    """Prompts as they are, text or token ids."""

    paths = ("/v1/completions",)
    body, view = CompletionBody, CompletionView

    async def _requests(self, asked: Asked[CompletionBody]) -> list[CompletionRequest]:
        requests = await converted(asked.body, asked.body.requests)
        return [replace(request, adapters=asked.adapters) for request in requests]


class ChatCompletions(_Generating[ChatBody]):
    """Chats, rendered by the model's own template."""

    paths = ("/v1/chat/completions", "/chat/completions")
    body, view = ChatBody, ChatView

    def routes(self) -> Iterator[Route]:
        """The tokens of a chat are counted, as llama.cpp does, whatever model it names."""
        yield from super().routes()
        if self.path == "/chat/completions":
            for path in self.paths:
                yield Route("POST", f"{path}/input_tokens", self.count, self.body)

    async def _requests(self, asked: Asked[ChatBody]) -> list[CompletionRequest]:
        return [await self.service.chat(await asked.chat(asked.body.request))]

    async def count(self, request: Request) -> Response:
        """The tokens of a chat's prompt (llama.cpp's `.../input_tokens`)."""
        body = await self.read(request)
        return await self.counted(request, await converted(body, body.request), object=_COUNT)


_AnyResponse = TypeVar("_AnyResponse", bound=ResponsesBody | CompactionBody)


class _Continuing(Dialect[_AnyResponse]):
    """An endpoint whose requests may continue stored chats."""

    def __init__(self, model: ApiModel, path: str, store: ResponseStore) -> None:
        super().__init__(model, path)
        self._store = store

    async def _requests(self, chat: ChatRequest, begin: Callable[[], None] | None = None) -> list[CompletionRequest]:
        completion = await self.service.chat(chat)
        if begin is not None:
            begin()
        return [completion]

    def _chat(self, body: _AnyResponse, context: RequestContext) -> tuple[list[Item], Messages]:
        """The input's items, and all messages of the chat. What is in the store now, a later computation has from the
        context: earlier messages, or all where the input has references."""
        if not has_references(body.input):
            context.earlier = context.earlier or self._earlier(body, context.owner)
            return body.input, (*context.earlier, *messages_of(body.input))
        if context.earlier:
            return [item for item in body.input if item["type"] != REFERENCE], tuple(context.earlier)
        items, context.earlier = self._resolved(body, context.owner)
        return items, context.earlier

    def _resolved(self, body: _AnyResponse, owner: str) -> tuple[list[Item], Messages]:
        """Resolves the input and the earlier messages by what the store has."""
        items = self._store.resolved(owner, body.input, self.settings.max_body_bytes)
        return items, (*self._earlier(body, owner), *messages_of(items))

    def _earlier(self, body: _AnyResponse, owner: str) -> Messages:
        """The messages of the chat that the input continues."""
        followed = body.previous_response_id
        return () if followed is None else self._store.followed(owner, followed).messages


class Compaction(_Continuing[CompactionBody]):
    """Summaries of chats."""

    body = CompactionBody

    async def reply(self, asked: Asked[CompactionBody]) -> Reply:
        _, messages = self._chat(asked.body, asked.context)
        chat = await asked.chat(asked.body.request, messages)
        view = partial(CompactionView, asked.context)
        return Reply(service=self.service, requests=partial(self._requests, chat), view=view, is_streamed=False)


class Responses(_Continuing[ResponsesBody]):
    """Responses of a model."""

    paths = ("/v1/responses", "/responses")
    body = ResponsesBody
    errors = ErrorShape(openai_error, "error")

    def routes(self) -> Iterator[Route]:
        yield from super().routes()
        yield from Compaction(self.model, f"{self.path}/compact", self._store).routes()
        yield Route("POST", f"{self.path}/input_tokens", self.count, self.body)

    async def reply(self, asked: Asked[ResponsesBody]) -> Reply:
        body, context = asked.body, asked.context
        items, messages = self._chat(body, context)
        chat = await asked.chat(body.request, messages)
        head = ResponseHead(context.id, context.created, asked.model, body)
        storing = Storing(self._store, context.owner, items, messages) if body.store else None
        begin = partial(storing.begin, head.begun) if storing is not None and body.background else None
        complete = None if storing is None else storing.complete
        return Reply(
            service=self.service,
            requests=partial(self._requests, chat, begin),
            view=partial(ResponseView, head, self.service.tokenizer, complete),
            is_streamed=body.stream,
            timed=Timed.ALWAYS if body.timings_per_token else Timed.NEVER,
            with_progress=body.return_progress,
            keeps_chunks=body.with_logprobs,
            has_measurements=body.timings_per_token or body.return_progress,
            acknowledgement=to_json(head.begun) if body.background else None,
            is_stored=body.store,
        )

    async def count(self, request: Request) -> Response:
        """The tokens of a response's prompt."""
        body = await self.read(request)
        _, messages = self._resolved(body, owner(request.headers, self.settings.api_keys))
        return await self.counted(request, await converted(body, body.request, messages), object=_COUNT)


class CreatedResponses:
    """The responses of all models, which can be read again, and cancelled while they are computed in the background."""

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
        """A response as it is; `?stream=true`: the events of one that was streamed in the background, after the one of
        number `starting_after`."""
        if request.query_params.get("stream", "false").lower() not in ("true", "1"):
            return rendered(await self._shown(request))
        kept = self._kept(request)
        if kept is None or not kept.context.is_streamed:
            await self._shown(request)
            message = "only responses of background: true and stream: true can be streamed again"
            raise HttpError(400, "not_streamed", message)
        after = Position()
        if "starting_after" in request.query_params:
            after = read_position(str(_number(request, "starting_after", 0) + 1), "starting_after")
        return await self.replies.respond(request, kept, after)

    async def cancel(self, request: Request) -> Response:
        """Ends a response that is computed in the background."""
        kept, response = self._kept(request), await self._shown(request)
        if not response["background"]:
            message = f"response {response['id']} was not created with background: true"
            raise HttpError(400, "not_in_background", message)
        if kept is not None and response["status"] in _RUNNING:
            response = {**response, "status": Status.CANCELLED}
            key = self._key(request)
            begun = self._store.get(*key)
            self._store.put(key[0], StoredResponse(response, [] if begun is None else begun.input_items, ()))
            await self.replies.cache.forget(kept)
        return rendered(response)

    async def delete(self, request: Request) -> Response:
        """Ends a response that runs, in the background or kept for its client, and forgets it."""
        kept, is_stored = self._named(request), self._store.delete(*self._key(request))
        if kept is not None:
            await self.replies.cache.forget(kept)
        elif not is_stored:
            raise _not_found(request)
        return JsonResponse({"id": request.path_params["id"], "object": "response", "deleted": True})

    async def input_items(self, request: Request) -> Response:
        """The input of a response; the newest item first unless `order=asc`."""
        stored = self._store.get(*self._key(request))
        if stored is None:
            raise _not_found(request)
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
        ids = [item["id"] for item in shown] or [None]
        ends = {"first_id": ids[0], "last_id": ids[-1]}
        return rendered({"object": "list", "data": shown, **ends, "has_more": len(rest) > most})

    async def _shown(self, request: Request) -> dict[str, Any]:
        """Returns a response as it is now. Raises HttpError where there is none."""
        stored = self._store.get(*self._key(request))
        if stored is not None and stored.response["status"] not in _RUNNING:
            return stored.response
        kept = self._kept(request)
        if kept is None:
            raise _not_found(request)
        kept.resume()
        if kept.log.is_over and kept.error is None:  # the store has no room for it any more, or gets it now
            complete: dict[str, Any] = await kept.value()
            return complete
        return _unended(kept, request.path_params["id"])

    def _kept(self, request: Request) -> KeptReply | None:
        """The reply of a response in the background; others are kept too."""
        kept = self._named(request)
        return kept if kept is not None and kept.context.is_background else None

    def _named(self, request: Request) -> KeptReply | None:
        """The kept reply of a response or a compaction."""
        key = self._key(request)
        kept = self.replies.cache.named(*key) if key[1].startswith(ID_PREFIX) else None
        return kept if kept is not None and kept.context.endpoint.startswith(self.paths) else None

    def _key(self, request: Request) -> tuple[str, str]:
        """The owner and the id of a response."""
        return owner(request.headers, self.replies.settings.api_keys), request.path_params["id"]


def _not_found(request: Request) -> HttpError:
    return HttpError(404, "response_not_found", f"no response {request.path_params['id'][:60]!r} is stored here")


def _unended(kept: KeptReply, response_id: str) -> dict[str, Any]:
    """A response that is not stored yet. One that waits for its turn after a restart is known by its id alone."""
    known = kept.acknowledgement
    shown: dict[str, Any] = {"id": response_id, "object": "response", "created_at": kept.context.created}
    shown |= {"background": True, "output": []} if known is None else json.loads(known)
    if isinstance(kept.error, ClusterStoppingError):  # the next coordinator computes it on
        raise kept.error
    if kept.error is not None:
        error = {"code": "server_error", "message": str(kept.error)}
        return {**shown, "status": Status.FAILED, "error": error}
    return {**shown, "status": Status.QUEUED if known is None else Status.IN_PROGRESS}


def _number(request: Request, name: str, default: int) -> int:
    text = request.query_params.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 12):
        raise HttpError(400, "bad_number", f"{name}: {text[:60]!r} is not a number", param=name)
    return int(text)


class ModelEndpoints:
    """The endpoints of served models, in OpenAI's form with a few fields of vLLM and of llama.cpp's router."""

    def __init__(self, router: ModelRouter) -> None:
        self._router = router
        self._can_unload = router.settings.can_unload
        self._created = int(time.time())

    def routes(self) -> Iterator[Route]:
        yield Route("GET", "/v1/models", self.list)
        yield Route("GET", "/v1/models/{model:path}", self.retrieve)
        for endpoint in (self.load, self.unload):
            served = endpoint if self._can_unload else unsupported(_ONE_MODEL)
            yield Route("POST", f"/v1/models/{endpoint.__name__}", served)

    async def list(self, request: Request) -> Response:
        models = self._router.models
        entries = [self._entry(model, adapter) for model in models for adapter in (None, *model.settings.adapters)]
        return JsonResponse({"object": "list", "data": entries})

    async def retrieve(self, request: Request) -> Response:
        name = request.path_params["model"]
        model = self._router.named(name)
        adapter = next((adapter for adapter in model.settings.adapters if adapter.name == name), None)
        if adapter is None and not self._can_unload:
            ModelNames(model.name, model.settings).check(name)
        return JsonResponse(self._entry(model, adapter))

    async def load(self, request: Request) -> Response:
        """Loads the named model, where memory is left or other models have no requests; answers at once."""
        (await self._named(request)).resident.load()
        return JsonResponse({"success": True})

    async def unload(self, request: Request) -> Response:
        """Unloads the named model; answers once it sleeps. HttpError 409 where it has requests; DeadlineError where a
        load takes long, after which it sleeps none the less."""
        model = await self._named(request)
        async with deadline(f"the end of a load of {model.name!r}, which is unloaded then", _UNLOAD_S):
            await model.resident.sleep()
        if not model.resident.is_asleep:
            message = f"model: {model.name!r} has requests and stays loaded; try again after their replies"
            raise HttpError(409, "model_in_use", message, param="model")
        return JsonResponse({"success": True})

    async def _named(self, request: Request) -> ApiModel:
        name = (await parse_object_in_time(await read_bytes(request, self._router.settings))).get("model")
        if not isinstance(name, str):
            raise ParameterError("model", "is missing" if name is None else "must be a string")
        return self._router.named(name)

    def _entry(self, model: ApiModel, adapter: ServedAdapter | None) -> dict[str, Any]:
        """The model under its own name, or an adapter as vLLM shows it."""
        settings = model.settings
        entry = {
            "id": model.name,
            "object": "model",
            "aliases": settings.aliases,
            "tags": settings.tags,
            "created": self._created,
            "owned_by": "llamaclust",
            "max_model_len": model.service.settings.context_length,
            "chat_sampling": chat_sampling(settings.recommended, settings.defaults),
        }
        if adapter is not None:
            entry |= {"id": adapter.name, "aliases": (), "parent": model.name, "root": adapter.path}
        return {**entry, "status": {"value": _status(model)}} if self._can_unload else entry


def _status(model: ApiModel) -> str:
    """The words of llama.cpp's router."""
    if model.resident.is_asleep:
        return "unloaded"
    return "loading" if model.resident.is_loading else "loaded"
