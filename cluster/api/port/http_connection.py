"""HTTP/1.1 as it is read from clients and written to them."""

from __future__ import annotations

import re

import h11
from h11._writers import ChunkedWriter

_ABSOLUTE = re.compile(rb"https?://([^/?]+)(.*)", re.IGNORECASE)


def canonical_name(name: bytes) -> bytes:
    """A header's name with capitals, as most servers write it: some clients compare names case-sensitively."""
    return name.title()


class HttpConnection(h11.Connection):
    """Takes targets with a host, and writes canonical header names, and pieces of a streamed body without a look at the
    protocol's states."""

    @property
    def is_chunked(self) -> bool:
        """Whether pieces of a streamed body are being sent."""
        return type(self._writer) is ChunkedWriter and self.our_state is h11.SEND_BODY

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        event = super().next_event()
        return _in_origin_form(event) if isinstance(event, h11.Request) else event

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
