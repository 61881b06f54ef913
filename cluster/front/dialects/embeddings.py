"""Endpoints for embeddings (`/v1/embeddings`, `/embedding`) and reranking (`/v1/rerank`)."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Annotated, Any, Final, Literal
from uuid import uuid4

from pydantic import BeforeValidator, Field, WithJsonSchema
from starlette.requests import Request
from starlette.responses import Response

from llamaclust.cluster.front.dialects.dialect import Endpoint
from llamaclust.cluster.front.errors import HttpError
from llamaclust.cluster.front.foreign_fields import EMBEDDING, RERANK
from llamaclust.cluster.front.http.sse import JsonParts, rendered, unless_disconnected
from llamaclust.cluster.front.json_text import is_large, json_body
from llamaclust.cluster.front.schema import DimensionsField, is_int, prompt_string
from llamaclust.cluster.front.shared_fields import SaltFields
from llamaclust.cluster.front.text.embedder import EUCLIDEAN, Embedding, EmbeddingOptions, Rank, Vector
from llamaclust.cluster.front.text.service import TextService
from llamaclust.core.errors import ParameterError
from llamaclust.model.pooling import Pooling

MAX_INPUTS = 2048
"""The maximum number of prompts in one request, as in OpenAI's API."""

_MAX_DIMENSIONS = 1 << 20
_MAX_NORM = 1000

Input = tuple[str | int, ...]
"""A prompt as a sequence of texts and token ids, such as ("Hello", 13)."""


def _inputs(value: Any) -> tuple[Input, ...]:
    if isinstance(value, list) and not any(is_int(item) for item in value):
        if not 1 <= len(value) <= MAX_INPUTS:
            raise ValueError(f"there are {len(value)} prompts; a request must have 1 to {MAX_INPUTS}")
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
    raise ValueError(
        "must be a prompt (string, list of token ids and strings, or object with text parts) or a list of prompts"
    )


def _part(part: Any) -> str:
    is_text = isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
    if not is_text or len(part) > 2:
        raise ValueError("a part of 'content' must have type 'text', a string 'text' and no other fields")
    return str(part["text"])


_ONE: list[dict[str, Any]] = [
    {"type": "string"},
    {"type": "array", "items": {"type": ["string", "integer"]}},
    {"type": "object"},
]
_INPUTS = {"anyOf": [*_ONE, {"type": "array", "items": {"anyOf": _ONE}}]}

InputsField = Annotated[tuple[Any, ...], BeforeValidator(_inputs), WithJsonSchema(_INPUTS)]


class EmbeddingFields(SaltFields, foreign=EMBEDDING):
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    """The form of a vector. `float` is a list of numbers, `base64` a base64 text of little-endian float32 values."""
    dimensions: DimensionsField = Field(default=None, ge=1, le=_MAX_DIMENSIONS)
    """The number of dimensions to return, from the beginning of the vector. The default is all dimensions."""
    pooling: Literal["none", "mean", "cls", "last"] | None = None
    """The method that combines the tokens' hidden states. The default is the model file's method, or else `last`."""

    def options(self, default: Pooling, norm: int = EUCLIDEAN) -> EmbeddingOptions:
        pooling = default if self.pooling is None else Pooling(self.pooling)
        return EmbeddingOptions(pooling, norm, self.dimensions, self.cache_salt)


class OpenAiEmbeddingBody(EmbeddingFields):
    input: InputsField
    """One prompt (text, token ids, or a list of both), or a list of prompts."""

    def options(self, default: Pooling, norm: int = EUCLIDEAN) -> EmbeddingOptions:
        options = super().options(default, norm)
        check_single(options.pooling)
        return options


