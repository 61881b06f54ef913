"""Request bodies of Ollama's API, with Ollama's defaults."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import BeforeValidator, ConfigDict, FailFast, Field, PlainValidator, ValidationInfo, WithJsonSchema

from llamaclust.cluster.front.dialects.embeddings import MAX_INPUTS
from llamaclust.cluster.front.dialects.openai.tools import CallField, FunctionsField
from llamaclust.cluster.front.foreign_fields import (
    OLLAMA,
    OLLAMA_GENERATE,
    OLLAMA_MESSAGE,
    OLLAMA_OPTIONS,
    anything,
    only,
)
from llamaclust.cluster.front.images.parts import base64_part, placed
from llamaclust.cluster.front.schema import (
    Body,
    DimensionsField,
    ForeignFields,
    SeedField,
    StopField,
    WholeLimitField,
    read_part,
    strings,
    takes_images,
)
from llamaclust.cluster.front.sent_thoughts import with_thoughts
from llamaclust.cluster.front.shared_fields import (
    Requested,
    SaltFields,
    SamplerFields,
    SpeculativeFields,
    sampled,
)
from llamaclust.cluster.front.text.images import Part, joined
from llamaclust.cluster.front.text.request import ChatRequest, CompletionRequest, Thoughts, ToolUse, prompt_end
from llamaclust.cluster.front.thought_switches import BudgetFields, SwitchFields
from llamaclust.cluster.front.tools import media_text
from llamaclust.core.errors import ParameterError
from llamaclust.core.limits import MAX_TOP_LOGPROBS
from llamaclust.core.sampler.bounds import MAX_CONTEXT_TOKENS
from llamaclust.core.sampler.fields import Dialect
from llamaclust.core.sampler.matchers import Grammar
from llamaclust.model.grammars.definitions import of_object, of_schema

_MESSAGES: Final = 16_384


@sampled(Dialect.OLLAMA)
class Options(SamplerFields, BudgetFields, SpeculativeFields, foreign=OLLAMA_OPTIONS):
    takes_recommended: ClassVar = True

    num_predict: WholeLimitField = -1
    """The maximum number of tokens in the answer. 0 or a negative number means as many as fit into the context."""
    seed: Annotated[SeedField, Requested()] = None
    """Seed of the random numbers, or -1 for a random seed."""
    stop: Annotated[StopField, Requested()] = ()
    """Texts that end the answer. The answer ends before the first occurrence of any of them."""


def _options(value: Any, info: ValidationInfo) -> Any:
    if not isinstance(value, dict):
        raise ValueError("must be an object")
    return read_part(Options, value, info.context)


def _format(value: Any) -> Any:
    if value == "json" or value == "" or isinstance(value, dict):
        return value
    raise ValueError("must be 'json' or an object with a JSON schema")


def _images(value: Any, info: ValidationInfo) -> tuple[Part, ...]:
    if value in ([], {}, ""):
        return ()
    if not takes_images(info.context):
        return (media_text("images", info.context),)
    if not isinstance(value, list):
        raise ValueError("must be a list of images in base64")
    return tuple(placed(f"[{place}]", base64_part, "images", data, info.context) for place, data in enumerate(value))


_FORMATS: Final = {"anyOf": [{"enum": ["json", ""]}, {"type": "object"}]}
_OptionsField = Annotated[Options, BeforeValidator(_options)]
_FormatField = Annotated[Any, BeforeValidator(_format), WithJsonSchema(_FORMATS)]
_ImagesField = Annotated[
    tuple[Part, ...], PlainValidator(_images), WithJsonSchema({"type": "array", "items": {"type": "string"}})
]


class OllamaAnswerFields(SaltFields, SwitchFields):
    model: str
    """Name of the model, with or without `:latest`. Any name is valid with one model and without `api.strict_model`."""
    keep_alive: Any = None
    """Time to keep the model loaded, in seconds or as `5m`. It has no effect without `models` in the cluster file."""
    stream: bool = True
    """True to reply with a stream of JSON lines, false to reply with one JSON object."""
    format: _FormatField = None
    """The format of the answer: `json` for a JSON object, or a JSON schema."""
    options: _OptionsField = Field(default_factory=Options)
    """Settings of the samplers, and the maximum length of the answer."""
    logprobs: bool = False
    """True to show the generated tokens' logprobs in the reply."""
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] = 0
    """The number of likeliest tokens to show for each token of the answer, with logprobs. Requires `logprobs`."""

    def completion(self, prompt: str | tuple[int, ...] = ()) -> CompletionRequest:
        if self.top_logprobs and not self.logprobs:
            raise ParameterError("top_logprobs", "requires logprobs: true")
        options = self.options
        return options.completion(
            prompt,
            options.num_predict if options.num_predict > 0 else None,
            options.params(),
            top_logprobs=self.top_logprobs,
            with_logprobs=self.logprobs,
            cache_salt=self.cache_salt,
            grammar=self._grammar(),
        )

    @property
    @abstractmethod
    def is_load(self) -> bool:
        """True if the request has no prompt, and only loads or unloads the model."""

    @property
    def has_context(self) -> bool:
        """True if the reply contains `context`, the token ids of the prompt and the answer."""
        return False

    @property
    def wants_reasoning(self) -> bool:
        return self.think is not None and self._thoughts.is_on is not False

    @property
    def _thoughts(self) -> Thoughts:
        return self.thoughts(self.options)

    def _grammar(self) -> Grammar | None:
        if self.format in (None, ""):
            return None
        return of_object("format") if self.format == "json" else of_schema(self.format, "format")

    def _chat(self, messages: tuple[dict[str, Any], ...], tools: tuple[dict[str, Any], ...] = ()) -> ChatRequest:
        return ChatRequest(
            messages,
            self.completion(),
            tools,
            end=prompt_end([message["role"] for message in messages], None, None),
            thoughts=self._thoughts,
        )


