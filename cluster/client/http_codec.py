"""Requests and replies of the HTTP API for clients. Pure: bytes and values, no connection. The client in this process
reads the same requests."""

from __future__ import annotations

import json
from base64 import b64decode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

from llamaclust.cluster.client.types import CompletionOptions, EmbeddingOptions, Message, Options
from llamaclust.cluster.front.text.answer import TextChunk
from llamaclust.cluster.scheduler.requests import FinishReason, Timings
from llamaclust.core.errors import (
    ClusterStartingError,
    DeadlineError,
    InsufficientMemoryError,
    LlamaclustError,
    ProtocolError,
    QueueFullError,
    RequestError,
    RequestFailedError,
    WorkerError,
)
from llamaclust.core.sampling import RowResult
from llamaclust.core.sampling_bounds import MAX_CONTEXT_TOKENS
from llamaclust.model.chat.tools.events import AnswerEvent, ContentText, ReasoningText

if TYPE_CHECKING:
    from llamaclust.cluster.front.text.embedder import Vector

_Value = TypeVar("_Value")
_SHOWN_BYTES = 300
_UNAUTHORIZED = 401
_KEY_ADVICE = "the commands take a key by --api-key-file FILE, the Python client by `api_key=`"
_SERVER_ERRORS = 500
_KINDS: dict[Any, type[LlamaclustError]] = {
    kind.code: kind
    for kind in (
        QueueFullError,
        RequestFailedError,
        WorkerError,
        ClusterStartingError,
        DeadlineError,
        InsufficientMemoryError,
    )
}
_TIMINGS = tuple(field.name for field in fields(Timings))


def completion_body(prompt: str | Sequence[int], options: CompletionOptions) -> dict[str, Any]:
    """The body of `POST /v1/completions`, with logprobs. TypeError for an unknown option."""
    more = _more(options, CompletionOptions)
    given = prompt if isinstance(prompt, str) else list(prompt)
    return {"prompt": given, "max_tokens": MAX_CONTEXT_TOKENS, "logprobs": 0, "echo": "score_from" in more, **more}


def chat_body(messages: Sequence[Message], options: Options) -> dict[str, Any]:
    """The body of `POST /v1/chat/completions`, with logprobs. TypeError for an unknown option."""
    return {"messages": [dict(message) for message in messages], "logprobs": True, **_more(options, Options)}


def embedding_body(prompts: Sequence[str | Sequence[int]], options: EmbeddingOptions) -> dict[str, Any]:
    """The body of `POST /v1/embeddings`. TypeError for an unknown option."""
    more = _known(options, EmbeddingOptions)
    given = [prompt if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    return {"input": given, "encoding_format": "base64", **more}


def sampling_options(fields: Mapping[str, Any]) -> Options:
    """Options from the field `chat_sampling` of a model in `GET /v1/models`."""
    found = dict(fields)
    if (window := found.pop("repeat_last_n", -1)) != -1:
        found["penalty_window"] = window
    return {name: value for name, value in found.items() if name in Options.__annotations__}  # type: ignore[return-value]


def model_entry(body: bytes, model: str | None) -> Mapping[str, Any]:
    """The entry of a model, or of an adapter, in the reply of `GET /v1/models`; the first one for None and for names
    that are not served."""
    entries = field_of(body, "data", list)
    named = (entry for entry in entries if model == entry.get("id") or model in entry.get("aliases", ()))
    return next(named, entries[0] if entries else {})


def vectors_of(body: bytes) -> list[Vector]:
    """The embeddings of a reply. ProtocolError where it has none."""
    import numpy as np  # commands that embed nothing start without it

    try:
        entries = field_of(body, "data", list)
        return [np.frombuffer(b64decode(entry["embedding"], validate=True), "<f4") for entry in entries]
    except (KeyError, TypeError, ValueError) as error:
        raise ProtocolError(f"the server does not answer as llamaclust does: {_shown(body)}") from error


def _known(options: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """Those that are not None."""
    if unknown := options.keys() - kind.__annotations__.keys():
        from llamaclust.cluster.config.errors import hint

        name = min(unknown)
        raise TypeError(f"unknown option {name!r}{hint(name, list(kind.__annotations__))}")
    return {name: _json(value) for name, value in options.items() if value is not None}


def _more(options: Mapping[str, Any], kind: type) -> dict[str, Any]:
    given = _known(options, kind)
    return {"temperature": 0.0, "repeat_last_n": given.pop("penalty_window", -1), **given}


def _json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): item for key, item in value.items()}
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str) else value