class LlamaCppEmbeddingBody(EmbeddingFields):
    input: InputsField | None = None
    """One prompt (text, token ids, or a list of both), or a list of prompts."""
    content: InputsField | None = None
    """Another name for `input`, as in llama.cpp."""
    embd_normalize: int = Field(default=EUCLIDEAN, ge=-1, le=_MAX_NORM)
    """Order of the norm by which each vector is divided, such as 2 for the Euclidean norm. 0 scales each vector so that
    its largest absolute value is 32760. -1 does not scale vectors."""

    @property
    def inputs(self) -> tuple[Input, ...]:
        given = [inputs for inputs in (self.input, self.content) if inputs is not None]
        if len(given) != 1:
            raise ParameterError("input", "give either input or content")
        return given[0]


async def embedded(
    request: Request,
    service: TextService,
    prompts: Sequence[Sequence[str | int]],
    options: EmbeddingOptions,
    shape: Callable[[list[Embedding]], Any],
) -> JsonParts:
    """Replies with the embeddings of `prompts`. `shape` converts the embeddings to the reply's JSON value."""
    async with AsyncExitStack() as held:
        embedding = held.enter_async_context(service.embed(prompts, options))
        embeddings = await unless_disconnected(request, embedding)
        numbers = sum(len(vector) for each in embeddings for vector in each.vectors)
        kept = held.pop_all()
        body = json_body(partial(shape, embeddings), is_large=is_large(numbers))
        return JsonParts(body, lambda _: kept.aclose())


def check_single(pooling: Pooling) -> None:
    if pooling is Pooling.NONE:
        raise ParameterError(
            "pooling", "'none' gives a vector for each token: use POST /embedding, or set another pooling method"
        )


_RERANKER: Final = "hf:gpustack/bge-reranker-v2-m3-GGUF/bge-reranker-v2-m3-Q8_0.gguf"
_COHERE_PATH: Final = "/v2/rerank"
_PAIRS_OF_A_UNIT: Final = 100
"""The number of documents that Cohere bills as one search."""


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_INPUTS:
        raise ValueError(f"must be a list of 1 to {MAX_INPUTS} texts")
    return tuple(_text(item) for item in value)


def _text(item: Any) -> str:
    text = item.get("text") if isinstance(item, dict) else item
    if not isinstance(text, str):
        raise ValueError("each item must be a string, or an object with the field 'text'")
    return text


_SCHEMA = {"type": "array", "minItems": 1, "items": {"type": ["string", "object"]}}
_Texts = Annotated[tuple[str, ...], BeforeValidator(_texts), WithJsonSchema(_SCHEMA)]


class RerankBody(SaltFields, foreign=RERANK):
    """The body of `POST /v1/rerank`. If it has `texts`, the reply is a list, as in Text Embeddings Inference."""

    model: str | None = None
    """Name of the model. With one model and without `api.strict_model`, any name is accepted."""
    query: str
    """The question or topic by which the documents are ranked."""
    documents: _Texts | None = None
    """The documents to rank. Each is a text, or an object with the field `text`."""
    texts: _Texts | None = None
    """The documents to rank, under the name that Text Embeddings Inference uses."""
    top_n: int | None = Field(default=None, ge=1)
    """The maximum number of results. The most relevant documents are returned. The default is all documents."""
    return_documents: bool = False
    """True to include each document in its result."""
    return_text: bool = False
    """True to include each text in its result. This applies to requests with `texts`."""

    @property
    def given(self) -> tuple[str, ...]:
        lists = [texts for texts in (self.documents, self.texts) if texts is not None]
        if len(lists) != 1:
            raise ParameterError("documents", "give either `documents` or `texts`")
        return lists[0]


