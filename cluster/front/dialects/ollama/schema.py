"""Bodies of Ollama's requests, with its defaults."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import BeforeValidator, ConfigDict, FailFast, Field, ValidationInfo, WithJsonSchema

from llamaclust.cluster.front.dialects.embeddings import MAX_INPUTS
from llamaclust.cluster.front.dialects.openai.tools import CallField, FunctionsField
from llamaclust.cluster.front.foreign_fields import OLLAMA, OLLAMA_MESSAGE, OLLAMA_OPTIONS, anything, only
from llamaclust.cluster.front.sampling import ReasoningFields, Requested, SamplerFields, SpeculativeFields, sampled
from llamaclust.cluster.front.schema import (
    Body,
    ForeignFields,
    SeedField,
    StopField,
    WholeLimitField,
    read_part,
    strings,
)
from llamaclust.cluster.front.text.request import ChatRequest, CompletionRequest, ToolUse, effort_variables, prompt_end
from llamaclust.cluster.front.tools import media_text
from llamaclust.core.errors import ParameterError
from llamaclust.core.limits import MAX_TOP_LOGPROBS
from llamaclust.core.sampling import Grammar
from llamaclust.core.sampling_bounds import MAX_CONTEXT_TOKENS, Dialect
from llamaclust.model.grammars.definitions import of_object, of_schema

_EFFORTS: Final = ("low", "medium", "high", "max")
_MESSAGES: Final = 16_384


@sampled(Dialect.OLLAMA)
class Options(SamplerFields, ReasoningFields, SpeculativeFields, foreign=OLLAMA_OPTIONS):
    """The field `options`: sampling settings of an answer."""

    takes_recommended: ClassVar = True

    num_predict: WholeLimitField = -1
    """Tokens at most; 0 or less: what the context leaves."""
    seed: Annotated[SeedField, Requested()] = None
    """-1: drawn."""
    stop: Annotated[StopField, Requested()] = ()
    """The answer ends before the first of these."""


def _options(value: Any, info: ValidationInfo) -> Any:
    if not isinstance(value, dict):
        raise ValueError("must be an object")
    return read_part(Options, value, info.context)


def _format(value: Any) -> Any:
    if value == "json" or value == "" or isinstance(value, dict):
        return value
    raise ValueError("must be 'json' or a JSON schema, an object")


def _think(value: Any) -> Any:
    if isinstance(value, bool) or value in _EFFORTS:
        return value
    raise ValueError(f"must be a boolean or one of {', '.join(_EFFORTS)}")


_FORMATS: Final = {"anyOf": [{"enum": ["json", ""]}, {"type": "object"}]}
_OptionsField = Annotated[Options, BeforeValidator(_options)]
_FormatField = Annotated[Any, BeforeValidator(_format), WithJsonSchema(_FORMATS)]
_ThinkField = Annotated[
    Any, BeforeValidator(_think), WithJsonSchema({"anyOf": [{"type": "boolean"}, {"enum": list(_EFFORTS)}]})
]


class AnswerFields(Body):
    """Fields of both endpoints."""

    model: str
    """The served model, with or without `:latest`; any name unless `api.strict_model` is true."""
    keep_alive: Any = None
    """Time that one of several models stays loaded after the reply: seconds, or a text like "5m"."""
    stream: bool = True
    """Lines of JSON; false: one object."""
    format: _FormatField = None
    """`json`: the answer is a JSON object; a JSON schema: the answer is JSON that it allows."""
    think: _ThinkField = None
    """false: the answer begins without reasoning; true, or an effort for the template: the model must know it."""
    options: _OptionsField = Field(default_factory=Options)
    """Settings of the samplers, and the answer's length."""
    logprobs: bool = False
    """Logprobs of the chosen tokens."""
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] = 0
    """Number of likeliest tokens whose logprobs are shown too; needs `logprobs`."""

    def completion(self, prompt: str | tuple[int, ...] = ()) -> CompletionRequest:
        """Raises ParameterError for fields that contradict each other."""
        if self.top_logprobs and not self.logprobs:
            raise ParameterError("top_logprobs", "only makes sense with logprobs: true")
        options = self.options
        return options.completion(
            prompt,
            options.num_predict if options.num_predict > 0 else None,
            options.params(),
            top_logprobs=self.top_logprobs,
            with_logprobs=self.logprobs,
            grammar=self._grammar(),
        )

    @property
    @abstractmethod
    def is_load(self) -> bool:
        """True if there is no prompt: the model is only loaded."""

    @property
    def has_context(self) -> bool:
        """True if the reply has the token ids of prompt and answer, which the next request may continue."""
        return False

    @property
    def wants_reasoning(self) -> bool:
        """True if the request requires a model that reasons."""
        return self.think not in (None, False)

    def _grammar(self) -> Grammar | None:
        if self.format in (None, "", {}):
            return None
        return of_object("format") if self.format == "json" else of_schema(self.format, "format")

    def _chat(self, messages: tuple[dict[str, Any], ...], tools: tuple[dict[str, Any], ...] = ()) -> ChatRequest:
        return ChatRequest(
            messages,
            self.completion(),
            tools,
            effort_variables(self.think if isinstance(self.think, str) else None),
            prompt_end([message["role"] for message in messages], None, None),
            may_reason=self.think is not False and self.options.reasoning_budget != 0,
            reasoning_budget=self.options.answer_budget,
        )


