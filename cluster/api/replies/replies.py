"""All replies of generating endpoints: begun, kept for clients that are cut off, restored after a coordinator's end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from functools import partial

from starlette.requests import Request
from starlette.responses import Response

from llamaclust.cluster.api.body import read_bytes
from llamaclust.cluster.api.errors import HttpError
from llamaclust.cluster.api.json_parts import JsonParts
from llamaclust.cluster.api.replies.kept import KeptReply
from llamaclust.cluster.api.replies.kept_replies import KeptReplies
from llamaclust.cluster.api.replies.reply import Event, MakeReply, Position, Reply
from llamaclust.cluster.api.replies.ticket import Ticket, owner
from llamaclust.cluster.api.settings import ApiSettings
from llamaclust.cluster.api.sse import WAITING, EventResponse, begin_events, unless_disconnected
from llamaclust.cluster.state.journal import Journal, OpenRequest
from llamaclust.core.errors import LlamaclustError, WorkerError
from llamaclust.wire.rpc.task_set import TaskSet

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Durability:
    """Where admissions are written, and what they need to be valid for a later coordinator."""

    journal: Journal
    served: str  # digest of the model and its settings
    request_s: float


class Replies:
    """Use from one event loop; `aclose` it, which ends what is kept."""

    def __init__(self, settings: ApiSettings, durability: Durability | None = None) -> None:
        """Without `durability`, nothing survives this process."""
        self.settings = settings
        self._durability = durability
        self._journal = None if durability is None else durability.journal
        self._endpoints: dict[str, MakeReply] = {}
        self._kept = KeptReplies(settings, self._journal)
        self._restoring = TaskSet()

    def endpoint(self, path: str, make: MakeReply) -> Callable[[Request], Awaitable[Response]]:
        """The handler of a path whose replies `make` makes."""
        self._endpoints[path] = make

        async def answer(request: Request) -> Response:
            return await self._answer(request, path)

        return answer

    async def _answer(self, request: Request, path: str) -> Response:
        body = await read_bytes(request, self.settings)
        ticket = Ticket.draw(request.headers, self.settings.api_keys, self._journal)
        if (kept := self._kept.same(ticket, path, body)) is not None:
            return await self._respond(request, kept, _given(request))
        if "last-event-id" in request.headers:  # a new computation may give other tokens
            raise self._not_found(ticket.idempotency_key)
        reply = await self._endpoints[path](body, ticket)
        if ticket.is_kept:
            return await self._keep(request, ticket, reply, path, body)
        return await self._direct(request, ticket, reply, path, body)

    # -- replies that end with their connections -----------------------------------------------------------------------

    async def _direct(self, request: Request, ticket: Ticket, reply: Reply, path: str, body: bytes) -> Response:
        """No completion outlives the connection. A streamed one can be resumed after this process ended."""
        async with AsyncExitStack() as cleanup:
            cleanup.push_async_callback(reply.aclose)
            await unless_disconnected(request, reply.start())
            if not reply.is_streamed:
                return JsonParts(await unless_disconnected(request, reply.whole()))
            if self._journal is not None:
                cleanup.callback(self._journal.sent, ticket.id)
            first = self._admitted_first(reply, ticket, path, body)
            return await begin_events(request, first, _numbered(ticket, reply.events(), Position()), cleanup)

    async def _admitted_first(self, reply: Reply, ticket: Ticket, path: str, body: bytes) -> None:
        """Nothing is sent before the admission is on disk; it is written while the prompt is computed."""
        await asyncio.gather(reply.wait_first(), self._admit(ticket, path, body, is_streamed=True))

    async def _admit(self, ticket: Ticket, path: str, body: bytes, *, is_streamed: bool) -> None:
        if self._durability is not None:
            served, request_s = self._durability.served, self._durability.request_s
            admission = ticket.admission(path, body, served, request_s, is_streamed=is_streamed)
            await self._durability.journal.admit(admission)

    # -- replies that are kept -----------------------------------------------------------------------------------------

    async def _keep(self, request: Request, ticket: Ticket, reply: Reply, path: str, body: bytes) -> Response:
        while ticket.conversation and (before := self._kept.in_conversation(ticket)) is not None:
            await self._kept.forget(before)
        if (kept := self._kept.same(ticket, path, body)) is not None:  # that came meanwhile
            return await self._respond(request, kept, Position())
        kept = self._kept.add(ticket, path, body, is_streamed=reply.is_streamed)
        try:
            await unless_disconnected(request, kept.begin(reply))
        except BaseException:
            await self._kept.forget(kept)
            raise
        await self._admit(ticket, path, body, is_streamed=reply.is_streamed)
        return await self._respond(request, kept, Position())

    async def _respond(self, request: Request, kept: KeptReply, after: Position) -> Response:
        """The rest of a kept reply."""
        if not kept.is_streamed:
            return JsonParts(await unless_disconnected(request, kept.whole()))
        ticket = kept.ticket
        events = kept.read(after, with_comments=not ticket.conversation)  # its clients count bytes
        return EventResponse(_numbered(ticket, events, after), self._sent(kept))

    def _sent(self, kept: KeptReply) -> Callable[[], Awaitable[None]]:
        async def close() -> None:
            if kept.is_sent:
                self._kept.sent(kept)

        return close

    # -- clients that come back ----------------------------------------------------------------------------------------

    async def resume(self, request: Request) -> Response:
        """`GET /v1/streams/ID`: the events after the one of `Last-Event-ID` or `?after=`; a reply that is not streamed
        as a whole."""
        return await self._respond(request, self._find(request), _given(request))

    async def replay(self, request: Request) -> Response:
        """`GET /v1/stream/ID?from=N`, llama.cpp's form: the bytes of a conversation's newest stream from N on."""
        kept = self._find(request)
        start = request.query_params.get("from", "0")
        if not (start.isascii() and start.isdigit() and len(start) < 16):
            raise HttpError(400, "bad_offset", f"from: {start[:60]!r} is not a number of bytes", param="from")
        events = kept.read(Position(), with_comments=False)
        return EventResponse(_from_byte(_numbered(kept.ticket, events, Position()), int(start)), self._sent(kept))

    async def stop(self, request: Request) -> Response:
        """`DELETE` of either: ends the reply. 204 also where there is none."""
        with suppress(HttpError):
            await self._kept.forget(self._find(request))
        return Response(status_code=204)

    def _find(self, request: Request) -> KeptReply:
        name = request.path_params["id"]
        if (kept := self._kept.named(owner(request.headers, self.settings.api_keys), name)) is None:
            raise self._not_found(name)
        return kept

    def _not_found(self, name: str) -> HttpError:
        gone = f"no reply {name[:60]!r} is kept: it was cancelled, or its client was away for more than"
        return HttpError(404, "reply_not_found", f"{gone} {self.settings.resume_s:g} s (timeouts.resume)")

    # -- after a coordinator's end -------------------------------------------------------------------------------------

    async def restore(self, requests: Sequence[OpenRequest]) -> None:
        """Computes replies again that an earlier coordinator did not complete, for clients that come back. They can be
        found at once; their computation begins in the order of their admission. Those that were sent are computed where
        a client has not read them to the end."""
        assert self._durability is not None
        await self._durability.journal.restore(requests)
        restored = []
        for request in sorted(requests, key=lambda request: request.is_sent):
            ticket, body = Ticket.restored(request, self._durability.journal), request.admission.body.encode()
            path, is_streamed = request.admission.endpoint, request.admission.is_streamed
            try:
                kept = self._kept.add(ticket, path, body, is_streamed=is_streamed)
            except HttpError as full:
                _log.warning("request %s is not restored: %s", ticket.id, full)
                self._durability.journal.end(ticket.id)
            else:
                begin = (kept, path, body)
                if request.is_sent:
                    kept.postpone(partial(self._begin_postponed, begin))
                else:
                    restored.append(begin)
        if restored:
            _log.info("requests restored from the journal", extra={"requests": len(restored)})
            self._restoring.start(self._begin_all(restored))

    def _begin_postponed(self, restored: tuple[KeptReply, str, bytes]) -> None:
        self._restoring.start(self._begin_all([restored]))

    async def _begin_all(self, restored: list[tuple[KeptReply, str, bytes]]) -> None:
        assert self._durability is not None
        for kept, path, body in restored:
            try:
                await kept.begin(await self._endpoints[path](body, kept.ticket), waits_s=self._durability.request_s)
            except LlamaclustError as error:
                kept.fail(error)
            except KeyError:
                kept.fail(WorkerError(f"the endpoint {path} is not there any more"))
            except Exception:  # noqa: BLE001  the others are restored all the same
                _log.exception("request %s is not restored", kept.ticket.id)
                kept.fail(WorkerError("the request could not be restored; the coordinator's log says more"))

    async def aclose(self) -> None:
        await self._restoring.close()
        await self._kept.aclose()


def _given(request: Request) -> Position:
    """What the client has already: the id of an event, or what follows its colon."""
    last = request.query_params.get("after", request.headers.get("last-event-id", ""))
    text = last.rpartition(":")[2]
    return Position.parse(text, "after") if text else Position()


async def _numbered(
    ticket: Ticket, events: AsyncGenerator[Event | None, None], sent: Position
) -> AsyncGenerator[bytes, None]:
    """Events with ids, after those of `sent`."""
    try:
        async for event in events:
            if event is None:
                yield WAITING
            else:
                sent.add(event)
                yield b"id: %s:%s\n%s" % (ticket.id.encode(), str(sent).encode(), event.data)
    finally:
        await events.aclose()


async def _from_byte(parts: AsyncGenerator[bytes, None], start: int) -> AsyncGenerator[bytes, None]:
    try:
        async for part in parts:
            if start < len(part):
                yield part[start:]
            start = max(0, start - len(part))
    finally:
        await parts.aclose()
