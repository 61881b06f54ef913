"""`GET /` and `GET /browser/...`: the page, under a policy that lets it load and reach this server alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match, Route
from starlette.types import Scope

from llamaclust.cluster.api.browser.assets import PAGE, assets

_POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",  # text cannot become markup: innerHTML and its kin throw
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
    "Cache-Control": "no-cache",  # checked each time, by ETag: files of two versions never mix for long
}


def page_routes() -> list[BaseRoute]:
    """One for each file: no path of a client ever becomes a path of a file. `/` is the page for browsers only: other
    clients get what the routes behind these have."""
    return [_PageRoute(path, _send, methods=["GET"]) for path in assets()]


def page_reply(path: str, headers: Mapping[str, str]) -> Response | None:
    """The file of a path, for a request with these headers, whose names are in small letters; None where there is
    none."""
    asset = assets().get(path)
    if asset is None or (path == PAGE and "text/html" not in headers.get("accept", "")):
        return None
    sent = {**_HEADERS, "ETag": asset.etag}
    if asset.etag in headers.get("if-none-match", ""):
        return Response(status_code=304, headers=sent)
    return Response(asset.data, media_type=asset.media_type, headers=sent)


class _PageRoute(Route):
    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, child = super().matches(scope)
        if match is not Match.NONE and page_reply(scope["path"], Headers(scope=scope)) is None:
            return Match.NONE, {}
        return match, child


async def _send(request: Request) -> Response:
    reply = page_reply(request.scope["path"], request.headers)
    assert reply is not None
    return reply
