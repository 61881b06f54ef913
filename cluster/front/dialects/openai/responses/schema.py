"""Bodies of `POST /v1/responses` and `POST /v1/responses/compact`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field, PlainValidator, ValidationInfo, WithJsonSchema

from llamaclust.cluster.front.dialects.openai.responses.items import Item, read_items
from llamaclust.cluster.front.dialects.openai.tools import MODES, ToolChoice, ToolSet, read_choice, read_tools
from llamaclust.cluster.front.foreign_fields import RESPONSES
from llamaclust.cluster.front.sampling import AdapterFields, AnswerFields, ReasoningFields, Requested
from llamaclust.cluster.front.schema import Body, Leniency, LimitField, StopField, strings
from llamaclust.cluster.front.structured_output import response_format_grammar
from llamaclust.cluster.front.text.request import ChatRequest, CompletionRequest, ReasoningBudget, effort_variables
from llamaclust.cluster.front.tools import MAX_TOOLS
from llamaclust.core.errors import ParameterError
from llamaclust.core.limits import MAX_TOP_LOGPROBS
from llamaclust.core.sampling import PARAMS

_MAX_METADATA: Final = 16
_LOGPROBS: Final = "message.output_text.logprobs"


def _tools(value: Any, info: ValidationInfo) -> ToolSet:
    return read_tools(value, info.context)


def _input(value: Any, info: ValidationInfo) -> list[Item]:
    return read_items(value, info.context)


def _include(value: Any, info: ValidationInfo) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError("must be a list of strings")
    names = strings(value)
    for name in names:
        if name == _LOGPROBS:
            continue
        if not isinstance(info.context, Leniency):
            raise ValueError(f"this server does not have {name[:60]!r}; leave it out")
        info.context.ignore(f"include.{name}")
    return names


def _metadata(value: Any) -> Any:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ValueError("must be an object of strings")
    if len(value) > _MAX_METADATA or any(len(key) > 64 or len(text) > 512 for key, text in value.items()):
        raise ValueError(f"must have at most {_MAX_METADATA} keys of 64 characters and values of 512")
    return value


_INPUT: Final = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]}
_CHOICE: Final = {"anyOf": [{"enum": [*MODES]}, {"type": "object", "required": ["type"]}]}
_TOOLS: Final = {"type": "array", "maxItems": MAX_TOOLS, "items": {"type": "object", "required": ["type"]}}
InputField = Annotated[list[dict[str, Any]], BeforeValidator(_input), WithJsonSchema(_INPUT)]
_ToolsField = Annotated[ToolSet, PlainValidator(_tools), WithJsonSchema(_TOOLS)]
_ChoiceField = Annotated[Any, BeforeValidator(read_choice), WithJsonSchema(_CHOICE)]
_IncludeField = Annotated[
    tuple[str, ...], BeforeValidator(_include), WithJsonSchema({"type": "array", "items": {"type": "string"}})
]
_MetadataField = Annotated[dict[str, str], BeforeValidator(_metadata), WithJsonSchema({"type": "object"})]


class Reasoning(Body):
    """How the model thinks."""

    effort: str | None = None
    """Passed to the chat template; none sets its `enable_thinking` to false."""
    summary: Literal["auto", "concise", "detailed"] | None = None
    """No-op: reasoning is shown as it is."""
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    """An older name of `summary`."""


class TextConfig(Body):
    """How the text looks."""

    format: dict[str, Any] = Field(default_factory=lambda: {"type": "text"})
    """`{"type": "json_schema", "name": ..., "schema": ...}`, `{"type": "json_object"}` or `{"type": "text"}`."""
    verbosity: Literal["low", "medium", "high"] | None = None
    """No-op."""


class StreamOptions(Body):
    """What a stream carries beside the answer."""

    include_obfuscation: bool = False
    """No-op: events are never padded."""


class ResponsesBody(AnswerFields, ReasoningFields, foreign=RESPONSES):
    """`POST /v1/responses`."""

    model: str | None = None
    """The served model's name; another name is refused."""
    input: InputField = Field(default_factory=list)
    """Text, or items: messages, function_call, function_call_output, reasoning, compaction, and item_reference to those
    of stored responses."""
    instructions: str | None = None
    """A system prompt; those of earlier responses are not carried over."""
    previous_response_id: str | None = Field(default=None, max_length=256)
    """A stored response that this one follows."""
    store: bool = True
    """The response can be read again, and followed, as long as there is room."""
    background: bool = False
    """The reply comes at once; the response is computed on and read with `GET /v1/responses/ID`."""
    max_output_tokens: LimitField = None
    """Tokens of the answer, reasoning included; by default what the context leaves."""
    stream_options: StreamOptions | None = None
    """Only with `stream`."""
    stop: Annotated[StopField, Requested()] = ()
    """The answer ends before the first of these."""
    tools: _ToolsField = Field(default_factory=ToolSet)
    """Tools that the model may call and the client runs: function, custom, local_shell, shell, apply_patch, and
    namespaces of them. Hosted tools are left out."""
    tool_choice: _ChoiceField = "auto"
    """`auto`, `none`, `required`, the one tool to be called, or `{"type": "allowed_tools", "mode": "auto" or
    "required", "tools": [{"type": "function", "name": ...}]}`: only these of the tools are offered."""
    parallel_tool_calls: bool | None = None
    """Whether an answer may have several calls; by default true, but one call where `tool_choice` asks for one."""
    reasoning: Reasoning = Field(default_factory=Reasoning)
    """How the model thinks."""
    text: TextConfig = Field(default_factory=TextConfig)
    """How the text looks."""
    metadata: _MetadataField = Field(default_factory=dict)
    """Comes back with the response."""
    include: _IncludeField = ()
    """`message.output_text.logprobs`: logprobs of the message's tokens. Other names have no effect."""
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS), Requested()] = 0
    """With the logprobs: also those of that many of the likeliest tokens."""
    timings_per_token: bool = False
    """llama.cpp's `timings` in each event of a stream that adds to the answer, and in the last one."""
    return_progress: bool = False
    """A stream begins with events of type response.in_progress that say how far the prompt is computed."""

    @property
    def choice(self) -> ToolChoice:
        return ToolChoice(self.tool_choice, self.tools.client, self.parallel_tool_calls)

    @property
    def with_logprobs(self) -> bool:
        return _LOGPROBS in self.include

    def shown(self) -> dict[str, Any]:
        """What a response repeats of its request."""
        given = self.numbers(PARAMS)
        return {
            "background": self.background,
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "parallel_tool_calls": self.choice.use.is_parallel,
            "previous_response_id": self.previous_response_id,
            "reasoning": {"effort": self.reasoning.effort, "summary": None},
            "store": self.store,
            "temperature": given["temperature"],
            "text": {"format": self.text.format},
            "tool_choice": self.tool_choice,
            "tools": [*self.tools.shown],
            "top_logprobs": self.top_logprobs,
            "top_p": given["top_p"],
            "metadata": self.metadata,
            "presence_penalty": given["presence_penalty"],
            "frequency_penalty": given["frequency_penalty"],
        }

    def check(self) -> None:
        """ParameterError for fields that contradict each other."""
        self.choice.check()
        if self.top_logprobs and _LOGPROBS not in self.include:
            raise ParameterError("top_logprobs", f"only makes sense with include: [{_LOGPROBS!r}]")
        if self.background and not self.store:
            raise ParameterError("background", "needs store: true")
        if self.stream_options is not None and not self.stream:
            raise ParameterError("stream_options", "only makes sense with stream: true")
        if "input" not in self.model_fields_set and self.previous_response_id is None:
            raise ParameterError("input", "is missing")

    def request(self, messages: Sequence[Mapping[str, Any]]) -> ChatRequest:
        """The chat that the messages of the input, and those before them, make."""
        instructions = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        answer = self.completion(
            (),
            self.max_output_tokens,
            grammar=response_format_grammar(self.text.format, "text.format"),
            with_logprobs=self.with_logprobs,
        )
        return ChatRequest(
            with_one_system_prompt([*instructions, *messages]),
            answer,
            self.choice.offered,
            effort_variables(self.reasoning.effort),
            tool_use=self.choice.use,
            may_reason=self.reasoning_budget != 0,
            reasoning_budget=self.answer_budget,
        )


