"""Tests of spans and metrics on their way to a collector that accepts them, is slow, refuses them or is absent."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from time import monotonic
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Gauge

from llamaclust.cluster.server.telemetry import exporter as exporter_module
from llamaclust.cluster.server.telemetry import otlp_client
from llamaclust.cluster.server.telemetry.exporter import ExportCounts, Exporter
from llamaclust.cluster.server.telemetry.records import MetricFamilies, ServedRequest
from llamaclust.cluster.server.telemetry.settings import Target, TelemetrySettings
from llamaclust.cluster.server.telemetry.trace_sampler import TraceSampler
from support.clusters.served import until
from support.hub.otlp_collector import OtlpCollector, otlp_collector, values

DEADLINE_S = 60


@pytest.fixture
def collector() -> Iterator[OtlpCollector]:
    with otlp_collector() as running:
        yield running


@pytest.fixture(autouse=True)
def _pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(otlp_client, "_PAUSES_S", (0.01, 0.02))
    monkeypatch.setattr(exporter_module, "_FLUSH_S", float(DEADLINE_S))


class Running:
    """An exporter and its counters."""

    def __init__(self, url: str, **settings: Any) -> None:
        traces, metrics = (Target(f"{url}/v1/{signal}", timeout_s=20.0) for signal in ("traces", "metrics"))
        base = TelemetrySettings(traces=traces, metrics=metrics, span_delay_s=0.01)
        self.registry = CollectorRegistry()
        resource = {"service.name": "llamaclust"}
        self.exporter = Exporter(replace(base, **settings), resource, ExportCounts(self.registry))

    def count(self, what: str, signal: str = "traces") -> int:
        value = self.registry.get_sample_value(f"llamaclust_telemetry_{what}_total", {"signal": signal})
        assert value is not None
        return int(value)


@asynccontextmanager
async def exporting(url: str, **settings: Any) -> AsyncIterator[Running]:
    running = Running(url, **settings)
    async with asyncio.timeout(DEADLINE_S), running.exporter:
        yield running


def record(path: str = "/v1/completions") -> ServedRequest:
    begun = TraceSampler().begin([], [])
    assert begun is not None
    return ServedRequest(begun, "POST", path, 1000, 2000, 200)


async def test_spans_are_sent_together_with_their_resource(collector: OtlpCollector) -> None:
    async with exporting(collector.url, span_delay_s=20.0, max_spans=3) as running:
        for _ in range(3):
            running.exporter.put_record(record())
        await until(lambda: running.count("exported") == 3)
    assert collector.paths == ["/v1/traces"] and [span.name for span in collector.spans] == ["POST /v1/completions"] * 3
    assert values(collector.resources[0].attributes) == {"service.name": "llamaclust"}
    assert collector.headers[0]["content-type"] == "application/x-protobuf"
    assert collector.headers[0]["content-encoding"] == "gzip"


async def test_headers_and_plain_bodies_are_sent_where_they_are_wanted(collector: OtlpCollector) -> None:
    plain = Target(f"{collector.url}/v1/traces", {"authorization": "Bearer x"}, is_compressed=False)
    async with exporting(collector.url, traces=plain) as running:
        running.exporter.put_record(record())
        await until(lambda: running.count("exported") == 1)
    assert collector.headers[0]["authorization"] == "Bearer x" and "content-encoding" not in collector.headers[0]


async def test_what_is_left_at_the_end_is_sent(collector: OtlpCollector) -> None:
    async with exporting(collector.url, span_delay_s=1000.0) as running:
        for _ in range(5):
            running.exporter.put_record(record())
        running.exporter.put_metrics([MetricFamilies.of("m", running.registry)])
    assert (len(collector.spans), running.count("exported"), running.count("exported", "metrics")) == (5, 5, 1)


async def test_a_message_is_repeated_where_that_may_help(collector: OtlpCollector) -> None:
    collector.statuses = [503, 429]
    async with exporting(collector.url) as running:
        running.exporter.put_record(record())
        await until(lambda: running.count("exported") == 1)
    assert len(collector.paths) == 3 and len(collector.spans) == 1 and running.count("dropped") == 0


async def test_a_message_that_is_refused_is_dropped_at_once(
    collector: OtlpCollector, caplog: pytest.LogCaptureFixture
) -> None:
    collector.statuses = [401]
    with caplog.at_level(logging.INFO, "llamaclust"):
        async with exporting(collector.url) as running:
            running.exporter.put_record(record())
            await until(lambda: running.count("dropped") == 1)
            running.exporter.put_record(record())
            await until(lambda: running.count("exported") == 1)
    assert len(collector.paths) == 2
    assert [line.levelname for line in caplog.records] == ["WARNING", "INFO"]
    assert "HTTP 401" in caplog.text


async def test_a_collector_that_is_absent_is_named_once_and_costs_one_attempt_each(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = counted_attempts(monkeypatch)
    with socket.socket() as deaf, caplog.at_level(logging.INFO, "llamaclust"):
        deaf.bind(("127.0.0.1", 0))  # The port is taken, and refuses connections.
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        async with exporting(url) as running:
            for number in range(1, 4):
                running.exporter.put_record(record())
                await until(lambda wanted=number: running.count("dropped") == wanted)  # type: ignore[misc]
    assert len(attempts) == 3 + 1 + 1 and len(caplog.records) == 1 and url in caplog.text


def counted_attempts(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    attempts: list[bytes] = []
    post = otlp_client.OtlpClient._post

    def counting(self: otlp_client.OtlpClient, body: bytes, timeout_s: float) -> Any:
        attempts.append(body)
        return post(self, body, timeout_s)

    monkeypatch.setattr(otlp_client.OtlpClient, "_post", counting)
    return attempts


async def test_a_slow_collector_holds_up_nothing_and_what_finds_no_room_is_counted(collector: OtlpCollector) -> None:
    collector.gate.clear()
    async with exporting(collector.url, max_records=4, max_spans=1) as running:
        running.exporter.put_record(record())
        await until(lambda: bool(collector.paths))
        for _ in range(10):
            running.exporter.put_record(record())  # the queue has room for four
        assert running.count("dropped") == 6
        collector.gate.set()
        await until(lambda: running.count("exported") == 5)
    assert len(collector.spans) == 5 and running.count("dropped") == 6


async def test_the_end_does_not_wait_for_a_collector_that_hangs(
    collector: OtlpCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter_module, "_FLUSH_S", 0.1)
    collector.gate.clear()
    begun_s = monotonic()
    async with exporting(collector.url) as running:
        running.exporter.put_record(record())
        await until(lambda: bool(collector.paths))
        running.exporter.put_record(record())
    assert monotonic() - begun_s < 15, "an attempt may take 20 s"


async def test_one_signal_alone(collector: OtlpCollector) -> None:
    async with exporting(collector.url, traces=None) as running:
        running.exporter.put_metrics([MetricFamilies.of("m", running.registry)])
        await until(lambda: running.count("exported", "metrics") == 1)
    assert collector.paths == ["/v1/metrics"]


async def test_a_mistake_of_one_record_is_logged_and_the_next_one_is_sent(
    collector: OtlpCollector, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> Callable[[], None]:
        raise ZeroDivisionError

    async with exporting(collector.url) as running:
        with monkeypatch.context() as patched:
            patched.setattr(exporter_module, "spans_of", broken)
            running.exporter.put_record(record())
            await until(lambda: running.count("dropped") == 1)
        running.exporter.put_record(record())
    assert "ZeroDivisionError" in caplog.text and len(collector.spans) == 1


async def test_metrics_that_cannot_be_encoded_are_counted_and_the_next_ones_are_sent(
    collector: OtlpCollector, caplog: pytest.LogCaptureFixture
) -> None:
    bad = CollectorRegistry()
    Gauge("bad", "A label that is no UTF-8", ["worker"], registry=bad).labels("\udcff").set(1)
    async with exporting(collector.url) as running:
        running.exporter.put_metrics([MetricFamilies.of("m", bad)])
        await until(lambda: running.count("dropped", "metrics") == 1)
        running.exporter.put_metrics([MetricFamilies.of("m", running.registry)])
        await until(lambda: running.count("exported", "metrics") == 1)
    assert "telemetry: metrics could not be exported" in caplog.text and collector.paths == ["/v1/metrics"]


async def test_spans_that_cannot_be_sent_are_counted_and_the_next_ones_are_sent(
    collector: OtlpCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> Callable[[], None]:
        raise ZeroDivisionError

    async with exporting(collector.url) as running:
        with monkeypatch.context() as patched:
            patched.setattr(otlp_client.OtlpClient, "send", broken)
            running.exporter.put_record(record())
            await until(lambda: running.count("dropped") == 1)
        running.exporter.put_record(record())
        await until(lambda: running.count("exported") == 1)