class GenerateBody(AnswerFields, foreign=OLLAMA):
    """The body of `POST /api/generate`."""

    prompt: str = ""
    """The text; empty: the model is loaded, as it always is."""
    suffix: str = ""
    """The text behind the answer, without a chat template; only of models that fill text in."""
    system: str = ""
    """A system message before the prompt."""
    raw: bool = False
    """The prompt goes to the model as it stands, without the chat template; control words become their tokens."""
    context: Annotated[list[Annotated[int, Field(ge=0)]], FailFast(), Field(max_length=MAX_CONTEXT_TOKENS)] = Field(
        default_factory=list
    )
    """The `context` of an earlier reply, which this one continues."""

    @property
    def is_load(self) -> bool:
        return not self.prompt and not self.suffix

    @property
    def has_context(self) -> bool:
        return not self.raw

    def chat(self) -> ChatRequest:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return self._chat((*system, {"role": "user", "content": self.prompt}))


class OllamaMessage(Body, foreign=OLLAMA_MESSAGE):
    """One message of a chat."""

    role: Annotated[str, WithJsonSchema({"enum": ["system", "user", "assistant", "tool"]})]
    """The role of the message's author."""
    content: str = ""
    """The text."""
    thinking: str = ""
    """Reasoning of an earlier answer, sent back; passed to the chat template."""
    tool_calls: list[CallField] = Field(default_factory=list)
    """An assistant's calls, sent back."""
    tool_name: str = ""
    """The function whose result a message of role `tool` is."""
    tool_call_id: str = ""
    """The call that a message of role `tool` answers."""

    def as_variables(self) -> dict[str, Any]:
        """Returns the message as chat templates know it."""
        more = {
            "name": self.tool_name,
            "reasoning_content": self.thinking,
            "tool_calls": self.tool_calls,
            "tool_call_id": self.tool_call_id,
        }
        return {"role": self.role, "content": self.content} | {name: value for name, value in more.items() if value}


def _message(value: Any, info: ValidationInfo) -> Any:
    if not isinstance(value, dict):
        raise ValueError("a message must be an object with 'role' and 'content'")
    images, content = value.get("images"), value.get("content") or ""
    value = {**value, "images": None}
    if images and isinstance(content, str):
        value["content"] = "\n".join(filter(None, [content, media_text("images", info.context)]))
    message = read_part(OllamaMessage, value, info.context)
    if message.role not in ("system", "user", "assistant", "tool"):
        raise ValueError(f"role: {message.role[:60]!r} is none of system, user, assistant, tool")
    if message.tool_calls and message.role != "assistant":
        raise ValueError(f"tool_calls: a message of role {message.role!r} has none")
    return message


