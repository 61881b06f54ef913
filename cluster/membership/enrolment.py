"""Serves the enrolment port, at which new workers get certificates."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
import ssl
from collections import Counter

from llamaclust.cluster.membership.authority import Authority
from llamaclust.cluster.membership.join_rules import RefusalReason
from llamaclust.core.addresses import bounded_host, split_address
from llamaclust.core.errors import LlamaclustError, ProtocolError
from llamaclust.core.version import VERSION
from llamaclust.wire.codec import PROTOCOL_VERSION
from llamaclust.wire.listening import listener
from llamaclust.wire.rpc.deadlines import deadline
from llamaclust.wire.rpc.rejections import RefusalLog
from llamaclust.wire.rpc.task_set import TaskSet
from llamaclust.wire.security import enrolment as protocol
from llamaclust.wire.security.certificate_names import Principal
from llamaclust.wire.security.credentials import Identity
from llamaclust.wire.security.server_context import server_context
from llamaclust.wire.security.token import JoinToken

MAX_CONNECTIONS = 64
"""Maximum number of open connections. Further connections are closed immediately."""
MAX_OF_HOST = 32
"""Maximum number of open connections from one address, so that one address cannot block others."""
_HANDSHAKE_S = 5.0
_EXCHANGE_S = 10.0
_REST_S = 0.2
"""Pause in seconds after the system failed to accept a connection."""
_log = logging.getLogger(__name__)


class EnrolmentServer:
    """The server of the enrolment port. It runs while its context is open."""

    def __init__(
        self, listen: str, authority: Authority, identity: Identity, refusal: RefusalReason | None, port: int
    ) -> None:
        self._listen = listen
        self._authority = authority
        self._identity = identity
        self._refusal = refusal
        self._port = port
        self._refusals = RefusalLog(_log)
        self._accepting = TaskSet()
        self._connections = TaskSet()
        self._of_host = Counter[str]()
        self._tls: tuple[bytes, ssl.SSLContext] | None = None
        self._socket: socket.socket | None = None

    @property
    def address(self) -> str:
        assert self._socket is not None
        return f"{self._listen.rpartition(':')[0]}:{self._socket.getsockname()[1]}"

    async def __aenter__(self) -> EnrolmentServer:
        self._socket = listener(*split_address(self._listen), "choose another port with `join.listen`")
        self._accepting.start(self._accept(self._socket))
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._socket is not None
        await self._accepting.close()
        await self._connections.close()
        self._socket.close()

    async def _accept(self, port: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, peer = await loop.sock_accept(port)
            except OSError:
                await asyncio.sleep(_REST_S)
                continue
            host = bounded_host(str(peer[0]))
            if len(self._connections) >= MAX_CONNECTIONS or self._of_host[host] >= MAX_OF_HOST:
                connection.close()
                others = f"{len(self._connections)} connections are open, {self._of_host[host]} of them from this host"
                self._refusals.tell(f"enrolment of {host}: {others}")
                continue
            self._of_host[host] += 1
            self._connections.start(self._serve(connection, host))

    async def _serve(self, connection: socket.socket, peer: str) -> None:
        try:
            async with deadline("an enrolment", _EXCHANGE_S):
                await self._exchange(connection)
        except (LlamaclustError, OSError) as error:
            self._refusals.tell(f"enrolment of {peer}: {str(error) or 'the connection was closed'}")
        except Exception:  # noqa: BLE001  The server must continue.
            _log.exception("an enrolment failed")
        finally:
            connection.close()
            self._of_host -= Counter((peer,))

    async def _exchange(self, connection: socket.socket) -> None:
        reader, writer = await _secured(connection, self._context())
        try:
            challenge = protocol.Challenge(self._authority.certificate, secrets.token_bytes(protocol.NONCE_BYTES))
            await protocol.write_message(writer, protocol.encode_server_message(challenge))
            data = await protocol.read_message(reader)
            if data is None:
                return  # The client only wanted the CA certificate.
            request = protocol.decode_request(data)
            answer = self._answer(challenge, request, await self._authority.current_token())
            await protocol.write_message(writer, protocol.encode_server_message(answer))
            if isinstance(answer, protocol.Refusal):
                raise ProtocolError(f"worker {request.name}: {answer.reason}")
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def _answer(
        self, challenge: protocol.Challenge, request: protocol.Request, token: JoinToken
    ) -> protocol.ServerMessage:
        if not request.is_proven(token, challenge):
            return protocol.Refusal("its token belongs to another cluster or was rotated; copy the token file again")
        if request.protocol_version != PROTOCOL_VERSION:
            versions = f"{request.protocol_version}, this coordinator {PROTOCOL_VERSION}"
            same = f"install the same version of llamaclust everywhere ({VERSION} here)"
            return protocol.Refusal(f"it speaks protocol {versions}: {same}")
        if self._refusal is not None and (why := self._refusal(request.name)) is not None:
            return protocol.Refusal(why)
        try:
            certificate = self._authority.certify(request.certificate_request, Principal(request.name))
        except ProtocolError as error:
            return protocol.Refusal(str(error))
        return protocol.Grant(certificate, self._port).proven(token, challenge, request)

    def _context(self) -> ssl.SSLContext:
        pair = self._identity.pair
        if self._tls is None or self._tls[0] != pair.certificate:
            context = server_context(pair.private_key + pair.certificate, ssl.TLSVersion.TLSv1_3)
            context.num_tickets = 0
            self._tls = (pair.certificate, context)
        return self._tls[1]


async def _secured(
    connection: socket.socket, context: ssl.SSLContext
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    loop = asyncio.get_running_loop()
    connection.setblocking(False)
    reader = asyncio.StreamReader(limit=protocol.MAX_ENROLMENT_BYTES)
    adapter = asyncio.StreamReaderProtocol(reader)
    transport, _ = await loop.connect_accepted_socket(
        lambda: adapter, connection, ssl=context, ssl_handshake_timeout=_HANDSHAKE_S, ssl_shutdown_timeout=1.0
    )
    return reader, asyncio.StreamWriter(transport, adapter, reader, loop)
