from __future__ import annotations

from collections.abc import Mapping

from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.cluster.planner.format import shares_text, stage_name
from llamaclust.cluster.planner.plan import Plan
from llamaclust.core.errors import LlamaclustError
from llamaclust.core.limits import layer_span
from llamaclust.core.version import VERSION
from llamaclust.model.program import KV_BLOCK_TOKENS


def version_text(worker: WorkerHandle) -> str:
    """Returns a notice if a worker runs another version than this coordinator, or ""."""
    version = worker.registration.version
    if version == VERSION:
        return ""
    program = f"llamaclust {version}" if version else "an older version of llamaclust"
    what = f"worker {worker.name} runs {program}, this coordinator {VERSION}"
    return f"{what}: they work together with the same results; finish the upgrade"


def lost_text(error: LlamaclustError, requests: Mapping[str, int]) -> str:
    counts = [(model, count) for model, count in requests.items() if count]
    if len(requests) > 1:
        waits = ", ".join(_requests(count, f"of {model} waits", f"of {model} wait") for model, count in counts)
    else:
        waits = "".join(_requests(count, "waits", "wait") for _, count in counts)
    return f"{error}; {waits}" if waits else str(error)


def moving_text(plan: Plan, held: Mapping[str, tuple[float, float]]) -> str:
    """Describes a new plan, with the number of layers that each worker must load."""
    parts, shards = [], plan.expert_shards
    for stage in plan.leaders:
        name, layers = stage_name(plan, stage), layer_span(stage.start, stage.end, shards)
        start, end = held.get(stage.worker, (0, 0))
        load = sum(not start <= part / shards < end for part in range(stage.start, stage.end)) / shards
        beside = f" in shares {shares_text(stage.shares)}" if stage.shares else f", {load:g} to load" if load else ""
        parts.append(f"{name} {layers}{beside}")
    return f"new plan: {', '.join(parts)}"


def images_text(before: Plan | None, plan: Plan) -> str | None:
    if bool(plan.no_images) == (before is not None and bool(before.no_images)):
        return None
    return refused_images(plan.no_images) if plan.no_images else "images are accepted again"


def kv_memory_text(before: Plan | None, plan: Plan) -> str | None:
    if plan.lacks_kv_memory == (before is not None and before.lacks_kv_memory):
        return None
    if not plan.lacks_kv_memory:
        return f"sequences of {plan.context_length} tokens are computed again"
    room = f"KV memory holds {plan.kv_blocks * KV_BLOCK_TOKENS} of the context's {plan.context_length} tokens"
    return f"{room}: longer sequences wait for more memory"


def refused_images(why: str) -> str:
    return f"images are refused until a worker has room for their encoder: {why}"


def recovered_text(seconds: float, requests: int) -> str:
    return f"recovered in {seconds:.2f} s{_resumed(requests)}"


def awake_text(model: str, seconds: float, requests: int) -> str:
    return f"model {model} is awake after {seconds:.2f} s{_resumed(requests)}"


def _resumed(requests: int) -> str:
    return f": {_requests(requests, 'goes on', 'go on')}" if requests else ""


def _requests(count: int, singular: str, plural: str) -> str:
    return f"1 request {singular}" if count == 1 else f"{count} requests {plural}"