class OllamaChatBody(AnswerFields, foreign=OLLAMA):
    """The body of `POST /api/chat`."""

    messages: Annotated[
        list[Annotated[OllamaMessage, BeforeValidator(_message)]], FailFast(), Field(max_length=_MESSAGES)
    ] = Field(default_factory=list)
    """The chat so far; none: the model is loaded, as it always is."""
    tools: FunctionsField = Field(default_factory=list)
    """Functions that the model may call."""

    @property
    def is_load(self) -> bool:
        return not self.messages

    def chat(self) -> ChatRequest:
        ToolUse().check(self.tools)
        return self._chat(tuple(message.as_variables() for message in self.messages), tuple(self.tools))


_NAMES: Final = {"name": "model"}
_OFF: Final = only(False)
_CHANGES: Final = "files adapters template license system parameters messages quantize modelfile path"


class ModelBody(Body):
    """A body that names a model."""

    model: str
    """The model's name, with or without `:latest`."""


class ShowBody(
    ModelBody,
    foreign=ForeignFields(hints=dict.fromkeys(("verbose", "system", "template", "options"), _OFF), other_names=_NAMES),
):
    """The body of `POST /api/show`."""


class PullBody(ModelBody, foreign=ForeignFields(hints={"insecure": _OFF}, other_names=_NAMES)):
    """The body of `POST /api/pull`."""

    stream: bool = True
    """Lines of JSON; false: one object."""


class DeleteBody(ModelBody, foreign=ForeignFields(hints={"force": anything}, other_names=_NAMES)):
    """The body of `DELETE /api/delete`."""


class CopyBody(Body):
    """The body of `POST /api/copy`."""

    source: str
    """A name of the served model."""
    destination: str
    """The new name."""


def _with_from(schema: dict[str, Any]) -> None:
    """Gives the field `source` Ollama's name `from`, which is a keyword of Python."""
    schema["properties"]["from"] = schema["properties"].pop("source")
    schema["required"] = ["model", "from"]


class CreateBody(
    ModelBody,
    foreign=ForeignFields(refused=dict.fromkeys(_CHANGES.split(), only()), other_names={**_NAMES, "from": "source"}),
):
    """The body of `POST /api/create`."""

    model_config = ConfigDict(json_schema_extra=_with_from)

    source: str = Field(description="`from`: a name of the served model.")
    stream: bool = True
    """Lines of JSON; false: one object."""


def _texts(value: Any) -> tuple[str, ...]:
    texts = strings(value)
    if len(texts) > MAX_INPUTS:
        raise ValueError(f"{len(texts)} texts in one request, at most {MAX_INPUTS} are taken")
    return texts


_TEXTS: Final = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
_EMBEDDING: Final = ForeignFields(hints=dict.fromkeys(("keep_alive", "truncate", "options"), anything))
"""Prompts are never truncated, and no option changes an embedding."""


class EmbeddingFields(ModelBody, foreign=_EMBEDDING):
    """Fields of both endpoints of embeddings."""

    pooling: Literal["none", "mean", "cls", "last"] | None = None
    """The tokens whose hidden states make the embedding; by default as the model file says, else the last one's.
    `none`, which defaults for all endpoints may name, is refused: the replies have one vector for each text."""


class EmbedBody(EmbeddingFields):
    """The body of `POST /api/embed`."""

    input: Annotated[tuple[str, ...], BeforeValidator(_texts), WithJsonSchema(_TEXTS)]
    """A text, or a list of texts."""
    dimensions: int | None = Field(default=None, ge=1)
    """Leading numbers to keep; by default all."""


class EmbeddingsBody(EmbeddingFields):
    """The body of `POST /api/embeddings`."""

    prompt: str
    """The text."""
