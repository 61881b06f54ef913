"""Adapters of LoRA as llama.cpp's clients choose them: the field `lora` of requests, and `/lora-adapters`."""

from __future__ import annotations

import logging
from typing import Annotated, Any

from pydantic import BeforeValidator, RootModel, WithJsonSchema
from starlette.requests import Request
from starlette.responses import Response

from llamaclust.cluster.api.body import parse_json, read_bytes
from llamaclust.cluster.api.errors import JsonResponse
from llamaclust.cluster.api.replies.default_scales import DefaultScales
from llamaclust.cluster.api.schema import Body, read_fields
from llamaclust.cluster.api.security import require_first_key
from llamaclust.cluster.api.settings import ApiSettings
from llamaclust.cluster.scheduler.validation import check_adapters
from llamaclust.core.limits import MAX_ADAPTER_SCALE, MAX_ADAPTERS, AdapterScales

_log = logging.getLogger(__name__)


def _lora(value: Any) -> AdapterScales:
    """[{"id": number, "scale": scale}, ...], in ascending order."""
    if not isinstance(value, list) or len(value) > MAX_ADAPTERS:
        raise ValueError(f"must be a list of {MAX_ADAPTERS} objects with 'id' and 'scale' at most")
    scales = dict(map(_lora_entry, value))
    if len(scales) < len(value):
        raise ValueError("an adapter is listed twice")
    return tuple(sorted(scales.items()))


def _lora_entry(value: Any) -> tuple[int, float]:
    if not isinstance(value, dict) or value.keys() != {"id", "scale"}:
        raise ValueError("an adapter must be an object with 'id' and 'scale'")
    number, scale = value["id"], value["scale"]
    if type(number) is not int or number < 0:
        raise ValueError("an id must be a whole number, 0 or more")
    if type(scale) not in (int, float) or not -MAX_ADAPTER_SCALE <= scale <= MAX_ADAPTER_SCALE:
        raise ValueError(f"a scale must be a number within {-MAX_ADAPTER_SCALE:g}..{MAX_ADAPTER_SCALE:g}")
    return number, float(scale)


_LORA: dict[str, Any] = {
    "type": "array",
    "maxItems": MAX_ADAPTERS,
    "items": {
        "type": "object",
        "required": ["id", "scale"],
        "properties": {
            "id": {"type": "integer", "minimum": 0},
            "scale": {"type": "number", "minimum": -MAX_ADAPTER_SCALE, "maximum": MAX_ADAPTER_SCALE},
        },
        "additionalProperties": False,
    },
}


class AdapterFields(Body):
    """With which adapters an answer is computed."""

    lora: Annotated[AdapterScales | None, BeforeValidator(_lora), WithJsonSchema(_LORA)] = None
    """[{"id": number, "scale": scale}, ...]: adapters by their numbers in `/lora-adapters`, others are not used.
    Without it, their scales are those of `POST /lora-adapters`."""


class AllScales(RootModel[Annotated[AdapterScales, BeforeValidator(_lora), WithJsonSchema(_LORA)]]):
    """The body of `POST /lora-adapters`."""


class AdapterList:
    """The adapters that are there, with the scales that they have in requests that choose none."""

    def __init__(self, settings: ApiSettings, default: DefaultScales) -> None:
        self._settings = settings
        self._default = default

    async def list(self, request: Request) -> Response:
        scales = dict(self._default.scales)
        return JsonResponse(
            [
                {"id": number, "name": adapter.name, "path": adapter.path, "scale": scales.get(number, 0.0)}
                for number, adapter in enumerate(self._settings.adapters)
            ]
        )

    async def set(self, request: Request) -> Response:
        """For requests that come from now on; adapters that are not listed get 0. Where there are keys, only the first
        one sets them, since they are of all clients."""
        require_first_key(request.headers, self._settings, "set the scales of adapters in requests that choose none")
        value = parse_json(await read_bytes(request, self._settings))
        scales = read_fields(AdapterFields, {"lora": {} if value is None else value}).lora or ()
        check_adapters(scales, len(self._settings.adapters))
        self._change(tuple((adapter, scale) for adapter, scale in scales if scale))
        return JsonResponse({"success": True})

    def _change(self, scales: AdapterScales) -> None:
        if scales == self._default.scales:
            return
        self._default.scales = scales
        adapters = self._settings.adapters
        shown = ", ".join(f"{number} {adapters[number].name!r}: {scale:g}" for number, scale in scales)
        _log.info("a client set the scales of adapters in requests that choose none: %s", shown or "all 0")
