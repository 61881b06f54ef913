"""The output of a response: an answer's items, and the events of each step."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import accumulate
from typing import Any, Final

from llamaclust.cluster.front.dialects.openai.tools import BUILT_IN
from llamaclust.cluster.front.json_text import DeferredValue
from llamaclust.cluster.front.sampling import row_entry
from llamaclust.cluster.front.tools import ClientTool, call_id_of, text_of_call
from llamaclust.core.sampling import RowResult
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


class Status(StrEnum):
    """The status of a response, or of an item of it."""

    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    INCOMPLETE = "incomplete"  # the tokens that it may have are used up
    FAILED = "failed"
    CANCELLED = "cancelled"


_FIELDS: Final = ("token", "logprob", "bytes")
_ROW_BYTES, _TOP_BYTES = 400, 8


@dataclass(frozen=True, slots=True)
class ShownRow(DeferredValue):
    """Rendered without the ids that other APIs show."""

    tokenizer: Tokenizer
    row: RowResult

    @property
    def token_bytes(self) -> bytes:
        """The token's text."""
        return self.tokenizer.token_bytes(self.row.token)

    @property
    def entries(self) -> int:
        """See `DeferredValue`."""
        return 1 + len(self.row.top_logprobs)

    @property
    def held_bytes(self) -> int:
        """See `DeferredValue`."""
        return _ROW_BYTES + _TOP_BYTES * len(self.row.top_logprobs)

    def made(self) -> dict[str, Any]:
        """See `DeferredValue`."""
        entry = row_entry(self.tokenizer, self.row)
        return {**_fields(entry), "top_logprobs": [_fields(top) for top in entry["top_logprobs"]]}


def _fields(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: entry[name] for name in _FIELDS}


Shown = dict[str, Any]
"""An event without its number: its `type` and further fields."""

_PART_TYPES: Final = {"message": "output_text", "reasoning": "reasoning_text"}
_PREFIXES: Final = {"message": "msg", "reasoning": "rs", "function_call": "fc", "custom_tool_call": "ctc"}


