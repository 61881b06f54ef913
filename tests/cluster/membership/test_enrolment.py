"""Tests of enrolment: a client with the token gets a certificate for its name alone; each refusal is logged in a
line."""

from __future__ import annotations

import asyncio
import os
import secrets
import ssl
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from typer.testing import CliRunner, Result

from llamaclust.cli.app import app
from llamaclust.cluster.membership import enrolment as server_module
from llamaclust.cluster.membership.authority import Authority
from llamaclust.cluster.state.directory import ClusterDir, ClusterRecord
from llamaclust.core.errors import LlamaclustError, ProtocolError, UsageError, WorkerError
from llamaclust.wire.codec import PROTOCOL_VERSION
from llamaclust.wire.rpc.deadlines import deadline
from llamaclust.wire.security.certificate_names import Principal
from llamaclust.wire.security.certificates import NewKey
from llamaclust.wire.security.enrolment import (
    MAX_ENROLMENT_BYTES,
    Challenge,
    Grant,
    Refusal,
    Request,
    decode_request,
    decode_server_message,
    encode_request,
    encode_server_message,
)
from llamaclust.wire.security.token import JoinToken
from llamaclust.worker.enrolment import enrol
from support.event_loop import pass_time
from support.wire.enrolment_bytes import raw
from support.wire.trust import A, authority, echo, enrolment, refusals

OTHER_VERSION = PROTOCOL_VERSION + 1
NONCE = bytes(range(32))


async def told(caplog: pytest.LogCaptureFixture, times: int) -> list[str]:
    """Waits for `times` refusals in the log, and returns them."""
    async with deadline("lines in the log", 60):
        while len(lines := refusals(caplog.records)) < times:
            assert len(lines) <= times
            await asyncio.sleep(0.01)
    assert len(lines) == times, lines
    return lines


async def test_who_has_the_token_becomes_a_member(trust: Authority, caplog: pytest.LogCaptureFixture) -> None:
    async with enrolment(trust, port=7101) as (host, port):
        enrolled = await enrol(host, port, trust.token, "b")
        assert enrolled.reached == ("127.0.0.1", 7101)
        identity = enrolled.identity
        assert (identity.cluster, identity.principal) == (trust.cluster, Principal("b"))
        assert 23 * 3600 < identity.pair.life_s <= 24 * 3600 and identity.pair.renewal_in_s > 15 * 3600
        async with echo(trust.identity(A)) as server:
            await server.call(identity).opened()
            assert server.callers == [Principal("b")]
    assert refusals(caplog.records) == []


async def test_a_wrong_secret_is_refused_and_logged_once(trust: Authority, caplog: pytest.LogCaptureFixture) -> None:
    wrong = JoinToken(trust.token.ca_hash, b"w" * 43)
    async with enrolment(trust) as (host, port):
        with pytest.raises(UsageError, match="refused: its token belongs to another cluster"):
            await enrol(host, port, wrong, "b")
        (line,) = await told(caplog, 1)
        assert line.startswith("enrolment of 127.0.0.1: worker b: its token")
        assert "www" not in line and trust.token.secret.decode() not in line
        await enrol(host, port, trust.token, "b")