class GenerateBody(OllamaAnswerFields, foreign=OLLAMA_GENERATE):
    prompt: str = ""
    """The prompt. If the prompt is empty, the request only loads the model."""
    suffix: str = ""
    """The text after the gap that the answer fills. The model must support infilling. No chat template is used."""
    images: _ImagesField = ()
    """Images as base64, which precede the prompt. If the model reads only text, a short text replaces them."""
    system: str = ""
    """The system message, which precedes the prompt."""
    raw: bool = False
    """True to use no chat template. Texts such as `<s>` in the prompt are then read as special tokens."""
    context: Annotated[list[Annotated[int, Field(ge=0)]], FailFast(), Field(max_length=MAX_CONTEXT_TOKENS)] = Field(
        default_factory=list
    )
    """The `context` from an earlier reply. The request continues that reply's text."""

    @property
    def is_load(self) -> bool:
        return not self.prompt and not self.suffix

    @property
    def has_context(self) -> bool:
        has_images = any(isinstance(part, dict) for part in self.images)
        return not self.raw and not has_images  # Images have no token ids.

    def check(self) -> None:
        if self.images and (self.raw or self.suffix):
            raise ParameterError("images", "cannot be used together with raw or suffix, which apply no chat template")
        if self.system and self.raw:
            raise ParameterError("system", "cannot be used together with raw: write the system message into the prompt")

    def chat(self) -> ChatRequest:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return self._chat((*system, {"role": "user", "content": joined([*self.images, self.prompt])}))


class OllamaMessage(Body, foreign=OLLAMA_MESSAGE):
    role: Annotated[str, WithJsonSchema({"enum": ["system", "user", "assistant", "tool"]})]
    content: str = ""
    images: _ImagesField = ()
    """Images as base64, which precede the text. If the model reads only text, a short text replaces them."""
    thinking: str = ""
    """The reasoning of an earlier answer. The chat template receives it."""
    tool_calls: list[CallField] = Field(default_factory=list)
    tool_name: str = ""
    """Name of the function that returned this result. It is used with the role `tool`."""
    tool_call_id: str = ""
    """Id of the tool call that returned this result. It is used with the role `tool`."""

    def as_variables(self) -> dict[str, Any]:
        more = {
            "name": self.tool_name,
            "reasoning_content": self.thinking,
            "tool_calls": self.tool_calls,
            "tool_call_id": self.tool_call_id,
        }
        content = joined([*self.images, *filter(None, [self.content])])
        return {"role": self.role, "content": content} | {name: value for name, value in more.items() if value}


