"""The door of several models: each request goes to the app of the model that it names, else of the first one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Protocol

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llamaclust.cluster.api.body import parse_object_in_time, read_bytes
from llamaclust.cluster.api.error_responses import error_response
from llamaclust.cluster.api.errors import HttpError
from llamaclust.cluster.api.fields.keep_alive import KeepAlive, read_keep_alive
from llamaclust.cluster.api.replies.handlers import Replies
from llamaclust.cluster.api.security import owner
from llamaclust.cluster.api.settings import ApiSettings
from llamaclust.cluster.config.values import TAG
from llamaclust.cluster.engine.engine import Engine
from llamaclust.cluster.text.service import TextService

_KEPT = ("/v1/streams/", "/v1/stream/", "/v1/responses/", "/responses/")
"""Paths of replies that are kept, by their ids."""
_STREAM = "/v1/stream"  # with the reply's name as `?conv_id=`
_NO_REPLIES = frozenset(
    f"{prefix}/responses/{operation}" for prefix in ("", "/v1") for operation in ("input_tokens", "compact")
)
"""Paths below these that name no reply."""
_LOADS = ("/api/generate", "/api/chat", "/api/embed", "/api/embeddings")
"""Paths whose `keep_alive` counts; a request there without input loads the model."""
COMPUTED = frozenset(
    f"{prefix}/{path}"
    for prefix in ("", "/v1")
    for path in (
        *("chat/completions", "completions", "completion", "infill", "messages", "responses", "responses/compact"),
        *("embeddings", "embedding", "rerank", "reranking"),
    )
) | {"/v2/rerank", *_LOADS}
"""Paths whose replies need a loaded model."""
_INPUTS = ("prompt", "suffix", "messages", "input")
"""Fields of these: a request without any loads or unloads the model."""


class Residence(Protocol):
    """Whether a model is loaded, and for how long without requests; None: until another one needs its memory."""

    keep_alive_s: float | None

    @property
    def is_asleep(self) -> bool: ...
    @property
    def is_loading(self) -> bool: ...
    @property
    def is_idle(self) -> bool: ...
    @property
    def is_leaving(self) -> bool: ...
    @property
    def expires_in_s(self) -> float | None: ...
    def keep(self, seconds: float | None) -> None: ...
    def enter(self) -> None: ...
    def leave(self) -> None: ...
    def load(self) -> None: ...
    async def sleep(self) -> None: ...


@dataclass(frozen=True, slots=True)
class DoorModel:
    """One of the models, with the app that serves it alone."""

    app: ASGIApp
    service: TextService
    replies: Replies
    resident: Residence
    engine: Engine

    @property
    def name(self) -> str:
        return self.service.settings.model_name

    @property
    def shown_names(self) -> tuple[str, ...]:
        """Its own, and those of its adapters."""
        return (self.name, *self.replies.settings.adapters.names)

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.shown_names, *self.replies.settings.aliases)


@dataclass(frozen=True, slots=True)
class _Addressed:
    """A request whose body was read. `unloads`: it has no input, and its model is not to stay awake."""

    model: DoorModel
    keep: KeepAlive | None
    unloads: bool
    receive: Receive


class ModelDoor:
    """An ASGI app."""

    def __init__(self, models: Sequence[DoorModel], settings: ApiSettings) -> None:
        self._models = models
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            request = Request(scope, receive)
            path = scope["path"]
            is_kept = path == _STREAM or (path.startswith(_KEPT) and path not in _NO_REPLIES)
            if scope["method"] == "GET" or is_kept:
                await self._of_url(request).app(scope, receive, send)
            else:
                await self._pass(await self._addressed(request), scope, send)
        except HttpError as error:
            await error_response(error, scope)(scope, receive, send)
        except ClientDisconnect:
            return

    def named(self, name: object) -> DoorModel:
        """The first one without a name. HttpError 404 for a name of none."""
        if not isinstance(name, str) or not name:
            return self._models[0]
        for own in (name, name.removesuffix(TAG)):
            for model in self._models:
                if own in model.names:
                    return model
        served = ", ".join(repr(shown) for model in self._models for shown in model.shown_names)
        message = f"model: {name[:200]!r} is not served here, only {served}"
        raise HttpError(404, "model_not_found", message, param="model")

    def _of_url(self, request: Request) -> DoorModel:
        """Of `?model=`, or with the kept reply that the path names."""
        path, own = request.url.path, owner(request.headers, self._settings.api_keys)
        if path == _STREAM:
            path = f"{_STREAM}/{request.query_params.get('conv_id', '')}"
        for prefix in _KEPT:
            if path.startswith(prefix):
                rest = path.removeprefix(prefix)
                names = (rest, rest.partition("/")[0])  # of clients, with slashes; or before an operation
                pairs = ((model, name) for name in names for model in self._models)
                kept = (model for model, name in pairs if model.replies.cache.named(own, name) is not None)
                return next(kept, self._models[0])
        return self.named(request.query_params.get("model"))

    async def _addressed(self, request: Request) -> _Addressed:
        """Nothing else of the body is held during its reply. HttpError as of `read_bytes`, `named` and the fields, and
        for a model that is to be loaded first."""
        data = await read_bytes(request, self._settings)
        fields = await _fields(data)
        name = fields.get("model") or fields.get("name") or request.query_params.get("model")
        model, keep, unloads = self.named(name), None, False
        if request.scope["path"] in _LOADS:
            keep = read_keep_alive(fields)
            unloads = keep is not None and keep.seconds == 0 and not any(fields.get(name) for name in _INPUTS)
        if not (unloads or self._settings.load_on_demand) and request.scope["path"] in COMPUTED:
            self._check_loaded(model, request)
        return _Addressed(model, keep, unloads, _replayed(data, request.receive))

    def _check_loaded(self, model: DoorModel, request: Request) -> None:
        """HttpError 400 for a model that sleeps. One that gave way to another one's requests has some itself, and a
        reply that is kept needs none."""
        if not (model.resident.is_asleep and model.resident.is_idle):
            return
        own, key = owner(request.headers, self._settings.api_keys), request.headers.get("idempotency-key", "")
        if model.replies.cache.named(own, key) is None:
            what = "and requests load none (load_on_demand: false)"
            message = f"model: {model.name!r} is not loaded, {what}: POST /models/load with this model first"
            raise HttpError(400, "model_not_loaded", message, param="model")

    async def _pass(self, addressed: _Addressed, scope: Scope, send: Send) -> None:
        """To a model, which stays awake for as long as Ollama's field `keep_alive` says, from the end of the reply; not
        of a refusal."""
        model, keep = addressed.model, addressed.keep
        if scope["path"] not in _LOADS:
            await model.app(scope, addressed.receive, send)
            return
        is_refused = False

        async def send_observed(message: Message) -> None:
            nonlocal is_refused
            is_refused = is_refused or message.get("status", 200) >= HTTPStatus.BAD_REQUEST
            await send(message)

        if not addressed.unloads:
            model.resident.enter()
        try:
            await model.app(scope, addressed.receive, send_observed)
        finally:
            if not addressed.unloads:
                model.resident.leave()
            if keep is not None and not is_refused:
                model.resident.keep(keep.seconds)


async def _fields(data: bytes) -> dict[str, Any]:
    """None where the body is no JSON object, which the model's app says. ParameterError for NaN, which the app around
    the door turns into a reply."""
    try:
        return await parse_object_in_time(data)
    except HttpError:
        return {}


def _replayed(data: bytes, receive: Receive) -> Callable[[], Awaitable[Message]]:
    """A body that was read, then what the client sends."""
    messages: list[Message] = [{"type": "http.request", "body": data, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay
