"""Collects Prometheus metrics of workers from their last heartbeats."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.cluster.server.groups_status import counters_of

_COUNTERS = {
    "worker_received_bytes": ("received_bytes", "Bytes of microbatches, with hidden states, that a stage received"),
    "worker_sent_bytes": ("sent_bytes", "Bytes of microbatches and results that a stage sent"),
    "weight_sent_bytes": ("weight_bytes_sent", "Bytes of weights sent to other workers"),
    "weight_received_bytes": ("weight_bytes_received", "Bytes of weights fetched from other workers"),
    "worker_kv_disk_written_bytes": ("kv_disk_written_bytes", "Bytes of KV memory that a worker wrote to disk"),
    "worker_kv_disk_read_bytes": ("kv_disk_read_bytes", "Bytes of KV memory that a worker read from disk"),
    "worker_experts_cache_hits": ("experts_cache_hits", "Experts that a microbatch found in a GPU's cache"),
    "worker_experts_cache_misses": ("experts_cache_misses", "Experts that a microbatch did not find in a GPU's cache"),
    "worker_experts_cache_copied_bytes": ("experts_cache_copied_bytes", "Bytes of experts copied to a worker's GPUs"),
}
"""Maps the name of each counter to a field of the heartbeat and a help text."""
_GAUGES = {
    "worker_busy_ratio": ("busy", "Share of the last heartbeat interval that a worker spent computing"),
    "worker_resident_memory_bytes": ("resident_bytes", "Resident memory of a worker's process"),
    "worker_free_memory_bytes": ("free_memory_bytes", "Memory that a worker's process can still allocate"),
    "worker_kv_disk_bytes": ("kv_disk_used_bytes", "KV memory on disk in a worker's folder, which workers may share"),
    "worker_experts_cache_bytes": ("experts_cache_used_bytes", "Bytes of copies of experts on a worker's GPUs"),
}

_GROUP_COUNTERS = {
    "group_gathers": ("gathers", "Gathers, which are exchanges of rows between group members"),
    "group_sent_bytes": ("sent_bytes", "Bytes that a member of a group sent to the others"),
    "group_received_bytes": ("received_bytes", "Bytes that a member of a group received from the others"),
}


class WorkerMetrics(Collector):
    """A collector of the workers' metrics. A worker's counters begin at 0 when it restarts."""

    def __init__(
        self, workers: Callable[[], Mapping[str, WorkerHandle]], models: Callable[[], Mapping[str, str]]
    ) -> None:
        self._workers = workers
        self._models = models

    def collect(self) -> Iterator[Metric]:
        workers = self._workers()
        up = {name: worker for name, worker in workers.items() if not worker.state.is_gone}
        alive = _gauge("worker_up", "1 if a worker is connected, 0 if it is not", "worker")
        for name in workers:
            alive.add_metric([name], float(name in up))
        yield alive
        yield from _of_heartbeats(up)
        yield from _of_devices(up)
        yield from _of_groups(up, self._models())


def _of_heartbeats(workers: Mapping[str, WorkerHandle]) -> Iterator[Metric]:
    families: list[tuple[str, CounterMetricFamily | GaugeMetricFamily]] = [
        (field, CounterMetricFamily(f"llamaclust_{name}", text, labels=["worker"]))
        for name, (field, text) in _COUNTERS.items()
    ]
    families += [(field, _gauge(name, text, "worker")) for name, (field, text) in _GAUGES.items()]
    for field, family in families:
        for name, worker in workers.items():
            if worker.heartbeat is not None:
                family.add_metric([name], getattr(worker.heartbeat, field))
        yield family


def _of_groups(workers: Mapping[str, WorkerHandle], models: Mapping[str, str]) -> Iterator[Metric]:
    labels = ["worker", "model"]
    families = [
        (field, CounterMetricFamily(f"llamaclust_{name}", text, labels=labels))
        for name, (field, text) in _GROUP_COUNTERS.items()
    ]
    waits = "Time that gathers waited for a member, because it was ready last"
    waited = CounterMetricFamily("llamaclust_group_wait_seconds", waits, labels=[*labels, "member"])
    for name, worker in workers.items():
        for model_id, model in models.items():
            order, counters = worker.order_of(model_id), counters_of(worker, model_id)
            if counters is None or order is None or order.group is None:
                continue
            for field, family in families:
                family.add_metric([name, model], getattr(counters, field))
            for member, seconds in zip(order.group.members, counters.waited_for_s, strict=False):
                waited.add_metric([name, model, member.worker], seconds)
    yield from (*(family for _, family in families), waited)


def _of_devices(workers: Mapping[str, WorkerHandle]) -> Iterator[Metric]:
    layers = _gauge("worker_layers", "Layers of all models on a worker's CPU and GPUs", "worker", "device")
    total = _gauge("worker_gpu_memory_bytes", "Memory of a worker's GPU", "worker", "gpu")
    free = _gauge("worker_gpu_free_memory_bytes", "GPU memory that a worker can still allocate", "worker", "gpu")
    for name, worker in workers.items():
        counts: defaultdict[str, float] = defaultdict(float)
        for order in worker.newest_orders:
            for part in worker.devices_of(order):
                start, end = order.limits.places(part.start, part.end)
                counts[part.device] += end - start
        for device, count in counts.items():
            layers.add_metric([name, device], count)
        for gpu in worker.gpus if worker.heartbeat is not None else ():
            total.add_metric([name, gpu.device], gpu.total_bytes)
            free.add_metric([name, gpu.device], gpu.free_bytes)
    yield from (layers, total, free)


def _gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"llamaclust_{name}", text, labels=labels)
