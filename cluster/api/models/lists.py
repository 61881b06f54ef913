"""Endpoints over several models: what they are, whether they are loaded, their requests and metrics."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from itertools import chain
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from llamaclust.cluster.api.body import parse_object_in_time, read_bytes
from llamaclust.cluster.api.error_responses import JsonResponse
from llamaclust.cluster.api.errors import HttpError
from llamaclust.cluster.api.models.door import DoorModel, ModelDoor
from llamaclust.cluster.api.ollama.models import OllamaModels
from llamaclust.cluster.api.ollama.names import OllamaNames
from llamaclust.cluster.api.openai.models import ModelsEndpoint
from llamaclust.cluster.api.operations.properties import properties
from llamaclust.cluster.api.operations.readings import ReadModel, metrics_reply, requests_reply, waterfall_reply
from llamaclust.cluster.api.settings import ApiSettings
from llamaclust.wire.rpc.deadlines import deadline

_UNLOAD_S = 60.0
"""A reply waits so long for the end of a load, which is not cancelled."""


class ModelLists:
    """Endpoints over all models."""

    def __init__(self, models: Sequence[DoorModel], door: ModelDoor, settings: ApiSettings) -> None:
        self._models = models
        self._door = door
        self._settings = settings
        self._openai = {model.name: ModelsEndpoint(model.service, model.replies.settings) for model in models}
        self._started_s = int(time.time())
        self._ollama = {model.name: _ollama(model) for model in models}

    async def list(self, request: Request) -> Response:
        """All models with their adapters; `status` as llama.cpp's router has it."""
        shown = [_with_status(model, entry) for model in self._models for entry in self._openai[model.name].entries()]
        return JsonResponse({"object": "list", "data": shown})

    async def retrieve(self, request: Request) -> Response:
        """One of them."""
        name = request.path_params["model"]
        model = self._door.named(name)
        return JsonResponse(_with_status(model, self._openai[model.name].entry(name)))

    async def load(self, request: Request) -> Response:
        """Loads the named model, where memory is left or other models have no requests; answers at once."""
        (await self._named(request)).resident.load()
        return JsonResponse({"success": True})

    async def unload(self, request: Request) -> Response:
        """Unloads the named model; answers once it sleeps. HttpError 409 where it has requests; DeadlineError where a
        load takes long, after which it sleeps none the less."""
        model = await self._named(request)
        async with deadline(f"the end of a load of {model.name!r}, which is unloaded then", _UNLOAD_S):
            await model.resident.sleep()
        if not model.resident.is_asleep:
            message = f"model: {model.name!r} has requests and stays loaded; try again after their replies"
            raise HttpError(409, "model_in_use", message, param="model")
        return JsonResponse({"success": True})

    async def tags(self, request: Request) -> Response:
        """All models, once for each name."""
        entries = (self._ollama[model.name].tag_entries() for model in self._models)
        return JsonResponse({"models": [*chain.from_iterable(entries)]})

    async def ps(self, request: Request) -> Response:
        """The models that are loaded, and not about to sleep."""
        awake = (model for model in self._models if not (model.resident.is_asleep or model.resident.is_leaving))
        return JsonResponse({"models": [self._ollama[model.name].loaded_entry(_expiry(model)) for model in awake]})

    async def requests(self, request: Request) -> Response:
        """The open and the last requests of all models, or of `?model=`."""
        return requests_reply(self._read(request))

    async def waterfall(self, request: Request) -> Response:
        """Where the time of a request of any model went."""
        return waterfall_reply(self._read(request), request.path_params["request"])

    async def metrics(self, request: Request) -> Response:
        """Of all models, each as a label, or of `?model=`."""
        return metrics_reply(self._read(request), self._started_s)

    async def props(self, request: Request) -> Response:
        """Of the first model, or of `?model=`, and what llama.cpp's router says of itself."""
        model = self._door.named(request.query_params.get("model"))
        limit = self._settings.max_loaded_models or len(self._models)
        return JsonResponse(
            {
                **properties(model.service, self._settings.defaults),
                "role": "router",
                "max_instances": limit,
                "models_autoload": self._settings.load_on_demand,
                "is_sleeping": model.resident.is_asleep,
            }
        )

    def _read(self, request: Request) -> Sequence[ReadModel]:
        name = request.query_params.get("model")
        models = self._models if not name else [self._door.named(name)]
        return [ReadModel(model.name, model.engine, model.replies.settings.adapters) for model in models]

    async def _named(self, request: Request) -> DoorModel:
        fields = await parse_object_in_time(await read_bytes(request, self._settings))
        return self._door.named(fields.get("model"))


def _ollama(model: DoorModel) -> OllamaModels:
    settings = model.replies.settings
    return OllamaModels(model.service, settings, OllamaNames(model.name, settings))


def _with_status(model: DoorModel, entry: dict[str, Any]) -> dict[str, Any]:
    return {**entry, "status": {"value": _status(model)}}


def _status(model: DoorModel) -> str:
    if model.resident.is_asleep:
        return "unloaded"
    return "loading" if model.resident.is_loading else "loaded"


def _expiry(model: DoorModel) -> str | None:
    """None: at no time."""
    seconds = model.resident.expires_in_s
    if seconds is None:
        return None
    if not model.resident.is_idle:
        assert model.resident.keep_alive_s is not None
        seconds = model.resident.keep_alive_s
    return f"{datetime.now(UTC) + timedelta(seconds=seconds):%Y-%m-%dT%H:%M:%SZ}"
