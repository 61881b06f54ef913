"""Accepts connections of group members, and passes each to the group that expects it. A connection begins with an
unencrypted hello: an 8-byte version, the group's 16-byte id, and the numbers of sender and receiver."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from llamaclust.core.addresses import joined_address, split_address
from llamaclust.core.errors import DeadlineError
from llamaclust.wire.listening import BACKLOG, listening_socket
from llamaclust.wire.rpc.deadlines import deadline
from llamaclust.wire.rpc.rejections import RefusalLog
from llamaclust.wire.rpc.unix_streams import PREFIX
from llamaclust.worker.groups.callers import caller_of, of_the_most

_log = logging.getLogger(__name__)

_HELLO = struct.Struct("<8s16sII")
_VERSION = b"lcgroup2"
HELLO_S = 5.0
_MOST_SILENT = 64
"""Maximum number of connections that have sent no hello. Above it, the host with the most loses its oldest."""
SOCKET_ENDING = ".l"
LINK_PORTS = 1000
"""Difference between a worker's link port and its stage port. Other workers may use the ports in between."""
_LAST_PORT = 65535
_RETRY_S = 0.1


@dataclass(frozen=True, slots=True)
class Hello:
    group_id: bytes
    sender: int
    receiver: int

    def encode(self) -> bytes:
        return _HELLO.pack(_VERSION, self.group_id, self.sender, self.receiver)


def link_address(stages: str, port: int | None) -> str:
    """Returns the link address for stage address `stages`. If `port` is None, derives the port from the stage port."""
    if stages.startswith(PREFIX):
        return f"{stages}{SOCKET_ENDING}"
    host, stage_port = split_address(stages)
    if port is None:
        port = stage_port + LINK_PORTS if 0 < stage_port <= _LAST_PORT - LINK_PORTS else 0
    return joined_address(host, port)


Take = Callable[[socket.socket], None]
"""A callback that takes over a connection with the expected hello. Raises OSError if it cannot."""


class LinkListener:
    def __init__(self) -> None:
        self.address = ""  # Address at which it listens, or "" if it does not listen.
        self.refusals = RefusalLog(_log)  # Logs errors of accepting, and of connections with an expected hello.
        self._strangers = RefusalLog(_log, apart_s=1.0)
        # Members may connect before this worker knows their group.
        self._early = RefusalLog(_log, apart_s=1.0, level=logging.INFO)
        self._requested = ""
        self._listening: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        # Hosts of the connections without a hello. The oldest comes first.
        self._silent: dict[asyncio.Task[None], str] = {}
        self._expected: dict[bytes, Take] = {}

    async def listen(self, address: str, *, or_any_port: bool = False) -> None:
        """Listens at HOST:PORT or unix:PATH. `or_any_port` allows another port if PORT is in use. Raises OSError."""
        if self.address and address == self._requested:
            return
        await self.stop()
        try:
            listening = _listening_socket(address)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not or_any_port or address.startswith(PREFIX):
                raise
            host, port = split_address(address)
            listening = _listening_socket(joined_address(host, 0))
            instead = f"port {listening.getsockname()[1]} is used instead, which firewalls may close"
            _log.warning("port %d for links of groups is in use: %s; --link-port N chooses one", port, instead)
        is_unix = address.startswith(PREFIX)
        self.address = address if is_unix else joined_address(*listening.getsockname()[:2])
        self._requested, self._listening = address, listening
        self._accepting = asyncio.create_task(self._accept(listening))

    async def stop(self) -> None:
        if self._listening is None or self._accepting is None:
            return
        tasks = [self._accepting, *self._silent]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        self._listening.close()
        if self.address.startswith(PREFIX):
            # The socket may have been deleted with the folder of a cluster that has ended.
            with suppress(FileNotFoundError):
                os.unlink(self.address.removeprefix(PREFIX))  # noqa: PTH108  Path would count as waiting
        self.address, self._listening, self._accepting = "", None, None

    @contextmanager
    def expecting(self, hello: bytes, take: Take) -> Iterator[None]:
        self._expected[hello] = take
        try:
            yield
        finally:
            del self._expected[hello]

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listening)
            except OSError as error:  # The connection has failed, or this process has too many open files.
                self.refusals.tell(f"a connection to {self.address}: {error.strerror}")
                await asyncio.sleep(_RETRY_S)
                continue
            await self._receive(connection)

    async def _receive(self, connection: socket.socket) -> None:
        try:
            host = caller_of(connection)
        except OSError:  # The connection has gone.
            connection.close()
            return
        if len(self._silent) >= _MOST_SILENT:
            oldest, *_ = of_the_most(self._silent)
            oldest.cancel()
            await asyncio.wait([oldest])
            self._strangers.tell(f"a connection from {host} to {self.address}: too many have sent no hello")
        task = asyncio.create_task(self._hand_on(connection, host))
        self._silent[task] = host
        task.add_done_callback(self._silent.pop)
        await asyncio.sleep(0)  # Lets other tasks run. A loop that only accepts would block them.

    async def _hand_on(self, connection: socket.socket, host: str) -> None:
        is_taken = False
        try:
            connection.setblocking(False)
            hello = await _first_bytes(connection)
            if (take := self._expected.get(hello)) is not None:
                take(connection)
                is_taken = True
            elif hello:  # A connection without bytes is a probe.
                is_member = hello.startswith(_VERSION)
                what = "of a group that is not known here (yet)" if is_member else "no hello of a member"
                refusals = self._early if is_member else self._strangers
                refusals.tell(f"a connection from {host} to {self.address}: {what}")
        except (DeadlineError, OSError) as error:
            self._strangers.tell(f"a connection from {host} to {self.address}: {error}")
        finally:
            if not is_taken:
                connection.close()


def _listening_socket(address: str) -> socket.socket:
    if not address.startswith(PREFIX):
        return listening_socket(*split_address(address))
    listening = socket.socket(socket.AF_UNIX)
    try:
        listening.bind(address.removeprefix(PREFIX))
        listening.listen(BACKLOG)
        listening.setblocking(False)
    except OSError:
        listening.close()
        raise
    return listening


async def _first_bytes(connection: socket.socket) -> bytes:
    loop, data = asyncio.get_running_loop(), b""
    async with deadline("the hello of a member", HELLO_S):
        while len(data) < _HELLO.size and (piece := await loop.sock_recv(connection, _HELLO.size - len(data))):
            data += piece
    return data
