"""A reply: its description, its computation, and its JSON."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterable, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any, TypeAlias, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llamaclust.cluster.front.http.sse import first_of, wait_for_disconnect
from llamaclust.cluster.front.json_text import has_many_values, json_parts, off_loop_if
from llamaclust.cluster.front.replies.ticket import Ticket
from llamaclust.cluster.front.text.answer import TextChunk
from llamaclust.cluster.front.text.answer_log import MAX_UNREAD_ROWS, AnswerLog, LogContent, LogItem, Timed
from llamaclust.cluster.front.text.completion import Completion
from llamaclust.cluster.front.text.request import CompletionRequest
from llamaclust.cluster.front.text.service import TextService
from llamaclust.cluster.front.text.sharing import NOTHING, ReplySize, RowStorage
from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.cluster.state.adapters import AdapterUnloadedError


@dataclass(frozen=True, slots=True)
class Event:
    """A part of a stream: the `data:` line of a server-sent event, or a line of JSON. The events of one slot come in
    the same order whenever the reply is read or computed; those of different slots mix as they come."""

    slot: int  # index of a choice; one past the last for what belongs to none
    data: bytes


class View(ABC):
    """Folds the entries of an answer's log to what one client reads. Made anew for each reader; called on a thread
    where what it renders is large."""

    def size(self, prompt: int, item: LogItem) -> int:
        """Tokens, logprobs and texts of about that length in the events of the next entry."""
        return 0

    @abstractmethod
    def frames(self, prompt: int, item: LogItem, *, is_large: bool) -> Sequence[Event]:
        """The events that the next entry adds, with those that begin a stream before the first, and those that end an
        answer behind its last. `is_large`: by `size`; other threads go on while such events are rendered."""

    def closing(self) -> Sequence[Event]:
        """The events behind those of all entries."""
        return ()

    @abstractmethod
    def whole(self, parts: Sequence[Sequence[TextChunk]]) -> Any:
        """The JSON of a reply that is not streamed, of what `AnswerLog.parts` gives."""


MakeView = Callable[[AnswerLog], View]
"""Makes a view of a log that has begun, or is over."""
Requests = Callable[[], Awaitable[Sequence[CompletionRequest]]]
"""Prepares the completions of a body, one a prompt; raises what refuses it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a request asks for, independent of the connection that the reply goes to."""

    service: TextService
    requests: Requests
    view: MakeView
    is_streamed: bool
    timed: Timed = Timed.NEVER
    with_progress: bool = False
    keeps_chunks: bool = False  # a reply needs the chunks of its answer until it ends, since it shows logprobs by them
    has_measurements: bool = False
    """Whether its stream shows times, or what the prefix cache had: computed again, it has other bytes. Those of its
    last event do not count."""
    acknowledgement: bytes | None = None
    """The JSON of a client that does not wait for its reply; None: it waits. The reply is kept for it."""
    is_stored: bool = False  # a view has an effect once its answer is complete, so that it is made without a client too

    @property
    def storage(self) -> RowStorage:
        """How rows are held while the reply is computed and read."""
        if self.keeps_chunks:
            return RowStorage.CHUNKS
        return RowStorage.STREAMED if self.is_streamed else RowStorage.PACKED

    def content(self, *, is_kept: bool) -> LogContent:
        """What its log holds."""
        if not self.is_streamed:
            return LogContent(self.storage)
        return LogContent(RowStorage.CHUNKS if is_kept else RowStorage.STREAMED, self.timed, self.with_progress)


MakeReply = Callable[[bytes, Ticket], Awaitable[Reply]]
"""An endpoint: the reply to a body. Raises what refuses the body."""


class Computation:
    """Nothing runs before `submit`; the caller closes it."""

    def __init__(self, reply: Reply, ticket: Ticket) -> None:
        self.reply = reply
        self._ticket = ticket
        self._completions: list[Completion] = []
        self._reserved = NOTHING

    async def submit(self, log: AnswerLog, *, is_kept: bool) -> None:
        """Submits all prompts, with one seed; where one is refused, none runs."""
        reply, ticket = self.reply, self._ticket
        try:
            requests = [ticket.request(*numbered) for numbered in enumerate(await reply.requests())]
            self._check_adapters({number for request in requests for number, _ in request.adapters})
            generations = [await reply.service.prepare(request) for request in requests]
            self._reserve(requests, generations)
            log.begin(generations, reply.content(is_kept=is_kept))
            if (recording := ticket.recording(requests)) is not None:
                log.subscribe(recording)
            for prompt, request in enumerate(requests):
                ticket.adapters.update(number for number, _ in request.adapters)
                self._completions.append(await reply.service.submit(request, generations[prompt], log, prompt))
        except BaseException:
            await self.aclose()
            raise

    def _check_adapters(self, numbers: set[int]) -> None:
        """A restored request may name a model that is an adapter only now. AdapterUnloadedError for one that it did not
        use before."""
        restoration = self._ticket.restoration
        if restoration is not None and not restoration.adapters.issuperset(
            self.reply.service.settings.adapters.marks(numbers)
        ):
            raise AdapterUnloadedError("model: an adapter was loaded under this name meanwhile: send the request again")

    def _reserve(self, requests: Sequence[CompletionRequest], generations: Sequence[GenerationRequest]) -> None:
        """Of a streamed reply, the first prompt's answer is read while it runs, the others wait for their turn."""
        first = MAX_UNREAD_ROWS if self.reply.storage is RowStorage.STREAMED else None
        sizes = [
            ReplySize.of(generation, request.n, self.reply.storage, None if prompt else first)
            for prompt, (request, generation) in enumerate(zip(requests, generations, strict=True))
        ]
        self._reserved = self.reply.service.budget.reserve(sizes)

    async def aclose(self) -> None:
        """Nothing of it runs afterwards."""
        for completion in self._completions:
            await completion.aclose()
        self._completions.clear()
        self.reply.service.budget.release(self._reserved)
        self._reserved = NOTHING


