"""Anthropic's endpoint `/v1/messages`. Answers consist of content blocks, in one JSON message or in stream events."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from llamaclust.cluster.front.body import converted
from llamaclust.cluster.front.dialects.anthropic.schema import MessagesBody
from llamaclust.cluster.front.dialects.dialect import Dialect, ParsedRequest
from llamaclust.cluster.front.http.responses import Route
from llamaclust.cluster.front.replies.reply import Event, Reply, View
from llamaclust.cluster.front.text.answer import TextChunk
from llamaclust.cluster.front.text.answer_log import AnswerLog, LogItem, Timed
from llamaclust.cluster.front.text.request import CompletionRequest
from llamaclust.cluster.front.tools import call_id_of
from llamaclust.cluster.scheduler.requests import FinishReason, Timings
from llamaclust.model.chat.tools.argument_values import arguments_object
from llamaclust.model.chat.tools.events import (
    AnswerEvent,
    ArgumentText,
    CallBegun,
    CallEnded,
    ContentText,
    ReasoningText,
)

Block = dict[str, Any]
Shown = dict[str, Any]
"""A stream event as a JSON object."""

_STARTS: Final[dict[str, Block]] = {
    "text": {"type": "text", "text": ""},
    "thinking": {"type": "thinking", "thinking": "", "signature": ""},
}


class MessageView(View):
    def __init__(self, model: str, reply_id: str, log: AnswerLog) -> None:
        self._model = model
        self._reply_id = reply_id
        self._prompt_tokens = sum(len(generation.prompt) for generation in log.generations)
        self._is_begun = False
        self._blocks = _Blocks(reply_id)
        self._tokens = 0

    def whole(self, parts: Sequence[Sequence[TextChunk]]) -> dict[str, Any]:
        ((answer,),) = parts
        content = _put_together(self._blocks.take(answer))
        return self._message(content, self._usage(answer.timings, len(answer.rows)), self._stop(answer))

    def frames(self, prompt: int, item: LogItem) -> Iterator[Event]:
        shown = self._events(item) if isinstance(item, TextChunk) else ()
        return (Event(0, event, event["type"]) for event in shown)

    def _events(self, chunk: TextChunk) -> Iterator[Shown]:
        if not self._is_begun:
            self._is_begun = True
            yield {"type": "message_start", "message": self._message([], self._usage(chunk.timings, 0), _UNSTOPPED)}
            yield {"type": "ping"}
        self._tokens += len(chunk.rows)
        yield from self._blocks.take(chunk)
        if chunk.finish_reason is not None:
            usage = self._usage(chunk.timings, self._tokens)
            yield {"type": "message_delta", "delta": self._stop(chunk), "usage": usage}
            yield {"type": "message_stop"}

    def _usage(self, timings: Timings | None, tokens: int) -> dict[str, int]:
        cached = 0 if timings is None else timings.cached_tokens
        return {
            "input_tokens": self._prompt_tokens - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": tokens,
        }

    def _stop(self, part: TextChunk) -> dict[str, Any]:
        if part.finish_reason is FinishReason.LENGTH:
            return {"stop_reason": "max_tokens", "stop_sequence": None}
        if isinstance(part.stopped_by, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": part.stopped_by}
        if self._blocks.has_calls:
            return {"stop_reason": "tool_use", "stop_sequence": None}
        return {"stop_reason": "end_turn", "stop_sequence": None}

    def _message(self, blocks: list[Block], usage: dict[str, int], stop: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": f"msg_{self._reply_id}",
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": blocks,
            **stop,
            "usage": usage,
        }


class _Blocks:
    """Converts an answer to events that open, extend and close content blocks. At most one block is open at a time."""

    def __init__(self, reply_id: str) -> None:
        self.has_calls = False
        self._reply_id = reply_id
        self._index = -1  # Index of the newest block, or -1 if there is no block yet.
        self._open: str | None = None  # Type of the open block, or None if no block is open.

    def take(self, chunk: TextChunk) -> Iterator[Shown]:
        for event in chunk.events or (ContentText(chunk.text),):
            yield from self._take(event)
        if chunk.finish_reason is not None:
            if self._index < 0:
                yield from self._begin(_STARTS["text"])
            yield from self._close()

    def _take(self, event: AnswerEvent) -> Iterator[Shown]:
        match event:
            case ReasoningText(text) if text:
                yield from self._piece("thinking", text)
            case ContentText(text) if text:
                yield from self._piece("text", text)
            case CallBegun(index, name, call_id):
                self.has_calls = True
                call_id = call_id or call_id_of(self._reply_id, index, "toolu_")
                yield from self._begin({"type": "tool_use", "id": call_id, "name": name, "input": {}})
            case ArgumentText(_, text) if text:
                yield self._delta("input_json_delta", partial_json=text)
            case CallEnded():
                yield from self._close()

    def _piece(self, kind: str, text: str) -> Iterator[Shown]:
        if self._open != kind:
            yield from self._begin(_STARTS[kind])
        yield self._delta(f"{kind}_delta", **{kind: text})

    def _begin(self, block: Block) -> Iterator[Shown]:
        yield from self._close()
        self._index += 1
        self._open = block["type"]
        yield self._event("content_block_start", content_block=block)

    def _close(self) -> Iterator[Shown]:
        if self._open == "thinking":
            yield self._delta("signature_delta", signature="")
        if self._open is not None:
            yield self._event("content_block_stop")
        self._open = None

    def _delta(self, kind: str, **fields: str) -> Shown:
        return self._event("content_block_delta", delta={"type": kind, **fields})

    def _event(self, name: str, **fields: Any) -> Shown:
        return {"type": name, "index": self._index, **fields}


def _put_together(events: Iterable[Shown]) -> list[Block]:
    blocks: list[Block] = []
    pieces: list[str] = []
    for event in events:
        match event:
            case {"content_block": block}:
                blocks.append(dict(block))
                pieces.clear()
            case {"delta": delta}:
                _, piece = delta.values()
                pieces.append(piece)
            case _:
                kind, text = blocks[-1]["type"], "".join(pieces)
                blocks[-1] |= {"input": _input(text)} if kind == "tool_use" else {kind: text}
    return blocks


def _input(text: str) -> dict[str, Any]:
    """Parses a tool call's arguments. Invalid JSON becomes {"INVALID_JSON": text}, as Anthropic recommends."""
    arguments = arguments_object(text or "{}")
    return {"INVALID_JSON": text} if arguments is None else arguments


_UNSTOPPED: Final[dict[str, Any]] = {"stop_reason": None, "stop_sequence": None}


class Messages(Dialect[MessagesBody]):
    paths = ("/v1/messages",)
    body = MessagesBody
    takes_any_model = True

    def routes(self) -> Iterator[Route]:
        yield from super().routes()
        yield Route("POST", f"{self.path}/count_tokens", self.count, self.body)

    async def reply(self, parsed: ParsedRequest[MessagesBody]) -> Reply:
        chat = await parsed.chat(parsed.body.request)

        async def requests() -> list[CompletionRequest]:
            return [await self.service.chat(chat)]

        return Reply(
            service=self.service,
            requests=requests,
            view=partial(MessageView, parsed.model, parsed.context.id),
            is_streamed=parsed.body.stream,
            timed=Timed.FIRST,
            has_measurements=True,  # The first event shows the number of cached tokens.
        )

    async def count(self, request: Request) -> Response:
        """Counts the tokens of a chat's prompt. No answer is generated."""
        body = await self.read(request)
        return await self.counted(request, await converted(body, body.request))
