"""Ollama's endpoints that list and describe models, add names for models, and download models."""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from llamaclust.cluster.config.values import tagged
from llamaclust.cluster.front.body import read_body
from llamaclust.cluster.front.dialects.ollama.pulls import CatalogPulls
from llamaclust.cluster.front.dialects.ollama.schema import CopyBody, CreateBody, DeleteBody, PullBody, ShowBody
from llamaclust.cluster.front.errors import HttpError
from llamaclust.cluster.front.http.responses import JsonResponse, Route, unsupported
from llamaclust.cluster.front.http.sse import EventResponse, StreamFormat, unless_disconnected
from llamaclust.cluster.front.json_text import to_json
from llamaclust.cluster.front.models import ApiModel, ModelRouter
from llamaclust.cluster.front.text.text_settings import TextSettings

API_VERSION: Final = "0.22.0"
"""The first version of Ollama with all that this server serves of its API. Clients require a minimum version."""
_NEVER: Final = "2318-12-31T00:00:00Z"
_UNITS: Final = ((1_000_000_000_000, "T"), (1_000_000_000, "B"), (1_000_000, "M"), (1_000, "K"))
_MOST_ITEMS: Final = 1 << 10
"""The maximum length of metadata arrays in replies. Longer arrays, such as vocabularies, become null."""


def shown_time(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%SZ}"


@dataclass(frozen=True, slots=True)
class ModelDetails:
    """Details of a model for Ollama's replies. They are read from the model's file, once per process."""

    listed: dict[str, Any]  # The model's entry in lists of models, without the model's names.
    info: dict[str, Any]  # The file's metadata. Arrays above `_MOST_ITEMS` items are None.
    modified_at: str

    @classmethod
    def of(cls, settings: TextSettings) -> ModelDetails:
        file = settings.file
        if file is None:
            return cls(_listed(hashlib.sha256(settings.model_name.encode()).hexdigest()), {}, shown_time(0))
        weights = Counter[str]()  # Number of weights by quant type.
        for tensor in file.tensors.values():
            weights[tensor.quant_type.name] += math.prod(tensor.shape)
        parameters, family = weights.total(), file.metadata_str("general.architecture", "")
        quantization = weights.most_common(1)[0][0] if parameters else ""
        info = {key: _shown(value) for key, value in file.metadata.items()} | {"general.parameter_count": parameters}
        listed = _listed(file.identity, file.size_bytes, family, parameters, quantization)
        return cls(listed, info, _modified(file.path))


def _listed(
    digest: str, size_bytes: int = 0, family: str = "", parameters: int = 0, quantization: str = ""
) -> dict[str, Any]:
    unit, letter = next((unit for unit in _UNITS if parameters >= unit[0]), (1, ""))
    return {
        "size": size_bytes,
        "digest": digest,
        "details": {
            "parent_model": "",
            "format": "gguf",
            "family": family,
            "families": [family],
            "parameter_size": f"{parameters / unit:.3g}{letter}",
            "quantization_level": quantization,
        },
    }


def _modified(path: Path) -> str:
    try:
        return shown_time(path.stat().st_mtime)
    except OSError:
        return shown_time(0)


def _shown(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str | int):
        return value
    if len(value) > _MOST_ITEMS:
        return None
    return [_shown(item) for item in (value.tolist() if isinstance(value, np.ndarray) else value)]


class OllamaModels:
    def __init__(self, router: ModelRouter) -> None:
        self._router = router
        self._details = {model.name: ModelDetails.of(model.service.settings) for model in router.models}

    def routes(self) -> Iterator[Route]:
        yield Route("GET", "/", self.root, types=("text/plain",))
        for endpoint in (self.version, self.tags, self.ps):
            yield Route("GET", f"/api/{endpoint.__name__}", endpoint)
        yield Route("POST", "/api/show", self.show, ShowBody)

    async def root(self, request: Request) -> Response:
        """Tells Ollama's clients that the server is running."""
        return PlainTextResponse("Ollama is running")

    async def version(self, request: Request) -> Response:
        """Returns the version of Ollama whose API this server implements."""
        return JsonResponse({"version": API_VERSION})

    async def tags(self, request: Request) -> Response:
        """Lists the served models. A model has one entry for each of its names."""
        entries = [
            self._entry(model, name) | {"modified_at": self._details[model.name].modified_at}
            for model in self._router.models
            for name in _names(model)
        ]
        return JsonResponse({"models": entries})

    async def ps(self, request: Request) -> Response:
        """Lists the loaded models. Models that are about to be unloaded are omitted."""
        entries = [
            self._entry(model, _names(model)[0])
            | {
                "expires_at": _expiry(model),
                "size_vram": 0,
                "context_length": model.service.settings.context_length,
            }
            for model in self._router.models
            if not (model.lifecycle.is_asleep or model.lifecycle.is_leaving)
        ]
        return JsonResponse({"models": entries})

    async def show(self, request: Request) -> Response:
        """Returns a model's metadata, details, capabilities and chat template."""
        body = await read_body(request, ShowBody, self._router.settings)
        model = self._router.named(body.model)
        model.names.check_known(body.model)
        service, details = model.service, self._details[model.name]
        return JsonResponse(
            {
                "modelfile": f"FROM {model.name}\n",
                "parameters": f"num_ctx {service.settings.context_length}",
                "template": service.chat_template.source or "",
                "details": details.listed["details"],
                "model_info": details.info,
                "capabilities": await _capabilities(model),
                "modified_at": details.modified_at,
            }
        )

    def _entry(self, model: ApiModel, name: str) -> dict[str, Any]:
        return {"name": name, "model": name, **self._details[model.name].listed}


