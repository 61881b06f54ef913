"""HTTP handlers of endpoints that generate text. They start replies, send them again, and restore requests."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from operator import attrgetter
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from llamaclust.cluster.engine.trace_context import TraceContext, current_trace
from llamaclust.cluster.front.body import read_bytes
from llamaclust.cluster.front.errors import HttpError, internal_error
from llamaclust.cluster.front.http.gates import owner
from llamaclust.cluster.front.http.responses import shape_errors
from llamaclust.cluster.front.http.sse import EventResponse, JsonParts, StreamFormat, rendered, unless_disconnected
from llamaclust.cluster.front.images.chat_images import check_restored
from llamaclust.cluster.front.json_text import size_of_json
from llamaclust.cluster.front.replies.kept_reply import KeptReply
from llamaclust.cluster.front.replies.reply import Framing, MakeReply, Position, Reply, new_context, read_position
from llamaclust.cluster.front.replies.reply_cache import ReplyCache
from llamaclust.cluster.front.settings import ApiSettings
from llamaclust.cluster.front.text.sharing import current_owner, hold_bytes
from llamaclust.cluster.state.journal import Journal
from llamaclust.cluster.state.journal_records import Instant, RequestContext
from llamaclust.core.errors import LlamaclustError, RequestCancelledError, RequestFailedError, WorkerError
from llamaclust.wire.rpc.task_set import TaskSet

_MOST_RESTORES = 10
"""Maximum number of times that a request is restored without a new token."""
_ALONE_S = 10.0
"""Maximum number of seconds for which a restored request delays the next one."""

_log = logging.getLogger(__name__)


class Replies:
    """Computes, keeps and restores the replies of an HTTP app. Not thread-safe. `aclose` ends all kept replies."""

    def __init__(self, settings: ApiSettings, journal: Journal | None = None) -> None:
        self.settings = settings
        self.cache = ReplyCache(settings, journal)
        # Keys: digest of the model's settings, path of the endpoint.
        self._endpoints: dict[tuple[str, str], MakeReply] = {}
        self._forms: dict[str, StreamFormat] = {}
        self._tasks = TaskSet()

    def endpoint(
        self, path: str, make: MakeReply, settings: ApiSettings, form: StreamFormat = StreamFormat.EVENTS
    ) -> Callable[[Request], Awaitable[Response]]:
        """Returns the handler for `path`. `make` turns a request body into a reply. `form` is the stream format."""
        self._endpoints[settings.digest, path], self._forms[path] = make, form

        async def answer(request: Request) -> Response:
            return await self._answer(request, path, make, settings)

        return answer

    async def _answer(self, request: Request, path: str, make: MakeReply, settings: ApiSettings) -> Response:
        body = await read_bytes(request, self.settings)
        context = new_context(request.headers, path, settings)
        is_resumed = "last-event-id" in request.headers
        if (same := self.cache.same(context, body)) is not None:
            if is_resumed or not same.is_retryable:
                return await self._begun(request, same, _given(request, same.context))
            await self.cache.forget(same)
        if is_resumed:  # A new stream may differ from the part that the client has.
            raise self._not_found(context.idempotency_key)
        reply = await make(body, context)
        context.is_streamed, context.is_background = reply.is_streamed, reply.is_background
        context.has_measurements = reply.has_measurements
        earlier_bytes = await size_of_json(context.earlier)
        kept = KeptReply(context, self.cache, is_kept=context.is_kept)
        if kept.is_kept:
            # The same request may arrive during an `await`.
            while (same := self.cache.same(context, body)) is None and (before := self.cache.in_conversation(context)):
                await self.cache.forget(before)
            if same is not None:
                return await self._begun(request, same, Position())
            self.cache.add(kept, body, earlier_bytes)
        elif context.earlier and (hold := hold_bytes.get()) is not None:
            hold(earlier_bytes)
        await self._begin(request, kept, reply, body)
        return await self._begun(request, kept, Position())

    async def _begin(self, request: Request, kept: KeptReply, reply: Reply, body: bytes) -> None:
        """Starts computing a reply, and waits until it is prepared. The wait has a limit if the reply is streamed."""
        is_journalled = kept.is_kept or (kept.context.is_streamed and self._form(kept).has_ids)
        admitted = body if is_journalled and self.cache.journal is not None else None
        is_streamed = kept.context.is_streamed
        try:
            beginning = kept.start(reply, admitted)
            # Clients of streams give up if nothing arrives while images are encoded.
            await unless_disconnected(
                request, asyncio.wait([beginning], timeout=self.settings.prepare_s if is_streamed else None)
            )
            if not beginning.done():  # From now on, an error is an event of the stream.
                beginning.add_done_callback(partial(self._began, kept))
                return
            if beginning.cancelled():  # Another request replaced this one.
                kept.end(RequestCancelledError())
            else:
                beginning.result()
            # An error before the first part can still set the HTTP status.
            if is_streamed and not kept.is_kept:
                await unless_disconnected(request, kept.log.first(self.settings.first_chunk_s))
        except BaseException as error:
            if kept.is_kept and isinstance(error, ClientDisconnect):  # Other clients may wait for the reply.
                beginning.add_done_callback(partial(self._began, kept))
                kept.expire_later()
            else:
                await self.cache.forget(kept)
            raise

    def _began(self, kept: KeptReply, beginning: asyncio.Task[None]) -> None:
        if beginning.cancelled():
            kept.end(RequestCancelledError())
        elif (error := beginning.exception()) is not None:
            self.cache.remove(kept)  # Another attempt of the client begins anew.
            kept.end(error if isinstance(error, LlamaclustError) else internal_error())
            if not isinstance(error, LlamaclustError):
                _log.error("request %s failed", kept.context.id, exc_info=error)

    async def _begun(self, request: Request, kept: KeptReply, given: Position) -> Response:
        if kept.context.is_background and not kept.context.is_streamed:
            return rendered(await unless_disconnected(request, kept.acknowledged()))
        return await self.respond(request, kept, given)

    async def respond(self, request: Request, kept: KeptReply, given: Position) -> Response:
        if not kept.context.is_streamed:
            return await self._whole(request, kept)
        framing = Framing(self._form(kept), kept.context.id, self.settings.keepalive_s, given)
        framing.with_ids = kept.is_kept or _wants_ids(request)
        # Clients that name a conversation resume a stream at a byte offset, which comments would shift.
        framing.with_comments = not kept.context.conversation
        return self._stream(request, kept, framing)

    def _stream(self, request: Request, kept: KeptReply, framing: Framing) -> Response:
        shape_errors(request.scope, kept.context.endpoint)
        return EventResponse(
            kept.stream(framing), partial(self.cache.left, kept), framing.form, framing.fields_of_error
        )

    def _form(self, kept: KeptReply) -> StreamFormat:
        return self._forms.get(kept.context.endpoint, StreamFormat.EVENTS)

    async def _whole(self, request: Request, kept: KeptReply) -> Response:
        shape_errors(request.scope, kept.context.endpoint)
        try:
            body, size = await unless_disconnected(request, kept.whole())
            return JsonParts(body, partial(self.cache.left, kept), size)
        except BaseException as error:  # The client gets the error and no reply.
            await self.cache.left(kept, isinstance(error, Exception) and not isinstance(error, ClientDisconnect))
            raise

    # -- handlers for kept replies -------------------------------------------------------------------------------------

    async def resume(self, request: Request) -> Response:
        """Sends a kept reply again. A stream resumes after the event that `Last-Event-ID` or `?after=` names."""
        kept = self._find(request)
        return await self.respond(request, kept, _given(request, kept.context))

    async def replay(self, request: Request) -> Response:
        """Sends a kept reply again for llama.cpp's `GET /v1/stream/ID?from=N` or `/v1/stream?conv_id=ID&from=N`, where
        N is the number of bytes of the stream to skip. N must be 0 if the reply is not streamed."""
        kept = self._find(request)
        start = request.query_params.get("from", "0")
        if not (start.isascii() and start.isdigit() and len(start) < 16):
            raise HttpError(400, "bad_offset", f"from: {start[:60]!r} is not a number of bytes", param="from")
        if not kept.context.is_streamed:
            if int(start):
                why = "this reply is not streamed and can only be sent whole: omit the parameter"
                raise HttpError(409, "not_streamed", f"from: {why}", param="from")
            return await self._whole(request, kept)
        if int(start) and kept.context.is_restored and kept.context.has_measurements:
            why = "a restarted coordinator computed this stream again, with other times or another order of events"
            raise HttpError(409, "stream_computed_again", f"from: {why}; read the stream from 0", param="from")
        framing = Framing(self._form(kept), kept.context.id, self.settings.keepalive_s, skipped_bytes=int(start))
        framing.with_comments = False
        return self._stream(request, kept, framing)

    async def stop(self, request: Request) -> Response:
        """Ends a reply. The status is 204 even if there is no such reply."""
        with suppress(HttpError):
            await self.cache.forget(self._find(request))
        return Response(status_code=204)

    def _find(self, request: Request) -> KeptReply:
        name = request.path_params.get("id") or request.query_params.get("conv_id", "")
        if not name:
            raise HttpError(
                400, "missing_id", "conv_id: the parameter is missing; give the conversation's name", param="conv_id"
            )
        if (kept := self.cache.named(owner(request.headers, self.settings.api_keys), name)) is None:
            raise self._not_found(name)
        return kept

    def _not_found(self, name: str) -> HttpError:
        gone = f"no reply {name[:60]!r} is kept: the reply was cancelled, or no client read it for more than"
        return HttpError(404, "reply_not_found", f"{gone} {self.settings.resume_s:g} s (timeouts.resume)")

    # -- after a restart of the coordinator ----------------------------------------------------------------------------

    async def restore(self, requests: Sequence[RequestContext]) -> None:
        """Restores the journal's requests after a restart of the coordinator. Those with unsent replies come first."""
        assert self.cache.journal is not None
        await self.cache.journal.restore(requests)
        begun: list[KeptReply] = []
        for request in sorted(requests, key=attrgetter("is_sent")):
            kept = KeptReply(request, self.cache)
            try:
                self.cache.add(kept, request.body, await size_of_json(request.earlier))
            except HttpError as full:
                _log.warning("request %s is not restored: %s", request.id, full)
                self.cache.remove(kept)
                continue
            if request.restores >= _MOST_RESTORES:
                what = f"the coordinator ended {request.restores} times during this request, which at last ran alone"
                _log.warning("request %s: %s", request.id, what)
                kept.fail(RequestFailedError(what))
            elif request.is_sent:
                kept.postpone(partial(self._start, kept))
            else:
                begun.append(kept)
        if begun:
            _log.info("requests restored from the journal", extra={"requests": len(begun)})
            self._tasks.start(self._begin_all(begun))

    def _start(self, kept: KeptReply) -> None:
        self._tasks.start(self._begin_alone(kept))

    async def _begin_all(self, begun: list[KeptReply]) -> None:
        together = [kept for kept in begun if not kept.context.restores]
        await self._count_restores({kept.context.id: 1 for kept in together})
        for kept in together:
            await self._attempt(self._begin_again(kept))
        await self._wait_progressed(together)
        alone = [kept for kept in begun if kept.context.restores]
        for kept in sorted(alone, key=attrgetter("context.restores")):
            await self._attempt(self._begin_alone(kept))
            await self._wait_progressed([kept])

    @staticmethod
    async def _wait_progressed(begun: Iterable[KeptReply]) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(_ALONE_S):
                for kept in begun:
                    await kept.progressed.wait()

    async def _attempt(self, beginning: Coroutine[Any, Any, None]) -> None:
        await asyncio.wait([self._tasks.start(beginning)], timeout=_ALONE_S)

    async def _begin_alone(self, kept: KeptReply) -> None:
        await self._count_restores({kept.context.id: kept.context.restores + 1})
        await self._begin_again(kept)

    async def _count_restores(self, times: Mapping[str, int]) -> None:
        assert self.cache.journal is not None
        await self.cache.journal.begin_restored(times)

    async def _begin_again(self, kept: KeptReply) -> None:
        """Begins a restored request. Must run in a task of its own, because it sets the task's context variables."""
        context = kept.context
        current_owner.set(context.client)
        current_trace.set(TraceContext.parse([context.traceparent], [context.tracestate]))
        make = self._endpoints.get((context.served, context.endpoint))
        if make is None:
            kept.fail(WorkerError(f"the request cannot continue: the endpoint {context.endpoint} no longer exists"))
            return
        left_s = self.settings.request_s if context.is_complete else context.left_s(Instant.now())
        end_s = asyncio.get_running_loop().time() + left_s
        try:
            check_restored(context)
            await kept.start(await make(context.body, context), until_s=end_s)
        except LlamaclustError as error:
            kept.fail(error)
        except Exception:  # noqa: BLE001  The other requests must still be restored.
            _log.exception("request %s is not restored", context.id)
            kept.fail(WorkerError("the request could not be restored; see the coordinator's log"))

    async def aclose(self) -> None:
        self.cache.stop()
        await self._tasks.close()
        await self.cache.aclose()


def _given(request: Request, context: RequestContext) -> Position:
    """Returns the position at which a client resumes a stream. Raises HttpError if its last event id is invalid."""
    param = "after" if "after" in request.query_params else "Last-Event-ID"
    last = request.query_params.get("after", request.headers.get("last-event-id", ""))
    if not last:
        return Position()
    request_id, colon, position = last.rpartition(":")
    if colon and request_id != context.id:
        why = f"{last[:60]!r} is an event of another request; the ids of this reply's events begin with {context.id}:"
        raise HttpError(400, "bad_event_id", f"{param}: {why}", param=param)
    return read_position(position, param)


def _wants_ids(request: Request) -> bool:
    """Returns True if the client accepts server-sent events."""
    return StreamFormat.EVENTS.value in request.headers.get("accept", "").lower()
