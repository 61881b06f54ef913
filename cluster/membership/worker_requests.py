"""Sends requests to a worker, such as measurements, probes, and requests for logs or weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from llamaclust.cluster.membership.worker_channel import ProgressDeadline
from llamaclust.cluster.membership.worker_handle import PROGRESS_TIMEOUT_S, FreshMemory, WorkerHandle
from llamaclust.core.errors import ProtocolError
from llamaclust.core.profile import Profile
from llamaclust.wire.control import logs, messages, profiles
from llamaclust.wire.control.logs import LogTail
from llamaclust.wire.control.messages import Heartbeat
from llamaclust.wire.control.profiles import LinkProfile, ProfileWorker
from llamaclust.wire.control.weights import (
    AdapterFile,
    AdaptersSet,
    FindWeights,
    FindWeightsProgress,
    SetAdapters,
    WeightsFound,
)
from llamaclust.wire.rpc.deadlines import deadline

_PROFILE_S = 300.0
"""Maximum seconds of a measurement. It may read the layers of a large model from a slow disk."""
_MOST_PRODUCTS = 16
"""Maximum number of matrix products that a worker measures for each requested type."""
_LINK_S = 30.0
_LOG_S = 5.0
ADAPTERS_S = 600.0
"""Maximum seconds of a change of adapters, which may have to fetch weights."""
_HEARTBEAT_S = 10.0
_CLEARLY_MORE = 1.05


async def profile_worker(worker: WorkerHandle, request: ProfileWorker, deadline_s: float = _PROFILE_S) -> Profile:
    """Measures a worker's machine, which should be idle. Raises ProtocolError if the number of GPUs is wrong, or
    if the profile has matrix products that were not requested."""
    limit = deadline(f"worker {worker.name}: measurement", deadline_s)
    measured: profiles.WorkerProfile = await worker.channel.send_request(request, limit)
    gpus, measured_gpus = len(worker.registration.gpus), len(measured.profile.gpus)
    if measured_gpus != gpus:
        raise ProtocolError(f"worker {worker.name} measured {measured_gpus} GPUs, but it has {gpus}")
    _check_products(worker.name, measured.profile, request)
    if not worker.stages:  # With stages, the worker may have taken the memory to serve.
        worker.measuring_bytes += measured.kept_bytes
    return measured.profile


def _check_products(name: str, profile: Profile, request: ProfileWorker) -> None:
    """Raises ProtocolError if `profile` has matrix products that `request` does not ask for, or too many of a type."""
    isolated = profile.cpu.isolated_products
    others = [isolated, *(times for gpu in profile.gpus for times in (gpu.products, gpu.isolated_products))]
    found = Counter(time.quant_type for time in profile.cpu.products)
    if any(others) or found.keys() - {*request.quant_types} or max(found.values(), default=0) > _MOST_PRODUCTS:
        raise ProtocolError(f"worker {name} measured matrix products that were not requested")


async def profile_link(worker: WorkerHandle, other: WorkerHandle, deadline_s: float = _LINK_S) -> LinkProfile:
    limit = deadline(f"worker {worker.name}: measuring the link to worker {other.name}", deadline_s)
    own = other.registration
    end = profiles.LinkEnd(other.name, own.address, worker.permit(other.name), own.link_address)
    request = profiles.ProfileLinks((end,))
    measured: profiles.LinkProfiles = await worker.channel.send_request(request, limit)
    if len(measured.links) != 1:
        raise ProtocolError(f"worker {worker.name} measured {len(measured.links)} links instead of one")
    return measured.links[0]


async def set_adapters(worker: WorkerHandle, epoch: int, adapters: tuple[AdapterFile, ...]) -> None:
    """Replaces the adapters of a stage. Raises WorkerError, DeadlineError, or the error that the worker reports."""
    limit = deadline(f"worker {worker.name}: changing its adapters", ADAPTERS_S)
    done: AdaptersSet = await worker.channel.request(SetAdapters(epoch, adapters), limit)
    order, loaded = worker.stages[epoch]
    memory = replace(loaded, weight_bytes=done.weight_bytes, workspace_bytes=done.workspace_bytes)
    worker.stages[epoch] = replace(order, adapters=adapters), memory


async def probe(worker: WorkerHandle, other: WorkerHandle, deadline_s: float) -> str:
    """Returns the reason why the worker cannot reach `other`, or an empty text. Raises WorkerError or DeadlineError."""
    what = f"probe of worker {other.name}"
    async with worker.channel.one_at_a_time(what):
        limit = deadline(f"worker {worker.name}: the {what}", deadline_s)
        request = messages.ProbePeer(other.name, other.registration.address, permit=worker.permit(other.name))
        result: messages.ProbeResult = await worker.channel.request(request, limit)
    return result.reason


async def log_tail(worker: WorkerHandle, deadline_s: float = _LOG_S) -> LogTail:
    async with worker.channel.one_at_a_time("log"):
        limit = deadline(f"worker {worker.name}: sending its log", deadline_s)
        tail: LogTail = await worker.channel.request(logs.GetLog(), limit)
    return tail


async def refresh_memory(worker: WorkerHandle, held: Mapping[str, int]) -> None:
    """Updates a worker's free memory from its next heartbeat. `held`, the bytes of loaded stages by device,
    counts as free. Raises DeadlineError if no heartbeat comes."""
    last = worker.heartbeat
    async with deadline(f"worker {worker.name}: sending a heartbeat", _HEARTBEAT_S):
        while worker.heartbeat is last and await worker.is_responsive():
            pass
    if worker.heartbeat is not None and worker.heartbeat is not last:
        worker.fresh_memory = _reported_memory(worker, worker.heartbeat, held)


def renew_memory(worker: WorkerHandle) -> bool:
    """Updates a worker's free memory if the last heartbeat reports clearly more on any device. Returns True after an
    update. Does nothing while the worker has stages, because they may not use all of their planned memory yet."""
    if worker.heartbeat is None or worker.stages:
        return False
    own, known = worker.registration, worker.fresh_memory
    known = known or FreshMemory(own.free_memory_bytes, own.gpus)
    reported = _reported_memory(worker, worker.heartbeat, {})
    before, now = ([of.free_bytes, *(gpu.free_bytes for gpu in of.gpus)] for of in (known, reported))
    if all(free <= _CLEARLY_MORE * earlier for earlier, free in zip(before, now, strict=True)):
        return False
    worker.fresh_memory = reported
    return True


def _reported_memory(worker: WorkerHandle, heartbeat: Heartbeat, held: Mapping[str, int]) -> FreshMemory:
    gpus = (replace(gpu, free_bytes=gpu.free_bytes + held.get(gpu.device, 0)) for gpu in worker.gpus)
    return FreshMemory(heartbeat.free_memory_bytes + held.get("cpu", 0), tuple(gpus))


async def find_weights(
    worker: WorkerHandle,
    request: FindWeights,
    on_reading: Callable[[FindWeightsProgress], None] | None = None,
    progress_timeout_s: float = PROGRESS_TIMEOUT_S,
) -> WeightsFound:
    """Asks a worker which weights of a model it has, and caches the answer. Raises StalledError after
    `progress_timeout_s` seconds without progress."""
    async with worker.channel.one_at_a_time("weights"):
        key = request.file_id, request.describe
        if key not in worker.weights_found:
            what = f"worker {worker.name} made no progress with reading {request.path}"
            limit, requested = ProgressDeadline(what, progress_timeout_s), partial(worker.channel.send_request, request)
            found = await worker.channel.with_progress(FindWeightsProgress, requested, limit, on_reading)
            worker.weights_found[key] = found
        return worker.weights_found[key]
