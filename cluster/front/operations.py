"""Endpoints for operators and tools: /health, /live, /metrics, /cluster/..., /props, /slots."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response

from llamaclust.cluster.engine.engine import EngineState
from llamaclust.cluster.engine.metrics import CONTENT_TYPE
from llamaclust.cluster.engine.model_metrics import render_all
from llamaclust.cluster.engine.waterfall_json import matching, summary_json, waterfall_json
from llamaclust.cluster.engine.waterfalls import RequestRecord
from llamaclust.cluster.front.dialects.llamacpp.endpoints import llamacpp_metrics, server_properties, slot_list
from llamaclust.cluster.front.errors import HttpError
from llamaclust.cluster.front.http.responses import JsonResponse, Route
from llamaclust.cluster.front.models import ApiModel, ModelRouter
from llamaclust.wire.rpc.deadlines import deadline

if TYPE_CHECKING:
    from llamaclust.cluster.control.pool.drain import WorkerOperations


_DRAIN_S = 600.0
"""Maximum seconds for other workers to load a drained worker's layers. Clients may then repeat the request."""
_MOST_SEQUENCES = 32
"""Maximum number of sequences to show for one request."""

_Record = tuple[ApiModel, RequestRecord]


async def disabled(request: Request) -> Response:
    """Refuses requests to an endpoint that `api.disabled` in the cluster file switches off."""
    raise HttpError(
        501, "disabled", f"{request.url.path}: the endpoint is switched off by `api.disabled` in the cluster file"
    )


async def no_proxy(request: Request) -> Response:
    """Refuses requests to llama.cpp's CORS proxy, which would send requests to other servers for clients."""
    raise HttpError(403, "forbidden", "/cors-proxy: this server is no proxy")


class Workers:
    def __init__(self, pool: WorkerOperations) -> None:
        self._pool = pool

    def routes(self) -> Iterator[Route]:
        for method, endpoint in (("POST", self.drain), ("POST", self.undrain), ("GET", self.log)):
            yield Route(method, f"/cluster/workers/{{worker}}/{endpoint.__name__}", endpoint)

    async def drain(self, request: Request) -> Response:
        """Drains a worker. Replies when the worker holds no layers. The drain continues if the client disconnects."""
        name = request.path_params["worker"]
        async with deadline(f"moving the layers of worker {name} to others", _DRAIN_S):
            await self._pool.drain(name)
        return JsonResponse({"worker": name, "drained": True})

    async def undrain(self, request: Request) -> Response:
        """Ends the drain of a worker, and replies at once. The planner may move layers to the worker later."""
        name = request.path_params["worker"]
        self._pool.undrain(name)
        return JsonResponse({"worker": name, "drained": False})

    async def log(self, request: Request) -> Response:
        name = request.path_params["worker"]
        tail = await self._pool.log(name)
        return JsonResponse({"worker": name, "before": tail.before, "lines": tail.lines})


class Operations:
    def __init__(self, router: ModelRouter) -> None:
        self._router = router
        self._started_s = int(time.time())

    def routes(self) -> Iterator[Route]:
        off = self._router.settings.disabled
        for endpoint in (self.health, self.live, self.metrics, self.cluster, self.props, self.slots):
            name = endpoint.__name__
            types = ("text/plain",) if name == "metrics" else None
            yield Route("GET", f"/{name}", disabled if name in off else endpoint, types=types)
        yield Route("GET", "/cluster/requests", self.requests)
        yield Route("GET", "/cluster/requests/{request}", self.waterfall)

    async def health(self, request: Request) -> Response:
        """Replies with status 200 if requests are accepted, even if they must wait. Otherwise replies with 503."""
        state = self._router.queried(request).engine.state
        if state in (EngineState.READY, EngineState.ASLEEP):
            return JsonResponse({"status": "ok"})
        reason = self._reason(request)
        if state is EngineState.RECOVERING:
            return JsonResponse({"status": state.value, "reason": reason})
        raise HttpError(503, f"cluster_{state}", reason, {"Retry-After": "5"})

    async def live(self, request: Request) -> Response:
        """Replies to a liveness probe with 200, or with 503 if only a restart of the coordinator helps."""
        if self._router.queried(request).engine.state is not EngineState.DOWN:
            return JsonResponse({"status": "ok"})
        raise HttpError(503, "cluster_down", self._reason(request))

    def _reason(self, request: Request) -> str:
        engine = self._router.queried(request).engine
        error = engine.error if request.state.is_trusted else None
        return str(error or f"the cluster is {engine.state}")

    async def metrics(self, request: Request) -> Response:
        """Returns metrics for Prometheus. Metrics that llama.cpp also has are repeated under llama.cpp's names."""
        engines = {model.name: model.engine for model in self._read(request)}
        metrics = {name: engine.metrics for name, engine in engines.items()}
        own = render_all(metrics) if len(metrics) > 1 else b"".join(each.render() for each in metrics.values())
        headers = {"Process-Start-Time-Unix": str(self._started_s)}
        return Response(own + llamacpp_metrics(engines), media_type=CONTENT_TYPE, headers=headers)

    async def cluster(self, request: Request) -> Response:
        return JsonResponse(self._router.queried(request).status())

    async def requests(self, request: Request) -> Response:
        """Returns the requests that ended most recently, oldest first, followed by the open requests."""
        return _listed(sorted(self._records(request), key=_order), summary_json)

    async def waterfall(self, request: Request) -> Response:
        """Returns the waterfall of a request. It shows how each sequence spent its time, and contains no text."""
        name, known = request.path_params["request"], self._records(request)
        found = [(model, record) for model, record in known if matching([record], name)]
        if not found:
            message = f"no request {name[:80]!r} is open or among the last {len(known)} requests"
            raise HttpError(404, "request_not_found", message)
        return _listed(found[-_MOST_SEQUENCES:], waterfall_json)

    async def props(self, request: Request) -> Response:
        return JsonResponse(server_properties(self._router.models, self._router.queried(request)))

    async def slots(self, request: Request) -> Response:
        """Returns the slots, running slots first. There is one slot for each sequence that can run concurrently."""
        return JsonResponse(slot_list(self._router.queried(request)))

    def _read(self, request: Request) -> Sequence[ApiModel]:
        return [self._router.queried(request)] if request.query_params.get("model") else self._router.models

    def _records(self, request: Request) -> list[_Record]:
        now_ns = time.monotonic_ns()
        return [(model, record) for model in self._read(request) for record in model.engine.waterfalls.records(now_ns)]


def _order(known: _Record) -> tuple[bool, float]:
    _, record = known
    is_open = record.end is None
    return is_open, 0.0 if is_open else record.waterfall.start_ns / 1e9 + record.seconds


def _listed(found: Iterable[_Record], show: Callable[[RequestRecord, Mapping[int, str]], dict[str, Any]]) -> Response:
    shown = (
        {"model": model.name, **show(record, model.settings.adapters.names_at(record.waterfall.start_ns))}
        for model, record in found
    )
    return JsonResponse({"requests": [*shown]})
