"""A TCP connection between two hosts of a box, and measurements of it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from support.network.box import Host

_PORT = 5000
_DEADLINE_S = 20.0


@dataclass(frozen=True, slots=True)
class Conversation:
    caller: socket.socket
    called: socket.socket

    def round_trip_ms(self, trips: int) -> float:
        """Returns the fastest round trip of a message of 64 bytes, which busy processors lengthen least."""
        answering = threading.Thread(target=_echo, args=(self.called, trips))
        answering.start()
        took_ms = []
        for _ in range(trips):
            begun = time.perf_counter()
            self.caller.sendall(bytes(64))
            assert len(self.caller.recv(64)) == 64
            took_ms.append((time.perf_counter() - begun) * 1e3)
        answering.join(_DEADLINE_S)
        return min(took_ms)

    def megabits_per_second(self, size_bytes: int) -> float:
        """Returns the rate from the first received byte to the last."""
        sending = threading.Thread(target=self.caller.sendall, args=(bytes(size_bytes),))
        sending.start()
        left = size_bytes - len(self.called.recv(1))
        begun = time.perf_counter()
        while left > 0:
            left -= len(self.called.recv(1 << 20))
        took_s = time.perf_counter() - begun
        sending.join(_DEADLINE_S)
        return size_bytes * 8 / took_s / 1e6


def _echo(called: socket.socket, trips: int) -> None:
    for _ in range(trips):
        called.sendall(called.recv(64))


@contextmanager
def conversation(caller: Host, called: Host) -> Iterator[Conversation]:
    with called.listen(_PORT) as server, caller.connect(called, _PORT) as one, server.accept()[0] as other:
        for connection in (one, other):
            connection.settimeout(_DEADLINE_S)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield Conversation(one, other)


def hears(connection: socket.socket, within_s: float) -> bytes | None:
    """Returns data that arrives in time, or None; raises for a broken connection."""
    connection.settimeout(within_s)
    try:
        return connection.recv(1024)
    except TimeoutError:
        return None
