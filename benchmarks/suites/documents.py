from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_REPLIES = ("not_a_server_error", "content_type_conformance", "response_schema_conformance")
_SEED = 1
_REQUEST_S = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """An OpenAPI document, and checks of a server's replies."""

    place: str  # The document's path in a checkout, or its URL path on the server, which begins with /.
    checks: tuple[str, ...] = ()  # Checks in addition to server errors, content types and schemas of replies.
    filters: tuple[str, ...] = ()  # Options that choose operations.

    def words(self, api: str, checkout: Path | None, examples: int) -> Iterator[str]:
        yield "run"
        yield f"{api}{self.place}" if checkout is None else str(checkout / self.place)
        yield from (f"--url={api}", f"--seed={_SEED}", f"--max-examples={examples}", f"--request-timeout={_REQUEST_S}")
        yield from ("--continue-on-failure", "--warnings=off", f"--checks={','.join(_REPLIES + self.checks)}")
        yield from self.filters
