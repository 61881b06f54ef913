"""Tests telemetry of clusters of real processes: every stage and every recovery has a span, and no token changes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from llamaclust.cluster.engine.trace_context import TraceContext, current_trace
from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.cluster.server.telemetry.settings import Target, TelemetrySettings
from llamaclust.cluster.server.telemetry.telemetry import open_telemetry
from support.clusters.command_line import CommandLine, eventually
from support.clusters.recovering import config, generations, model_in, recovering, undisturbed
from support.hub.otlp_collector import OtlpCollector, otlp_collector, values
from support.seed import SEED

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
TOKENS = 60


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_in(tmp_path_factory.mktemp("model"))


@pytest.fixture
def collector() -> Iterator[OtlpCollector]:
    with otlp_collector() as running:
        yield running


def of_workers(spans: Sequence[Span]) -> set[str]:
    return {values(span.attributes)["llamaclust.worker.name"] for span in spans}


async def test_a_killed_worker_is_a_span_of_recovery_and_no_token_changes(
    model: Path, tmp_path: Path, collector: OtlpCollector
) -> None:
    requests: tuple[GenerationRequest, ...] = generations(SEED, TOKENS)
    expected = await asyncio.to_thread(undisturbed, model, requests)
    settings = TelemetrySettings(traces=Target(f"{collector.url}/v1/traces"), metrics=None, span_delay_s=0.05)
    async with (
        recovering(config(model, tmp_path)) as run,
        open_telemetry(settings, "house", {"tiny": run.cluster.engine}, run.cluster.metrics),
    ):
        current_trace.set(TraceContext.parse([TRACEPARENT]))
        answering = run.start(requests)
        await run.token(4 * len(requests))
        run.hurt("b")
        assert await asyncio.gather(*answering) == expected
    sequences = collector.named("text_completion tiny")
    assert len(sequences) == len(requests)
    assert {(span.trace_id.hex(), span.parent_span_id.hex()) for span in sequences} == {(TRACE, PARENT)}
    phases = {sequence.span_id: [span.name for span in collector.below(sequence)] for sequence in sequences}
    recovered = [sequence for sequence in sequences if {"recovery", "recomputation"} <= set(phases[sequence.span_id])]
    assert recovered, phases
    for sequence in recovered:
        names = phases[sequence.span_id]
        assert names.index("recovery") < names.index("recomputation"), names
        before, *_, after = [span for span in collector.below(sequence) if span.name in ("prefill", "decode")]
        assert of_workers(collector.below(before)) == {"a", "b", "c"}
        layers = [values(span.attributes) for span in collector.below(after)]
        ends = [stage["llamaclust.layers.end"] for stage in layers]
        assert [stage["llamaclust.layers.start"] for stage in layers] == [0, *ends[:-1]] and ends[-1] == 6


def test_up_exports_what_its_file_says(model: Path, line: CommandLine, collector: OtlpCollector) -> None:
    """The collector gets traces and metrics of two workers, the last ones when `up` ends."""
    line.set_variables(
        OTEL_EXPORTER_OTLP_HEADERS="x-own=a%20b", OTEL_SERVICE_NAME="house", OTEL_BSP_SCHEDULE_DELAY="50"
    )
    with line.cluster(model, context_length=256, telemetry={"endpoint": collector.url}) as cluster:
        cluster.http.headers["traceparent"] = TRACEPARENT
        cluster.answer()
        eventually(lambda: bool(collector.named("POST")), 60, "the request's span")
        exported = 'llamaclust_telemetry_exported_total{signal="traces"}'
        eventually(lambda: cluster.metric(exported) > 0, 60, "the count of what the collector has")
        cluster.command.press_ctrl_c()
        assert cluster.command.wait().code == 0
    [request], [sequence] = collector.named("POST /v1/completions"), collector.named("text_completion tiny")
    assert request.parent_span_id.hex() == PARENT and sequence.parent_span_id == request.span_id
    [decode] = [span for span in collector.below(sequence) if span.name == "decode"]
    assert of_workers(collector.below(decode)) == {"a", "b"}
    assert all(headers["x-own"] == "a b" for headers in collector.headers)
    resource = values(collector.resources[0].attributes)
    assert (resource["service.name"], resource["service.instance.id"]) == ("house", "tiny")
    [first] = collector.metric("gen_ai.server.time_to_first_token").histogram.data_points
    assert first.count == 1 and values(first.attributes)["gen_ai.request.model"] == "tiny"
    up = collector.metric("llamaclust_worker_up").gauge.data_points
    assert {values(point.attributes)["worker"] for point in up} == {"a", "b"}
    assert all(len(point.attributes) == 1 for point in up), "of no model"
