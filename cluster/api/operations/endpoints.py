"""Endpoints for operators and tools: /health, /live, /metrics, /cluster, /cluster/requests, /props, /slots,
/cluster/workers/NAME/..."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from llamaclust.cluster.api.error_responses import JsonResponse
from llamaclust.cluster.api.errors import HttpError
from llamaclust.cluster.api.operations.controls import DrainControl
from llamaclust.cluster.api.operations.properties import properties
from llamaclust.cluster.api.operations.readings import ReadModel, metrics_reply, requests_reply, waterfall_reply
from llamaclust.cluster.api.settings import ApiSettings
from llamaclust.cluster.engine.engine import Engine, EngineState
from llamaclust.cluster.text.service import TextService
from llamaclust.wire.rpc.deadlines import deadline

_DRAIN_S = 600.0
"""Layers are loaded elsewhere meanwhile; a repeated request waits on."""


async def disabled(request: Request) -> Response:
    """In place of an endpoint that the cluster file switches off."""
    raise HttpError(501, "disabled", f"{request.url.path}: is switched off by `api.disabled` in the cluster file")


async def no_proxy(request: Request) -> Response:
    """In place of llama.cpp's proxy for web pages."""
    raise HttpError(403, "forbidden", "/cors-proxy: this server fetches no URLs for its clients")


class Workers:
    """Takes layers away from workers, and gives them back: `POST /cluster/workers/NAME/drain` and `.../undrain`. Tells
    the last lines of their logs: `GET /cluster/workers/NAME/log`."""

    def __init__(self, pool: DrainControl) -> None:
        self._pool = pool

    async def drain(self, request: Request) -> Response:
        """Answers once the worker holds no layers; a client that disconnects does not cancel it."""
        name = request.path_params["worker"]
        async with deadline(f"moving the layers of worker {name} to others", _DRAIN_S):
            await self._pool.drain(name)
        return JsonResponse({"worker": name, "drained": True})

    async def undrain(self, request: Request) -> Response:
        """Answers at once; layers come back when that is worth it."""
        name = request.path_params["worker"]
        self._pool.undrain(name)
        return JsonResponse({"worker": name, "drained": False})

    async def log(self, request: Request) -> Response:
        """As many lines as the worker keeps; `before` says how many its process wrote before them."""
        name = request.path_params["worker"]
        tail = await self._pool.log(name)
        return JsonResponse({"worker": name, "before": tail.before, "lines": tail.lines})


class Operations:
    """Reads only."""

    def __init__(
        self,
        service: TextService,
        engine: Engine,
        cluster_status: Callable[[], Mapping[str, Any]],
        settings: ApiSettings,
    ) -> None:
        self._service = service
        self._defaults = settings.defaults
        self._engine = engine
        self._models = [ReadModel(service.settings.model_name, engine, settings.adapters)]
        self._cluster_status = cluster_status
        self._started_s = int(time.time())

    async def health(self, request: Request) -> Response:
        """200 while requests are taken, even if they have to wait; else 503, and why not for those with a key."""
        state = self._engine.state
        if state in (EngineState.READY, EngineState.ASLEEP):
            return JsonResponse({"status": "ok"})
        reason = self._reason(request)
        if state is EngineState.RECOVERING:
            return JsonResponse({"status": state.value, "reason": reason})
        raise HttpError(503, f"cluster_{state}", reason, {"Retry-After": "5"})

    async def live(self, request: Request) -> Response:
        """200 unless only a restart helps: a liveness probe."""
        if self._engine.state is not EngineState.DOWN:
            return JsonResponse({"status": "ok"})
        raise HttpError(503, "cluster_down", self._reason(request))

    def _reason(self, request: Request) -> str:
        """Names workers, hosts and layers: without a key, the state alone."""
        error = self._engine.error if request.state.is_trusted else None
        return str(error or f"the cluster is {self._engine.state}")

    async def metrics(self, request: Request) -> Response:
        """Prometheus: this program's metrics, and those that have names in llama.cpp."""
        return metrics_reply(self._models, self._started_s)

    async def cluster(self, request: Request) -> Response:
        return JsonResponse(self._cluster_status())

    async def requests(self, request: Request) -> Response:
        """The requests that are open, and the last ones that ended, the oldest first."""
        return requests_reply(self._models)

    async def waterfall(self, request: Request) -> Response:
        """Where the time of a request went: each of its sequences, without any of its text."""
        return waterfall_reply(self._models, request.path_params["request"])

    async def props(self, request: Request) -> Response:
        return JsonResponse(properties(self._service, self._defaults))

    async def slots(self, request: Request) -> Response:
        """The sequences that can run together; the first ones are those that do."""
        settings, running = self._service.settings, self._engine.counts.running
        slots = [
            {
                "id": slot,
                "n_ctx": settings.context_length,
                "speculative": settings.max_drafted > 0,
                "is_processing": slot < running,
            }
            for slot in range(settings.max_sequences)
        ]
        return JsonResponse(slots)
