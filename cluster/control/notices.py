"""What a cluster that is ready tells whoever watches it: workers that are lost or back, layers that move, requests
that hold up its end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from llamaclust.cluster.control.epochs import missing_layers
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.cluster.planner.plan import Plan
from llamaclust.cluster.state.events import Draining, Watch
from llamaclust.cluster.text.service import TextService
from llamaclust.core.errors import LlamaclustError, NetworkPartitionError

_LOOK_S = 0.2


def lost_text(worker: WorkerHandle, requests: int) -> str:
    """Who is lost and how, and how many requests wait because of it."""
    waiting = f"; {_requests(requests, 'waits', 'wait')}" if requests else ""
    return f"{worker.error}{waiting}"


def back_text(worker: WorkerHandle) -> str:
    return f"worker {worker.name} is here (pid {worker.registration.pid})"


def given_up_text(worker: str, why: str) -> str:
    return f"worker {worker} is not started again: {why}; look at `llamaclust logs {worker}`"


def untried_text(worker: str, why: LlamaclustError) -> str:
    what = f"steps of the model could not be tried on worker {worker}"
    return f"{what}, plans go by its bandwidth and dot products alone: {why}"


def moving_text(plan: Plan, workers: Mapping[str, WorkerHandle]) -> str:
    """Where layers go, and how many each worker has to load for it."""
    load = missing_layers(plan, (workers[stage.worker] for stage in plan.stages))
    parts = (f"{one.worker} [{one.start}, {one.end}){_loads(load[one.worker])}" for one in plan.stages)
    return f"new plan: {', '.join(parts)}"


def _loads(layers: int) -> str:
    return f", {layers} to load" if layers else ""


def waiting_text(why: LlamaclustError, limit_s: float) -> str:
    what = "a link" if isinstance(why, NetworkPartitionError) else "a worker"
    return f"waiting for {what}, requests for {limit_s:g} s at most: {why}"


def cut_text(worker: str, other: str, why: str) -> str:
    return f"workers {worker} and {other} cannot reach each other: {why}; until they can, plans keep them apart"


def mended_text(worker: str, other: str) -> str:
    return f"workers {worker} and {other} reach each other again"


def recovered_text(seconds: float, requests: int) -> str:
    going = f": {_requests(requests, 'goes on', 'go on')}" if requests else ""
    return f"recovered in {seconds:.2f} s{going}"


def _requests(count: int, one: str, more: str) -> str:
    return f"1 request {one}" if count == 1 else f"{count} requests {more}"


@asynccontextmanager
async def requests_told(service: TextService, limit_s: float, watch: Watch) -> AsyncIterator[None]:
    """Meanwhile, it is told how many requests are left, as often as that changes."""
    telling = asyncio.create_task(_tell_left(service, limit_s, watch))
    try:
        yield
    finally:
        telling.cancel()


async def _tell_left(service: TextService, limit_s: float, watch: Watch) -> None:
    told = 0
    while True:
        left = service.active_requests
        if left not in (0, told):
            watch(Draining(left, limit_s))
            told = left
        await asyncio.sleep(_LOOK_S)
