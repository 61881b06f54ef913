"""Converts answers to responses of the Responses API, to stream events of responses, and to compactions."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final

from llamaclust.cluster.front.dialects.openai.response_items import summary_item
from llamaclust.cluster.front.dialects.openai.response_schema import ID_PREFIX, ResponseHead, Status
from llamaclust.cluster.front.dialects.openai.tools import BUILT_IN
from llamaclust.cluster.front.errors import HttpError
from llamaclust.cluster.front.http.sse import DONE
from llamaclust.cluster.front.json_text import DeferredValue, shown_progress, shown_timings
from llamaclust.cluster.front.replies.reply import Event, View
from llamaclust.cluster.front.text.answer import TextChunk, row_entry
from llamaclust.cluster.front.text.answer_log import AnswerLog, LogItem
from llamaclust.cluster.front.tools import ClientTool, call_id_of, text_of_call
from llamaclust.cluster.scheduler.requests import FinishReason, Timings
from llamaclust.cluster.state.journal_records import RequestContext
from llamaclust.core.sampler.results import RowResult
from llamaclust.model.chat.tools.argument_values import arguments_object
from llamaclust.model.chat.tools.events import (
    AnswerEvent,
    ArgumentText,
    CallBegun,
    CallEnded,
    ContentText,
    ReasoningText,
)
from llamaclust.model.tokenizers.tokenizer import Tokenizer

_PART_TYPES: Final = {"message": "output_text", "reasoning": "reasoning_text"}
_PREFIXES: Final = {"message": "msg", "reasoning": "rs", "function_call": "fc", "custom_tool_call": "ctc"}
_ROW_BYTES, _TOP_BYTES = 400, 8
_COUNTED_CHARACTERS: Final = 1024

Shown = dict[str, Any]
"""The JSON of a stream event without its `sequence_number`."""


@dataclass(frozen=True, slots=True)
class ShownRow(DeferredValue):
    """A token of the answer with its logprobs. The JSON omits token ids, which the Responses API does not have."""

    tokenizer: Tokenizer
    row: RowResult

    @property
    def token_bytes(self) -> bytes:
        return self.tokenizer.token_bytes(self.row.token)

    @property
    def entries(self) -> int:
        return 1 + len(self.row.top_logprobs)

    @property
    def held_bytes(self) -> int:
        return _ROW_BYTES + _TOP_BYTES * len(self.row.top_logprobs)

    def made(self) -> dict[str, Any]:
        entry = row_entry(self.tokenizer, self.row)
        for shown in (entry, *entry["top_logprobs"]):
            del shown["id"]
        return entry


class OutputItems:
    """Collects an answer's output items, and yields the stream events for them. At most one item is open at a time."""

    def __init__(self, reply_id: str, tools: Iterable[ClientTool]) -> None:
        self._tools = {tool.function_name: tool for tool in tools}
        self.items: list[dict[str, Any]] = []
        self._reply_id = reply_id
        self._open: str | None = None  # Type of the open item, or None.
        self._pieces: list[str] = []  # Pieces of the open item's text or arguments.
        self._logprobs: list[ShownRow] = []  # Logprobs of the open item's tokens.
        self._pending: list[ShownRow] = []  # Logprobs of tokens whose text is not complete yet.

    def take(self, events: Iterable[AnswerEvent], logprobs: Sequence[ShownRow] = ()) -> Iterator[Shown]:
        """Adds the answer's next events and the logprobs of their tokens, and yields the resulting stream events."""
        self._pending += logprobs
        for event in events:
            # Drops older pending logprobs. The new ones stay, because one token can contain both markup and text.
            if not isinstance(event, ContentText):
                del self._pending[: -len(logprobs) or None]
            match event:
                case ReasoningText(text) if text:
                    yield from self._piece("reasoning", text)
                case ContentText(text) if text:
                    yield from self._piece("message", text)
                case CallBegun(index, name, call_id):
                    kind, fields = _call(name, self._tools.get(name))
                    yield from self._begin(kind, call_id=call_id or call_id_of(self._reply_id, index), **fields)
                case ArgumentText(_, text) if text:
                    self._pieces.append(text)
                    if self._open == "function_call":
                        yield self._event("response.function_call_arguments.delta", delta=text)
                case CallEnded(is_cut=is_cut):
                    yield from self._close(Status.INCOMPLETE if is_cut else Status.COMPLETED)

    def end(self, status: Status) -> Iterator[Shown]:
        if not self.items:
            yield from self._begin_text("message")
        yield from self._close(status)

    def _piece(self, kind: str, text: str) -> Iterator[Shown]:
        is_first = self._open != kind
        if is_first:
            yield from self._begin_text(kind)
        self._pieces.append(text)
        more: dict[str, Any] = {}
        if kind == "message":
            more["logprobs"], self._pending = _logprobs_of(text, self._pending, is_first=is_first)
            self._logprobs += more["logprobs"]
        yield self._event(f"response.{_PART_TYPES[kind]}.delta", content_index=0, delta=text, **more)

    def _begin_text(self, kind: str) -> Iterator[Shown]:
        more: dict[str, Any] = {"role": "assistant"} if kind == "message" else {"summary": []}
        yield from self._begin(kind, **more, content=[])
        yield self._event("response.content_part.added", content_index=0, part=_part(kind, "", ()))

    def _begin(self, kind: str, **fields: Any) -> Iterator[Shown]:
        yield from self._close(Status.COMPLETED)
        item_id = f"{_PREFIXES.get(kind, 'call')}_{self._reply_id}{len(self.items)}"
        self.items.append({"id": item_id, "type": kind, "status": Status.IN_PROGRESS, **fields})
        self._open, self._pieces, self._logprobs = kind, [], []
        yield self._item_event("response.output_item.added")

    def _close(self, status: Status) -> Iterator[Shown]:
        kind, self._open = self._open, None
        if kind is None:
            return
        item, text = self.items[-1], "".join(self._pieces)
        item["status"] = status
        if kind == "function_call":
            item["arguments"] = text or "{}"
            done = {"name": item["name"], "arguments": item["arguments"]}
            yield self._event("response.function_call_arguments.done", **done)
        elif kind == "custom_tool_call":
            item["input"] = text_of_call(text)
            yield self._event("response.custom_tool_call_input.delta", delta=item["input"])
            yield self._event("response.custom_tool_call_input.done", input=item["input"])
        elif kind in _PART_TYPES:
            part = _part(kind, text, self._logprobs)
            item["content"] = [part]
            shown = {name: part[name] for name in ("text", "logprobs") if name in part}
            yield self._event(f"response.{_PART_TYPES[kind]}.done", content_index=0, **shown)
            yield self._event("response.content_part.done", content_index=0, part=part)
        else:
            built_in = BUILT_IN[kind.removesuffix("_call")]
            item[built_in.field] = {**built_in.fixed, **(arguments_object(text) or {})}
        yield self._item_event("response.output_item.done")

    def _event(self, event_type: str, /, **fields: Any) -> Shown:
        return {"type": event_type, "item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, **fields}

    def _item_event(self, name: str) -> Shown:
        return {"type": name, "output_index": len(self.items) - 1, "item": dict(self.items[-1])}


def _call(name: str, tool: ClientTool | None) -> tuple[str, dict[str, Any]]:
    if tool is not None and tool.kind in BUILT_IN:
        built_in = BUILT_IN[tool.kind]
        return f"{tool.kind}_call", {**built_in.marks, built_in.field: dict(built_in.fixed)}
    namespaced = {} if tool is None or tool.namespace is None else {"namespace": tool.namespace}
    named = {"name": name if tool is None else tool.name, **namespaced}
    if tool is not None and tool.kind == "custom":
        return "custom_tool_call", {**named, "input": ""}
    return "function_call", {**named, "arguments": ""}


def _logprobs_of(text: str, entries: list[ShownRow], *, is_first: bool) -> tuple[list[ShownRow], list[ShownRow]]:
    """Returns the entries of the tokens in `text`, and the entries of all later tokens."""
    ends = [*accumulate(len(entry.token_bytes) for entry in entries)]
    data, wanted = b"".join(entry.token_bytes for entry in entries), text.encode("utf-8", "surrogatepass")
    start = data.rfind(wanted) if is_first else data.find(wanted)
    if start < 0:  # The text lacks some of the tokens' bytes.
        return entries, []
    begin, end = bisect_right(ends, start), bisect_left(ends, start + len(wanted)) + 1
    return entries[begin:end], entries[end:]


def _part(kind: str, text: str, logprobs: Sequence[ShownRow]) -> dict[str, Any]:
    more: dict[str, Any] = {"annotations": [], "logprobs": logprobs} if kind == "message" else {}
    return {"type": _PART_TYPES[kind], "text": text, **more}


class ResponseView(View):
    def __init__(
        self, head: ResponseHead, tokenizer: Tokenizer, store: Callable[[dict[str, Any]], None] | None, log: AnswerLog
    ) -> None:
        """`store` is called with the complete response. It is None if the response is not stored."""
        self._body = head.body
        self._tokenizer = tokenizer
        self._head = head
        self._store = store
        self._log = log
        self._items = OutputItems(head.reply_id, head.body.tools.client)
        self._events = 0  # Number of events so far.
        self._tokens = 0
        self._reasoning = ReasoningCount(tokenizer)

    def whole(self, parts: Sequence[Sequence[TextChunk]]) -> dict[str, Any]:
        (chunks,) = parts
        for chunk in chunks:
            for _ in self._take(chunk):
                pass
        return self._ended(chunks[-1])

    def frames(self, prompt: int, item: LogItem) -> Iterator[Event]:
        if not self._events:
            yield from map(self._numbered, self._head.first_events)
        if isinstance(item, TextChunk):
            yield from self._events_of(item)
            return
        # Progress events have their own slot, because their number may change if the reply is computed again.
        shown = {**self._head.event(Status.IN_PROGRESS), "sequence_number": self._events - 1}
        more = shown_progress(item, with_timings=self._body.timings_per_token)
        yield Event(1, {**shown, **more}, shown["type"])

    @property
    def error_fields(self) -> dict[str, Any]:
        before = [] if self._events else self._head.first_events
        response = self._head.shown(Status.FAILED, self._items.items)
        return {"sequence_number": self._events, "events": before, "response": response}

    def _events_of(self, chunk: TextChunk) -> Iterator[Event]:
        timings = {}
        if self._body.timings_per_token and chunk.timings is not None:
            timings["timings"] = shown_timings(chunk.timings)
        for shown in self._take(chunk):
            yield self._numbered({**shown, **timings})
        if chunk.finish_reason is not None:
            response = self._ended(chunk)
            end = {"type": f"response.{response['status']}", "response": response, **timings}
            yield self._numbered(end)
            yield Event(0, DONE)

    def _take(self, part: TextChunk) -> Iterator[Shown]:
        events = part.events or (ContentText(part.text),)
        self._tokens += len(part.rows)
        for event in events:
            if isinstance(event, ReasoningText):
                self._reasoning.add(event.text)
        rows, ends = part.rows if self._body.with_logprobs else (), self._tokenizer.end_of_generation
        yield from self._items.take(events, [ShownRow(self._tokenizer, row) for row in rows if row.token not in ends])
        if part.finish_reason is not None:
            yield from self._items.end(_end_status(part))

    def _ended(self, last: TextChunk) -> dict[str, Any]:
        usage = _usage(self._log, last.timings, self._tokens, min(self._reasoning.total(), self._tokens))
        response = self._head.shown(_end_status(last), self._items.items, usage, ended_s=self._log.ended_s)
        if self._store is not None:
            self._store(response)
        return response

    def _numbered(self, shown: Shown) -> Event:
        number = self._events
        self._events += 1
        return Event(0, {**shown, "sequence_number": number}, shown["type"])


class ReasoningCount:
    """Counts the tokens of reasoning that arrives in pieces. The count does not depend on the sizes of the pieces."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._text = ""  # Text that is not counted yet.
        self._tokens = 0

    def add(self, text: str) -> None:
        self._text += text
        whole = len(self._text) - len(self._text) % _COUNTED_CHARACTERS
        for start in range(0, whole, _COUNTED_CHARACTERS):
            self._tokens += self._count(self._text[start : start + _COUNTED_CHARACTERS])
        self._text = self._text[whole:]

    def total(self) -> int:
        return self._tokens + self._count(self._text)

    def _count(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special=False)) if text else 0


class CompactionView(View):
    def __init__(self, context: RequestContext, log: AnswerLog) -> None:
        self._context = context
        self._log = log

    def frames(self, prompt: int, item: LogItem) -> list[Event]:
        return []

    def whole(self, parts: Sequence[Sequence[TextChunk]]) -> dict[str, Any]:
        ((answer,),) = parts
        events = answer.events or (ContentText(answer.text),)
        summary = "".join(event.text for event in events if isinstance(event, ContentText)).strip()
        if not summary:
            raise HttpError(422, "summary_failed", "the model's summary is empty; keep the messages as they are")
        return {
            "id": ID_PREFIX + self._context.id,
            "object": "response.compaction",
            "created_at": self._context.created,
            "output": [summary_item(f"cmp_{self._context.id}", summary)],
            "usage": _usage(self._log, answer.timings, len(answer.rows), 0),
        }


def _end_status(part: TextChunk) -> Status:
    return Status.INCOMPLETE if part.finish_reason is FinishReason.LENGTH else Status.COMPLETED


def _usage(log: AnswerLog, timings: Timings | None, tokens: int, reasoning_tokens: int) -> dict[str, Any]:
    assert timings is not None
    (generation,) = log.generations
    prompt_tokens = len(generation.prompt)
    return {
        "input_tokens": prompt_tokens,
        "input_tokens_details": {"cached_tokens": timings.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": tokens,
        "output_tokens_details": {"reasoning_tokens": reasoning_tokens},
        "total_tokens": prompt_tokens + tokens,
    }
