"""Ollama's endpoints `/api/generate`, `/api/chat`, `/api/embed` and `/api/embeddings`. A stream is lines of JSON."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from llamaclust.cluster.front.body import converted
from llamaclust.cluster.front.dialects.dialect import Dialect, Endpoint, ParsedRequest
from llamaclust.cluster.front.dialects.embeddings import check_single, embedded
from llamaclust.cluster.front.dialects.ollama.models import shown_time
from llamaclust.cluster.front.dialects.ollama.schema import (
    EmbedBody,
    EmbeddingFields,
    EmbeddingsBody,
    GenerateBody,
    OllamaAnswerFields,
    OllamaChatBody,
)
from llamaclust.cluster.front.errors import HttpError
from llamaclust.cluster.front.http.responses import JsonResponse
from llamaclust.cluster.front.http.sse import StreamFormat
from llamaclust.cluster.front.json_text import shown_timings
from llamaclust.cluster.front.replies.reply import Event, Reply, View
from llamaclust.cluster.front.settings import read_keep_alive
from llamaclust.cluster.front.text.answer import TextChunk, row_entry
from llamaclust.cluster.front.text.answer_log import AnswerLog, LogItem
from llamaclust.cluster.front.text.embedder import EUCLIDEAN, Embedding, EmbeddingOptions
from llamaclust.cluster.front.text.images import ImageSource, PromptImages
from llamaclust.cluster.front.text.request import CompletionRequest
from llamaclust.cluster.scheduler.requests import Timings
from llamaclust.core.errors import ParameterError
from llamaclust.model.chat.tools.argument_values import arguments_object
from llamaclust.model.chat.tools.events import (
    ArgumentText,
    CallBegun,
    CallEnded,
    ContentText,
    ReasoningText,
    ToolCall,
)
from llamaclust.model.pooling import Pooling
from llamaclust.model.tokenizers.tokenizer import Tokenizer

_NS_OF_MS: Final = 1_000_000
_UNCHANGED: Final = -1


@dataclass(slots=True)
class Piece:
    """The text, reasoning and complete tool calls that one chunk adds to an answer."""

    content: str = ""
    thinking: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)

    def add(self, index: int, call: ToolCall) -> None:
        """Adds a tool call. If the arguments are not a complete JSON object, adds the call's text to `content`."""
        arguments = arguments_object(call.arguments)
        if arguments is None:
            self.content += f"{call.name}({call.arguments}"
            return
        named = {"id": call.call_id} if call.call_id else {}
        self.calls.append({**named, "function": {"index": index, "name": call.name, "arguments": arguments}})


class PieceReader:
    def __init__(self) -> None:
        self._open: dict[int, ToolCall] = {}

    def read(self, chunk: TextChunk) -> Piece:
        """Returns the content that a chunk adds to the answer. A tool call is returned when it is complete."""
        piece = Piece()
        for event in chunk.events or (ContentText(chunk.text),):
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
                    call = self._open.pop(index)
                    piece.add(index, ToolCall(call.name, call_id or call.call_id, call.arguments or "{}"))
        if chunk.finish_reason is not None:
            for index, call in self._open.items():
                piece.add(index, call)
            self._open.clear()
        return piece


Show = Callable[[Piece], dict[str, Any]]