async def test_a_token_that_was_rotated_is_the_only_one_and_the_authority_stays(
    trust: Authority, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The rotation takes effect in a server that already runs."""
    old, folder = trust.token, trust.token_file.parent
    async with enrolment(trust) as (host, port):
        await enrol(host, port, old, "b")
        done = CliRunner().invoke(app, ["token", "rotate", "--trust-dir", str(folder)])
        assert done.exit_code == 0 and str(trust.token_file) in done.output
        with pytest.raises(UsageError, match="refused: its token belongs to another cluster"):
            await enrol(host, port, old, "b")
        new = JoinToken.read(trust.token_file)
        assert new.secret != old.secret and new.ca_hash == old.ca_hash
        assert new.secret.decode() not in done.output
        await enrol(host, port, new, "b")
        trust.token_file.write_text("nonsense")
        await enrol(host, port, new, "b")
    assert "the join token stays as it was: token file" in caplog.text
    missing = CliRunner().invoke(app, ["token", "rotate", "--trust-dir", str(folder / "none")])
    assert isinstance(missing.exception, UsageError) and "no such folder" in str(missing.exception)


def test_the_token_of_the_only_running_cluster_is_rotated_without_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMACLUST_STATE_DIR", str(tmp_path))
    folder = ClusterDir(tmp_path / "brain")
    folder.create()
    trust = Authority.open(folder.path / "trust")
    before = trust.token_file.read_text()

    def rotated() -> Result:
        return CliRunner().invoke(app, ["token", "rotate"])

    assert f"{tmp_path}/.trust: no such folder" in str(rotated().exception)
    with folder.locked():
        folder.write_record(ClusterRecord("brain", os.getpid(), "http://127.0.0.1:1", "m"))
        assert str(trust.token_file) in rotated().output and trust.token_file.read_text() != before
        for launcher in ("ray", "mpi"):
            folder.write_record(ClusterRecord("brain", os.getpid(), "http://127.0.0.1:1", "m", launcher=launcher))
            kept = trust.token_file.read_text()
            assert "stop the cluster first with `llamaclust down --cluster brain`" in str(rotated().exception)
            assert trust.token_file.read_text() == kept
        other = ClusterDir(tmp_path / "other")
        with other.locked():
            other.write_record(ClusterRecord("other", os.getpid(), "http://127.0.0.1:1", "m"))
            assert "several clusters are running: choose one of brain, other" in str(rotated().exception)


async def test_a_coordinator_that_the_token_does_not_name_hears_nothing(trust: Authority, tmp_path: Path) -> None:
    other = authority(tmp_path, "other")
    async with enrolment(other) as (host, port):
        with pytest.raises(UsageError, match="does not belong to the token's cluster"):
            await enrol(host, port, trust.token, "b")


async def test_a_server_with_the_right_ca_certificate_but_no_key_of_it_is_refused(
    trust: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interceptor may show the CA's certificate: it is public."""
    other = authority(tmp_path, "other")
    monkeypatch.setattr(Authority, "certificate", trust.certificate)
    async with enrolment(other) as (host, port):
        with pytest.raises(WorkerError, match=r"certificate that .* shows is refused"):
            await enrol(host, port, trust.token, "b")


async def test_a_member_cannot_play_the_coordinator(trust: Authority) -> None:
    async with server_module.EnrolmentServer("127.0.0.1:0", trust, trust.identity(A), lambda name: None, 7) as server:
        host, _, port = server.address.rpartition(":")
        with pytest.raises(WorkerError, match=r"certificate that .* shows is refused"):
            await enrol(host, int(port), trust.token, "b")


async def test_a_server_that_does_not_know_the_secret_is_refused(
    trust: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unproven(self: Grant, token: JoinToken, challenge: Challenge, request: Request) -> Grant:
        return replace(self, proof=bytes(32))

    async with enrolment(trust) as (host, port):
        real = Grant.proven
        monkeypatch.setattr(Grant, "proven", unproven)
        monkeypatch.setattr(
            Grant, "is_proven", lambda self, *given: secrets.compare_digest(self.proof, real(self, *given).proof)
        )
        with pytest.raises(UsageError, match="does not know this token's secret"):
            await enrol(host, port, trust.token, "b")


async def test_a_replayed_request_is_refused(trust: Authority, caplog: pytest.LogCaptureFixture) -> None:
    async with enrolment(trust) as (host, port):
        async with raw(host, port) as first:
            request = Request("b", NewKey().request, NONCE).proven(trust.token, await first.challenge())
            assert isinstance(await first.say(request), Grant)
        async with raw(host, port) as second:
            await second.challenge()
            assert isinstance(await second.say(request), Refusal)
        await told(caplog, 1)


@pytest.mark.parametrize("what", ["name", "key", "nonce", "proof"])
async def test_what_is_changed_on_the_way_is_refused(what: str, trust: Authority) -> None:
    async with enrolment(trust) as (host, port), raw(host, port) as client:
        request = Request("b", NewKey().request, NONCE).proven(trust.token, await client.challenge())
        changes: dict[str, dict[str, Any]] = {
            "name": {"name": "c"},
            "key": {"certificate_request": NewKey().request},
            "nonce": {"nonce": bytes(32)},
            "proof": {"proof": bytes(32)},
        }
        assert isinstance(await client.say(replace(request, **changes[what])), Refusal)


def _request_of(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    return (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))
        .sign(key, hashes.SHA256())
        .public_bytes(Encoding.DER)
    )


def _wrongly_signed() -> bytes:
    request = bytearray(NewKey().request)
    request[-1] ^= 1
    return bytes(request)


_EC_KEY, _P256 = bytes.fromhex("2a8648ce3d0201"), bytes.fromhex("2a8648ce3d030107")


def _with_last(oid: bytes, last: int) -> bytes:
    """Returns a request whose key has another object identifier, which the library does not know."""
    return NewKey().request.replace(oid, oid[:-1] + bytes([last]), 1)


BAD_REQUESTS = {
    "nothing": b"",
    "noise": b"\x30\x82" + bytes(100),
    "rsa": _request_of(rsa.generate_private_key(65537, 2048)),
    "another curve": _request_of(ec.generate_private_key(ec.SECP384R1())),
    "not its own": _wrongly_signed(),
    "an unknown curve": _with_last(_P256, 99),
    "an unknown algorithm": _with_last(_EC_KEY, 99),
}


@pytest.mark.parametrize("what", BAD_REQUESTS)
async def test_keys_that_will_not_do_are_refused(what: str, trust: Authority) -> None:
    async with enrolment(trust) as (host, port), raw(host, port) as client:
        request = Request("b", BAD_REQUESTS[what], NONCE).proven(trust.token, await client.challenge())
        answer = await client.say(request)
        assert isinstance(answer, Refusal) and "certificate request" in answer.reason


async def test_names_that_are_not_wanted_are_refused(trust: Authority, caplog: pytest.LogCaptureFixture) -> None:
    async with enrolment(trust, lambda name: None if name == "a" else "there is no such worker") as (host, port):
        await enrol(host, port, trust.token, "a")
        with pytest.raises(UsageError, match="there is no such worker"):
            await enrol(host, port, trust.token, "b")
        async with raw(host, port) as client:
            request = Request("../a", NewKey().request, NONCE).proven(trust.token, await client.challenge())
            assert await client.say(request) is None
        assert "worker name '../a'" in (await told(caplog, 2))[-1]


async def test_another_version_is_refused_by_name(trust: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    async with enrolment(trust) as (host, port):
        async with raw(host, port) as client:
            challenge = await client.challenge()
            request = Request("b", NewKey().request, NONCE, protocol_version=OTHER_VERSION).proven(
                trust.token, challenge
            )
            answer = await client.say(request)
            assert isinstance(answer, Refusal)
            assert f"speaks protocol {OTHER_VERSION}, this coordinator {PROTOCOL_VERSION}:" in answer.reason
        monkeypatch.setattr("llamaclust.worker.enrolment.PROTOCOL_VERSION", OTHER_VERSION)
        versions = f"speaks protocol {PROTOCOL_VERSION}, this worker {OTHER_VERSION}"
        with pytest.raises(UsageError, match=f"{versions}: install the same version"):
            await enrol(host, port, trust.token, "b")


MALFORMED = {
    "http": b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    "too large": (MAX_ENROLMENT_BYTES + 1).to_bytes(4, "big"),
    "huge": b"\xff\xff\xff\xff",
    "empty": bytes(4),
    "broken off": b"\0\0\0\x09half",
    "noise": b"\0\0\0\x04\xff\xff\xff\xff",
}


@pytest.mark.parametrize("what", MALFORMED)
async def test_malformed_messages_end_the_connection_with_a_line(
    what: str, trust: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    async with enrolment(trust) as (host, port):
        async with raw(host, port) as client:
            await client.challenge()
            client.writer.write(MALFORMED[what])
            client.writer.write_eof() if client.writer.can_write_eof() else None
            if what == "broken off":
                client.writer.transport.abort()
            else:
                assert await client.hear() is None
        await told(caplog, 1)
        await enrol(host, port, trust.token, "b")


async def test_plain_text_gets_no_answer(trust: Authority, caplog: pytest.LogCaptureFixture) -> None:
    async with enrolment(trust) as (host, port):
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        async with deadline("the end", 60):
            assert b"HTTP" not in await reader.read()
        writer.close()
        await told(caplog, 1)


async def test_a_connection_closed_in_the_handshake_is_logged_with_its_reason(
    trust: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    async with enrolment(trust) as (host, port):
        _, writer = await asyncio.open_connection(host, port)
        writer.close()
        [line] = await told(caplog, 1)
        assert line == "enrolment of 127.0.0.1: the connection was closed"


async def test_old_tls_is_refused(trust: Authority) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    async with enrolment(trust) as (host, port):
        with pytest.raises(OSError):
            await asyncio.open_connection(host, port, ssl=context)


async def test_who_says_nothing_is_cut_off_and_more_than_so_many_are_not_heard(
    trust: Authority, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server_module, "MAX_CONNECTIONS", 2)
    async with enrolment(trust) as (host, port), raw(host, port) as first, raw(host, port) as second:
        await first.challenge()
        await second.challenge()
        with pytest.raises(OSError):
            async with raw(host, port):
                pass
        with pytest.raises(LlamaclustError):
            await enrol(host, port, trust.token, "b")
        assert "2 connections are open" in refusals(caplog.records)[0]
        pass_time(monkeypatch, server_module._EXCHANGE_S)
        assert await first.hear() is None and await second.hear() is None
        assert f"an enrolment took longer than {server_module._EXCHANGE_S:g} s" in (await told(caplog, 4))[-1]
        await enrol(host, port, trust.token, "b")


async def test_connections_of_one_address_leave_room_for_others(
    trust: Authority, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server_module, "MAX_OF_HOST", 1)
    monkeypatch.setattr(server_module, "_HANDSHAKE_S", 120.0)
    async with enrolment(trust) as (host, port):
        _, silent = await asyncio.open_connection(host, port, local_addr=("127.0.0.2", 0))
        reader, more = await asyncio.open_connection(host, port, local_addr=("127.0.0.2", 0))
        async with asyncio.timeout(60):  # Shorter than the handshake's timeout.
            assert await reader.read() == b""
        assert "enrolment of 127.0.0.2: 1 connections are open, 1 of them from this host" in refusals(caplog.records)[0]
        for _ in range(3):
            await enrol(host, port, trust.token, "b")
        silent.close()
        more.close()


async def test_a_flood_of_refusals_does_not_fill_the_log(trust: Authority, caplog: pytest.LogCaptureFixture) -> None:
    async with enrolment(trust) as (host, port):
        for _ in range(60):
            _, writer = await asyncio.open_connection(host, port)
            writer.write(b"x" * 64)
            writer.close()
        await enrol(host, port, trust.token, "b")
        assert len(refusals(caplog.records)) <= 20


def test_messages_arrive_as_they_were_sent() -> None:
    for message in (Challenge(b"ca", NONCE, 2), Grant(b"certificate", 65535, NONCE), Refusal("no")):
        assert decode_server_message(encode_server_message(message)) == message
    request = Request("b", b"request", NONCE, NONCE, 2)
    assert decode_request(encode_request(request)) == request
    for nonce in (b"", bytes(31), bytes(33)):
        with pytest.raises(ProtocolError, match="nonce"):
            decode_request(encode_request(replace(request, nonce=nonce)))
    with pytest.raises(ProtocolError, match="port"):
        decode_server_message(encode_server_message(Grant(b"", 0, NONCE)))


def test_proofs_hang_on_every_part_and_cannot_change_sides(trust: Authority) -> None:
    challenge, key = Challenge(trust.certificate, NONCE), NewKey().request
    request = Request("b", key, NONCE).proven(trust.token, challenge)
    assert request.is_proven(trust.token, challenge)
    assert not request.is_proven(trust.token, replace(challenge, nonce=bytes(32)))
    assert not request.is_proven(replace(trust.token, ca_hash=bytes(32)), challenge)
    grant = Grant(b"certificate", 7, b"").proven(trust.token, challenge, request)
    assert grant.is_proven(trust.token, challenge, request) and grant.proof != request.proof
    for changed in (replace(grant, certificate=b"x"), replace(grant, port=8)):
        assert not changed.is_proven(trust.token, challenge, request)
