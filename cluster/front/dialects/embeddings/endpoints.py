"""`POST /v1/embeddings`, `POST /embedding`."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator
from functools import partial
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from llamaclust.cluster.front.body import read_body
from llamaclust.cluster.front.dialects.embeddings.answering import check_single, embedded
from llamaclust.cluster.front.dialects.embeddings.schema import (
    EmbeddingFields,
    LlamaCppEmbeddingBody,
    OpenAiEmbeddingBody,
)
from llamaclust.cluster.front.fields.model_name import ModelNames
from llamaclust.cluster.front.foreign_fields import EMBEDDING
from llamaclust.cluster.front.http.paths import Route
from llamaclust.cluster.front.settings import ApiSettings
from llamaclust.cluster.front.text.embedder import Embedding
from llamaclust.cluster.front.text.pooler import Vector
from llamaclust.cluster.front.text.service import TextService

_Fields = TypeVar("_Fields", bound=EmbeddingFields)


def embedding_routes(service: TextService, settings: ApiSettings) -> Iterator[Route]:
    endpoints = EmbeddingEndpoints(service, settings)
    yield Route("POST", "/v1/embeddings", endpoints.openai, OpenAiEmbeddingBody, computes=True)
    for path in ("/embedding", "/embeddings"):
        yield Route("POST", path, endpoints.llamacpp, LlamaCppEmbeddingBody, computes=True)


class EmbeddingEndpoints:
    """One served model's."""

    def __init__(self, service: TextService, settings: ApiSettings) -> None:
        self._service = service
        self._settings = settings
        served = service.settings.model_name
        self._names = ModelNames(served, settings)
        self._llamacpp_names = ModelNames(served, settings, any_by_default=True)

    async def openai(self, request: Request) -> Response:
        """One vector for each prompt."""
        body = await self._read(request, OpenAiEmbeddingBody, self._names)
        options = body.options(self._service.settings.pooling)
        check_single(options.pooling)
        return await embedded(request, self._service, body.input, options, partial(self._openai_reply, body))

    async def llamacpp(self, request: Request) -> Response:
        """A list of vectors for each prompt: one, or without pooling one for each token."""
        body = await self._read(request, LlamaCppEmbeddingBody, self._llamacpp_names)
        options = body.options(self._service.settings.pooling, body.embd_normalize)
        return await embedded(request, self._service, body.inputs, options, partial(_llamacpp_reply, body))

    async def _read(self, request: Request, kind: type[_Fields], names: ModelNames) -> _Fields:
        body = await read_body(request, kind, EMBEDDING, self._settings)
        names.check(body.model)
        return body

    def _openai_reply(self, body: OpenAiEmbeddingBody, embeddings: list[Embedding]) -> dict[str, Any]:
        tokens = sum(embedding.prompt_tokens for embedding in embeddings)
        return {
            "object": "list",
            "data": (_openai_entry(body, index, embedding) for index, embedding in enumerate(embeddings)),
            "model": self._service.settings.model_name,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }


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
