"""The replies that are kept, by their ids and their clients' names, within bounds."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from enum import Enum, auto

from llamaclust.cluster.api.errors import HttpError
from llamaclust.cluster.api.json_parts import json_size
from llamaclust.cluster.api.replies.kept_reply import KeptReply
from llamaclust.cluster.api.replies.ticket import Ticket
from llamaclust.cluster.api.settings import ApiSettings
from llamaclust.cluster.state.journal import Journal
from llamaclust.cluster.text.owner import current_owner
from llamaclust.core.sharing.shares import fits
from llamaclust.wire.rpc.task_set import TaskSet


class _Name(Enum):
    """Kinds of names that clients give. In a path, a conversation is found first."""

    CONVERSATION = auto()
    IDEMPOTENCY_KEY = auto()


@dataclass(frozen=True, slots=True)
class _Entry:
    kept: KeptReply
    owner: str  # whose share it is in
    path: str  # of its endpoint
    digest: bytes  # of its request
    body_bytes: int

    @property
    def held_bytes(self) -> int:
        """Of the reply and, for the journal, of the request."""
        return self.kept.held_bytes + self.body_bytes


class ReplyCache:
    """Use from one event loop; `aclose` it, which ends them."""

    def __init__(self, settings: ApiSettings, journal: Journal | None) -> None:
        self._settings = settings
        self._journal = journal
        self._entries: dict[str, _Entry] = {}
        self._ids: dict[tuple[str, _Name, str], str] = {}  # by owner and name
        self._held_bytes: Counter[str] = Counter()  # by owner
        self._replies: Counter[str] = Counter()  # likewise
        self._ending = TaskSet()

    def add(
        self, ticket: Ticket, path: str, body: bytes, *, is_streamed: bool, is_background: bool = False
    ) -> KeptReply:
        """HttpError where the current owner has no room."""
        owner = current_owner.get()
        body_bytes = len(body) + (json_size(ticket.earlier.messages) if ticket.earlier.messages else 0)
        self._make_room(owner, body_bytes)
        kept = KeptReply(ticket, self._settings, self, is_streamed=is_streamed, is_background=is_background)
        self._entries[ticket.id] = _Entry(kept, owner, path, _digest(path, body), body_bytes)
        self._held_bytes[owner] += body_bytes
        self._replies[owner] += 1
        for name in _names(ticket):
            self._ids[name] = ticket.id
        return kept

    def path_of(self, kept: KeptReply) -> str:
        """Of its endpoint; "" once it is removed."""
        entry = self._entries.get(kept.ticket.id)
        return "" if entry is None else entry.path

    def remove(self, kept: KeptReply) -> None:
        ticket = kept.ticket
        if (entry := self._entries.pop(ticket.id, None)) is not None:
            self._held_bytes[entry.owner] -= entry.held_bytes
            self._replies[entry.owner] -= 1
            if not self._replies[entry.owner]:
                del self._replies[entry.owner], self._held_bytes[entry.owner]
        for name in _names(ticket):
            if self._ids.get(name) == ticket.id:
                del self._ids[name]
        if self._journal is not None:
            self._journal.end(ticket.id)

    def sent(self, kept: KeptReply) -> None:
        """A connection took all of it: a later coordinator computes it only for a client that comes back."""
        if self._journal is not None:
            self._journal.sent(kept.ticket.id)

    async def forget(self, kept: KeptReply) -> None:
        """Ends it, and removes it."""
        self.remove(kept)
        await kept.aclose()

    def stop(self) -> None:
        """The coordinator ends, and what is not complete goes on with the next one."""
        for entry in self._entries.values():
            entry.kept.stop()

    async def aclose(self) -> None:
        for entry in tuple(self._entries.values()):
            await self.forget(entry.kept)
        await self._ending.close()

    def expired(self, kept: KeptReply) -> None:
        """See `ReplyOwner`."""
        self._ending.start(self.forget(kept))

    def completed(self, kept: KeptReply) -> None:
        """See `ReplyOwner`. A later coordinator computes it again where its client asks for it."""
        if self._journal is not None:
            self._journal.completed(kept.ticket.id)

    def grew(self, kept: KeptReply, more_bytes: int) -> None:
        """See `ReplyOwner`. Where an owner's are too much, its complete ones that are not read give way; then the
        largest fail of those that run, first those that are not read, of the owner with the most."""
        if (entry := self._entries.get(kept.ticket.id)) is None:
            return
        self._held_bytes[entry.owner] += more_bytes
        self._evict(entry.owner)
        while (owner := self._largest_owner()) is not None:
            running = [other for other in self._of(owner) if other.is_running and other.held_bytes]
            largest = max(running, key=lambda other: (not other.is_read, other.held_bytes), default=None)
            if largest is None:
                return
            most = self._settings.max_kept_bytes >> 20
            what = f"kept replies are larger than {most} MiB together, and this one was large and not read"
            largest.fail(HttpError(500, "reply_too_large", f"{what}; read replies sooner, or ask for less at once"))

    def named(self, owner: str, name: str) -> KeptReply | None:
        """By its id, the id with a prefix as in a reply, or its client's name for it."""
        named = (self._ids.get((owner, kind, name), "") for kind in _Name)
        for request_id in (name.replace("_", "-").rpartition("-")[2], *named):
            entry = self._entries.get(request_id)
            if entry is not None and entry.kept.ticket.identity.owner == owner:
                return entry.kept
        return None

    def in_conversation(self, ticket: Ticket) -> KeptReply | None:
        """The conversation's newest."""
        name = (ticket.identity.owner, _Name.CONVERSATION, ticket.identity.conversation)
        entry = self._entries.get(self._ids.get(name, ""))
        return None if entry is None else entry.kept

    def same(self, ticket: Ticket, path: str, body: bytes) -> KeptReply | None:
        """The reply to the same request, sent before. HttpError where its idempotency key was another request's."""
        owner, key = ticket.identity.owner, ticket.identity.idempotency_key
        entry = self._entries.get(self._ids.get((owner, _Name.IDEMPOTENCY_KEY, key), "")) if key else None
        if entry is None:
            return None
        if entry.digest != _digest(path, body):
            raise HttpError(422, "idempotency_key_reused", f"Idempotency-Key {key!r} came with another request before")
        return entry.kept

    def _make_room(self, owner: str, body_bytes: int) -> None:
        """For one more. HttpError where those that do not give way are too much."""
        self._evict(owner, body_bytes, 1)
        if not self._has_room(owner, body_bytes, 1):
            what = f"{self._replies[owner]} kept replies of {self._held_bytes[owner] >> 20} MiB"
            raise HttpError(503, "server_busy", f"the server is busy with {what}; try again", {"Retry-After": "5"})

    def _evict(self, owner: str, more_bytes: int = 0, more_replies: int = 0) -> None:
        """Replies of the owner that are complete or postponed, and not read, give way as needed, the oldest first."""
        if self._has_room(owner, more_bytes, more_replies):
            return
        for kept in self._of(owner):
            if kept.gives_way:
                self.remove(kept)
                self._ending.start(kept.aclose())  # its timer would hold it for as long as it is kept
                if self._has_room(owner, more_bytes, more_replies):
                    return

    def _has_room(self, owner: str, more_bytes: int = 0, more_replies: int = 0) -> bool:
        """Kept replies of one owner take no room from others, see `fits`."""
        settings = self._settings
        own_bytes, held_bytes = self._held_bytes[owner], self._held_bytes.total()
        own, held = self._replies[owner], len(self._entries)
        return fits(own_bytes, held_bytes, settings.max_kept_bytes, more_bytes) and fits(
            own, held, settings.max_kept_replies, more_replies
        )

    def _largest_owner(self) -> str | None:
        """The owner with the most bytes, where these, or those of all owners together, are too many."""
        most = self._settings.max_kept_bytes
        owner = max(self._held_bytes, key=self._held_bytes.__getitem__, default="")
        return owner if self._held_bytes[owner] > most or self._held_bytes.total() > 2 * most else None

    def _of(self, owner: str) -> list[KeptReply]:
        """The oldest first."""
        return [entry.kept for entry in self._entries.values() if entry.owner == owner]


def _names(ticket: Ticket) -> list[tuple[str, _Name, str]]:
    identity = ticket.identity
    given = ((_Name.CONVERSATION, identity.conversation), (_Name.IDEMPOTENCY_KEY, identity.idempotency_key))
    return [(identity.owner, kind, name) for kind, name in given if name]


def _digest(path: str, body: bytes) -> bytes:
    return hashlib.sha256(path.encode() + b"\n" + body).digest()
