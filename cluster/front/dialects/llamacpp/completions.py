"""llama.cpp's `/completion` and `/infill`: their bodies with its defaults, and the requests that they make."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, FailFast, Field, WithJsonSchema

from llamaclust.cluster.front.body import has_field
from llamaclust.cluster.front.dialects.openai.schema import ChatFields
from llamaclust.cluster.front.foreign_fields import LLAMACPP, TEXT_ONLY
from llamaclust.cluster.front.replies.reply import MakeReply, Reply
from llamaclust.cluster.front.sampling import (
    AdapterFields,
    Requested,
    SamplerFields,
    SlotFields,
    SpeculativeFields,
    sampled,
)
from llamaclust.cluster.front.schema import (
    MAX_PROMPTS,
    Body,
    StopField,
    WholeLimitField,
    is_int,
    is_token_id,
    prompt_string,
)
from llamaclust.cluster.front.structured_output import GrammarFields
from llamaclust.cluster.front.text.request import ChatRequest
from llamaclust.cluster.state.journal_records import RequestContext
from llamaclust.core.limits import MAX_TOP_LOGPROBS
from llamaclust.core.sampling_bounds import Dialect
from llamaclust.model.tokenizers.gaps import Gap, OtherFile

RANDOM_SEEDS = (-1, 0xFFFFFFFF)
NEVER = -1e9
"""The bias of a token that may not be chosen, which llama.cpp writes as false."""

MAX_TOKENIZED_BYTES = 1 << 20
MAX_FILES = 1024

LlamaCppPrompt = str | tuple[str | int, ...]
"""Text, or token ids and texts mixed."""


def _prompts(value: Any) -> tuple[LlamaCppPrompt, ...]:
    """One prompt, or a list of texts and lists."""
    if isinstance(value, list) and value and not any(is_int(item) for item in value):
        if len(value) > MAX_PROMPTS:
            raise ValueError(f"{len(value)} prompts in one request, at most {MAX_PROMPTS} are taken")
        return tuple(_prompt(item) for item in value)
    return (_prompt(value),)


def _prompt(value: Any) -> LlamaCppPrompt:
    if isinstance(value, dict):
        return prompt_string(value)
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(item, str) or is_int(item) for item in value):
        raise ValueError("must be a string, a list of token ids and strings, or a list of those")
    return tuple(value)


def _biases(value: Any) -> tuple[tuple[int | str, float], ...]:
    """[[token id or text, bias or false], ...] or {"token id or text": bias or false}."""
    if isinstance(value, dict):
        pairs = [[int(key) if is_token_id(key) else key, bias] for key, bias in value.items()]
    else:
        pairs = value
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise ValueError("must be a list of [token, bias] or an object of them")
    return tuple((_bias_token(token), _bias(bias)) for token, bias in pairs)


def _bias_token(token: Any) -> int | str:
    if is_int(token) or isinstance(token, str):
        return token  # type: ignore[no-any-return]
    raise ValueError("a token must be an id or a text")


def _bias(value: Any) -> float:
    if value is False:
        return NEVER
    if not isinstance(value, int | float) or isinstance(value, bool) or not NEVER <= value <= -NEVER:
        raise ValueError("a bias must be a number, or false for never")
    return float(value)


_OBJECT = {"type": "object", "required": ["prompt_string"], "properties": {"prompt_string": {"type": "string"}}}
_MIXED: dict[str, Any] = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": ["string", "integer"]}}, _OBJECT]
}
_PROMPTS = {"anyOf": [*_MIXED["anyOf"], {"type": "array", "items": _MIXED}]}
_PAIRS = {"anyOf": [{"type": "array", "items": {"type": "array"}}, {"type": "object"}]}


@sampled(Dialect.LLAMACPP)
class LlamaCppBody(SamplerFields, GrammarFields, AdapterFields, SlotFields, SpeculativeFields, foreign=LLAMACPP):
    """`POST /completion`."""

    takes_recommended: ClassVar = True

    model: str | None = None
    """The name of an adapter; any other name is the served model's, unless `api.strict_model` is true."""
    prompt: Annotated[tuple[Any, ...], BeforeValidator(_prompts), WithJsonSchema(_PROMPTS)]
    """Text, token ids, both mixed, or a list of several."""
    n_predict: WholeLimitField = -1
    """Tokens at most; -1: what the context leaves."""
    logit_bias: Annotated[tuple[Any, ...], BeforeValidator(_biases), WithJsonSchema(_PAIRS)] = ()
    """[[token id or text, bias or false], ...]."""
    seed: int = -1
    """-1: drawn."""
    stop: Annotated[StopField, Requested()] = ()
    """The answer ends before the first of these."""
    ignore_eos: Annotated[bool, Requested()] = False
    """The model may not end its answer."""
    n_probs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS), Requested("top_logprobs")] = 0
    """Logprobs of the chosen tokens and of that many of the likeliest."""
    return_tokens: bool = False
    """Token ids in the reply; a stream always has them."""
    timings_per_token: bool = False
    """Timings in each event of a stream."""
    return_progress: bool = False
    """A stream begins with events that say how far the prompt is computed."""
    stream: bool = False
    """Server-sent events."""

    @property
    def max_new_tokens(self) -> int | None:
        """None: what the context leaves, which llama.cpp writes -1 or -2."""
        return None if self.n_predict < 0 else self.n_predict