def _message(value: Any, info: ValidationInfo) -> Any:
    if not isinstance(value, dict):
        raise ValueError("a message must be an object with 'role' and 'content'")
    message = read_part(OllamaMessage, with_thoughts(value, info.context, "thinking"), info.context)
    if message.role not in ("system", "user", "assistant", "tool"):
        raise ValueError(f"role: must be system, user, assistant or tool, not {message.role[:60]!r}")
    if message.tool_calls and message.role != "assistant":
        raise ValueError(f"tool_calls: not allowed for role {message.role!r}")
    return message


class OllamaChatBody(OllamaAnswerFields, foreign=OLLAMA):
    messages: Annotated[
        list[Annotated[OllamaMessage, BeforeValidator(_message)]], FailFast(), Field(max_length=_MESSAGES)
    ] = Field(default_factory=list)
    """The chat so far. If there are no messages, the request only loads the model."""
    tools: FunctionsField = Field(default_factory=list)
    """Functions that the model can call."""

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
    model: str
    """The model's name, with or without `:latest`."""


class ShowBody(
    ModelBody,
    foreign=ForeignFields(hints=dict.fromkeys(("verbose", "system", "template", "options"), _OFF), other_names=_NAMES),
):
    """The body of `POST /api/show`."""


class PullBody(ModelBody, foreign=ForeignFields(hints={"insecure": _OFF}, other_names=_NAMES)):
    stream: bool = True
    """True to reply with a stream of JSON lines, false to reply with one JSON object."""


class DeleteBody(ModelBody, foreign=ForeignFields(hints={"force": anything}, other_names=_NAMES)):
    """The body of `DELETE /api/delete`."""


class CopyBody(Body):
    source: str
    """A name of a served model."""
    destination: str
    """The name to add."""


def _with_from(schema: dict[str, Any]) -> None:
    """Renames the schema's field `source` to Ollama's name `from`, which is a keyword in Python."""
    schema["properties"]["from"] = schema["properties"].pop("source")
    schema["required"] = ["model", "from"]


class CreateBody(
    ModelBody,
    foreign=ForeignFields(refused=dict.fromkeys(_CHANGES.split(), only()), other_names={**_NAMES, "from": "source"}),
):
    model_config = ConfigDict(json_schema_extra=_with_from)

    source: str = Field(description="An existing name of a served model. `model` becomes another name of that model.")
    stream: bool = True
    """True to reply with a stream of JSON lines, false to reply with one JSON object."""


def _texts(value: Any) -> tuple[str, ...]:
    texts = strings(value)
    if len(texts) > MAX_INPUTS:
        raise ValueError(f"{len(texts)} texts in one request; the limit is {MAX_INPUTS}")
    return texts


_TEXTS: Final = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
_EMBEDDING: Final = ForeignFields(hints=dict.fromkeys(("keep_alive", "truncate", "options"), anything))
"""Fields that have no effect on embeddings. The server never truncates prompts."""


class EmbeddingFields(ModelBody, SaltFields, foreign=_EMBEDDING):
    pooling: Literal["none", "mean", "cls", "last"] | None = None
    """The method that combines the tokens' hidden states. The default is the model file's method, or else `last`."""


class EmbedBody(EmbeddingFields):
    input: Annotated[tuple[str, ...], BeforeValidator(_texts), WithJsonSchema(_TEXTS)]
    """A text, or a list of texts."""
    dimensions: DimensionsField = Field(default=None, ge=1)
    """The number of dimensions to return, from the beginning of the vector. The default is all dimensions."""


class EmbeddingsBody(EmbeddingFields):
    prompt: str
