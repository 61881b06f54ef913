"""Metrics of workers: what their last signs of life say. Those of stages are the engine's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from llamaclust.cluster.membership.worker_handle import WorkerHandle, WorkerState

_COUNTED = {
    "received_bytes": "Bytes of microbatches that came to a worker's stage, with their hidden states",
    "sent_bytes": "Bytes of microbatches and results that a worker's stage handed on",
}
_SHOWN = {
    "busy_ratio": "Share of its last sign of life's interval that a worker spent computing",
    "resident_memory_bytes": "Resident memory of a worker's process",
    "free_memory_bytes": "Memory that a worker's process may still take",
}


class WorkerMetrics(Collector):
    """Counters begin anew with a worker's process, as Prometheus expects of them."""

    def __init__(self, workers: Callable[[], Mapping[str, WorkerHandle]]) -> None:
        self._workers = workers

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("llamaclust_worker_up", "Whether a worker is a member now", labels=["worker"])
        counted = {name: _counter(name, what) for name, what in _COUNTED.items()}
        shown = {name: _gauge(name, what) for name, what in _SHOWN.items()}
        layers = GaugeMetricFamily(
            "llamaclust_worker_layers", "Layers on a worker's processor and GPUs", labels=["worker", "device"]
        )
        gpu_total = _gpu_gauge("memory_bytes", "Memory of a worker's GPU")
        gpu_free = _gpu_gauge("free_memory_bytes", "Memory that a worker may still take of its GPU")
        for name, handle in self._workers().items():
            is_up = handle.state not in (WorkerState.LOST, WorkerState.LEFT)
            up.add_metric([name], float(is_up))
            for one in handle.device_layers if is_up else ():
                layers.add_metric([name, one.device], one.end - one.start)
            beat = handle.heartbeat
            if beat is None or not is_up:
                continue
            counted["received_bytes"].add_metric([name], beat.received_bytes)
            counted["sent_bytes"].add_metric([name], beat.sent_bytes)
            shown["busy_ratio"].add_metric([name], beat.busy)
            shown["resident_memory_bytes"].add_metric([name], beat.resident_bytes)
            shown["free_memory_bytes"].add_metric([name], beat.free_memory_bytes)
            for gpu in handle.gpus:
                gpu_total.add_metric([name, gpu.device], gpu.total_bytes)
                gpu_free.add_metric([name, gpu.device], gpu.free_bytes)
        yield up
        yield from (layers, gpu_total, gpu_free)
        yield from counted.values()
        yield from shown.values()


def _counter(name: str, what: str) -> CounterMetricFamily:
    return CounterMetricFamily(f"llamaclust_worker_{name}", what, labels=["worker"])


def _gauge(name: str, what: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"llamaclust_worker_{name}", what, labels=["worker"])


def _gpu_gauge(name: str, what: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"llamaclust_worker_gpu_{name}", what, labels=["worker", "gpu"])
