"""Describes a reply: how its request is computed, and in which format its client reads the answers."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.datastructures import Headers

from llamaclust.cluster.engine.trace_context import current_trace
from llamaclust.cluster.front.errors import HttpError
from llamaclust.cluster.front.http.gates import owner
from llamaclust.cluster.front.http.sse import StreamFormat
from llamaclust.cluster.front.json_text import json_parts, to_json
from llamaclust.cluster.front.settings import ApiSettings
from llamaclust.cluster.front.text.answer import TextChunk
from llamaclust.cluster.front.text.answer_log import MAX_UNREAD_ROWS, AnswerLog, LogContent, LogItem, Timed
from llamaclust.cluster.front.text.request import CompletionRequest, draw_seed
from llamaclust.cluster.front.text.service import TextService
from llamaclust.cluster.front.text.sharing import ReplySize, RowStorage, current_owner
from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.cluster.state.journal_records import RequestContext
from llamaclust.core.errors import WorkerError

_MAX_NAME = 255
_MAX_SLOTS = 130


def new_context(headers: Headers, endpoint: str, settings: ApiSettings) -> RequestContext:
    """Makes the context of a new request to a model with these settings. Raises HttpError if a header is invalid."""
    trace = current_trace.get()
    return RequestContext(
        id=secrets.token_hex(12),
        seed=draw_seed(),
        created=int(time.time()),
        endpoint=endpoint,
        owner=owner(headers, settings.api_keys),
        client=current_owner.get(),
        conversation=_name(headers, "x-conversation-id"),
        idempotency_key=_name(headers, "idempotency-key"),
        scales=settings.adapters.default,
        served=settings.digest,
        traceparent="" if trace is None else trace.traceparent,
        tracestate="" if trace is None else trace.state,
    )


def identified(request: CompletionRequest, context: RequestContext, prompt: int) -> CompletionRequest:
    """Returns a prompt's completion request with its seed and recorded tokens. A grammar for tool calls is used only if
    the first computation had it ready in time. Raises WorkerError if that grammar cannot be made again."""
    named = replace(
        request,
        request_id=context.id if prompt == 0 else f"{context.id}-p{prompt}",
        group=context.id,
        seed=context.seed if request.seed is None else request.seed,
        answered={choice: tuple(rows) for (of, choice), rows in context.answered.items() if of == prompt},
        received_ns=context.received_ns,
    )
    if context.has_grammar is None:
        context.has_grammar = named.grammar is not None
    if context.has_grammar and named.grammar is None:
        what = "this request was computed again, but its tool calls' grammar was not ready in time; send it again"
        raise WorkerError(what)
    return named if context.has_grammar or named.grammar is None else _without_grammar(named)


def _without_grammar(request: CompletionRequest) -> CompletionRequest:
    reasoning = request.reasoning
    if reasoning is not None:  # only a budget is left to follow
        reasoning = None if reasoning.budget is None else replace(reasoning, delays_grammar=False)
    return replace(request, grammar=None, reasoning=reasoning)


def _name(headers: Headers, header: str) -> str:
    name = headers.get(header, "")
    if len(name) > _MAX_NAME or not name.isprintable() or not name.isascii():
        raise HttpError(400, "bad_header", f"{header}: must be 1 to {_MAX_NAME} printable ASCII characters")
    return name


@dataclass(frozen=True, slots=True)
class Event:
    """A part of a stream. Events of one slot come in the same order each time the reply is computed."""

    slot: int  # index of a choice; one past the last for what belongs to none
    value: Any  # rendered as JSON; bytes are the text itself
    name: str = ""


class View(ABC):
    """Shows an answer log's entries to one reader, in the reader's format. Large entries are shown on a thread."""

    @abstractmethod
    def frames(self, prompt: int, item: LogItem) -> Iterable[Event]:
        """Yields the events that the next entry adds. The caller renders each event before it takes the next."""

    @property
    def error_fields(self) -> Mapping[str, Any]:
        """Returns fields to add to an error that ends the stream."""
        return {}

    def closing(self) -> Iterable[Event]:
        """Yields the events that follow the last entry."""
        return ()

    @abstractmethod
    def whole(self, parts: Sequence[Sequence[TextChunk]]) -> Any:
        """Returns the JSON of a reply that is not streamed. `parts` is the result of `AnswerLog.parts`."""


MakeView = Callable[[AnswerLog], View]
Requests = Callable[[], Awaitable[Sequence[CompletionRequest]]]
"""Prepares a body's completion requests, one for each prompt. Raises an error to refuse the body."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    service: TextService
    requests: Requests
    view: MakeView
    is_streamed: bool
    timed: Timed = Timed.NEVER
    with_progress: bool = False
    keeps_chunks: bool = False  # a reply needs the chunks of its answer until it ends, since it shows logprobs by them
    has_measurements: bool = False
    """True if the stream shows times or cached tokens before its last event. If such a reply is computed again, its
    bytes change."""
    acknowledgement: Mapping[str, Any] | None = None
    """The JSON value for a client that does not wait for its background reply, or None if the client waits."""
    repeated: Any = None  # of its request, shown or stored with the reply; if that is large, a thread renders them
    is_stored: bool = False  # a view has an effect once its answer is complete, so that it is made without a client too

    @property
    def is_background(self) -> bool:
        return self.acknowledgement is not None

    @property
    def _storage(self) -> RowStorage:
        if self.keeps_chunks:
            return RowStorage.CHUNKS
        return RowStorage.STREAMED if self.is_streamed else RowStorage.PACKED

    def content(self, *, is_kept: bool) -> LogContent:
        """Returns the parts of an answer that the reply's log must keep. Kept streams need all chunks."""
        if not self.is_streamed:
            return LogContent(self._storage)
        return LogContent(RowStorage.CHUNKS if is_kept else RowStorage.STREAMED, self.timed, self.with_progress)

    def sizes(self, asked: Sequence[CompletionRequest], generations: Sequence[GenerationRequest]) -> list[ReplySize]:
        """Returns memory bounds for each prompt's answers. Only a stream's first answers are read while computed."""
        first = MAX_UNREAD_ROWS if self._storage is RowStorage.STREAMED else None
        return [
            ReplySize.of(generation, request.n, self._storage, None if prompt else first)
            for prompt, (request, generation) in enumerate(zip(asked, generations, strict=True))
        ]


