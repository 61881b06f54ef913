"""Middlewares that admit requests. They check API keys, hosts and origins, and limit open requests and their bytes."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llamaclust.cluster.front.errors import HttpError
from llamaclust.cluster.front.http.page import assets, page_reply
from llamaclust.cluster.front.http.responses import error_response, has_body, name_route
from llamaclust.cluster.front.settings import ApiSettings
from llamaclust.cluster.front.text.sharing import current_owner, hold_bytes
from llamaclust.core.addresses import bounded_host, is_address, is_loopback
from llamaclust.core.sharing.shares import Shares, fits

OPEN_PATHS = frozenset({"/health", "/live"})
"""Paths that need no API key. Their replies contain no error details if the request has no valid key."""

LOCALHOST = "localhost"

_FOREIGN_ORIGIN = "origin_not_allowed"
_LOCAL_PAGE = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d{1,5})?"
_HOST = re.compile(r"(\[[0-9a-fA-F:.]{2,60}\]|[A-Za-z0-9._-]{1,255})(?::\d{1,5})?")


def key_error(headers: Mapping[str, str], api_keys: Sequence[str]) -> HttpError | None:
    digests, key = _digests(tuple(api_keys)), sent_key(headers)
    if not digests:
        return None
    given = _digest(key)
    if key and sum(hmac.compare_digest(given, known) for known in digests) > 0:
        return None
    needed = "this API needs a key: send the header Authorization: Bearer KEY, or X-Api-Key: KEY"
    return HttpError(401, "invalid_api_key", "unknown API key" if key else needed, {"WWW-Authenticate": "Bearer"})


@lru_cache(maxsize=2)
def _digests(keys: tuple[str, ...]) -> tuple[bytes, ...]:
    return tuple(map(_digest, keys))


def sent_key(headers: Mapping[str, str]) -> str:
    """Returns the API key of a request, or "" if it has none. Anthropic's clients send it in X-Api-Key."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "").strip()


def owner(headers: Mapping[str, str], api_keys: Sequence[str]) -> str:
    key = sent_key(headers)
    return _digest(key).hex()[:32] if key in api_keys else ""


def require_first_key(headers: Mapping[str, str], settings: ApiSettings, action: str) -> None:
    """Raises HttpError (403) if API keys are set and the request lacks the first key. The message contains `action`."""
    keys = settings.api_keys
    if keys and not hmac.compare_digest(_digest(sent_key(headers)), _digest(keys[0])):
        raise HttpError(403, "first_key_required", f"only the first key of api_keys_file may {action}")


def page_origins(settings: ApiSettings) -> re.Pattern[str]:
    known = {"*": r".*", LOCALHOST: _LOCAL_PAGE}
    parts = [known.get(origin, re.escape(origin)) for origin in settings.allowed_origins]
    return re.compile("|".join(f"(?:{part})" for part in parts) or r"(?!)")


class KeyGate:
    """Middleware that refuses requests without a valid API key, except requests for `OPEN_PATHS` and the web page."""

    def __init__(self, app: ASGIApp, settings: ApiSettings) -> None:
        self._app = app
        self._api_keys = settings.api_keys
        self._open_paths = OPEN_PATHS | assets().keys()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        page = page_reply(scope["path"], headers) if scope["method"] == "GET" else None
        if page is not None:
            await page(scope, receive, send)
            return
        error = key_error(headers, self._api_keys)
        if error is not None and scope["path"] not in self._open_paths:
            await error_response(error, scope)(scope, receive, send)
            return
        scope["state"] = {**scope.get("state", {}), "is_trusted": error is None}
        client = scope.get("client")
        current_owner.set(owner(headers, self._api_keys) or (bounded_host(client[0]) if client else ""))
        if error is None:
            name_route(scope)
        await self._app(scope, receive, send)


