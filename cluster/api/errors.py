"""Errors as OpenAI's clients expect them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from llamaclust.core.errors import LlamaclustError, ParameterError, QueueFullError

CLIENT_GONE = 499

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_CODES = {404: "not_found", 405: "method_not_allowed"}


class HttpError(LlamaclustError):
    """A request that is refused with a status of its own."""

    def __init__(
        self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.http_status = status
        self.code = code
        self.headers = dict(headers or {})
        self.param = param


def to_json(value: Any) -> bytes:
    """A value as JSON. Iterators are arrays; numbers that JSON lacks are a mistake of ours; halves of surrogate pairs
    become '?'."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_items)
    return text.encode("utf-8", "replace")


def _items(value: object) -> list[Any]:
    if not isinstance(value, Iterator):
        raise TypeError(f"{type(value).__name__} is no JSON")
    return list(value)


class JsonResponse(Response):
    """A body of JSON."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content)


def error_body(error: LlamaclustError) -> dict[str, Any]:
    """The error as a reply's or an event's JSON."""
    param = error.param if isinstance(error, ParameterError | HttpError) else None
    return _body(error.http_status, str(error), param, error.code)


def error_response(error: LlamaclustError) -> Response:
    headers = dict(error.headers) if isinstance(error, HttpError) else {}
    if isinstance(error, QueueFullError):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    return JsonResponse(error_body(error), status_code=error.http_status, headers=headers)


def add_error_handlers(app: FastAPI) -> None:
    """Every error leaves the app in the same shape."""
    app.add_exception_handler(LlamaclustError, _on_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(ClientDisconnect, _on_client_gone)
    app.add_exception_handler(Exception, _on_bug)


def _body(status: int, message: str, param: str | None, code: str) -> dict[str, Any]:
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, LlamaclustError)
    return error_response(error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    status = error.status_code
    message = f"{request.method} {request.url.path}: {error.detail}"
    body = _body(status, message, None, _CODES.get(status, "invalid_request_error"))
    return JsonResponse(body, status_code=status, headers=error.headers)


async def _on_client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)


async def _on_bug(request: Request, error: Exception) -> Response:
    """The server logs the error itself, once it is re-raised."""
    return JsonResponse(_body(500, "internal error; the coordinator's log says more", None, "internal_error"), 500)
