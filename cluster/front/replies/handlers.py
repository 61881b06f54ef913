"""The HTTP handlers of generating endpoints: replies are begun, kept for clients that are cut off, and read again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, suppress
from functools import partial

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llamaclust.cluster.front.body import read_bytes
from llamaclust.cluster.front.errors import HttpError
from llamaclust.cluster.front.http.security import owner
from llamaclust.cluster.front.http.sse import (
    EventResponse,
    StreamFormat,
    unless_disconnected,
    wait_for_disconnect,
)
from llamaclust.cluster.front.replies.kept_reply import KeptReply
from llamaclust.cluster.front.replies.reading import Framing, Position, stream_parts, whole_body
from llamaclust.cluster.front.replies.reply import Computation, JsonParts, MakeReply, Reply, rendered_body
from llamaclust.cluster.front.replies.reply_cache import ReplyCache
from llamaclust.cluster.front.replies.restoring import Durability, Restoring
from llamaclust.cluster.front.replies.ticket import Ticket
from llamaclust.cluster.front.settings import ApiSettings
from llamaclust.cluster.front.text.answer_log import AnswerLog, LogReader
from llamaclust.cluster.state.journal_records import OpenRequest
from llamaclust.core.errors import LlamaclustError


class Replies:
    """Use from one event loop; `aclose` it, which ends what is kept."""

    def __init__(self, settings: ApiSettings, durability: Durability | None = None) -> None:
        """Without `durability`, nothing survives this process."""
        self.settings = settings
        self._durability = durability
        self._journal = None if durability is None else durability.journal
        self._endpoints: dict[str, MakeReply] = {}
        self._forms: dict[str, StreamFormat] = {}
        self.cache = ReplyCache(settings, self._journal)
        self._restoring = None if durability is None else Restoring(durability, self.cache, self._endpoints)

    def endpoint(
        self, path: str, make: MakeReply, form: StreamFormat = StreamFormat.EVENTS
    ) -> Callable[[Request], Awaitable[Response]]:
        """The handler of a path whose replies `make` makes; `form`: of those that are streamed."""
        self._endpoints[path], self._forms[path] = make, form

        async def answer(request: Request) -> Response:
            return await self._answer(request, path)

        return answer

    async def _answer(self, request: Request, path: str) -> Response:
        body = await read_bytes(request, self.settings)
        scales = self.settings.adapters.default
        ticket = Ticket.draw(request.headers, self.settings.api_keys, journal=self._journal, scales=scales)
        if (kept := self.cache.same(ticket, path, body)) is not None:
            return await self._begun(request, kept, _given(request, kept.ticket))
        if "last-event-id" in request.headers:  # a new computation may give other tokens
            raise self._not_found(ticket.identity.idempotency_key)
        reply = await self._endpoints[path](body, ticket)
        if ticket.is_kept or reply.acknowledgement is not None:
            return await self._keep(request, ticket, reply, path, body)
        return await self._direct(request, ticket, reply, path, body)

    # -- replies that end with their connections -----------------------------------------------------------------------

    async def _direct(self, request: Request, ticket: Ticket, reply: Reply, path: str, body: bytes) -> Response:
        """No completion outlives the connection. A stream of events can be resumed after this process ended."""
        async with AsyncExitStack() as cleanup:
            computation, log = Computation(reply, ticket), AnswerLog()
            cleanup.push_async_callback(computation.aclose)
            await unless_disconnected(request, computation.submit(log, is_kept=False))
            if not reply.is_streamed:
                await unless_disconnected(request, log.wait_over())
                return JsonParts(whole_body(reply.view(log), log), cleanup.pop_all())
            form, admitted = self._forms[path], None
            if self._journal is not None and form.has_ids:  # else no client could ask for the rest
                cleanup.callback(self._journal.sent, ticket.id)
                admitted = self._admit(ticket, path, body, is_streamed=True, is_background=False)
            await unless_disconnected(request, self._first(log, admitted))
            framing = Framing(form, ticket.id, self.settings.keepalive_s, with_ids=_wants_ids(request))
            parts = stream_parts(LogReader(log), log, partial(reply.view, log), framing)
            return EventResponse(parts, cleanup.pop_all().aclose, form)

    async def _first(self, log: AnswerLog, admitted: Awaitable[None] | None) -> None:
        """Waits a moment for the first part, so that what fails before gets a status of its own. Nothing is sent before
        the admission is on disk; it is written while the prompt is computed."""
        await log.first(self.settings.first_chunk_s)
        if admitted is not None:
            await admitted

    def _admit(self, ticket: Ticket, path: str, body: bytes, **kind: bool) -> Awaitable[None] | None:
        return None if self._durability is None else self._durability.admit(ticket, path, body, **kind)

    # -- replies that are kept -----------------------------------------------------------------------------------------

    async def _keep(self, request: Request, ticket: Ticket, reply: Reply, path: str, body: bytes) -> Response:
        while ticket.identity.conversation and (before := self.cache.in_conversation(ticket)) is not None:
            await self.cache.forget(before)
        if (kept := self.cache.same(ticket, path, body)) is not None:  # that came meanwhile
            return await self._begun(request, kept, Position())
        kind = {"is_streamed": reply.is_streamed, "is_background": reply.acknowledgement is not None}
        kept = self.cache.add(ticket, path, body, **kind)
        try:
            admit = partial(self._admit, ticket, path, body, **kind)
            admitted = await unless_disconnected(request, kept.begin(Computation(reply, ticket), admit=admit))
        except BaseException:
            await self.cache.forget(kept)
            raise
        if admitted is not None:
            await asyncio.shield(admitted)
        return await self._begun(request, kept, Position())

    async def _begun(self, request: Request, kept: KeptReply, after: Position) -> Response:
        """To the request that begins it, or repeats that."""
        if kept.acknowledgement is not None and not kept.is_streamed:
            return JsonParts(rendered_body([kept.acknowledgement]))
        return await self.respond(request, kept, after)

    async def respond(self, request: Request, kept: KeptReply, after: Position) -> Response:
        """The rest of a kept reply."""
        if not kept.is_streamed:
            return await self._respond_whole(request, kept)
        framing = Framing(self._form(kept), kept.ticket.id, self.settings.keepalive_s, after)
        framing.with_comments = not kept.ticket.identity.conversation  # its clients count bytes
        return self._stream(kept, framing)

    def _stream(self, kept: KeptReply, framing: Framing) -> Response:
        async def close() -> None:
            if framing.is_done:
                self.cache.sent(kept)

        return EventResponse(stream_parts(kept.reading(), kept.log, kept.view, framing), close, framing.form)

    def _form(self, kept: KeptReply) -> StreamFormat:
        return self._forms.get(self.cache.path_of(kept), StreamFormat.EVENTS)

    async def _respond_whole(self, request: Request, kept: KeptReply) -> Response:
        sent = partial(self.cache.sent, kept)
        try:
            return _WholeResponse(await unless_disconnected(request, kept.whole()), sent)
        except LlamaclustError:  # it is all that the client gets
            sent()
            raise

    # -- clients that come back ----------------------------------------------------------------------------------------

    async def resume(self, request: Request) -> Response:
        """`GET /v1/streams/ID`: the events after the one of `Last-Event-ID` or `?after=`; a reply that is not streamed
        as a whole."""
        kept = self._find(request)
        return await self.respond(request, kept, _given(request, kept.ticket))

    async def replay(self, request: Request) -> Response:
        """`GET /v1/stream/ID?from=N` or `/v1/stream?conv_id=ID&from=N`, llama.cpp's forms: the bytes of a
        conversation's newest stream from N on. Refused where it was computed again with other measurements, as after a
        restart."""
        kept = self._find(request)
        start = request.query_params.get("from", "0")
        if not (start.isascii() and start.isdigit() and len(start) < 16):
            raise HttpError(400, "bad_offset", f"from: {start[:60]!r} is not a number of bytes", param="from")
        is_restored = kept.ticket.restoration is not None
        if int(start) and is_restored and await unless_disconnected(request, kept.has_measurements()):
            why = "the coordinator was restarted, and this stream shows measurements, whose new values move its bytes"
            raise HttpError(409, "stream_computed_again", f"from: {why}: read it from 0 on", param="from")
        framing = Framing(self._form(kept), kept.ticket.id, self.settings.keepalive_s, skipped_bytes=int(start))
        framing.with_comments = False
        return self._stream(kept, framing)

    async def stop(self, request: Request) -> Response:
        """`DELETE` of either: ends the reply. 204 also where there is none."""
        with suppress(HttpError):
            await self.cache.forget(self._find(request))
        return Response(status_code=204)

    def _find(self, request: Request) -> KeptReply:
        name = request.path_params.get("id") or request.query_params.get("conv_id", "")
        if not name:
            raise HttpError(400, "missing_id", "conv_id: is missing; it is the conversation's name", param="conv_id")
        if (kept := self.cache.named(owner(request.headers, self.settings.api_keys), name)) is None:
            raise self._not_found(name)
        return kept

    def _not_found(self, name: str) -> HttpError:
        gone = f"no reply {name[:60]!r} is kept: it was cancelled, or its client was away for more than"
        return HttpError(404, "reply_not_found", f"{gone} {self.settings.resume_s:g} s (timeouts.resume)")

    # -- after a coordinator's end -------------------------------------------------------------------------------------

    async def restore(self, requests: Sequence[OpenRequest]) -> None:
        """See `Restoring`."""
        assert self._restoring is not None
        await self._restoring.restore(requests)

    async def aclose(self) -> None:
        self.cache.stop()
        if self._restoring is not None:
            await self._restoring.aclose()
        await self.cache.aclose()


class _WholeResponse(JsonParts):
    """A reply that is not streamed; `sent` is called once the connection took all of it."""

    def __init__(self, parts: Sequence[bytes], sent: Callable[[], None]) -> None:
        super().__init__(rendered_body(parts))
        self.headers["content-length"] = str(sum(map(len, parts)))
        self._sent = sent

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        cut = asyncio.create_task(wait_for_disconnect(receive))
        try:
            await self.send_parts(send)
            await asyncio.sleep(0)  # the task may not have run yet; after the end, it is always done
            if not cut.done():
                self._sent()
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            cut.cancel()
            await asyncio.wait([cut])


def _given(request: Request, ticket: Ticket) -> Position:
    """What the client has already of the reply: the id of an event, or what follows its colon. HttpError for what is
    neither, and for an event of another request."""
    param = "after" if "after" in request.query_params else "Last-Event-ID"
    last = request.query_params.get("after", request.headers.get("last-event-id", ""))
    if not last:
        return Position()
    request_id, colon, position = last.rpartition(":")
    if colon and request_id != ticket.id:
        why = f"{last[:60]!r} is an event of another request; the ids of this reply's events begin with {ticket.id}:"
        raise HttpError(400, "bad_event_id", f"{param}: {why}", param=param)
    return Position.parse(position, param)


def _wants_ids(request: Request) -> bool:
    """Whether a client that named no request reads ids of events: some read nothing but `data:`."""
    return StreamFormat.EVENTS.value in request.headers.get("accept", "").lower()
