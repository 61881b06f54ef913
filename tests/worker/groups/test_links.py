"""Links of a group by the coordinator's plan: between the workers that it names, whoever else connects."""

from __future__ import annotations

import asyncio
import gc
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamaclust.cluster.membership.authority import Authority
from llamaclust.core.addresses import split_address
from llamaclust.core.errors import UsageError
from llamaclust.core.limits import GROUP_ID_BYTES
from llamaclust.kernels._native import Link, LinkError, Links, TlsSettings, tls_library
from llamaclust.wire.control.groups import GroupMember, GroupOrder
from llamaclust.wire.security.credentials import Credentials, Identity, Insecure, Principal
from llamaclust.wire.security.token import ClusterToken
from llamaclust.worker.groups import links as group_links
from llamaclust.worker.groups.links import GroupLinks, MemberLostError
from llamaclust.worker.groups.listener import Hello, LinkListener
from support.clusters.served import until
from support.seed import SEED
from support.wire.trust import authority, expired, refusals, with_pair

NAMES = "a", "b", "c"
GROUP = bytes(range(GROUP_ID_BYTES))
GATHER_S = 20.0
SOON_S = 1.0
needs_tls = pytest.mark.skipif(not tls_library(), reason="built without OpenSSL")

Given = Callable[[str], Credentials]


@pytest.fixture
def trust(tmp_path: Path) -> Authority:
    return authority(tmp_path)


async def listening(address: str) -> LinkListener:
    listener = LinkListener()
    await listener.listen(address)
    return listener


@asynccontextmanager
async def listeners(count: int, folder: Path | None = None) -> AsyncIterator[list[LinkListener]]:
    addresses = ["127.0.0.1:0" if folder is None else f"unix:{folder}/{number}" for number in range(count)]
    started = [await listening(address) for address in addresses]
    try:
        yield started
    finally:
        for listener in started:
            await listener.stop()


def open_files() -> int:
    gc.collect()  # sockets of tests that have ended
    return len([*Path("/proc/self/fd").iterdir()])


def order_of(started: list[LinkListener], own: int = 0) -> GroupOrder:
    members = (GroupMember(name, each.address) for name, each in zip(NAMES, started, strict=False))
    return GroupOrder(GROUP, tuple(members), own)


async def opened(started: list[LinkListener], given: Given, seconds: float = GATHER_S) -> list[Links]:
    order = order_of(started)
    return await asyncio.gather(
        *(
            GroupLinks(replace(order, member=own), given(NAMES[own]), listener).open(GATHER_S, seconds)
            for own, listener in enumerate(started)
        )
    )


async def assert_gathers(members: list[Links]) -> None:
    """Any bits arrive, in rows that are larger than a record of TLS, and than the system's buffers."""
    print(f"seed {SEED}")
    made = np.random.default_rng(SEED)
    for step, columns in enumerate((3, 5000, 1 << 20)):
        parts = [made.integers(0, 2**32, (1, columns), np.uint32).view(np.float32) for _ in members]
        borders = [columns * place for place in range(len(members) + 1)]

        def gather(member: int) -> bytes:
            whole = np.zeros((1, borders[-1]), np.float32)  # noqa: B023
            members[member].begin(7, step)  # noqa: B023
            members[member].gather(0, parts[member], whole, borders)  # noqa: B023
            return whole.tobytes()

        found = await asyncio.gather(*(asyncio.to_thread(gather, member) for member in range(len(members))))
        assert found == [np.concatenate(parts, axis=1).tobytes()] * len(members)


def identities(trust: Authority) -> Given:
    return lambda name: trust.identity(Principal(name))


@needs_tls
@pytest.mark.parametrize("count", [2, 3])
async def test_members_gather_with_tls(trust: Authority, count: int) -> None:
    async with listeners(count) as started:
        members = await opened(started, identities(trust))
        await assert_gathers(members)


@needs_tls
async def test_links_outlive_their_keys(trust: Authority) -> None:
    """A key encrypts 65,536 records, two for each of these gathers."""
    async with listeners(2) as started:
        members = await opened(started, identities(trust))
    rows = [np.full((1, 1), member, np.float32) for member in range(2)]

    def gather(member: int) -> int:
        whole, right = np.zeros((1, 2), np.float32), 0
        for number in range(33_000):
            whole[:] = -1
            members[member].gather(number, rows[member], whole, [0, 1, 2])
            right += whole.tolist() == [[0, 1]]
        return right

    assert await asyncio.gather(*(asyncio.to_thread(gather, member) for member in range(2))) == [33_000] * 2
    await assert_gathers(members)


@pytest.mark.parametrize(
    ("credentials", "is_unix"), [(Insecure(), False), (ClusterToken("t" * 40), False), (ClusterToken("t" * 40), True)]
)
async def test_members_gather_without_tls(tmp_path: Path, credentials: Credentials, is_unix: bool) -> None:
    async with listeners(3, tmp_path if is_unix else None) as started:
        await assert_gathers(await opened(started, lambda name: credentials))