@dataclass(eq=False)
class OllamaView(View):
    """Renders an answer as lines of JSON."""

    tokenizer: Tokenizer
    begin: dict[str, Any]  # Fields of every line.
    show: Show
    with_logprobs: bool
    with_context: bool  # True to show the token ids of prompt and answer in the last line.
    end: str | None  # The `done_reason` if the request has no prompt, else None.
    log: AnswerLog

    def __post_init__(self) -> None:
        self._reader = PieceReader()
        self._tokens = [*self.log.generations[0].prompt] if self.with_context and self.log.generations else []

    def frames(self, prompt: int, item: LogItem) -> Iterator[Event]:
        if not isinstance(item, TextChunk):
            return
        piece, logprobs = self._read(item), self._logprobs(item)
        if logprobs or piece != Piece():
            yield Event(0, {**self.begin, **self.show(piece), "done": False, **logprobs})
        if item.finish_reason is not None:
            yield Event(0, self._end(item, Piece()))

    def closing(self) -> list[Event]:
        return [] if self.end is None else [Event(0, self._last(self.end, Piece()))]

    def whole(self, parts: Sequence[Sequence[TextChunk]]) -> dict[str, Any]:
        if self.end is not None:
            return self._last(self.end, Piece())
        ((answer,),) = parts
        return {**self._end(answer, self._read(answer)), **self._logprobs(answer)}

    def _read(self, chunk: TextChunk) -> Piece:
        if self.with_context:
            self._tokens += chunk.token_ids
        return self._reader.read(chunk)

    def _end(self, chunk: TextChunk, piece: Piece) -> dict[str, Any]:
        assert chunk.timings is not None
        context = {"context": self._tokens} if self.with_context else {}
        return {**self._last(str(chunk.finish_reason), piece), **context, **durations(chunk.timings)}

    def _last(self, reason: str, piece: Piece) -> dict[str, Any]:
        return {**self.begin, **self.show(piece), "done": True, "done_reason": reason}

    def _logprobs(self, chunk: TextChunk) -> dict[str, Any]:
        if not self.with_logprobs or not chunk.rows:
            return {}
        return {"logprobs": (row_entry(self.tokenizer, row) for row in chunk.rows)}


def durations(timings: Timings) -> dict[str, int]:
    """Returns Ollama's token counts and durations (in nanoseconds). `load_duration` is the time in the queue."""
    shown = shown_timings(timings)
    answer_ms = shown["predicted_ms"]
    return {
        "total_duration": _ns(timings.ttft_ms + answer_ms),
        "load_duration": _ns(timings.queue_ms),
        "prompt_eval_count": timings.prompt_tokens,  # Includes cached tokens.
        "prompt_eval_duration": _ns(shown["prompt_ms"]),
        "eval_count": timings.generated_tokens,
        "eval_duration": _ns(answer_ms),
    }


def _ns(ms: float) -> int:
    return round(ms * _NS_OF_MS)


AnyAnswer = TypeVar("AnyAnswer", bound=OllamaAnswerFields)
AnyEmbedding = TypeVar("AnyEmbedding", bound=EmbeddingFields)


class OllamaDialect(Dialect[AnyAnswer]):
    form = StreamFormat.LINES

    @abstractmethod
    def show(self, piece: Piece) -> dict[str, Any]:
        """Returns the fields that represent `piece` in a line of JSON."""

    @abstractmethod
    async def request(self, parsed: ParsedRequest[AnyAnswer]) -> CompletionRequest:
        """Converts a request's body to a completion request."""

    def sequences(self, body: AnyAnswer) -> int:
        return 0 if body.is_load else 1

    async def reply(self, parsed: ParsedRequest[AnyAnswer]) -> Reply:
        body, end = parsed.body, self._load_reason(parsed.body)
        # The time of admission stays the same if the reply is computed again.
        begin = {"model": parsed.model, "created_at": shown_time(parsed.context.created)}
        return Reply(
            service=self.service,
            requests=partial(self._requests, parsed, end),
            view=partial(OllamaView, self.service.tokenizer, begin, self.show, body.logprobs, body.has_context, end),
            is_streamed=body.stream,
        )

    def _load_reason(self, body: AnyAnswer) -> str | None:
        """Returns the `done_reason` of a request that only loads or unloads the model, else None."""
        if not body.is_load:
            return None
        return "unload" if self.settings.can_unload and read_keep_alive(body.keep_alive) == 0 else "load"

    async def _requests(self, parsed: ParsedRequest[AnyAnswer], load_reason: str | None) -> list[CompletionRequest]:
        if load_reason == "load":
            await self.model.lifecycle.preload()
        if load_reason is not None:
            return []
        if parsed.body.wants_reasoning and not (await self.service.chat_format.get()).knows_reasoning:
            message = f"{self.service.settings.model_name!r} does not support thinking; remove the field think"
            raise HttpError(400, "unsupported_parameter", message, param="think")
        return [replace(await self.request(parsed), adapters=parsed.adapters)]


