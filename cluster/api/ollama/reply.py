"""Answers in Ollama's form: lines of JSON, or one object."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from llamaclust.cluster.api.fields.logprobs import row_entry
from llamaclust.cluster.api.fields.timings import shown_timings
from llamaclust.cluster.api.json_parts import off_loop_if_large
from llamaclust.cluster.api.ollama.pieces import Piece, PieceReader
from llamaclust.cluster.api.replies.answer_reply import ShowProgress
from llamaclust.cluster.api.replies.json_body import JsonBody, rendered_body
from llamaclust.cluster.api.replies.reply import Event
from llamaclust.cluster.api.sse import line
from llamaclust.cluster.scheduler.requests import Timings
from llamaclust.cluster.text.answer import TextChunk, join
from llamaclust.cluster.text.stream import CompletionStream
from llamaclust.model.tokenizers.tokenizer import Tokenizer

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


class OllamaShape:
    """One answer. See `AnswerShape`."""

    has_measurements = False
    keeps_logprobs = False
    progress: ShowProgress | None = None

    def __init__(self, tokenizer: Tokenizer, lines: Lines, *, with_logprobs: bool, with_context: bool) -> None:
        """`with_context`: the last line has all token ids."""
        self._tokenizer = tokenizer
        self._lines = lines
        self._with_logprobs = with_logprobs
        self._with_context = with_context
        self._reader = PieceReader()
        self._tokens: list[int] = []

    async def whole(self, chunks: Sequence[TextChunk], stream: CompletionStream) -> dict[str, Any]:
        answer = join(chunks)
        last = self._last(answer, self._reader.read(answer), answer.token_ids, stream)
        return {**last, **self._logprobs(answer)}

    async def events(self, chunk: TextChunk, stream: CompletionStream) -> Sequence[bytes]:
        """The last line may have the whole context."""
        is_last = chunk.finish_reason is not None and self._with_context
        context = len(stream.generation.prompt) + len(self._tokens) if is_last else 0
        entries = context + (chunk.entries if self._with_logprobs else 0)
        return await off_loop_if_large(lambda: [*self._lines_of(chunk, stream)], entries)

    def _lines_of(self, chunk: TextChunk, stream: CompletionStream) -> Iterator[bytes]:
        self._tokens += chunk.token_ids
        piece, logprobs = self._reader.read(chunk), self._logprobs(chunk)
        if logprobs or not piece.is_empty:
            yield line(self._lines.make(piece, **logprobs))
        if chunk.finish_reason is not None:
            yield line(self._last(chunk, Piece(), self._tokens, stream))

    def _last(self, chunk: TextChunk, piece: Piece, tokens: Sequence[int], stream: CompletionStream) -> dict[str, Any]:
        """What ends an answer."""
        assert chunk.timings is not None
        context = {"context": [*stream.generation.prompt, *tokens]} if self._with_context else {}
        end = {"done_reason": str(chunk.finish_reason), **context, **durations(chunk.timings)}
        return self._lines.make(piece, done=True, **end)

    def _logprobs(self, chunk: TextChunk) -> dict[str, Any]:
        if not self._with_logprobs or not chunk.rows:
            return {}
        return {"logprobs": (row_entry(self._tokenizer, row) for row in chunk.rows)}


class LoadReply:
    """The reply to a request without a prompt, which loads a model, or unloads one of several. See `Reply`."""

    acknowledgement: bytes | None = None
    has_measurements = False

    def __init__(self, lines: Lines, *, is_streamed: bool, unloads: bool) -> None:
        self.is_streamed = is_streamed
        self._line = line(lines.make(Piece(), done=True, done_reason="unload" if unloads else "load"))

    async def start(self) -> None:
        """There is nothing to compute."""

    async def wait_first(self) -> None:
        """It is there."""

    async def aclose(self) -> None:
        """Nothing runs."""

    async def whole(self) -> JsonBody:
        return rendered_body([self._line])

    async def events(self) -> AsyncGenerator[Event | None, None]:
        yield Event(0, self._line)


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
