"""Ollama's endpoints that say what is served: /, /api/version, /api/tags, /api/ps, /api/show."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from llamaclust.cluster.front.body import read_body
from llamaclust.cluster.front.dialects.ollama.bodies import SHOW, ShowBody
from llamaclust.cluster.front.dialects.ollama.details import ModelDetails
from llamaclust.cluster.front.dialects.ollama.names import OllamaNames
from llamaclust.cluster.front.http.error_responses import JsonResponse
from llamaclust.cluster.front.http.paths import Route
from llamaclust.cluster.front.models.router import ApiModel, ModelRouter

API_VERSION: Final = "0.12.11"
"""The release of Ollama whose API this is: clients compare it with the one that they need."""
_NEVER: Final = "2318-12-31T00:00:00Z"


class OllamaModels:
    """The served models under all their names."""

    def __init__(self, router: ModelRouter) -> None:
        self._router = router
        self._details = {model.name: ModelDetails.of(model.service.settings) for model in router.models}

    def routes(self) -> Iterator[Route]:
        yield Route("GET", "/", self.root)
        yield Route("GET", "/api/version", self.version)
        yield Route("GET", "/api/tags", self.tags)
        yield Route("GET", "/api/ps", self.ps)
        yield Route("POST", "/api/show", self.show, ShowBody)

    async def root(self, request: Request) -> Response:
        """Answers clients that look for a server."""
        return PlainTextResponse("Ollama is running")

    async def version(self, request: Request) -> Response:
        """The release of Ollama whose API this is."""
        return JsonResponse({"version": API_VERSION})

    async def tags(self, request: Request) -> Response:
        """The served models, once for each name."""
        entries = [
            self._entry(model, name) | {"modified_at": self._details[model.name].modified_at}
            for model in self._router.models
            for name in _names(model)
        ]
        return JsonResponse({"models": entries})

    async def ps(self, request: Request) -> Response:
        """The models that are loaded, and not about to be unloaded."""
        awake = (model for model in self._router.models if not (model.resident.is_asleep or model.resident.is_leaving))
        return JsonResponse({"models": [self._loaded_entry(model) for model in awake]})

    async def show(self, request: Request) -> Response:
        """A model's file and chat template."""
        body = await read_body(request, ShowBody, SHOW, self._router.settings)
        model = self._router.named(body.model)
        OllamaNames(model.name, model.settings).check_known(body.model)
        service, details = model.service, self._details[model.name]
        return JsonResponse(
            {
                "modelfile": f"FROM {model.name}\n",
                "parameters": f"num_ctx {service.settings.context_length}",
                "template": service.chat_template.source or "",
                "details": details.shown,
                "model_info": details.info,
                "capabilities": await _capabilities(model),
                "modified_at": details.modified_at,
            }
        )

    def _loaded_entry(self, model: ApiModel) -> dict[str, Any]:
        context = model.service.settings.context_length
        loaded = {"expires_at": _expiry(model), "size_vram": 0, "context_length": context}
        return self._entry(model, _names(model)[0]) | loaded

    def _entry(self, model: ApiModel, name: str) -> dict[str, Any]:
        details = self._details[model.name]
        return {
            "name": name,
            "model": name,
            "size": details.size_bytes,
            "digest": details.digest,
            "details": details.shown,
        }


def _names(model: ApiModel) -> list[str]:
    return OllamaNames(model.name, model.settings).all


def _expiry(model: ApiModel) -> str:
    """When the model is unloaded unless a request comes. While it has requests, counted from now."""
    seconds = model.resident.expires_in_s
    if seconds is None:
        return _NEVER
    if not model.resident.is_idle:
        assert model.resident.keep_alive_s is not None
        seconds = model.resident.keep_alive_s
    return f"{datetime.now(UTC) + timedelta(seconds=seconds):%Y-%m-%dT%H:%M:%SZ}"


async def _capabilities(model: ApiModel) -> list[str]:
    """The capabilities by Ollama's names. Every template takes tools: their definitions are written into the chat
    otherwise."""
    reasons = (await model.service.chat_format.get()).knows_reasoning
    fills_in = model.service.tokenizer.vocabulary.fill_in is not None
    thinking, insert = ["thinking"] if reasons else [], ["insert"] if fills_in else []
    return ["completion", "tools", "embedding", *thinking, *insert]
