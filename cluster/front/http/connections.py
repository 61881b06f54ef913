"""Listens on the API's port, and implements HTTP/1.1 and TLS. TLS handshakes count toward the limits on connections."""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from enum import Enum, auto
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

import h11
from h11._writers import ChunkedWriter
from starlette.responses import Response

from llamaclust.cluster.front.errors import OPENAI, Failure
from llamaclust.cluster.front.http.responses import JsonResponse
from llamaclust.core.addresses import joined_address
from llamaclust.wire.listening import listener, listening_host

if TYPE_CHECKING:
    from llamaclust.cluster.front.http.certificate import ServerCertificate

MAX_HEADERS = 200
"""Maximum number of lines in the head of a request. Even a short header takes a few hundred bytes of memory."""
EVENTS_A_TURN = 64
"""Number of body pieces that one connection may parse before other connections are served."""
_FEW_CHUNKS, _LEAST_CHUNK_BYTES = 4096, 16
"""A body of more than `_FEW_CHUNKS` chunks must have at least `_LEAST_CHUNK_BYTES` bytes per chunk on average."""
_ABSOLUTE = re.compile(rb"https?://([^/?]+)(.*)", re.IGNORECASE)


def canonical_name(name: bytes) -> bytes:
    return name.title()


class HttpConnection(h11.Connection):
    """A server connection that limits headers, chunks, and the work done in one turn of the event loop."""

    def __init__(self, our_role: type[h11.SERVER], max_incomplete_event_size: int) -> None:
        super().__init__(our_role, max_incomplete_event_size)
        self._most_head_bytes = max_incomplete_event_size  # h11 itself accepts more if it arrives in one piece.
        self._events_left = EVENTS_A_TURN
        self._chunks = self._body_bytes = 0

    def begin_turn(self) -> None:
        self._events_left = EVENTS_A_TURN

    @property
    def ended_turn(self) -> bool:
        return self._events_left == 0

    @property
    def is_chunked(self) -> bool:
        return type(self._writer) is ChunkedWriter and self.our_state is h11.SEND_BODY

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """Returns the next event. Raises RemoteProtocolError if the request is invalid or exceeds a limit."""
        if self.ended_turn:
            return h11.NEED_DATA
        if self.their_state is h11.IDLE:
            self._check_head()
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._chunks = self._body_bytes = 0
            _check_version(event)
            return _in_origin_form(event)
        if isinstance(event, h11.Data):
            self._events_left -= 1
            self._check_chunks(event)
        return event

    def _check_head(self) -> None:
        received, _ = self.trailing_data
        ends = (received.find(end) for end in (b"\n\r\n", b"\n\n"))
        head_bytes = min((end for end in ends if end >= 0), default=len(received))
        if head_bytes > self._most_head_bytes:
            what = f"the head of the request has more than {self._most_head_bytes} bytes"
            raise h11.RemoteProtocolError(what, error_status_hint=431)
        lines = received.count(b"\n", 0, 1 + head_bytes)
        if lines > MAX_HEADERS:
            raise h11.RemoteProtocolError(f"the request has more than {MAX_HEADERS} headers", error_status_hint=431)

    def _check_chunks(self, data: h11.Data) -> None:
        self._chunks += data.chunk_start
        self._body_bytes += len(data.data)
        if self._chunks > _FEW_CHUNKS and self._body_bytes < _LEAST_CHUNK_BYTES * self._chunks:
            raise h11.RemoteProtocolError(
                f"the body has {self._chunks} chunks with only {self._body_bytes} bytes; send larger chunks"
            )

    # Implements only the last overload of the base method.
    def send(self, event: h11.Event) -> bytes | None:  # type: ignore[override]
        if type(event) is h11.Data and self.is_chunked:
            return chunk(event.data)
        if isinstance(event, h11.Response):
            headers = [(canonical_name(name), value) for name, value in event.headers]
            event = h11.Response(status_code=event.status_code, headers=headers, reason=event.reason)
        return super().send(event)


def _check_version(request: h11.Request) -> None:
    if not request.http_version.startswith(b"1."):
        what = f"HTTP/{request.http_version.decode()} is not supported; use HTTP/1.1"
        raise h11.RemoteProtocolError(what, error_status_hint=505)


def _in_origin_form(request: h11.Request) -> h11.Request:
    match = _ABSOLUTE.fullmatch(request.target)
    if match is None:
        return request
    target = match[2] if match[2].startswith(b"/") else b"/" + match[2]
    headers = [(b"host", match[1]), *(header for header in request.headers if header[0] != b"host")]
    return h11.Request(method=request.method, headers=headers, target=target, http_version=request.http_version)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""


_READ_BYTES: Final = 1 << 16


class _Phase(Enum):
    HANDSHAKE = auto()
    OPEN = auto()
    ENDED = auto()  # Nothing more is written or read.


