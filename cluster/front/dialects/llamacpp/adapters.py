"""`/lora-adapters`: adapters of LoRA, and their scales in requests that choose none."""

from __future__ import annotations

import logging
from typing import Annotated

from pydantic import BeforeValidator, RootModel, WithJsonSchema
from starlette.requests import Request
from starlette.responses import Response

from llamaclust.cluster.front.body import LARGE_BYTES, parse_json, read_bytes
from llamaclust.cluster.front.fields.adapters import SCALES_SCHEMA, AdapterFields, read_scales
from llamaclust.cluster.front.http.error_responses import JsonResponse
from llamaclust.cluster.front.http.security import require_first_key
from llamaclust.cluster.front.schema import read_fields
from llamaclust.cluster.front.settings import ApiSettings
from llamaclust.cluster.scheduler.validation import check_adapters
from llamaclust.core.limits import AdapterScales

_log = logging.getLogger(__name__)


class AllScales(RootModel[Annotated[AdapterScales, BeforeValidator(read_scales), WithJsonSchema(SCALES_SCHEMA)]]):
    """The body of `POST /lora-adapters`."""


class AdapterList:
    """The adapters that are there, with the scales that they have in requests that choose none."""

    def __init__(self, settings: ApiSettings) -> None:
        self._settings = settings

    async def list(self, request: Request) -> Response:
        scales = dict(self._settings.adapters.default)
        return JsonResponse(
            [
                {"id": number, "name": adapter.name, "path": adapter.path, "scale": scales.get(number, 0.0)}
                for number, adapter in self._settings.adapters.numbered
            ]
        )

    async def set(self, request: Request) -> Response:
        """For requests that come from now on; adapters that are not listed get 0. Where there are keys, only the first
        one sets them, since they are of all clients."""
        require_first_key(request.headers, self._settings, "set the scales of adapters in requests that choose none")
        value = parse_json(await read_bytes(request, self._settings, LARGE_BYTES))
        scales = read_fields(AdapterFields, {"lora": {} if value is None else value}).lora or ()
        check_adapters(scales, self._settings.adapters.numbers)
        self._change(tuple((adapter, scale) for adapter, scale in scales if scale))
        return JsonResponse({"success": True})

    def _change(self, scales: AdapterScales) -> None:
        adapters = self._settings.adapters
        if scales == adapters.default:
            return
        adapters.default = scales
        shown = ", ".join(f"{number} {adapters[number].name!r}: {scale:g}" for number, scale in scales)
        _log.info("a client set the scales of adapters in requests that choose none: %s", shown or "all 0")
