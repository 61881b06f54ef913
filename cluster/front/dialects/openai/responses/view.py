"""Answers as responses, whole or streamed, and as summaries."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final

from llamaclust.cluster.front.dialects.openai.responses.items import summary_item
from llamaclust.cluster.front.dialects.openai.responses.output import OutputItems, Shown, ShownRow, Status
from llamaclust.cluster.front.dialects.openai.responses.schema import ResponsesBody
from llamaclust.cluster.front.errors import HttpError
from llamaclust.cluster.front.http.sse import DONE, named_event
from llamaclust.cluster.front.json_text import shown_progress, shown_timings
from llamaclust.cluster.front.replies.reply import Event, View
from llamaclust.cluster.front.text.answer import TextChunk
from llamaclust.cluster.front.text.answer_log import AnswerLog, LogItem
from llamaclust.cluster.scheduler.requests import FinishReason, Timings
from llamaclust.cluster.state.journal_records import RequestContext
from llamaclust.model.chat.tools.events import ContentText, ReasoningText
from llamaclust.model.tokenizers.tokenizer import Tokenizer

ID_PREFIX: Final = "resp_"
_COUNTED_CHARACTERS: Final = 1024
_FIXED: Final[Mapping[str, Any]] = {
    "max_tool_calls": None,
    "prompt_cache_key": None,
    "safety_identifier": None,
    "service_tier": "default",
    "truncation": "disabled",
    "user": None,
}
"""Fields of requests that have no effect here."""


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """The fields of a response beside its answer."""

    context: RequestContext
    model: str
    body: ResponsesBody

    @property
    def response_id(self) -> str:
        """The id that is shown."""
        return ID_PREFIX + self.context.id

    @property
    def begun(self) -> dict[str, Any]:
        """The response before its computation."""
        return self.shown(Status.QUEUED if self.body.background else Status.IN_PROGRESS)

    @property
    def first_events(self) -> list[Shown]:
        """The events that a stream begins with."""
        statuses = [Status.QUEUED, Status.IN_PROGRESS] if self.body.background else [Status.IN_PROGRESS]
        return [{"type": "response.created", "response": self.begun}, *map(self.event, statuses)]

    def event(self, status: Status) -> Shown:
        """The event that the response gets this status."""
        return {"type": f"response.{status}", "response": self.shown(status)}

    def shown(
        self,
        status: Status,
        output: Sequence[Mapping[str, Any]] = (),
        usage: Mapping[str, Any] | None = None,
        *,
        ended_s: float | None = None,
    ) -> dict[str, Any]:
        """The whole object. `ended_s`: Unix time of the answer's end."""
        return {
            "id": self.response_id,
            "object": "response",
            "created_at": self.context.created,
            "completed_at": int(ended_s) if ended_s is not None and status is Status.COMPLETED else None,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status is Status.INCOMPLETE else None,
            "model": self.model,
            "output": [*output],
            "usage": usage,
            **_FIXED,
            **self.body.shown(),
        }


