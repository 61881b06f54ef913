"""HTTP/1.1 as it is written to clients."""

from __future__ import annotations

import h11
from h11._writers import ChunkedWriter


def canonical_name(name: bytes) -> bytes:
    """A header's name with capitals, as most servers write it: some clients compare names case-sensitively."""
    return name.title()


class HttpConnection(h11.Connection):
    """Writes canonical header names, and pieces of a streamed body without a look at the protocol's states."""

    @property
    def is_chunked(self) -> bool:
        """Whether pieces of a streamed body are being sent."""
        return type(self._writer) is ChunkedWriter and self.our_state is h11.SEND_BODY

    def send(self, event: h11.Event) -> bytes | None:  # type: ignore[override]  # as the last of its overloads
        if type(event) is h11.Data and self.is_chunked:
            return chunk(event.data)
        if isinstance(event, h11.Response):
            headers = [(canonical_name(name), value) for name, value in event.headers]
            event = h11.Response(status_code=event.status_code, headers=headers, reason=event.reason)
        return super().send(event)


def chunk(data: bytes) -> bytes:
    """A piece of a streamed body."""
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""
