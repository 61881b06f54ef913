"""Tests of strangers that connect to a group's links: they get no link and prevent no member's link."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from llamaclust.cluster.membership.authority import Authority
from llamaclust.core.addresses import split_address
from llamaclust.kernels._native import Link, LinkError, TlsSettings
from llamaclust.wire.control.groups import GroupMember
from llamaclust.wire.security.certificate_names import Principal
from llamaclust.wire.security.credentials import Credentials, Identity, Insecure
from llamaclust.worker.groups import link_opener
from llamaclust.worker.groups.handshakes import MOST_HANDSHAKES
from llamaclust.worker.groups.link_opener import LinkOpener, MemberLostError
from llamaclust.worker.groups.listener import Hello
from support.clusters.served import until
from support.wire.group_links import (
    GATHER_S,
    GROUP,
    NAMES,
    SOON_S,
    assert_gathers,
    listeners,
    needs_tls,
    order_of,
)
from support.wire.trust import authority, expired, refusals, with_pair


def _foreign(trust: Authority, folder: Path, name: str) -> Identity:
    other = authority(folder, "other").identity(Principal(name))
    return with_pair(trust.identity(Principal(name)), other.pair)


IMPOSTORS: dict[str, Callable[[Authority, Path, str], Credentials]] = {
    "another worker's certificate": lambda trust, folder, name: trust.identity(Principal("z")),
    "the certificate of the member that it speaks to": lambda trust, folder, name: trust.identity(
        Principal(NAMES[1 - NAMES.index(name)])
    ),
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
    """An impostor at the first place accepts, at the second place it connects."""
    monkeypatch.setattr(link_opener, "_HANDSHAKE_S", SOON_S / 2)

    def given(name: str) -> Credentials:
        return IMPOSTORS[who](trust, tmp_path, name) if name == NAMES[at] else trust.identity(Principal(name))

    async with listeners(2) as started:
        order = order_of(started)
        members = [LinkOpener(replace(order, member=own), given(NAMES[own]), started[own]) for own in range(2)]
        tried = [asyncio.create_task(member.open(GATHER_S, GATHER_S)) for member in members]
        failures = members[1 - at]._failures
        await until(lambda: at in failures)
        assert failures[at].startswith(f"worker {NAMES[at]}: ") and not tried[1 - at].done()
        for task in tried:
            task.cancel()
        await asyncio.wait(tried)


@needs_tls
async def test_the_true_member_gets_its_link_after_others_have_tried(
    trust: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    """Silent connections, wrong hellos, half-open handshakes, a replayed beginning and impostors do not prevent the
    link."""
    hello = Hello(GROUP, 1, 0).encode()
    async with listeners(2) as started:
        order = order_of(started)
        first = asyncio.create_task(
            LinkOpener(order, trust.identity(Principal("a")), started[0]).open(GATHER_S, GATHER_S)
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
        impostor = LinkOpener(replace(order, member=1), trust.identity(Principal("z")), started[1])
        with pytest.raises(MemberLostError, match="a link to worker a"):
            await impostor.open(GATHER_S, SOON_S)
        true = LinkOpener(replace(order, member=1), trust.identity(Principal("b")), started[1])
        await assert_gathers([*await asyncio.gather(first, true.open(GATHER_S))])
        for other in others:
            other.close()
    told = refusals(caplog.records)
    assert any("host" in text.lower() or "certificate" in text.lower() for text in told), told


@needs_tls
@pytest.mark.parametrize("sent", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x00\x05hello", b"\x80" * 4096])
def test_the_reason_of_tls_is_told_where_the_peer_has_gone(sent: bytes, trust: Authority) -> None:
    """The peer has closed the connection by then, so no alert can be sent."""
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
    """A stranger replays a member's bytes: the hello is accepted, the handshake fails."""
    async with listeners(2) as started:
        order, recorded = order_of(started), bytearray()
        relay = await asyncio.start_server(_relay(started[0].address, recorded), "127.0.0.1", 0)
        port = relay.sockets[0].getsockname()[1]
        through = replace(order, member=1, members=(GroupMember("a", f"127.0.0.1:{port}"), order.members[1]))
        a, b = trust.identity(Principal("a")), trust.identity(Principal("b"))
        true = await asyncio.gather(
            LinkOpener(order, a, started[0]).open(GATHER_S), LinkOpener(through, b, started[1]).open(GATHER_S)
        )
        await assert_gathers([*true])
        relay.close()
        again = asyncio.create_task(LinkOpener(order, a, started[0]).open(GATHER_S, 4 * SOON_S))
        host, _, at = started[0].address.rpartition(":")
        _, writer = await asyncio.open_connection(host, int(at))
        writer.write(bytes(recorded))
        with pytest.raises(MemberLostError, match=r"a link to worker b .*; last: worker b: TLS: "):
            await again
        writer.close()


ATTACKERS: dict[str, Callable[[int], str]] = {
    "the member's host": lambda number: "127.0.0.1",
    "another host": lambda number: "127.0.0.9",
    "many hosts": lambda number: f"127.0.1.{number + 1}",
}


async def _replaying(hello: bytes, address: str, host: str) -> None:
    """Replays a recorded hello and nothing more, and again whenever that connection has ended."""
    at, port = split_address(address)
    while True:
        with suppress(OSError):
            reader, writer = await asyncio.open_connection(at, port, local_addr=(host, 0))
            writer.write(hello)
            await reader.read()
            writer.close()


@needs_tls
@pytest.mark.parametrize("who", ATTACKERS)
async def test_who_replays_a_hello_keeps_no_member_out(
    who: str, trust: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The replayed connections take all places repeatedly, before and while the member connects."""
    attempts, connect = [], LinkOpener._connection_to

    async def counted(links: LinkOpener, address: str) -> socket.socket:
        attempts.append(address)
        return await connect(links, address)

    monkeypatch.setattr(LinkOpener, "_connection_to", counted)
    async with listeners(2) as started:
        order, hello = order_of(started), Hello(GROUP, 1, 0).encode()
        true = [
            LinkOpener(replace(order, member=own), trust.identity(Principal(NAMES[own])), started[own])
            for own in (0, 1)
        ]
        first = asyncio.create_task(true[0].open(GATHER_S, GATHER_S))
        places = range(3 * MOST_HANDSHAKES)
        attacks = [asyncio.create_task(_replaying(hello, started[0].address, ATTACKERS[who](n))) for n in places]
        await until(lambda: 1 in true[0]._failures)  # the places are taken, and one connection was dropped
        members = await asyncio.gather(first, true[1].open(GATHER_S, GATHER_S))
        for attack in attacks:
            attack.cancel()
        await asyncio.wait(attacks)
        await assert_gathers([*members])
    assert who != "another host" or len(attempts) == 1


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
