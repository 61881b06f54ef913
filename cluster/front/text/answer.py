"""Answers as text. A running answer is a series of chunks, which can be joined to the complete answer."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any, overload

from llamaclust.cluster.scheduler.requests import FinishReason, Timings
from llamaclust.core.sampler.results import RowResult, TopLogprobs
from llamaclust.model.chat.tools.events import AnswerEvent, ReasoningText, merged
from llamaclust.model.tokenizers.tokenizer import Tokenizer


class PackedRows(Sequence[RowResult]):
    """A sequence of RowResult in packed arrays, which take little memory. Each access makes a new RowResult."""

    __slots__ = ("_ends", "_logprobs", "_tokens", "_tops")

    def __init__(self) -> None:
        self._tokens = array("i")
        self._logprobs = array("f")
        self._tops = bytearray()
        self._ends = array("q")  # End of each row's bytes in `_tops`.

    def extend(self, rows: Iterable[RowResult]) -> None:
        for row in rows:
            self._tokens.append(row.token)
            self._logprobs.append(row.logprob)
            self._tops += TopLogprobs.of(row.top_logprobs).packed
            self._ends.append(len(self._tops))

    @property
    def tokens(self) -> Sequence[int]:
        return self._tokens

    @property
    def entries(self) -> int:
        return len(self._tokens) + len(TopLogprobs(self._tops))

    def __len__(self) -> int:
        return len(self._tokens)

    @overload
    def __getitem__(self, place: int) -> RowResult: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[RowResult, ...]: ...
    def __getitem__(self, place: int | slice) -> RowResult | tuple[RowResult, ...]:
        if isinstance(place, slice):
            return tuple(self[each] for each in range(*place.indices(len(self))))
        place = range(len(self))[place]
        begin, end = self._ends[place - 1] if place else 0, self._ends[place]
        return RowResult(self._tokens[place], self._logprobs[place], TopLogprobs(bytes(self._tops[begin:end])))

    def __eq__(self, other: object) -> bool:
        return tuple(self) == tuple(other) if isinstance(other, tuple | PackedRows) else NotImplemented

    def __repr__(self) -> str:
        return repr(tuple(self))


_LEAST_LOGPROB = -9999.0
_MOST_EVENTS = 1024


def json_logprob(value: float) -> float:
    """Returns a logprob for JSON. Minus infinity, which JSON lacks, becomes -9999."""
    return value if math.isfinite(value) else _LEAST_LOGPROB


def row_entry(tokenizer: Tokenizer, row: RowResult) -> dict[str, Any]:
    top = [_token_entry(tokenizer, token, logprob) for token, logprob in row.top_logprobs]
    return {**_token_entry(tokenizer, row.token, row.logprob), "top_logprobs": top}


def _token_entry(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.token_bytes(token)
    text = data.decode("utf-8", "replace")
    return {"id": token, "token": text, "logprob": json_logprob(logprob), "bytes": list(data)}


@dataclass(frozen=True, slots=True)
class TextChunk:
    """The part of an answer that one step adds. `rows` are the sampled tokens. Their text may be in a later chunk."""

    index: int = 0  # Index of the choice.
    text: str = ""
    rows: Sequence[RowResult] = ()
    offsets: Sequence[int] = ()  # Position in the answer at which the text of each row begins, or empty.
    prompt_start: int = 0  # Position in the prompt of the first of the `prompt_rows`.
    prompt_rows: Sequence[RowResult] = ()
    finish_reason: FinishReason | None = None  # Set on the last chunk of a choice, which has timings.
    stopped_by: str | int | None = None  # Stop string or end token that ended the answer.
    timings: Timings | None = None
    prompt_token_ids: tuple[int, ...] = ()  # Set together with `seed`, on the first chunk that a client receives.
    seed: int | None = None
    events: tuple[AnswerEvent, ...] = ()  # Events of a chat's answer. `text` then has only the text of content events.

    @property
    def reasoning(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, ReasoningText))

    @property
    def entries(self) -> int:
        return _entries(self.rows) + _entries(self.prompt_rows)

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(self.rows.tokens if isinstance(self.rows, PackedRows) else (row.token for row in self.rows))

    @property
    def logprobs(self) -> tuple[float, ...]:
        return tuple(json_logprob(row.logprob) for row in self.rows)

    @property
    def prompt_logprobs(self) -> tuple[float, ...]:
        return tuple(json_logprob(row.logprob) for row in self.prompt_rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer(TextChunk):
    finish_reason: FinishReason
    timings: Timings


def join(chunks: Iterable[TextChunk]) -> Answer:
    collected = Collected()
    for chunk in chunks:
        collected.add(chunk)
    return collected.answer()


class Collected:
    def __init__(self) -> None:
        self._first = self._last = TextChunk()
        self._is_empty = True
        self._text = StringIO()
        self._rows, self._prompt_rows = PackedRows(), PackedRows()
        self._offsets = array("q")
        self._prompt_start = 0
        self._events: list[AnswerEvent] = []

    def add(self, chunk: TextChunk) -> None:
        if chunk.prompt_rows and not self._prompt_rows:
            self._prompt_start = chunk.prompt_start
        if self._is_empty:
            self._is_empty, self._first = False, chunk
        self._last = chunk
        self._text.write(chunk.text)
        self._rows.extend(chunk.rows)
        self._prompt_rows.extend(chunk.prompt_rows)
        self._offsets.extend(chunk.offsets)
        self._events += chunk.events
        if len(self._events) > _MOST_EVENTS:
            self._events = merged(self._events)

    def answer(self) -> Answer:
        first, last = self._first, self._last
        assert last.finish_reason is not None and last.timings is not None, "the last chunk of a choice ends it"
        return Answer(
            index=last.index,
            text=self._text.getvalue(),
            rows=self._rows,
            offsets=self._offsets,
            prompt_start=self._prompt_start,
            prompt_rows=self._prompt_rows,
            finish_reason=last.finish_reason,
            stopped_by=last.stopped_by,
            timings=last.timings,
            prompt_token_ids=first.prompt_token_ids,
            seed=first.seed,
            events=tuple(merged(self._events)),
        )


def _entries(rows: Sequence[RowResult]) -> int:
    if isinstance(rows, PackedRows):
        return rows.entries
    return len(rows) + sum([len(row.top_logprobs) for row in rows]) if rows else 0
