"""llama.cpp's own endpoints: /completion, /tokenize, /detokenize, /apply-template."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from itertools import chain
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from llamaclust.cluster.api.body import parse_body, read_body
from llamaclust.cluster.api.errors import JsonResponse
from llamaclust.cluster.api.json_parts import json_parts, off_loop_if_large
from llamaclust.cluster.api.llamacpp.schema import (
    RANDOM_SEEDS,
    DetokenizeBody,
    LlamaCppBody,
    PromptParts,
    TemplateBody,
    TokenizeBody,
)
from llamaclust.cluster.api.no_op_fields import LLAMACPP, TEMPLATE
from llamaclust.cluster.api.openai.shapes import row_entry
from llamaclust.cluster.api.replies.reply import Event
from llamaclust.cluster.api.replies.ticket import Ticket
from llamaclust.cluster.api.settings import ApiSettings
from llamaclust.cluster.api.sse import event, unless_disconnected
from llamaclust.cluster.scheduler.requests import FinishReason, Timings
from llamaclust.cluster.text.answer import Answer, TextChunk, collect
from llamaclust.cluster.text.budget import ReplySize
from llamaclust.cluster.text.request import CompletionRequest
from llamaclust.cluster.text.service import TextService
from llamaclust.cluster.text.stream import MAX_UNREAD_ROWS, CompletionStream, chunks_or_silence
from llamaclust.cluster.text.threads import TOKENIZING, run_on
from llamaclust.core.errors import ParameterError
from llamaclust.core.sampling_bounds import MAX_LOGIT_BIASES
from llamaclust.model.tokenizers.tokenizer import Tokenizer

_MAX_PIECES = 1 << 16


class LlamaCppEndpoints:
    """One served model under llama.cpp's names."""

    def __init__(self, service: TextService, settings: ApiSettings) -> None:
        self._service = service
        self._settings = settings

    async def complete(self, data: bytes, ticket: Ticket) -> LlamaCppReply:
        body = await parse_body(data, LlamaCppBody, LLAMACPP)
        return LlamaCppReply(self._service, self._settings, ticket, body)

    async def tokenize(self, request: Request) -> Response:
        body = await read_body(request, TokenizeBody, {}, self._settings)
        tokenizing = self._service.tokenize(body.content, body.add_special, body.parse_special)
        ids = await unless_disconnected(request, tokenizing)
        if body.with_pieces:
            if len(ids) > _MAX_PIECES:
                reason = f"the text has {len(ids)} tokens, at most {_MAX_PIECES} are shown as pieces; send less at once"
                raise ParameterError("with_pieces", reason)
            return JsonResponse({"tokens": [_piece_entry(self._service.tokenizer, token) for token in ids]})
        return JsonResponse({"tokens": ids})

    async def detokenize(self, request: Request) -> Response:
        body = await read_body(request, DetokenizeBody, {}, self._settings)
        detokenizing = run_on(TOKENIZING, self._service.tokenizer.decode, body.tokens)
        return JsonResponse({"content": await unless_disconnected(request, detokenizing)})

    async def apply_template(self, request: Request) -> Response:
        body = await read_body(request, TemplateBody, TEMPLATE, self._settings)
        messages = [message.as_variables() for message in body.messages]
        rendering = self._service.chat_text(messages, body.chat_template_kwargs)
        return JsonResponse({"prompt": await unless_disconnected(request, rendering)})


class LlamaCppReply:
    """The reply to one `/completion`. See `Reply`."""

    def __init__(self, service: TextService, settings: ApiSettings, ticket: Ticket, body: LlamaCppBody) -> None:
        self.is_streamed = body.stream
        self._service = service
        self._settings = settings
        self._ticket = ticket
        self._body = body
        self._started: CompletionStream | None = None
        self._reserved = 0

    @property
    def _stream(self) -> CompletionStream:
        assert self._started is not None
        return self._started

    async def start(self) -> None:
        request = self._ticket.request(0, await self._request(self._body))
        generation = await self._service.prepare(request)
        size = ReplySize.of(generation, 1, MAX_UNREAD_ROWS if self.is_streamed else None)
        self._reserved = self._service.budget.reserve([size])
        try:
            self._started = self._service.submit(request, generation, self._ticket.recording(0, request))
        except BaseException:
            await self.aclose()
            raise

    async def wait_first(self) -> None:
        await self._stream.wait_first(self._settings.first_chunk_s)

    async def aclose(self) -> None:
        if self._started is not None:
            await self._started.aclose()
        self._service.budget.release(self._reserved)
        self._reserved = 0

    async def whole(self) -> list[bytes]:
        (answer,) = await collect(self._stream)
        shape = _Shape(self._service, self._body, self._stream)
        return await off_loop_if_large(lambda: json_parts(shape.whole(answer)), answer.entries)

    async def events(self) -> AsyncGenerator[Event | None, None]:
        shape = _Shape(self._service, self._body, self._stream)
        async for chunk in chunks_or_silence(self._stream, self._settings.keepalive_s):
            yield None if chunk is None else Event(0, event(shape.chunk(chunk)))

    async def _request(self, body: LlamaCppBody) -> CompletionRequest:
        return CompletionRequest(
            await self._prompt(body.prompt),
            body.max_new_tokens,
            body.sampling(await self._biases(body.logit_bias)),
            seed=None if body.seed in RANDOM_SEEDS else body.seed,
            stop=body.stop,
            ignore_eos=body.ignore_eos,
            top_logprobs=body.n_probs,
            penalty_window=None if body.repeat_last_n == -1 else body.repeat_last_n,
            penalize_nl=body.penalize_nl,
            dry_window=body.dry_window,
            dry_breakers=body.dry_sequence_breakers,
            grammar=body.answer_grammar(),
            with_logprobs=body.n_probs > 0,
        )

    async def _prompt(self, prompt: str | PromptParts) -> str | tuple[int, ...]:
        if isinstance(prompt, str):
            return prompt
        context = self._service.settings.context_length
        return tuple(chain(*await self._service.tokenize_all(prompt, context, "prompt", add_special=True)))

    async def _biases(self, given: Sequence[tuple[int | str, float]]) -> tuple[tuple[int, float], ...]:
        """A text's bias goes to each of its tokens."""
        tokens = [token for token, _ in given]
        ids = await self._service.tokenize_all(tokens, MAX_LOGIT_BIASES, "logit_bias") if tokens else []
        biases: dict[int, float] = {}
        for part, (_, bias) in zip(ids, given, strict=True):
            biases.update(dict.fromkeys(part, bias))
        return tuple(sorted(biases.items()))


