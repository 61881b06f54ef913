"""The replies that are kept, by their ids and their clients' names, within bounds."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum, auto

from llamaclust.cluster.front.errors import HttpError
from llamaclust.cluster.front.json_text import json_size
from llamaclust.cluster.front.replies.kept_reply import KeptReply
from llamaclust.cluster.front.replies.ticket import Ticket
from llamaclust.cluster.front.settings import ApiSettings
from llamaclust.cluster.state.journal import Journal
from llamaclust.core.sharing.shares import fits
from llamaclust.wire.rpc.task_set import TaskSet


class _Name(Enum):
    """Kinds of names that clients give. In a path, a conversation is found first."""

    CONVERSATION = auto()
    IDEMPOTENCY_KEY = auto()


@dataclass(frozen=True, slots=True)
class _Entry:
    kept: KeptReply
    path: str  # of its endpoint
    digest: bytes  # of its request
    body_bytes: int

    @property
    def client(self) -> str:
        """Has the share that it is in."""
        return self.kept.ticket.identity.client

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
        self._held_bytes: Counter[str] = Counter()  # by client
        self._replies: Counter[str] = Counter()  # likewise
        self._ending = TaskSet()

    def add(
        self, ticket: Ticket, path: str, body: bytes, *, is_streamed: bool, is_background: bool = False
    ) -> KeptReply:
        """HttpError where the client has no room."""
        client = ticket.identity.client
        body_bytes = len(body) + (json_size(ticket.earlier.messages) if ticket.earlier.messages else 0)
        self._make_room(client, body_bytes)
        kept = KeptReply(ticket, self._settings, self, is_streamed=is_streamed, is_background=is_background)
        self._entries[ticket.id] = _Entry(kept, path, _digest(path, body), body_bytes)
        self._held_bytes[client] += body_bytes
        self._replies[client] += 1
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
            self._held_bytes[entry.client] -= entry.held_bytes
            self._replies[entry.client] -= 1
            if not self._replies[entry.client]:
                del self._replies[entry.client], self._held_bytes[entry.client]
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
        """See `ReplyOwner`. Where a client's replies, or those of all, are too much, complete ones that are not read
        give way; then the largest fail of those that run, first those that are not read. Of all clients' replies, those
        of the client with the most go first."""
        if (entry := self._entries.get(kept.ticket.id)) is None:
            return
        self._held_bytes[entry.client] += more_bytes
        if more_bytes > 0:
            while (large := self._too_large(entry.client)) and (
                self._evict(large, self._held_bytes) or self._fail(large)
            ):
                pass

    def _too_large(self, client: str) -> list[_Entry]:
        """The replies of which some have to go: the client's, or all."""
        most = self._settings.max_kept_bytes
        if self._held_bytes[client] > most:
            clients: Collection[str] = (client,)
        elif self._held_bytes.total() > 2 * most:
            clients = self._held_bytes
        else:
            return []
        return [entry for entry in self._of(clients) if entry.held_bytes]

    def _evict(self, entries: Iterable[_Entry], held: Mapping[str, int]) -> bool:
        """Removes the first that gives way, of the client for which most is held; False where none does."""
        giving = (entry for entry in entries if entry.kept.gives_way)
        entry = max(giving, key=lambda entry: held[entry.client], default=None)
        if entry is not None:
            self.remove(entry.kept)
            self._ending.start(entry.kept.aclose())  # its timer would hold it for as long as it is kept
        return entry is not None

    def _fail(self, entries: Iterable[_Entry]) -> bool:
        """Ends one that runs; False where none does."""
        running = [entry for entry in entries if entry.kept.is_running and entry.kept.held_bytes]
        largest = max(running, key=self._failure_rank, default=None)
        if largest is not None:
            most = self._settings.max_kept_bytes >> 20
            what = f"kept replies are larger than {most} MiB together, and this one was large and not read"
            error = HttpError(500, "reply_too_large", f"{what}; read replies sooner, or ask for less at once")
            largest.kept.fail(error)
        return largest is not None

    def _failure_rank(self, entry: _Entry) -> tuple[int, bool, int]:
        """The highest fails first."""
        return self._held_bytes[entry.client], not entry.kept.is_read, entry.kept.held_bytes

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

    def _make_room(self, client: str, body_bytes: int) -> None:
        """Makes room for one more reply, see `fits`: complete replies of this client, or of clients with more, give
        way as needed. HttpError if that is not enough."""
        settings = self._settings
        for held, room, more in (
            (self._held_bytes, settings.max_kept_bytes, body_bytes),
            (self._replies, settings.max_kept_replies, 1),
        ):
            while not fits(own := held[client], held.total(), room, more):
                takes_own = own + more > room
                larger = {other for other, count in held.items() if count > own and not takes_own}
                if not self._evict(self._of({client, *larger}), held):
                    what = f"{self._replies[client]} kept replies of {self._held_bytes[client] >> 20} MiB"
                    busy = f"the server is busy with {what}; try again"
                    raise HttpError(503, "server_busy", busy, {"Retry-After": "5"})

    def _of(self, clients: Collection[str]) -> list[_Entry]:
        """The oldest first."""
        return [entry for entry in self._entries.values() if entry.client in clients]


def _names(ticket: Ticket) -> list[tuple[str, _Name, str]]:
    identity = ticket.identity
    given = ((_Name.CONVERSATION, identity.conversation), (_Name.IDEMPOTENCY_KEY, identity.idempotency_key))
    return [(identity.owner, kind, name) for kind, name in given if name]


def _digest(path: str, body: bytes) -> bytes:
    return hashlib.sha256(path.encode() + b"\n" + body).digest()
