"""`GET /v1/models`: the one model that is served."""

from __future__ import annotations

import time
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from llamaclust.cluster.api.errors import HttpError, JsonResponse
from llamaclust.cluster.text.service import TextService


def check_model(name: str | None, service: TextService) -> None:
    """Another model's name is refused, lest its answers seem to be this model's. HttpError 404."""
    served = service.settings.model_name
    if name is not None and name != served:
        message = f"model: {name[:200]!r} is not served here, {served!r} is"
        raise HttpError(404, "model_not_found", message, param="model")


class ModelsEndpoint:
    """What is served."""

    def __init__(self, service: TextService) -> None:
        self._service = service
        self._created = int(time.time())

    async def list(self, request: Request) -> Response:
        return JsonResponse({"object": "list", "data": [self._entry()]})

    async def retrieve(self, request: Request) -> Response:
        check_model(request.path_params["model"], self._service)
        return JsonResponse(self._entry())

    def _entry(self) -> dict[str, Any]:
        settings = self._service.settings
        return {
            "id": settings.model_name,
            "object": "model",
            "created": self._created,
            "owned_by": "llamaclust",
            "max_model_len": settings.context_length,
        }
