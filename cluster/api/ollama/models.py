"""Ollama's endpoints that say what is served: /, /api/version, /api/tags, /api/ps, /api/show."""

from __future__ import annotations

from typing import Any, Final

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from llamaclust.cluster.api.body import read_body
from llamaclust.cluster.api.error_responses import JsonResponse
from llamaclust.cluster.api.ollama.bodies import SHOW, ShowBody
from llamaclust.cluster.api.ollama.details import ModelDetails
from llamaclust.cluster.api.ollama.names import OllamaNames
from llamaclust.cluster.api.settings import ApiSettings
from llamaclust.cluster.text.service import TextService

API_VERSION: Final = "0.12.11"
"""The release of Ollama whose API this is: clients compare it with the one that they need."""
_NEVER: Final = "2318-12-31T00:00:00Z"


class OllamaModels:
    """One served model under all its names."""

    def __init__(self, service: TextService, settings: ApiSettings, names: OllamaNames) -> None:
        self._service = service
        self._settings = settings
        self._names = names
        self._details = ModelDetails.of(service.settings)

    async def root(self, request: Request) -> Response:
        """What clients look for to find a server."""
        return PlainTextResponse("Ollama is running")

    async def version(self, request: Request) -> Response:
        """The release of Ollama whose API this is."""
        return JsonResponse({"version": API_VERSION})

    async def tags(self, request: Request) -> Response:
        """The served model, once for each name."""
        return JsonResponse({"models": self.tag_entries()})

    def tag_entries(self) -> list[dict[str, Any]]:
        """One for each name."""
        modified = {"modified_at": self._details.modified_at}
        return [self._entry(name) | modified for name in self._names.all]

    async def ps(self, request: Request) -> Response:
        """The served model, which stays in memory."""
        return JsonResponse({"models": [self.loaded_entry()]})

    def loaded_entry(self, expires_at: str | None = None) -> dict[str, Any]:
        """Of a loaded model; without a time when it is unloaded, it stays."""
        context = self._service.settings.context_length
        loaded = {"expires_at": expires_at or _NEVER, "size_vram": 0, "context_length": context}
        return self._entry(self._names.all[0]) | loaded

    async def show(self, request: Request) -> Response:
        """The served model's file and chat template."""
        body = await read_body(request, ShowBody, SHOW, self._settings)
        self._names.check_known(body.model)
        details = self._details
        return JsonResponse(
            {
                "modelfile": f"FROM {self._service.settings.model_name}\n",
                "parameters": f"num_ctx {self._service.settings.context_length}",
                "template": self._service.chat_template.source or "",
                "details": details.shown,
                "model_info": details.info,
                "capabilities": await self._capabilities(),
                "modified_at": details.modified_at,
            }
        )

    async def _capabilities(self) -> list[str]:
        """By Ollama's names. Every template takes tools: their definitions are written into the chat otherwise."""
        reasons = (await self._service.chat_format.get()).knows_reasoning
        fills_in = self._service.tokenizer.vocabulary.fill_in is not None
        return [
            "completion",
            "tools",
            "embedding",
            *(["thinking"] if reasons else []),
            *(["insert"] if fills_in else []),
        ]

    def _entry(self, name: str) -> dict[str, Any]:
        details = self._details
        return {
            "name": name,
            "model": name,
            "size": details.size_bytes,
            "digest": details.digest,
            "details": details.shown,
        }
