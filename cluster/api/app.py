"""The HTTP API of one served model, put together."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from llamaclust.cluster.api.admission import Admission, AdmissionGate
from llamaclust.cluster.api.anthropic.endpoint import MessagesEndpoint
from llamaclust.cluster.api.anthropic.schema import MessagesBody
from llamaclust.cluster.api.browser.endpoint import PageRoute
from llamaclust.cluster.api.early_replies import EarlyReplies
from llamaclust.cluster.api.embeddings.endpoints import embedding_routes
from llamaclust.cluster.api.embeddings.rerank import RerankEndpoint
from llamaclust.cluster.api.error_responses import add_error_handlers, unsupported
from llamaclust.cluster.api.fields.model_name import ModelNames
from llamaclust.cluster.api.ignored import HEADER as IGNORED_HEADER
from llamaclust.cluster.api.ignored import IgnoredFields
from llamaclust.cluster.api.llamacpp.completions import Completions
from llamaclust.cluster.api.llamacpp.endpoints import LlamaCppEndpoints
from llamaclust.cluster.api.llamacpp.routes import llamacpp_routes
from llamaclust.cluster.api.models.adapter_loading import AdapterLoading
from llamaclust.cluster.api.models.door import DoorModel, ModelDoor
from llamaclust.cluster.api.models.lists import ModelLists
from llamaclust.cluster.api.ollama.routes import ollama_routes
from llamaclust.cluster.api.openai.chat import ChatEndpoint
from llamaclust.cluster.api.openai.completions import CompletionEndpoint
from llamaclust.cluster.api.openai.models import ModelsEndpoint
from llamaclust.cluster.api.openai.responses.compaction import CompactionBody
from llamaclust.cluster.api.openai.responses.endpoints import ResponsesEndpoint, StoredResponses
from llamaclust.cluster.api.openai.responses.schema import ResponsesBody
from llamaclust.cluster.api.openai.responses.store import ResponseStore
from llamaclust.cluster.api.openai.schema import ChatBody, CompletionBody
from llamaclust.cluster.api.openapi import ApiRoute, Document
from llamaclust.cluster.api.operations.controls import Controls
from llamaclust.cluster.api.operations.endpoints import Operations, Workers, disabled, no_proxy
from llamaclust.cluster.api.paths import Paths, RouteNames
from llamaclust.cluster.api.replies.handlers import Replies
from llamaclust.cluster.api.replies.reply import MakeReply
from llamaclust.cluster.api.security import KeyGate, Security, page_origins
from llamaclust.cluster.api.settings import ApiSettings
from llamaclust.cluster.engine.engine import Engine
from llamaclust.cluster.text.service import TextService

Endpoint = Callable[[Request], Awaitable[Response]]
_ONE_MODEL = "one model is served, which stays loaded; list several as `models` in the cluster file"
_EXPOSED_HEADERS = (IGNORED_HEADER, "Retry-After", "WWW-Authenticate")
"""Of replies, that scripts of web pages may read beside those that they always may."""


def create_app(
    service: TextService,
    replies: Replies,
    engine: Engine,
    cluster_status: Callable[[], Mapping[str, Any]],
    admission: Admission | None = None,
    controls: Controls | None = None,
) -> Starlette:
    """The app. `cluster_status` gives the JSON of `GET /cluster`; `admission` lets its owner drain the app. The owner
    of `replies` closes them."""
    app = model_app(service, replies, engine, cluster_status, controls or Controls(), ResponseStore())
    for operation in ("load", "unload"):
        _route(app, "POST", f"/v1/models/{operation}", unsupported(_ONE_MODEL))
    add_gates(app, replies.settings, admission, app.routes)
    return app


def create_models_app(models: Sequence[DoorModel], settings: ApiSettings, admission: Admission) -> Starlette:
    """The app of several models, each behind its own app."""
    app = Starlette()
    add_error_handlers(app)
    door = ModelDoor(models, settings)
    lists = ModelLists(models, door, settings)
    _route(app, "GET", "/v1/models", lists.list)
    _route(app, "POST", "/v1/models/load", lists.load)
    _route(app, "POST", "/v1/models/unload", lists.unload)
    _route(app, "GET", "/v1/models/{model:path}", lists.retrieve)
    _route(app, "GET", "/api/tags", lists.tags)
    _route(app, "GET", "/api/ps", lists.ps)
    _route(app, "GET", "/metrics", disabled if "metrics" in settings.disabled else lists.metrics)
    _route(app, "GET", "/props", disabled if "props" in settings.disabled else lists.props)
    _add_requests(app, lists)
    app.router.default = door
    of_models = (route for model in models if isinstance(model.app, Starlette) for route in model.app.routes)
    add_gates(app, settings, admission, [*app.routes, *of_models])
    return app


def model_app(
    service: TextService,
    replies: Replies,
    engine: Engine,
    cluster_status: Callable[[], Mapping[str, Any]],
    controls: Controls,
    store: ResponseStore,
) -> Starlette:
    """The endpoints of one model, which all clients reach."""
    settings = replies.settings
    app = Starlette()
    add_error_handlers(app)
    document = Document(app.routes, is_strict=settings.is_strict)
    app.add_route("/openapi.json", document.show)
    app.router.routes.append(PageRoute())
    models = ModelsEndpoint(service, settings)
    counting = ChatEndpoint(service, settings, ModelNames(service.settings.model_name, settings, any_by_default=True))
    for prefix in ("/v1", ""):
        _post(app, f"{prefix}/chat/completions/input_tokens", counting.count, ChatBody)
    _post(app, "/v1/messages/count_tokens", MessagesEndpoint(service, settings).count, MessagesBody)
    for path, make, body in _generating(service, settings):
        _post(app, path, replies.endpoint(path, make), body)
    _add_responses(app, service, replies, store)
    _route(app, "GET", "/v1/streams/{id:path}", replies.resume)
    _route(app, "GET", "/v1/stream/{id:path}", replies.replay)
    _route(app, "GET", "/v1/stream", replies.replay)
    for path in ("/v1/streams/{id:path}", "/v1/stream/{id:path}", "/v1/stream"):
        _route(app, "DELETE", path, replies.stop)
    _route(app, "GET", "/v1/models", models.list)
    _route(app, "GET", "/v1/models/{model:path}", models.retrieve)
    own = (*embedding_routes(service, settings), *RerankEndpoint(service, settings).routes())
    loading = AdapterLoading(controls.adapters, service.settings.model_name, settings).routes()
    for route in (*own, *llamacpp_routes(service, replies), *ollama_routes(service, replies), *loading):
        _route(app, route.method, route.path, route.endpoint, route.body)
    operations = Operations(service, engine, cluster_status, settings)
    for name in ("health", "live", "metrics", "cluster", "props", "slots"):
        _route(app, "GET", f"/{name}", disabled if name in settings.disabled else getattr(operations, name))
    _add_requests(app, operations)
    if controls.workers is not None:
        workers = Workers(controls.workers)
        for name, method in (("drain", "POST"), ("undrain", "POST"), ("log", "GET")):
            _route(app, method, f"/cluster/workers/{{worker}}/{name}", getattr(workers, name))
    _route(app, "GET", "/docs", disabled if "docs" in settings.disabled else document.show_page)
    _route(app, "GET", "/cors-proxy", no_proxy)
    app.add_middleware(IgnoredFields)
    return app


def add_gates(app: Starlette, settings: ApiSettings, admission: Admission | None, routes: Sequence[BaseRoute]) -> None:
    """What all requests pass before an endpoint, which is one of the routes."""
    app.add_middleware(AdmissionGate, admission=admission or Admission(settings))
    app.add_middleware(RouteNames, routes=routes)
    app.add_middleware(KeyGate, settings=settings)
    if settings.allowed_origins:  # outside all that refuses requests of these pages: they may read why
        app.add_middleware(
            CORSMiddleware,
            allow_origin_regex=page_origins(settings).pattern,
            allow_methods=["GET", "POST", "DELETE", "OPTIONS"],
            allow_headers=["*"],
            expose_headers=_EXPOSED_HEADERS,
        )
    app.add_middleware(Security, settings=settings)
    app.add_middleware(EarlyReplies)
    app.add_middleware(Paths, prefix=settings.prefix)


def _generating(service: TextService, settings: ApiSettings) -> Iterator[tuple[str, MakeReply, type[BaseModel]]]:
    """Paths, makers and bodies. Clients of llama.cpp leave `/v1` away, and name any model."""
    served = service.settings.model_name
    for prefix, models in (
        ("/v1", ModelNames(served, settings)),
        ("", ModelNames(served, settings, any_by_default=True)),
    ):
        yield f"{prefix}/chat/completions", ChatEndpoint(service, settings, models).create, ChatBody
        completions: MakeReply = CompletionEndpoint(service, settings, models).create
        if not prefix:
            completions = Completions(completions, LlamaCppEndpoints(service, settings).complete).create
        yield f"{prefix}/completions", completions, CompletionBody
    yield "/v1/messages", MessagesEndpoint(service, settings).create, MessagesBody


def _add_responses(app: Starlette, service: TextService, replies: Replies, store: ResponseStore) -> None:
    """OpenAI's Responses API; clients of llama.cpp leave `/v1` away here too."""
    settings = replies.settings
    stored = StoredResponses(replies, store)
    for prefix in ("/v1", ""):
        path = f"{prefix}/responses"
        models = ModelNames(service.settings.model_name, settings, any_by_default=not prefix)
        endpoint = ResponsesEndpoint(service, settings, models, store)
        _post(app, path, replies.endpoint(path, endpoint.create), ResponsesBody)
        _post(app, f"{path}/compact", replies.endpoint(f"{path}/compact", endpoint.compact), CompactionBody)
        _post(app, f"{path}/input_tokens", endpoint.count, ResponsesBody)
        _route(app, "GET", f"{path}/{{id}}/input_items", stored.input_items)
        _route(app, "POST", f"{path}/{{id}}/cancel", stored.cancel)
        _route(app, "GET", f"{path}/{{id}}", stored.retrieve)
        _route(app, "DELETE", f"{path}/{{id}}", stored.delete)


def _add_requests(app: Starlette, of: Operations | ModelLists) -> None:
    _route(app, "GET", "/cluster/requests", of.requests)
    _route(app, "GET", "/cluster/requests/{request}", of.waterfall)


def _route(app: Starlette, method: str, path: str, endpoint: Endpoint, body: type[BaseModel] | None = None) -> None:
    app.routes.append(ApiRoute(method, path, endpoint, body))


def _post(app: Starlette, path: str, endpoint: Endpoint, body: type[BaseModel]) -> None:
    _route(app, "POST", path, endpoint, body)
