"""The enrolment port: TLS with the coordinator's certificate, a challenge, a request, an answer, the end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
import ssl
import tempfile
from pathlib import Path

from llamaclust.cluster.config.values import split_address
from llamaclust.cluster.membership.authority import Authority
from llamaclust.cluster.membership.registry import RefusalReason
from llamaclust.core.errors import LlamaclustError, ProtocolError, UsageError
from llamaclust.wire.codec import PROTOCOL_VERSION
from llamaclust.wire.rpc.deadlines import deadline
from llamaclust.wire.rpc.rejections import RefusalLog
from llamaclust.wire.security.credentials import Identity, Principal
from llamaclust.wire.security.enrolment import (
    MAX_ENROLMENT_BYTES,
    NONCE_BYTES,
    Challenge,
    Grant,
    Refusal,
    Request,
    ServerMessage,
    decode_request,
    encode_server_message,
    read_message,
    write_message,
)

MAX_CONNECTIONS = 64
"""At a time; more are closed at once."""
_HANDSHAKE_S = 5.0
_EXCHANGE_S = 10.0
_REST_S = 0.2
"""After the system had no room for a connection."""
_BACKLOG = 128
_log = logging.getLogger(__name__)


class EnrolmentServer:
    """Serves while it is entered."""

    def __init__(
        self, listen: str, authority: Authority, identity: Identity, refusal: RefusalReason | None, port: int
    ) -> None:
        """`identity`: the coordinator's; `port`: of the Coordinator service."""
        self._listen = listen
        self._authority = authority
        self._identity = identity
        self._refusal = refusal
        self._port = port
        self._refusals = RefusalLog(_log)
        self._connections: set[asyncio.Task[None]] = set()
        self._tls: tuple[bytes, ssl.SSLContext] | None = None
        self._socket: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None

    @property
    def address(self) -> str:
        """Where it listens, with the port that it has."""
        assert self._socket is not None
        return f"{self._listen.rpartition(':')[0]}:{self._socket.getsockname()[1]}"

    async def __aenter__(self) -> EnrolmentServer:
        self._socket = _listening(self._listen)
        self._accepting = asyncio.create_task(self._accept(self._socket))
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._accepting is not None and self._socket is not None
        work = (self._accepting, *self._connections)
        for task in work:
            task.cancel()
        await asyncio.gather(*work, return_exceptions=True)
        self._socket.close()

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, peer = await loop.sock_accept(listener)
            except OSError:
                await asyncio.sleep(_REST_S)
                continue
            if len(self._connections) >= MAX_CONNECTIONS:
                connection.close()
                self._refusals.tell(f"enrolment of {peer[0]}: {MAX_CONNECTIONS} others are under way")
                continue
            task = asyncio.create_task(self._serve(connection, str(peer[0])))
            self._connections.add(task)
            task.add_done_callback(self._connections.discard)

    async def _serve(self, connection: socket.socket, peer: str) -> None:
        try:
            async with deadline("an enrolment", _EXCHANGE_S):
                await self._exchange(connection)
        except (LlamaclustError, OSError) as error:
            self._refusals.tell(f"enrolment of {peer}: {str(error) or 'the connection was closed'}")
        except Exception:  # noqa: BLE001  a border: the port serves on
            _log.exception("an enrolment failed")
        finally:
            connection.close()

    async def _exchange(self, connection: socket.socket) -> None:
        reader, writer = await _secured(connection, self._context())
        try:
            challenge = Challenge(self._authority.certificate, secrets.token_bytes(NONCE_BYTES))
            await write_message(writer, encode_server_message(challenge))
            data = await read_message(reader)
            if data is None:
                return  # it came for the CA's certificate
            request = decode_request(data)
            answer = self._answer(challenge, request)
            await write_message(writer, encode_server_message(answer))
            if isinstance(answer, Refusal):
                raise ProtocolError(f"worker {request.name}: {answer.reason}")
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def _answer(self, challenge: Challenge, request: Request) -> ServerMessage:
        token = self._authority.token
        if not request.is_proven(token, challenge):
            return Refusal("its token belongs to another cluster or was rotated; copy the token file again")
        if request.protocol_version != PROTOCOL_VERSION:
            versions = f"{request.protocol_version}, this coordinator {PROTOCOL_VERSION}"
            return Refusal(f"it speaks protocol {versions}: install the same version")
        if self._refusal is not None and (why := self._refusal(request.name)) is not None:
            return Refusal(why)
        try:
            certificate = self._authority.certify(request.certificate_request, Principal(request.name))
        except ProtocolError as error:
            return Refusal(str(error))
        return Grant(certificate, self._port).proven(token, challenge, request)

    def _context(self) -> ssl.SSLContext:
        """Of the present certificate."""
        pair = self._identity.pair
        if self._tls is None or self._tls[0] != pair.certificate:
            self._tls = (pair.certificate, _server_context(pair.private_key + pair.certificate))
        return self._tls[1]


def _server_context(pem: bytes) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0
    with tempfile.TemporaryDirectory(prefix="llamaclust-") as folder:  # Python takes certificates from files only
        path = Path(folder) / "pair"
        path.touch(mode=0o600)
        path.write_bytes(pem)
        context.load_cert_chain(path)
    return context


def _listening(address: str) -> socket.socket:
    host, port = split_address(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise UsageError(
            f"cannot listen on {host} port {port}: {error.strerror}; choose another: `join.listen`"
        ) from error
    listener.setblocking(False)
    return listener


async def _secured(
    connection: socket.socket, context: ssl.SSLContext
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    loop = asyncio.get_running_loop()
    connection.setblocking(False)
    reader = asyncio.StreamReader(limit=MAX_ENROLMENT_BYTES)
    protocol = asyncio.StreamReaderProtocol(reader)
    transport, _ = await loop.connect_accepted_socket(
        lambda: protocol, connection, ssl=context, ssl_handshake_timeout=_HANDSHAKE_S, ssl_shutdown_timeout=1.0
    )
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)
