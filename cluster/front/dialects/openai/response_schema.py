"""Request bodies of `/v1/responses` and `/v1/responses/compact`, and a response's JSON without its answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import takewhile
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field, PlainValidator, ValidationInfo, WithJsonSchema

from llamaclust.cluster.front.dialects.openai.response_items import Item, read_items, tools_of, without_tools
from llamaclust.cluster.front.dialects.openai.tools import MODES, ToolChoice, ToolSet, read_choice, read_tools
from llamaclust.cluster.front.foreign_fields import COMPACTION, RESPONSES
from llamaclust.cluster.front.schema import Body, LenientContext, LimitField, StopField, strings
from llamaclust.cluster.front.shared_fields import AdapterFields, AnswerFields, Requested, SaltFields
from llamaclust.cluster.front.structured_output import response_format_grammar
from llamaclust.cluster.front.text.images import joined, parts_of
from llamaclust.cluster.front.text.request import ChatRequest, CompletionRequest, Thoughts
from llamaclust.cluster.front.thought_switches import BudgetFields, SwitchFields
from llamaclust.cluster.front.tools import MAX_TOOLS
from llamaclust.core.errors import ParameterError
from llamaclust.core.limits import MAX_TOP_LOGPROBS

_MAX_METADATA: Final = 16
_LOGPROBS: Final = "message.output_text.logprobs"
_REPEATED: Final = (
    "background instructions max_output_tokens parallel_tool_calls previous_response_id reasoning store temperature "
    "text tool_choice tools top_logprobs top_p metadata presence_penalty frequency_penalty"
)
_FIXED: Final[Mapping[str, Any]] = {
    "max_tool_calls": None,
    "prompt_cache_key": None,
    "safety_identifier": None,
    "service_tier": "default",
    "truncation": "disabled",
    "user": None,
}
"""Fields that have the same value in every response."""
ID_PREFIX: Final = "resp_"


def _include(value: Any, info: ValidationInfo) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError("must be a list of strings")
    names = strings(value)
    for name in names:
        if name == _LOGPROBS:
            continue
        if not isinstance(info.context, LenientContext):
            raise ValueError(f"{name[:60]!r} is not supported; remove it")
        info.context.ignore(f"include.{name}")
    return names


def _metadata(value: Any) -> Any:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ValueError("must be an object of strings")
    if len(value) > _MAX_METADATA or any(len(key) > 64 or len(text) > 512 for key, text in value.items()):
        raise ValueError(f"must have up to {_MAX_METADATA} keys of up to 64 characters and values of up to 512")
    return value


_INPUT: Final = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]}
_CHOICE: Final = {"anyOf": [{"enum": [*MODES]}, {"type": "object", "required": ["type"]}]}
_TOOLS: Final = {"type": "array", "maxItems": MAX_TOOLS, "items": {"type": "object", "required": ["type"]}}
InputField = Annotated[
    list[Item], BeforeValidator(lambda value, info: read_items(value, info.context)), WithJsonSchema(_INPUT)
]
_ToolsField = Annotated[
    ToolSet, PlainValidator(lambda value, info: read_tools(value, info.context)), WithJsonSchema(_TOOLS)
]
_ChoiceField = Annotated[Any, BeforeValidator(read_choice), WithJsonSchema(_CHOICE)]
_IncludeField = Annotated[
    tuple[str, ...], BeforeValidator(_include), WithJsonSchema({"type": "array", "items": {"type": "string"}})
]
_MetadataField = Annotated[dict[str, str], BeforeValidator(_metadata), WithJsonSchema({"type": "object"})]


class TextConfig(Body):
    format: dict[str, Any] = Field(default_factory=lambda: {"type": "text"})
    """`{"type": "json_schema", "name": ..., "schema": ...}`, `{"type": "json_object"}` or `{"type": "text"}`."""
    verbosity: Literal["low", "medium", "high"] | None = None
    """Accepted without effect."""


class StreamOptions(Body):
    include_obfuscation: bool = False
    """Accepted without effect, because events are never padded."""


class ResponsesBody(AnswerFields, BudgetFields, SwitchFields, foreign=RESPONSES):
    model: str | None = None
    """Name of the model. Names of models that are not served are refused, unless `api.strict_model` is false."""
    input: InputField = Field(default_factory=list)
    """The input: a text, or messages, tool calls, tool outputs, reasoning, compactions and references to items."""
    instructions: str | None = None
    """A system prompt. Instructions of earlier responses do not apply."""
    previous_response_id: str | None = Field(default=None, max_length=256)
    """Id of a stored response. The chat of that response precedes the input."""
    store: bool = True
    """True to store the response for later requests. The oldest responses are deleted when the store is full."""
    background: bool = False
    """True to reply at once. The response can be retrieved later with `GET /v1/responses/ID`."""
    max_output_tokens: LimitField = None
    """The maximum number of tokens in reasoning and answer. The default is as many as fit into the context."""
    stream_options: StreamOptions | None = None
    """Options of the stream. They require `stream`."""
    stop: Annotated[StopField, Requested()] = ()
    """Texts that end the answer. The answer ends before the first occurrence of any of them."""
    tools: _ToolsField = Field(default_factory=ToolSet)
    """The client's tools: function, custom, local_shell, shell, apply_patch and namespace. Other tools are ignored."""
    tool_choice: _ChoiceField = "auto"
    """`auto`, `none`, `required`, an object that names one tool to call, or `{"type": "allowed_tools", "mode": "auto"
    or "required", "tools": [{"type": "function", "name": ...}]}` to offer only some of the tools."""
    parallel_tool_calls: bool | None = None
    """True to allow several tool calls in an answer. The default is true, unless `tool_choice` requires a call."""
    text: TextConfig = Field(default_factory=TextConfig)
    metadata: _MetadataField = Field(default_factory=dict)
    """Texts that are copied to the response."""
    include: _IncludeField = ()
    """`message.output_text.logprobs` adds the tokens' logprobs to the message. Other names have no effect."""
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS), Requested()] = 0
    """The number of likeliest tokens to show for each token of the answer, with logprobs."""
    timings_per_token: bool = False
    """True to add llama.cpp's `timings` to stream events."""
    return_progress: bool = False
    """True to begin a stream with response.in_progress events that show how many prompt tokens are computed."""

    @property
    def choice(self) -> ToolChoice:
        return ToolChoice(self.tool_choice, self.tools.client, self.parallel_tool_calls)

    @property
    def with_logprobs(self) -> bool:
        return _LOGPROBS in self.include

    def shown(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _REPEATED.split()} | {
            "parallel_tool_calls": self.choice.use.is_parallel,
            "reasoning": {
                "effort": self.reasoning_effort or (self.reasoning and self.reasoning.effort),
                "summary": None,
            },
            "text": {"format": self.text.format},
            "tools": [*self.tools.shown],
        }

    def offering(self, holders: Iterable[Mapping[str, Any]]) -> ResponsesBody:
        """Adds the tools in the key `tools` of messages."""
        found = self.tools.with_found(holders)
        return self if found.client == self.tools.client else self.model_copy(update={"tools": found})

    def check(self) -> None:
        self.offering({"tools": tools_of(item)} for item in self.input).choice.check()
        if self.top_logprobs and _LOGPROBS not in self.include:
            raise ParameterError("top_logprobs", f"requires include: [{_LOGPROBS!r}]")
        if self.background and not self.store:
            raise ParameterError("background", "requires store: true")
        if self.stream_options is not None and not self.stream:
            raise ParameterError("stream_options", "requires stream: true")
        if "input" not in self.model_fields_set and self.previous_response_id is None:
            raise ParameterError("input", "is missing")

    def request(self, messages: Sequence[Mapping[str, Any]]) -> ChatRequest:
        answer = self.completion(
            (),
            self.max_output_tokens,
            grammar=response_format_grammar(self.text.format, "text.format"),
            with_logprobs=self.with_logprobs,
        )
        return ChatRequest(
            _chat(self.instructions, without_tools(messages)),
            answer,
            self.choice.offered,
            tool_use=self.choice.use,
            thoughts=self.thoughts(self),
        )


