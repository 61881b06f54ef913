"""Encodes options and bodies of requests, and decodes events and errors of replies. It does not use a connection."""

from __future__ import annotations

import json
from base64 import b64decode
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar

from llamaclust.cluster.client.message_images import message_json
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
from llamaclust.core.sampler.bounds import MAX_CONTEXT_TOKENS
from llamaclust.core.sampler.results import RowResult
from llamaclust.model.chat.tools.events import AnswerEvent, ContentText, ReasoningText

if TYPE_CHECKING:
    from llamaclust.cluster.front.text.embedder import Vector

COMPLETIONS, CHAT = "v1/completions", "v1/chat/completions"
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
_EVENTS: dict[str, Callable[[str], AnswerEvent]] = {"reasoning_content": ReasoningText, "content": ContentText}
"""Maps fields of a chat chunk's `delta` to kinds of events. The events of one delta are in this order."""

Message = Mapping[str, Any]
"""A message of a chat, such as {"role": "user", "content": "Hello"}. If it has images, the content is a list of texts
and images, or of OpenAI parts. An image is a path, the bytes of a file, or a Pillow image."""
Content = str | PathLike[str] | bytes | Sequence[Any]
Prompt = str | Sequence[int]


class AnswerOptions(TypedDict, total=False):
    """Options of an answer. An option that is absent or None has the default of `/v1/completions` or
    `/v1/chat/completions`, with two exceptions: sampling is greedy, and the length is not limited."""

    max_tokens: int | None  # None (default): until the context is full. 0: generate nothing.
    temperature: float  # 0.0 (default) chooses the most likely token.
    seed: int | None  # None (default): a random seed, which the answer reports.
    top_k: int  # 0: all tokens.
    top_p: float
    min_p: float
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    penalty_window: int | None  # Number of last tokens that penalties count. None (default): all tokens.
    logit_bias: Mapping[int, float]
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    min_tokens: int
    ignore_eos: bool
    top_n_sigma: float  # 0 or less: off.
    tfs_z: float
    typical_p: float
    xtc_probability: float
    xtc_threshold: float
    dynatemp_range: float
    dynatemp_exponent: float
    dry_multiplier: float  # 0: no DRY.
    dry_base: float
    dry_allowed_length: int
    dry_penalty_last_n: int  # Number of last tokens in which DRY looks for repetitions. -1: all tokens.
    dry_sequence_breakers: Sequence[str]
    mirostat: int  # Version of Mirostat, 1 or 2. 0: off.
    mirostat_tau: float
    mirostat_eta: float
    penalize_nl: bool
    samplers: Sequence[str]  # Samplers to apply, in this order.
    speculative: bool | int  # False: draft no tokens. A number: the maximum number of drafted tokens in a step.
    response_format: Mapping[str, Any]  # OpenAI's {"type": "json_object"} or {"type": "json_schema", ...}.
    json_schema: Mapping[str, Any]  # The answer is JSON that matches this schema.
    grammar: str  # A grammar in GBNF or Lark that the answer must match.
    structured_outputs: Mapping[str, Any]  # vLLM's {"regex": ...}, {"choice": [...]} and so on.


class Options(AnswerOptions, total=False):
    reasoning_budget: int  # Maximum number of reasoning tokens. -1 (default): no limit.
    reasoning_budget_message: str  # Text inserted before the end of reasoning if the budget forces the end.


class CompletionOptions(AnswerOptions, total=False):
    """Options for completing a prompt without a chat template."""

    # Index of the first prompt token to get a logprob. Token 0 never gets one. None (default): no prompt token does.
    score_from: int | None


class EmbeddingOptions(TypedDict, total=False):
    """Options of embeddings. Absent options have the defaults of `/v1/embeddings`."""

    pooling: Literal["mean", "cls", "last"] | None  # None (default): as in the model file, or "last".
    dimensions: int | None  # Number of leading channels to keep. None (default): all.


def completion_body(prompt: Prompt, options: CompletionOptions) -> dict[str, Any]:
    """Returns a body for `/v1/completions`, with logprobs. Raises TypeError for an unknown option."""
    more = _answer_fields(options, CompletionOptions)
    fixed = {"max_tokens": MAX_CONTEXT_TOKENS, "logprobs": 0, "echo": "score_from" in more}
    return {"prompt": _json(prompt), **fixed, **more}


def chat_body(messages: Sequence[Message], options: Options) -> dict[str, Any]:
    """Returns a body for `/v1/chat/completions`. Raises TypeError for unknown options and UsageError for bad images."""
    return {"messages": [*map(message_json, messages)], "logprobs": True, **_answer_fields(options, Options)}


def embedding_body(prompts: Sequence[Prompt], options: EmbeddingOptions) -> dict[str, Any]:
    return {"input": [*map(_json, prompts)], "encoding_format": "base64", **_fields(options, EmbeddingOptions)}


def _answer_fields(options: Mapping[str, Any], kind: type) -> dict[str, Any]:
    given = _fields(options, kind)
    return {"temperature": 0.0, "repeat_last_n": given.pop("penalty_window", -1), **given}


