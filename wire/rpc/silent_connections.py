"""Connections to a port that have not shown a certificate: bounded in all and by host, the oldest are closed first.

gRPC accepts connections itself and has no bound for these; it sees the end of one that is shut down here.
"""

from __future__ import annotations

import os
import socket
import stat
from collections import Counter
from collections.abc import Container, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

MAX_SILENT = 64
MAX_SILENT_OF_HOST = 32
_FILES = Path("/dev/fd")

_Caller = tuple[str, int]
"""Host and port of the other end."""


@dataclass(frozen=True, slots=True)
class _Silent:
    """An open connection; `looks`: how often it was seen without a call."""

    descriptor: int  # a copy
    caller: _Caller
    looks: int


class SilentConnections:
    """Of the port of one server."""

    def __init__(self) -> None:
        self._looks: dict[_Caller, int] = {}

    def close_excess(self, port: int, callers: Container[str]) -> tuple[int, int]:
        """Closes those beyond the bounds that an earlier look has seen too, so that a new one has time to show its
        certificate. `callers`: the other ends of connections with calls, as gRPC names them. Returns how many were
        closed, and how many are left."""
        silent = sorted(self._silent(port, callers), key=lambda connection: -connection.looks)
        self._looks = {connection.caller: connection.looks for connection in silent}
        of_host, closed = Counter(connection.caller[0] for connection in silent), 0
        for connection in silent:
            host = connection.caller[0]
            crowded = len(silent) - closed > MAX_SILENT and of_host[host] == max(of_host.values())
            if connection.looks > 1 and (of_host[host] > MAX_SILENT_OF_HOST or crowded):
                of_host[host] -= 1
                closed += 1
                _shut_down(connection.descriptor)
            os.close(connection.descriptor)
        return closed, len(silent) - closed

    def _silent(self, port: int, callers: Container[str]) -> Iterator[_Silent]:
        for descriptor, caller in _connections(port):
            if any(name in callers for name in _names(*caller)):
                os.close(descriptor)
            else:
                yield _Silent(descriptor, caller, self._looks.get(caller, 0) + 1)


def _connections(port: int) -> Iterator[tuple[int, _Caller]]:
    """Copies of this process's connections at one of its ports, which the receiver closes."""
    for path in tuple(_FILES.iterdir()):
        with suppress(OSError):
            descriptor = int(path.name)
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                continue
            connection = socket.socket(fileno=os.dup(descriptor))
            try:
                is_ours = connection.family in (socket.AF_INET, socket.AF_INET6)
                if is_ours and connection.getsockname()[1] == port:
                    host, from_port = connection.getpeername()[:2]
                    yield connection.detach(), (str(host).removeprefix("::ffff:"), from_port)
            finally:
                connection.close()


def _shut_down(descriptor: int) -> None:
    with suppress(OSError):  # it has ended
        connection = socket.socket(fileno=descriptor)
        try:
            connection.shutdown(socket.SHUT_RDWR)
        finally:
            connection.detach()


def _names(host: str, port: int) -> tuple[str, ...]:
    return f"ipv4:{host}:{port}", f"ipv6:%5B{host}%5D:{port}", f"ipv6:[{host}]:{port}"
