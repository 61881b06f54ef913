"""`GET /v1/models`: the one model that is served, and its adapters."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from llamaclust.cluster.api.error_responses import JsonResponse
from llamaclust.cluster.api.errors import HttpError
from llamaclust.cluster.api.fields.chat_sampling import chat_sampling
from llamaclust.cluster.api.settings import ApiSettings
from llamaclust.cluster.scheduler.validation import check_adapters
from llamaclust.cluster.state.adapters import ServedAdapter
from llamaclust.cluster.text.service import TextService
from llamaclust.core.errors import ParameterError
from llamaclust.core.limits import AdapterScales


class ModelNames:
    """Which models requests may name."""

    def __init__(self, served: str, settings: ApiSettings, *, any_by_default: bool = False) -> None:
        """`any_by_default`: unless the settings say otherwise, a request may name any model."""
        self._served = served
        self._names = {served, *settings.aliases}
        self._adapters = settings.adapters
        self._takes_any = any_by_default if settings.strict_model is None else not settings.strict_model

    def adapters(
        self, name: str | None, lora: AdapterScales | None = None, default: AdapterScales = ()
    ) -> AdapterScales:
        """What a request for a model is computed with: an adapter that it names as the model, those of its field
        `lora`, or `default`. HttpError 404 for another model's name; ParameterError for both of the former, and for an
        adapter that is none."""
        if (number := self._adapters.number_of(name)) is not None:
            if lora is not None:
                raise ParameterError("lora", f"model names the adapter {name!r} already: leave one of them out")
            scale = self._adapters[number].scale
            return ((number, scale),) if scale else ()
        self.check(name)
        if lora is None:
            return default
        check_adapters(lora, self._adapters.numbers)
        return tuple((adapter, scale) for adapter, scale in lora if scale)

    def shown(self, name: str | None) -> str:
        """The name of the model in replies."""
        return name if name is not None and name in self._adapters.names else self._served

    def check(self, name: str | None) -> None:
        """Another model's name is refused, lest its answers seem to be this model's, and an adapter's where none is
        taken. HttpError."""
        if name in self._adapters.names:
            message = f"model: {name!r} is an adapter; here only {self._served!r} itself is computed with"
            raise HttpError(400, "unsupported_parameter", message, param="model")
        if name is not None and name not in self._names and not self._takes_any:
            served = ", ".join(map(repr, (self._served, *self._adapters.names)))
            message = f"model: {name[:200]!r} is not served here, only {served}"
            raise HttpError(404, "model_not_found", message, param="model")


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
