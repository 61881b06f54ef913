"""The files of the web page. They are read once, contain no secrets, need no key, and load nothing from other hosts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Final

from starlette.responses import Response

_TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_FOLDER: Final = Path(__file__).parents[1] / "page/static"
PAGE: Final = "/"


@dataclass(frozen=True, slots=True)
class Asset:
    data: bytes
    media_type: str
    etag: str  # Hash of the content, in quotes.


@cache
def assets() -> Mapping[str, Asset]:
    found = (file for file in _FOLDER.rglob("*") if file.suffix in _TYPES)
    return MappingProxyType({_path(file.relative_to(_FOLDER).as_posix()): _asset(file) for file in sorted(found)})


def _path(name: str) -> str:
    return PAGE if name == "index.html" else f"/browser/{name}"


def _asset(file: Path) -> Asset:
    data = file.read_bytes()
    return Asset(data, _TYPES[file.suffix], f'"{hashlib.sha256(data).hexdigest()[:32]}"')


_POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",  # Images in messages are data URLs.
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",  # Forbids innerHTML and similar, so that text cannot become markup.
        "trusted-types 'none'",
    )
)
_HEADERS: Final = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Vary": "Accept",
    "Cache-Control": "no-cache",  # The browser checks the ETag each time, so that files of two versions do not mix.
}


def page_reply(path: str, headers: Mapping[str, str]) -> Response | None:
    """Returns the file at a path, or None if there is no such file. The names in `headers` must be lower-case."""
    asset = assets().get(path)
    if asset is None or (path == PAGE and "text/html" not in headers.get("accept", "")):
        return None
    sent = {**_HEADERS, "ETag": asset.etag}
    if asset.etag in headers.get("if-none-match", ""):
        return Response(status_code=304, headers=sent)
    return Response(asset.data, media_type=asset.media_type, headers=sent)
