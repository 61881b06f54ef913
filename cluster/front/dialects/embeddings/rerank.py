"""`POST /v1/rerank`: documents in the order of what they say about a query, in the forms of Jina, of Cohere
(`/v2/rerank`) and of Text Embeddings Inference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Final
from uuid import uuid4

from pydantic import BeforeValidator, Field, WithJsonSchema
from starlette.requests import Request
from starlette.responses import Response

from llamaclust.cluster.front.body import read_body
from llamaclust.cluster.front.dialects.embeddings.schema import MAX_INPUTS
from llamaclust.cluster.front.errors import HttpError
from llamaclust.cluster.front.fields.model_name import ModelNames
from llamaclust.cluster.front.foreign_fields import RERANK
from llamaclust.cluster.front.http.error_responses import JsonResponse
from llamaclust.cluster.front.http.paths import Route
from llamaclust.cluster.front.http.sse import unless_disconnected
from llamaclust.cluster.front.schema import Body
from llamaclust.cluster.front.settings import ApiSettings
from llamaclust.cluster.front.text.embedder import Rank
from llamaclust.cluster.front.text.service import TextService
from llamaclust.core.errors import ParameterError

_RERANKER: Final = "hf:gpustack/bge-reranker-v2-m3-GGUF/bge-reranker-v2-m3-Q8_0.gguf"
"""A public one."""
_COHERE_PATH: Final = "/v2/rerank"
RERANK_PATHS: Final = ("/v1/rerank", "/v1/reranking", "/rerank", "/reranking", _COHERE_PATH)
_PAIRS_OF_A_UNIT: Final = 100
"""Documents that Cohere bills as one search."""


def _texts(value: Any) -> tuple[str, ...]:
    """Texts, or objects with one."""
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_INPUTS:
        raise ValueError(f"must be a list of 1 to {MAX_INPUTS} texts")
    return tuple(_text(item) for item in value)


def _text(item: Any) -> str:
    text = item.get("text") if isinstance(item, dict) else item
    if not isinstance(text, str):
        raise ValueError("each must be a string, or an object with the field 'text'")
    return text


_SCHEMA = {"type": "array", "minItems": 1, "items": {"type": ["string", "object"]}}
_Texts = Annotated[tuple[str, ...], BeforeValidator(_texts), WithJsonSchema(_SCHEMA)]


class RerankBody(Body):
    """`POST /v1/rerank`. With `texts` the reply is a list, as of Text Embeddings Inference."""

    model: str | None = None
    """Name of the served model; any is taken."""
    query: str
    """What the documents are to say something about."""
    documents: _Texts | None = None
    """Texts, or objects with the field `text`."""
    texts: _Texts | None = None
    """The same for a reply in the other form."""
    top_n: int | None = Field(default=None, ge=1)
    """The best so many; by default all."""
    return_documents: bool = False
    """Whether results have the documents."""
    return_text: bool = False
    """The same in the other form."""

    @property
    def given(self) -> tuple[str, ...]:
        """ParameterError where there are none, or two lists."""
        lists = [texts for texts in (self.documents, self.texts) if texts is not None]
        if len(lists) != 1:
            raise ParameterError("documents", "give one of documents and texts")
        return lists[0]


class RerankEndpoint:
    """One served model's."""

    def __init__(self, service: TextService, settings: ApiSettings) -> None:
        self._service = service
        self._settings = settings
        self._names = ModelNames(service.settings.model_name, settings, any_by_default=True)

    def routes(self) -> Iterator[Route]:
        for path in RERANK_PATHS:
            yield Route("POST", path, self.rerank, RerankBody, computes=True)

    async def rerank(self, request: Request) -> Response:
        """Documents by their score for a query, the best first."""
        if self._service.settings.ranking is None:
            raise HttpError(501, "not_supported", f"{request.url.path}: {self._refusal()}")
        body = await read_body(request, RerankBody, RERANK, self._settings)
        self._names.check(body.model)
        is_cohere = request.url.path.endswith(_COHERE_PATH)
        return await unless_disconnected(request, self._answer(body, is_cohere=is_cohere))

    def _refusal(self) -> str:
        own = f"{self._service.settings.model_name!r} does not rank documents"
        if self._settings.rankers:
            return f"{own}: name {' or '.join(map(repr, self._settings.rankers))} as model"
        return f"{own}: serve a reranker, such as `llamaclust up {_RERANKER}`, or one of `models` in the cluster file"

    async def _answer(self, body: RerankBody, *, is_cohere: bool) -> Response:
        texts = body.given
        ranks = await self._service.rank(body.query, texts)
        best = sorted(range(len(ranks)), key=lambda index: -ranks[index].score)[: body.top_n]
        if body.texts is not None:
            return JsonResponse([_tei_result(body, texts, ranks, index) for index in best])
        results = [_result(body, texts, ranks, index) for index in best]
        if is_cohere:
            return JsonResponse({"id": str(uuid4()), "results": results, "meta": _cohere_meta(len(texts))})
        tokens = sum(rank.prompt_tokens for rank in ranks)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        model = self._service.settings.model_name
        return JsonResponse({"object": "list", "model": model, "results": results, "usage": usage})


def _cohere_meta(documents: int) -> dict[str, Any]:
    units = -(-documents // _PAIRS_OF_A_UNIT)
    return {"api_version": {"version": "2", "is_experimental": False}, "billed_units": {"search_units": units}}


def _result(body: RerankBody, texts: Sequence[str], ranks: Sequence[Rank], index: int) -> dict[str, Any]:
    result: dict[str, Any] = {"index": index, "relevance_score": ranks[index].score}
    return {**result, "document": {"text": texts[index]}} if body.return_documents else result


def _tei_result(body: RerankBody, texts: Sequence[str], ranks: Sequence[Rank], index: int) -> dict[str, Any]:
    result: dict[str, Any] = {"index": index, "score": ranks[index].score}
    return {**result, "text": texts[index]} if body.return_text else result
