"""Tests with thousands of silent connections on loopback: members are served, and few files are open."""

from __future__ import annotations

import asyncio
import errno
import logging
import multiprocessing
import os
import resource
import socket
from collections.abc import Container, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from llamaclust.cluster.membership.authority import Authority
from llamaclust.core.errors import LlamaclustError
from llamaclust.core.process_settings import allow_many_files, connections_of_server
from llamaclust.wire.rpc import rejections, silent_connections
from llamaclust.wire.rpc.client import Peer
from llamaclust.wire.rpc.deadlines import deadline
from llamaclust.wire.rpc.rejections import Handshakes, RefusalLog
from llamaclust.wire.rpc.silent_connections import MAX_SILENT_OF_HOST, SilentConnections
from llamaclust.wire.security.certificate_names import COORDINATOR
from llamaclust.wire.security.credentials import Identity
from support.clusters.served import until
from support.wire.trust import A, answers, authority, echo

FILES = 512
pytestmark = pytest.mark.skipif(not Path("/dev/fd").is_dir(), reason="connections are found by /dev/fd")


def _open_files() -> int:
    return len([*Path("/dev/fd").iterdir()])


def _flooded(folder: Path, to: Connection) -> None:
    """Serves with a low limit of open files, and a handshake timeout that is longer than the test."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, FILES))

    async def serve() -> None:
        async with echo(authority(folder).identity(A), handshake_s=120.0) as server:
            to.send(server.server.address)
            while await asyncio.to_thread(to.recv) != "end":
                to.send(await asyncio.to_thread(_open_files))

    asyncio.run(serve())


@pytest.fixture
def flooded(tmp_path: Path) -> Iterator[tuple[Connection, str, Authority]]:
    trust = authority(tmp_path)
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_flooded, args=(tmp_path, theirs))
    process.start()
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    allow_many_files()
    assert ours.poll(60)
    yield ours, ours.recv(), trust
    process.kill()
    process.join()
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def _silent(address: str, hosts: int, count: int) -> list[socket.socket]:
    opened = []
    host, _, port = address.rpartition(":")
    for index in range(count):
        connection = socket.socket()
        connection.settimeout(5.0)
        with suppress(OSError):
            connection.bind((f"127.0.0.{2 + index % hosts}", 0))
            connection.connect((host, int(port)))
        opened.append(connection)
    return opened


async def _served(address: str, identity: Identity) -> int:
    """Returns the number of attempts until a member gets an answer."""
    for attempt in range(1, 1000):
        peer = Peer(address, identity, A)
        try:
            async with deadline("an answer", 60):
                from llamaclust.wire.rpc.methods import JOIN

                if await answers(peer.open(JOIN, epoch=1)):
                    return attempt
        except LlamaclustError:
            await asyncio.sleep(0.05)
        finally:
            await peer.close()
    raise AssertionError("a member is not served")


@pytest.mark.parametrize(("hosts", "count"), [(1, 700), (3, 1500), (200, 700)], ids=str)
def test_members_are_served_beside_silent_connections(
    flooded: tuple[Connection, str, Authority], hosts: int, count: int
) -> None:
    told, address, trust = flooded
    silent = _silent(address, hosts, count)

    async def run() -> int:
        async with deadline("a member that is served", 60):
            return await _served(address, trust.identity(COORDINATOR))

    attempts = asyncio.run(run())
    told.send("files?")
    files = told.recv()
    print(f"{count} from {hosts} hosts: {attempts} tries, {files} files")
    assert files < FILES
    for connection in silent:
        connection.close()


async def test_a_member_of_a_crowded_port_is_not_cut_off(tmp_path: Path) -> None:
    """Silent connections do not close open streams."""
    trust = authority(tmp_path)
    allow_many_files()
    async with echo(trust.identity(A), handshake_s=60.0) as server:
        stream = server.call(trust.identity(COORDINATOR))
        assert await answers(stream)
        silent = await asyncio.to_thread(_silent, server.server.address, 1, 150)
        async with deadline("the end of the excess", 30):
            while await asyncio.to_thread(_open_ones, silent) > 32:  # noqa: ASYNC110  a closed socket is found by looking
                await asyncio.sleep(0.1)
        assert await answers(stream)
        for connection in silent:
            connection.close()


def _open_ones(connections: list[socket.socket]) -> int:
    """Returns the number of connections that the other side has not closed."""
    count = 0
    for connection in connections:
        connection.setblocking(False)
        try:
            count += connection.recv(1, socket.MSG_PEEK) != b""
        except BlockingIOError:
            count += 1
        except OSError:
            pass
    return count


class _Looks:
    """A replacement for SilentConnections. The first `failures` calls find no free file descriptor."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.made = 0

    def close_excess(self, port: int, callers: Container[str]) -> tuple[int, int]:
        self.made += 1
        if self.made <= self.failures:
            raise OSError(errno.EMFILE, "Too many open files")
        return 3, 0


