"""Readers of answer logs: a stream's bytes as they come, from any place on, and whole replies."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial

from llamaclust.cluster.front.errors import HttpError
from llamaclust.cluster.front.http.sse import StreamFormat
from llamaclust.cluster.front.json_text import is_large, off_loop_if
from llamaclust.cluster.front.replies.reply import Event, JsonBody, View, json_body
from llamaclust.cluster.front.text.answer import TextChunk
from llamaclust.cluster.front.text.answer_log import AnswerLog, LogReader

_MAX_SLOTS = 130
_TURN_ENTRIES = 256
"""Entries that one reader renders before others get their turn, where so many are there."""


class Position:
    """How many events of each slot a client has. As text in event ids: `3`, or `3-5-0` for several slots."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    @classmethod
    def parse(cls, text: str, param: str) -> Position:
        """HttpError for a text that is none."""
        position = cls()
        parts = text.split("-", _MAX_SLOTS)
        if not all(part.isascii() and part.isdigit() and len(part) < 16 for part in parts) or len(parts) > _MAX_SLOTS:
            raise HttpError(400, "bad_event_id", f"{param}: {text[:60]!r} is not the id of an event", param=param)
        position._counts.update({slot: int(part) for slot, part in enumerate(parts)})
        return position

    def add(self, event: Event) -> int:
        """The number of the event within its slot, from 1 on."""
        self._counts[event.slot] += 1
        return self._counts[event.slot]

    def has(self, event: Event, number: int) -> bool:
        """Whether the client has the event of that number."""
        return number <= self._counts[event.slot]

    def __str__(self) -> str:
        last = max(self._counts, default=0)
        return "-".join(str(self._counts[slot]) for slot in range(last + 1))


@dataclass(slots=True)
class Framing:
    """How one client gets the events of a stream."""

    form: StreamFormat
    request_id: str
    keepalive_s: float
    given: Position = field(default_factory=Position)  # events that it has, counted on as it gets more
    with_ids: bool = True
    with_comments: bool = True
    skipped_bytes: int = 0  # of the stream, that it has
    is_done: bool = False  # it has all, or the error
    _numbers: Position = field(default_factory=Position)

    def part(self, event: Event) -> bytes:
        """The bytes of the next event; none where the client has it."""
        if not self.with_ids:
            return event.data
        if self.given.has(event, self._numbers.add(event)):
            return b""
        self.given.add(event)
        data = self.form.part(f"{self.request_id}:{self.given}", event.data)
        if not self.skipped_bytes:
            return data
        skipped, self.skipped_bytes = self.skipped_bytes, max(0, self.skipped_bytes - len(data))
        return data[skipped:]


async def stream_parts(
    reading: AbstractContextManager[LogReader], log: AnswerLog, make_view: Callable[[], View], framing: Framing
) -> AsyncGenerator[bytes, None]:
    """What a client lacks of a stream, and what comes; raises the error that ended the log."""
    view: View | None = None
    taken = 0
    try:
        with reading as reader:
            while (entry := reader.take()) is not None or not reader.is_at_end:
                if entry is None:
                    if not await reader.wait(framing.keepalive_s) and framing.with_comments and framing.form.keepalive:
                        yield framing.form.keepalive
                    continue
                taken += 1
                if not taken % _TURN_ENTRIES:
                    await asyncio.sleep(0)
                view = view or make_view()
                if is_large(view.size(*entry)):
                    events = await off_loop_if(True, partial(view.frames, *entry, is_large=True))
                else:
                    events = view.frames(*entry, is_large=False)
                for event in events:
                    if part := framing.part(event):
                        yield part
            log.raise_error()
            for event in (view or make_view()).closing():
                if part := framing.part(event):
                    yield part
        framing.is_done = True
    except Exception:
        framing.is_done = True  # an error is the end that a client gets
        raise


def whole_body(view: View, log: AnswerLog) -> JsonBody:
    """The JSON of a reply that is not streamed, whose log is over; the caller closes it. Raises the log's error."""
    parts = log.parts()
    return json_body(partial(view.whole, parts), is_large=is_large(entries_of(log, parts)))


def entries_of(log: AnswerLog, parts: Sequence[Sequence[TextChunk]]) -> int:
    """Tokens and logprobs of whole answers, and tokens of the prompts, which some APIs show."""
    prompts = sum(len(generation.prompt) for generation in log.generations)
    return prompts + sum(chunk.entries for chunks in parts for chunk in chunks)
