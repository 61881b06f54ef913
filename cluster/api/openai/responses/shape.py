"""Answers as responses, whole or streamed, and into the store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, Final

from llamaclust.cluster.api.fields.timings import shown_progress, shown_timings
from llamaclust.cluster.api.json_parts import is_large, off_loop_if_large
from llamaclust.cluster.api.openai.responses.items import Item, messages_of, with_ids
from llamaclust.cluster.api.openai.responses.output import OutputItems, Shown
from llamaclust.cluster.api.openai.responses.response import Details, ResponseHead, Status, end_status, shown_usage
from llamaclust.cluster.api.openai.responses.shown_row import ShownRow
from llamaclust.cluster.api.openai.responses.store import Messages, ResponseStore, StoredResponse
from llamaclust.cluster.api.replies.reply import Event
from llamaclust.cluster.api.sse import DONE, named_event
from llamaclust.cluster.scheduler.requests import PromptProgress, Timings
from llamaclust.cluster.text.answer import TextChunk, join
from llamaclust.cluster.text.stream import CompletionStream
from llamaclust.model.chat.tools.events import AnswerEvent, ContentText, ReasoningText
from llamaclust.model.tokenizers.tokenizer import Tokenizer

_COUNTED_CHARACTERS: Final = 1024


@dataclass(frozen=True, slots=True)
class Storing:
    """Where a response goes once it is complete, with what it answers."""

    store: ResponseStore
    owner: str
    input_items: Sequence[Item]
    messages: Messages  # of the chat before the answer

    def begin(self, head: ResponseHead) -> None:
        """What a response answers that is computed in the background."""
        items = with_ids(self.input_items, head.response_id)
        self.store.put(self.owner, StoredResponse(head.shown(head.first_status), items, ()))

    def completed(self, response: dict[str, Any]) -> StoredResponse:
        """With the answer that it has."""
        messages = (*self.messages, *messages_of(response["output"]))
        return StoredResponse(response, with_ids(self.input_items, response["id"]), messages)


class ResponseShape:
    """One answer. See `AnswerShape`."""

    def __init__(
        self, head: ResponseHead, reply_id: str, tokenizer: Tokenizer, storing: Storing | None, details: Details
    ) -> None:
        """`storing`: None for a response that is not stored."""
        self.has_measurements = details.timings or details.progress
        self.progress = self._progress if details.progress else None
        self.keeps_logprobs = details.logprobs
        self._details = details
        self._tokenizer = tokenizer
        self._head = head
        self._storing = storing
        self._stored: StoredResponse | None = None  # once it is complete
        self._items = OutputItems(reply_id, details.tools)
        self._events = 0  # sent so far
        self._tokens = 0
        self._ends = tokenizer.end_of_generation
        self._reasoning = ReasoningCount(tokenizer)

    async def whole(self, chunks: Sequence[TextChunk], stream: CompletionStream) -> dict[str, Any]:
        answer = join(chunks)
        response = await off_loop_if_large(partial(self._whole, chunks, answer, stream), answer.entries)
        self._store()
        return response

    def _whole(self, chunks: Sequence[TextChunk], answer: TextChunk, stream: CompletionStream) -> dict[str, Any]:
        parts = chunks if self._details.logprobs else (answer,)  # of joined ones, no token has a place in the text
        for _ in chain.from_iterable(map(self._take, parts)):
            pass
        return self._ended(answer, answer.timings or stream.timings(), stream)

    async def events(self, chunk: TextChunk, stream: CompletionStream) -> Sequence[bytes]:
        """Those that end an item, and the response, have all its logprobs."""
        is_end = chunk.finish_reason is not None or not all(isinstance(event, ContentText) for event in chunk.events)
        entries = chunk.entries if self._details.logprobs else 0
        entries += self._items.logprobs if is_end else 0
        made = partial(self._events_of, chunk, stream, is_large=is_large(entries))
        events = await off_loop_if_large(lambda: [*made()], entries)
        self._store()
        return events

    def _store(self) -> None:
        """On the event loop."""
        if self._storing is not None and self._stored is not None:
            self._storing.store.put(self._storing.owner, self._stored)

    def _events_of(self, chunk: TextChunk, stream: CompletionStream, *, is_large: bool) -> Iterator[bytes]:
        yield from self._begin()
        timings = {"timings": shown_timings(stream.timings())} if self._details.timings else {}
        for shown in self._take(chunk):
            yield self._numbered({**shown, **timings}, is_large=is_large)
        if chunk.finish_reason is None:
            return
        response = self._ended(chunk, chunk.timings or stream.timings(), stream)
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

    def _ended(self, part: TextChunk, timings: Timings, stream: CompletionStream) -> dict[str, Any]:
        """The response, which is to be stored."""
        reasoning_tokens = min(self._reasoning.total(), self._tokens)
        usage = shown_usage(timings, len(stream.generation.prompt), self._tokens, reasoning_tokens)
        response = self._head.shown(end_status(part), self._items.items, usage)
        if self._storing is not None:
            self._stored = self._storing.completed(response)
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