async def test_links_leave_no_descriptor(trust: Authority) -> None:
    before = open_files()
    async with listeners(2) as started:
        for given in (lambda name: Insecure(), identities(trust)) if tls_library() else (lambda name: Insecure(),):
            for links in await opened(started, given):
                links.close()
    assert open_files() == before


@pytest.mark.parametrize("path", ["missing/a", "taken", "a" * 200])
async def test_a_listener_that_cannot_start_leaves_no_descriptor(path: str, tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    before = open_files()
    with pytest.raises(OSError) as raised:
        await LinkListener().listen(f"unix:{tmp_path}/{path}")
    assert open_files() == before, raised.value  # whose frames hold the socket


# -- ways to a member ------------------------------------------------------------------------------------------------


@contextmanager
def addresses_of_kinds(kinds: str, true: str) -> Iterator[list[str]]:
    """Makes an address for each letter: `s`ilent, `r`efused, or the `t`rue one."""
    with ExitStack() as stack:
        found = []
        for kind in kinds:
            listening = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
            place = f"127.0.0.1:{listening.getsockname()[1]}"
            for _ in range(2 if kind == "s" else 0):  # the queue is full: nobody else is answered
                caller = stack.enter_context(socket.socket())
                caller.setblocking(False)
                caller.connect_ex(listening.getsockname())
            if kind == "r":
                listening.close()
            found.append(true if kind == "t" else place)
        yield found


@pytest.mark.parametrize("kinds", ["st", "sst", "rst", "srt", "ts"])
async def test_an_address_that_never_answers_leaves_time_for_the_others(
    kinds: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_links, "_CONNECT_S", 0.2)
    find = socket.getaddrinfo
    async with listeners(2) as started:
        with addresses_of_kinds(kinds, started[0].address) as found:

            def several(host: str, port: int, **options: Any) -> list[Any]:
                return [each for address in found for each in find(*split_address(address), **options)]

            monkeypatch.setattr(socket, "getaddrinfo", several)
            await assert_gathers(await opened(started, lambda name: Insecure()))


async def test_threads_of_other_work_delay_no_link(trust: Authority) -> None:
    ends = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        asyncio.get_running_loop().set_default_executor(pool)
        waiting = asyncio.get_running_loop().run_in_executor(None, ends.wait)
        try:
            async with listeners(2) as started:
                members = await opened(started, identities(trust) if tls_library() else lambda name: Insecure())
        finally:
            ends.set()
        await waiting
    assert len(members) == 2


# -- somebody else at a place of the group ---------------------------------------------------------------------------


def _foreign(trust: Authority, folder: Path, name: str) -> Identity:
    other = authority(folder, "other").identity(Principal(name))
    return with_pair(trust.identity(Principal(name)), other.pair)


IMPOSTORS: dict[str, Callable[[Authority, Path, str], Credentials]] = {
    "another worker's certificate": lambda trust, folder, name: trust.identity(Principal("z")),
    "the coordinator's certificate": lambda trust, folder, name: trust.identity(Principal(None)),
    "an expired certificate": lambda trust, folder, name: expired(trust, Principal(name)),
    "a certificate of another authority": _foreign,
    "no TLS": lambda trust, folder, name: Insecure(),
}


@needs_tls
@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("who", IMPOSTORS)
async def test_impostors_get_no_link(
    who: str, at: int, trust: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One at the first place accepts, one at the second place connects."""
    monkeypatch.setattr(group_links, "_HANDSHAKE_S", SOON_S / 2)

    def given(name: str) -> Credentials:
        return IMPOSTORS[who](trust, tmp_path, name) if name == NAMES[at] else trust.identity(Principal(name))

    async with listeners(2) as started:
        order = order_of(started)
        members = [GroupLinks(replace(order, member=own), given(NAMES[own]), started[own]) for own in range(2)]
        tried = [asyncio.create_task(member.open(GATHER_S, GATHER_S)) for member in members]
        failures = members[1 - at]._failures
        await until(lambda: at in failures)
        assert failures[at].startswith(f"worker {NAMES[at]}: ") and not tried[1 - at].done()
        for task in tried:
            task.cancel()
        await asyncio.wait(tried)


@needs_tls
async def test_the_true_member_gets_its_link_after_others_have_tried(
    trust: Authority, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Silent connections, wrong hellos, half-open handshakes, a recorded beginning and impostors are no obstacle."""
    monkeypatch.setattr(group_links, "_HANDSHAKE_S", SOON_S / 4)
    hello = Hello(GROUP, 1, 0).encode()
    async with listeners(2) as started:
        order = order_of(started)
        first = asyncio.create_task(
            GroupLinks(order, trust.identity(Principal("a")), started[0]).open(GATHER_S, GATHER_S)
        )
        host, _, port = started[0].address.rpartition(":")
        sent = [
            b"",
            hello[:5],
            b"GET / HTTP/1.1\r\n\r\n" * 9,
            Hello(GROUP, 1, 2).encode(),
            Hello(bytes(16), 1, 0).encode(),
        ]
        others = []
        for data in (*sent, *[b""] * 80, hello, hello + b"\x16\x03\x01", hello * 2):
            others.append(socket.create_connection((host, int(port))))
            others[-1].sendall(data)
            await asyncio.sleep(0)
        impostor = GroupLinks(replace(order, member=1), trust.identity(Principal("z")), started[1])
        with pytest.raises(MemberLostError, match="a link to worker a"):
            await impostor.open(GATHER_S, SOON_S)
        true = GroupLinks(replace(order, member=1), trust.identity(Principal("b")), started[1])
        await assert_gathers([*await asyncio.gather(first, true.open(GATHER_S))])
        for other in others:
            other.close()
    told = refusals(caplog.records)
    assert any("host" in text.lower() or "certificate" in text.lower() for text in told), told


@needs_tls
@pytest.mark.parametrize("sent", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x00\x05hello", b"\x80" * 4096])
def test_the_reason_of_tls_is_told_where_the_peer_has_gone(sent: bytes, trust: Authority) -> None:
    """It has closed the connection by then, so that no alert can be sent."""
    own = trust.identity(Principal("a"))
    host = Principal("b").host(own.cluster)
    tls = TlsSettings(own.ca, own.pair.certificate, own.pair.private_key, host, True)
    ours, theirs = socket.socketpair()
    theirs.sendall(sent)
    theirs.close()
    with pytest.raises(LinkError, match="worker b: TLS: "):
        Link(ours.detach(), "worker b", tls, b"hello", b"hello", SOON_S)


@needs_tls
async def test_a_recorded_connection_is_worth_nothing(trust: Authority) -> None:
    """Another one sends the same bytes again as a member: its hello is taken, its handshake is not."""
    async with listeners(2) as started:
        order, recorded = order_of(started), bytearray()
        relay = await asyncio.start_server(_relay(started[0].address, recorded), "127.0.0.1", 0)
        port = relay.sockets[0].getsockname()[1]
        through = replace(order, member=1, members=(GroupMember("a", f"127.0.0.1:{port}"), order.members[1]))
        a, b = trust.identity(Principal("a")), trust.identity(Principal("b"))
        true = await asyncio.gather(
            GroupLinks(order, a, started[0]).open(GATHER_S), GroupLinks(through, b, started[1]).open(GATHER_S)
        )
        await assert_gathers([*true])
        relay.close()
        again = asyncio.create_task(GroupLinks(order, a, started[0]).open(GATHER_S, SOON_S))
        host, _, at = started[0].address.rpartition(":")
        _, writer = await asyncio.open_connection(host, int(at))
        writer.write(bytes(recorded))
        with pytest.raises(MemberLostError, match=r"a link to worker b .*; last: worker b: TLS: "):
            await again
        writer.close()


def _relay(
    address: str, recorded: bytearray
) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], asyncio.Future[None]]:
    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, keeps: bool) -> None:
        while data := await reader.read(1 << 16):
            recorded.extend(data if keeps else b"")
            writer.write(data)
            await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = address.rpartition(":")
        there, back = await asyncio.open_connection(host, int(port))
        await asyncio.gather(copy(reader, back, True), copy(there, writer, False), return_exceptions=True)

    return serve  # type: ignore[return-value]


