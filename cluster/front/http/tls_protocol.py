"""TLS between a connection and the protocol that it carries, on the server's side."""

from __future__ import annotations

import asyncio
import ssl
from contextlib import suppress
from enum import Enum, auto
from typing import Any, Final

from llamaclust.cluster.front.errors import OPENAI, Failure
from llamaclust.cluster.front.json_values import to_json

_READ_BYTES: Final = 1 << 16


class _Phase(Enum):
    HANDSHAKE = auto()
    OPEN = auto()
    ENDED = auto()  # this side writes nothing more, and reads nothing


class TlsProtocol(asyncio.Protocol):
    """Carries the bytes of another protocol in TLS.

    In asyncio's own TLS a protocol begins after the handshake, and a connection ends when the other side agrees: both
    could be delayed by any client, unseen by the bounds on connections. Here the carried protocol begins with the
    connection, so that its bounds on places and on silence hold for handshakes, and the end waits only for what is
    written. What it writes before the handshake is complete is lost.
    """

    def __init__(self, carried: asyncio.Protocol, context: ssl.SSLContext) -> None:
        self.context = context
        self._carried = carried
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._phase = _Phase.HANDSHAKE
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._carried.connection_made(_TlsTransport(self, transport))

    def connection_lost(self, exc: Exception | None) -> None:
        self._phase = _Phase.ENDED
        self._carried.connection_lost(exc)

    def pause_writing(self) -> None:
        self._carried.pause_writing()

    def resume_writing(self) -> None:
        self._carried.resume_writing()

    def eof_received(self) -> bool | None:
        return self._carried.eof_received()

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
        """Hands all data on that is complete; then, ssl.SSLWantReadError."""
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
        """Of a handshake with a client that speaks something else, or of a damaged connection."""
        is_plain_http = self._phase is _Phase.HANDSHAKE and error.reason == "HTTP_REQUEST"
        self._phase = _Phase.ENDED
        if is_plain_http:
            self._transport.write(_NOT_TLS)
            self._transport.write_eof()  # the client may still send: one that is cut off sees no reply
        else:
            self._send()  # what TLS says about the error
            self._transport.close()

    def _send(self) -> None:
        if self._outgoing.pending:
            self._transport.write(self._outgoing.read())

    def write(self, data: Any) -> None:
        """Bytes of the carried protocol."""
        if self._phase is _Phase.OPEN and data:
            self._tls.write(data)
            self._send()

    def end(self) -> None:
        """Says that nothing more comes."""
        if self._phase is _Phase.OPEN:
            with suppress(ssl.SSLError):  # the other side has not said so
                self._tls.unwrap()
            self._send()
        self._phase = _Phase.ENDED

    def close(self) -> None:
        """Once all is sent that was written."""
        self.end()
        self._transport.close()


class _TlsTransport(asyncio.Transport):
    """A connection as the carried protocol uses it."""

    def __init__(self, tls: TlsProtocol, transport: asyncio.Transport) -> None:
        super().__init__()
        self._tls = tls
        self._transport = transport

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._tls.context if name == "sslcontext" else self._transport.get_extra_info(name, default)

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def is_reading(self) -> bool:
        return self._transport.is_reading()

    def pause_reading(self) -> None:
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        self._transport.resume_reading()

    def get_write_buffer_size(self) -> int:
        return self._transport.get_write_buffer_size()

    def write(self, data: Any) -> None:
        self._tls.write(data)

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self._tls.end()
        self._transport.write_eof()

    def close(self) -> None:
        self._tls.close()

    def abort(self) -> None:
        self._transport.abort()


def _not_tls() -> bytes:
    """The reply to a request that is not encrypted."""
    failure = Failure(400, "this port speaks TLS: write https:// in its address", "https_required")
    body = to_json(OPENAI.body(failure))
    head = "HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body


_NOT_TLS: Final = _not_tls()
