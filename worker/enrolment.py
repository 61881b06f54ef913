"""A worker's enrolment. The worker checks the CA, proves that it has the token, and gets a certificate."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from llamaclust.core.addresses import JOIN_PORT, joined_address
from llamaclust.core.errors import LlamaclustError, ProtocolError, RefusedError, UsageError, WorkerError
from llamaclust.core.version import VERSION
from llamaclust.wire.codec import PROTOCOL_VERSION
from llamaclust.wire.rpc.deadlines import deadline
from llamaclust.wire.security import enrolment
from llamaclust.wire.security.certificate_names import COORDINATOR, Principal
from llamaclust.wire.security.certificates import NewKey, ca_hash, cluster_id, pem
from llamaclust.wire.security.credentials import Identity
from llamaclust.wire.security.token import JoinToken

_CONNECT_S = 10.0
_EXCHANGE_S = 20.0
_STAGGER_S = 0.25
"""Seconds to wait for an answer from one address of a host name, before the next address is tried too."""


@dataclass(frozen=True, slots=True)
class Enrolled:
    identity: Identity
    reached: tuple[str, int]  # (IP address of the coordinator, port of its service).


async def enrol(host: str, port: int, token: JoinToken, name: str) -> Enrolled:
    """Enrols a worker. Raises UsageError if another attempt would fail too, and otherwise WorkerError, ProtocolError or
    DeadlineError."""
    where = joined_address(host, port)
    async with deadline(f"enrolling at {where}", _EXCHANGE_S):
        authority = await pinned(host, port, token, where)
        cluster = cluster_id(token.ca_hash)
        key = NewKey()
        async with _connected(host, port, authority, COORDINATOR.host(cluster)) as (reader, writer):
            reached = writer.get_extra_info("peername")[0]
            challenge = await _challenge(reader)
            nonce = secrets.token_bytes(enrolment.NONCE_BYTES)
            request = enrolment.Request(name, key.request, nonce).proven(token, challenge)
            await enrolment.write_message(writer, enrolment.encode_request(request))
            grant = _granted(await enrolment.read_message(reader), where)
        if not grant.is_proven(token, challenge, request):
            raise UsageError(f"the coordinator at {where} does not know this token's secret: copy the token file again")
        pair = key.with_certificate(grant.certificate)
        identity = Identity(pem(authority), cluster, Principal(name), pair)
        return Enrolled(identity, (str(reached), grant.port))


async def is_open(host: str, port: int, within_s: float) -> bool:
    try:
        async with asyncio.timeout(within_s):
            _, writer = await asyncio.open_connection(host, port, happy_eyeballs_delay=_STAGGER_S)
    except (TimeoutError, OSError):
        return False
    writer.close()
    return True


async def speaks_tls(host: str, port: int) -> bool:
    try:
        async with _connected(host, port, None, ""):
            return True
    except LlamaclustError:
        return False


async def pinned(host: str, port: int, token: JoinToken, where: str) -> bytes:
    """Returns the coordinator's CA certificate (DER) after comparing it with the token's hash. Sends no secret."""
    async with _connected(host, port, None, "") as (reader, _):
        challenge = await _challenge(reader)
    if ca_hash(challenge.ca_certificate) != token.ca_hash:
        why = "the token is for another cluster, or the connection is intercepted"
        raise UsageError(f"the coordinator at {where} does not belong to the token's cluster: {why}")
    if challenge.protocol_version != PROTOCOL_VERSION:
        versions = f"speaks protocol {challenge.protocol_version}, this worker {PROTOCOL_VERSION}"
        same = f"install the same version of llamaclust everywhere ({VERSION} here)"
        raise UsageError(f"the coordinator at {where} {versions}: {same}")
    return challenge.ca_certificate


async def _challenge(reader: asyncio.StreamReader) -> enrolment.Challenge:
    data = await enrolment.read_message(reader)
    message = None if data is None else enrolment.decode_server_message(data)
    if not isinstance(message, enrolment.Challenge):
        raise ProtocolError(
            f"the server sent no challenge: is this a coordinator's enrolment port ({JOIN_PORT} by default)?"
        )
    return message


def _granted(data: bytes | None, where: str) -> enrolment.Grant:
    if data is None:
        raise ProtocolError(f"the coordinator at {where} ended the enrolment")
    message = enrolment.decode_server_message(data)
    if isinstance(message, enrolment.Refusal):
        raise RefusedError(f"the coordinator at {where} refused: {message.reason}")
    if not isinstance(message, enrolment.Grant):
        raise ProtocolError(f"the coordinator at {where} sent a challenge instead of a certificate")
    return message


def _context(authority: bytes | None) -> ssl.SSLContext:
    """Returns a TLS context that trusts the CA `authority` (DER), or accepts any server if `authority` is None."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    if authority is None:
        # The token's hash verifies the CA certificate that the server sends.
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context
    try:
        context.load_verify_locations(cadata=authority)
    except ssl.SSLError as error:
        raise ProtocolError("the CA certificate is damaged") from error
    return context


def _reason(error: OSError) -> str:
    """Returns the system's text for an error. asyncio's text "Connect call failed" does not contain the reason."""
    if error.errno is not None and str(error.strerror).startswith("Connect call failed"):
        return os.strerror(error.errno)
    return error.strerror or str(error)


@asynccontextmanager
async def _connected(
    host: str, port: int, authority: bytes | None, name: str
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    context, limit, where = _context(authority), enrolment.MAX_ENROLMENT_BYTES, joined_address(host, port)
    try:
        async with deadline(f"connecting to {where}", _CONNECT_S):
            reader, writer = await asyncio.open_connection(
                host,
                port,
                ssl=context,
                server_hostname=name,
                limit=limit,
                ssl_shutdown_timeout=1.0,
                happy_eyeballs_delay=_STAGGER_S,
            )
    except ssl.SSLCertVerificationError as error:
        why = f"{error.verify_message}; are the clocks of both machines right?"
        raise WorkerError(f"the certificate that {where} shows is refused: {why}") from error
    except ssl.SSLError as error:
        if error.reason == "WRONG_VERSION_NUMBER":
            advice = "it is not the join port of this token's cluster; check address and port"
            raise UsageError(f"{where} does not use TLS: {advice}") from error
        raise WorkerError(f"{where} cannot be reached: {_reason(error)}") from error
    except OSError as error:
        raise WorkerError(f"{where} cannot be reached: {_reason(error)}") from error
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