@pytest.mark.parametrize("count", [1, 64, 65, 400])
async def test_silent_connections_give_their_places_to_newer_ones(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The listener sees many at once, so that accepting alone gives nothing else a turn."""
    monkeypatch.setattr("llamaclust.worker.groups.listener.HELLO_S", 600.0)
    listener = await listening("127.0.0.1:0")
    host, port = split_address(listener.address)
    silent: list[socket.socket] = []

    def closed() -> int:
        return sum(map(_is_closed, silent))

    with ExitStack() as held:
        for number in range(1, count + 1):
            silent.append(held.enter_context(socket.create_connection((host, port))))
            if number % 100 == 0:  # the system keeps 128 that are not accepted
                await until(lambda now=number: closed() == now - 64)  # type: ignore[misc]
        await until(lambda: closed() == max(0, count - 64))
    await listener.stop()


def _is_closed(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


@pytest.mark.parametrize("own", [0, 1])
async def test_a_member_that_is_not_there_is_named(own: int) -> None:
    async with listeners(2) as started:
        order = order_of(started, own)
        await started[1 - own].stop()
        with pytest.raises(
            MemberLostError, match=f"a link to worker {NAMES[1 - own]} at .*: not within 0.3 s"
        ) as raised:
            await GroupLinks(order, Insecure(), started[own]).open(GATHER_S, 0.3)
        assert raised.value.worker == NAMES[1 - own]


async def test_a_member_without_tls_opens_no_links_to_other_machines(
    trust: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with listeners(2) as started:
        with pytest.raises(UsageError, match="only unix:PATH and loopback"):
            members = GroupMember("a", started[0].address), GroupMember("b", "192.0.2.1:7102")
            GroupLinks(GroupOrder(GROUP, members, 0), ClusterToken("t" * 40), started[0])
        monkeypatch.setattr(group_links, "tls_library", lambda: "")
        with pytest.raises(UsageError, match="need OpenSSL, without which this llamaclust was built"):
            GroupLinks(order_of(started), trust.identity(Principal("a")), started[0])
