"""OpenAI's endpoints that generate text: chat completions, text completions, and responses."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Awaitable, Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Final, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from llamaclust.cluster.front.body import converted
from llamaclust.cluster.front.dialects.dialect import Dialect, ParsedRequest
from llamaclust.cluster.front.dialects.openai.response_items import REFERENCE, Item, has_references, messages_of
from llamaclust.cluster.front.dialects.openai.response_schema import (
    CompactionBody,
    ResponseHead,
    ResponsesBody,
)
from llamaclust.cluster.front.dialects.openai.response_store import Messages, ResponseStore
from llamaclust.cluster.front.dialects.openai.response_view import CompactionView, ResponseView
from llamaclust.cluster.front.dialects.openai.schema import ChatBody, CompletionBody
from llamaclust.cluster.front.dialects.openai.view import AnyGeneration, ChatView, CompletionView, OpenAiView
from llamaclust.cluster.front.http.gates import owner
from llamaclust.cluster.front.http.responses import Route
from llamaclust.cluster.front.models import ApiModel
from llamaclust.cluster.front.replies.reply import Reply
from llamaclust.cluster.front.text.answer_log import Timed
from llamaclust.cluster.front.text.request import ChatRequest, CompletionRequest
from llamaclust.cluster.state.journal_records import RequestContext

_COUNT: Final = "response.input_tokens"


class _Generating(Dialect[AnyGeneration]):
    view: type[OpenAiView[AnyGeneration]]

    async def reply(self, parsed: ParsedRequest[AnyGeneration]) -> Reply:
        body = parsed.body
        return Reply(
            service=self.service,
            requests=partial(self._requests, parsed),
            view=partial(self.view, body, parsed.context, parsed.model, self.service.tokenizer),
            is_streamed=body.stream,
            timed=Timed.ALWAYS if body.timings_per_token else Timed.NEVER,
            with_progress=body.return_progress,
            has_measurements=body.has_measurements,
        )

    @abstractmethod
    async def _requests(self, parsed: ParsedRequest[AnyGeneration]) -> list[CompletionRequest]: ...


class TextCompletions(_Generating[CompletionBody]):
    paths = ("/v1/completions",)
    body, view = CompletionBody, CompletionView

    def sequences(self, body: CompletionBody) -> int:
        return 0 if body.max_tokens == 0 else len(body.prompt)

    async def _requests(self, parsed: ParsedRequest[CompletionBody]) -> list[CompletionRequest]:
        body, fill = parsed.body, self.service.fill_suffix
        requests = [replace(each, adapters=parsed.adapters) for each in await converted(body, body.requests)]
        if not body.suffix:
            return requests
        return [replace(each, prompt=await fill(each.prompt, body.suffix, each.max_new_tokens)) for each in requests]


class ChatCompletions(_Generating[ChatBody]):
    paths = ("/v1/chat/completions", "/chat/completions")
    body, view = ChatBody, ChatView

    def routes(self) -> Iterator[Route]:
        """Adds llama.cpp's endpoint that counts a chat's tokens."""
        yield from super().routes()
        if self.path == "/chat/completions":
            for path in self.paths:
                yield Route("POST", f"{path}/input_tokens", self.count, self.body)

    async def _requests(self, parsed: ParsedRequest[ChatBody]) -> list[CompletionRequest]:
        return [await self.service.chat(await parsed.chat(parsed.body.request))]

    async def count(self, request: Request) -> Response:
        """Counts the tokens of a chat's prompt. No answer is generated."""
        body = await self.read(request)
        return await self.counted(request, await converted(body, body.request), object=_COUNT)


_AnyResponse = TypeVar("_AnyResponse", bound=ResponsesBody | CompactionBody)


class _Continuing(Dialect[_AnyResponse]):
    def __init__(self, model: ApiModel, path: str, store: ResponseStore) -> None:
        super().__init__(model, path)
        self._store = store

    async def _requests(
        self, chat: ChatRequest, prepare: Callable[[], Awaitable[None]] | None = None
    ) -> list[CompletionRequest]:
        completion = await self.service.chat(chat)
        if prepare is not None:
            await prepare()
        return [completion]

    async def _chat(self, body: _AnyResponse, context: RequestContext) -> tuple[list[Item], Messages]:
        if not has_references(body.input):
            context.earlier = context.earlier or self._earlier(body, context.owner)
            return body.input, (*context.earlier, *await converted(body, messages_of, body.input))
        if context.earlier:
            return [item for item in body.input if item["type"] != REFERENCE], tuple(context.earlier)
        items, context.earlier = await self._resolved(body, context.owner)
        return items, context.earlier

    async def _resolved(self, body: _AnyResponse, owner: str) -> tuple[list[Item], Messages]:
        items = await self._store.resolved(owner, body.input, self.settings.max_body_bytes)
        return items, (*self._earlier(body, owner), *await converted(body, messages_of, items))

    def _earlier(self, body: _AnyResponse, owner: str) -> Messages:
        followed = body.previous_response_id
        return () if followed is None else self._store.followed(owner, followed).messages


class Compaction(_Continuing[CompactionBody]):
    body = CompactionBody

    async def reply(self, parsed: ParsedRequest[CompactionBody]) -> Reply:
        _, messages = await self._chat(parsed.body, parsed.context)
        chat = await parsed.chat(parsed.body.request, messages)
        view = partial(CompactionView, parsed.context)
        return Reply(service=self.service, requests=partial(self._requests, chat), view=view, is_streamed=False)


class Responses(_Continuing[ResponsesBody]):
    paths = ("/v1/responses", "/responses")
    body = ResponsesBody

    def routes(self) -> Iterator[Route]:
        yield from super().routes()
        yield from Compaction(self.model, f"{self.path}/compact", self._store).routes()
        yield Route("POST", f"{self.path}/input_tokens", self.count, self.body)

    async def reply(self, parsed: ParsedRequest[ResponsesBody]) -> Reply:
        body, context = parsed.body, parsed.context
        items, messages = await self._chat(body, context)
        body = await converted(body, body.offering, messages)
        chat = await parsed.chat(body.request, messages)
        head = ResponseHead(context.id, context.created, parsed.model, body)
        begun = head.begun
        storing = self._store.storing(context.owner, begun["id"], items, messages) if body.store else None
        in_background = storing if body.background else None
        prepare = None if in_background is None else partial(in_background.prepare, begun)
        complete = None if storing is None else storing.complete
        return Reply(
            service=self.service,
            requests=partial(self._requests, chat, prepare),
            view=partial(ResponseView, head, self.service.tokenizer, complete),
            is_streamed=body.stream,
            timed=Timed.ALWAYS if body.timings_per_token else Timed.NEVER,
            with_progress=body.return_progress,
            keeps_chunks=body.with_logprobs,
            has_measurements=body.timings_per_token or body.return_progress,
            acknowledgement=begun if body.background else None,
            repeated=[begun, items, messages],
            is_stored=body.store,
            while_computed=in_background or nullcontext(),
        )

    async def count(self, request: Request) -> Response:
        """Counts the tokens of a response's prompt. No answer is generated."""
        body = await self.read(request)
        _, messages = await self._resolved(body, owner(request.headers, self.settings.api_keys))
        body = await converted(body, body.offering, messages)
        return await self.counted(request, await converted(body, body.request, messages), object=_COUNT)
