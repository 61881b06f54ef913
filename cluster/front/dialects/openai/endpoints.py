"""`/v1/completions` and `/v1/chat/completions`: from a body to the description of its reply."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from llamaclust.cluster.front.body import converted, parse_body, read_body
from llamaclust.cluster.front.dialects.openai.schema import ChatBody, CompletionBody
from llamaclust.cluster.front.dialects.openai.view import (
    NO_ECHO,
    Choice,
    Echo,
    MessageDeltas,
    OpenAiHead,
    OpenAiView,
    ReplyKind,
    ShownToken,
    completion_logprobs,
    ending,
    make_echo,
    message_of,
)
from llamaclust.cluster.front.fields.model import ModelNames
from llamaclust.cluster.front.fields.sampling import row_entry
from llamaclust.cluster.front.fields.tools import ClientTool
from llamaclust.cluster.front.foreign_fields import CHAT, COMPLETION
from llamaclust.cluster.front.http.responses import JsonResponse
from llamaclust.cluster.front.http.sse import unless_disconnected
from llamaclust.cluster.front.replies.reply import Reply
from llamaclust.cluster.front.replies.ticket import Ticket
from llamaclust.cluster.front.settings import ApiSettings
from llamaclust.cluster.front.text.answer import TextChunk
from llamaclust.cluster.front.text.answer_log import AnswerLog
from llamaclust.cluster.front.text.request import CompletionRequest
from llamaclust.cluster.front.text.service import TextService
from llamaclust.core.sampling import RowResult
from llamaclust.model.chat.tools.events import ContentText
from llamaclust.model.tokenizers.tokenizer import Tokenizer

_KIND: Final = ReplyKind("cmpl-", "text_completion", "text_completion")


class CompletionEndpoint:
    """Prompts as they are, text or token ids."""

    def __init__(self, service: TextService, settings: ApiSettings, models: ModelNames) -> None:
        self._service = service
        self._settings = settings
        self._models = models

    async def create(self, data: bytes, ticket: Ticket) -> Reply:
        body = await parse_body(data, CompletionBody, COMPLETION, self._settings)
        adapters = self._models.adapters(body.model, body.lora, ticket.scales)
        body.check()

        async def requests() -> list[CompletionRequest]:
            return [replace(request, adapters=adapters) for request in await converted(body, body.requests)]

        head = OpenAiHead.of(_KIND, body, ticket, self._models.shown(body.model))
        return head.reply(self._service, requests, partial(CompletionView, body, head, self._service.tokenizer))


class CompletionView(OpenAiView):
    """Choices as text."""

    def __init__(self, body: CompletionBody, head: OpenAiHead, tokenizer: Tokenizer, log: AnswerLog) -> None:
        super().__init__(head, tokenizer, log)
        self._body = body
        self._echoes: dict[int, Echo] = {}

    def _opening(self, prompt: int, index: int) -> Choice | None:
        if not (self._body.echo or self._body.return_token_ids):
            return None
        echo = self._echo(prompt)
        logprobs = self._logprobs(echo.unscored)
        choice = {"index": self._index(prompt, index), "text": echo.text, "logprobs": logprobs, "finish_reason": None}
        return choice | self._ids(token_ids=(), prompt_token_ids=self._generations[prompt].prompt)

    def _chunk(self, prompt: int, chunk: TextChunk) -> Choice | None:
        has_tokens = bool(chunk.rows) and self._body.return_token_ids
        logprobs = None if self._body.logprobs is None else self._logprobs(self._shown_tokens(prompt, chunk))
        if not (chunk.text or has_tokens or logprobs or chunk.finish_reason):
            return None
        return {
            "index": self._index(prompt, chunk.index),
            "text": chunk.text,
            "logprobs": logprobs,
            **self._ids(token_ids=chunk.token_ids),
            **ending(chunk),
        }

    def _text(self, chunk: TextChunk) -> tuple[str, str] | None:
        has_more = self._body.logprobs is not None or self._body.return_token_ids or chunk.finish_reason is not None
        return None if has_more or not chunk.text else ("text", chunk.text)

    def _answer(self, prompt: int, answer: TextChunk) -> Choice:
        echo = self._echo(prompt)
        return {
            "index": self._index(prompt, answer.index),
            "text": echo.text + answer.text,
            "logprobs": self._logprobs([*echo.unscored, *self._shown_tokens(prompt, answer)]),
            **self._ids(token_ids=answer.token_ids, prompt_token_ids=self._generations[prompt].prompt),
            **ending(answer),
        }

    def _index(self, prompt: int, index: int) -> int:
        return prompt * self._body.n + index

    def _ids(self, **ids: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return ids if self._body.return_token_ids else {}

    def _echo(self, prompt: int) -> Echo:
        """Made once a prompt."""
        if prompt not in self._echoes:
            given = self._body.prompt[prompt]
            score_from = self._body.score_from or 0
            ids = self._generations[prompt].prompt
            echo = make_echo(self._tokenizer, given, ids, score_from) if self._body.echo else NO_ECHO
            self._echoes[prompt] = echo
        return self._echoes[prompt]

    def _shown_tokens(self, prompt: int, part: TextChunk) -> list[ShownToken]:
        echo = self._echoes.get(prompt, NO_ECHO)
        first = part.prompt_start
        scored = zip(part.prompt_rows, echo.offsets[first : first + len(part.prompt_rows)], strict=True)
        chosen = zip(part.rows, part.offsets, strict=True)
        return [
            *(ShownToken(row.token, offset, row) for row, offset in scored),
            *(ShownToken(row.token, len(echo.text) + offset, row) for row, offset in chosen),
        ]

    def _logprobs(self, tokens: Sequence[ShownToken]) -> dict[str, Any] | None:
        if self._body.logprobs is None or not tokens:
            return None
        return completion_logprobs(self._tokenizer, tokens)


_CHAT: Final = ReplyKind("chatcmpl-", "chat.completion", "chat.completion.chunk")


class ChatEndpoint:
    """Chats, rendered by the model's own template."""

    def __init__(self, service: TextService, settings: ApiSettings, models: ModelNames) -> None:
        self._service = service
        self._settings = settings
        self._models = models

    async def create(self, data: bytes, ticket: Ticket) -> Reply:
        body = await parse_body(data, ChatBody, CHAT, self._settings)
        adapters = self._models.adapters(body.model, body.lora, ticket.scales)
        body.check()

        async def requests() -> list[CompletionRequest]:
            chat = await converted(body, body.request)
            return [await self._service.chat(chat.admitted(ticket.created, adapters))]

        head = OpenAiHead.of(_CHAT, body, ticket, self._models.shown(body.model))
        shown = ShownMessage(
            ticket.id, {tool.function_name: tool for tool in body.tools}, body.logprobs, body.return_token_ids
        )
        return head.reply(self._service, requests, partial(ChatView, shown, head, self._service.tokenizer))

    async def count(self, request: Request) -> Response:
        """The tokens of a chat's prompt (llama.cpp's `.../input_tokens`)."""
        body = await read_body(request, ChatBody, CHAT, self._settings)
        self._models.adapters(body.model, body.lora)
        body.check()
        chat = await converted(body, body.request)
        answer = await unless_disconnected(request, self._service.chat_prompt(chat))
        return JsonResponse({"object": "response.input_tokens", "input_tokens": len(answer.prompt)})


