"""Errors as replies, in the shape that the API of the request has (`front/errors.py`)."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Scope

from llamaclust.cluster.front.errors import Failure, HttpError, chosen_shape, failure_of, internal_error
from llamaclust.cluster.front.http.paths import given_path
from llamaclust.cluster.front.json_values import to_json
from llamaclust.core.errors import LlamaclustError, QueueFullError

CLIENT_GONE = 499

_CODES = {404: "not_found", 405: "method_not_allowed"}


class JsonResponse(Response):
    """A body of JSON."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content)


def unsupported(what: str, status: int = 501) -> Callable[[Request], Awaitable[Response]]:
    """The endpoint of a path that clients of other servers know and this one refuses."""

    async def refuse(request: Request) -> Response:
        raise HttpError(status, "not_supported", f"{given_path(request.scope)}: {what}")

    refuse.__doc__ = f"Refused: {what}."
    return refuse


def error_response(error: LlamaclustError, scope: Scope) -> Response:
    """In the shape of the request's API."""
    headers = dict(error.headers) if isinstance(error, HttpError) else {}
    if isinstance(error, QueueFullError):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    return _response(failure_of(error), scope, headers)


def add_error_handlers(app: Starlette) -> None:
    """Every error leaves the app in the same shape."""
    app.add_exception_handler(LlamaclustError, _on_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(ClientDisconnect, _on_client_gone)
    app.add_exception_handler(Exception, _on_bug)


def _response(failure: Failure, scope: Scope, headers: Mapping[str, str] | None = None) -> Response:
    return JsonResponse(chosen_shape(scope).body(failure), status_code=failure.status, headers=headers)


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, LlamaclustError)
    return error_response(error, request.scope)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = error.headers
    if headers and "Allow" in headers:
        headers = {**headers, "Allow": _methods(request)}
        if request.method == "OPTIONS":
            return Response(status_code=204, headers=headers)
    message = f"{request.method} {given_path(request.scope)}: {error.detail}"
    failure = Failure(error.status_code, message, _CODES.get(error.status_code, "invalid_request_error"))
    return _response(failure, request.scope, headers)


def _methods(request: Request) -> str:
    """Of all routes with the path of the request. HEAD is served as GET."""
    path = request.scope["path"]
    routes = (route for route in request.app.routes if isinstance(route, Route) and route.path_regex.match(path))
    methods = {method for route in routes for method in route.methods or ()}
    return ", ".join(sorted(methods | ({"HEAD"} if "GET" in methods else set())))


async def _on_client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)


async def _on_bug(request: Request, error: Exception) -> Response:
    """The server logs the error itself, once it is re-raised."""
    return error_response(internal_error(), request.scope)
