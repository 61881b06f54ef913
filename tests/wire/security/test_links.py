"""Tests of links between machines: both sides need a certificate of one CA with the right name. Refusals are logged
once."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from grpc import aio

from llamaclust.cluster.membership.authority import Authority
from llamaclust.core.errors import UsageError
from llamaclust.wire.rpc.client import OPTIONS, Peer, StreamBrokenError
from llamaclust.wire.rpc.deadlines import deadline
from llamaclust.wire.rpc.methods import JOIN
from llamaclust.wire.security.certificate_names import COORDINATOR, Principal, principal_of
from llamaclust.wire.security.credentials import Credentials, Identity, Insecure, check_address
from llamaclust.wire.security.tls import TARGET_NAME, peer_principal
from llamaclust.wire.security.token import ClusterToken
from support.clusters.served import until
from support.event_loop import pass_time
from support.wire.trust import A, B, answers, authority, echo, expired, refusals, with_pair

TOLD_S = 3.0


@pytest.fixture(autouse=True)
def every_line_is_seen(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "llamaclust")


@pytest.fixture
def trust(tmp_path: Path) -> Authority:
    return authority(tmp_path)


async def test_members_know_each_other_by_name(trust: Authority) -> None:
    async with echo(trust.identity(A)) as server:
        for caller in (COORDINATOR, B, Principal("Some_Name.of-63")):
            stream = server.call(trust.identity(caller))
            await stream.opened()
            assert await answers(stream)
        assert server.callers == [COORDINATOR, B, Principal("Some_Name.of-63")]


async def test_a_worker_that_sits_at_anothers_address_is_not_spoken_to(trust: Authority) -> None:
    async with echo(trust.identity(B)) as server:
        for expected in (A, COORDINATOR, Principal("B")):
            with pytest.raises(StreamBrokenError, match="lost"):
                await server.call(trust.identity(COORDINATOR), expected).opened()
        assert server.callers == []


def _foreign(trust: Authority, folder: Path) -> Identity:
    """Returns an identity with this cluster's names and the certificate of another cluster's CA."""
    other = authority(folder, "other")
    forged = Principal(None) if other.cluster == trust.cluster else COORDINATOR
    return with_pair(trust.identity(forged), other.identity(forged).pair)


def _self_made(trust: Authority, folder: Path) -> Identity:
    """Returns a certificate for the coordinator that a member's key has signed. Members may not sign certificates."""
    thief = trust.identity(B)
    from cryptography import x509

    from llamaclust.wire.security.certificates import NewKey, load_private

    forger = object.__new__(Authority)
    forger._key = load_private(thief.pair.private_key)
    forger._certificate = x509.load_pem_x509_certificate(thief.pair.certificate)
    forger._token = trust.token
    key = NewKey()
    pair = key.with_certificate(forger.certify(key.request, COORDINATOR))
    return with_pair(thief, replace(pair, certificate=pair.certificate + thief.pair.certificate))


STRANGERS: dict[str, Callable[[Authority, Path], Credentials]] = {
    "no certificate, plain text": lambda trust, folder: Insecure(),
    "a token, plain text": lambda trust, folder: ClusterToken("t" * 40),
    "expired": lambda trust, folder: expired(trust, COORDINATOR),
    "foreign": _foreign,
    "signed by a member": _self_made,
}


@pytest.mark.parametrize("who", STRANGERS)
async def test_strangers_are_refused_and_logged_once(
    who: str, trust: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with echo(trust.identity(A)) as server:
        member = server.call(trust.identity(COORDINATOR))
        await member.opened()
        with pytest.raises(StreamBrokenError):
            await server.call(STRANGERS[who](trust, tmp_path)).opened()
        await _told(caplog, 1)
        assert await answers(member)
        assert server.callers == [COORDINATOR]


async def test_a_caller_without_a_certificate_is_refused(trust: Authority, caplog: pytest.LogCaptureFixture) -> None:
    async with echo(trust.identity(A)) as server:
        identity = trust.identity(COORDINATOR)
        options = (*OPTIONS, (TARGET_NAME, A.host(trust.cluster)))
        target, credentials = f"dns:///{server.server.address}", grpc.ssl_channel_credentials(identity.ca)
        async with aio.secure_channel(target, credentials, options=options) as channel:
            with pytest.raises(grpc.RpcError):
                await channel.stream_stream(JOIN)().read()  # type: ignore[call-arg]  # defaults that stubs lack
        await _told(caplog, 1)
        assert server.callers == []


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"",
        b"\x16\x03\x01\xff\xff" * 50,
    ],
    ids=["http", "http/2", "nothing", "broken tls"],
)
async def test_what_is_not_tls_gets_no_answer(sent: bytes, trust: Authority, caplog: pytest.LogCaptureFixture) -> None:
    async with echo(trust.identity(A)) as server:
        member = server.call(trust.identity(COORDINATOR))
        await member.opened()
        reader, writer = await asyncio.open_connection("127.0.0.1", server.server.port)
        writer.write(sent)
        async with deadline("the end of the connection", 60):
            heard = await reader.read()
        assert b"HTTP" not in heard and len(heard) < 16  # At most a TLS alert.
        writer.close()
        await _told(caplog, 1)
        assert await answers(member)


