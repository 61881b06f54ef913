"""The replies that are kept, by their ids and their clients' names, within bounds."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import Enum, auto

from llamaclust.cluster.api.errors import HttpError
from llamaclust.cluster.api.replies.kept import KeptReply
from llamaclust.cluster.api.replies.ticket import Ticket
from llamaclust.cluster.api.settings import ApiSettings
from llamaclust.cluster.state.journal import Journal
from llamaclust.wire.rpc.task_set import TaskSet


class _Name(Enum):
    """Kinds of names that clients give. In a path, a conversation is found first."""

    CONVERSATION = auto()
    IDEMPOTENCY_KEY = auto()


@dataclass(frozen=True, slots=True)
class _Entry:
    kept: KeptReply
    digest: bytes  # of its request
    body_bytes: int

    @property
    def held_bytes(self) -> int:
        """Of the reply and, for the journal, of the request."""
        return self.kept.held_bytes + self.body_bytes


class KeptReplies:
    """Use from one event loop; `aclose` it, which ends them."""

    def __init__(self, settings: ApiSettings, journal: Journal | None) -> None:
        self._settings = settings
        self._journal = journal
        self._entries: dict[str, _Entry] = {}
        self._ids: dict[tuple[str, _Name, str], str] = {}  # by owner and name
        self._ending = TaskSet()

    def add(self, ticket: Ticket, path: str, body: bytes, *, is_streamed: bool) -> KeptReply:
        """HttpError where there is no room."""
        self._make_room()
        kept = KeptReply(ticket, self._settings, self._expire, is_streamed=is_streamed)
        self._entries[ticket.id] = _Entry(kept, _digest(path, body), len(body))
        for name in _names(ticket):
            self._ids[name] = ticket.id
        return kept

    def remove(self, kept: KeptReply) -> None:
        ticket = kept.ticket
        self._entries.pop(ticket.id, None)
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

    async def aclose(self) -> None:
        for entry in tuple(self._entries.values()):
            await self.forget(entry.kept)
        await self._ending.close()

    def _expire(self, kept: KeptReply) -> None:
        self._ending.start(self.forget(kept))

    def named(self, owner: str, name: str) -> KeptReply | None:
        """By its id, the id with a prefix as in a reply, or its client's name for it."""
        named = (self._ids.get((owner, kind, name), "") for kind in _Name)
        for request_id in (name.rpartition("-")[2], *named):
            entry = self._entries.get(request_id)
            if entry is not None and entry.kept.ticket.owner == owner:
                return entry.kept
        return None

    def in_conversation(self, ticket: Ticket) -> KeptReply | None:
        """The conversation's newest."""
        entry = self._entries.get(self._ids.get((ticket.owner, _Name.CONVERSATION, ticket.conversation), ""))
        return None if entry is None else entry.kept

    def same(self, ticket: Ticket, path: str, body: bytes) -> KeptReply | None:
        """The reply to the same request, sent before. HttpError where its idempotency key was another request's."""
        key = ticket.idempotency_key
        entry = self._entries.get(self._ids.get((ticket.owner, _Name.IDEMPOTENCY_KEY, key), "")) if key else None
        if entry is None:
            return None
        if entry.digest != _digest(path, body):
            raise HttpError(422, "idempotency_key_reused", f"Idempotency-Key {key!r} came with another request before")
        return entry.kept

    def _make_room(self) -> None:
        """Replies that are complete or postponed, and not read, give way. HttpError where the others are too much."""
        entries = list(self._entries.values())
        held = sum(entry.held_bytes for entry in entries)
        for entry in [entry for entry in entries if entry.kept.gives_way]:
            if not self._is_full(held):
                break
            held -= entry.held_bytes
            self.remove(entry.kept)
        if self._is_full(held):
            what = f"{len(self._entries)} kept replies of {held >> 20} MiB"
            raise HttpError(503, "server_busy", f"the server is busy with {what}; try again", {"Retry-After": "5"})

    def _is_full(self, held_bytes: int) -> bool:
        settings = self._settings
        return held_bytes > settings.max_kept_bytes or len(self._entries) >= settings.max_kept_replies


def _names(ticket: Ticket) -> list[tuple[str, _Name, str]]:
    given = ((_Name.CONVERSATION, ticket.conversation), (_Name.IDEMPOTENCY_KEY, ticket.idempotency_key))
    return [(ticket.owner, kind, name) for kind, name in given if name]


def _digest(path: str, body: bytes) -> bytes:
    return hashlib.sha256(path.encode() + b"\n" + body).digest()
