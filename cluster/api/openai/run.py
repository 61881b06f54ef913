"""Runs the completions of one HTTP request: all its prompts, streamed or whole, until the client disconnects."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response

from llamaclust.cluster.api.errors import JsonResponse
from llamaclust.cluster.api.openai.schema import StreamOptions
from llamaclust.cluster.api.openai.shapes import FINGERPRINT
from llamaclust.cluster.api.settings import ApiSettings
from llamaclust.cluster.api.sse import DONE, WAITING, begin_events, event, unless_disconnected
from llamaclust.cluster.scheduler.requests import Timings
from llamaclust.cluster.text.answer import Answer, TextChunk, collect
from llamaclust.cluster.text.request import CompletionRequest
from llamaclust.cluster.text.service import TextService
from llamaclust.cluster.text.stream import CompletionStream, chunks_or_silence

Choice = dict[str, Any]


class Shape(Protocol):
    """How an endpoint shows choices."""

    id_prefix: str
    whole_object: str
    chunk_object: str

    def opening(self, prompt: int, index: int, stream: CompletionStream) -> Choice | None:
        """What a streamed choice begins with."""
        ...

    def chunk(self, prompt: int, chunk: TextChunk) -> Choice | None:
        """What a chunk adds; None where there is nothing to see."""
        ...

    def whole(self, prompt: int, answer: Answer, stream: CompletionStream) -> Choice: ...


class OpenAiRun:
    """The streams of one request, one a prompt, and what their replies have in common."""

    def __init__(self, service: TextService, settings: ApiSettings, shape: Shape) -> None:
        self.streams: list[CompletionStream] = []
        self._service = service
        self._settings = settings
        self._shape = shape
        self._created = int(time.time())
        self._opened: set[tuple[int, int]] = set()

    async def respond(
        self, request: Request, requests: Awaitable[Sequence[CompletionRequest]], streaming: StreamOptions | None
    ) -> Response:
        """The whole reply, or its beginning where it is streamed. No completion outlives the reply; where one prompt is
        refused, none runs."""
        async with AsyncExitStack() as cleanup:
            cleanup.push_async_callback(self._close)
            await unless_disconnected(request, self._start(requests))
            if streaming is not None:
                first = self.streams[0].wait_first(self._settings.first_chunk_s)
                return await begin_events(request, first, self._events(streaming), cleanup)
            return JsonResponse(await unless_disconnected(request, self._whole()))

    async def _start(self, requests: Awaitable[Sequence[CompletionRequest]]) -> None:
        """Submits all prompts, with one seed."""
        for request in await requests:
            seed = self.streams[0].generation.seed if self.streams else request.seed
            self.streams.append(await self._service.start(replace(request, seed=seed)))

    async def _close(self) -> None:
        for stream in self.streams:
            await stream.aclose()

    async def _whole(self) -> dict[str, Any]:
        answers = [await collect(stream) for stream in self.streams]
        choices = [
            self._shape.whole(prompt, answer, self.streams[prompt])
            for prompt, prompt_answers in enumerate(answers)
            for answer in prompt_answers
        ]
        tokens = sum(len(answer.rows) for prompt_answers in answers for answer in prompt_answers)
        counts = self._usage(tokens, [prompt_answers[0].timings for prompt_answers in answers])
        return {**self._reply(self._shape.whole_object, choices), "usage": counts}

    def _reply(self, kind: str, choices: list[Choice]) -> dict[str, Any]:
        return {
            "id": self._shape.id_prefix + self.streams[0].generation.request_id,
            "object": kind,
            "created": self._created,
            "model": self._service.settings.model_name,
            "system_fingerprint": FINGERPRINT,
            "seed": self.streams[0].generation.seed,
            "choices": choices,
        }

    def _usage(self, tokens: int, timings: Sequence[Timings]) -> dict[str, Any]:
        """Token counts: of the prompts, of all answers, and the cached ones of each prompt's first choice."""
        prompts = sum(len(stream.generation.prompt) for stream in self.streams)
        return {
            "prompt_tokens": prompts,
            "completion_tokens": tokens,
            "total_tokens": prompts + tokens,
            "prompt_tokens_details": {"cached_tokens": sum(timing.cached_tokens for timing in timings)},
        }

    async def _events(self, options: StreamOptions) -> AsyncGenerator[bytes, None]:
        tokens, timings = 0, []
        more: dict[str, Any] = {"usage": None} if options.include_usage else {}
        async for prompt, chunk in self._chunks():
            if chunk is None:
                yield WAITING
                continue
            tokens += len(chunk.rows)
            if chunk.timings is not None and chunk.index == 0:
                timings.append(chunk.timings)
            if options.include_usage and options.continuous_usage_stats:
                more = {"usage": self._usage(tokens, timings)}
            for choice in self._choices(prompt, chunk):
                yield event({**self._reply(self._shape.chunk_object, [choice]), **more})
        if options.include_usage:
            counts = self._usage(tokens, timings)
            yield event({**self._reply(self._shape.chunk_object, []), "usage": counts})
        yield DONE

    async def _chunks(self) -> AsyncIterator[tuple[int, TextChunk | None]]:
        """All prompts' chunks, prompt by prompt; None where nothing came for a while."""
        for prompt, stream in enumerate(self.streams):
            async for chunk in chunks_or_silence(stream, self._settings.keepalive_s):
                yield prompt, chunk

    def _choices(self, prompt: int, chunk: TextChunk) -> list[Choice]:
        opening = None
        if (prompt, chunk.index) not in self._opened:
            self._opened.add((prompt, chunk.index))
            opening = self._shape.opening(prompt, chunk.index, self.streams[prompt])
        return [choice for choice in (opening, self._shape.chunk(prompt, chunk)) if choice is not None]
