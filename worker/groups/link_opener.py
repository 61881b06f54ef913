"""Opens a member's links to the other members of its group, as ordered by the coordinator."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TypeVar

from llamaclust.core.addresses import split_address
from llamaclust.core.errors import DeadlineError, LlamaclustError, UsageError
from llamaclust.kernels._native import Link, LinkError, Links, TlsSettings, tls_library
from llamaclust.wire.control.groups import GroupOrder
from llamaclust.wire.rpc.deadlines import deadline
from llamaclust.wire.rpc.unix_streams import PREFIX
from llamaclust.wire.security.certificate_names import Principal
from llamaclust.wire.security.credentials import Credentials, Identity, check_address
from llamaclust.worker.groups.handshakes import MOST_HANDSHAKES, Handshakes
from llamaclust.worker.groups.listener import Hello, LinkListener

OPEN_S = 30.0
ANSWER_S = 2.5
_CONNECT_S = 4.0
"""Seconds after which a connection attempt ends, and the next address of the same host is tried."""
_HANDSHAKE_S = 5.0
_RETRY_S = 0.1


_Result = TypeVar("_Result")


class MemberLostError(LlamaclustError):
    """A member of a group cannot be reached, or another process answers in its place. `worker` names the member."""


class LinkOpener:
    """Opens a member's links to its group. Connects to members with lower numbers. The other members connect to it."""

    def __init__(self, order: GroupOrder, credentials: Credentials, listener: LinkListener) -> None:
        self._order, self._credentials, self._listener = order, credentials, listener
        for place in self._peers():
            check_address(order.members[place].address, credentials)
        if isinstance(credentials, Identity) and not tls_library():
            raise UsageError("groups over several machines need OpenSSL, but this llamaclust was built without it")
        self._failures: dict[int, str] = {}
        self._linked: set[int] = set()
        self._unreached_s: dict[int, float] = {}  # Since when a member cannot be reached, by member number.
        # Separate threads, so that no other work delays a handshake.
        self._threads = ThreadPoolExecutor(MOST_HANDSHAKES * len(order.members), "links")

    async def open(self, gather_s: float, seconds: float = OPEN_S, answer_s: float = ANSWER_S) -> Links:
        """Opens the links to all other members. Can be called once. Raises MemberLostError if a link takes too long."""
        tasks = {place: asyncio.create_task(self._link(place, seconds)) for place in self._peers()}
        try:
            await asyncio.gather(*tasks.values())
        finally:
            for task in tasks.values():
                task.cancel()
            self._threads.shutdown(wait=False)
        links = [tasks[place].result() if place in tasks else None for place in range(len(self._order.members))]
        return Links(self._order.member, links, gather_s, answer_s)

    @property
    def missing(self) -> tuple[str, str] | None:
        place = next((place for place in self._peers() if place not in self._linked), None)
        if place is None:
            return None
        member = self._order.members[place]
        reason = self._failures.get(place, "it has not connected")
        return member.worker, f"no link to worker {member.worker} at {member.address}: {reason}"

    def unreached(self, seconds: float) -> list[tuple[str, str]]:
        """Returns (worker, reason) for each member that has accepted no connection for `seconds` seconds."""
        now_s = asyncio.get_running_loop().time()
        places = [place for place, since_s in self._unreached_s.items() if now_s - since_s >= seconds]
        members = [(place, self._order.members[place]) for place in places]
        return [
            (member.worker, self._failures.get(place, f"no connection to {member.address} is accepted"))
            for place, member in members
        ]

    def _peers(self) -> list[int]:
        return [place for place in range(len(self._order.members)) if place != self._order.member]

    async def _link(self, place: int, seconds: float) -> Link:
        member = self._order.members[place]
        try:
            async with deadline(f"a link to worker {member.worker} at {member.address}", seconds):
                link = await (self._connect(place) if place < self._order.member else self._accept(place))
                self._linked.add(place)
                return link
        except DeadlineError as late:
            reason = f"; last: {self._failures[place]}" if place in self._failures else ""
            raise MemberLostError(f"{late}{reason}", worker=member.worker) from late

    async def _connect(self, place: int) -> Link:
        """Connects to a member. Retries until the member accepts, because the member may not know the group yet."""
        loop = asyncio.get_running_loop()
        own, theirs = self._hello(self._order.member, place), self._hello(place, self._order.member)
        while True:
            self._unreached_s.setdefault(place, loop.time())
            try:
                with await self._connection_to(self._order.members[place].address) as connection:
                    self._unreached_s.pop(place, None)
                    await loop.sock_sendall(connection, own)
                    return await self._shaken(connection, place, own, theirs)
            except (OSError, DeadlineError) as error:  # LinkError is an OSError.
                self._failures[place] = str(error)
            await asyncio.sleep(_RETRY_S)

    async def _accept(self, place: int) -> Link:
        """Waits until the other member connects, and returns the link of the newest connection."""
        own, theirs = self._hello(self._order.member, place), self._hello(place, self._order.member)

        def failed(error: LinkError) -> None:
            self._failures[place] = str(error)
            self._listener.refusals.tell(f"a connection to {self._listener.address}: {error}")

        prove = partial(self._shaken, place=place, says=b"", hears=theirs)
        with Handshakes(prove, failed) as handshakes, self._listener.expecting(theirs, handshakes.take):
            while True:
                link = await handshakes.proven()
                try:
                    await self._in_thread(partial(link.greet, own, b"", _HANDSHAKE_S))
                except LinkError as error:
                    failed(error)
                else:
                    return link

    async def _shaken(self, connection: socket.socket, place: int, says: bytes, hears: bytes) -> Link:
        worker = self._order.members[place].worker
        tls = self._tls(worker, accepts=place > self._order.member)

        def opened() -> Link:  # `Link` owns the connection. If the thread never starts, `connection` still owns it.
            return Link(connection.detach(), f"worker {worker}", tls, says, hears, _HANDSHAKE_S)

        return await self._in_thread(opened)

    async def _in_thread(self, call: Callable[[], _Result]) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    def _hello(self, sender: int, receiver: int) -> bytes:
        return Hello(self._order.group_id, sender, receiver).encode()

    def _tls(self, worker: str, accepts: bool) -> TlsSettings | None:
        own = self._credentials
        if not isinstance(own, Identity):
            return None
        host = Principal(worker).host(own.cluster)
        return TlsSettings(own.ca, own.pair.certificate, own.pair.private_key, host, accepts)

    async def _connection_to(self, address: str) -> socket.socket:
        if address.startswith(PREFIX):
            path = address.removeprefix(PREFIX)
            return await _connected(socket.AF_UNIX, path, path)
        find = partial(socket.getaddrinfo, *split_address(address), type=socket.SOCK_STREAM)
        *others, last = await self._in_thread(find)
        for family, _, _, _, place in others:
            with suppress(OSError, DeadlineError):
                return await _connected(family, place, str(place[0]))
        return await _connected(last[0], last[4], str(last[4][0]))


async def _connected(family: int, place: object, name: str) -> socket.socket:
    connection = socket.socket(family)
    try:
        connection.setblocking(False)
        async with deadline(f"a connection to {name}", _CONNECT_S):
            await asyncio.get_running_loop().sock_connect(connection, place)  # type: ignore[arg-type]  # any family's
    except BaseException:
        connection.close()
        raise
    return connection
