"""The short way from a streamed reply to its connection."""

from __future__ import annotations

from typing import Final, Protocol

from starlette.types import Scope

EXTENSIONS: Final = "extensions"
BODY: Final = "llamaclust.body"
WRITE: Final = "write"


class BodyWriter(Protocol):
    """Of a body whose reply has begun."""

    def write(self, data: bytes) -> bool:
        """Takes a piece where the connection does; whether it did: else the piece is to be sent in the manner of ASGI,
        through all that stands between endpoint and server. Pieces that come together are sent together."""
        ...

    def flush(self) -> None:
        """Sends what was taken: before anything that is sent in the manner of ASGI."""
        ...


class _NoWriter:
    def write(self, _: bytes) -> bool:
        return False

    def flush(self) -> None:
        """Nothing was taken."""


def body_writer(scope: Scope) -> BodyWriter:
    """Of a request; one that takes nothing for another server's."""
    writer: BodyWriter = scope.get(EXTENSIONS, {}).get(BODY, {}).get(WRITE, _NoWriter())
    return writer
