"""Replies that an earlier coordinator did not complete: computed again for clients that come back.

A request may be what ended the coordinator. It is counted how many times a request was begun again without a token that
was not known before; what came no further once is begun behind the others, alone until it has progressed, so that
requests beside it are not taken for the cause; and it fails after some times.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from llamaclust.cluster.engine.trace_context import TraceContext, current_trace
from llamaclust.cluster.front.errors import HttpError
from llamaclust.cluster.front.http.sse import first_of
from llamaclust.cluster.front.replies.kept_reply import KeptReply
from llamaclust.cluster.front.replies.reply import Computation, MakeReply
from llamaclust.cluster.front.replies.reply_cache import ReplyCache
from llamaclust.cluster.front.replies.ticket import Constraint, EarlierChat, Restoration, Ticket
from llamaclust.cluster.front.text.sharing import current_owner
from llamaclust.cluster.state.adapters import ServedAdapters
from llamaclust.cluster.state.journal import Journal
from llamaclust.cluster.state.journal_records import Admission, Instant, OpenRequest
from llamaclust.core.errors import LlamaclustError, RequestFailedError, WorkerError
from llamaclust.wire.rpc.task_set import TaskSet

_MOST_RESTORES = 4
_ALONE_S = 10.0
"""Until the next one begins, where a request does not progress."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Restored:
    """A request with the reply that is kept for its client."""

    request: OpenRequest
    kept: KeptReply
    restoration: Restoration

    @property
    def id(self) -> str:
        return self.kept.ticket.id


class Restoring:
    """Use from one event loop; `aclose` it."""

    def __init__(self, durability: Durability, cache: ReplyCache, endpoints: Mapping[str, MakeReply]) -> None:
        self._journal = durability.journal
        self._cache = cache
        self._endpoints = endpoints
        self._tasks = TaskSet()

    async def restore(self, requests: Sequence[OpenRequest]) -> None:
        """They can be found at once; their computation begins in the order of their admission. Those that were sent are
        computed where a client has not read them to the end. The journal has them already."""
        added = [self._added(request) for request in sorted(requests, key=lambda request: request.is_sent)]
        begun = []
        for restored in added:
            if restored is None:
                continue
            if restored.request.restores >= _MOST_RESTORES:
                self._give_up(restored)
            elif restored.request.is_sent:
                restored.kept.postpone(partial(self._begin_postponed, restored))
            else:
                begun.append(restored)
        if begun:
            _log.info("requests restored from the journal", extra={"requests": len(begun)})
            self._tasks.start(self._begin_all(begun))

    async def aclose(self) -> None:
        await self._tasks.close()

    def _added(self, request: OpenRequest) -> _Restored | None:
        """None where there is no room."""
        admission, journal = request.admission, self._journal
        restoration = Restoration(journal, admission.id, admission.adapters)
        ticket = Ticket(
            identity=admission.identity,
            answered=request.answered,
            journal=journal,
            restoration=restoration,
            constraint=Constraint(admission.has_grammar),
            earlier=EarlierChat(admission.earlier),
        )
        try:
            kind = {"is_streamed": admission.is_streamed, "is_background": admission.is_background}
            kept = self._cache.add(ticket, admission.endpoint, admission.body, **kind)
        except HttpError as full:
            _log.warning("request %s is not restored: %s", ticket.id, full)
            journal.end(ticket.id)
            return None
        return _Restored(request, kept, restoration)

    def _give_up(self, restored: _Restored) -> None:
        error = RequestFailedError(
            f"the coordinator ended {restored.request.restores} times while it computed this request, at last alone"
        )
        _log.warning("request %s: %s", restored.id, error)
        restored.kept.fail(error)

    def _begin_postponed(self, restored: _Restored) -> None:
        self._tasks.start(self._begin_alone(restored))

    async def _begin_all(self, begun: list[_Restored]) -> None:
        together = [restored for restored in begun if not restored.request.restores]
        await self._journal.begin_restored({restored.id: 1 for restored in together})
        for restored in together:
            await self._attempt(self._begin(restored))
        alone = [restored for restored in begun if restored.request.restores]
        for restored in sorted(alone, key=lambda restored: restored.request.restores):
            await self._attempt(self._begin_alone(restored))
            with suppress(TimeoutError):
                async with asyncio.timeout(_ALONE_S):
                    await first_of(restored.restoration.progressed(), restored.kept.log.wait_over())

    async def _attempt(self, beginning: Coroutine[Any, Any, None]) -> None:
        """One that is tried again, because the machine is busy, does not hold up the others for long."""
        await asyncio.wait([self._tasks.start(beginning)], timeout=_ALONE_S)

    async def _begin_alone(self, restored: _Restored) -> None:
        await self._journal.begin_restored({restored.id: restored.request.restores + 1})
        await self._begin(restored)

    async def _begin(self, restored: _Restored) -> None:
        """In a task of its own: its sequences belong to the trace of the request that was admitted."""
        kept, admission = restored.kept, restored.request.admission
        identity = admission.identity
        current_owner.set(identity.client)
        current_trace.set(TraceContext.parse([identity.traceparent], [identity.tracestate]))
        endpoint = self._endpoints.get(admission.endpoint)
        if endpoint is None:
            kept.fail(WorkerError(f"the endpoint {admission.endpoint} is not there any more"))
            return
        end_s = asyncio.get_running_loop().time() + admission.left_s(Instant.now())
        try:
            reply = await endpoint(admission.body, kept.ticket)
            await kept.begin(Computation(reply, kept.ticket), until_s=end_s)
        except LlamaclustError as error:
            kept.fail(error)
        except Exception:  # noqa: BLE001  the others are restored all the same
            _log.exception("request %s is not restored", kept.ticket.id)
            kept.fail(WorkerError("the request could not be restored; the coordinator's log says more"))


@dataclass(frozen=True, slots=True)
class Durability:
    """Where admissions are written, and what they need to be valid for a later coordinator."""

    journal: Journal
    served: str  # digest of the model and its settings
    request_s: float
    adapters: ServedAdapters = field(default_factory=ServedAdapters)

    def admit(
        self, ticket: Ticket, endpoint: str, body: bytes, *, is_streamed: bool, is_background: bool
    ) -> Awaitable[None]:
        """See `Journal.admit`."""
        admission = Admission(
            identity=ticket.identity,
            endpoint=endpoint,
            body=body,
            admitted=Instant.now(),
            limit_s=self.request_s,
            served=self.served,
            is_streamed=is_streamed,
            is_background=is_background,
            has_grammar=bool(ticket.constraint.is_used),
            earlier=ticket.earlier.messages,
            adapters=self.adapters.marks(ticket.adapters),
        )
        return self.journal.admit(admission)
