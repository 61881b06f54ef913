"""Endpoints that list, load and unload models. List entries have OpenAI's fields and some of vLLM's and llama.cpp's."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from llamaclust.cluster.front.body import parse_object_in_time, read_bytes
from llamaclust.cluster.front.errors import HttpError
from llamaclust.cluster.front.http.responses import JsonResponse, Route, unsupported
from llamaclust.cluster.front.models import ApiModel, ModelRouter
from llamaclust.cluster.front.shared_fields import chat_sampling
from llamaclust.cluster.state.adapters import ServedAdapter
from llamaclust.core.errors import ParameterError
from llamaclust.wire.rpc.deadlines import deadline

_ONE_MODEL: Final = "the only served model stays loaded; list several as `models` in the cluster file"
_UNLOAD_S: Final = 60.0
"""Timeout, in seconds, to unload a model that is still being loaded. The load is not cancelled."""


class ModelEndpoints:
    def __init__(self, router: ModelRouter) -> None:
        self._router = router
        self._can_unload = router.settings.can_unload
        self._created = int(time.time())

    def routes(self) -> Iterator[Route]:
        yield Route("GET", "/v1/models", self.list)
        yield Route("GET", "/v1/models/{model:path}", self.retrieve)
        for endpoint in (self.load, self.unload):
            served = endpoint if self._can_unload else unsupported(_ONE_MODEL)
            yield Route("POST", f"/v1/models/{endpoint.__name__}", served)

    async def list(self, request: Request) -> Response:
        models = self._router.models
        entries = [self._entry(model, adapter) for model in models for adapter in (None, *model.settings.adapters)]
        return JsonResponse({"object": "list", "data": entries, "models": [*map(_capabilities, models)]})

    async def retrieve(self, request: Request) -> Response:
        name = request.path_params["model"]
        model = self._router.named(name)
        own = model.names.shown(name)
        adapter = next((adapter for adapter in model.settings.adapters if adapter.name == own), None)
        if adapter is None:
            model.names.check(name)
        return JsonResponse(self._entry(model, adapter))

    async def load(self, request: Request) -> Response:
        """Starts to load a model if memory is free or other models can be unloaded. Replies at once."""
        (await self._named(request)).lifecycle.load()
        return JsonResponse({"success": True})

    async def unload(self, request: Request) -> Response:
        """Unloads a model. Replies with status 409 if the model has requests."""
        model = await self._named(request)
        async with deadline(f"unloading {model.name!r}, which is still being loaded,", _UNLOAD_S):
            await model.lifecycle.sleep()
        if not model.lifecycle.is_asleep:
            message = f"model: {model.name!r} has requests and stays loaded; try again after their replies"
            raise HttpError(409, "model_in_use", message, param="model")
        return JsonResponse({"success": True})

    async def _named(self, request: Request) -> ApiModel:
        name = (await parse_object_in_time(await read_bytes(request, self._router.settings))).get("model")
        if not isinstance(name, str):
            raise ParameterError("model", "is missing" if name is None else "must be a string")
        return self._router.named(name)

    def _entry(self, model: ApiModel, adapter: ServedAdapter | None) -> dict[str, Any]:
        settings = model.settings
        entry = {
            "id": model.name,
            "object": "model",
            "aliases": settings.aliases,
            "tags": settings.tags,
            "created": self._created,
            "owned_by": "llamaclust",
            "max_model_len": model.service.settings.context_length,
            "context": model.service.settings.context.text,
            "chat_sampling": chat_sampling(settings.recommended, settings.defaults),
        }
        if model.service.vision is not None:
            entry |= {"capabilities": {"vision": True}, "max_request_bytes": settings.max_body_bytes}
        if adapter is not None:
            entry |= {"id": adapter.name, "aliases": (), "parent": model.name, "root": Path(adapter.path).name}
        return {**entry, "status": {"value": _status(model)}} if self._can_unload else entry


def _capabilities(model: ApiModel) -> dict[str, Any]:
    """Returns a model's entry in llama.cpp's format. The entry shows what the model can be asked for."""
    service = model.service
    known = {
        "completion": service.settings.generates,
        "embedding": service.settings.ranking is None and not service.settings.generates,
        "rerank": service.settings.ranking is not None,
        "multimodal": service.vision is not None,
    }
    capabilities = [name for name, is_there in known.items() if is_there]
    return {"name": model.name, "model": model.name, "type": "model", "capabilities": capabilities}


def _status(model: ApiModel) -> str:
    if model.lifecycle.is_asleep:
        return "unloaded"
    return "loading" if model.lifecycle.is_loading else "loaded"
