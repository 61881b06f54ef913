"""The object that says how a response is getting on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from llamaclust.cluster.front.fields.function_tools import ClientTool
from llamaclust.cluster.front.text.answer import TextChunk
from llamaclust.cluster.scheduler.requests import FinishReason, Timings
from llamaclust.core.errors import LlamaclustError

ID_PREFIX: Final = "resp_"


class Status(StrEnum):
    """Of a response or an item of it."""

    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    INCOMPLETE = "incomplete"  # the tokens that it may have are used up
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Details:
    """Fields that a response shows beside the answer, and the tools whose calls it shows."""

    logprobs: bool = False
    timings: bool = False  # llama.cpp's, in the events of a stream
    progress: bool = False  # likewise
    tools: Mapping[str, ClientTool] = field(default_factory=dict)  # by the names that the model knows


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """What a response says of its request, at any time."""

    reply_id: str
    created: int  # Unix time in seconds
    model: str
    request: Mapping[str, Any]  # the fields that it repeats

    @property
    def response_id(self) -> str:
        """The id that is shown."""
        return ID_PREFIX + self.reply_id

    @property
    def first_status(self) -> Status:
        return Status.QUEUED if self.request["background"] else Status.IN_PROGRESS

    @property
    def first_events(self) -> tuple[tuple[str, Status], ...]:
        """The names of the events that a stream begins with, and the response's status."""
        queued = (("queued", Status.QUEUED),) if self.request["background"] else ()
        return (("created", self.first_status), *queued, ("in_progress", Status.IN_PROGRESS))

    def shown(
        self,
        status: Status,
        output: Sequence[Mapping[str, Any]] = (),
        usage: Mapping[str, Any] | None = None,
        *,
        ended_s: float | None = None,
    ) -> dict[str, Any]:
        """The whole object. `ended_s`: Unix time of the answer's end."""
        return {
            "id": self.response_id,
            "object": "response",
            "created_at": self.created,
            "completed_at": int(ended_s) if ended_s is not None and status is Status.COMPLETED else None,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status is Status.INCOMPLETE else None,
            "model": self.model,
            "output": [*output],
            "usage": usage,
            **_FIXED,
            **self.request,
        }


_FIXED: Final[Mapping[str, Any]] = {
    "max_tool_calls": None,
    "prompt_cache_key": None,
    "safety_identifier": None,
    "service_tier": "default",
    "truncation": "disabled",
    "user": None,
}
"""Fields of requests that have no effect here."""


def failed(response: Mapping[str, Any], error: LlamaclustError) -> dict[str, Any]:
    """A response that an error ended."""
    return {**response, "status": Status.FAILED, "error": {"code": "server_error", "message": str(error)}}


def cancelled(response: Mapping[str, Any]) -> dict[str, Any]:
    """A response that its client ended."""
    return {**response, "status": Status.CANCELLED}


def end_status(part: TextChunk) -> Status:
    """Of the last part of an answer."""
    return Status.INCOMPLETE if part.finish_reason is FinishReason.LENGTH else Status.COMPLETED


def shown_usage(timings: Timings, prompt_tokens: int, tokens: int, reasoning_tokens: int) -> dict[str, Any]:
    """Token counts."""
    return {
        "input_tokens": prompt_tokens,
        "input_tokens_details": {"cached_tokens": timings.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": tokens,
        "output_tokens_details": {"reasoning_tokens": reasoning_tokens},
        "total_tokens": prompt_tokens + tokens,
    }
