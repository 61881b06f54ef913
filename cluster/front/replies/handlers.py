"""The HTTP handlers of generating endpoints: replies are begun, kept for clients that are cut off, and read again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from llamaclust.cluster.front.body import read_bytes
from llamaclust.cluster.front.errors import HttpError
from llamaclust.cluster.front.http.security import owner
from llamaclust.cluster.front.http.sse import EventResponse, JsonParts, StreamFormat, unless_disconnected
from llamaclust.cluster.front.json_text import one_part
from llamaclust.cluster.front.replies.kept_reply import KeptReply
from llamaclust.cluster.front.replies.reply import Framing, MakeReply, Position, Reply, Ticket, read_position
from llamaclust.cluster.front.replies.reply_cache import ReplyCache
from llamaclust.cluster.front.replies.restoring import Restoring
from llamaclust.cluster.front.settings import ApiSettings
from llamaclust.cluster.state.journal import Journal
from llamaclust.cluster.state.journal_records import OpenRequest


class Replies:
    """Use from one event loop; `aclose` it, which ends what is kept."""

    def __init__(self, settings: ApiSettings, journal: Journal | None = None) -> None:
        """Without a journal, nothing survives this process."""
        self.settings = settings
        self.cache = ReplyCache(settings, journal)
        self._endpoints: dict[str, MakeReply] = {}
        self._forms: dict[str, StreamFormat] = {}
        self._restoring = None if journal is None else Restoring(journal, self.cache, self._endpoints)

    def endpoint(
        self, path: str, make: MakeReply, form: StreamFormat = StreamFormat.EVENTS
    ) -> Callable[[Request], Awaitable[Response]]:
        """The handler of a path whose replies `make` makes; `form`: of those that are streamed."""
        self._endpoints[path], self._forms[path] = make, form

        async def answer(request: Request) -> Response:
            return await self._answer(request, path)

        return answer

    async def _answer(self, request: Request, path: str) -> Response:
        """A reply that its client could ask for later goes on without the connection, any other ends with it."""
        body = await read_bytes(request, self.settings)
        ticket = Ticket.draw(request.headers, path, self.settings)
        if (same := self.cache.same(ticket, body)) is not None:
            return await self._begun(request, same, _given(request, same.ticket))
        if "last-event-id" in request.headers:  # a new computation may give other tokens
            raise self._not_found(ticket.identity.idempotency_key)
        reply = await self._endpoints[path](body, ticket)
        kept = KeptReply(ticket, reply, self.cache, is_kept=ticket.is_named or reply.is_background)
        if kept.is_kept:
            while (before := self.cache.in_conversation(ticket)) is not None:
                await self.cache.forget(before)
            if (same := self.cache.same(ticket, body)) is not None:  # that came meanwhile
                return await self._begun(request, same, Position())
            self.cache.add(kept, body)
        await self._begin(request, kept, reply, body)
        return await self._begun(request, kept, Position())

    async def _begin(self, request: Request, kept: KeptReply, reply: Reply, body: bytes) -> None:
        """Returns once the admission is on disk, which is written while the prompt is computed: nothing is sent before.
        It is journalled where its client could ask for the rest. A moment is waited for the first part of a stream that
        ends with its connection, so that what fails before gets a status of its own."""
        is_journalled = kept.is_kept or (kept.is_streamed and self._form(kept).has_ids)
        admitted = body if is_journalled and self.cache.journal is not None else None
        try:
            on_disk = await unless_disconnected(request, kept.begin(reply, admitted=admitted))
            if kept.is_streamed and not kept.is_kept:
                await unless_disconnected(request, kept.log.first(self.settings.first_chunk_s))
            if on_disk is not None:
                await asyncio.shield(on_disk)
        except BaseException:
            await self.cache.forget(kept)
            raise

    async def _begun(self, request: Request, kept: KeptReply, given: Position) -> Response:
        """The reply to the request that begins it, or repeats that."""
        if kept.acknowledgement is not None and not kept.is_streamed:
            return JsonParts(one_part(kept.acknowledgement))
        return await self.respond(request, kept, given)

    async def respond(self, request: Request, kept: KeptReply, given: Position) -> Response:
        """What a client lacks of a reply."""
        if not kept.is_streamed:
            return await self._whole(request, kept)
        framing = Framing(self._form(kept), kept.ticket.id, self.settings.keepalive_s, given)
        framing.with_ids = kept.is_kept or _wants_ids(request)
        framing.with_comments = not kept.ticket.identity.conversation  # its clients count bytes
        return self._stream(kept, framing)

    def _stream(self, kept: KeptReply, framing: Framing) -> Response:
        return EventResponse(kept.stream(framing), partial(self.cache.left, kept), framing.form)

    def _form(self, kept: KeptReply) -> StreamFormat:
        return self._forms.get(kept.ticket.endpoint, StreamFormat.EVENTS)

    async def _whole(self, request: Request, kept: KeptReply) -> Response:
        try:
            return JsonParts(await unless_disconnected(request, kept.whole()), partial(self.cache.left, kept))
        except BaseException as error:  # an error is all that the client gets
            await self.cache.left(kept, isinstance(error, Exception) and not isinstance(error, ClientDisconnect))
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
        left = kept.ticket.restored
        if int(start) and left is not None and left.admission.has_measurements:
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
    return read_position(position, param)


def _wants_ids(request: Request) -> bool:
    """Whether a client that named no request reads ids of events: some read nothing but `data:`."""
    return StreamFormat.EVENTS.value in request.headers.get("accept", "").lower()
