"""`GET /v1/models`: the one model that is served, and its adapters."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from llamaclust.cluster.api.error_responses import JsonResponse
from llamaclust.cluster.api.fields.chat_sampling import chat_sampling
from llamaclust.cluster.api.fields.model_name import ModelNames
from llamaclust.cluster.api.settings import ApiSettings
from llamaclust.cluster.state.adapters import ServedAdapter
from llamaclust.cluster.text.service import TextService


class ModelsEndpoint:
    """What is served."""

    def __init__(self, service: TextService, settings: ApiSettings) -> None:
        self._service = service
        self._names = ModelNames(service.settings.model_name, settings)
        self._shown = {"aliases": settings.aliases, "tags": settings.tags}
        self._adapters = settings.adapters
        self._chat_sampling = chat_sampling(settings.recommended, settings.defaults)
        self._created = int(time.time())

    async def list(self, request: Request) -> Response:
        return JsonResponse({"object": "list", "data": self.entries()})

    async def retrieve(self, request: Request) -> Response:
        name = request.path_params["model"]
        if name not in self._adapters.names:
            self._names.check(name)
        return JsonResponse(self.entry(name))

    def entries(self) -> Sequence[dict[str, Any]]:
        """The model and its adapters."""
        return [self._entry(), *map(self._adapter_entry, self._adapters)]

    def entry(self, name: str) -> dict[str, Any]:
        """An adapter of this name, else the model."""
        number = self._adapters.number_of(name)
        return self._entry() if number is None else self._adapter_entry(self._adapters[number])

    def _adapter_entry(self, adapter: ServedAdapter) -> dict[str, Any]:
        """As vLLM shows it."""
        parent = self._service.settings.model_name
        return {**self._entry(), "id": adapter.name, "aliases": (), "parent": parent, "root": adapter.path}

    def _entry(self) -> dict[str, Any]:
        """The model under its own name."""
        settings = self._service.settings
        return {
            "id": settings.model_name,
            "object": "model",
            **self._shown,
            "created": self._created,
            "owned_by": "llamaclust",
            "max_model_len": settings.context_length,
            "chat_sampling": self._chat_sampling,
        }
