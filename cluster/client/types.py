"""Options and streams of clients, the same over HTTP and in this process."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, TypedDict

from llamaclust.cluster.scheduler.breakers import DEFAULT_BREAKERS
from llamaclust.cluster.text.answer import TextChunk
from llamaclust.core.sampler_chain import SAMPLERS

Message = Mapping[str, Any]
"""One message of a chat: {"role": "user", "content": "Hello"}."""


class Options(TypedDict, total=False):
    """How to go on from a prompt. What is left out has the defaults of `Settings`."""

    max_tokens: int | None
    temperature: float
    seed: int | None
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    penalty_window: int | None
    logit_bias: Mapping[int, float]
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    min_tokens: int
    ignore_eos: bool
    top_n_sigma: float
    tfs_z: float
    typical_p: float
    xtc_probability: float
    xtc_threshold: float
    dynatemp_range: float
    dynatemp_exponent: float
    dry_multiplier: float
    dry_base: float
    dry_allowed_length: int
    dry_penalty_last_n: int
    dry_sequence_breakers: Sequence[str]
    mirostat: int
    mirostat_tau: float
    mirostat_eta: float
    penalize_nl: bool
    samplers: Sequence[str]


@dataclass(frozen=True, slots=True)
class Settings:
    """`Options` with their defaults: the likeliest token each time, until the model ends its answer."""

    max_tokens: int | None = None  # None: until the context is full; 0: nothing is chosen
    temperature: float = 0.0  # 0 chooses the likeliest token
    seed: int | None = None  # None: drawn at random; the answer has it
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    penalty_window: int | None = None  # last tokens that penalties count; None: all
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    top_n_sigma: float = -1.0  # 0 or less: off
    tfs_z: float = 1.0
    typical_p: float = 1.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    dynatemp_range: float = 0.0
    dynatemp_exponent: float = 1.0
    dry_multiplier: float = 0.0  # 0: no DRY
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = -1  # -1: all tokens
    dry_sequence_breakers: Sequence[str] = DEFAULT_BREAKERS
    mirostat: int = 0  # 1, 2: that version
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    penalize_nl: bool = True
    samplers: Sequence[str] = SAMPLERS  # which act, and in which order

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop)


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

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class AsyncChunkStream:
    """`ChunkStream` for `async for` and `async with`."""

    def __init__(self, chunks: AsyncGenerator[TextChunk, None]) -> None:
        self._chunks = chunks

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TextChunk:
        return await anext(self._chunks)

    async def aclose(self) -> None:
        await self._chunks.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.aclose()
