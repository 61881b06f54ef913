"""Checks that every metric of the registries is exported as OTLP, with the values of /metrics."""

from __future__ import annotations

from math import inf

from opentelemetry.proto.metrics.v1.metrics_pb2 import AggregationTemporality, Metric

from llamaclust.cluster.engine.metrics import EndedRequest, Metrics
from llamaclust.cluster.engine.pipeline import StageInfo
from llamaclust.cluster.scheduler.counts import Counts
from llamaclust.cluster.scheduler.requests import Operation, Timings
from llamaclust.cluster.server.telemetry.prometheus import MetricTimes, otlp_metrics
from llamaclust.cluster.server.telemetry.records import MetricFamilies
from support.hub.otlp_collector import values

TIMES = MetricTimes(5, 9)
CONVENTIONS = {
    "gen_ai.server.request.duration",
    "gen_ai.server.time_to_first_token",
    "gen_ai.server.time_per_output_token",
    "gen_ai.client.token.usage",
}


def exported() -> tuple[MetricFamilies, dict[str, Metric]]:
    counts = Counts(*[1] * len(Counts.__dataclass_fields__))
    metrics = Metrics([StageInfo("a", 0, 2), StageInfo("b", 2, 4)], lambda: counts, lambda: 1)
    timings = Timings(1.0, 20.0, 100.0, 50.0, prompt_tokens=8, cached_tokens=0, generated_tokens=4)
    metrics.finished(EndedRequest("stop", timings, 0.3, Operation.CHAT))
    metrics.finished(EndedRequest("stop", timings, 5000.0, Operation.CHAT))
    metrics.finished(EndedRequest("error", timings, 0.3, Operation.TEXT_COMPLETION))
    model = MetricFamilies.of("tiny", metrics.registry)
    return model, {metric.name: metric for metric in otlp_metrics([model], TIMES)}


def test_every_metric_is_exported_those_of_conventions_by_their_names() -> None:
    model, metrics = exported()
    own = {family.name for family in model.families if family.samples}
    kept = {name for name in own if name in metrics}
    assert len(own) - len(kept) == len(CONVENTIONS) and metrics.keys() - own == CONVENTIONS
    assert len(metrics) == len(own) > 10


def test_counters_gauges_and_units() -> None:
    _, metrics = exported()
    requests = metrics["llamaclust_requests"].sum
    assert requests.is_monotonic
    assert requests.aggregation_temporality == AggregationTemporality.AGGREGATION_TEMPORALITY_CUMULATIVE
    found = {values(point.attributes)["finish_reason"]: point.as_double for point in requests.data_points}
    assert found == {"stop": 2.0, "error": 1.0}
    [running] = metrics["llamaclust_requests_running"].gauge.data_points
    assert running.as_double == 1 and values(running.attributes) == {"gen_ai.request.model": "tiny"}
    assert (running.start_time_unix_nano, running.time_unix_nano) == (5, 9)
    units = {name: metrics[name].unit for name in ("llamaclust_stage_compute_seconds", "gen_ai.client.token.usage")}
    assert units == {"llamaclust_stage_compute_seconds": "s", "gen_ai.client.token.usage": "{token}"}


def test_histograms_of_the_conventions() -> None:
    _, metrics = exported()
    duration = metrics["gen_ai.server.request.duration"]
    points = {values(point.attributes)["gen_ai.operation.name"]: point for point in duration.histogram.data_points}
    chat, failed = points["chat"], points["text_completion"]
    assert duration.unit == "s" and chat.count == 2 and chat.sum == 5000.3
    assert len(chat.bucket_counts) == len(chat.explicit_bounds) + 1 and inf not in chat.explicit_bounds
    assert sum(chat.bucket_counts) == 2 and chat.bucket_counts[-1] == 1
    [place] = [index for index, count in enumerate(chat.bucket_counts[:-1]) if count]
    assert chat.explicit_bounds[place - 1] < 0.3 <= chat.explicit_bounds[place]
    common = {"gen_ai.provider.name": "llamaclust", "gen_ai.request.model": "tiny"}
    assert values(chat.attributes) == {**common, "gen_ai.operation.name": "chat", "finish_reason": "stop"}
    assert values(failed.attributes)["error.type"] == "error"
    tokens = metrics["gen_ai.client.token.usage"].histogram.data_points
    kinds = {
        (named["gen_ai.operation.name"], named["gen_ai.token.type"]): point.sum
        for point in tokens
        if (named := values(point.attributes))
    }
    assert kinds == {
        ("chat", "input"): 16,
        ("chat", "output"): 8,
        ("text_completion", "input"): 8,
        ("text_completion", "output"): 4,
    }
