"""Keeps replies, within limits on memory and number, and finds them by id or by a name that the client gave."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

from llamaclust.cluster.front.errors import HttpError
from llamaclust.cluster.front.images.chat_images import journalled
from llamaclust.cluster.front.replies.kept_reply import KeptReply
from llamaclust.cluster.front.settings import ApiSettings
from llamaclust.cluster.state.journal import Journal
from llamaclust.cluster.state.journal_records import Instant, RequestContext
from llamaclust.core.errors import ClusterStoppingError
from llamaclust.core.sharing.shares import Shares
from llamaclust.wire.rpc.task_set import TaskSet

_Name = tuple[str, str, str]
"""A name that a client gave its reply: owner, kind of name, text."""
_CONVERSATION, _KEY = "conversation", "idempotency key"


@dataclass(frozen=True, slots=True)
class _Entry:
    kept: KeptReply
    digest: bytes  # Hash of the request if it has an idempotency key, otherwise empty.
    body_bytes: int

    @property
    def client(self) -> str:
        return self.kept.context.client

    @property
    def held_bytes(self) -> int:
        return self.kept.held_bytes + self.body_bytes


class ReplyCache:
    """All kept replies of an HTTP app. Not thread-safe: use it on one event loop. `aclose` ends all replies."""

    def __init__(self, settings: ApiSettings, journal: Journal | None = None) -> None:
        self.settings = settings
        self.journal = journal
        self._entries: dict[str, _Entry] = {}  # Keys are request ids, oldest first.
        self._ids: dict[_Name, str] = {}
        self._held_bytes = Shares(settings.max_kept_bytes)  # Bytes held, by client.
        # The same for streams that are kept only because the coordinator was restarted. Their number has no limit.
        self._stream_bytes = Shares(settings.max_kept_bytes)
        self._replies = Shares(settings.max_kept_replies)
        self._ending = TaskSet()

    def add(self, kept: KeptReply, body: bytes, earlier_bytes: int = 0) -> None:
        """Adds a reply. Raises HttpError (503) if no room is left. `earlier_bytes` is the size of `context.earlier`."""
        context, client = kept.context, kept.context.client
        body_bytes = len(body) + earlier_bytes + sum(map(len, context.images.values())) if context.is_kept else 0
        if context.is_kept:
            self._make_room(client, body_bytes)
            self._replies.take(client, 1)
        digest = _digest(context, body) if context.idempotency_key else b""
        self._entries[context.id] = _Entry(kept, digest, body_bytes)
        self._bytes_of(kept).take(client, body_bytes)
        for name in _names(context):
            self._ids[name] = context.id

    def remove(self, kept: KeptReply) -> None:
        context = kept.context
        if (entry := self._entries.pop(context.id, None)) is not None:
            self._bytes_of(kept).take(entry.client, -entry.held_bytes)
            if context.is_kept:
                self._replies.take(entry.client, -1)
        for name in _names(context):
            if self._ids.get(name) == context.id:
                del self._ids[name]
        if self.journal is not None:
            self.journal.end(context.id)

    async def forget(self, kept: KeptReply) -> None:
        self.remove(kept)
        await kept.aclose()

    async def left(self, kept: KeptReply, has_all: bool) -> None:
        """Handles the end of a client's connection. `has_all` is true if the client received the whole reply."""
        if self.journal is not None and (has_all or not kept.is_kept) and not kept.context.is_background:
            self.journal.sent(kept.context.id)
        if not kept.is_kept:
            await kept.aclose()

    def stop(self) -> None:
        """Ends all replies because the coordinator stops."""
        for entry in self._entries.values():
            entry.kept.end(ClusterStoppingError("the cluster is stopping"))

    async def aclose(self) -> None:
        for entry in tuple(self._entries.values()):
            await self.forget(entry.kept)
        await self._ending.close()

    # -- called by replies ---------------------------------------------------------------------------------------------

    def admit(self, kept: KeptReply, body: bytes) -> asyncio.Future[None]:
        assert self.journal is not None
        context, limit_s = kept.context, self.settings.request_s
        return self.journal.admit(replace(journalled(context, body), admitted=Instant.now(), limit_s=limit_s))

    def expired(self, kept: KeptReply) -> None:
        self._ending.start(self.forget(kept))

    def grew(self, kept: KeptReply, more_bytes: int) -> None:
        """Counts more bytes of a reply. Above the memory limits, evicts unused replies or ends running ones."""
        if (entry := self._entries.get(kept.context.id)) is None:
            return
        shares = self._bytes_of(kept)
        shares.take(entry.client, more_bytes)
        if more_bytes > 0:
            while (large := self._too_large(shares, entry)) and (
                self._evict(large, shares.held) or self._fail(large, shares.held)
            ):
                pass

    def _bytes_of(self, kept: KeptReply) -> Shares:
        return self._held_bytes if kept.context.is_kept else self._stream_bytes

    def _too_large(self, shares: Shares, grown: _Entry) -> list[_Entry]:
        held, most = shares.held, shares.room
        if held[grown.client] > most:
            clients: Collection[str] = (grown.client,)
        elif held.total() > 2 * most:
            clients = held
        else:
            return []
        return [entry for entry in self._of(clients, is_kept=grown.kept.context.is_kept) if entry.held_bytes]

    def _evict(self, entries: Iterable[_Entry], held: Mapping[str, int]) -> bool:
        """Removes an evictable reply of the client with the largest count in `held`. Returns False if there is none."""
        evictable = (entry for entry in entries if entry.kept.is_evictable)
        entry = max(evictable, key=lambda entry: held[entry.client], default=None)
        if entry is not None:
            self.remove(entry.kept)
            self._ending.start(entry.kept.aclose())  # Closing cancels the timer, which would keep the reply in memory.
        return entry is not None

    def _fail(self, entries: Iterable[_Entry], held: Mapping[str, int]) -> bool:
        running = [entry for entry in entries if entry.kept.is_running and entry.kept.held_bytes]
        largest = max(running, key=partial(_failure_rank, held), default=None)
        if largest is not None:
            most = self.settings.max_kept_bytes >> 20
            what = f"kept replies exceed {most} MiB together, and this reply was among the largest"
            error = HttpError(
                500, "reply_too_large", f"{what}; read replies sooner, or lower max_tokens, n or logprobs"
            )
            largest.kept.fail(error)
        return largest is not None

    # -- called by HTTP handlers ---------------------------------------------------------------------------------------

    def named(self, owner: str, name: str) -> KeptReply | None:
        """Finds a reply by id, conversation or idempotency key. The id may have a prefix, as in `resp_ID`."""
        request_id = name.replace("_", "-").rpartition("-")[2]
        for found in (request_id, *(self._ids.get((owner, kind, name), "") for kind in (_CONVERSATION, _KEY))):
            entry = self._entries.get(found)
            if entry is not None and entry.kept.context.owner == owner:
                return entry.kept
        return None

    def in_conversation(self, context: RequestContext) -> KeptReply | None:
        name = (context.owner, _CONVERSATION, context.conversation)
        entry = self._entries.get(self._ids.get(name, ""))
        return None if entry is None else entry.kept

    def same(self, context: RequestContext, body: bytes) -> KeptReply | None:
        """Returns the reply with the same idempotency key, or None. Raises HttpError if the requests differ."""
        key = context.idempotency_key
        entry = self._entries.get(self._ids.get((context.owner, _KEY, key), ""))
        if entry is None:
            return None
        if entry.digest != _digest(context, body):
            raise HttpError(
                422, "idempotency_key_reused", f"Idempotency-Key {key!r} was used for another request before"
            )
        return entry.kept

    def _make_room(self, client: str, body_bytes: int) -> None:
        """Evicts complete replies until a new reply of the client fits. Raises HttpError (503) if there is no room."""
        for shares, more in (self._held_bytes, body_bytes), (self._replies, 1):
            while not shares.fits(client, more):
                own = shares.held[client]
                takes_own = own + more > shares.room
                larger = {other for other, count in shares.held.items() if count > own and not takes_own}
                if not self._evict(self._of({client, *larger}), shares.held):
                    what = f"{self._replies.held[client]} kept replies of {self._held_bytes.held[client] >> 20} MiB"
                    busy = f"the server is busy with {what}; try again"
                    raise HttpError(503, "server_busy", busy, {"Retry-After": "5"})

    def _of(self, clients: Collection[str], *, is_kept: bool = True) -> list[_Entry]:
        entries = (entry for entry in self._entries.values() if entry.kept.context.is_kept == is_kept)
        return [entry for entry in entries if entry.client in clients]


def _failure_rank(held: Mapping[str, int], entry: _Entry) -> tuple[int, bool, int]:
    return held[entry.client], not entry.kept.is_read, entry.kept.held_bytes


def _names(context: RequestContext) -> Iterator[_Name]:
    for kind, text in ((_CONVERSATION, context.conversation), (_KEY, context.idempotency_key)):
        if text:
            yield context.owner, kind, text


def _digest(context: RequestContext, body: bytes) -> bytes:
    return hashlib.sha256(f"{context.served} {context.endpoint}\n".encode() + body).digest()
