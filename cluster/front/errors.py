"""Errors of requests, and their JSON in each API. A dialect may define a form of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from llamaclust.core.errors import ContextLengthError, LlamaclustError, ParameterError

_TYPES: Final = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_LLAMACPP_TYPES: Final = {
    **_TYPES,
    404: "not_found_error",
    501: "not_supported_error",
    503: "unavailable_error",
}
_ANTHROPIC_TYPES: Final = {
    **_TYPES,
    404: "not_found_error",
    413: "request_too_large",
    503: "overloaded_error",
    504: "timeout_error",
}


class HttpError(LlamaclustError):
    """An error that refuses a request. It has an HTTP status, a code, and headers."""

    def __init__(
        self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.http_status = status
        self.code = code
        self.headers = dict(headers or {})
        self.param = param


def internal_error() -> LlamaclustError:
    return LlamaclustError("internal error; the coordinator's log says more")


MOST_CHARACTERS: Final = 4000
"""Maximum length of an error's message. Errors quote at most this much of a request."""


@dataclass(frozen=True, slots=True)
class Failure:
    status: int  # HTTP status.
    message: str
    code: str
    param: str | None = None  # Name of the wrong field.
    numbers: Mapping[str, int] = field(default_factory=dict)  # Numbers for programs, such as llama.cpp's `n_ctx`.

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", _cut(self.message))
        object.__setattr__(self, "param", self.param and _cut(self.param))


def _cut(text: str) -> str:
    """Leaves out the middle of a long text. An error may quote a method, a path or a value of any length."""
    if len(text) <= MOST_CHARACTERS:
        return text
    half = MOST_CHARACTERS // 2
    return f"{text[:half]} ... {text[-half:]}"


def failure_of(error: LlamaclustError) -> Failure:
    param = error.param if isinstance(error, ParameterError | HttpError) else None
    numbers = {}
    if isinstance(error, ContextLengthError):
        numbers = {"n_prompt_tokens": error.prompt_tokens, "n_ctx": error.context_length}
    return Failure(error.http_status, str(error), error.code, param, numbers)


_SCHEMA: Final = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
                "n_prompt_tokens": {"type": "integer"},
                "n_ctx": {"type": "integer"},
            },
        }
    },
}
_OLLAMA_SCHEMA: Final = {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}


@dataclass(frozen=True, slots=True)
class ErrorShape:
    body: Callable[[Failure], dict[str, Any]]
    event_name: str = ""
    """Name and `type` of the event that ends a stream with an error. Empty if the API has no such event."""
    schema_name: str = "Error"
    schema: Mapping[str, Any] = field(default_factory=lambda: _SCHEMA)
    last_events: Callable[[Failure, Mapping[str, Any]], list[dict[str, Any]]] | None = None
    """Makes the events that end a stream, each with a `type`, from `View.error_fields`. None: `body` is the event."""

    def ending(self, failure: Failure, fields: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
        """Returns the names and values of the events that end a stream with an error."""
        if self.last_events is not None:
            return [(event["type"], event) for event in self.last_events(failure, fields)]
        kind = {"type": self.event_name} if self.event_name else {}
        return [(self.event_name, {**kind, **self.body(failure), **fields})]


def _error_type(failure: Failure, types: Mapping[int, str], of_server: str = "server_error") -> str:
    return types.get(failure.status, "invalid_request_error" if failure.status < 500 else of_server)


def _openai(failure: Failure) -> dict[str, Any]:
    kind = _error_type(failure, _TYPES)
    return {"error": {"message": failure.message, "type": kind, "param": failure.param, "code": failure.code}}


def _ollama(failure: Failure) -> dict[str, Any]:
    return {"error": failure.message}


def _llamacpp(failure: Failure) -> dict[str, Any]:
    kind = "exceed_context_size_error" if failure.numbers else _error_type(failure, _LLAMACPP_TYPES)
    return {"error": {**_openai(failure)["error"], "type": kind, **failure.numbers}}


def _anthropic(failure: Failure) -> dict[str, Any]:
    kind, message = _error_type(failure, _ANTHROPIC_TYPES, "api_error"), failure.message
    if failure.numbers:
        tokens, most = failure.numbers["n_prompt_tokens"], failure.numbers["n_ctx"]
        # Clients shorten the chat if a message begins with these words.
        message = f"prompt is too long: {tokens} tokens > {most} maximum ({message})"
    error = {"type": kind, "message": message, "param": failure.param, "code": failure.code, **failure.numbers}
    return {"type": "error", "error": error}


def response_error(failure: Failure) -> dict[str, str]:
    """Returns the `error` of a failed response. Clients repeat a request unless the code says that it is invalid."""
    code = (
        "rate_limit_exceeded"
        if failure.status == 429
        else "server_error"
        if failure.status >= 500
        else "invalid_prompt"
    )
    return {"code": failure.code if failure.numbers else code, "message": failure.message}


def _response_events(failure: Failure, fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    error = {"type": "error", "code": failure.code, "message": failure.message, "param": failure.param}
    response = {"object": "response", "output": [], **fields.get("response", {})}
    failed = {"type": "response.failed", "response": {**response, "status": "failed", "error": response_error(failure)}}
    events = [*fields.get("events", ()), error, failed]
    return [
        {**event, "sequence_number": number} for number, event in enumerate(events, fields.get("sequence_number", 0))
    ]


OPENAI: Final = ErrorShape(_openai)
RESPONSES: Final = ErrorShape(_openai, last_events=_response_events)
ANTHROPIC: Final = ErrorShape(_anthropic, "error")
LLAMACPP: Final = ErrorShape(_llamacpp)
OLLAMA: Final = ErrorShape(_ollama, schema_name="OllamaError", schema=_OLLAMA_SCHEMA)


def shape_of_path(path: str) -> ErrorShape:
    """Returns the format of errors on a path. `path` does not include `api.prefix`."""
    if path.startswith("/api/"):
        return OLLAMA
    if path.startswith("/v1/messages"):
        return ANTHROPIC
    if path.startswith(("/v1/responses", "/responses")):
        return RESPONSES
    return OPENAI if path.startswith(("/v1/", "/cluster")) else LLAMACPP