class TlsProtocol(asyncio.Protocol):
    """Wraps another protocol in TLS. Unlike asyncio's TLS, it calls `connection_made` before the handshake."""

    def __init__(self, carried: asyncio.Protocol, context: ssl.SSLContext) -> None:
        self.context = context
        self._carried = carried
        self.pause_writing, self.resume_writing = carried.pause_writing, carried.resume_writing  # type: ignore[method-assign]
        self.eof_received = carried.eof_received  # type: ignore[method-assign]
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._phase = _Phase.HANDSHAKE
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        # `carried` limits connections, so it must know this one before the handshake.
        # `_TlsTransport` has all methods of a transport.
        self._carried.connection_made(_TlsTransport(self, transport))  # type: ignore[arg-type]

    def connection_lost(self, exc: Exception | None) -> None:
        self._phase = _Phase.ENDED
        self._carried.connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._phase is _Phase.ENDED:
            return
        self._incoming.write(data)
        try:
            if self._phase is _Phase.HANDSHAKE:
                self._tls.do_handshake()
                self._phase = _Phase.OPEN
                self._send()
            self._read()
        except ssl.SSLWantReadError:
            self._send()
        except ssl.SSLError as error:
            self._fail(error)

    def _read(self) -> None:
        """Passes decrypted data to the wrapped protocol. Raises ssl.SSLWantReadError when there is no more data."""
        while self._phase is _Phase.OPEN and not self._transport.is_closing():
            try:
                data = self._tls.read(_READ_BYTES)
            except ssl.SSLZeroReturnError:
                data = b""
            if data:
                self._carried.data_received(data)
            else:
                self._carried.eof_received()
                self.close()

    def _fail(self, error: ssl.SSLError) -> None:
        is_plain_http = self._phase is _Phase.HANDSHAKE and error.reason == "HTTP_REQUEST"
        self._phase = _Phase.ENDED
        if is_plain_http:
            self._transport.write(_NOT_TLS)
            # The client may still be sending. Closing the connection now could make it lose the reply.
            self._transport.write_eof()
        else:
            self._send()  # Sends the TLS alert that describes the error.
            self._transport.close()

    def _send(self) -> None:
        if self._outgoing.pending:
            self._transport.write(self._outgoing.read())

    def write(self, data: Any) -> None:
        if self._phase is _Phase.OPEN and data:
            self._tls.write(data)
            self._send()

    def close(self) -> None:
        if self._phase is _Phase.OPEN:
            with suppress(ssl.SSLError):  # The client has not agreed to close yet.
                self._tls.unwrap()
            self._send()
        self._phase = _Phase.ENDED
        self._transport.close()


class _TlsTransport:
    """The transport for the wrapped protocol. `write` and `close` use TLS. `transport` gets all other calls."""

    def __init__(self, tls: TlsProtocol, transport: asyncio.Transport) -> None:
        self._tls = tls
        self._transport = transport
        self.write, self.close = tls.write, tls.close

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._tls.context if name == "sslcontext" else self._transport.get_extra_info(name, default)


def whole(reply: Response) -> bytes:
    status, phrase = reply.status_code, HTTPStatus(reply.status_code).phrase.encode()
    headers = b"".join(b"%s: %s\r\n" % (canonical_name(name), value) for name, value in reply.raw_headers)
    return b"HTTP/1.1 %d %s\r\n%sConnection: close\r\n\r\n%s" % (status, phrase, headers, bytes(reply.body))


_PLAIN: Final = Failure(400, "this port speaks TLS: write https:// in its address", "https_required")
_NOT_TLS: Final = whole(JsonResponse(OPENAI.body(_PLAIN), _PLAIN.status))


_CURE = "choose another port with `--port N` or `listen:` (0 for any free port)"


@dataclass(frozen=True, slots=True)
class ApiPort:
    listener: socket.socket
    certificate: ServerCertificate | None = None  # None for plain HTTP.
    further: tuple[socket.socket, ...] = ()

    @property
    def listeners(self) -> list[socket.socket]:
        return [self.listener, *self.further]

    @property
    def url(self) -> str:
        scheme = "http" if self.certificate is None else "https"
        return f"{scheme}://{joined_address(listening_host(self.listener), self.listener.getsockname()[1])}"

    def carrying(self, protocol: asyncio.Protocol) -> asyncio.Protocol:
        return protocol if self.certificate is None else TlsProtocol(protocol, self.certificate.context)


@contextmanager
def listening(addresses: Sequence[tuple[str, int]], certificate: ServerCertificate | None) -> Iterator[ApiPort]:
    with ExitStack() as sockets:
        first, *further = [sockets.enter_context(listener(*address, _CURE)) for address in addresses]
        yield ApiPort(first, certificate, tuple(further))
