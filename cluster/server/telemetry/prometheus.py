"""Converts Prometheus metrics to OTLP metrics. Some histograms get names from OpenTelemetry's GenAI conventions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from opentelemetry.proto.metrics.v1.metrics_pb2 import (
    AggregationTemporality,
    Gauge,
    Histogram,
    HistogramDataPoint,
    NumberDataPoint,
    Sum,
)
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric as OtlpMetric
from prometheus_client import Metric
from prometheus_client.samples import Sample

from llamaclust.cluster.server.telemetry.records import MetricFamilies
from llamaclust.cluster.server.telemetry.spans import PROVIDER, key_values

_CUMULATIVE: Final = AggregationTemporality.AGGREGATION_TEMPORALITY_CUMULATIVE
_CONVENTIONS: Final = {
    "llamaclust_request_duration_seconds": ("gen_ai.server.request.duration", "s"),
    "llamaclust_time_to_first_token_seconds": ("gen_ai.server.time_to_first_token", "s"),
    "llamaclust_time_per_output_token_seconds": ("gen_ai.server.time_per_output_token", "s"),
    "llamaclust_request_tokens": ("gen_ai.client.token.usage", "{token}"),
}
_LABELS: Final = {"operation": "gen_ai.operation.name", "type": "gen_ai.token.type"}
_UNITS: Final = {"_seconds": "s", "_bytes": "By", "_ratio": "1"}


@dataclass(frozen=True, slots=True)
class MetricTimes:
    start_ns: int
    read_ns: int


def otlp_metrics(metrics: Iterable[MetricFamilies], times: MetricTimes) -> Iterator[OtlpMetric]:
    for each in metrics:
        model = {} if each.model is None else {"gen_ai.request.model": each.model}
        for family in each.families:
            if family.samples:
                yield _metric(model, family, times)


def _metric(model: Mapping[str, str], family: Metric, times: MetricTimes) -> OtlpMetric:
    unit = next((unit for ending, unit in _UNITS.items() if family.name.endswith(ending)), "")
    name, unit = _CONVENTIONS.get(family.name, (family.name, unit))
    metric = OtlpMetric(name=name, description=family.documentation, unit=unit)
    is_known = family.name in _CONVENTIONS
    match family.type:
        case "histogram":
            points = _histogram_points(family, model, times, is_known=is_known)
            metric.histogram.CopyFrom(Histogram(data_points=points, aggregation_temporality=_CUMULATIVE))
        case "counter":
            counted = [sample for sample in family.samples if sample.name.endswith("_total")]
            total = [_point(sample, model, times) for sample in counted]
            metric.sum.CopyFrom(Sum(data_points=total, aggregation_temporality=_CUMULATIVE, is_monotonic=True))
        case _:
            metric.gauge.CopyFrom(Gauge(data_points=[_point(sample, model, times) for sample in family.samples]))
    return metric


def _point(sample: Sample, model: Mapping[str, str], times: MetricTimes) -> NumberDataPoint:
    return NumberDataPoint(
        attributes=key_values({**model, **sample.labels}),
        start_time_unix_nano=times.start_ns,
        time_unix_nano=times.read_ns,
        as_double=sample.value,
    )


@dataclass(slots=True)
class _Buckets:
    bounds: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    sum: float = 0.0


def _histogram_points(
    family: Metric, model: Mapping[str, str], times: MetricTimes, *, is_known: bool
) -> Iterator[HistogramDataPoint]:
    histograms: dict[tuple[tuple[str, str], ...], _Buckets] = {}
    for sample in family.samples:
        labels = tuple((name, value) for name, value in sample.labels.items() if name != "le")
        buckets = histograms.setdefault(labels, _Buckets())
        if sample.name.endswith("_bucket"):
            buckets.bounds.append(float(sample.labels["le"]))
            buckets.counts.append(int(sample.value))
        elif sample.name.endswith("_sum"):
            buckets.sum = sample.value
    for labels, buckets in histograms.items():
        below = [0, *buckets.counts[:-1]]
        yield HistogramDataPoint(
            attributes=key_values({**model, **_attributes(dict(labels), is_known=is_known)}),
            start_time_unix_nano=times.start_ns,
            time_unix_nano=times.read_ns,
            count=buckets.counts[-1],
            sum=buckets.sum,
            bucket_counts=[count - lower for count, lower in zip(buckets.counts, below, strict=True)],
            explicit_bounds=buckets.bounds[:-1],
        )


def _attributes(labels: Mapping[str, str], *, is_known: bool) -> dict[str, str]:
    if not is_known:
        return dict(labels)
    named = {_LABELS.get(name, name): value for name, value in labels.items()}
    failed = {"error.type": "error"} if labels.get("finish_reason") == "error" else {}
    return {"gen_ai.provider.name": PROVIDER, **named, **failed}
