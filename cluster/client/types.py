"""Options and streams of clients, the same over HTTP and in this process."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from typing import Any, Literal, Self, TypedDict

from llamaclust.cluster.front.text.answer import Answer, TextChunk, join

Message = Mapping[str, Any]
"""One message of a chat: {"role": "user", "content": "Hello"}."""


class AnswerOptions(TypedDict, total=False):
    """How to answer. What is left out or None has the defaults of `/v1/completions` and `/v1/chat/completions`, except
    that the likeliest token is taken each time, until the model ends its answer."""

    max_tokens: int | None  # None, the default: until the context is full; 0: nothing is chosen
    temperature: float  # 0.0, the default, chooses the likeliest token
    seed: int | None  # None, the default: drawn at random; the answer has it
    top_k: int  # 0: all
    top_p: float
    min_p: float
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    penalty_window: int | None  # last tokens that penalties count; None, the default: all
    logit_bias: Mapping[int, float]
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    min_tokens: int
    ignore_eos: bool
    top_n_sigma: float  # 0 or less: off
    tfs_z: float
    typical_p: float
    xtc_probability: float
    xtc_threshold: float
    dynatemp_range: float
    dynatemp_exponent: float
    dry_multiplier: float  # 0: no DRY
    dry_base: float
    dry_allowed_length: int
    dry_penalty_last_n: int  # -1: all tokens
    dry_sequence_breakers: Sequence[str]
    mirostat: int  # 1, 2: that version
    mirostat_tau: float
    mirostat_eta: float
    penalize_nl: bool
    samplers: Sequence[str]  # which act, and in which order
    speculative: bool | int  # False: no tokens are drafted; a number: so many in a step, at most
    response_format: Mapping[str, Any]  # OpenAI's: {"type": "json_object"}, {"type": "json_schema", ...}
    json_schema: Mapping[str, Any]  # the answer is JSON that it allows
    grammar: str  # in GBNF or Lark, which the answer obeys
    structured_outputs: Mapping[str, Any]  # vLLM's: {"regex": ...}, {"choice": [...]}, ...


class Options(AnswerOptions, total=False):
    """Options of a chat."""

    reasoning_budget: int  # tokens of reasoning at most; -1, the default: no limit
    reasoning_budget_message: str  # what stands before an end that the budget forces


class CompletionOptions(AnswerOptions, total=False):
    """Options of a prompt that is completed as it is."""

    score_from: int | None  # the prompt's tokens [max(score_from, 1), end) get logprobs; None, the default: none


class EmbeddingOptions(TypedDict, total=False):
    """How to embed. What is left out has the defaults of `/v1/embeddings`."""

    pooling: Literal["mean", "cls", "last"] | None  # None, the default: as the model file says, else "last"
    dimensions: int | None  # leading channels to keep; None, the default: all


class ChunkStream:
    """The chunks of an answer as they come; the request is sent with the first. Closing it, leaving `with` and dropping
    it end the request."""

    def __init__(self, chunks: Generator[TextChunk, None, None]) -> None:
        self._chunks = chunks

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> TextChunk:
        return next(self._chunks)

    def close(self) -> None:
        self._chunks.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class AsyncChunkStream:
    """`ChunkStream` for `async for` and `async with`."""

    def __init__(self, chunks: AsyncGenerator[TextChunk, None]) -> None:
        self._chunks = chunks

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TextChunk:
        return await anext(self._chunks)

    def __await__(self) -> Generator[None, None, Self]:
        """Itself: other clients want their streams awaited."""
        yield from ()
        return self

    async def aclose(self) -> None:
        await self._chunks.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()


async def join_chunks(chunks: AsyncGenerator[TextChunk, None]) -> Answer:
    """The answer that all chunks make."""
    return join([chunk async for chunk in chunks])
