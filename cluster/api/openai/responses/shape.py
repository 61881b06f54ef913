"""Answers as responses, whole or streamed, and into the store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llamaclust.cluster.api.openai.responses.items import Item, messages_of, with_ids
from llamaclust.cluster.api.openai.responses.output import OutputItems, Shown
from llamaclust.cluster.api.openai.responses.response import ResponseHead, end_status, shown_usage
from llamaclust.cluster.api.openai.responses.store import Messages, ResponseStore, StoredResponse
from llamaclust.cluster.api.sse import DONE, named_event
from llamaclust.cluster.scheduler.requests import Timings
from llamaclust.cluster.text.answer import Answer, TextChunk
from llamaclust.cluster.text.stream import CompletionStream
from llamaclust.model.chat.tools.events import AnswerEvent, ContentText, ReasoningText
from llamaclust.model.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Storing:
    """Where a response goes once it is complete, with what it answers."""

    store: ResponseStore
    owner: str
    input_items: Sequence[Item]
    messages: Messages  # of the chat before the answer

    def put(self, response: dict[str, Any]) -> None:
        """With the answer that it has."""
        messages = (*self.messages, *messages_of(response["output"]))
        items = with_ids(self.input_items, response["id"])
        self.store.put(self.owner, StoredResponse(response, items, messages))


class ResponseShape:
    """One answer. See `AnswerShape`."""

    def __init__(self, head: ResponseHead, reply_id: str, tokenizer: Tokenizer, storing: Storing | None) -> None:
        """`storing`: None for a response that is not stored."""
        self._head = head
        self._tokenizer = tokenizer
        self._storing = storing
        self._items = OutputItems(reply_id)
        self._events = 0  # sent so far
        self._tokens = 0
        self._thoughts: list[str] = []

    def whole(self, answer: Answer, stream: CompletionStream) -> dict[str, Any]:
        for _ in self._take(answer):
            pass
        return self._ended(answer, answer.timings, stream)

    def events(self, chunk: TextChunk, stream: CompletionStream) -> Iterator[bytes]:
        if not self._events:
            for name, status in self._head.first_events:
                yield self._numbered({"type": f"response.{name}", "response": self._head.shown(status)})
        for shown in self._take(chunk):
            yield self._numbered(shown)
        if chunk.finish_reason is None:
            return
        response = self._ended(chunk, chunk.timings or stream.timings(), stream)
        yield self._numbered({"type": f"response.{response['status']}", "response": response})
        yield DONE

    def _take(self, part: TextChunk) -> Iterator[Shown]:
        events: Sequence[AnswerEvent] = part.events or (ContentText(part.text),)
        self._tokens += len(part.rows)
        self._thoughts += [event.text for event in events if isinstance(event, ReasoningText)]
        yield from self._items.take(events)
        if part.finish_reason is not None:
            yield from self._items.end(end_status(part))

    def _ended(self, part: TextChunk, timings: Timings, stream: CompletionStream) -> dict[str, Any]:
        """The response, which is stored."""
        thoughts = self._tokenizer.encode("".join(self._thoughts), add_special=False) if self._thoughts else []
        reasoning_tokens = min(len(thoughts), self._tokens)
        usage = shown_usage(timings, len(stream.generation.prompt), self._tokens, reasoning_tokens)
        response = self._head.shown(end_status(part), self._items.items, usage)
        if self._storing is not None:
            self._storing.put(response)
        return response

    def _numbered(self, shown: Shown) -> bytes:
        number = self._events
        self._events += 1
        return named_event(shown["type"], {**shown, "sequence_number": number})
