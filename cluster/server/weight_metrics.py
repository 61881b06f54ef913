"""Prometheus metrics of weights between workers, from the workers' signs of life."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from llamaclust.cluster.membership.worker_handle import WorkerHandle


class WeightMetrics(Collector):
    """Read when they are asked for."""

    def __init__(self, workers: Mapping[str, WorkerHandle]) -> None:
        self._workers = workers

    def collect(self) -> Iterator[Metric]:
        sent = CounterMetricFamily("llamaclust_weight_sent_bytes", "Weights sent to other workers", labels=["worker"])
        received = CounterMetricFamily(
            "llamaclust_weight_received_bytes", "Weights fetched from other workers", labels=["worker"]
        )
        for name, worker in self._workers.items():
            if worker.heartbeat is not None:
                sent.add_metric([name], worker.heartbeat.weight_bytes_sent)
                received.add_metric([name], worker.heartbeat.weight_bytes_received)
        yield from (sent, received)