@pytest.mark.parametrize("failures", [1, 2, 5])
async def test_looks_that_find_no_free_descriptor_are_repeated(
    failures: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rejections, "_LOOK_S", 0.001)
    handshakes, looks = Handshakes("here:1", 60.0, RefusalLog(logging.getLogger("looks"))), _Looks(failures)
    monkeypatch.setattr(handshakes, "_silent", looks)
    for _ in range(MAX_SILENT_OF_HOST + 1):
        handshakes.begun()
    async with asyncio.timeout(60):
        await until(lambda: looks.made > failures + 1)
        for number in range(MAX_SILENT_OF_HOST + 1):
            with handshakes.call(f"ipv4:127.0.0.1:{number}"):
                pass
        await until(lambda: handshakes._closing is None)
    assert "connections to here:1: too many that showed no certificate" in caplog.text
    handshakes.close()


@pytest.mark.parametrize(
    ("hosts", "of_host"),
    [
        ([f"2001:db8:1:2::{number:x}" for number in range(1, 51)], 32),  # One network.
        ([f"2001:db8:{number % 2}::{number:x}" for number in range(1, 51)], 50),  # Two networks.
        ([f"192.0.2.{number}" for number in range(1, 51)], 50),
    ],
    ids=["one /64", "two /64", "IPv4"],
)
def test_the_addresses_of_one_network_count_as_one_host(
    hosts: list[str], of_host: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [socket.socketpair() for _ in hosts]
    callers = {ours.fileno(): (host, 1) for (ours, _), host in zip(pairs, hosts, strict=True)}
    inodes = {os.fstat(descriptor).st_ino: caller for descriptor, caller in callers.items()}

    def caller_of(connection: socket.socket, port: int) -> tuple[str, int] | None:
        return inodes.get(os.fstat(connection.fileno()).st_ino)

    monkeypatch.setattr(silent_connections, "_caller_of", caller_of)
    connections = SilentConnections()
    assert connections.close_excess(1, ()) == (0, len(hosts)), "a new one has time"
    assert connections.close_excess(1, ()) == (len(hosts) - of_host, of_host)
    for pair in pairs:
        for end in pair:
            end.close()


def test_the_servers_of_a_process_leave_descriptors_to_files() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        for files in (256, 1000, 1024):
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, before[1]))
            assert files // 5 < files - 2 * connections_of_server() < files // 3
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("others", [1, 4096, 10_000])
async def test_a_caller_is_known_while_its_call_is_under_way(others: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller is remembered during its call, however many callers follow. After its call, it is the newest one that is
    remembered."""
    handshakes = Handshakes("here:1", 60.0, RefusalLog(logging.getLogger("looks")))
    looks: list[Container[str]] = []

    def close_excess(port: int, callers: Container[str]) -> tuple[int, int]:
        looks.append(callers)
        return 0, 0

    monkeypatch.setattr(rejections, "_LOOK_S", 0.001)
    monkeypatch.setattr(handshakes._silent, "close_excess", close_excess)
    with handshakes.call("first"):
        for number in range(others):
            with handshakes.call(f"other {number}"), handshakes.call(f"other {number}"):
                pass
        for _ in range(others + MAX_SILENT_OF_HOST + 2):
            handshakes.begun()
        async with asyncio.timeout(60):
            await until(lambda: bool(looks))
    assert "first" in looks[0] and "first" in handshakes._callers
    assert len(handshakes._callers) <= 4096 and not handshakes._calls
    handshakes.close()
