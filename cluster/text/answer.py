"""A completion as text: chunks while it runs, and whole answers put together from them."""

from __future__ import annotations

import math
from collections.abc import AsyncIterable, Iterable
from dataclasses import dataclass

from llamaclust.cluster.scheduler.requests import FinishReason, Timings
from llamaclust.core.sampling import RowResult
from llamaclust.model.chat.tools.events import AnswerEvent, ReasoningText, merged

_LEAST_LOGPROB = -9999.0


def json_logprob(value: float) -> float:
    """A float32 logprob, whole: reading it gives the same float32. Minus infinity, which JSON lacks, as -9999."""
    return value if math.isfinite(value) else _LEAST_LOGPROB


@dataclass(frozen=True, slots=True)
class TextChunk:
    """What one event adds to choice `index`. Text may come later than its tokens (half characters, stop strings).

    `rows` holds every sampled token with its logprob, also the end token or those of a stop string, whose text is not
    shown; offsets[i] is where rows[i]'s text begins in the answer, in characters, where the server counts them.
    """

    index: int = 0
    text: str = ""
    rows: tuple[RowResult, ...] = ()
    offsets: tuple[int, ...] = ()
    prompt_start: int = 0  # prompt_rows score the prompt's tokens from here
    prompt_rows: tuple[RowResult, ...] = ()
    finish_reason: FinishReason | None = None  # on the last chunk of a choice, with its timings
    stopped_by: str | int | None = None  # the stop string or end token
    timings: Timings | None = None
    prompt_token_ids: tuple[int, ...] = ()  # on the first chunk that a client gets, with the seed
    seed: int | None = None
    events: tuple[AnswerEvent, ...] = ()  # of a chat's answer: also its content, which is the text then

    @property
    def reasoning(self) -> str:
        """What the model of a chat wrote apart from the text, before it."""
        return "".join(event.text for event in self.events if isinstance(event, ReasoningText))

    @property
    def entries(self) -> int:
        """Tokens and top logprobs of all rows."""
        return sum(1 + len(row.top_logprobs) for row in (*self.rows, *self.prompt_rows))

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(row.token for row in self.rows)

    @property
    def logprobs(self) -> tuple[float, ...]:
        """Float32 values, one a token; -9999 stands for minus infinity."""
        return tuple(json_logprob(row.logprob) for row in self.rows)

    @property
    def prompt_logprobs(self) -> tuple[float, ...]:
        """Likewise of the scored prompt tokens, in order."""
        return tuple(json_logprob(row.logprob) for row in self.prompt_rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer(TextChunk):
    """One finished choice: all its chunks as one."""

    finish_reason: FinishReason
    timings: Timings


async def collect(chunks: AsyncIterable[TextChunk]) -> list[Answer]:
    """The answers of all choices, by index. Raises what ended a choice early."""
    by_index: dict[int, list[TextChunk]] = {}
    async for chunk in chunks:
        by_index.setdefault(chunk.index, []).append(chunk)
    return [join(by_index[index]) for index in sorted(by_index)]


def release_rows(answers: list[list[Answer]]) -> None:
    """Frees them row by row: to free millions of logprobs in one go would stop all threads meanwhile."""
    while answers:
        rows = [row for answer in answers.pop() for row in (*answer.rows, *answer.prompt_rows)]
        while rows:
            rows.pop()


def join(chunks: Iterable[TextChunk]) -> Answer:
    """The answer that a choice's chunks, from first to last, make."""
    parts = list(chunks)
    first, last = parts[0], parts[-1]
    assert last.finish_reason is not None and last.timings is not None, "the last chunk of a choice ends it"
    scored = [part for part in parts if part.prompt_rows]
    return Answer(
        index=last.index,
        text="".join(part.text for part in parts),
        rows=tuple(row for part in parts for row in part.rows),
        offsets=tuple(offset for part in parts for offset in part.offsets),
        prompt_start=scored[0].prompt_start if scored else 0,
        prompt_rows=tuple(row for part in scored for row in part.prompt_rows),
        finish_reason=last.finish_reason,
        stopped_by=last.stopped_by,
        timings=last.timings,
        prompt_token_ids=first.prompt_token_ids,
        seed=first.seed,
        events=tuple(merged(event for part in parts for event in part.events)),
    )