MakeReply = Callable[[bytes, RequestContext], Awaitable[Reply]]


Position = Counter[int]
"""The number of events that a client has, by slot. An event id has it as text: `3`, or `3-5-0` for three slots."""


def read_position(text: str, param: str) -> Position:
    """Reads a position from the text in an event id. Raises HttpError for any other text."""
    parts = text.split("-", _MAX_SLOTS)
    if not all(part.isascii() and part.isdigit() and len(part) < 16 for part in parts) or len(parts) > _MAX_SLOTS:
        raise HttpError(400, "bad_event_id", f"{param}: {text[:60]!r} is not the id of an event", param=param)
    return Counter({slot: int(part) for slot, part in enumerate(parts)})


@dataclass(slots=True)
class Framing:
    form: StreamFormat
    request_id: str
    keepalive_s: float
    given: Position = field(default_factory=Counter)  # events that it has, counted on as it gets more
    with_ids: bool = True
    with_comments: bool = True
    skipped_bytes: int = 0  # of the stream, that it has
    error_fields: dict[str, Any] = field(default_factory=dict)  # further ones of an error that ends the stream
    _numbers: Position = field(default_factory=Counter)

    def shown(self, view: View, prompt: int, item: LogItem, *, is_large: bool = False) -> list[bytes]:
        """Renders the next entry's events. Large events are rendered in pieces, so that other threads can run."""
        return self.parts(view.frames(prompt, item), is_large=is_large)

    def parts(self, events: Iterable[Event], *, is_large: bool = False) -> list[bytes]:
        """Renders the events and returns the parts that the client does not have yet."""
        return [part for event in events if (part := self._part(event, is_large=is_large))]

    def _part(self, event: Event, *, is_large: bool) -> bytes:
        slot, value, event_id = event.slot, event.value, ""
        if self.with_ids:
            self._numbers[slot] += 1
            if self._numbers[slot] <= self.given[slot]:
                return b""
            self.given[slot] += 1
            position = "-".join(str(self.given[each]) for each in range(max(self.given) + 1))
            event_id = f"{self.request_id}:{position}"
        if not isinstance(value, bytes):
            value = b"".join(json_parts(value)) if is_large else to_json(value)
        data = self.form.part(value, event.name, event_id)
        skipped, self.skipped_bytes = self.skipped_bytes, max(0, self.skipped_bytes - len(data))
        return data[skipped:]