def _chat(instructions: str | None, messages: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    """Merges the instructions and the first system messages into one message, as many chat templates require."""
    systems = [*takewhile(_is_system_text, messages)]
    texts = [*([] if instructions is None else [instructions]), *(message["content"] for message in systems)]
    prompt = [{"role": "system", "content": "\n\n".join(texts)}] if texts else []
    return (*prompt, *messages[len(systems) :])


def _is_system_text(message: Mapping[str, Any]) -> bool:
    return message["role"] == "system" and isinstance(message["content"], str)


class Status(StrEnum):
    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    INCOMPLETE = "incomplete"  # The answer reached its maximum number of tokens.
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """The fields of a response object that are known before the model generates its output."""

    reply_id: str
    created: int
    model: str
    body: ResponsesBody

    @property
    def begun(self) -> dict[str, Any]:
        return self.shown(Status.QUEUED if self.body.background else Status.IN_PROGRESS)

    @property
    def first_events(self) -> list[dict[str, Any]]:
        statuses = [Status.QUEUED, Status.IN_PROGRESS] if self.body.background else [Status.IN_PROGRESS]
        return [{"type": "response.created", "response": self.begun}, *map(self.event, statuses)]

    def event(self, status: Status) -> dict[str, Any]:
        return {"type": f"response.{status}", "response": self.shown(status)}

    def shown(
        self,
        status: Status,
        output: Sequence[Mapping[str, Any]] = (),
        usage: Mapping[str, Any] | None = None,
        *,
        ended_s: float | None = None,
    ) -> dict[str, Any]:
        """Returns a response's JSON. `ended_s` is the Unix time when the answer ended, or None if it has not ended."""
        return {
            "id": ID_PREFIX + self.reply_id,
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
            **self.body.shown(),
        }


MAX_SUMMARY_TOKENS: Final = 1024
_TASK: Final = (
    "Summarize the conversation so far, so that it can be continued from your summary alone: what was asked, what was "
    "found and decided, names, numbers and open tasks. Reply with the summary only."
)


class CompactionBody(AdapterFields, SaltFields, foreign=COMPACTION):
    model: str
    """Name of the model. Names of models that are not served are refused, unless `api.strict_model` is false."""
    input: InputField = Field(default_factory=list)
    """The input to summarize: a text or items, as for `POST /v1/responses`."""
    previous_response_id: str | None = Field(default=None, max_length=256)
    """Id of a stored response. The chat of that response precedes the input."""
    instructions: str | None = None
    """The chat's system prompt. It is not summarized."""

    def request(self, messages: Sequence[Mapping[str, Any]]) -> ChatRequest:
        """Returns a chat that asks the model to summarize `messages`, with greedy sampling and without reasoning."""
        messages = without_tools(messages)
        if not messages:
            raise ParameterError("input", "is missing")
        answer = CompletionRequest((), MAX_SUMMARY_TOKENS, cache_salt=self.cache_salt)
        chat = _chat(self.instructions, _with_task(messages))
        return ChatRequest(chat, answer, thoughts=Thoughts(is_on=False))


def _with_task(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Appends the instruction to summarize the chat."""
    last = messages[-1]
    # Many chat templates require that roles alternate.
    if last["role"] == "user":
        content = last["content"]
        task = f"{content}\n\n{_TASK}" if isinstance(content, str) else joined([*parts_of(content), _TASK])
        return [*messages[:-1], {**last, "content": task}]
    return [*messages, {"role": "user", "content": _TASK}]
