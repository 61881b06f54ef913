"""`/v1/completions` and `/v1/chat/completions`: from a body to the description of its reply."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from functools import partial
from typing import Generic

from starlette.requests import Request
from starlette.responses import Response

from llamaclust.cluster.front.body import converted, parse_body, read_body
from llamaclust.cluster.front.dialects.openai.schema import ChatBody, CompletionBody
from llamaclust.cluster.front.dialects.openai.view import AnyGeneration, ChatView, CompletionView, OpenAiView
from llamaclust.cluster.front.http.responses import JsonResponse
from llamaclust.cluster.front.http.sse import unless_disconnected
from llamaclust.cluster.front.replies.reply import Reply
from llamaclust.cluster.front.settings import ApiSettings, ModelNames
from llamaclust.cluster.front.text.answer_log import Timed
from llamaclust.cluster.front.text.request import CompletionRequest
from llamaclust.cluster.front.text.service import TextService
from llamaclust.cluster.state.journal_records import RequestContext
from llamaclust.core.limits import AdapterScales


class _Endpoint(ABC, Generic[AnyGeneration]):
    """Makes replies of one kind."""

    body: type[AnyGeneration]
    view: type[OpenAiView[AnyGeneration]]

    def __init__(self, service: TextService, settings: ApiSettings, models: ModelNames) -> None:
        self._service = service
        self._settings = settings
        self._models = models

    async def create(self, data: bytes, context: RequestContext) -> Reply:
        body = await parse_body(data, self.body, self._settings)
        adapters = self._models.adapters(body.model, body.lora, context.scales)
        body.check()
        return Reply(
            service=self._service,
            requests=partial(self._requests, body, context, adapters),
            view=partial(self.view, body, context, self._models.shown(body.model), self._service.tokenizer),
            is_streamed=body.stream,
            timed=Timed.ALWAYS if body.timings_per_token else Timed.NEVER,
            with_progress=body.return_progress,
            has_measurements=body.has_measurements,
        )

    @abstractmethod
    async def _requests(
        self, body: AnyGeneration, context: RequestContext, adapters: AdapterScales
    ) -> list[CompletionRequest]: ...


class CompletionEndpoint(_Endpoint[CompletionBody]):
    """Prompts as they are, text or token ids."""

    body, view = CompletionBody, CompletionView

    async def _requests(
        self, body: CompletionBody, context: RequestContext, adapters: AdapterScales
    ) -> list[CompletionRequest]:
        return [replace(request, adapters=adapters) for request in await converted(body, body.requests)]


class ChatEndpoint(_Endpoint[ChatBody]):
    """Chats, rendered by the model's own template."""

    body, view = ChatBody, ChatView

    async def _requests(
        self, body: ChatBody, context: RequestContext, adapters: AdapterScales
    ) -> list[CompletionRequest]:
        chat = await converted(body, body.request)
        return [await self._service.chat(chat.admitted(context.created, adapters))]

    async def count(self, request: Request) -> Response:
        """The tokens of a chat's prompt (llama.cpp's `.../input_tokens`)."""
        body = await read_body(request, ChatBody, self._settings)
        self._models.adapters(body.model, body.lora)
        body.check()
        chat = await converted(body, body.request)
        answer = await unless_disconnected(request, self._service.chat_prompt(chat))
        return JsonResponse({"object": "response.input_tokens", "input_tokens": len(answer.prompt)})
