"""Errors of requests, and their JSON in the forms of the APIs' owners, chosen by the path of a request."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from llamaclust.cluster.front.json_text import to_json
from llamaclust.core.errors import ContextLengthError, LlamaclustError, ParameterError

_TYPES: Final = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_LLAMACPP_TYPES: Final = {**_TYPES, 404: "not_found_error", 501: "not_supported_error", 503: "unavailable_error"}

_ANTHROPIC_TYPES: Final = {
    **_TYPES,
    404: "not_found_error",
    413: "request_too_large",
    503: "overloaded_error",
    504: "timeout_error",
}


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


def internal_error() -> LlamaclustError:
    """The error that replies show for a mistake of ours, which is logged."""
    return LlamaclustError("internal error; the coordinator's log says more")


@dataclass(frozen=True, slots=True)
class Failure:
    """The parts of an error that replies show."""

    status: int  # of HTTP
    message: str
    code: str
    param: str | None = None  # the field that is wrong
    numbers: Mapping[str, int] = field(default_factory=dict)  # for programs, by llama.cpp's names


def failure_of(error: LlamaclustError) -> Failure:
    """The parts of an error that replies show."""
    param = error.param if isinstance(error, ParameterError | HttpError) else None
    numbers = {}
    if isinstance(error, ContextLengthError):
        numbers = {"n_prompt_tokens": error.prompt_tokens, "n_ctx": error.context_length}
    return Failure(error.http_status, str(error), error.code, param, numbers)


@dataclass(frozen=True, slots=True)
class ErrorShape:
    """The form of errors that the clients of an API expect."""

    body: Callable[[Failure], dict[str, Any]]
    """The JSON of a reply."""
    event_name: str = ""
    """Name of the event that ends a stream, and its `type`; "": it has none."""

    def event(self, failure: Failure) -> bytes:
        """The last event of a stream that fails."""
        if not self.event_name:
            return b"data: " + to_json(self.body(failure)) + b"\n\n"
        value = {"type": self.event_name, **self.body(failure)}
        return f"event: {self.event_name}\n".encode() + b"data: " + to_json(value) + b"\n\n"


def error_shape(path: str) -> ErrorShape:
    """The shape for requests to a path, as the client wrote it behind the prefix."""
    return next((shape for prefix, shape in _SHAPES if path.startswith(prefix)), LLAMACPP)


def _openai(failure: Failure) -> dict[str, Any]:
    kind = _kind(failure, _TYPES)
    return {"error": {"message": failure.message, "type": kind, "param": failure.param, "code": failure.code}}


def _ollama(failure: Failure) -> dict[str, Any]:
    return {"error": failure.message}


def _llamacpp(failure: Failure) -> dict[str, Any]:
    """OpenAI's, with llama.cpp's types, and numbers where it has them."""
    kind = "exceed_context_size_error" if failure.numbers else _kind(failure, _LLAMACPP_TYPES)
    return {"error": {**_openai(failure)["error"], "type": kind, **failure.numbers}}


def _anthropic(failure: Failure) -> dict[str, Any]:
    """Clients shorten a chat upon the words "prompt is too long"."""
    kind, message = _kind(failure, _ANTHROPIC_TYPES, "api_error"), failure.message
    if failure.numbers:
        tokens, most = failure.numbers["n_prompt_tokens"], failure.numbers["n_ctx"]
        message = f"prompt is too long: {tokens} tokens > {most} maximum ({message})"
    error = {"type": kind, "message": message, "param": failure.param, "code": failure.code, **failure.numbers}
    return {"type": "error", "error": error}


def _kind(failure: Failure, types: Mapping[int, str], of_server: str = "server_error") -> str:
    return types.get(failure.status, "invalid_request_error" if failure.status < 500 else of_server)


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
"""Shapes by the beginning of the path, the first that fits; llama.cpp's where none does."""
