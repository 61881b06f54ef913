"""The texts of notices: workers lost or back, layers that move, recoveries, partitions. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from llamaclust.cluster.planner.plan import Plan
from llamaclust.core.errors import LlamaclustError, NetworkPartitionError


def lost_text(error: LlamaclustError, requests: int) -> str:
    """`requests`: how many wait because of it."""
    waiting = f"; {_requests(requests, 'waits', 'wait')}" if requests else ""
    return f"{error}{waiting}"


def joined_text(worker: str, pid: int) -> str:
    return f"worker {worker} is here (pid {pid})"


def not_restarted_text(worker: str, why: str) -> str:
    return f"worker {worker} is not started again: {why}; look at `llamaclust logs {worker}`"


def not_profiled_text(worker: str, why: LlamaclustError) -> str:
    fallback = "plans use only its memory bandwidth and integer throughput"
    return f"could not time the model's steps on worker {worker}; {fallback}: {why}"


def moving_text(plan: Plan, held: Mapping[str, tuple[int, int]]) -> str:
    """The new plan, and how many layers each worker has to load: `held` are the layers that workers have."""
    parts = []
    for stage in plan.stages:
        start, end = held.get(stage.worker, (0, 0))
        load = sum(not start <= layer < end for layer in range(stage.start, stage.end))
        parts.append(f"{stage.worker} [{stage.start}, {stage.end}){f', {load} to load' if load else ''}")
    return f"new plan: {', '.join(parts)}"


def waiting_text(why: LlamaclustError, limit_s: float) -> str:
    what = "a link" if isinstance(why, NetworkPartitionError) else "a worker"
    return f"waiting for {what}, requests for {limit_s:g} s at most: {why}"


def partition_text(worker: str, other: str, why: str) -> str:
    return f"workers {worker} and {other} cannot reach each other: {why}; until they can, plans keep them apart"


def healed_text(worker: str, other: str) -> str:
    return f"workers {worker} and {other} reach each other again"


def recovered_text(seconds: float, requests: int) -> str:
    resumed = f": {_requests(requests, 'goes on', 'go on')}" if requests else ""
    return f"recovered in {seconds:.2f} s{resumed}"


def _requests(count: int, singular: str, plural: str) -> str:
    return f"1 request {singular}" if count == 1 else f"{count} requests {plural}"
