"""What a cluster says of itself: `llamaclust status --json` and `GET /cluster`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from llamaclust.cluster.coordinator import Cluster
from llamaclust.cluster.metrics import StageReport
from llamaclust.cluster.plan_text import plan_json
from llamaclust.cluster.state import ClusterRecord
from llamaclust.cluster.worker_handle import WorkerHandle


def cluster_status(cluster: Cluster, record: ClusterRecord) -> dict[str, Any]:
    """`status`: who runs what now; `plan`: what was predicted; `stages`: the same figures measured."""
    reports = cluster.engine.metrics.stage_report()
    return {
        "status": _status(cluster, record, {report.worker: report for report in reports}),
        "plan": plan_json(cluster.plan),
        "stages": [asdict(report) for report in reports],
    }


def _status(cluster: Cluster, record: ClusterRecord, reports: dict[str, StageReport]) -> dict[str, Any]:
    counts, error = cluster.engine.scheduler.counts, cluster.engine.error
    workers, supervisor = cluster.registry.workers, cluster.supervisor
    return {
        "name": record.name,
        "api": record.api,
        "pid": record.pid,
        "state": str(cluster.engine.state),
        "reason": None if error is None else str(error),
        "model": record.model,
        "insecure": cluster.config.insecure,
        "workers": [
            _worker(workers[one.name], reports.get(one.name)) | {"spared": one.name in supervisor.spared}
            for one in cluster.config.workers
        ],
        "requests": {"running": counts.running, "waiting": counts.waiting},
        "epoch": supervisor.epoch.number,
        "recoveries": supervisor.recoveries,
    }


def _worker(handle: WorkerHandle, report: StageReport | None) -> dict[str, Any]:
    return {
        "name": handle.name,
        "pid": handle.registration.pid,
        "address": handle.registration.address,
        "device": handle.registration.device,
        "threads": handle.registration.threads,
        "feature_level": handle.registration.feature_level,
        "layers": handle.layers,
        "state": str(handle.state),
        "memory_bytes": handle.memory_bytes,
        "busy": 0.0 if report is None else report.busy,
        "tokens_per_s": 0.0 if report is None else report.tokens_per_s,
        "heartbeat": None if handle.heartbeat is None else asdict(handle.heartbeat),
    }
