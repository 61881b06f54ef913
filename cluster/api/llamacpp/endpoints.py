"""llama.cpp's own endpoints: /completion, /tokenize, /detokenize, /apply-template."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack
from itertools import chain

from starlette.requests import Request
from starlette.responses import Response

from llamaclust.cluster.api.body import read_body
from llamaclust.cluster.api.errors import JsonResponse
from llamaclust.cluster.api.llamacpp.schema import (
    RANDOM_SEEDS,
    DetokenizeBody,
    LlamaCppBody,
    PromptParts,
    TemplateBody,
    TokenizeBody,
)
from llamaclust.cluster.api.llamacpp.shapes import LlamaCppShape, piece_entry
from llamaclust.cluster.api.no_op_fields import LLAMACPP, TEMPLATE
from llamaclust.cluster.api.settings import ApiSettings
from llamaclust.cluster.api.sse import WAITING, begin_events, event, unless_disconnected
from llamaclust.cluster.text.answer import collect
from llamaclust.cluster.text.request import CompletionRequest
from llamaclust.cluster.text.service import TextService
from llamaclust.cluster.text.stream import CompletionStream, chunks_or_silence
from llamaclust.core.errors import ParameterError
from llamaclust.core.sampling_bounds import MAX_LOGIT_BIASES

_MAX_PIECES = 1 << 16


class LlamaCppEndpoints:
    """One served model under llama.cpp's names."""

    def __init__(self, service: TextService, settings: ApiSettings) -> None:
        self._service = service
        self._settings = settings

    async def complete(self, request: Request) -> Response:
        body = await read_body(request, LlamaCppBody, LLAMACPP, self._settings)
        async with AsyncExitStack() as cleanup:
            stream = await unless_disconnected(request, self._start(body, cleanup))
            shape = LlamaCppShape(self._service, body, stream)
            if body.stream:
                first = stream.wait_first(self._settings.first_chunk_s)
                return await begin_events(request, first, self._events(stream, shape), cleanup)
            answers = await unless_disconnected(request, collect(stream))
            return JsonResponse(shape.whole(answers[0]))

    async def tokenize(self, request: Request) -> Response:
        body = await read_body(request, TokenizeBody, {}, self._settings)
        tokenizing = self._service.tokenize(body.content, body.add_special, body.parse_special)
        ids = await unless_disconnected(request, tokenizing)
        if body.with_pieces:
            if len(ids) > _MAX_PIECES:
                reason = f"the text has {len(ids)} tokens, at most {_MAX_PIECES} are shown as pieces; send less at once"
                raise ParameterError("with_pieces", reason)
            return JsonResponse({"tokens": [piece_entry(self._service.tokenizer, token) for token in ids]})
        return JsonResponse({"tokens": ids})

    async def detokenize(self, request: Request) -> Response:
        body = await read_body(request, DetokenizeBody, {}, self._settings)
        detokenizing = asyncio.to_thread(self._service.detokenize, body.tokens)
        return JsonResponse({"content": await unless_disconnected(request, detokenizing)})

    async def apply_template(self, request: Request) -> Response:
        body = await read_body(request, TemplateBody, TEMPLATE, self._settings)
        messages = [message.as_variables() for message in body.messages]
        rendering = self._service.chat_text(messages, body.chat_template_kwargs)
        return JsonResponse({"prompt": await unless_disconnected(request, rendering)})

    async def _events(self, stream: CompletionStream, shape: LlamaCppShape) -> AsyncGenerator[bytes, None]:
        async for chunk in chunks_or_silence(stream, self._settings.keepalive_s):
            if chunk is None:
                yield WAITING
            else:
                yield event(shape.chunk(chunk))

    async def _start(self, body: LlamaCppBody, cleanup: AsyncExitStack) -> CompletionStream:
        return await cleanup.enter_async_context(await self._service.start(await self._request(body)))

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
