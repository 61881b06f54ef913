"""Finds the model of each request. Serves vLLM's `/v1/load_lora_adapter` and `/v1/unload_lora_adapter`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from http import HTTPStatus
from itertools import chain
from math import inf
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llamaclust.cluster.engine.engine import Engine
from llamaclust.cluster.front.body import hand_on, parse_object_in_time, read_body, read_bytes
from llamaclust.cluster.front.errors import HttpError
from llamaclust.cluster.front.foreign_fields import OF_ADAPTERS
from llamaclust.cluster.front.http.gates import owner, require_first_key
from llamaclust.cluster.front.http.responses import Route, unsupported
from llamaclust.cluster.front.schema import Body
from llamaclust.cluster.front.settings import ApiSettings, ModelNames, not_served, read_keep_alive
from llamaclust.cluster.front.text.service import TextService
from llamaclust.cluster.state.journal_records import RequestContext

if TYPE_CHECKING:
    from llamaclust.cluster.control.model_lifecycle import ModelLifecycle
    from llamaclust.cluster.front.replies.handlers import Replies


_OFF = "no folder for adapters is set: set `api.adapter_folder` in the cluster file"
_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@-]{0,254}$")]


@dataclass(frozen=True, slots=True)
class AdapterControl:
    load: Callable[[str, str], Awaitable[None]]  # Parameters: name, path.
    unload: Callable[[str], Awaitable[None]]


class LoadAdapterBody(Body, foreign=OF_ADAPTERS):
    lora_name: _Name
    """Name of the adapter. Requests use it as their `model`."""
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    """A GGUF file or a PEFT folder in `api.adapter_folder`. The path is absolute or relative to this folder."""
    model: str | None = None
    """The model that the adapter changes. The default is the first served model."""


class UnloadAdapterBody(Body, foreign=OF_ADAPTERS):
    lora_name: Annotated[str, Field(min_length=1, max_length=255)]
    """Name of an adapter that a client loaded."""
    model: str | None = None
    """The model that the adapter changes. The default is the first served model."""


def adapter_routes(model: ApiModel) -> Iterator[Route]:
    load = unload = unsupported(_OFF)
    if model.adapter_control is not None and model.settings.adapter_folder is not None:
        loading = AdapterLoading(model.adapter_control, model.name, model.settings)
        load, unload = loading.load, loading.unload
    yield Route("POST", "/v1/load_lora_adapter", load, LoadAdapterBody)
    yield Route("POST", "/v1/unload_lora_adapter", unload, UnloadAdapterBody)


class AdapterLoading:
    """Loads and unloads adapters for clients. If API keys are configured, clients must send the first key."""

    def __init__(self, control: AdapterControl, served: str, settings: ApiSettings) -> None:
        self._control = control
        self._models = ModelNames(served, replace(settings, strict_model=True))
        self._settings = settings

    async def load(self, request: Request) -> Response:
        """Loads a LoRA adapter. Replies when requests can use the adapter."""
        require_first_key(request.headers, self._settings, "load adapters")
        body = await read_body(request, LoadAdapterBody, self._settings)
        self._models.check(body.model)
        await self._control.load(body.lora_name, body.lora_path)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    async def unload(self, request: Request) -> Response:
        """Unloads a LoRA adapter. Replies when the model no longer uses the adapter."""
        require_first_key(request.headers, self._settings, "unload adapters")
        body = await read_body(request, UnloadAdapterBody, self._settings)
        self._models.check(body.model)
        await self._control.unload(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


_OLLAMA = "/api/"
_INPUTS = ("prompt", "suffix", "messages", "input")


@dataclass(frozen=True, slots=True)
class ApiModel:
    service: TextService
    settings: ApiSettings
    replies: Replies  # Shared by all models.
    engine: Engine
    lifecycle: ModelLifecycle
    status: Callable[[], Mapping[str, Any]]  # Makes the JSON of `GET /cluster`.
    adapter_control: AdapterControl | None = None  # None if clients may not load adapters.

    @property
    def name(self) -> str:
        return self.service.settings.model_name

    @property
    def names(self) -> ModelNames:
        return ModelNames(self.name, self.settings)

    def continues(self, request: RequestContext) -> bool:
        """Returns True if a journalled request used this model, and the model still has all adapters of the request."""
        return request.served == self.settings.digest and self.settings.adapters.have(request.adapters)


@dataclass(frozen=True, slots=True)
class _Addressed:
    """The model that a request names. It stays loaded for `keep` seconds after the request (None: no change)."""

    model: ApiModel
    keep: float | None = None
    unloads: bool = False


class ModelRouter:
    """Selects the model of a request. Without `models` in the cluster file, the only model gets all requests."""

    def __init__(self, models: Sequence[ApiModel]) -> None:
        self.models = models
        self.settings = models[0].settings

    def route(self, routes: Sequence[Route]) -> Route:
        """Merges the routes of all models for one path into one route, which selects the model."""
        first = routes[0]
        if self.settings.can_unload:
            apps = {model.name: route.app for model, route in zip(self.models, routes, strict=True)}
            first.app = partial(self._serve, first, apps)
        return first

    def find(self, name: str) -> ApiModel | None:
        """Returns the model with this name, or None. Prefers an exact match to one that ignores the tag `:latest`."""
        whole = (model for model in self.models if name in model.names.all)
        return next(whole, None) or next((model for model in self.models if model.names.find(name)), None)

    def named(self, name: object, *, shows_names: bool = True) -> ApiModel:
        """Returns the model with this name, or the first model if `name` is empty. Raises HttpError (404) for an
        unknown name. The error lists the names of all models if `shows_names` is true."""
        if not (self.settings.can_unload and isinstance(name, str) and name):
            return self.models[0]
        if (model := self.find(name)) is not None:
            return model
        shown = ((model.name, *model.settings.adapters.names) for model in self.models if shows_names)
        raise not_served(name, chain.from_iterable(shown))

    def queried(self, request: Request) -> ApiModel:
        is_trusted = getattr(request.state, "is_trusted", False)  # False at `/health` and `/live` without a key.
        return self.named(request.query_params.get("model"), shows_names=is_trusted)

    async def _serve(
        self, route: Route, apps: Mapping[str, ASGIApp], scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Passes a request to its model. Then applies Ollama's `keep_alive`, unless the request was refused."""
        addressed = await self._addressed(route, Request(scope, receive))
        app, lifecycle = apps[addressed.model.name], addressed.model.lifecycle
        status = HTTPStatus.INTERNAL_SERVER_ERROR  # Status if the app sends no reply.
        if not _keeps_awake(route):
            await app(scope, receive, send)
            return

        async def note_status(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        if not addressed.unloads:
            lifecycle.enter()
        try:
            await app(scope, receive, note_status)
        finally:
            if not addressed.unloads:
                lifecycle.leave()
            if addressed.keep is not None and status < HTTPStatus.BAD_REQUEST:
                lifecycle.keep(None if addressed.keep == inf else addressed.keep)

    async def _addressed(self, route: Route, request: Request) -> _Addressed:
        """Finds a request's model. Raises HttpError if the body is invalid or the model must be loaded first."""
        if route.method == "GET":
            return _Addressed(self.queried(request))
        data = await read_bytes(request, self.settings)
        fields = await _fields(data)
        model = self.named(fields.get("model") or fields.get("name") or request.query_params.get("model"))
        keep = read_keep_alive(fields.get("keep_alive")) if _keeps_awake(route) else None
        unloads = keep == 0 and not any(fields.get(name) for name in _INPUTS)
        if route.computes and not (unloads or self.settings.load_on_demand):
            self._check_loaded(model, request)
        hand_on(request, data)
        return _Addressed(model, keep, unloads)

    def _check_loaded(self, model: ApiModel, request: Request) -> None:
        """Raises HttpError (400) if the model must be loaded first, unless a kept reply answers the request."""
        if not (model.lifecycle.is_asleep and model.lifecycle.is_idle):
            return
        own, key = owner(request.headers, self.settings.api_keys), request.headers.get("idempotency-key", "")
        if model.replies.cache.named(own, key) is None:
            what = "and requests do not load models (load_on_demand: false)"
            message = f"model: {model.name!r} is not loaded, {what}; load it with POST /models/load"
            raise HttpError(400, "model_not_loaded", message, param="model")


def _keeps_awake(route: Route) -> bool:
    return route.computes and route.path.startswith(_OLLAMA)


async def _fields(data: bytes) -> dict[str, Any]:
    """Returns a body's fields, or {} if the body is not valid. Raises ParameterError for numbers such as NaN."""
    try:
        return await parse_object_in_time(data)
    except HttpError:
        return {}
