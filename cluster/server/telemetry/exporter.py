"""Sends spans and metrics to a collector. A thread converts and sends them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from queue import Empty, Full, Queue
from threading import Event, Thread
from time import monotonic, monotonic_ns, time_ns
from typing import Final

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import InstrumentationScope
from opentelemetry.proto.metrics.v1.metrics_pb2 import ResourceMetrics, ScopeMetrics
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Span
from prometheus_client import Counter
from prometheus_client.registry import CollectorRegistry

from llamaclust.cluster.server.telemetry.otlp_client import OtlpClient
from llamaclust.cluster.server.telemetry.prometheus import MetricTimes, otlp_metrics
from llamaclust.cluster.server.telemetry.records import MetricFamilies, Record
from llamaclust.cluster.server.telemetry.settings import Target, TelemetrySettings
from llamaclust.cluster.server.telemetry.spans import key_values, spans_of
from llamaclust.core.version import VERSION

_SCOPE: Final = InstrumentationScope(name="llamaclust", version=VERSION)
_FLUSH_S: Final = 3.0
"""Maximum seconds for sending the remaining data when the exporter is closed."""

_log = logging.getLogger(__name__)


class ExportCounts:
    def __init__(self, registry: CollectorRegistry) -> None:
        self._exported = Counter(
            "llamaclust_telemetry_exported",
            "Spans and metric exports that a collector accepted",
            ["signal"],
            registry=registry,
        )
        self._dropped = Counter(
            "llamaclust_telemetry_dropped",
            "Spans and metric exports that were dropped",
            ["signal"],
            registry=registry,
        )
        for signal in ("traces", "metrics"):
            self.count(signal, 0, is_taken=True)
            self.count(signal, 0, is_taken=False)

    def count(self, signal: str, number: int, *, is_taken: bool) -> None:
        (self._exported if is_taken else self._dropped).labels(signal).inc(number)


class Exporter:
    def __init__(self, settings: TelemetrySettings, resource: Mapping[str, str], counts: ExportCounts) -> None:
        self._settings = settings
        self._resource = Resource(attributes=key_values(resource))
        self._counts = counts
        self._queue: Queue[Record | Sequence[MetricFamilies] | None] = Queue(settings.max_records)
        self._stopping = Event()
        self._end_s = 0.0  # Time at which the thread drops the remaining data.
        self._traces, self._metrics = self._client(settings.traces), self._client(settings.metrics)
        self._start_ns = time_ns()
        self._spans: list[Span] = []
        self._thread = Thread(target=self._run, name="telemetry", daemon=True)

    def _client(self, target: Target | None) -> OtlpClient | None:
        return None if target is None else OtlpClient(target, self._stopping)

    async def __aenter__(self) -> Exporter:
        self._thread.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._end_s = monotonic() + _FLUSH_S
        self._stopping.set()
        self._put(None)
        await asyncio.to_thread(self._thread.join, _FLUSH_S)

    def put_record(self, record: Record) -> None:
        if not self._put(record):
            self._counts.count("traces", record.span_count, is_taken=False)

    def put_metrics(self, taken: Sequence[MetricFamilies]) -> None:
        if not self._put(taken):
            self._counts.count("metrics", 1, is_taken=False)

    def _put(self, item: Record | Sequence[MetricFamilies] | None) -> bool:
        try:
            self._queue.put_nowait(item)
        except Full:
            return False
        return True

    # -- the thread ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._step()
            while not self._queue.empty():
                self._take(self._queue.get_nowait())
            self._send_spans()
        finally:
            for client in (self._traces, self._metrics):
                if client is not None:
                    client.close()

    def _step(self) -> None:
        self._take(self._queue.get())
        due_s = monotonic() + self._settings.span_delay_s
        while self._spans and not self._stopping.is_set():
            try:
                self._take(self._queue.get(timeout=max(0.0, due_s - monotonic())))
            except Empty:
                self._send_spans()

    def _take(self, item: Record | Sequence[MetricFamilies] | None) -> None:
        if item is None:
            return
        if isinstance(item, Sequence):
            with self._failure_counted("metrics", 1):
                self._send_metrics(item)
            return
        with self._failure_counted("traces", item.span_count):
            self._spans += spans_of(item, time_ns() - monotonic_ns())
        if len(self._spans) >= self._settings.max_spans:
            self._send_spans()

    @contextmanager
    def _failure_counted(self, signal: str, count: int) -> Iterator[None]:
        try:
            yield
        except Exception:  # noqa: BLE001  telemetry must not fail
            _log.exception("telemetry: %s could not be exported", signal)
            self._counts.count(signal, count, is_taken=False)

    def _send_spans(self) -> None:
        spans, self._spans = self._spans, []
        for start in range(0, len(spans), self._settings.max_spans):
            part = spans[start : start + self._settings.max_spans]
            with self._failure_counted("traces", len(part)):
                scope = ScopeSpans(scope=_SCOPE, spans=part)
                message = ExportTraceServiceRequest(
                    resource_spans=[ResourceSpans(resource=self._resource, scope_spans=[scope])]
                )
                is_taken = self._send(self._traces, message.SerializeToString())
                self._counts.count("traces", len(part), is_taken=is_taken)

    def _send_metrics(self, taken: Sequence[MetricFamilies]) -> None:
        metrics = otlp_metrics(taken, MetricTimes(self._start_ns, time_ns()))
        scope = ScopeMetrics(scope=_SCOPE, metrics=metrics)
        message = ExportMetricsServiceRequest(
            resource_metrics=[ResourceMetrics(resource=self._resource, scope_metrics=[scope])]
        )
        self._counts.count("metrics", 1, is_taken=self._send(self._metrics, message.SerializeToString()))

    def _send(self, client: OtlpClient | None, message: bytes) -> bool:
        left_s = self._end_s - monotonic() if self._stopping.is_set() else None
        if client is None or (left_s is not None and left_s <= 0):
            return False
        return client.send(message, left_s)