class _Shape:
    """The replies to one request."""

    def __init__(self, service: TextService, body: LlamaCppBody, stream: CompletionStream) -> None:
        self._service = service
        self._body = body
        self._stream = stream
        self._predicted = 0

    def whole(self, answer: Answer) -> dict[str, Any]:
        tokens = answer.token_ids if self._body.return_tokens else ()
        return {
            "index": 0,
            "content": answer.text,
            "tokens": tokens,
            **self._end(answer),
            **self._probabilities(answer),
        }

    def chunk(self, chunk: TextChunk) -> dict[str, Any]:
        """One event. The last has no tokens."""
        self._predicted += len(chunk.rows)
        shown = {"index": 0, "content": chunk.text, "tokens": chunk.token_ids}
        if chunk.finish_reason is not None:
            return {**shown, **self._end(chunk)}
        return {**shown, **self._counts(self._predicted), "stop": False, **self._probabilities(chunk)}

    def _end(self, part: TextChunk) -> dict[str, Any]:
        assert part.timings is not None
        predicted = len(part.rows) or self._predicted
        word = part.stopped_by if isinstance(part.stopped_by, str) else ""
        return {
            **self._counts(predicted),
            "stop": True,
            "model": self._service.settings.model_name,
            "stop_type": _stop_type(part),
            "stopping_word": word,
            "truncated": False,
            "tokens_cached": part.timings.cached_tokens,
            "generation_settings": self._settings(),
            "timings": _timings(part.timings),
        }

    def _counts(self, predicted: int) -> dict[str, int]:
        return {"id_slot": 0, "tokens_predicted": predicted, "tokens_evaluated": len(self._stream.generation.prompt)}

    def _probabilities(self, part: TextChunk) -> dict[str, Any]:
        if not self._body.n_probs:
            return {}
        return {"completion_probabilities": (row_entry(self._service.tokenizer, row) for row in part.rows)}

    def _settings(self) -> dict[str, Any]:
        fields = self._body.model_dump(exclude={"prompt", "return_tokens"})
        return {**fields, "seed": self._stream.generation.seed, "n_ctx": self._service.settings.context_length}


def _timings(timings: Timings) -> dict[str, float]:
    computed = timings.prompt_tokens - timings.cached_tokens
    return {
        "cache_n": timings.cached_tokens,
        **_phase("prompt", computed, computed, timings.prefill_tok_s),
        **_phase("predicted", timings.generated_tokens, max(0, timings.generated_tokens - 1), timings.decode_tok_s),
    }


def _piece_entry(tokenizer: Tokenizer, token: int) -> dict[str, Any]:
    """A token with its text, or its bytes where they are only a part of a character."""
    data = tokenizer.token_bytes(token)
    try:
        return {"id": token, "piece": data.decode()}
    except UnicodeDecodeError:
        return {"id": token, "piece": list(data)}


def _phase(name: str, tokens: int, measured: int, per_second: float) -> dict[str, float]:
    """`measured` of the tokens were computed within the time that the rate is of."""
    ms = measured / per_second * 1e3 if per_second else 0.0
    return {
        f"{name}_n": tokens,
        f"{name}_ms": ms,
        f"{name}_per_token_ms": ms / measured if measured else 0.0,
        f"{name}_per_second": per_second,
    }


def _stop_type(part: TextChunk) -> str:
    if part.finish_reason is FinishReason.LENGTH:
        return "limit"
    return "word" if isinstance(part.stopped_by, str) else "eos"