class Chat(OllamaDialect[OllamaChatBody]):
    paths = ("/api/chat",)
    body = OllamaChatBody

    def show(self, piece: Piece) -> dict[str, Any]:
        more = {"thinking": piece.thinking, "tool_calls": piece.calls}
        shown = {name: value for name, value in more.items() if value}
        return {"message": {"role": "assistant", "content": piece.content, **shown}}

    async def request(self, parsed: ParsedRequest[OllamaChatBody]) -> CompletionRequest:
        return await self.service.chat(await parsed.chat(parsed.body.chat))


class Generate(OllamaDialect[GenerateBody]):
    paths = ("/api/generate",)
    body = GenerateBody

    def show(self, piece: Piece) -> dict[str, Any]:
        thinking = {"thinking": piece.thinking} if piece.thinking else {}
        return {"response": piece.content, **thinking}

    async def request(self, parsed: ParsedRequest[GenerateBody]) -> CompletionRequest:
        body, earlier = parsed.body, tuple(parsed.body.context)
        if body.suffix:
            return await self._fill_in(body)
        if body.raw:
            if not earlier:
                return await converted(body, body.completion, body.prompt)
            (prompt,) = await self.service.tokenize_all([body.prompt], "prompt")
            return await converted(body, body.completion, (*earlier, *prompt))
        request = await self.service.chat(await parsed.chat(body.chat))
        assert not isinstance(request.prompt, str)
        first, *others = request.prompt.pieces if isinstance(request.prompt, PromptImages) else (request.prompt,)
        assert not isinstance(first, ImageSource)
        own = first[1:] if earlier and first[:1] == (self.service.tokenizer.bos_id,) else first
        whole = (*earlier, *own)
        return replace(request, prompt=PromptImages((whole, *others)) if others else whole)

    async def _fill_in(self, body: GenerateBody) -> CompletionRequest:
        if body.raw or body.context or body.system:
            raise ParameterError("suffix", "cannot be used together with raw, context or system")
        request = await converted(body, body.completion)
        prompt = await self.service.fill_suffix(body.prompt, body.suffix, request.max_new_tokens)
        return replace(request, prompt=prompt)


class OllamaEmbedding(Endpoint[AnyEmbedding]):
    async def embedded(
        self,
        request: Request,
        texts: Sequence[str],
        options: EmbeddingOptions,
        shape: Callable[[list[Embedding]], dict[str, Any]],
    ) -> Response:
        if not texts:
            return JsonResponse(shape([]))
        return await embedded(request, self.service, [(text,) for text in texts], options, shape)

    def pooling(self, body: AnyEmbedding) -> Pooling:
        pooling = self.service.settings.pooling if body.pooling is None else Pooling(body.pooling)
        check_single(pooling)
        return pooling


class Embed(OllamaEmbedding[EmbedBody]):
    paths = ("/api/embed",)
    body = EmbedBody

    async def answer(self, request: Request) -> Response:
        """Computes one embedding vector for each text, and scales the vector to Euclidean norm 1."""
        body = await self.read(request)
        begun_ns = time.perf_counter_ns()

        def shape(embeddings: list[Embedding]) -> dict[str, Any]:
            return {
                "model": self.service.settings.model_name,
                "embeddings": (embedding.vectors[0].tolist() for embedding in embeddings),
                "total_duration": time.perf_counter_ns() - begun_ns,
                "load_duration": 0,
                "prompt_eval_count": sum(embedding.prompt_tokens for embedding in embeddings),
            }

        options = EmbeddingOptions(self.pooling(body), EUCLIDEAN, body.dimensions, body.cache_salt)
        texts = () if body.input == ("",) else body.input  # Ollama gives an empty text no embedding.
        return await self.embedded(request, texts, options, shape)


class Embeddings(OllamaEmbedding[EmbeddingsBody]):
    paths = ("/api/embeddings",)
    body = EmbeddingsBody

    async def answer(self, request: Request) -> Response:
        """Computes a text's embedding vector, which is not normalized. An empty text gets an empty list."""
        body = await self.read(request)
        options = EmbeddingOptions(self.pooling(body), _UNCHANGED, cache_salt=body.cache_salt)
        return await self.embedded(request, [body.prompt] if body.prompt else [], options, _first)


def _first(embeddings: list[Embedding]) -> dict[str, Any]:
    return {"embedding": embeddings[0].vectors[0].tolist() if embeddings else []}
