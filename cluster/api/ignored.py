"""Fields of a request that are accepted and have no effect: a header of the reply names them."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Final

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER: Final = "X-Llamaclust-Ignored"
_MOST_LOGGED: Final = 256
_MOST_CHARACTERS: Final = 64
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9_.\[\]-]")

_log = logging.getLogger(__name__)
_ignored: ContextVar[list[str] | None] = ContextVar("ignored", default=None)


def report_ignored(names: Sequence[str]) -> None:
    """Names fields of the body of the request that this task answers."""
    fields = _ignored.get()
    if fields is not None:
        fields += [_UNSAFE.sub("?", name)[:_MOST_CHARACTERS] or "?" for name in names]


class IgnoredFields:
    """Adds the header. The log has a line for each field the first time that a client of this process sends it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._logged: set[tuple[str, str]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        fields: list[str] = []

        async def name_fields(message: Message) -> None:
            if fields and message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = ", ".join(fields)
                self._report(scope["path"], fields)
            await send(message)

        token = _ignored.set(fields)
        try:
            await self._app(scope, receive, name_fields)
        finally:
            _ignored.reset(token)

    def _report(self, path: str, fields: Sequence[str]) -> None:
        new = [field for field in fields if (path, field) not in self._logged]
        if new and len(self._logged) < _MOST_LOGGED:
            self._logged.update((path, field) for field in new)
            _log.info("%s: fields without effect: %s", path, ", ".join(new))
