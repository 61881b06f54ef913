"""The forms of streamed replies: server-sent events, or lines of JSON as Ollama's clients read them."""

from __future__ import annotations

from enum import Enum

from llamaclust.cluster.api.error_shapes import ErrorShape, Failure, to_json

WAITING = b": waiting\n\n"


class StreamFormat(Enum):
    """By media type."""

    EVENTS = "text/event-stream"
    LINES = "application/x-ndjson"

    @property
    def has_ids(self) -> bool:
        """Whether a part tells its client where the reply is found again."""
        return self is StreamFormat.EVENTS

    @property
    def keepalive(self) -> bytes:
        """What is sent when nothing came for a while; clients that read lines would take it for a part."""
        return WAITING if self is StreamFormat.EVENTS else b""

    def part(self, event_id: str, data: bytes) -> bytes:
        """One event, with its id where the form has ids."""
        return b"id: %s\n%s" % (event_id.encode(), data) if self.has_ids else data

    def error(self, shape: ErrorShape, failure: Failure) -> bytes:
        """The last part of a stream that fails."""
        return shape.event(failure) if self is StreamFormat.EVENTS else line(shape.body(failure))


def line(value: object) -> bytes:
    """A part of a stream of lines."""
    return to_json(value) + b"\n"