@dataclass(frozen=True, slots=True)
class ShownMessage:
    """Settings of the messages in a reply."""

    reply_id: str
    tools: Mapping[str, ClientTool]  # by the names that the model knows
    with_logprobs: bool
    with_ids: bool


class ChatView(OpenAiView):
    """Choices as messages of a chat."""

    def __init__(self, shown: ShownMessage, head: OpenAiHead, tokenizer: Tokenizer, log: AnswerLog) -> None:
        super().__init__(head, tokenizer, log)
        self._message = shown
        self._deltas: dict[tuple[int, int], MessageDeltas] = {}  # by prompt and choice

    def _opening(self, prompt: int, index: int) -> Choice:
        choice_id = f"{self._message.reply_id} {prompt} {index}"
        self._deltas[prompt, index] = MessageDeltas(choice_id, self._message.tools)
        ids = {"prompt_token_ids": self._generations[prompt].prompt} if self._message.with_ids else {}
        delta = {"role": "assistant", "content": None}  # clients of llama.cpp read it from the first chunk on
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **ids}

    def _chunk(self, prompt: int, chunk: TextChunk) -> Choice | None:
        with_rows = chunk.rows and (self._message.with_logprobs or self._message.with_ids)
        deltas = self._deltas[prompt, chunk.index]
        delta = deltas.take(chunk.events or (ContentText(chunk.text),))
        if not (delta or with_rows or chunk.finish_reason):
            return None
        return {
            "index": chunk.index,
            "delta": delta,
            "logprobs": self._logprobs(chunk.rows) if chunk.rows else None,
            **({"token_ids": chunk.token_ids} if self._message.with_ids else {}),
            **_ending(chunk, has_calls=deltas.has_calls),
        }

    def _text(self, chunk: TextChunk) -> tuple[str, str] | None:
        has_more = self._message.with_logprobs or self._message.with_ids or chunk.finish_reason is not None
        if has_more or not chunk.text or any(not isinstance(event, ContentText) for event in chunk.events):
            return None
        return "content", chunk.text

    def _answer(self, prompt: int, answer: TextChunk) -> Choice:
        ids = {"token_ids": answer.token_ids, "prompt_token_ids": self._generations[prompt].prompt}
        choice_id = f"{self._message.reply_id} {prompt} {answer.index}"
        message = message_of(answer.events or (ContentText(answer.text),), choice_id, self._message.tools)
        return {
            "index": answer.index,
            "message": {"role": "assistant", **message, "refusal": None},
            "logprobs": self._logprobs(answer.rows),
            **(ids if self._message.with_ids else {}),
            **_ending(answer, has_calls="tool_calls" in message),
        }

    def _logprobs(self, rows: Sequence[RowResult]) -> dict[str, Any] | None:
        if not self._message.with_logprobs:
            return None
        return {"content": (row_entry(self._tokenizer, row) for row in rows), "refusal": None}


def _ending(part: TextChunk, *, has_calls: bool) -> dict[str, Any]:
    """A complete answer with calls waits for their results."""
    end = ending(part)
    return end | {"finish_reason": "tool_calls"} if has_calls and end["finish_reason"] == "stop" else end
