"""HTTP/1.1 as it is read from clients and written to them."""

from __future__ import annotations

import re

import h11
from h11._writers import ChunkedWriter

MAX_HEADERS = 200
"""Lines of a request's head. Each header becomes objects of some hundred bytes, however short it is."""
EVENTS_A_TURN = 64
"""Pieces of bodies that one connection has parsed before others get their turn."""
_FEW_CHUNKS, _LEAST_CHUNK_BYTES = 4096, 16
"""Beyond so many chunks, those of a body must have so many bytes in the mean: parsing takes as long for each."""
_ABSOLUTE = re.compile(rb"https?://([^/?]+)(.*)", re.IGNORECASE)


def canonical_name(name: bytes) -> bytes:
    """A header's name with capitals, as most servers write it: some clients compare names case-sensitively."""
    return name.title()


class HttpConnection(h11.Connection):
    """Takes targets with a host, and writes canonical header names, and pieces of a streamed body without a look at the
    protocol's states. Bounds the headers of a request, the chunks of its body, and what is parsed in one turn."""

    def __init__(self, our_role: type[h11.SERVER], max_incomplete_event_size: int) -> None:
        super().__init__(our_role, max_incomplete_event_size)
        self._events_left = EVENTS_A_TURN
        self._chunks = self._body_bytes = 0

    def begin_turn(self) -> None:
        self._events_left = EVENTS_A_TURN

    @property
    def ended_turn(self) -> bool:
        """`next_event` gave no more because the turn is over: what was received may hold further events."""
        return self._events_left == 0

    @property
    def is_chunked(self) -> bool:
        """Whether pieces of a streamed body are being sent."""
        return type(self._writer) is ChunkedWriter and self.our_state is h11.SEND_BODY

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """RemoteProtocolError for too many headers or too small chunks, as for what is no HTTP."""
        if self.ended_turn:
            return h11.NEED_DATA
        if self.their_state is h11.IDLE:
            self._check_head()
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._chunks = self._body_bytes = 0
            return _in_origin_form(event)
        if isinstance(event, h11.Data):
            self._events_left -= 1
            self._check_chunks(event)
        return event

    def _check_head(self) -> None:
        received, _ = self.trailing_data
        ends = (received.find(end) for end in (b"\n\r\n", b"\n\n"))
        lines = received.count(b"\n", 0, 1 + min((end for end in ends if end >= 0), default=len(received)))
        if lines > MAX_HEADERS:
            raise h11.RemoteProtocolError(f"more than {MAX_HEADERS} headers", error_status_hint=431)

    def _check_chunks(self, data: h11.Data) -> None:
        self._chunks += data.chunk_start
        self._body_bytes += len(data.data)
        if self._chunks > _FEW_CHUNKS and self._body_bytes < _LEAST_CHUNK_BYTES * self._chunks:
            raise h11.RemoteProtocolError(f"{self._chunks} chunks of {self._body_bytes} bytes in all")

    def send(self, event: h11.Event) -> bytes | None:  # type: ignore[override]  # as the last of its overloads
        if type(event) is h11.Data and self.is_chunked:
            return chunk(event.data)
        if isinstance(event, h11.Response):
            headers = [(canonical_name(name), value) for name, value in event.headers]
            event = h11.Response(status_code=event.status_code, headers=headers, reason=event.reason)
        return super().send(event)


def parts_of(target: bytes) -> tuple[bytes | None, bytes]:
    """The host of a request's target, if it has one as for a proxy, and the rest."""
    match = _ABSOLUTE.fullmatch(target)
    if match is None:
        return None, target
    return match[1], match[2] if match[2].startswith(b"/") else b"/" + match[2]


def _in_origin_form(request: h11.Request) -> h11.Request:
    """With a target that is a path. Its host, if it has one, is that of the header (RFC 9112, 3.2.2)."""
    host, target = parts_of(request.target)
    if host is None:
        return request
    headers = [(b"host", host), *(header for header in request.headers if header[0] != b"host")]
    return h11.Request(method=request.method, headers=headers, target=target, http_version=request.http_version)


def chunk(data: bytes) -> bytes:
    """A piece of a streamed body."""
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""