def _fields(options: Mapping[str, Any], kind: type) -> dict[str, Any]:
    if unknown := options.keys() - kind.__annotations__.keys():
        from llamaclust.cluster.config.errors import hint

        name = min(unknown)
        raise TypeError(f"unknown option {name!r}{hint(name, list(kind.__annotations__))}")
    return {name: _json(value) for name, value in options.items() if value is not None}


def _json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): item for key, item in value.items()}
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str) else value


def sampling_options(given: Mapping[str, Any]) -> Options:
    window = given.get("repeat_last_n", -1)
    found = {**given, "penalty_window": None if window == -1 else window}
    return {name: value for name, value in found.items() if name in Options.__annotations__ and value is not None}  # type: ignore[return-value]


class ChunkReader:
    """Converts the events of one answer to chunks. Raises ProtocolError for events that the API never sends."""

    def __init__(self) -> None:
        self._prompt: tuple[int, ...] = ()
        self._scored = 0  # Number of prompt tokens whose logprobs have arrived or do not exist.

    def read(self, event: Mapping[str, Any]) -> TextChunk:
        try:
            choice = event["choices"][0]
            if "prompt_token_ids" not in choice:
                return self._chunk(choice)
            # First event of the answer. Any text in it belongs to the prompt.
            self._prompt = tuple(choice["prompt_token_ids"])
            self._scored = len(_logprobs(choice))
            return TextChunk(prompt_token_ids=self._prompt, seed=event["seed"])
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise _foreign(json.dumps(event).encode()) from error

    def _chunk(self, choice: Mapping[str, Any]) -> TextChunk:
        """Reads a choice of a completion or a chat. Ignores tool calls, because this client sends no tools."""
        ids, logprobs = choice["token_ids"], _logprobs(choice)
        of_prompt = max(0, len(logprobs) - len(ids))
        start, self._scored = self._scored, self._scored + of_prompt
        delta = {} if "text" in choice else choice["delta"]
        return TextChunk(
            text=choice.get("text", delta.get("content") or ""),
            rows=_rows(ids, logprobs[of_prompt:]),
            prompt_start=start if of_prompt else 0,
            prompt_rows=_rows(self._prompt[start : self._scored], logprobs[:of_prompt]),
            events=tuple(make(delta[name]) for name, make in _EVENTS.items() if delta.get(name)),
            **_ending(choice),
        )


def _logprobs(choice: Mapping[str, Any]) -> Sequence[float]:
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


def encode(body: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(body, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise RequestError(f"the request cannot be sent: {error}") from error


def json_object(payload: bytes) -> dict[str, Any]:
    """Parses a JSON object from a server. Raises ProtocolError for anything else."""
    try:
        value = json.loads(payload)
    except ValueError as error:
        raise ProtocolError(f"the server's reply is not JSON: {_shown(payload)}") from error
    if not isinstance(value, dict):
        raise ProtocolError(f"the server's reply is not a JSON object: {_shown(payload)}")
    return value


def field_of(body: bytes, name: str, kind: type[_Value]) -> _Value:
    value = json_object(body).get(name)
    if not isinstance(value, kind):
        raise _foreign(body)
    return value


def vectors_of(body: bytes) -> list[Vector]:
    import numpy as np  # Imported here, because NumPy would delay the start of commands that need no embeddings.

    try:
        entries = field_of(body, "data", list)
        return [np.frombuffer(b64decode(entry["embedding"], validate=True), "<f4") for entry in entries]
    except (KeyError, TypeError, ValueError) as error:
        raise _foreign(body) from error


def reply_error(status: int, retry_after: str | None, body: bytes) -> LlamaclustError:
    try:
        report = json_object(body)["error"]
    except (ProtocolError, KeyError):
        report = {"message": f"HTTP {status} from a program other than llamaclust: {_shown(body)}"}
    return reported_error(report, status, retry_after)


def reported_error(report: Any, status: int | None = None, retry_after: str | None = None) -> LlamaclustError:
    report = report if isinstance(report, dict) else {"message": str(report)}
    message, code = str(report.get("message") or "no message"), report.get("code")
    if status == _UNAUTHORIZED:
        message = f"{message.rstrip('.')}; {_KEY_ADVICE}"
    is_refusal = status < _SERVER_ERRORS if status else report.get("type") == "invalid_request_error"
    error = _KINDS.get(code, RequestError if is_refusal else LlamaclustError)(message)
    if isinstance(error, QueueFullError) and retry_after and retry_after.isdecimal():
        error.retry_after_s = float(retry_after)
    if isinstance(error, ClusterStartingError) and isinstance(awaited := report.get("awaited"), str):
        error.awaited = awaited
    error.http_status = status or error.http_status
    error.code = code or error.code
    return error


def _foreign(payload: bytes) -> ProtocolError:
    return ProtocolError(f"the server does not answer as llamaclust does: {_shown(payload)}")


def _shown(payload: bytes) -> str:
    text = payload[:_SHOWN_BYTES].decode("utf-8", "replace").strip()
    return " ".join(text.split()) or "nothing"
