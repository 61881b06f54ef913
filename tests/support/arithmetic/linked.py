"""Links between members of a group over loopback, and a peer whose frames a test writes itself."""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

from llamaclust.cluster.membership.authority import Authority
from llamaclust.kernels._native import Link, Links, TlsSettings
from llamaclust.wire.security.certificate_names import Principal

DEADLINE_S = 60.0
HEADER = struct.Struct("<QQII")  # epoch, step, number of the gather, bytes
STEP = 2**32 - 1
"""The gather number that marks the message of a step."""
GREETING = b"hello"


def connected() -> tuple[socket.socket, socket.socket]:
    """Returns both ends of a connection over loopback."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        first = socket.create_connection(listener.getsockname())
        return first, listener.accept()[0]


def link_to(number: int, end: socket.socket, deadline_s: float = DEADLINE_S, tls: TlsSettings | None = None) -> Link:
    """Opens a link; waits for the peer's greeting."""
    return Link(end.detach(), f"worker {number}", tls, GREETING, GREETING, deadline_s)


def tls_settings(trust: Authority, own: int, peer: int) -> TlsSettings:
    """Returns the TLS settings of one member for its connection to another."""
    identity = trust.identity(Principal(f"w{own}"))
    host = Principal(f"w{peer}").host(identity.cluster)
    return TlsSettings(identity.ca, identity.pair.certificate, identity.pair.private_key, host, own < peer)


Ends = Sequence[socket.socket | None]
"""A member's connections, in the order of the members at the other ends."""


def meshed(members: int) -> list[Ends]:
    """Connects all members with each other and returns each member's ends."""
    ends: list[list[socket.socket | None]] = [[None] * members for _ in range(members)]
    for a in range(members):
        for b in range(a):
            ends[a][b], ends[b][a] = connected()
    return [*ends]


def links_of(own: int, ends: Ends, deadline_s: float = DEADLINE_S, trust: Authority | None = None) -> Links:
    """Opens a member's links and waits for all greetings; uses TLS if an authority is given."""

    def link(number: int, end: socket.socket) -> Link:
        return link_to(number, end, deadline_s, None if trust is None else tls_settings(trust, own, number))

    links = [None if end is None else link(number, end) for number, end in enumerate(ends)]
    return Links(own, links, deadline_s)


def linked(members: int, deadline_s: float = DEADLINE_S, trust: Authority | None = None) -> list[Links]:
    """Returns the links of each member in a group within this process."""
    with ThreadPoolExecutor(members) as pool:
        return list(pool.map(lambda own, ends: links_of(own, ends, deadline_s, trust), range(members), meshed(members)))


class HandPeer:
    """A peer whose bytes a test writes and reads itself; `links` are those of the other member, `own`."""

    def __init__(self, deadline_s: float, own: int = 0) -> None:
        ours, self.end = connected()
        self.end.sendall(GREETING)
        link = link_to(1 - own, ours)
        self.links = Links(own, [None, link] if own == 0 else [link, None], deadline_s)
        self.end.settimeout(DEADLINE_S)
        assert self.receive(len(GREETING)) == GREETING

    def receive(self, count: int) -> bytes:
        data = b""
        while len(data) < count and (piece := self.end.recv(count - len(data))):
            data += piece
        return data

    def has_ended(self) -> bool:
        """Returns true if the other side closes the connection after its last bytes, before the deadline."""
        with closing(self.end):
            try:
                while self.end.recv(1 << 16):
                    pass
            except ConnectionResetError:
                return True
            except TimeoutError:
                return False
        return True


def frame(rows: bytes, epoch: int = 1, step: int = 2, number: int = 0, size: int | None = None) -> bytes:
    return HEADER.pack(epoch, step, number, len(rows) if size is None else size) + rows


def begin(links: Sequence[Links], step: int, epoch: int = 1) -> None:
    for each in links:
        each.begin(epoch, step)