JsonBody: TypeAlias = AsyncGenerator[bytes, None]
_Value = TypeVar("_Value")


async def json_body(make: Callable[[], Any], *, is_large: bool) -> JsonBody:
    """Makes a value and renders each part of its JSON when it is taken, on a thread where it is large. A body that is
    cancelled ends after the part that is being rendered."""
    rendering, parts = Lock(), _parts(make)

    def locked(step: Callable[[], _Value]) -> _Value:
        with rendering:
            return step()

    try:
        while part := await off_loop_if(is_large, partial(locked, partial(next, parts, b""))):
            yield part
    finally:
        await off_loop_if(is_large, partial(locked, parts.close))


def _parts(make: Callable[[], Any]) -> Generator[bytes, None, None]:
    yield from json_parts(make())


async def rendered_body(parts: Iterable[bytes]) -> JsonBody:
    """Parts that are there."""
    for part in parts:
        yield part


class JsonParts(Response):
    """Has a Content-Length where the body is one part, or its length is known."""

    media_type = "application/json"

    def __init__(self, body: JsonBody, held: AsyncExitStack | None = None) -> None:
        """`held`: what the reply takes of a budget; it is closed once the client has the body."""
        super().__init__()
        del self.headers["content-length"]
        self._body = body
        self._held = held or AsyncExitStack()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._held, aclosing(self._body):
            await first_of(self._send(send), wait_for_disconnect(receive))

    async def _send(self, send: Send) -> None:
        await self.send_parts(send)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def send_parts(self, send: Send) -> None:
        """Sends all but the end. What rendering the first parts raises comes before the head."""
        begin = [await anext(self._body, b""), await anext(self._body, b"")]
        if not begin[1]:
            self.headers["content-length"] = str(len(begin[0]))
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        while begin:
            await send({"type": "http.response.body", "body": begin.pop(0), "more_body": True})
        async for part in self._body:
            await send({"type": "http.response.body", "body": part, "more_body": True})


def rendered(value: Any) -> JsonParts:
    """A value as a body."""
    return JsonParts(json_body(lambda: value, is_large=has_many_values(value)))
