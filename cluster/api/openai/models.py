"""`GET /v1/models`: the one model that is served."""

from __future__ import annotations

import time
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from llamaclust.cluster.api.errors import HttpError, JsonResponse
from llamaclust.cluster.api.settings import ApiSettings
from llamaclust.cluster.text.service import TextService


class ModelNames:
    """Which models requests may name."""

    def __init__(self, served: str, settings: ApiSettings, *, any_by_default: bool = False) -> None:
        """`any_by_default`: unless the settings say otherwise, a request may name any model."""
        self._served = served
        self._names = {served, *settings.aliases}
        self._takes_any = any_by_default if settings.strict_model is None else not settings.strict_model

    def check(self, name: str | None) -> None:
        """Another model's name is refused, lest its answers seem to be this model's. HttpError 404."""
        if name is not None and name not in self._names and not self._takes_any:
            message = f"model: {name[:200]!r} is not served here, {self._served!r} is"
            raise HttpError(404, "model_not_found", message, param="model")


class ModelsEndpoint:
    """What is served."""

    def __init__(self, service: TextService, settings: ApiSettings) -> None:
        self._service = service
        self._names = ModelNames(service.settings.model_name, settings)
        self._shown = {"aliases": settings.aliases, "tags": settings.tags}
        self._created = int(time.time())

    async def list(self, request: Request) -> Response:
        return JsonResponse({"object": "list", "data": [self._entry()]})

    async def retrieve(self, request: Request) -> Response:
        self._names.check(request.path_params["model"])
        return JsonResponse(self._entry())

    def _entry(self) -> dict[str, Any]:
        settings = self._service.settings
        return {
            "id": settings.model_name,
            "object": "model",
            **self._shown,
            "created": self._created,
            "owned_by": "llamaclust",
            "max_model_len": settings.context_length,
        }
