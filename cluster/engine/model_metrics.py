"""Renders the metrics of several models as one text. Each sample has a label with its model's name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from llamaclust.cluster.engine.metrics import Metrics


class _Labelled(Collector):
    def __init__(self, metrics: Mapping[str, Metrics]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        merged: dict[str, Metric] = {}
        for model, metrics in self._metrics.items():
            for family in metrics.registry.collect():
                whole = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    whole.samples.append(sample._replace(labels={"model": model, **sample.labels}))
        yield from merged.values()


def render_all(metrics: Mapping[str, Metrics]) -> bytes:
    """Returns the text of `GET /metrics`. Metrics of the whole cluster have no label for a model."""
    registry = CollectorRegistry()
    registry.register(_Labelled(metrics))
    clusters = {id(each.cluster): each.cluster for each in metrics.values()}
    return generate_latest(registry) + b"".join(map(generate_latest, clusters.values()))
