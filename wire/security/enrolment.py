"""What is said on the enrolment port: a challenge, a request, an answer; the proofs in them, and their bytes."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from dataclasses import dataclass, replace

from llamaclust.core.errors import ProtocolError
from llamaclust.proto import enrolment_pb2 as proto
from llamaclust.wire.bounds import bounded, line, one_line, parse, worker_name
from llamaclust.wire.microbatch.messages import PROTOCOL_VERSION
from llamaclust.wire.security.token import JoinToken

MAX_ENROLMENT_BYTES = 8192
NONCE_BYTES = 32
_PROOF_BYTES = 32
_LENGTH_BYTES = 4
_WORKER = b"llamaclust enrolment 1: worker"
_COORDINATOR = b"llamaclust enrolment 1: coordinator"


@dataclass(frozen=True, slots=True)
class Challenge:
    """The server's first message."""

    ca_certificate: bytes  # DER
    nonce: bytes
    protocol: tuple[int, int] = PROTOCOL_VERSION


@dataclass(frozen=True, slots=True)
class Request:
    """A worker's only message. Its proof is made by `proven`."""

    name: str
    certificate_request: bytes  # DER
    nonce: bytes
    proof: bytes = b""
    protocol: tuple[int, int] = PROTOCOL_VERSION

    def proven(self, token: JoinToken, challenge: Challenge) -> Request:
        return replace(self, proof=_mac(token, _WORKER, *_transcript(token, challenge, self)))

    def is_proven(self, token: JoinToken, challenge: Challenge) -> bool:
        """Whether who made it knows the token, and has been asked by this challenge."""
        return hmac.compare_digest(self.proof, self.proven(token, challenge).proof)


@dataclass(frozen=True, slots=True)
class Grant:
    """The server's answer: the certificate, and where it is of use."""

    certificate: bytes  # DER
    port: int
    proof: bytes = b""

    def proven(self, token: JoinToken, challenge: Challenge, request: Request) -> Grant:
        answer = (hashlib.sha256(self.certificate).digest(), self.port.to_bytes(2, "big"))
        return replace(self, proof=_mac(token, _COORDINATOR, *_transcript(token, challenge, request), *answer))

    def is_proven(self, token: JoinToken, challenge: Challenge, request: Request) -> bool:
        return hmac.compare_digest(self.proof, self.proven(token, challenge, request).proof)


@dataclass(frozen=True, slots=True)
class Refusal:
    """The server's answer to one that gets no certificate."""

    reason: str


ServerMessage = Challenge | Grant | Refusal


def _transcript(token: JoinToken, challenge: Challenge, request: Request) -> tuple[bytes, ...]:
    key = hashlib.sha256(request.certificate_request).digest()
    return token.ca_hash, challenge.nonce, request.nonce, key, request.name.encode()


def _mac(token: JoinToken, label: bytes, *parts: bytes) -> bytes:
    """Each part after its length, so that no two lists of parts are the same bytes."""
    data = b"".join(len(part).to_bytes(4, "big") + part for part in (label, *parts))
    return hmac.digest(token.secret, data, "sha256")


def encode_server_message(message: ServerMessage) -> bytes:
    match message:
        case Challenge(certificate, nonce, (major, minor)):
            challenge = proto.EnrolmentChallenge(
                protocol_major=major, protocol_minor=minor, ca_certificate=certificate, nonce=nonce
            )
            out = proto.EnrolmentServerMessage(challenge=challenge)
        case Grant(certificate, port, proof):
            grant = proto.EnrolmentGrant(certificate=certificate, port=port, proof=proof)
            out = proto.EnrolmentServerMessage(grant=grant)
        case Refusal(reason):
            out = proto.EnrolmentServerMessage(refusal=proto.EnrolmentRefusal(reason=one_line(reason)))
    return out.SerializeToString()


def decode_server_message(data: bytes) -> ServerMessage:
    """ProtocolError for bytes that are no message or break a bound."""
    message = parse(proto.EnrolmentServerMessage, data, MAX_ENROLMENT_BYTES)
    match message.WhichOneof("kind"):
        case "challenge":
            challenge = message.challenge
            nonce = _sized("nonce", challenge.nonce, NONCE_BYTES)
            return Challenge(challenge.ca_certificate, nonce, (challenge.protocol_major, challenge.protocol_minor))
        case "grant":
            grant = message.grant
            port = bounded("port", grant.port, 1, 65535)
            return Grant(grant.certificate, port, _sized("proof", grant.proof, _PROOF_BYTES))
        case "refusal":
            return Refusal(line("reason", message.refusal.reason))
        case _:
            raise ProtocolError("an enrolment message of a kind that this version does not know")


def encode_request(request: Request) -> bytes:
    major, minor = request.protocol
    return proto.EnrolmentRequest(
        name=request.name,
        certificate_request=request.certificate_request,
        nonce=request.nonce,
        proof=request.proof,
        protocol_major=major,
        protocol_minor=minor,
    ).SerializeToString()


def decode_request(data: bytes) -> Request:
    """ProtocolError for bytes that are no request or break a bound."""
    message = parse(proto.EnrolmentRequest, data, MAX_ENROLMENT_BYTES)
    return Request(
        worker_name(message.name),
        message.certificate_request,
        _sized("nonce", message.nonce, NONCE_BYTES),
        _sized("proof", message.proof, _PROOF_BYTES),
        (message.protocol_major, message.protocol_minor),
    )


def _sized(what: str, value: bytes, size: int) -> bytes:
    bounded(f"bytes of {what}", len(value), size, size)
    return value


async def read_message(reader: asyncio.StreamReader) -> bytes | None:
    """None where the other side has ended the connection. ProtocolError for what is too large or broken off."""
    try:
        head = await reader.read(1)
        if not head:
            return None
        size = int.from_bytes(head + await reader.readexactly(_LENGTH_BYTES - 1), "big")
        bounded("bytes of an enrolment message", size, 1, MAX_ENROLMENT_BYTES)
        return await reader.readexactly(size)
    except asyncio.IncompleteReadError as error:
        raise ProtocolError("the connection ended within an enrolment message") from error
    except OSError as error:
        raise ProtocolError(f"the connection broke: {error.strerror or error}") from error


async def write_message(writer: asyncio.StreamWriter, data: bytes) -> None:
    """ProtocolError where the connection breaks."""
    assert len(data) <= MAX_ENROLMENT_BYTES
    writer.write(len(data).to_bytes(_LENGTH_BYTES, "big") + data)
    try:
        await writer.drain()
    except OSError as error:
        raise ProtocolError(f"the connection broke: {error.strerror or error}") from error