async def _told(caplog: pytest.LogCaptureFixture, times: int) -> None:
    """Waits until `times` refusals are logged. Asserts that no more follow."""
    async with deadline("a line in the log", 10 * TOLD_S):
        while (count := len(refusals(caplog.records))) < times:
            assert count <= times
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.3)
    told = refusals(caplog.records)
    assert len(told) == times and "no certificate of this cluster was shown" in told[-1], told
    # A worker's last error is its last warning or error.
    assert not [each for each in caplog.records if each.levelno > logging.INFO and each.name.startswith("llamaclust")]


async def test_members_are_not_logged(
    trust: Authority, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with echo(trust.identity(A), handshake_s=60.0) as server:
        streams = [server.call(trust.identity(COORDINATOR)) for _ in range(4)]
        for stream in streams:
            await stream.opened()
        pass_time(monkeypatch, 61.0)
        handshakes = server.server._handshakes
        await until(lambda: handshakes._due == handshakes._begun > 0)
        assert refusals(caplog.records) == []


async def test_a_wrong_token_on_a_local_link_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    async with echo(ClusterToken("t" * 40)) as server:
        with pytest.raises(StreamBrokenError, match="token"):
            await server.call(ClusterToken("u" * 40)).opened()
        (told,) = refusals(caplog.records)
        assert "token is missing or wrong" in told and "uuu" not in told


def test_a_resumed_session_does_not_outlive_the_certificate(trust: Authority) -> None:
    """TLS checks certificates only in full handshakes, so each call checks them again."""
    for life, who in ((expired(trust, B), None), (trust.identity(B), B)):
        seen = {
            "x509_subject_alternative_name": [B.host(trust.cluster).encode()],
            "x509_pem_cert": [life.pair.certificate],
        }
        if who is None:
            with pytest.raises(UsageError, match="certificate of worker b has expired"):
                peer_principal(seen, trust.identity(A))
        else:
            assert peer_principal(seen, trust.identity(A)) == who


@pytest.mark.parametrize("names", [[], [b"a.worker.0000.llamaclust"], [b"x", b"y"], [b"\xff"], [b""]])
def test_certificates_that_name_no_member_are_refused(names: list[bytes], trust: Authority) -> None:
    with pytest.raises(UsageError, match="names no member"):
        peer_principal({"x509_subject_alternative_name": names}, trust.identity(A))


async def test_a_renewed_certificate_is_shown_from_then_on(trust: Authority) -> None:
    """A running server shows its renewed certificate to old and new clients. Open links are not disturbed."""
    identity = trust.identity(A)
    identity.pair = expired(trust, A).pair
    async with echo(identity) as server:
        caller = trust.identity(COORDINATOR)
        with pytest.raises(StreamBrokenError):
            await server.call(caller).opened()
        identity.pair = trust.new_pair(A)
        standing = server.call(caller)
        await standing.opened()
        identity.pair = expired(trust, A).pair
        assert await answers(standing)


async def test_a_caller_shows_its_renewed_certificate(trust: Authority) -> None:
    identity = expired(trust, COORDINATOR)
    async with echo(trust.identity(A)) as server:
        peer = Peer(server.server.address, identity, A)
        with pytest.raises(StreamBrokenError):
            await peer.open(JOIN).opened()
        identity.pair = trust.new_pair(COORDINATOR)
        await peer.open(JOIN).opened()
        await peer.close()


def test_names_and_labels_belong_together() -> None:
    cluster = "0123456789abcdef"
    for name in ("a", "A", "a_b", "a.b-c", "_x", "worker.a", "coordinator", "x" * 63):
        who = Principal(name)
        assert principal_of(who.host(cluster), cluster) == who
        assert who.host(cluster) == who.host(cluster).lower()
    assert principal_of(COORDINATOR.host(cluster), cluster) == COORDINATOR
    hosts = {Principal(name).host(cluster) for name in ("A", "a", "_41", "_61")}
    assert len(hosts) == 4
    for host in ("", "a", f"a.worker.{cluster}", f"x.{COORDINATOR.host(cluster)}", f"_61.worker.{cluster}.llamaclust"):
        assert principal_of(host, cluster) is None
    assert principal_of(A.host("other"), cluster) is None


def test_addresses_beyond_this_machine_need_certificates(trust: Authority) -> None:
    for address in ("10.0.0.1:1", "0.0.0.0:7101", "[::]:1", "host.example:65535"):
        check_address(address, trust.identity(A))
        check_address(address, Insecure())
        with pytest.raises(UsageError, match="not encrypted"):
            check_address(address, ClusterToken("t" * 40))
    for address in ("unix:/run/x", "dns:///a:1", "a:65536", "a", "", "xds:///a:1", "a b:1", "[::1:1"):
        with pytest.raises(UsageError, match="is not an address"):
            check_address(address, trust.identity(A))


async def test_a_handshake_that_stalls_is_cut_off(trust: Authority) -> None:
    async with echo(trust.identity(A)) as server:
        with socket.create_connection(("127.0.0.1", server.server.port)) as stalled:
            stalled.settimeout(30)
            begun = time.monotonic()
            assert await asyncio.to_thread(stalled.recv, 1) == b""
            assert time.monotonic() - begun < 20
