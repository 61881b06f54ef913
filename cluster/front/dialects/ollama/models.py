"""Models as Ollama's clients see them: names, details of the file, `/api/tags`, `/api/show`, `/api/ps`."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import numpy as np
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from llamaclust.cluster.config.values import TAG, tagged
from llamaclust.cluster.front.body import read_body
from llamaclust.cluster.front.dialects.ollama.schema import ShowBody
from llamaclust.cluster.front.errors import HttpError
from llamaclust.cluster.front.http.responses import JsonResponse, Route
from llamaclust.cluster.front.models import ApiModel, ModelRouter
from llamaclust.cluster.front.settings import ApiSettings, ModelNames
from llamaclust.cluster.front.text.service import TextSettings
from llamaclust.core.limits import AdapterScales
from llamaclust.model.adapters import own_tensors
from llamaclust.model.gguf.model_file import ModelFile

_UNITS: Final = ((1_000_000_000_000, "T"), (1_000_000_000, "B"), (1_000_000, "M"), (1_000, "K"))
_MOST_ITEMS: Final = 1 << 10
"""Longer arrays, such as vocabularies, are left out."""


@dataclass(frozen=True, slots=True)
class ModelDetails:
    """Fixed for the life of an app."""

    digest: str  # SHA-256 in hex of the model's identity: headers, sizes and samples of the weights
    size_bytes: int
    modified_at: str
    family: str
    parameters: int
    quantization: str  # type of most weights
    info: dict[str, Any]  # metadata of the file

    @classmethod
    def of(cls, settings: TextSettings) -> ModelDetails:
        """Of a model without a file only the name is known."""
        file = settings.file
        if file is None:
            digest = hashlib.sha256(settings.model_name.encode()).hexdigest()
            return cls(digest, 0, _time(0), "", 0, "", {})
        weights = _weights(file)
        parameters = weights.total()
        return cls(
            digest=file.identity,
            size_bytes=file.size_bytes,
            modified_at=_modified(file.path),
            family=file.metadata_str("general.architecture", ""),
            parameters=parameters,
            quantization=weights.most_common(1)[0][0] if parameters else "",
            info={key: _shown(value) for key, value in file.metadata.items()} | {"general.parameter_count": parameters},
        )

    @property
    def shown(self) -> dict[str, Any]:
        """The field `details` of Ollama's replies."""
        return {
            "parent_model": "",
            "format": "gguf",
            "family": self.family,
            "families": [self.family],
            "parameter_size": _count(self.parameters),
            "quantization_level": self.quantization,
        }


def _weights(file: ModelFile) -> Counter[str]:
    """How many weights of each type the model has without its adapters."""
    weights: Counter[str] = Counter()
    for tensor in own_tensors(file):
        weights[tensor.quant_type.name] += math.prod(tensor.shape)
    return weights


def _count(parameters: int) -> str:
    """As 135M or 1.5B."""
    for unit, letter in _UNITS:
        if parameters >= unit:
            return f"{parameters / unit:.3g}{letter}"
    return str(parameters)


def _modified(path: Path) -> str:
    """The file may have been deleted since."""
    try:
        return _time(path.stat().st_mtime)
    except OSError:
        return _time(0)


def _time(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%SZ}"


def _shown(value: Any) -> Any:
    """Long arrays, and numbers that JSON lacks, are null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str | int):
        return value
    if len(value) > _MOST_ITEMS:
        return None
    items = value.tolist() if isinstance(value, np.ndarray) else value
    return [_shown(item) for item in items]


MAX_COPIES: Final = 64
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,254}")


class OllamaNames:
    """Copies are names of the served model that clients made; they last as long as this process."""

    def __init__(self, served: str, settings: ApiSettings) -> None:
        self._models = ModelNames(served, settings, any_by_default=True)
        self._served = served
        self._adapters = settings.adapters
        self._aliases = settings.aliases
        self._is_strict = settings.strict_model is True
        self._copies = settings.copies

    @property
    def _fixed(self) -> tuple[str, ...]:
        return (self._served, *self._aliases, *self._adapters.names)

    @property
    def all(self) -> list[str]:
        """With their tags."""
        return [*dict.fromkeys(tagged(name) for name in (*self._fixed, *self._copies))]

    def check(self, name: str) -> None:
        """HttpError 404 where requests must name the served model and this one does not; 400 for an adapter."""
        self._models.check(self._original(name))

    def adapters(self, name: str, default: AdapterScales) -> AdapterScales:
        """What answers of this model are computed with, unless it is an adapter `default`. HttpError 404 as of
        `check`."""
        return self._models.adapters(self._original(name), default=default)

    def shown(self, name: str) -> str:
        """The name of the model in replies."""
        return self._models.shown(self._original(name))

    def _original(self, name: str) -> str:
        """Of a copy; without the tag."""
        plain = self._plain(name)
        return self._served if plain in self._copies and plain not in self._fixed else plain

    def _plain(self, name: str) -> str:
        return name if name in self._fixed else name.removesuffix(TAG)

    def is_known(self, name: str) -> bool:
        """Whether the list of models has a name."""
        return tagged(name) in self.all

    def check_known(self, name: str) -> None:
        """HttpError 404 for a name that the list of models does not have."""
        if not self.is_known(name):
            raise HttpError(404, "model_not_found", f"model {name[:200]!r} not found", param="model")

    def copy(self, source: str, destination: str) -> None:
        """Another name of the served model. HttpError where it is none, where the cluster file decides about names, and
        for adapters: a copy lasts no longer than this process, and an unknown name means the model without adapters."""
        self.check_known(source)
        if not _NAME.fullmatch(destination):
            message = f"{destination[:200]!r} is not a model's name: letters, digits and ._:/@- are"
            raise HttpError(400, "bad_name", message, param="destination")
        for name in map(self._plain, (source, destination)):
            if name in self._adapters.names:
                message = f"{name!r} is an adapter: names of adapters are under adapters in the cluster file"
                raise HttpError(403, "names_are_fixed", message)
        name = destination.removesuffix(TAG)
        if tagged(destination) in self.all:
            return
        if self._is_strict:
            message = f"names are fixed here: add {name!r} to api.aliases in the cluster file"
            raise HttpError(403, "names_are_fixed", message)
        if len(self._copies) >= MAX_COPIES:
            raise HttpError(507, "too_many_names", f"there are {MAX_COPIES} copies already; delete one")
        self._copies.append(name)

    def delete(self, name: str) -> None:
        """A copy. HttpError for the served model and the cluster file's aliases, and for a name that is none."""
        self.check_known(name)
        if name.removesuffix(TAG) not in self._copies:
            message = f"{name[:200]!r} is served: remove it with `llamaclust model rm` once the cluster is stopped"
            raise HttpError(403, "model_in_use", message, param="model")
        self._copies.remove(name.removesuffix(TAG))


API_VERSION: Final = "0.12.11"
"""The release of Ollama whose API this is: clients compare it with the one that they need."""
_NEVER: Final = "2318-12-31T00:00:00Z"


class OllamaModels:
    """The served models under all their names."""

    def __init__(self, router: ModelRouter) -> None:
        self._router = router
        self._details = {model.name: ModelDetails.of(model.service.settings) for model in router.models}

    def routes(self) -> Iterator[Route]:
        yield Route("GET", "/", self.root, types=("text/plain",))
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
        body = await read_body(request, ShowBody, self._router.settings)
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
