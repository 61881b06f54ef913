"""`POST /v1/responses`: from a body to the description of its reply."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from starlette.requests import Request
from starlette.responses import Response

from llamaclust.cluster.front.body import converted, parse_body, read_body
from llamaclust.cluster.front.dialects.openai.response_items import REFERENCE, Item, has_references, messages_of
from llamaclust.cluster.front.dialects.openai.response_schema import CompactionBody, ResponseHead, ResponsesBody
from llamaclust.cluster.front.dialects.openai.response_store import Messages, ResponseStore, Storing
from llamaclust.cluster.front.dialects.openai.response_view import CompactionView, ResponseView
from llamaclust.cluster.front.http.gates import owner
from llamaclust.cluster.front.http.responses import JsonResponse
from llamaclust.cluster.front.http.sse import unless_disconnected
from llamaclust.cluster.front.json_text import to_json
from llamaclust.cluster.front.replies.reply import Reply
from llamaclust.cluster.front.settings import ApiSettings, ModelNames
from llamaclust.cluster.front.text.answer_log import Timed
from llamaclust.cluster.front.text.request import ChatRequest, CompletionRequest
from llamaclust.cluster.front.text.service import TextService
from llamaclust.cluster.state.journal_records import RequestContext

_Body = ResponsesBody | CompactionBody


class ResponsesEndpoint:
    """Makes responses."""

    def __init__(self, service: TextService, settings: ApiSettings, models: ModelNames, store: ResponseStore) -> None:
        self._service = service
        self._settings = settings
        self._models = models
        self._store = store

    async def create(self, data: bytes, context: RequestContext) -> Reply:
        body = await parse_body(data, ResponsesBody, self._settings)
        adapters, model = self._models.adapters(body.model, body.lora, context.scales), self._models.shown(body.model)
        body.check()
        items, messages = self._chat(body, context)
        chat = await converted(body, body.request, messages)
        head = ResponseHead(context.id, context.created, model, body)
        storing = Storing(self._store, context.owner, items, messages) if body.store else None
        begin = partial(storing.begin, head.begun) if storing is not None and body.background else None
        complete = None if storing is None else storing.complete
        return Reply(
            service=self._service,
            requests=partial(self._requests, chat.admitted(context.created, adapters), begin),
            view=partial(ResponseView, head, self._service.tokenizer, complete),
            is_streamed=body.stream,
            timed=Timed.ALWAYS if body.timings_per_token else Timed.NEVER,
            with_progress=body.return_progress,
            keeps_chunks=body.with_logprobs,
            has_measurements=body.timings_per_token or body.return_progress,
            acknowledgement=to_json(head.begun) if body.background else None,
            is_stored=body.store,
        )

    async def compact(self, data: bytes, context: RequestContext) -> Reply:
        """A summary of a chat."""
        body = await parse_body(data, CompactionBody, self._settings)
        adapters = self._models.adapters(body.model, body.lora, context.scales)
        _, messages = self._chat(body, context)
        chat = await converted(body, body.request, messages)
        requests = partial(self._requests, chat.admitted(context.created, adapters), None)
        view = partial(CompactionView, context)
        return Reply(service=self._service, requests=requests, view=view, is_streamed=False)

    async def count(self, request: Request) -> Response:
        """The tokens of a response's prompt."""
        body = await read_body(request, ResponsesBody, self._settings)
        self._models.adapters(body.model, body.lora)
        body.check()
        _, messages = self._resolved(body, owner(request.headers, self._settings.api_keys))
        chat = await converted(body, body.request, messages)
        completion = await unless_disconnected(request, self._service.chat_prompt(chat))
        return JsonResponse({"object": "response.input_tokens", "input_tokens": len(completion.prompt)})

    async def _requests(self, chat: ChatRequest, begin: Callable[[], None] | None) -> list[CompletionRequest]:
        completion = await self._service.chat(chat)
        if begin is not None:
            begin()
        return [completion]

    def _chat(self, body: _Body, context: RequestContext) -> tuple[list[Item], Messages]:
        """The input's items, and all messages of the chat. What is in the store now, a later computation has from the
        context: earlier messages, or all where the input has references."""
        if not has_references(body.input):
            context.earlier = context.earlier or self._earlier(body, context.owner)
            return body.input, (*context.earlier, *messages_of(body.input))
        if context.earlier:
            return [item for item in body.input if item["type"] != REFERENCE], tuple(context.earlier)
        items, context.earlier = self._resolved(body, context.owner)
        return items, context.earlier

    def _resolved(self, body: _Body, owner: str) -> tuple[list[Item], Messages]:
        """The same by what is in the store."""
        items = self._store.resolved(owner, body.input, self._settings.max_body_bytes)
        return items, (*self._earlier(body, owner), *messages_of(items))

    def _earlier(self, body: _Body, owner: str) -> Messages:
        """The messages of the chat that the input continues."""
        followed = body.previous_response_id
        return () if followed is None else self._store.followed(owner, followed).messages
