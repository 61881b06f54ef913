"""Answers as responses, whole or streamed, and into the store."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, Final

from llamaclust.cluster.front.dialects.openai.responses.items import Item, messages_of, with_ids
from llamaclust.cluster.front.dialects.openai.responses.output import (
    Details,
    OutputItems,
    ResponseHead,
    Shown,
    ShownRow,
    Status,
    end_status,
    shown_usage,
)
from llamaclust.cluster.front.dialects.openai.responses.store import Messages, ResponseStore, StoredResponse
from llamaclust.cluster.front.fields.timings import shown_progress, shown_timings
from llamaclust.cluster.front.http.sse import DONE, named_event
from llamaclust.cluster.front.replies.reply import Event, View
from llamaclust.cluster.front.text.answer import TextChunk
from llamaclust.cluster.front.text.answer_log import AnswerLog, LogItem
from llamaclust.cluster.scheduler.requests import PromptProgress
from llamaclust.model.chat.tools.events import AnswerEvent, ContentText, ReasoningText
from llamaclust.model.tokenizers.tokenizer import Tokenizer

_COUNTED_CHARACTERS: Final = 1024


class Storing:
    """Stores a response once it is complete, with the items that it answers. All readers of a reply share one."""

    def __init__(self, store: ResponseStore, owner: str, input_items: Sequence[Item], messages: Messages) -> None:
        """`messages`: of the chat before the answer. Made on the event loop of the store."""
        self._store = store
        self._owner = owner
        self._input_items = input_items
        self._messages = messages
        self._loop = asyncio.get_running_loop()
        self._is_done = False

    def begin(self, head: ResponseHead) -> None:
        """Stores what a response answers that is computed in the background."""
        items = with_ids(self._input_items, head.response_id)
        self._store.put(self._owner, StoredResponse(head.shown(head.first_status), items, ()))

    def complete(self, response: dict[str, Any]) -> None:
        """Stores the response before its client has the end of it. May be called on any thread, by each reader."""
        messages = (*self._messages, *messages_of(response["output"]))
        stored = StoredResponse(response, with_ids(self._input_items, response["id"]), messages)
        self._loop.call_soon_threadsafe(self._put, stored)

    def _put(self, stored: StoredResponse) -> None:
        if not self._is_done:
            self._is_done = True
            self._store.put(self._owner, stored)


class ResponseView(View):
    """One answer."""

    def __init__(
        self, head: ResponseHead, tokenizer: Tokenizer, storing: Storing | None, details: Details, log: AnswerLog
    ) -> None:
        """`storing`: None for a response that is not stored."""
        self._details = details
        self._tokenizer = tokenizer
        self._head = head
        self._storing = storing
        self._log = log
        self._items = OutputItems(head.reply_id, details.tools)
        self._events = 0  # sent so far
        self._tokens = 0
        self._ends = tokenizer.end_of_generation
        self._reasoning = ReasoningCount(tokenizer)

    def whole(self, parts: Sequence[Sequence[TextChunk]]) -> dict[str, Any]:
        """See `View`. Chunks where logprobs are shown: of a joined answer, no token has a place in the text."""
        (chunks,) = parts
        for _ in chain.from_iterable(map(self._take, chunks)):
            pass
        return self._ended(chunks[-1])

    def size(self, prompt: int, item: LogItem) -> int:
        """See `View`. Events that end an item, and the response, have all its logprobs."""
        if not self._details.logprobs or not isinstance(item, TextChunk):
            return 0
        is_end = item.finish_reason is not None or not all(isinstance(event, ContentText) for event in item.events)
        return item.entries + (self._items.logprobs if is_end else 0)

    def frames(self, prompt: int, item: LogItem, *, is_large: bool) -> list[Event]:
        """See `View`."""
        if isinstance(item, PromptProgress):
            return [*self._progress(item)]
        return [Event(0, data) for data in self._events_of(item, is_large=is_large)]

    def _events_of(self, chunk: TextChunk, *, is_large: bool) -> Iterator[bytes]:
        yield from self._begin()
        timings = {}
        if self._details.timings and chunk.timings is not None:
            timings["timings"] = shown_timings(chunk.timings)
        for shown in self._take(chunk):
            yield self._numbered({**shown, **timings}, is_large=is_large)
        if chunk.finish_reason is None:
            return
        response = self._ended(chunk)
        yield self._numbered(
            {"type": f"response.{response['status']}", "response": response, **timings}, is_large=is_large
        )
        yield DONE

    def _begin(self) -> Iterator[bytes]:
        if not self._events:
            for name, status in self._head.first_events:
                yield self._numbered({"type": f"response.{name}", "response": self._head.shown(status)})

    def _progress(self, progress: PromptProgress) -> Iterator[Event]:
        """In a slot of its own, with the number of the event before: a reply that is computed again has other ones."""
        for data in self._begin():
            yield Event(0, data)
        name = "response.in_progress"
        shown = {
            "type": name,
            "response": self._head.shown(Status.IN_PROGRESS),
            "sequence_number": self._events - 1,
        }
        more = shown_progress(progress, with_timings=self._details.timings)
        yield Event(1, named_event(name, {**shown, **more}))

    def _take(self, part: TextChunk) -> Iterator[Shown]:
        events: Sequence[AnswerEvent] = part.events or (ContentText(part.text),)
        self._tokens += len(part.rows)
        for event in events:
            if isinstance(event, ReasoningText):
                self._reasoning.add(event.text)
        yield from self._items.take(events, self._logprobs(part))
        if part.finish_reason is not None:
            yield from self._items.end(end_status(part))

    def _logprobs(self, part: TextChunk) -> list[ShownRow]:
        """Of tokens that are text: an end token is none."""
        if not self._details.logprobs:
            return []
        return [ShownRow(self._tokenizer, row) for row in part.rows if row.token not in self._ends]

    def _ended(self, last: TextChunk) -> dict[str, Any]:
        """The response, which is to be stored."""
        assert last.timings is not None
        (generation,) = self._log.generations
        reasoning_tokens = min(self._reasoning.total(), self._tokens)
        usage = shown_usage(last.timings, len(generation.prompt), self._tokens, reasoning_tokens)
        response = self._head.shown(end_status(last), self._items.items, usage, ended_s=self._log.ended_s)
        if self._storing is not None:
            self._storing.complete(response)
        return response

    def _numbered(self, shown: Shown, *, is_large: bool = False) -> bytes:
        number = self._events
        self._events += 1
        return named_event(shown["type"], {**shown, "sequence_number": number}, is_large=is_large)


class ReasoningCount:
    """About the tokens of an answer's reasoning: some characters at a time, so that the last event of a stream does not
    wait for all. The same for any pieces of a text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._text = ""  # not counted yet
        self._tokens = 0

    def add(self, text: str) -> None:
        self._text += text
        whole = len(self._text) - len(self._text) % _COUNTED_CHARACTERS
        for start in range(0, whole, _COUNTED_CHARACTERS):
            self._tokens += self._count(self._text[start : start + _COUNTED_CHARACTERS])
        self._text = self._text[whole:]

    def total(self) -> int:
        """No more text comes."""
        return self._tokens + self._count(self._text)

    def _count(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special=False)) if text else 0
