"""Limits the number of connections to a port that have not shown a certificate, in total and for each host."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections import Counter
from collections.abc import Container, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from llamaclust.core.addresses import bounded_host

MAX_SILENT = 64
MAX_SILENT_OF_HOST = 32
_FILES = Path("/dev/fd")

_Caller = tuple[str, int]


@dataclass(frozen=True, slots=True)
class _Silent:
    descriptor: int  # May belong to another file by now, if the connection has ended.
    caller: _Caller
    looks: int

    @property
    def host(self) -> str:
        return bounded_host(self.caller[0])


class SilentConnections:
    def __init__(self) -> None:
        self._looks: dict[_Caller, int] = {}

    def close_excess(self, port: int, callers: Container[str]) -> tuple[int, int]:
        """Closes the oldest silent connections beyond the limits. Returns the numbers of closed and of remaining ones.
        `callers` are gRPC's names of peers that have made a call. Raises OSError if no descriptor is free."""
        silent = sorted(self._silent(port, callers), key=lambda connection: -connection.looks)
        self._looks = {connection.caller: connection.looks for connection in silent}
        of_host, closed = Counter(connection.host for connection in silent), 0
        for connection in silent:
            host = connection.host
            crowded = len(silent) - closed > MAX_SILENT and of_host[host] == max(of_host.values())
            if connection.looks > 1 and (of_host[host] > MAX_SILENT_OF_HOST or crowded):
                of_host[host] -= 1
                closed += 1
                _shut_down(connection, port)
        return closed, len(silent) - closed

    def _silent(self, port: int, callers: Container[str]) -> Iterator[_Silent]:
        for path in tuple(_FILES.iterdir()):
            descriptor = int(path.name)
            with _connection(descriptor) as connection:
                caller = None if connection is None else _caller_of(connection, port)
            if caller is not None and not any(name in callers for name in _names(*caller)):
                yield _Silent(descriptor, caller, self._looks.get(caller, 0) + 1)


@contextmanager
def _connection(descriptor: int) -> Iterator[socket.socket | None]:
    try:
        copy = os.dup(descriptor) if stat.S_ISSOCK(os.fstat(descriptor).st_mode) else None
    except OSError as error:
        if error.errno != errno.EBADF:
            raise
        copy = None  # The descriptor has been closed since it was listed.
    if copy is None:
        yield None
        return
    with socket.socket(fileno=copy) as connection:
        yield connection


def _caller_of(connection: socket.socket, port: int) -> _Caller | None:
    with suppress(OSError):  # The socket is not connected.
        is_ours = connection.family in (socket.AF_INET, socket.AF_INET6) and connection.getsockname()[1] == port
        if is_ours:
            host, from_port = connection.getpeername()[:2]
            return str(host).removeprefix("::ffff:"), from_port
    return None


def _shut_down(silent: _Silent, port: int) -> None:
    with _connection(silent.descriptor) as connection, suppress(OSError):  # The connection has ended.
        if connection is not None and _caller_of(connection, port) == silent.caller:
            connection.shutdown(socket.SHUT_RDWR)


def _names(host: str, port: int) -> tuple[str, ...]:
    return f"ipv4:{host}:{port}", f"ipv6:%5B{host}%5D:{port}", f"ipv6:[{host}]:{port}"
