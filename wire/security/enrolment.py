"""Messages on the enrolment port, their codec, and the proofs in them. The coordinator sends a challenge, the worker
sends a request, and the coordinator answers with a grant or a refusal."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from dataclasses import dataclass, replace
from typing import Annotated

from llamaclust.core.bounds import Integer, Reason, Size, WorkerName, bounded
from llamaclust.core.errors import ProtocolError
from llamaclust.proto import enrolment_pb2 as proto
from llamaclust.wire.codec import PROTOCOL_VERSION, Envelope, parse, read, write
from llamaclust.wire.security.token import JoinToken

MAX_ENROLMENT_BYTES = 8192
NONCE_BYTES = 32
_LENGTH_BYTES = 4
_Nonce = Annotated[bytes, Size(NONCE_BYTES, NONCE_BYTES)]
_Proof = Annotated[bytes, Size(32, 32)]
_WORKER = b"llamaclust enrolment 1: worker"
_COORDINATOR = b"llamaclust enrolment 1: coordinator"


@dataclass(frozen=True, slots=True)
class Challenge:
    ca_certificate: bytes  # DER
    nonce: _Nonce
    protocol_version: int = PROTOCOL_VERSION


@dataclass(frozen=True, slots=True)
class Request:
    name: WorkerName
    certificate_request: bytes  # DER
    nonce: _Nonce
    proof: _Proof = b""
    protocol_version: int = PROTOCOL_VERSION

    def proven(self, token: JoinToken, challenge: Challenge) -> Request:
        return replace(self, proof=_mac(token, _WORKER, *_transcript(token, challenge, self)))

    def is_proven(self, token: JoinToken, challenge: Challenge) -> bool:
        return hmac.compare_digest(self.proof, self.proven(token, challenge).proof)


@dataclass(frozen=True, slots=True)
class Grant:
    certificate: bytes  # DER
    port: Annotated[int, Integer(1, 65535)]
    proof: _Proof = b""

    def proven(self, token: JoinToken, challenge: Challenge, request: Request) -> Grant:
        answer = (hashlib.sha256(self.certificate).digest(), self.port.to_bytes(2, "big"))
        return replace(self, proof=_mac(token, _COORDINATOR, *_transcript(token, challenge, request), *answer))

    def is_proven(self, token: JoinToken, challenge: Challenge, request: Request) -> bool:
        return hmac.compare_digest(self.proof, self.proven(token, challenge, request).proof)


@dataclass(frozen=True, slots=True)
class Refusal:
    reason: Reason


ServerMessage = Challenge | Grant | Refusal


def _transcript(token: JoinToken, challenge: Challenge, request: Request) -> tuple[bytes, ...]:
    key = hashlib.sha256(request.certificate_request).digest()
    return token.ca_hash, challenge.nonce, request.nonce, key, request.name.encode()


def _mac(token: JoinToken, label: bytes, *parts: bytes) -> bytes:
    """Returns an HMAC. Each part is preceded by its length, so that different lists of parts never give equal bytes."""
    data = b"".join(len(part).to_bytes(4, "big") + part for part in (label, *parts))
    return hmac.digest(token.secret, data, "sha256")


_server: Envelope[ServerMessage] = Envelope(proto.EnrolmentServerMessage, ServerMessage, MAX_ENROLMENT_BYTES)
encode_server_message = _server.encode
decode_server_message = _server.decode


def encode_request(request: Request) -> bytes:
    record = proto.EnrolmentRequest()
    write(request, record)
    return record.SerializeToString()


def decode_request(data: bytes) -> Request:
    return read(Request, parse(proto.EnrolmentRequest, data, MAX_ENROLMENT_BYTES))


async def read_message(reader: asyncio.StreamReader) -> bytes | None:
    """Reads a message, or returns None at the end. Raises ProtocolError if a message is too large or incomplete."""
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
    assert len(data) <= MAX_ENROLMENT_BYTES
    writer.write(len(data).to_bytes(_LENGTH_BYTES, "big") + data)
    try:
        await writer.drain()
    except OSError as error:
        raise ProtocolError(f"the connection broke: {error.strerror or error}") from error