class Rerank(Endpoint[RerankBody]):
    paths = ("/v1/rerank", "/v1/reranking", "/rerank", "/reranking", _COHERE_PATH)
    body = RerankBody
    takes_any_model = True

    async def answer(self, request: Request) -> Response:
        """Ranks documents by their relevance to a query. The most relevant document comes first."""
        if self.service.settings.ranking is None:
            raise HttpError(501, "not_supported", f"{request.url.path}: {self._refusal()}")
        return await unless_disconnected(request, self._ranked(await self.read(request)))

    def _refusal(self) -> str:
        own = f"{self.service.settings.model_name!r} does not rank documents"
        if self.settings.rankers:
            return f"{own}: name {' or '.join(map(repr, self.settings.rankers))} as model"
        return f"{own}: serve a reranker, such as `llamaclust up {_RERANKER}`, or one of `models` in the cluster file"

    async def _ranked(self, body: RerankBody) -> Response:
        texts = body.given
        ranks = await self.service.rank(body.query, texts, body.cache_salt)
        best = sorted(range(len(ranks)), key=lambda index: -ranks[index].score)[: body.top_n]
        if body.texts is not None:
            return rendered([_tei_result(body, texts, ranks, index) for index in best])
        results = [_result(body, texts, ranks, index) for index in best]
        if self.path == _COHERE_PATH:
            return rendered({"id": str(uuid4()), "results": results, "meta": _cohere_meta(len(texts))})
        tokens = sum(rank.prompt_tokens for rank in ranks)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        model = self.service.settings.model_name
        return rendered({"object": "list", "model": model, "results": results, "usage": usage})


def _cohere_meta(documents: int) -> dict[str, Any]:
    units = -(-documents // _PAIRS_OF_A_UNIT)
    return {"api_version": {"version": "2", "is_experimental": False}, "billed_units": {"search_units": units}}


def _result(body: RerankBody, texts: Sequence[str], ranks: Sequence[Rank], index: int) -> dict[str, Any]:
    result: dict[str, Any] = {"index": index, "relevance_score": ranks[index].score}
    return {**result, "document": {"text": texts[index]}} if body.return_documents else result


def _tei_result(body: RerankBody, texts: Sequence[str], ranks: Sequence[Rank], index: int) -> dict[str, Any]:
    result: dict[str, Any] = {"index": index, "score": ranks[index].score}
    return {**result, "text": texts[index]} if body.return_text else result


class OpenAiEmbeddings(Endpoint[OpenAiEmbeddingBody]):
    paths = ("/v1/embeddings",)
    body = OpenAiEmbeddingBody

    async def answer(self, request: Request) -> Response:
        """Computes one embedding vector for each prompt."""
        body = await self.read(request)
        options = body.options(self.service.settings.pooling)
        return await embedded(request, self.service, body.input, options, partial(self._shown, body))

    def _shown(self, body: OpenAiEmbeddingBody, embeddings: list[Embedding]) -> dict[str, Any]:
        tokens = sum(embedding.prompt_tokens for embedding in embeddings)
        return {
            "object": "list",
            "data": (_openai_entry(body, index, embedding) for index, embedding in enumerate(embeddings)),
            "model": self.service.settings.model_name,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }


class LlamaCppEmbeddings(Endpoint[LlamaCppEmbeddingBody]):
    paths = ("/embedding", "/embeddings")
    body = LlamaCppEmbeddingBody

    async def answer(self, request: Request) -> Response:
        """Computes one embedding vector for each prompt. With pooling `none`, computes one for each token."""
        body = await self.read(request)
        options = body.options(self.service.settings.pooling, body.embd_normalize)
        return await embedded(request, self.service, body.inputs, options, partial(_llamacpp_reply, body))


def _openai_entry(body: OpenAiEmbeddingBody, index: int, embedding: Embedding) -> dict[str, Any]:
    (vector,) = embedding.vectors
    return {"object": "embedding", "index": index, "embedding": _shown(body, vector)}


def _llamacpp_reply(body: LlamaCppEmbeddingBody, embeddings: list[Embedding]) -> list[Any]:
    return [
        {"index": index, "embedding": (_shown(body, vector) for vector in embedding.vectors)}
        for index, embedding in enumerate(embeddings)
    ]


def _shown(body: EmbeddingFields, vector: Vector) -> str | list[float]:
    if body.encoding_format == "base64":
        return b64encode(vector.astype("<f4").tobytes()).decode()
    numbers: list[float] = vector.tolist()
    return numbers