def _begun(value: Any) -> tuple[str, ...]:
    if not isinstance(value, str):
        raise ValueError("must be a string")
    return (value,)


def _files(value: Any) -> tuple[OtherFile, ...]:
    if not isinstance(value, list):
        raise ValueError("must be a list of objects with 'filename' and 'text'")
    if len(value) > MAX_FILES:
        raise ValueError(f"{len(value)} files, at most {MAX_FILES} are taken")
    return tuple(_file(item) for item in value)


def _file(value: Any) -> OtherFile:
    name, text = (value.get("filename", "tmp"), value.get("text")) if isinstance(value, dict) else (None, None)
    if not isinstance(name, str) or not isinstance(text, str):
        raise ValueError("a file must be an object with a string 'text', and a string 'filename' if wanted")
    return OtherFile(name, text)


_FILES = {"type": "array", "items": {"type": "object", "required": ["text"]}}


class InfillBody(LlamaCppBody):
    """`POST /infill`."""

    prompt: Annotated[tuple[Any, ...], BeforeValidator(_begun), WithJsonSchema({"type": "string"})] = Field(
        default_factory=lambda: ("",)
    )
    """The beginning of the answer."""
    input_prefix: str
    """The text before the answer."""
    input_suffix: str
    """The text behind it."""
    input_extra: Annotated[tuple[Any, ...], BeforeValidator(_files), WithJsonSchema(_FILES)] = ()
    """Texts of other files; where room is short, the first ones are left out."""

    @property
    def gap(self) -> Gap:
        return Gap(self.input_prefix, self.input_suffix, self.prompt[0], self.input_extra)


def _text(value: Any) -> Any:
    """Text of so many bytes, and so of no more tokens."""
    if isinstance(value, str) and len(value.encode("utf-8", "surrogatepass")) > MAX_TOKENIZED_BYTES:
        raise ValueError(f"more than {MAX_TOKENIZED_BYTES} bytes of text; send less at once")
    return value


class TokenizeBody(Body, foreign=TEXT_ONLY):
    """`POST /tokenize`."""

    content: Annotated[str, BeforeValidator(_text)]
    """The text, 1 MiB of UTF-8 at most."""
    add_special: bool = False
    """BOS and EOS where the model wants them."""
    parse_special: bool = True
    """Control words become their tokens."""
    with_pieces: bool = False
    """Each token with its text."""


class DetokenizeBody(Body, foreign=TEXT_ONLY):
    """`POST /detokenize`."""

    tokens: Annotated[list[int], FailFast(), Field(max_length=1 << 20)]
    """Token ids."""


class TemplateBody(ChatFields, foreign=TEXT_ONLY):
    """`POST /apply-template`."""

    def request(self) -> ChatRequest:
        self.choice.check()
        return ChatRequest(
            self.variables,
            tools=self.choice.offered,
            variables=self.template_variables,
            end=self.prompt_end,
            tool_use=self.choice.use,
        )


@dataclass(frozen=True, slots=True)
class Completions:
    """The endpoints of both."""

    openai: MakeReply
    llamacpp: MakeReply

    async def create(self, data: bytes, context: RequestContext) -> Reply:
        """llama.cpp's reply unless the body names a model, as OpenAI's clients must."""
        make = self.openai if await has_field(data, "model") else self.llamacpp
        return await make(data, context)
