"""Whole answers: the chunks of a completion put together."""

from __future__ import annotations

from collections.abc import AsyncIterable
from dataclasses import dataclass

from llamaclust.cluster.scheduler.requests import FinishReason, Timings
from llamaclust.cluster.text.choice import TextChunk
from llamaclust.core.sampling import RowResult


@dataclass(frozen=True, slots=True)
class Answer:
    """One finished choice. `rows` and `offsets` as in TextChunk; prompt_rows score the prompt from prompt_start on."""

    index: int
    text: str
    rows: tuple[RowResult, ...]
    offsets: tuple[int, ...]
    prompt_start: int
    prompt_rows: tuple[RowResult, ...]
    finish_reason: FinishReason
    stopped_by: str | int | None
    timings: Timings

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(row.token for row in self.rows)

    @property
    def logprobs(self) -> tuple[float, ...]:
        """Float32 values, one a token."""
        return tuple(row.logprob for row in self.rows)


async def collect(chunks: AsyncIterable[TextChunk]) -> list[Answer]:
    """The answers of all choices, by index. Raises what ended a choice early."""
    by_index: dict[int, list[TextChunk]] = {}
    async for chunk in chunks:
        by_index.setdefault(chunk.index, []).append(chunk)
    return [join(by_index[index]) for index in sorted(by_index)]


def join(chunks: list[TextChunk]) -> Answer:
    """The answer that a choice's chunks, from first to last, make."""
    last = chunks[-1]
    assert last.finish_reason is not None and last.timings is not None, "the last chunk of a choice ends it"
    scored = [chunk for chunk in chunks if chunk.prompt_rows]
    return Answer(
        index=last.index,
        text="".join(chunk.text for chunk in chunks),
        rows=tuple(row for chunk in chunks for row in chunk.rows),
        offsets=tuple(offset for chunk in chunks for offset in chunk.offsets),
        prompt_start=scored[0].prompt_start if scored else 0,
        prompt_rows=tuple(row for chunk in scored for row in chunk.prompt_rows),
        finish_reason=last.finish_reason,
        stopped_by=last.stopped_by,
        timings=last.timings,
    )
