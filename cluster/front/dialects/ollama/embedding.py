"""`POST /api/embed` and `POST /api/embeddings`."""

from __future__ import annotations

import time
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema
from starlette.requests import Request
from starlette.responses import Response

from llamaclust.cluster.front.body import read_body
from llamaclust.cluster.front.dialects.embeddings.answering import check_single, embedded
from llamaclust.cluster.front.dialects.embeddings.schema import MAX_INPUTS
from llamaclust.cluster.front.dialects.ollama.bodies import ModelBody
from llamaclust.cluster.front.dialects.ollama.names import OllamaNames
from llamaclust.cluster.front.foreign_fields import anything
from llamaclust.cluster.front.http.error_responses import JsonResponse
from llamaclust.cluster.front.schema import ForeignFields, strings
from llamaclust.cluster.front.settings import ApiSettings
from llamaclust.cluster.front.text.embedder import Embedding, EmbeddingOptions
from llamaclust.cluster.front.text.pooler import EUCLIDEAN
from llamaclust.cluster.front.text.service import TextService
from llamaclust.model.pooling import Pooling

_FOREIGN: Final = ForeignFields(hints=dict.fromkeys(("keep_alive", "truncate", "options"), anything))
"""Prompts are never truncated, and no option changes an embedding."""
_UNCHANGED: Final = -1


def _texts(value: Any) -> tuple[str, ...]:
    texts = strings(value)
    if len(texts) > MAX_INPUTS:
        raise ValueError(f"{len(texts)} texts in one request, at most {MAX_INPUTS} are taken")
    return texts


_TEXTS: Final = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}


class _Fields(ModelBody):
    pooling: Literal["none", "mean", "cls", "last"] | None = None
    """Which tokens' hidden states make the embedding; by default as the model file says, else the last one's. `none`,
    which defaults for all endpoints may name, is refused: the replies have one vector for each text."""


class EmbedBody(_Fields):
    """`POST /api/embed`."""

    input: Annotated[tuple[str, ...], BeforeValidator(_texts), WithJsonSchema(_TEXTS)]
    """A text, or a list of texts."""
    dimensions: int | None = Field(default=None, ge=1)
    """Leading numbers to keep; by default all."""


class EmbeddingsBody(_Fields):
    """`POST /api/embeddings`."""

    prompt: str
    """The text."""


class OllamaEmbeddings:
    """One served model's."""

    def __init__(self, service: TextService, settings: ApiSettings, names: OllamaNames) -> None:
        self._service = service
        self._settings = settings
        self._names = names

    async def embed(self, request: Request) -> Response:
        """A vector of length 1 for each text."""
        body = await read_body(request, EmbedBody, _FOREIGN, self._settings)
        self._names.check(body.model)
        begun_ns = time.perf_counter_ns()

        def shape(embeddings: list[Embedding]) -> dict[str, Any]:
            return {
                "model": self._service.settings.model_name,
                "embeddings": (embedding.vectors[0].tolist() for embedding in embeddings),
                "total_duration": time.perf_counter_ns() - begun_ns,
                "load_duration": 0,
                "prompt_eval_count": sum(embedding.prompt_tokens for embedding in embeddings),
            }

        options = EmbeddingOptions(self._pooling(body), EUCLIDEAN, body.dimensions)
        if not body.input:
            return JsonResponse(shape([]))
        return await embedded(request, self._service, [(text,) for text in body.input], options, shape)

    async def embeddings(self, request: Request) -> Response:
        """A vector of the length that the model gave it; an empty one for an empty text, as the model is loaded."""
        body = await read_body(request, EmbeddingsBody, _FOREIGN, self._settings)
        self._names.check(body.model)

        def shape(embeddings: list[Embedding]) -> dict[str, Any]:
            return {"embedding": embeddings[0].vectors[0].tolist()}

        options = EmbeddingOptions(self._pooling(body), _UNCHANGED)
        if not body.prompt:
            return JsonResponse({"embedding": []})
        return await embedded(request, self._service, [(body.prompt,)], options, shape)

    def _pooling(self, body: _Fields) -> Pooling:
        pooling = self._service.settings.pooling if body.pooling is None else Pooling(body.pooling)
        check_single(pooling)
        return pooling
