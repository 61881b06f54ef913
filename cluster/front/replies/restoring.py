"""Replies that an earlier coordinator did not complete: computed again for clients that come back.

A request may be what ended the coordinator. It is counted how many times a request was begun again without a token that
was not known before; what came no further once is begun behind the others, alone until it has progressed, so that
requests beside it are not taken for the cause; and it fails after some times.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import suppress
from functools import partial
from operator import attrgetter
from typing import Any

from llamaclust.cluster.engine.trace_context import TraceContext, current_trace
from llamaclust.cluster.front.errors import HttpError
from llamaclust.cluster.front.replies.kept_reply import KeptReply
from llamaclust.cluster.front.replies.reply import MakeReply, Ticket
from llamaclust.cluster.front.replies.reply_cache import ReplyCache
from llamaclust.cluster.front.text.sharing import current_owner
from llamaclust.cluster.state.journal import Journal
from llamaclust.cluster.state.journal_records import Instant, OpenRequest
from llamaclust.core.errors import LlamaclustError, RequestFailedError, WorkerError
from llamaclust.wire.rpc.task_set import TaskSet

_MOST_RESTORES = 4
_ALONE_S = 10.0
"""Until the next one begins, where a request does not progress."""

_log = logging.getLogger(__name__)
_Restored = tuple[OpenRequest, KeptReply]


class Restoring:
    """Use from one event loop; `aclose` it."""

    def __init__(self, journal: Journal, cache: ReplyCache, endpoints: Mapping[str, MakeReply]) -> None:
        self._journal = journal
        self._cache = cache
        self._endpoints = endpoints
        self._tasks = TaskSet()

    async def restore(self, requests: Sequence[OpenRequest]) -> None:
        """They can be found at once; their computation begins in the order of their admission. Those that were sent are
        computed where a client has not read them to the end. The journal has them already."""
        begun: list[_Restored] = []
        for request in sorted(requests, key=attrgetter("is_sent")):
            if (kept := self._added(request)) is None:
                continue
            if request.restores >= _MOST_RESTORES:
                what = f"the coordinator ended {request.restores} times while it computed this request, at last alone"
                _log.warning("request %s: %s", kept.ticket.id, what)
                kept.fail(RequestFailedError(what))
            elif request.is_sent:
                kept.postpone(partial(self._start, request, kept))
            else:
                begun.append((request, kept))
        if begun:
            _log.info("requests restored from the journal", extra={"requests": len(begun)})
            self._tasks.start(self._begin_all(begun))

    async def aclose(self) -> None:
        await self._tasks.close()

    def _added(self, request: OpenRequest) -> KeptReply | None:
        """None where there is no room."""
        kept = KeptReply(Ticket.restore(request), request.admission, self._cache)
        try:
            self._cache.add(kept, request.admission.body)
        except HttpError as full:
            _log.warning("request %s is not restored: %s", kept.ticket.id, full)
            self._journal.end(kept.ticket.id)
            return None
        return kept

    def _start(self, request: OpenRequest, kept: KeptReply) -> None:
        self._tasks.start(self._begin_alone(request, kept))

    async def _begin_all(self, begun: list[_Restored]) -> None:
        together = [(request, kept) for request, kept in begun if not request.restores]
        await self._journal.begin_restored({kept.ticket.id: 1 for _, kept in together})
        for restored in together:
            await self._attempt(self._begin(*restored))
        alone = [(request, kept) for request, kept in begun if request.restores]
        for request, kept in sorted(alone, key=lambda restored: restored[0].restores):
            await self._attempt(self._begin_alone(request, kept))
            with suppress(TimeoutError):
                await asyncio.wait_for(kept.progressed.wait(), _ALONE_S)

    async def _attempt(self, beginning: Coroutine[Any, Any, None]) -> None:
        """One that is tried again, because the machine is busy, does not hold up the others for long."""
        await asyncio.wait([self._tasks.start(beginning)], timeout=_ALONE_S)

    async def _begin_alone(self, request: OpenRequest, kept: KeptReply) -> None:
        await self._journal.begin_restored({kept.ticket.id: request.restores + 1})
        await self._begin(request, kept)

    async def _begin(self, request: OpenRequest, kept: KeptReply) -> None:
        """In a task of its own: its sequences belong to the trace of the request that was admitted."""
        admission, identity = request.admission, request.admission.identity
        current_owner.set(identity.client)
        current_trace.set(TraceContext.parse([identity.traceparent], [identity.tracestate]))
        make = self._endpoints.get(admission.endpoint)
        if make is None:
            kept.fail(WorkerError(f"the endpoint {admission.endpoint} is not there any more"))
            return
        end_s = asyncio.get_running_loop().time() + admission.left_s(Instant.now())
        try:
            await kept.begin(await make(admission.body, kept.ticket), until_s=end_s)
        except LlamaclustError as error:
            kept.fail(error)
        except Exception:  # noqa: BLE001  the others are restored all the same
            _log.exception("request %s is not restored", kept.ticket.id)
            kept.fail(WorkerError("the request could not be restored; the coordinator's log says more"))
