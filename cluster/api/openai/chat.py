"""`POST /v1/chat/completions`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from llamaclust.cluster.api.body import converted, parse_body, read_body
from llamaclust.cluster.api.error_responses import JsonResponse
from llamaclust.cluster.api.fields.logprobs import row_entry
from llamaclust.cluster.api.fields.model_name import ModelNames
from llamaclust.cluster.api.foreign_fields import CHAT
from llamaclust.cluster.api.openai.answer_message import MessageDeltas, message_of
from llamaclust.cluster.api.openai.reply import Choice, OpenAiReply
from llamaclust.cluster.api.openai.schema import ChatBody
from llamaclust.cluster.api.openai.shapes import ending
from llamaclust.cluster.api.replies.ticket import Ticket
from llamaclust.cluster.api.settings import ApiSettings
from llamaclust.cluster.api.sse import unless_disconnected
from llamaclust.cluster.text.answer import Answer, TextChunk
from llamaclust.cluster.text.request import CompletionRequest
from llamaclust.cluster.text.service import TextService
from llamaclust.cluster.text.stream import CompletionStream
from llamaclust.core.sampling import RowResult
from llamaclust.model.chat.tools.events import ContentText
from llamaclust.model.tokenizers.tokenizer import Tokenizer


class ChatEndpoint:
    """Chats, rendered by the model's own template."""

    def __init__(self, service: TextService, settings: ApiSettings, models: ModelNames) -> None:
        self._service = service
        self._settings = settings
        self._models = models

    async def create(self, data: bytes, ticket: Ticket) -> OpenAiReply:
        body = await parse_body(data, ChatBody, CHAT, self._settings)
        adapters = self._models.adapters(body.model, body.lora, ticket.scales)
        body.check()

        async def requests() -> list[CompletionRequest]:
            chat = await converted(body, body.request)
            return [await self._service.chat(chat.admitted(ticket.created, adapters))]

        shape = _ChatShape(self._service.tokenizer, body, ticket.id, self._models.shown(body.model))
        return OpenAiReply(self._service, self._settings, ticket, shape, requests, body.streaming)

    async def count(self, request: Request) -> Response:
        """The tokens of a chat's prompt (llama.cpp's `.../input_tokens`)."""
        body = await read_body(request, ChatBody, CHAT, self._settings)
        self._models.adapters(body.model, body.lora)
        body.check()
        chat = await converted(body, body.request)
        answer = await unless_disconnected(request, self._service.chat_prompt(chat))
        return JsonResponse({"object": "response.input_tokens", "input_tokens": len(answer.prompt)})


class _ChatShape:
    id_prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, tokenizer: Tokenizer, body: ChatBody, reply_id: str, model: str) -> None:
        self.model = model
        self._tokenizer = tokenizer
        self._with_logprobs = body.logprobs
        self._with_ids = body.return_token_ids
        self.shows_timings = body.timings_per_token
        self.shows_progress = body.return_progress
        self.shows_prompt = body.verbose
        self._reply_id = reply_id
        self._tools = {tool.function_name: tool for tool in body.tools}
        self._deltas: dict[tuple[int, int], MessageDeltas] = {}  # by prompt and choice

    def opening(self, prompt: int, index: int, stream: CompletionStream) -> Choice:
        self._deltas[prompt, index] = MessageDeltas(f"{self._reply_id} {prompt} {index}", self._tools)
        ids = {"prompt_token_ids": stream.generation.prompt} if self._with_ids else {}
        delta = {"role": "assistant", "content": None}  # clients of llama.cpp read it from the first chunk on
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **ids}

    def chunk(self, prompt: int, chunk: TextChunk) -> Choice | None:
        with_rows = chunk.rows and (self._with_logprobs or self._with_ids)
        deltas = self._deltas[prompt, chunk.index]
        delta = deltas.take(chunk.events or (ContentText(chunk.text),))
        if not (delta or with_rows or chunk.finish_reason):
            return None
        return {
            "index": chunk.index,
            "delta": delta,
            "logprobs": self._logprobs(chunk.rows) if chunk.rows else None,
            **({"token_ids": chunk.token_ids} if self._with_ids else {}),
            **_ending(chunk, has_calls=deltas.has_calls),
        }

    def text(self, chunk: TextChunk) -> tuple[str, str] | None:
        has_more = self._with_logprobs or self._with_ids or chunk.finish_reason is not None
        if has_more or not chunk.text or any(not isinstance(event, ContentText) for event in chunk.events):
            return None
        return "content", chunk.text

    def whole(self, prompt: int, answer: Answer, stream: CompletionStream) -> Choice:
        ids = {"token_ids": answer.token_ids, "prompt_token_ids": stream.generation.prompt} if self._with_ids else {}
        choice_id = f"{self._reply_id} {prompt} {answer.index}"
        message = message_of(answer.events or (ContentText(answer.text),), choice_id, self._tools)
        return {
            "index": answer.index,
            "message": {"role": "assistant", **message, "refusal": None},
            "logprobs": self._logprobs(answer.rows),
            **ids,
            **_ending(answer, has_calls="tool_calls" in message),
        }

    def _logprobs(self, rows: Sequence[RowResult]) -> dict[str, Any] | None:
        if not self._with_logprobs:
            return None
        return {"content": (row_entry(self._tokenizer, row) for row in rows), "refusal": None}


def _ending(part: TextChunk, *, has_calls: bool) -> dict[str, Any]:
    """A complete answer with calls waits for their results."""
    end = ending(part)
    return end | {"finish_reason": "tool_calls"} if has_calls and end["finish_reason"] == "stop" else end