class OutputItems:
    """Puts an answer's items together and gives the events of each step. One item is open at a time."""

    def __init__(self, reply_id: str, tools: Iterable[ClientTool]) -> None:
        self._tools = {tool.function_name: tool for tool in tools}
        self.items: list[dict[str, Any]] = []
        self._reply_id = reply_id
        self._is_open = False
        self._pieces: list[str] = []  # of the open item's text or arguments
        self._logprobs: list[ShownRow] = []  # of the open item's text
        self.logprobs = 0  # in all items so far, with those of the likeliest tokens
        self._pending: list[ShownRow] = []  # of tokens whose text is still to come

    def take(self, events: Iterable[AnswerEvent], logprobs: Sequence[ShownRow] = ()) -> Iterator[Shown]:
        """`logprobs`: of the tokens that came with the events; those whose text is no message's are left out."""
        self._pending += logprobs
        for event in events:
            if not isinstance(event, ContentText):  # a token may have the end of its markup, and text
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
                    if self.items[-1]["type"] == "function_call":
                        yield self._event("response.function_call_arguments.delta", delta=text)
                case CallEnded():
                    yield from self._close(Status.COMPLETED)

    def end(self, status: Status) -> Iterator[Shown]:
        """The last item has the status of the response. An empty answer has an empty message."""
        if not self.items:
            yield from self._begin_text("message")
        yield from self._close(status)

    def _piece(self, kind: str, text: str) -> Iterator[Shown]:
        is_first = not self._is_open or self.items[-1]["type"] != kind
        if is_first:
            yield from self._begin_text(kind)
        self._pieces.append(text)
        more: dict[str, Any] = {}
        if kind == "message":
            more["logprobs"], self._pending = _logprobs_of(text, self._pending, is_first=is_first)
            self._logprobs += more["logprobs"]
            self.logprobs += sum(entry.entries for entry in more["logprobs"])
        yield self._part_event(f"response.{_PART_TYPES[kind]}.delta", delta=text, **more)

    def _begin_text(self, kind: str) -> Iterator[Shown]:
        more: dict[str, Any] = {"role": "assistant"} if kind == "message" else {"summary": []}
        yield from self._begin(kind, **more, content=[])
        yield self._part_event("response.content_part.added", part=_part(kind, "", ()))

    def _begin(self, kind: str, **fields: Any) -> Iterator[Shown]:
        yield from self._close(Status.COMPLETED)
        item_id = f"{_PREFIXES.get(kind, 'call')}_{self._reply_id}{len(self.items)}"
        self.items.append({"id": item_id, "type": kind, "status": Status.IN_PROGRESS, **fields})
        self._is_open = True
        self._pieces, self._logprobs = [], []
        yield self._item_event("response.output_item.added")

    def _close(self, status: Status) -> Iterator[Shown]:
        if not self._is_open:
            return
        self._is_open = False
        item, text = self.items[-1], "".join(self._pieces)
        item["status"] = status
        kind = item["type"]
        if kind == "function_call":
            item["arguments"] = text or "{}"
            done = {"name": item["name"], "arguments": item["arguments"]}
            yield self._event("response.function_call_arguments.done", **done)
        elif kind == "custom_tool_call":
            item["input"] = text_of_call(text)
            yield self._event("response.custom_tool_call_input.delta", delta=item["input"])
            yield self._event("response.custom_tool_call_input.done", input=item["input"])
        elif kind not in _PART_TYPES:
            built_in = BUILT_IN[kind.removesuffix("_call")]
            item[built_in.field] = {**built_in.fixed, **(arguments_object(text) or {})}
        else:
            part = _part(kind, text, self._logprobs)
            item["content"] = [part]
            more: dict[str, Any] = {"logprobs": self._logprobs} if kind == "message" else {}
            yield self._part_event(f"response.{_PART_TYPES[kind]}.done", text=text, **more)
            yield self._part_event("response.content_part.done", part=part)
        yield self._item_event("response.output_item.done")

    def _event(self, event_type: str, /, **fields: Any) -> Shown:
        return {"type": event_type, "item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, **fields}

    def _part_event(self, name: str, **fields: Any) -> Shown:
        return self._event(name, content_index=0, **fields)

    def _item_event(self, name: str) -> Shown:
        return {"type": name, "output_index": len(self.items) - 1, "item": dict(self.items[-1])}


def _call(name: str, tool: ClientTool | None) -> tuple[str, dict[str, Any]]:
    """The type of a call's item, and its first fields."""
    if tool is not None and tool.kind in BUILT_IN:
        built_in = BUILT_IN[tool.kind]
        return f"{tool.kind}_call", {built_in.field: dict(built_in.fixed)}
    namespaced = {} if tool is None or tool.namespace is None else {"namespace": tool.namespace}
    named = {"name": name if tool is None else tool.name, **namespaced}
    if tool is not None and tool.kind == "custom":
        return "custom_tool_call", {**named, "input": ""}
    return "function_call", {**named, "arguments": ""}


def _logprobs_of(text: str, entries: list[ShownRow], *, is_first: bool) -> tuple[list[ShownRow], list[ShownRow]]:
    """Those of a piece of text, and those of text that is still to come. Before the first piece of a message, markup
    may stand that is not shown."""
    ends = [*accumulate(len(entry.token_bytes) for entry in entries)]
    data, wanted = b"".join(entry.token_bytes for entry in entries), text.encode("utf-8", "surrogatepass")
    start = data.rfind(wanted) if is_first else data.find(wanted)
    if start < 0:  # what the tokenizer leaves out of a text
        return entries, []
    begin, end = bisect_right(ends, start), bisect_left(ends, start + len(wanted)) + 1
    return entries[begin:end], entries[end:]


def _part(kind: str, text: str, logprobs: Sequence[ShownRow]) -> dict[str, Any]:
    more: dict[str, Any] = {"annotations": [], "logprobs": logprobs} if kind == "message" else {}
    return {"type": _PART_TYPES[kind], "text": text, **more}
