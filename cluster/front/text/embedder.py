"""Embeddings and reranking scores. They are pooled in token order in float64, so that chunked prefill has no effect."""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from llamaclust.cluster.engine.request_stream import RequestStream
from llamaclust.cluster.front.text.sharing import current_owner, when_free
from llamaclust.cluster.scheduler.requests import GenerationRequest, Operation, PromptEmbedded
from llamaclust.core.errors import WorkerError
from llamaclust.model.pooling import Pooling
from llamaclust.model.ranking import Ranking
from llamaclust.wire.rpc.deadlines import deadline

if TYPE_CHECKING:
    from llamaclust.cluster.engine.engine import Engine

Float64 = NDArray[np.float64]
Vector = NDArray[np.float32]

EUCLIDEAN = 2
_INT16 = 32760.0


class Pooler:
    def __init__(self, pooling: Pooling) -> None:
        self._pooling = pooling
        self._rows: list[Float64] = []  # Hidden states so far. For Pooling.MEAN, only their sum.
        self.count = 0  # Number of hidden states so far.

    def add(self, event: PromptEmbedded) -> None:
        hidden = np.frombuffer(event.data, "<f4").reshape(event.count, -1)
        for row in hidden.astype(np.float64):
            self.count += 1
            if self._pooling is Pooling.MEAN and self._rows:
                self._rows[0] += row
            else:
                self._rows.append(row)

    def vectors(self) -> list[Float64]:
        if self._pooling is Pooling.MEAN:
            return [self._rows[0] / self.count]
        return self._rows


def normalized(vector: Float64, norm: int = EUCLIDEAN) -> Vector:
    length = _length(vector, norm)
    return np.asarray(vector / length if length > 0 else vector * 0, np.float32)


def _length(vector: Float64, norm: int) -> float:
    """Returns the number by which to divide the vector."""
    if norm < 0:
        return 1.0
    magnitudes: Sequence[float] = np.abs(vector).tolist()
    if norm == 0:
        return max(magnitudes) / _INT16
    if norm == EUCLIDEAN:
        return math.sqrt(math.fsum(value * value for value in magnitudes))
    greatest = max(magnitudes)  # Factored out, because a high power of it could overflow.
    if greatest == 0:
        return 0.0
    return float(greatest * math.fsum((value / greatest) ** norm for value in magnitudes) ** (1 / norm))


_MOST_SUBMITTED = 16
"""Maximum number of prompts of one request that are queued or computed at a time."""


@dataclass(frozen=True, slots=True)
class EmbeddingOptions:
    """Options of embeddings. `norm` is llama.cpp's `embd_normalize`, which applies only to pooled vectors. `dimensions`
    is the number of leading channels to keep, or None for all."""

    pooling: Pooling
    norm: int = EUCLIDEAN
    dimensions: int | None = None
    cache_salt: str = ""


@dataclass(frozen=True, slots=True)
class Embedding:
    """The embedding of one prompt. It is a single vector, or one vector per token if there is no pooling."""

    vectors: tuple[Vector, ...]
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Rank:
    score: float
    prompt_tokens: int


class Embedder:
    """Embeds prompts with one engine. Not thread-safe: use it on one event loop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def embed(self, prompts: Sequence[tuple[int, ...]], options: EmbeddingOptions) -> list[Embedding]:
        """Returns the embeddings in order. Raises ParameterError, QueueFullError, DeadlineError or WorkerError."""
        group = secrets.token_hex(12)
        head_request, *later_requests = (
            partial(_request, f"{group}-{index}", group, prompt, options) for index, prompt in enumerate(prompts)
        )
        request = head_request()
        first = self._engine.submit(request)
        places, limit_s = asyncio.Semaphore(_MOST_SUBMITTED), self._engine.deadlines.request_s
        try:
            async with first, deadline("the request (timeouts.request)", limit_s), asyncio.TaskGroup() as tasks:
                later = [tasks.create_task(self._run(places, make, options)) for make in later_requests]
                head = tasks.create_task(_pooled(first, request, options))
        except BaseExceptionGroup as errors:
            raise _first(errors) from None
        return [head.result(), *(task.result() for task in later)]

    async def rank(self, pairs: Sequence[tuple[int, ...]], ranking: Ranking, cache_salt: str) -> list[Rank]:
        found = await self.embed(pairs, EmbeddingOptions(ranking.pooling, norm=-1, cache_salt=cache_salt))
        return [Rank(ranking.score(embedding.vectors[0].tolist()), embedding.prompt_tokens) for embedding in found]

    async def _run(
        self, places: asyncio.Semaphore, make: Callable[[], GenerationRequest], options: EmbeddingOptions
    ) -> Embedding:
        async with places:  # The request was accepted, so it waits while the queue is full.
            request = make()
            return await _pooled(await when_free(partial(self._engine.submit, request)), request, options)


def _request(name: str, group: str, prompt: tuple[int, ...], options: EmbeddingOptions) -> GenerationRequest:
    return GenerationRequest(
        name,
        prompt,
        max_new_tokens=0,
        embedded=options.pooling.rows(len(prompt)) if prompt else None,  # The engine refuses an empty prompt.
        cache_salt=options.cache_salt,
        group=group,
        owner=current_owner.get(),
        operation=Operation.EMBEDDINGS,
    )


async def _pooled(stream: RequestStream, request: GenerationRequest, options: EmbeddingOptions) -> Embedding:
    pooler = Pooler(options.pooling)
    async with stream:
        async for event in stream:
            if isinstance(event, PromptEmbedded):
                pooler.add(event)
    if request.embedded is None or pooler.count < request.embedded[1] - request.embedded[0]:
        raise WorkerError("the request was ended before its embedding was complete")
    vectors = tuple(_finished(vector, options) for vector in pooler.vectors())
    return Embedding(vectors, len(request.prompt))


def _finished(vector: Float64, options: EmbeddingOptions) -> Vector:
    norm = -1 if options.pooling is Pooling.NONE else options.norm
    return normalized(vector[: options.dimensions], norm)


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
