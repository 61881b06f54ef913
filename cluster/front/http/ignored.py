"""A header of the reply that names fields of the request, and parts of its tools' schemas, without effect, unless a
header of the request asks for a refusal."""

from __future__ import annotations

import logging
import re
from bisect import bisect_right
from collections.abc import Sequence
from contextvars import ContextVar
from itertools import accumulate
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llamaclust.cluster.front.text.sharing import ignored_parts

HEADER: Final = "X-Llamaclust-Ignored"
STRICT_HEADER: Final = "X-Llamaclust-Strict"
_YES: Final = ("1", "true", "yes")
_MOST_LOGGED: Final = 256
_MOST_CHARACTERS: Final = 160
_MOST_OF_A_HEADER: Final = 3072
"""Some proxies take no more than 4 KiB for all headers of a reply."""
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9_.$:/\[\]-]")

_log = logging.getLogger(__name__)
_is_strict: ContextVar[bool] = ContextVar("is_strict", default=False)


def is_strict_request() -> bool:
    """Returns whether this task's request is to be refused if a part of it has no effect."""
    return _is_strict.get()


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
                names = [*dict.fromkeys(_UNSAFE.sub("?", name)[:_MOST_CHARACTERS] or "?" for name in fields)]
                MutableHeaders(scope=message)[HEADER] = _listed(names)
                self._report(scope["path"], names)
            await send(message)

        asked = Headers(scope=scope).get(STRICT_HEADER, "").lower() in _YES
        token, strict_token = ignored_parts.set(fields), _is_strict.set(asked)
        try:
            await self._app(scope, receive, name_fields)
        finally:
            ignored_parts.reset(token)
            _is_strict.reset(strict_token)

    def _report(self, path: str, fields: Sequence[str]) -> None:
        new = [field for field in fields if (path, field) not in self._logged]
        if new and len(self._logged) < _MOST_LOGGED:
            self._logged.update((path, field) for field in new)
            _log.info("%s: fields without effect: %s", path, _listed(new))


def _listed(names: Sequence[str]) -> str:
    """The names; how many more there are where they are too long together."""
    shown = bisect_right([*accumulate(len(name) + 2 for name in names)], _MOST_OF_A_HEADER)
    more = [f"and {len(names) - shown} more"] if shown < len(names) else []
    return ", ".join([*names[:shown], *more])
