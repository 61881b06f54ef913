"""The ASGI app of the HTTP API. It combines the middlewares with the routes of all dialects and models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import BaseRoute
from starlette.routing import Route as PathRoute

from llamaclust.cluster.front.body import HEADER as IGNORED_HEADER
from llamaclust.cluster.front.body import IgnoredFields
from llamaclust.cluster.front.dialects.anthropic.message import Messages
from llamaclust.cluster.front.dialects.dialect import Endpoint
from llamaclust.cluster.front.dialects.embeddings import LlamaCppEmbeddings, OpenAiEmbeddings, Rerank
from llamaclust.cluster.front.dialects.llamacpp.completions import Completions, Infill, LlamaCppCompletion
from llamaclust.cluster.front.dialects.llamacpp.endpoints import llamacpp_routes
from llamaclust.cluster.front.dialects.ollama.answers import Chat, Embed, Embeddings, Generate
from llamaclust.cluster.front.dialects.ollama.models import OllamaManaging, OllamaModels
from llamaclust.cluster.front.dialects.openai.created_responses import CreatedResponses
from llamaclust.cluster.front.dialects.openai.endpoints import ChatCompletions, Responses, TextCompletions
from llamaclust.cluster.front.dialects.openai.models import ModelEndpoints
from llamaclust.cluster.front.dialects.openai.response_store import ResponseStore
from llamaclust.cluster.front.http.gates import Admission, AdmissionGate, KeyGate, Security, page_origins
from llamaclust.cluster.front.http.openapi import Document
from llamaclust.cluster.front.http.responses import (
    EVENTS,
    JSON,
    EarlyReplies,
    Paths,
    QueryParameter,
    Route,
    add_error_handlers,
)
from llamaclust.cluster.front.models import ApiModel, ModelRouter, adapter_routes
from llamaclust.cluster.front.operations import Operations, Workers, disabled, no_proxy
from llamaclust.cluster.front.replies.handlers import Replies
from llamaclust.cluster.front.settings import ApiSettings

if TYPE_CHECKING:
    from llamaclust.cluster.control.pool.drain import WorkerOperations

ENDPOINTS: Final[tuple[type[Endpoint[Any]], ...]] = (
    ChatCompletions,
    TextCompletions,
    Messages,
    OpenAiEmbeddings,
    LlamaCppEmbeddings,
    Rerank,
    LlamaCppCompletion,
    Infill,
    Completions,
    Generate,
    Chat,
    Embed,
    Embeddings,
)
"""Endpoint classes whose constructors take only a model and a path."""
_EXPOSED_HEADERS = (IGNORED_HEADER, "Retry-After", "WWW-Authenticate")


_AFTER: Final = QueryParameter(
    "after", "string", "the id of the last event that the client has, or the part of the id after the colon"
)
_FROM: Final = QueryParameter("from", "integer", "the number of bytes that the client has")
_CONVERSATION: Final = QueryParameter("conv_id", "string", "the conversation's name")


def create_app(
    models: Sequence[ApiModel], admission: Admission | None = None, workers: WorkerOperations | None = None
) -> Starlette:
    """Makes the app for all models. The caller must close the `replies` of each model."""
    router, store = ModelRouter(models), ResponseStore()
    app = Starlette(middleware=_gates(router.settings, admission), routes=[*_routes(router, store, workers)])
    app.router.redirect_slashes = False  # `Paths` removes trailing slashes.
    add_error_handlers(app)
    return app


def _gates(settings: ApiSettings, admission: Admission | None) -> list[Middleware]:
    """Returns the middlewares, outermost first."""
    cors = Middleware(
        CORSMiddleware,
        allow_origin_regex=page_origins(settings).pattern,
        allow_methods=["GET", "POST", "DELETE", "OPTIONS"],
        allow_headers=["*"],
        expose_headers=_EXPOSED_HEADERS,
    )
    return [
        Middleware(Paths, prefix=settings.prefix),
        Middleware(EarlyReplies),
        Middleware(Security, settings=settings),
        # CORS precedes `KeyGate`, so that web pages can read error replies.
        *([cors] if settings.allowed_origins else []),
        Middleware(KeyGate, settings=settings),
        Middleware(AdmissionGate, admission=admission or Admission(settings)),
        Middleware(IgnoredFields),
    ]


def _routes(router: ModelRouter, store: ResponseStore, workers: WorkerOperations | None) -> Iterator[BaseRoute]:
    settings = router.settings
    document = Document(is_strict=settings.is_strict)
    yield PathRoute("/openapi.json", document.show)
    yield from map(router.route, zip(*(_model_routes(model, store) for model in router.models), strict=True))
    replies = router.models[0].replies
    yield from CreatedResponses(replies, store).routes()
    yield from _stream_routes(replies)
    yield from ModelEndpoints(router).routes()
    yield from OllamaModels(router).routes()
    yield from OllamaManaging(router).routes()
    yield from Operations(router).routes()
    if workers is not None:
        yield from Workers(workers).routes()
    yield Route("GET", "/docs", disabled if "docs" in settings.disabled else document.show_page, types=("text/html",))
    yield Route("GET", "/cors-proxy", no_proxy)


def _model_routes(model: ApiModel, store: ResponseStore) -> Iterator[Route]:
    """Yields the routes of one model, in the same order for every model."""
    for endpoint in ENDPOINTS:
        for path in endpoint.paths:
            yield from endpoint(model, path).routes()
    for path in Responses.paths:
        yield from Responses(model, path, store).routes()
    yield from llamacpp_routes(model.service, model.settings)
    yield from adapter_routes(model)


def _stream_routes(replies: Replies) -> Iterator[Route]:
    by_id, by_place = "/v1/streams/{id:path}", "/v1/stream/{id:path}"
    yield Route("GET", by_id, replies.resume, query=(_AFTER,), types=(JSON, EVENTS))
    yield Route("GET", by_place, replies.replay, query=(_FROM,), types=(EVENTS,))
    yield Route("GET", "/v1/stream", replies.replay, query=(_CONVERSATION, _FROM), types=(EVENTS,))
    for path in (by_id, by_place, "/v1/stream"):
        yield Route("DELETE", path, replies.stop, types=(), status=204)
