"""`/v1/load_lora_adapter` and `/v1/unload_lora_adapter`, as vLLM has them: adapters of LoRA come and go while the model
is served."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import Field
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from llamaclust.cluster.config.values import TAG
from llamaclust.cluster.front.body import read_body
from llamaclust.cluster.front.fields.model_name import ModelNames
from llamaclust.cluster.front.foreign_fields import OF_ADAPTERS
from llamaclust.cluster.front.http.error_responses import unsupported
from llamaclust.cluster.front.http.paths import Route
from llamaclust.cluster.front.http.security import require_first_key
from llamaclust.cluster.front.schema import Body
from llamaclust.cluster.front.settings import ApiSettings
from llamaclust.core.errors import ParameterError

_OFF = "no folder of adapters is set: name one as `api.adapter_folder` in the cluster file"
_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@-]{0,254}$")]


@dataclass(frozen=True, slots=True)
class AdapterControl:
    """Loads and unloads adapters of a model while it is served."""

    load: Callable[[str, str], Awaitable[None]]  # name and path
    unload: Callable[[str], Awaitable[None]]


class LoadAdapterBody(Body):
    """The body of `POST /v1/load_lora_adapter`."""

    lora_name: _Name
    """How requests name the adapter, as their model."""
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    """A GGUF file or a folder of PEFT in `api.adapter_folder`, relative to it or absolute."""
    model: str | None = None
    """The model that the adapter is for; of several, without it the first one."""


class UnloadAdapterBody(Body):
    """The body of `POST /v1/unload_lora_adapter`."""

    lora_name: Annotated[str, Field(min_length=1, max_length=255)]
    """Of an adapter that a client loaded."""
    model: str | None = None
    """The model that the adapter is of; of several, without it the first one."""


def adapter_routes(control: AdapterControl | None, served: str, settings: ApiSettings) -> Iterator[Route]:
    load = unload = unsupported(_OFF)
    if control is not None and settings.adapter_folder is not None:
        loading = AdapterLoading(control, served, settings)
        load, unload = loading.load, loading.unload
    yield Route("POST", "/v1/load_lora_adapter", load, LoadAdapterBody)
    yield Route("POST", "/v1/unload_lora_adapter", unload, UnloadAdapterBody)


class AdapterLoading:
    """For clients with the first key, if there are keys."""

    def __init__(self, control: AdapterControl, served: str, settings: ApiSettings) -> None:
        self._control = control
        self._models = ModelNames(served, replace(settings, strict_model=True))
        self._settings = settings

    async def load(self, request: Request) -> Response:
        """Answers when requests may use the adapter."""
        require_first_key(request.headers, self._settings, "load adapters")
        body = await read_body(request, LoadAdapterBody, OF_ADAPTERS, self._settings)
        self._models.check(body.model)
        if body.lora_name.removesuffix(TAG) in self._settings.copies:
            raise ParameterError("lora_name", f"{body.lora_name!r} is a copy of the model: delete it first")
        await self._control.load(body.lora_name, body.lora_path)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    async def unload(self, request: Request) -> Response:
        """Answers when the model is served without the adapter."""
        require_first_key(request.headers, self._settings, "unload adapters")
        body = await read_body(request, UnloadAdapterBody, OF_ADAPTERS, self._settings)
        self._models.check(body.model)
        await self._control.unload(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")
