"""HTTP routes, JSON responses and error responses. An error has the format of the API that the request uses."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, NamedTuple

from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route as PathRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llamaclust.cluster.front.errors import ErrorShape, Failure, HttpError, failure_of, internal_error, shape_of_path
from llamaclust.cluster.front.json_text import to_json
from llamaclust.core.errors import LlamaclustError, QueueFullError

JSON: Final = "application/json"
EVENTS: Final = "text/event-stream"
CLIENT_GONE = 499
BODY_WRITER: Final = "llamaclust.body"
"""Name of an ASGI extension that writes a stream directly. Only the server in this package offers it."""

_CODES = {404: "not_found", 405: "method_not_allowed"}


class JsonResponse(Response):
    media_type = JSON

    def render(self, content: Any) -> bytes:
        return to_json(content)


def unsupported(what: str, status: int = 501) -> Callable[[Request], Awaitable[Response]]:
    """Makes an endpoint that refuses all requests with the reason `what`."""

    async def refuse(request: Request) -> Response:
        raise HttpError(status, "not_supported", f"{given_path(request.scope)}: {what}")

    refuse.__doc__ = f"Refused: {what}."
    return refuse


def error_response(error: LlamaclustError, scope: Scope) -> Response:
    headers = dict(error.headers) if isinstance(error, HttpError) else {}
    if isinstance(error, QueueFullError):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    return _response(failure_of(error), scope, headers)


def add_error_handlers(app: Starlette) -> None:
    for kind in (LlamaclustError, HTTPException, ClientDisconnect, Exception):
        app.add_exception_handler(kind, _on_error)


def _response(failure: Failure, scope: Scope, headers: Mapping[str, str] | None = None) -> Response:
    return JsonResponse(shape_of(scope).body(failure), status_code=failure.status, headers=headers)


async def _on_error(request: Request, error: Exception) -> Response:
    if isinstance(error, ClientDisconnect):
        return Response(status_code=CLIENT_GONE)
    if isinstance(error, HTTPException):
        return _routing_error(request, error)
    return error_response(error if isinstance(error, LlamaclustError) else internal_error(), request.scope)


def _routing_error(request: Request, error: HTTPException) -> Response:
    headers = error.headers
    if headers and "Allow" in headers:
        headers = {**headers, "Allow": _methods(request)}
        if request.method == "OPTIONS":
            return Response(status_code=204, headers=headers)
    message = f"{request.method} {given_path(request.scope)}: {error.detail}"
    failure = Failure(error.status_code, message, _CODES.get(error.status_code, "invalid_request_error"))
    return _response(failure, request.scope, headers)


def _methods(request: Request) -> str:
    path = request.scope["path"]
    routes = (route for route in request.app.routes if isinstance(route, PathRoute) and route.path_regex.match(path))
    methods = {method for route in routes for method in route.methods or ()}
    return ", ".join(sorted(methods | ({"HEAD"} if "GET" in methods else set())))


_DISCARD_S = 0.9
"""Maximum seconds to read and discard the rest of a body. It is below the 1 s that a stopping server waits."""


def has_body(scope: Scope) -> bool:
    headers = Headers(scope=scope)
    return headers.get("content-length", "0") != "0" or "transfer-encoding" in headers


class EarlyReplies:
    """Middleware that delays the end of a reply by up to 0.9 s, until the request's body has arrived."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # A client with `Expect` sends its body only after the server agrees.
        if not has_body(scope) or "expect" in Headers(scope=scope):
            await self._app(scope, receive, send)
            return
        is_read = False

        async def read() -> Message:
            nonlocal is_read
            message = await receive()
            is_read = message["type"] != "http.request" or not message.get("more_body", False)
            return message

        async def reply(message: Message) -> None:
            is_end = message["type"] == "http.response.body" and not message.get("more_body", False)
            if not is_end or is_read:
                await send(message)
                return
            # The client could lose the reply if the connection closed while the body arrives.
            await send({**message, "more_body": True})
            with suppress(TimeoutError):
                async with asyncio.timeout(_DISCARD_S):
                    while not is_read:
                        await read()
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        await self._app(scope, read, reply)


