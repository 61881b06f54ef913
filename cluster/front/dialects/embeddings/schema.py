"""Bodies of requests for embeddings."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from llamaclust.cluster.front.schema import Body, is_int, prompt_string
from llamaclust.cluster.front.text.embedder import EmbeddingOptions
from llamaclust.cluster.front.text.pooler import EUCLIDEAN
from llamaclust.cluster.front.text.request import MAX_SALT_CHARACTERS
from llamaclust.core.errors import ParameterError
from llamaclust.model.pooling import Pooling

MAX_INPUTS = 2048
"""Prompts of one request, as OpenAI has it."""

_MAX_DIMENSIONS = 1 << 20
_MAX_NORM = 1000

Input = tuple[str | int, ...]
"""Texts and token ids in order."""


def _inputs(value: Any) -> tuple[Input, ...]:
    """One prompt, or a list of them; a list with token ids among its items is one."""
    if isinstance(value, list) and not any(is_int(item) for item in value):
        if not 1 <= len(value) <= MAX_INPUTS:
            raise ValueError(f"{len(value)} prompts in one request; give 1 to {MAX_INPUTS}")
        return tuple(_input(item) for item in value)
    return (_input(value),)


def _input(value: Any) -> Input:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and all(isinstance(item, str) or is_int(item) for item in value):
        return tuple(value)
    if isinstance(value, dict) and "prompt_string" in value:
        return (prompt_string(value),)
    if isinstance(value, dict) and value.keys() == {"content"} and isinstance(value["content"], list):
        return ("".join(map(_part, value["content"])),)
    raise ValueError("must be a string, a list of token ids and strings, an object with text parts, or a list of those")


def _part(part: Any) -> str:
    is_text = isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
    if not is_text or len(part) > 2:
        raise ValueError("a part of 'content' must be an object of type 'text' with the field 'text' and no others")
    return str(part["text"])


_ONE: list[dict[str, Any]] = [
    {"type": "string"},
    {"type": "array", "items": {"type": ["string", "integer"]}},
    {"type": "object"},
]
_INPUTS = {"anyOf": [*_ONE, {"type": "array", "items": {"anyOf": _ONE}}]}

InputsField = Annotated[tuple[Any, ...], BeforeValidator(_inputs), WithJsonSchema(_INPUTS)]


class EmbeddingFields(Body):
    """Fields of both endpoints."""

    model: str | None = None
    """Name of the served model."""
    encoding_format: Literal["float", "base64"] = "float"
    """Numbers, or the base64 of their float32, little endian."""
    dimensions: int | None = Field(default=None, ge=1, le=_MAX_DIMENSIONS)
    """Leading channels to keep; by default all."""
    pooling: Literal["none", "mean", "cls", "last"] | None = None
    """Which tokens' hidden states make the embedding; by default as the model file says, else the last one's."""
    cache_salt: str = Field(default="", max_length=MAX_SALT_CHARACTERS)
    """KV blocks are shared with requests that have the same."""

    def options(self, default: Pooling, norm: int = EUCLIDEAN) -> EmbeddingOptions:
        """`default`: the pooling of requests without one."""
        pooling = default if self.pooling is None else Pooling(self.pooling)
        return EmbeddingOptions(pooling, norm, self.dimensions, self.cache_salt)


class OpenAiEmbeddingBody(EmbeddingFields):
    """`POST /v1/embeddings`."""

    input: InputsField
    """Text, token ids, both mixed, or a list of several."""


class LlamaCppEmbeddingBody(EmbeddingFields):
    """`POST /embedding`."""

    input: InputsField | None = None
    """Text, token ids, both mixed, or a list of several."""
    content: InputsField | None = None
    """llama.cpp's other name of `input`."""
    embd_normalize: int = Field(default=EUCLIDEAN, ge=-1, le=_MAX_NORM)
    """-1: not at all; 0: the greatest absolute value becomes 32760; p: the p-norm becomes 1."""

    @property
    def inputs(self) -> tuple[Input, ...]:
        """ParameterError where there are none, or two."""
        given = [inputs for inputs in (self.input, self.content) if inputs is not None]
        if len(given) != 1:
            raise ParameterError("input", "give one of input and content")
        return given[0]