def with_one_system_prompt(messages: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    """Instructions and the developer's first messages are one: many templates take no second one."""
    systems = [*takewhile(lambda message: message["role"] == "system", messages)]
    others = messages[len(systems) :]
    if not systems:
        return tuple(others)
    return ({"role": "system", "content": "\n\n".join(message["content"] for message in systems)}, *others)


MAX_SUMMARY_TOKENS: Final = 1024
_TASK: Final = (
    "Summarize the conversation so far, so that it can be continued from your summary alone: what was asked, what was "
    "found and decided, names, numbers and open tasks. Reply with the summary only."
)


class CompactionBody(AdapterFields, foreign=RESPONSES):
    """`POST /v1/responses/compact`."""

    model: str
    """The served model's name; another name is refused."""
    input: InputField = Field(default_factory=list)
    """Text, or items, as of `POST /v1/responses`."""
    previous_response_id: str | None = Field(default=None, max_length=256)
    """A stored response: the chat that it ends comes before the input."""
    instructions: str | None = None
    """The chat's system prompt, which is not summarized."""

    def request(self, messages: Sequence[Mapping[str, Any]]) -> ChatRequest:
        """The chat, with the task at its end; greedy, without reasoning."""
        if not messages:
            raise ParameterError("input", "is missing")
        instructions = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        chat = with_one_system_prompt([*instructions, *_with_task(messages)])
        answer = CompletionRequest((), MAX_SUMMARY_TOKENS)
        return ChatRequest(chat, answer, may_reason=False, reasoning_budget=ReasoningBudget(0))


def _with_task(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The task is in a last message of the user that is there already: many templates want turns to alternate."""
    last = messages[-1]
    if last["role"] == "user":
        return [*messages[:-1], {**last, "content": f"{last['content']}\n\n{_TASK}"}]
    return [*messages, {"role": "user", "content": _TASK}]
