"""The short way from a streamed reply to its connection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from starlette.types import Scope

EXTENSIONS: Final = "extensions"
BODY: Final = "llamaclust.body"
WRITE: Final = "write"

BodyWriter = Callable[[bytes], bool]
"""Writes a piece of a body whose reply has begun, where the connection takes it at once; whether it did: else the piece
is to be sent in the manner of ASGI, through all that stands between endpoint and server."""


def body_writer(scope: Scope) -> BodyWriter:
    """Of a request; one that writes nothing for another server's."""
    writer: BodyWriter = scope.get(EXTENSIONS, {}).get(BODY, {}).get(WRITE, _never)
    return writer


def _never(_: bytes) -> bool:
    return False