class Security:
    def __init__(self, app: ASGIApp, settings: ApiSettings) -> None:
        self._app = app
        own = (settings.listen_host, *settings.further_hosts)
        self._takes_any_ip = not all(map(is_loopback, own))
        self._hosts = {name.lower() for name in (*settings.allowed_hosts, *own)}
        self._origins = page_origins(settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, reply = Headers(scope=scope), self._app
        try:
            self._check(headers, scope)
        except HttpError as error:
            is_preflight = scope["method"] == "OPTIONS" and "access-control-request-method" in headers
            is_unanswered = error.code == _FOREIGN_ORIGIN and is_preflight
            # An empty reply without CORS headers makes the browser refuse the page's request.
            reply = Response() if is_unanswered else error_response(error, scope)
        await reply(scope, receive, send)

    def _check(self, headers: Headers, scope: Scope) -> None:
        self._check_host(headers, scope)
        self._check_origin(headers, scope)
        # A proxy in front of this server might obey the header that this server ignores.
        if "content-length" in headers and "transfer-encoding" in headers:
            message = "the request has Content-Length and Transfer-Encoding: send one of them, not both"
            raise HttpError(400, "bad_request", message, {"Connection": "close"})

    def _check_host(self, headers: Headers, scope: Scope) -> None:
        given = headers.getlist("host")
        match = _HOST.fullmatch(given[0]) if len(given) == 1 else None
        if match is None:
            raise HttpError(400, "bad_host", "the request needs one valid Host header")
        host = match[1].strip("[]").lower()
        server = scope.get("server")
        own = {str(server[0]).lower()} if server else set()
        if "*" in self._hosts or host in self._hosts | own or is_loopback(host):
            return
        if self._takes_any_ip and is_address(host):  # DNS rebinding needs a host name.
            return
        cure = "to allow the name, add it to `allowed_hosts` in the cluster file"
        raise HttpError(403, "host_not_allowed", f"Host {host!r} is not a name of this API; {cure}")

    def _check_origin(self, headers: Headers, scope: Scope) -> None:
        origin = _origin(headers, scope)
        if origin is None or self._origins.fullmatch(origin.lower()):
            return
        scheme, _, host = origin.lower().partition("://")
        is_secure = scheme == "https" or scope["scheme"] == "http"  # The proxy may terminate TLS.
        if is_secure and host == headers["host"].lower():
            return
        cure = "to allow them, add their origin to `allowed_origins` in the cluster file"
        raise HttpError(403, _FOREIGN_ORIGIN, f"web pages of {origin[:200]!r} may not use this API; {cure}")


def _origin(headers: Headers, scope: Scope) -> str | None:
    """Returns the origin of the web page that sent a request ("null" if unknown), or None if no page sent it."""
    # A GET or HEAD request may come from a link.
    is_foreign = headers.get("sec-fetch-site", "").lower() == "cross-site" and scope["method"] not in ("GET", "HEAD")
    return headers.get("origin", "null" if is_foreign else None)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


@dataclass(slots=True, eq=False)
class _Open:
    task: asyncio.Task[Any]
    owner: str
    awaits_body: bool  # True until the last part of the body has arrived.
    body_bytes: int = 0
    is_answered: bool = False  # True once the reply has begun.
    refusal: HttpError | None = None  # The error to send if the request was cancelled.


class Admission:
    """Tracks the open requests of an HTTP app, and limits their number and size. Not thread-safe."""

    def __init__(self, settings: ApiSettings) -> None:
        self.is_stopping = False
        self._settings = settings
        self._open: dict[_Open, None] = {}  # Oldest first.
        self._body_bytes = Shares(settings.max_held_bytes)

    def stop(self) -> None:
        self.is_stopping = True
        self._refuse(self._unfinished, _stopping())

    async def wait_idle(self) -> None:
        while self._open:
            await asyncio.wait([request.task for request in self._open])

    def end(self) -> None:
        self.is_stopping = True
        self._refuse([request for request in self._open if not request.is_answered], _stopping())

    def check(self) -> None:
        if self.is_stopping:
            raise _stopping()
        whole = [request for request in self._open if not request.awaits_body]
        own = sum(request.owner == current_owner.get() for request in whole)
        if not fits(own, len(whole), self._settings.max_requests):
            raise _busy(f"the server is busy with open requests, {own} of them from this client")

    @contextmanager
    def held(self, *, has_body: bool) -> Iterator[_Open]:
        """Registers the current request while the context is open."""
        task = asyncio.current_task()
        assert task is not None
        request = _Open(task, current_owner.get(), has_body)
        self._open[request] = None
        # Clients with slow bodies must not block others.
        if len(unfinished := self._unfinished) > self._settings.max_requests:
            counts = Counter(each.owner for each in unfinished)
            oldest = max(unfinished, key=lambda each: counts[each.owner])
            self._refuse([oldest], _busy("newer requests replaced this request, because its body had not arrived"))
        try:
            yield request
        finally:
            del self._open[request]
            self._body_bytes.take(request.owner, -request.body_bytes)

    def count(self, request: _Open, message: Message) -> None:
        """Counts a part of a request's body. Raises HttpError (503) if the server is stopping or too busy."""
        if request.awaits_body and not message.get("more_body", False):
            self.check()
            request.awaits_body = False
        self.hold(request, len(message.get("body", b"")))

    def hold(self, request: _Open, size: int) -> None:
        """Counts more bytes of an open request. Raises HttpError (503) if open requests hold too many bytes."""
        if request not in self._open:
            return
        if not self._body_bytes.fits(request.owner, size):
            raise _busy(
                "the server is busy with open requests, "
                f"{self._body_bytes.held[request.owner] + size} bytes of them from this client"
            )
        request.body_bytes += size
        self._body_bytes.take(request.owner, size)

    @property
    def _unfinished(self) -> list[_Open]:
        return [request for request in self._open if request.awaits_body]

    def _refuse(self, requests: list[_Open], refusal: HttpError) -> None:
        for request in requests:
            if request.refusal is None:
                request.awaits_body = False
                request.refusal = refusal
                request.task.cancel()


class AdmissionGate:
    """Middleware that applies `Admission` to POST requests and other requests with a body."""

    def __init__(self, app: ASGIApp, admission: Admission) -> None:
        self._app = app
        self._admission = admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "POST" and not has_body(scope):
            await self._app(scope, receive, send)
            return
        try:
            self._admission.check()
        except HttpError as refusal:
            await error_response(refusal, scope)(scope, receive, send)
        else:
            with self._admission.held(has_body=has_body(scope)) as request:
                refused = await self._answer(request, scope, receive, send)
            if refused is not None:
                await error_response(refused, scope)(scope, receive, send)

    async def _answer(self, request: _Open, scope: Scope, receive: Receive, send: Send) -> HttpError | None:
        """Runs the app. Returns the error to send if `Admission` cancelled the request before the reply began."""

        async def counted() -> Message:
            message = await receive()
            self._admission.count(request, message)
            return message

        async def noted(message: Message) -> None:
            request.is_answered = True
            await send(message)

        token = hold_bytes.set(partial(self._admission.hold, request))
        try:
            await self._app(scope, counted, noted)
        except asyncio.CancelledError:  # `Admission` cancelled this task to end the request.
            if request.refusal is None:
                raise
            request.task.uncancel()  # Otherwise a timeout while the refusal is sent would raise CancelledError.
            return None if request.is_answered else request.refusal
        finally:
            hold_bytes.reset(token)  # A value in the task's context would keep the request in memory.
        return None


def _stopping() -> HttpError:
    return HttpError(
        503, "cluster_stopping", "the cluster is stopping and takes no more requests", {"Connection": "close"}
    )


def _busy(why: str) -> HttpError:
    return HttpError(503, "server_busy", f"{why}; try again", {"Retry-After": "1", "Connection": "close"})
