"""Answers as Ollama's lines of JSON: text, reasoning and whole calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from llamaclust.cluster.front.http.sse import line
from llamaclust.cluster.front.json_text import shown_timings
from llamaclust.cluster.front.replies.reply import Event, View
from llamaclust.cluster.front.sampling import row_entry
from llamaclust.cluster.front.text.answer import TextChunk
from llamaclust.cluster.front.text.answer_log import AnswerLog, LogItem
from llamaclust.cluster.scheduler.requests import Timings
from llamaclust.model.chat.tools.argument_values import arguments_object
from llamaclust.model.chat.tools.events import (
    AnswerEvent,
    ArgumentText,
    CallBegun,
    CallEnded,
    ContentText,
    ReasoningText,
    ToolCall,
)
from llamaclust.model.tokenizers.tokenizer import Tokenizer


@dataclass(slots=True)
class Piece:
    """What a chunk adds to an answer."""

    content: str = ""
    thinking: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        return not (self.content or self.thinking or self.calls)


class PieceReader:
    """Of one answer, from its first chunk to its last; or of a whole answer, which is its only chunk."""

    def __init__(self) -> None:
        self._open: dict[int, ToolCall] = {}

    def read(self, chunk: TextChunk) -> Piece:
        """A call is part of the piece that completes it."""
        piece = Piece()
        for event in chunk.events or (ContentText(chunk.text),):
            self._take(event, piece)
        if chunk.finish_reason is not None:
            for index in tuple(self._open):
                self._close(index, piece)
        return piece

    def _take(self, event: AnswerEvent, piece: Piece) -> None:
        match event:
            case ReasoningText(text):
                piece.thinking += text
            case ContentText(text):
                piece.content += text
            case CallBegun(index, name, call_id):
                self._open[index] = ToolCall(name, call_id)
            case ArgumentText(index, text):
                self._open[index].arguments += text
            case CallEnded(index, call_id):
                call = self._open[index]
                call.call_id = call_id or call.call_id
                call.arguments = call.arguments or "{}"
                self._close(index, piece)

    def _close(self, index: int, piece: Piece) -> None:
        """What is no complete call, since the answer was cut off, is content: arguments are objects here."""
        call = self._open.pop(index)
        arguments = arguments_object(call.arguments)
        if arguments is None:
            piece.content += f"{call.name}({call.arguments}"
            return
        named = {"id": call.call_id} if call.call_id else {}
        piece.calls.append({**named, "function": {"index": index, "name": call.name, "arguments": arguments}})


_NS_OF_MS: Final = 1_000_000

Show = Callable[[Piece], dict[str, Any]]
"""How an endpoint shows a piece."""


def as_text(piece: Piece) -> dict[str, Any]:
    """In replies of `/api/generate`."""
    thinking = {"thinking": piece.thinking} if piece.thinking else {}
    return {"response": piece.content, **thinking}


def as_message(piece: Piece) -> dict[str, Any]:
    """In replies of `/api/chat`."""
    message: dict[str, Any] = {"role": "assistant", "content": piece.content}
    if piece.thinking:
        message["thinking"] = piece.thinking
    if piece.calls:
        message["tool_calls"] = piece.calls
    return {"message": message}


class Lines:
    """The lines of one reply. The time is that of the admission: a reply that is computed again is the same."""

    def __init__(self, model: str, created: int, show: Show) -> None:
        self._begin = {"model": model, "created_at": f"{datetime.fromtimestamp(created, UTC):%Y-%m-%dT%H:%M:%SZ}"}
        self._show = show

    def make(self, piece: Piece, *, done: bool = False, **more: Any) -> dict[str, Any]:
        return {**self._begin, **self._show(piece), "done": done, **more}


class OllamaView(View):
    """One answer."""

    def __init__(
        self, tokenizer: Tokenizer, lines: Lines, log: AnswerLog, *, with_logprobs: bool, with_context: bool
    ) -> None:
        """`with_context`: the last line has all token ids."""
        self._tokenizer = tokenizer
        self._lines = lines
        self._prompt = log.generations[0].prompt if with_context and log.generations else ()
        self._with_logprobs = with_logprobs
        self._with_context = with_context
        self._reader = PieceReader()
        self._tokens: list[int] = []

    def whole(self, parts: Sequence[Sequence[TextChunk]]) -> dict[str, Any]:
        """See `View`."""
        ((answer,),) = parts
        last = self._last(answer, self._reader.read(answer), answer.token_ids)
        return {**last, **self._logprobs(answer)}

    def size(self, prompt: int, item: LogItem) -> int:
        """See `View`. The last line may have the whole context."""
        if not isinstance(item, TextChunk):
            return 0
        is_last = item.finish_reason is not None and self._with_context
        context = len(self._prompt) + len(self._tokens) if is_last else 0
        return context + (item.entries if self._with_logprobs else 0)

    def frames(self, prompt: int, item: LogItem, *, is_large: bool) -> list[Event]:
        """See `View`."""
        return [Event(0, line(value)) for value in self._values(item)] if isinstance(item, TextChunk) else []

    def _values(self, chunk: TextChunk) -> Iterator[dict[str, Any]]:
        self._tokens += chunk.token_ids
        piece, logprobs = self._reader.read(chunk), self._logprobs(chunk)
        if logprobs or not piece.is_empty:
            yield self._lines.make(piece, **logprobs)
        if chunk.finish_reason is not None:
            yield self._last(chunk, Piece(), self._tokens)

    def _last(self, chunk: TextChunk, piece: Piece, tokens: Sequence[int]) -> dict[str, Any]:
        """What ends an answer."""
        assert chunk.timings is not None
        context = {"context": [*self._prompt, *tokens]} if self._with_context else {}
        end = {"done_reason": str(chunk.finish_reason), **context, **durations(chunk.timings)}
        return self._lines.make(piece, done=True, **end)

    def _logprobs(self, chunk: TextChunk) -> dict[str, Any]:
        if not self._with_logprobs or not chunk.rows:
            return {}
        return {"logprobs": (row_entry(self._tokenizer, row) for row in chunk.rows)}


class LoadView(View):
    """The reply to a request without a prompt, which loads a model, or unloads one of several."""

    def __init__(self, lines: Lines, done_reason: str) -> None:
        self._line = lines.make(Piece(), done=True, done_reason=done_reason)

    def frames(self, prompt: int, item: LogItem, *, is_large: bool) -> list[Event]:
        """See `View`; its log has no entries."""
        return []

    def closing(self) -> list[Event]:
        """See `View`."""
        return [Event(0, line(self._line))]

    def whole(self, parts: Sequence[Sequence[TextChunk]]) -> dict[str, Any]:
        """See `View`."""
        return self._line


def durations(timings: Timings) -> dict[str, int]:
    """In nanoseconds; tokens that were in the prefix cache are counted, and cost nothing. A request waits where Ollama
    loads the model."""
    shown = shown_timings(timings)
    answer_ms = shown["predicted_ms"]
    return {
        "total_duration": _ns(timings.ttft_ms + answer_ms),
        "load_duration": _ns(timings.queue_ms),
        "prompt_eval_count": timings.prompt_tokens,
        "prompt_eval_duration": _ns(shown["prompt_ms"]),
        "eval_count": timings.generated_tokens,
        "eval_duration": _ns(answer_ms),
    }


def _ns(ms: float) -> int:
    return round(ms * _NS_OF_MS)