def _names(model: ApiModel) -> list[str]:
    return [*dict.fromkeys(map(tagged, model.names.all))]


def _expiry(model: ApiModel) -> str:
    """Returns the time when the model will be unloaded. For a busy model, assumes that its requests end now."""
    lifecycle = model.lifecycle
    if lifecycle.expires_in_s is None:
        return _NEVER
    seconds = lifecycle.expires_in_s if lifecycle.is_idle else lifecycle.keep_alive_s
    assert seconds is not None
    return shown_time(time.time() + seconds)


async def _capabilities(model: ApiModel) -> list[str]:
    """Returns Ollama's names for the model's capabilities."""
    service, generates = model.service, model.service.settings.generates
    known = {
        "completion": generates,
        "tools": generates,
        "embedding": service.settings.ranking is None,
        "vision": service.vision is not None,
        "thinking": generates and (await service.chat_format.get()).knows_reasoning,
        "insert": generates and service.tokenizer.vocabulary.fill_in is not None,
    }
    return [name for name, is_there in known.items() if is_there]


class OllamaManaging:
    def __init__(self, router: ModelRouter) -> None:
        self._router = router
        self._pulls = CatalogPulls(router.settings)

    def routes(self) -> Iterator[Route]:
        yield Route("POST", "/api/pull", self.pull, PullBody, form=StreamFormat.LINES.value)
        yield Route("POST", "/api/create", self.create, CreateBody, form=StreamFormat.LINES.value)
        yield Route("POST", "/api/copy", self.copy, CopyBody, types=())
        yield Route("DELETE", "/api/delete", self.delete, DeleteBody, types=())
        yield Route("GET", "/api/blobs/{digest}", self.blob)
        yield Route("POST", "/api/blobs/{digest}", unsupported("models are not made from uploaded files", 403))
        yield Route("POST", "/api/push", unsupported("models are not uploaded to registries", 403))

    async def pull(self, request: Request) -> Response:
        """Downloads a model of the catalog, if the cluster file allows it. Does nothing if the model is served."""
        body = await read_body(request, PullBody, self._router.settings)
        if self._router.find(body.model) is not None:
            return _done("pulling manifest", is_streamed=body.stream)
        steps = self._pulls.progress(self._pulls.wanted(request, body.model))
        async with AsyncExitStack() as cleanup:
            cleanup.push_async_callback(steps.aclose)
            if not body.stream:
                return JsonResponse(await unless_disconnected(request, _last(steps)))
            # An error in the first step can still set the HTTP status.
            first = await unless_disconnected(request, anext(steps))
            pulling = cleanup.pop_all()
            return EventResponse(_lines(first, steps), lambda _: pulling.aclose(), StreamFormat.LINES)

    async def create(self, request: Request) -> Response:
        """Adds a name for a served model."""
        body = await read_body(request, CreateBody, self._router.settings)
        self._copy(body.source, body.model)
        return _done("using existing layer", is_streamed=body.stream)

    async def copy(self, request: Request) -> Response:
        """Adds a name for a served model."""
        body = await read_body(request, CopyBody, self._router.settings)
        self._copy(body.source, body.destination)
        return Response()

    def _copy(self, source: str, destination: str) -> None:
        model, other = self._router.named(source), self._router.find(destination)
        if other not in (model, None):
            message = f"{destination[:200]!r} names another model: choose another name, or delete the copy first"
            raise HttpError(403, "names_are_fixed", message, param="destination")
        model.names.copy(source, destination)

    async def delete(self, request: Request) -> Response:
        """Removes a name that `/api/copy` or `/api/create` added."""
        body = await read_body(request, DeleteBody, self._router.settings)
        self._router.named(body.model).names.delete(body.model)
        return Response()

    async def blob(self, request: Request) -> Response:
        """Always replies with 404, because the server stores no blobs."""
        raise HttpError(404, "not_found", f"blob {request.path_params['digest'][:100]!r} not found")


async def _lines(first: dict[str, Any], steps: AsyncGenerator[dict[str, Any], None]) -> AsyncGenerator[bytes, None]:
    yield _line(first)
    async for step in steps:
        yield _line(step)


def _line(value: dict[str, Any]) -> bytes:
    return StreamFormat.LINES.part(to_json(value))


async def _last(steps: AsyncGenerator[dict[str, Any], None]) -> dict[str, Any]:
    last: dict[str, Any] = {}
    async for step in steps:
        last = step
    return last


def _done(step: str, *, is_streamed: bool) -> Response:
    last = {"status": "success"}
    if not is_streamed:
        return JsonResponse(last)
    return Response(_line({"status": step}) + _line(last), media_type=StreamFormat.LINES.value)
