"""Describes a reply: how its request is computed, and in which format its client gets the answers."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
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
    """Makes the context of a request. `settings` are the model's settings. Raises HttpError for an invalid header."""
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
    """Returns the request with an id, a seed and the tokens recorded before a restart. Raises WorkerError if the
    request had a grammar before the restart and has none now."""
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
    if reasoning is not None:  # Without a grammar, reasoning is tracked only for its budget.
        reasoning = None if reasoning.budget is None else replace(reasoning, delays_grammar=False)
    return replace(request, grammar=None, reasoning=reasoning)


def _name(headers: Headers, header: str) -> str:
    name = headers.get(header, "")
    if len(name) > _MAX_NAME or not name.isprintable() or not name.isascii():
        raise HttpError(400, "bad_header", f"{header}: must be 1 to {_MAX_NAME} printable ASCII characters")
    return name


@dataclass(frozen=True, slots=True)
class Event:
    """A part of a stream. Events with the same `slot` come in the same order if the reply is computed again."""

    slot: int  # Index of the event's choice, or the number of choices if the event belongs to none.
    value: Any  # Rendered as JSON, or sent unchanged if it is bytes.
    name: str = ""


class View(ABC):
    """Renders the entries of an answer log for one reader, in the format of an API."""

    @abstractmethod
    def frames(self, prompt: int, item: LogItem) -> Iterable[Event]:
        """Returns the stream events of a log entry. The caller renders each event before it takes the next one."""

    @property
    def error_fields(self) -> Mapping[str, Any]:
        """Fields of the events that end the stream with an error. The API's `ErrorShape` decides what they mean."""
        return {}

    def closing(self) -> Iterable[Event]:
        return ()

    @abstractmethod
    def whole(self, parts: Sequence[Sequence[TextChunk]]) -> Any:
        """Returns the JSON value of a reply that is not streamed. `parts` is the result of `AnswerLog.parts`."""


MakeView = Callable[[AnswerLog], View]
Requests = Callable[[], Awaitable[Sequence[CompletionRequest]]]
"""Prepares the completion requests of a body, one for each prompt. Raises an error to refuse the body."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    service: TextService
    requests: Requests
    view: MakeView
    is_streamed: bool
    timed: Timed = Timed.NEVER
    with_progress: bool = False
    # True if the whole reply shows logprobs chunk by chunk, so that the log must keep the chunks.
    keeps_chunks: bool = False
    has_measurements: bool = False
    """True if bytes of the stream depend on times, cached tokens, or the order in which several answers grow. They
    differ if the stream is computed again."""
    acknowledgement: Mapping[str, Any] | None = None
    """The JSON value that a client gets at once instead of the reply. None if the client waits for the reply."""
    repeated: Any = None  # Values of the request that the reply shows or stores. Large values are rendered on a thread.
    # True if rendering the reply stores it. The reply is then rendered even if no client reads it.
    is_stored: bool = False
    while_computed: AbstractContextManager[None] = field(default_factory=nullcontext)
    """Entered when all prompts are submitted, and left when the reply has ended."""

    @property
    def is_background(self) -> bool:
        return self.acknowledgement is not None

    @property
    def _storage(self) -> RowStorage:
        if self.keeps_chunks:
            return RowStorage.CHUNKS
        return RowStorage.STREAMED if self.is_streamed else RowStorage.PACKED

    def content(self, *, is_kept: bool) -> LogContent:
        """Returns how the reply's log stores sampled tokens, and whether it stores timings and progress."""
        if not self.is_streamed:
            return LogContent(self._storage)
        return LogContent(RowStorage.CHUNKS if is_kept else RowStorage.STREAMED, self.timed, self.with_progress)

    def sizes(self, requests: Sequence[CompletionRequest], generations: Sequence[GenerationRequest]) -> list[ReplySize]:
        """Returns an upper bound on the size of each prompt's answers."""
        first = MAX_UNREAD_ROWS if self._storage is RowStorage.STREAMED else None
        return [
            ReplySize.of(generation, request.n, self._storage, None if prompt else first)
            for prompt, (request, generation) in enumerate(zip(requests, generations, strict=True))
        ]


MakeReply = Callable[[bytes, RequestContext], Awaitable[Reply]]


Position = Counter[int]
"""The number of events that a client has received, by `Event.slot`. Event ids contain it as `3` or `3-5-0`."""


def read_position(text: str, param: str) -> Position:
    """Parses a position such as `3-5-0`. Raises HttpError for any other text."""
    parts = text.split("-", _MAX_SLOTS)
    if not all(part.isascii() and part.isdigit() and len(part) < 16 for part in parts) or len(parts) > _MAX_SLOTS:
        raise HttpError(400, "bad_event_id", f"{param}: {text[:60]!r} is not the id of an event", param=param)
    return Counter({slot: int(part) for slot, part in enumerate(parts)})


@dataclass(slots=True)
class Framing:
    form: StreamFormat
    request_id: str
    keepalive_s: float
    # Number of events that the client has. Each new event increments it.
    given: Position = field(default_factory=Counter)
    with_ids: bool = True
    with_comments: bool = True
    skipped_bytes: int = 0  # Number of bytes still to skip because the client has them.
    view: View | None = None  # The view that rendered the stream so far.
    _numbers: Position = field(default_factory=Counter)

    def fields_of_error(self) -> Mapping[str, Any]:
        return {} if self.view is None else self.view.error_fields

    def shown(self, view: View, prompt: int, item: LogItem, *, is_large: bool = False) -> list[bytes]:
        """Renders the events of the next log entry, in pieces if `is_large`."""
        return self.parts(view.frames(prompt, item), is_large=is_large)

    def parts(self, events: Iterable[Event], *, is_large: bool = False) -> list[bytes]:
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