def encode(body: Mapping[str, Any]) -> bytes:
    """The body as JSON. RequestError for a value that JSON cannot say."""
    try:
        return json.dumps(body, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise RequestError(f"the request cannot be sent: {error}") from error


class EventReader:
    """Server-sent events out of bytes as they come: the data of each, parsed, until [DONE]."""

    def __init__(self) -> None:
        self.is_done = False
        self.last_id = ""  # of the last event that was complete
        self._parts: list[bytes] = []
        self._id = ""

    def restart(self) -> None:
        """The next bytes are of another connection."""
        self._parts.clear()

    def feed(self, data: bytes) -> Iterator[dict[str, Any]]:
        """The events that are complete with `data`. Raises the error that the server reports in one."""
        *lines, rest = data.split(b"\n")
        for line in lines:
            event = self._event(b"".join((*self._parts, line)))
            self._parts.clear()
            if event is not None:
                yield event
        self._parts.append(rest)

    def _event(self, line: bytes) -> dict[str, Any] | None:
        if line.startswith(b"id:"):
            self._id = line.removeprefix(b"id:").strip().decode("ascii", "replace")
        payload = line.removeprefix(b"data:").strip()
        if self.is_done or not payload or not line.startswith(b"data:"):
            return None
        self.last_id = self._id
        if payload == b"[DONE]":
            self.is_done = True
            return None
        event = _object(payload)
        if "error" in event:
            raise reported_error(event["error"])
        return event


class ChunkReader:
    """Events of one answer as chunks. ProtocolError for events that this API would not send."""

    def __init__(self) -> None:
        self._prompt: tuple[int, ...] = ()
        self._scored = 0  # prompt tokens that have a logprob or never will

    def read(self, event: Mapping[str, Any]) -> TextChunk:
        try:
            choice = event["choices"][0]
            if "prompt_token_ids" in choice:  # the first one: any text in it is the prompt's
                self._prompt = tuple(choice["prompt_token_ids"])
                self._scored = len(_logprobs(choice))
                return TextChunk(prompt_token_ids=self._prompt, seed=event["seed"])
            return self._chunk(choice)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            shown = _shown(json.dumps(event).encode())
            raise ProtocolError(f"the server does not answer as llamaclust does: {shown}") from error

    def _chunk(self, choice: Mapping[str, Any]) -> TextChunk:
        ids, logprobs = choice["token_ids"], _logprobs(choice)
        of_prompt = max(0, len(logprobs) - len(ids))
        start, self._scored = self._scored, self._scored + of_prompt
        return TextChunk(
            text=choice["text"] if "text" in choice else choice["delta"].get("content") or "",
            rows=_rows(ids, logprobs[of_prompt:]),
            prompt_start=start if of_prompt else 0,
            prompt_rows=_rows(self._prompt[start : self._scored], logprobs[:of_prompt]),
            events=_events(choice.get("delta", {})),
            **_ending(choice),
        )


def _events(delta: Mapping[str, Any]) -> tuple[AnswerEvent, ...]:
    """Of a chat's answer; the clients send no tools, so it has no calls."""
    reasoning, content = delta.get("reasoning_content"), delta.get("content")
    events = (ReasoningText(reasoning) if reasoning else None, ContentText(content) if content else None)
    return tuple(event for event in events if event is not None)


def _logprobs(choice: Mapping[str, Any]) -> Sequence[float]:
    """Of a chat's answer, or of a completion's prompt and answer."""
    logprobs = choice["logprobs"] or {}
    if "content" in logprobs:
        return [entry["logprob"] for entry in logprobs["content"]]
    scored: Sequence[float] = logprobs.get("token_logprobs", ())
    return scored


def _rows(tokens: Sequence[int], logprobs: Sequence[float]) -> tuple[RowResult, ...]:
    return tuple(RowResult(token, logprob) for token, logprob in zip(tokens, logprobs, strict=True))


def _ending(choice: Mapping[str, Any]) -> dict[str, Any]:
    if choice["finish_reason"] is None:
        return {}
    timings = Timings(**{name: choice["timings"][name] for name in _TIMINGS})
    reason = FinishReason(choice["finish_reason"])
    return {"finish_reason": reason, "stopped_by": choice["stop_reason"], "timings": timings}


def reply_error(status: int, retry_after: str | None, body: bytes) -> LlamaclustError:
    """The error that a reply other than 200 reports."""
    try:
        report = _object(body)["error"]
    except (ProtocolError, KeyError):
        report = {"message": f"HTTP {status} of something else than llamaclust: {_shown(body)}"}
    return reported_error(report, status, retry_after)


def reported_error(report: Any, status: int | None = None, retry_after: str | None = None) -> LlamaclustError:
    """The server's error as one of ours, with its message, code and status."""
    report = report if isinstance(report, dict) else {"message": str(report)}
    message, code = str(report.get("message") or "no message"), report.get("code")
    if status == _UNAUTHORIZED:
        message = f"{message.rstrip('.')}; {_KEY_ADVICE}"
    is_refusal = status < _SERVER_ERRORS if status else report.get("type") == "invalid_request_error"
    kind = _KINDS.get(code, RequestError if is_refusal else LlamaclustError)
    error = kind(message)
    if isinstance(error, QueueFullError) and retry_after and retry_after.isdecimal():
        error.retry_after_s = float(retry_after)
    if isinstance(error, ClusterStartingError) and isinstance(awaited := report.get("awaited"), str):
        error.awaited = awaited
    error.http_status = status or error.http_status
    error.code = code or error.code
    return error


def field_of(body: bytes, name: str, kind: type[_Value]) -> _Value:
    """One field of a reply's JSON object. ProtocolError where it is not there or of another type."""
    value = _object(body).get(name)
    if not isinstance(value, kind):
        raise ProtocolError(f"the server does not answer as llamaclust does: {_shown(body)}")
    return value


def _object(payload: bytes) -> dict[str, Any]:
    try:
        value = json.loads(payload)
    except ValueError as error:
        raise ProtocolError(f"the server sent what is not JSON: {_shown(payload)}") from error
    if not isinstance(value, dict):
        raise ProtocolError(f"the server sent what is not a JSON object: {_shown(payload)}")
    return value


def _shown(payload: bytes) -> str:
    text = payload[:_SHOWN_BYTES].decode("utf-8", "replace").strip()
    return " ".join(text.split()) or "nothing"
