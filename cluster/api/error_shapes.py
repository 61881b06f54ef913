"""The JSON of errors in the forms of the APIs' owners, chosen by the path of a request."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from starlette.types import Scope

_STATE: Final = "error_shape"
_TYPES: Final = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_LLAMACPP_TYPES: Final = {**_TYPES, 404: "not_found_error", 501: "not_supported_error", 503: "unavailable_error"}

_ANTHROPIC_TYPES: Final = {
    **_TYPES,
    404: "not_found_error",
    413: "request_too_large",
    503: "overloaded_error",
    504: "timeout_error",
}


class DeferredValue(ABC):
    """A part of a JSON value that is made each time it is rendered: it takes less memory until then."""

    __slots__ = ()

    @property
    @abstractmethod
    def entries(self) -> int:
        """About the numbers and texts in it."""

    @property
    @abstractmethod
    def held_bytes(self) -> int:
        """The memory that it takes."""

    @abstractmethod
    def made(self) -> Any:
        """The value."""


@dataclass(frozen=True, slots=True)
class Failure:
    """What a reply says about an error."""

    status: int  # of HTTP
    message: str
    code: str
    param: str | None = None  # the field that is wrong
    numbers: Mapping[str, int] = field(default_factory=dict)  # for programs, by llama.cpp's names


@dataclass(frozen=True, slots=True)
class ErrorShape:
    """How the clients of an API expect errors."""

    body: Callable[[Failure], dict[str, Any]]
    """The JSON of a reply."""
    event_name: str = ""
    """Of the event that ends a stream, and its `type`; "": it has none."""

    def event(self, failure: Failure) -> bytes:
        """The last event of a stream that fails."""
        if not self.event_name:
            return b"data: " + to_json(self.body(failure)) + b"\n\n"
        value = {"type": self.event_name, **self.body(failure)}
        return f"event: {self.event_name}\n".encode() + b"data: " + to_json(value) + b"\n\n"


def to_json(value: Any) -> bytes:
    """A value as JSON. Iterators are arrays; numbers that JSON lacks are a mistake of ours; halves of surrogate pairs
    become '?'."""
    return _encoder.encode(value).encode("utf-8", "replace")


def error_shape(path: str) -> ErrorShape:
    """Of the requests to a path, as the client wrote it behind the prefix."""
    return next((shape for prefix, shape in _SHAPES if path.startswith(prefix)), LLAMACPP)


def choose_shape(scope: Scope, shape: ErrorShape) -> None:
    """All errors of the request have this shape."""
    scope["state"] = {**scope.get("state", {}), _STATE: shape}


def chosen_shape(scope: Scope) -> ErrorShape:
    shape: ErrorShape = scope.get("state", {}).get(_STATE, OPENAI)
    return shape


def _openai(failure: Failure) -> dict[str, Any]:
    kind = _TYPES.get(failure.status, _kind(failure))
    return {"error": {"message": failure.message, "type": kind, "param": failure.param, "code": failure.code}}


def _ollama(failure: Failure) -> dict[str, Any]:
    return {"error": failure.message}


def _llamacpp(failure: Failure) -> dict[str, Any]:
    """OpenAI's, with llama.cpp's types, and numbers where it has them."""
    kind = "exceed_context_size_error" if failure.numbers else _LLAMACPP_TYPES.get(failure.status, _kind(failure))
    error = _openai(failure)["error"]
    return {"error": {**error, "type": kind, **failure.numbers}}


def _anthropic(failure: Failure) -> dict[str, Any]:
    """Clients shorten a chat upon the words "prompt is too long"."""
    kind = _ANTHROPIC_TYPES.get(failure.status, "invalid_request_error" if failure.status < 500 else "api_error")
    message = failure.message
    if failure.numbers:
        tokens, most = failure.numbers["n_prompt_tokens"], failure.numbers["n_ctx"]
        message = f"prompt is too long: {tokens} tokens > {most} maximum ({message})"
    error = {"type": kind, "message": message, "param": failure.param, "code": failure.code, **failure.numbers}
    return {"type": "error", "error": error}


def _kind(failure: Failure) -> str:
    return "invalid_request_error" if failure.status < 500 else "server_error"


def _made(value: object) -> Any:
    if isinstance(value, DeferredValue):
        return value.made()
    if not isinstance(value, Iterator):
        raise TypeError(f"{type(value).__name__} is no JSON")
    return list(value)


_encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_made)


OPENAI: Final = ErrorShape(_openai)
LLAMACPP: Final = ErrorShape(_llamacpp)
RESPONSES: Final = ErrorShape(_openai, "error")
ANTHROPIC: Final = ErrorShape(_anthropic, "error")
OLLAMA: Final = ErrorShape(_ollama)

_SHAPES: Final = (
    ("/v1/messages", ANTHROPIC),
    ("/v1/responses", RESPONSES),
    ("/responses", RESPONSES),
    ("/v1/", OPENAI),
    ("/cluster", OPENAI),
    ("/api/", OLLAMA),
)
"""By the beginning of the path, the first that fits; llama.cpp's where none does."""
