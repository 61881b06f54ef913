"""Handles of workers that answer loads, and plans for workers by name."""

from __future__ import annotations

from dataclasses import replace

from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.cluster.planner.plan import Plan
from llamaclust.cluster.planner.planner import make_plan
from llamaclust.wire.control.messages import CoordinatorMessage, Failure, Load, Loaded, LoadFailed, Unload, UnloadFailed
from llamaclust.wire.control.weights import FindWeights, WeightsFound
from llamaclust.wire.security.credentials import Insecure
from support.plans.plan_inputs import REQUEST, SMALL, worker
from support.wire.control_messages import REGISTER


def plan_of(*names: str) -> Plan:
    return make_plan(SMALL, [worker(name) for name in names], replace(REQUEST, objective="throughput"))


def worker_handle(name: str, *, loads: bool = True, unload_failure: Failure | None = None) -> WorkerHandle:
    """Makes a worker whose loads succeed or fail; it answers an unload with a failure or not at all."""

    async def send(message: CoordinatorMessage) -> None:
        match message:
            case FindWeights(request_id=request_id):
                handle.receive(WeightsFound(True, request_id=request_id))
            case Load(epoch) if loads:
                handle.receive(Loaded(epoch, 1, 2, 3))
            case Load(epoch):
                handle.receive(LoadFailed(epoch, Failure("WorkerError", "its disk is bad")))
            case Unload(epoch) if unload_failure is not None:
                handle.receive(UnloadFailed(epoch, unload_failure))

    handle = WorkerHandle(replace(REGISTER, name=name), send, lambda: "", Insecure())
    return handle