class ResponseView(View):
    """One answer."""

    def __init__(
        self, head: ResponseHead, tokenizer: Tokenizer, store: Callable[[dict[str, Any]], None] | None, log: AnswerLog
    ) -> None:
        """`store` takes the complete response; None for one that is not stored."""
        self._body = head.body
        self._tokenizer = tokenizer
        self._head = head
        self._store = store
        self._log = log
        self._items = OutputItems(head.context.id, head.body.tools.client)
        self._events = 0  # sent so far
        self._tokens = 0
        self._reasoning = ReasoningCount(tokenizer)

    def whole(self, parts: Sequence[Sequence[TextChunk]]) -> dict[str, Any]:
        """See `View`. Chunks where logprobs are shown: of a joined answer, no token has a place in the text."""
        (chunks,) = parts
        for _ in chain.from_iterable(map(self._take, chunks)):
            pass
        return self._ended(chunks[-1])

    def size(self, prompt: int, item: LogItem) -> int:
        """See `View`. Events that end an item, and the response, have all its logprobs."""
        if not self._body.with_logprobs or not isinstance(item, TextChunk):
            return 0
        is_end = item.finish_reason is not None or not all(isinstance(event, ContentText) for event in item.events)
        return item.entries + (self._items.logprobs if is_end else 0)

    def frames(self, prompt: int, item: LogItem, *, is_large: bool) -> list[Event]:
        """See `View`. Progress is in a slot of its own, with the number of the event before: a reply that is computed
        again has other progress."""
        events = [] if self._events else [Event(0, self._numbered(shown)) for shown in self._head.first_events]
        if isinstance(item, TextChunk):
            return [*events, *(Event(0, data) for data in self._events_of(item, is_large=is_large))]
        shown = {**self._head.event(Status.IN_PROGRESS), "sequence_number": self._events - 1}
        more = shown_progress(item, with_timings=self._body.timings_per_token)
        return [*events, Event(1, named_event(shown["type"], {**shown, **more}))]

    def _events_of(self, chunk: TextChunk, *, is_large: bool) -> Iterator[bytes]:
        timings = {}
        if self._body.timings_per_token and chunk.timings is not None:
            timings["timings"] = shown_timings(chunk.timings)
        for shown in self._take(chunk):
            yield self._numbered({**shown, **timings}, is_large=is_large)
        if chunk.finish_reason is not None:
            response = self._ended(chunk)
            end = {"type": f"response.{response['status']}", "response": response, **timings}
            yield self._numbered(end, is_large=is_large)
            yield DONE

    def _take(self, part: TextChunk) -> Iterator[Shown]:
        events = part.events or (ContentText(part.text),)
        self._tokens += len(part.rows)
        for event in events:
            if isinstance(event, ReasoningText):
                self._reasoning.add(event.text)
        yield from self._items.take(events, self._logprobs(part))
        if part.finish_reason is not None:
            yield from self._items.end(_end_status(part))

    def _logprobs(self, part: TextChunk) -> list[ShownRow]:
        """Of tokens that are text: an end token is none."""
        if not self._body.with_logprobs:
            return []
        ends = self._tokenizer.end_of_generation
        return [ShownRow(self._tokenizer, row) for row in part.rows if row.token not in ends]

    def _ended(self, last: TextChunk) -> dict[str, Any]:
        """The response, which is to be stored."""
        assert last.timings is not None
        (generation,) = self._log.generations
        reasoning_tokens = min(self._reasoning.total(), self._tokens)
        usage = _usage(last.timings, len(generation.prompt), self._tokens, reasoning_tokens)
        response = self._head.shown(_end_status(last), self._items.items, usage, ended_s=self._log.ended_s)
        if self._store is not None:
            self._store(response)
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


class CompactionView(View):
    """One summary; what exceeds the limit of its tokens is cut off."""

    def __init__(self, context: RequestContext, log: AnswerLog) -> None:
        self._context = context
        self._log = log

    def frames(self, prompt: int, item: LogItem, *, is_large: bool) -> list[Event]:
        """See `View`. Summaries are not streamed."""
        return []

    def whole(self, parts: Sequence[Sequence[TextChunk]]) -> dict[str, Any]:
        """See `View`."""
        ((answer,),) = parts
        (generation,) = self._log.generations
        assert answer.timings is not None
        events = answer.events or (ContentText(answer.text),)
        summary = "".join(event.text for event in events if isinstance(event, ContentText)).strip()
        if not summary:
            raise HttpError(422, "summary_failed", "the model's summary is empty; keep the messages as they are")
        return {
            "id": ID_PREFIX + self._context.id,
            "object": "response.compaction",
            "created_at": self._context.created,
            "output": [summary_item(f"cmp_{self._context.id}", summary)],
            "usage": _usage(answer.timings, len(generation.prompt), len(answer.rows), 0),
        }


def _end_status(part: TextChunk) -> Status:
    """The status at the last part of an answer."""
    return Status.INCOMPLETE if part.finish_reason is FinishReason.LENGTH else Status.COMPLETED


def _usage(timings: Timings, prompt_tokens: int, tokens: int, reasoning_tokens: int) -> dict[str, Any]:
    return {
        "input_tokens": prompt_tokens,
        "input_tokens_details": {"cached_tokens": timings.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": tokens,
        "output_tokens_details": {"reasoning_tokens": reasoning_tokens},
        "total_tokens": prompt_tokens + tokens,
    }
