"""Tests of group links by the coordinator's plan: only the named workers are linked, whoever else connects."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamaclust.cluster.membership.authority import Authority
from llamaclust.core.addresses import split_address
from llamaclust.core.errors import UsageError
from llamaclust.kernels._native import tls_library
from llamaclust.wire.control.groups import GroupMember, GroupOrder
from llamaclust.wire.control.messages import Deadlines, PeerUnreachable
from llamaclust.wire.security.certificate_names import Principal
from llamaclust.wire.security.credentials import Credentials, Insecure
from llamaclust.wire.security.token import ClusterToken
from llamaclust.worker.groups import link_opener
from llamaclust.worker.groups.link_opener import LinkOpener, MemberLostError
from llamaclust.worker.groups.listener import LinkListener
from llamaclust.worker.groups.member_links import Fault, MemberLinks
from support.clusters.served import until
from support.descriptors import open_files
from support.wire.group_links import (
    GATHER_S,
    GROUP,
    NAMES,
    assert_gathers,
    identities,
    listeners,
    listening,
    needs_tls,
    opened,
    order_of,
)


@needs_tls
@pytest.mark.parametrize("count", [2, 3])
async def test_members_gather_with_tls(trust: Authority, count: int) -> None:
    async with listeners(count) as started:
        members = await opened(started, identities(trust))
        await assert_gathers(members)


async def test_members_that_no_connection_reaches_are_told_from_those_that_load(tmp_path: Path) -> None:
    """Nobody listens at the port and the path; the third address accepts but does not know the group yet."""
    async with listeners(1) as (other,):
        with socket.create_server(("127.0.0.1", 0)) as ended:
            port = ended.getsockname()[1]
        for address, is_reached in (
            (f"127.0.0.1:{port}", False),
            (f"unix:{tmp_path}/gone", False),
            (other.address, True),
        ):
            order = GroupOrder(GROUP, (GroupMember("a", address), GroupMember("b", "unix:/b")), 1)
            links = LinkOpener(order, ClusterToken("t" * 40), LinkListener())
            opening = asyncio.create_task(links.open(GATHER_S, GATHER_S))
            await until(lambda: bool(links._failures))  # noqa: B023
            assert [worker for worker, _ in links.unreached(0.0)] == ([] if is_reached else ["a"])
            assert not links.unreached(GATHER_S)
            opening.cancel()
            await asyncio.gather(opening, return_exceptions=True)


async def test_members_may_be_reached_while_their_absence_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    reports: list[Fault] = []
    with socket.socket() as first, socket.socket() as second:
        for late in (first, second):
            late.bind(("127.0.0.1", 0))
        addresses = [f"127.0.0.1:{late.getsockname()[1]}" for late in (first, second)]
        async with listeners(1) as (own,):
            members = (GroupMember(name, place) for name, place in zip(NAMES, (*addresses, own.address), strict=True))
            order = GroupOrder(GROUP, tuple(members), 2)
            opener = LinkOpener(order, Insecure(), own)
            # Both members are reported at the first look, whenever their connections were first refused.
            monkeypatch.setattr(opener, "unreached", lambda seconds: LinkOpener.unreached(opener, 0.0))

            async def report(fault: Fault) -> None:
                reports.append(fault)
                for late in (first, second):
                    late.listen()
                await until(lambda: not opener._unreached_s)

            links = MemberLinks(1, order, opener, Deadlines(peer_s=2.0), report)
            links.open(lambda opened: None)
            await until(lambda: len(reports) == 2)
            links.close()
    assert [(type(report), report.worker) for report in reports] == [(PeerUnreachable, "a"), (PeerUnreachable, "b")]


@needs_tls
async def test_links_outlive_their_keys(trust: Authority) -> None:
    """One key encrypts 65,536 records; each of these gathers takes two."""
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
    assert open_files() <= before


@pytest.mark.parametrize("path", ["missing/a", "taken", "a" * 200])
async def test_a_listener_that_cannot_start_leaves_no_descriptor(path: str, tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    before = open_files()
    with pytest.raises(OSError) as raised:
        await LinkListener().listen(f"unix:{tmp_path}/{path}")
    assert open_files() <= before, raised.value  # its frames hold the socket


# -- addresses of a member ---------------------------------------------------------------------------------------------


@contextmanager
def addresses_of_kinds(kinds: str, true: str) -> Iterator[list[str]]:
    """Yields an address for each letter: `s`ilent, `r`efused, or the `t`rue one."""
    with ExitStack() as stack:
        found = []
        for kind in kinds:
            listening = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
            place = f"127.0.0.1:{listening.getsockname()[1]}"
            for _ in range(2 if kind == "s" else 0):  # the full queue blocks further connections
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
    monkeypatch.setattr(link_opener, "_CONNECT_S", 0.2)
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


@pytest.mark.parametrize("count", [1, 64, 65, 400])
async def test_silent_connections_give_their_places_to_newer_ones(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many connections arrive at once, so accepting them must not block everything else."""
    monkeypatch.setattr("llamaclust.worker.groups.listener.HELLO_S", 600.0)
    listener = await listening("127.0.0.1:0")
    host, port = split_address(listener.address)
    silent: list[socket.socket] = []

    def closed() -> int:
        return sum(map(_is_closed, silent))

    with ExitStack() as held:
        for number in range(1, count + 1):
            silent.append(held.enter_context(socket.create_connection((host, port))))
            if number % 100 == 0:  # the kernel queues up to 128
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
            MemberLostError, match=f"a link to worker {NAMES[1 - own]} at .* took longer than 0.3 s"
        ) as raised:
            await LinkOpener(order, Insecure(), started[own]).open(GATHER_S, 0.3)
        assert raised.value.worker == NAMES[1 - own]


async def test_a_member_without_tls_opens_no_links_to_other_machines(
    trust: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with listeners(2) as started:
        with pytest.raises(UsageError, match="must be unix:PATH or a loopback"):
            members = GroupMember("a", started[0].address), GroupMember("b", "192.0.2.1:7102")
            LinkOpener(GroupOrder(GROUP, members, 0), ClusterToken("t" * 40), started[0])
        monkeypatch.setattr(link_opener, "tls_library", lambda: "")
        with pytest.raises(UsageError, match="need OpenSSL, but this llamaclust was built without it"):
            LinkOpener(order_of(started), trust.identity(Principal("a")), started[0])