_WITHOUT_V1: Final = ("/models", "/stream/", "/streams/")
"""Prefixes of paths that clients request if their base URL lacks `/v1`."""
_OTHER_NAMES: Final = {"/v1/health": "/health"}
_PARAMETER: Final = re.compile(r"\{(\w+)(?::path)?\}")
_STATE: Final = "traced_route"
_GIVEN: Final = "given_path"
_SHAPING: Final = "error_endpoint"
_UNKNOWN: Final = "other"


class QueryParameter(NamedTuple):
    name: str
    kind: str  # A type of JSON schema, such as "string".
    text: str


class Route(PathRoute):
    def __init__(
        self,
        method: str,
        path: str,
        endpoint: Callable[[Request], Awaitable[Response]],
        body: type[BaseModel] | None = None,
        *,
        computes: bool = False,
        errors: ErrorShape | None = None,
        query: Sequence[QueryParameter] = (),
        form: str = EVENTS,
        types: Sequence[str] | None = None,
        status: int = 200,
    ) -> None:
        """`computes` is true if requests need a loaded model. `types` are the media types of replies. The default is
        JSON, and also `form` (the media type of streams) if `body` has a field `stream`."""
        super().__init__(path, endpoint, methods=[method])
        self.method = method
        self.body = body
        self.computes = computes
        self.errors = errors
        self.query = query
        streams = body is not None and "stream" in body.model_fields
        self.types = types if types is not None else (JSON, form) if streams else (JSON,)
        self.status = status


class Paths:
    """Middleware that removes the prefix from paths, adds a missing `/v1`, and replaces HEAD with GET."""

    def __init__(self, app: ASGIApp, prefix: str) -> None:
        """`prefix` is "" or begins with "/". Requests may omit it."""
        self._app = app
        self._prefix = prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given: str = scope["path"]
        if self._prefix and given.startswith(self._prefix + "/"):
            given = given.removeprefix(self._prefix)
        scope["state"] = {**scope.get("state", {}), _GIVEN: given}  # Outer middlewares read the path from the state.
        given = given.removesuffix("/") or "/"  # A redirect would lose the prefix and the host name of a proxy.
        path = "/v1" + given if given.startswith(_WITHOUT_V1) else _OTHER_NAMES.get(given, given)
        method = "GET" if scope["method"] == "HEAD" else scope["method"]  # The server sends no body in reply to HEAD.
        await self._app({**scope, "path": path, "raw_path": path.encode(), "method": method}, receive, send)


def given_path(scope: Scope) -> str:
    path: str = scope.get("state", {}).get(_GIVEN, scope["path"])
    return path


def shape_errors(scope: Scope, endpoint: str) -> None:
    """Selects the format of error replies to a request: the error format of the path `endpoint`."""
    scope.setdefault("state", {})[_SHAPING] = endpoint


def shape_of(scope: Scope) -> ErrorShape:
    given = scope.get("state", {}).get(_SHAPING, given_path(scope))
    routes = (route for route in scope["app"].routes if isinstance(route, Route))
    own = (route.errors for route in routes if route.errors is not None and given.startswith(route.path))
    return next(own, shape_of_path(given))


def template(path: str) -> str:
    return _PARAMETER.sub(r"{\1}", path)


def traced_names(scope: Scope) -> list[str]:
    """Returns a list to which `name_route` will add the name of the request's route."""
    names: list[str] = []
    scope["state"] = {**scope.get("state", {}), _STATE: names}
    return names


def name_route(scope: Scope) -> None:
    if (names := scope.get("state", {}).get(_STATE)) is not None:
        posts = (route for route in scope["app"].routes if isinstance(route, Route) and route.method == "POST")
        paths = (template(route.path) for route in posts if route.path_regex.match(scope["path"]))
        names.append(next(paths, _UNKNOWN))
