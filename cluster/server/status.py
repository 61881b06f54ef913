"""Formats a cluster's status as JSON for `llamaclust status --json` and `GET /cluster`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from llamaclust.cluster.control.model_lifecycle import ModelLifecycle
from llamaclust.cluster.control.planning import in_order
from llamaclust.cluster.engine.engine import EngineState
from llamaclust.cluster.engine.metrics import StageReport
from llamaclust.cluster.engine.throughput import MeasuredSpeed
from llamaclust.cluster.engine.waterfall_json import SHOWN_CHARACTERS
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.cluster.planner.format import choice_json, plan_json
from llamaclust.cluster.planner.links import COORDINATOR, Link, Links
from llamaclust.cluster.planner.plan import Plan, StagePrediction
from llamaclust.cluster.scheduler.sequences import Sequence as ScheduledSequence
from llamaclust.cluster.server.groups_status import groups_json
from llamaclust.cluster.state.directory import ClusterRecord
from llamaclust.core.epochs import epoch_text
from llamaclust.core.gpus import UNUSED_BY_PARTS
from llamaclust.core.version import VERSION

if TYPE_CHECKING:
    from llamaclust.cluster.control.supervisor import Supervisor
    from llamaclust.cluster.server.coordinator import Cluster, ServedModel

_MOST_LISTED = 64


def cluster_status(cluster: Cluster, record: ClusterRecord, served: ServedModel | None = None) -> dict[str, Any]:
    """Returns the status of a cluster and of one of its models (default: the first)."""
    served = served or cluster.models[0]
    engine, plan = served.engine, served.plan
    sequences = [sequence for scheduler in engine.schedulers for sequence in scheduler.sequences]
    return {
        "status": _status(cluster, record, served),
        "plan": None if plan is None else plan_json(plan),
        "stages": [asdict(report) for report in engine.metrics.stage_report()],
        "links": [] if plan is None else links_json(plan, served.supervisor.planner.links),
        "sequences": sequences_json(sequences, time.monotonic_ns()),
    }


def sequences_json(sequences: Sequence[ScheduledSequence], now_ns: int) -> list[dict[str, Any]]:
    return [
        {
            "id": sequence.request.request_id[:SHOWN_CHARACTERS],
            "phase": sequence.phase.name.lower(),
            "prompt_tokens": sequence.prompt_length,
            "cached_tokens": sequence.usage.cached_tokens or 0,
            "computed_tokens": min(sequence.scheduled, sequence.prompt_length),
            "generated_tokens": sequence.generated,
            "drafted_tokens": sequence.drafting.rows,
            "accepted_tokens": sequence.drafting.accepted,
            "max_new_tokens": sequence.max_new_tokens,
            "age_s": max(0, now_ns - sequence.usage.arrived_ns) / 1e9,
        }
        for sequence in sequences[:_MOST_LISTED]
    ]


def links_json(plan: Plan, links: Links) -> list[dict[str, Any]]:
    """Lists the links from the coordinator (named "") through all stages and back to it. Unmeasured values are null."""
    names = [COORDINATOR, *(stage.worker for stage in plan.leaders), COORDINATOR]
    return [_link(*pair, links.measured.get(frozenset(pair))) for pair in pairwise(names)]


def _link(sender: str, receiver: str, link: Link | None) -> dict[str, Any]:
    return {
        "from": sender,
        "to": receiver,
        "round_trip_ms": None if link is None else 2e3 * link.one_way_s,
        "bytes_per_s": 1 / link.byte_s if link is not None and link.byte_s else None,
    }


def _status(cluster: Cluster, record: ClusterRecord, served: ServedModel) -> dict[str, Any]:
    engine, supervisor, workers = served.engine, served.supervisor, cluster.registry.workers
    counts, error, retiring = engine.counts, engine.error, supervisor.retiring_epoch
    reports = {report.worker: report for report in engine.metrics.stage_report()}
    predicted, model_id = _predicted_stages(served.plan), served.model.model_id
    idle = {} if served.plan is None else {each.worker: each.reason for each in served.plan.idle_workers}
    return {
        "name": record.name,
        "version": VERSION,
        "api": record.api,
        "pid": record.pid,
        "state": str(engine.state),
        "reason": None if error is None else str(error),
        "model": served.name,
        "insecure": cluster.config.insecure,
        "workers": [
            worker_json(workers[name], model_id, reports, predicted.get(name))
            | {
                "drained": name in cluster.pool.operations.drained,
                "quarantine": _quarantine(supervisor, name),
                "idle_reason": idle.get(name),
            }
            for name in in_order(cluster.config, workers)
        ],
        "groups": groups_json(workers.values(), model_id, predicted),
        "absent": cluster.launcher.missing(workers),
        "requests": {"running": counts.running, "waiting": counts.waiting},
        "epoch": None if supervisor.number is None else epoch_text(supervisor.number),
        "retiring_epoch": None if retiring is None else epoch_text(retiring.number),
        "recoveries": supervisor.recoveries,
        "recovery_seconds": list(engine.metrics.recovery_s),
        "speed": _speed(served.plan, engine.metrics.speed()),
        "choice": None if served.plan is None else choice_json(served.plan),
        "models": [_model(each, cluster.rotation.lifecycles[each.name]) for each in cluster.models],
    }


def _quarantine(supervisor: Supervisor, name: str) -> dict[str, Any] | None:
    quarantine, now_s = supervisor.store.state.pool.quarantine, asyncio.get_running_loop().time()
    if name not in quarantine.names(now_s):
        return None
    record = quarantine.records[name]
    figures = {"failures": record.failures, "pause_s": record.pause_s, "left_s": record.end_s - now_s}
    return {**figures, "reason": record.reason}


def _model(served: ServedModel, lifecycle: ModelLifecycle) -> dict[str, Any]:
    state = served.engine.state
    counts = served.engine.counts
    return {
        "name": served.name,
        "state": "loading" if lifecycle.is_loading and state is EngineState.ASLEEP else str(state),
        "requests": {"running": counts.running, "waiting": counts.waiting},
        "recoveries": served.supervisor.recoveries,
        "adapters": served.adapters.names,
    }


def _predicted_stages(plan: Plan | None) -> dict[str, StagePrediction]:
    if plan is None or plan.prediction is None:
        return {}
    return {stage.worker: prediction for stage, prediction in zip(plan.stages, plan.prediction.stages, strict=True)}


def _speed(plan: Plan | None, measured: MeasuredSpeed) -> dict[str, Any]:
    known = None if plan is None else plan.prediction
    predicted = {
        "token_ms": None if known is None else 1e3 * known.token_s,
        "ttft_ms": None if known is None else 1e3 * known.ttft_s,
        "prompt_tokens": None if plan is None else plan.prompt_tokens,
        "tokens_per_s": None if known is None else known.tokens_per_s,
        "bottleneck": None if known is None else known.bottleneck,
    }
    return {"predicted": predicted, "measured": asdict(measured)}


def worker_json(
    handle: WorkerHandle, model_id: str, reports: Mapping[str, StageReport], predicted: StagePrediction | None
) -> dict[str, Any]:
    order = handle.order_of(model_id)
    group = None if order is None else order.group
    report = reports.get(handle.name if group is None else group.members[0].worker)
    unused = UNUSED_BY_PARTS if order is not None and order.limits.expert_shards > 1 else None
    return {
        "name": handle.name,
        "version": handle.registration.shown_version,
        "pid": handle.registration.pid,
        "address": handle.registration.address,
        "link_address": handle.registration.link_address or None,
        "closed_port": handle.closed_port or None,
        "device": handle.registration.device,
        "gpus": [asdict(gpu) | {"unused": unused} for gpu in handle.gpus],
        "threads": handle.registration.threads,
        "kv_disk_bytes": handle.registration.kv_disk_bytes,
        "feature_level": handle.registration.feature_level,
        "layers": None if order is None else order.limits.places(order.start, order.end),
        "share": None if group is None else group.shares[group.member] / sum(group.shares),
        "device_layers": [
            {
                "device": part.device,
                "layers": order.limits.places(part.start, part.end),
                "cpu_moe": part.cpu_moe,
                "experts_cache_bytes": part.experts_cache_bytes,
            }
            for part in handle.devices_of(order)
            if order is not None
        ],
        "state": str(handle.state),
        "memory_bytes": handle.held_bytes,
        "busy": 0.0 if report is None else report.utilization,
        "tokens_per_s": 0.0 if report is None else report.tokens_per_s,
        "decode_ms": None if report is None else report.decode_ms,
        "predicted_decode_ms": None if predicted is None else 1e3 * predicted.decode_s,
        "prefill_ms": None if report is None else report.prefill_ms,
        "predicted_prefill_ms": None if predicted is None else 1e3 * predicted.prefill_s,
        "heartbeat": None if handle.heartbeat is None else asdict(handle.heartbeat),
    }
