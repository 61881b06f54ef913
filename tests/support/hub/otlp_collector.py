"""A collector of OpenTelemetry in this process: an HTTP server that decodes OTLP, and misbehaves on demand."""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import Span


def values(attributes: Any) -> dict[str, Any]:
    """Attributes of a span, a resource or a data point."""
    return {attribute.key: _value(attribute.value) for attribute in _key_values(attributes)}


def _key_values(attributes: Any) -> Iterator[KeyValue]:
    yield from attributes


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    assert kind is not None
    if kind == "array_value":
        return [_value(part) for part in value.array_value.values]
    return getattr(value, kind)


@dataclass
class OtlpCollector:
    """The data that a collector got. `statuses`: of the next replies, 200 after them; replies wait for `gate`."""

    url: str = ""
    spans: list[Span] = field(default_factory=list)
    metrics: list[Metric] = field(default_factory=list)
    resources: list[Resource] = field(default_factory=list)
    headers: list[Mapping[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    gate: Event = field(default_factory=Event)

    def take(self, path: str, headers: Mapping[str, str], body: bytes) -> int:
        """Takes a request and returns the status of the reply."""
        self.paths.append(path)
        self.headers.append(headers)
        self.gate.wait()
        status = self.statuses.pop(0) if self.statuses else 200
        if status == 200:
            self._decode(path, body)
        return status

    def _decode(self, path: str, body: bytes) -> None:
        if path.endswith("/v1/traces"):
            for traces in ExportTraceServiceRequest.FromString(body).resource_spans:
                self.resources.append(traces.resource)
                self.spans += [span for scope in traces.scope_spans for span in scope.spans]
        else:
            assert path.endswith("/v1/metrics"), path
            for metrics in ExportMetricsServiceRequest.FromString(body).resource_metrics:
                self.resources.append(metrics.resource)
                self.metrics += [metric for scope in metrics.scope_metrics for metric in scope.metrics]

    def named(self, beginning: str) -> list[Span]:
        """Returns spans whose names begin with `beginning`, in the order of their starts."""
        found = (span for span in list(self.spans) if span.name.startswith(beginning))
        return sorted(found, key=lambda span: span.start_time_unix_nano)

    def below(self, parent: Span) -> list[Span]:
        found = (span for span in list(self.spans) if span.parent_span_id == parent.span_id)
        return sorted(found, key=lambda span: span.start_time_unix_nano)

    def metric(self, name: str) -> Metric:
        """Returns a metric as it was sent last."""
        return [metric for metric in self.metrics if metric.name == name][-1]


@contextmanager
def otlp_collector() -> Iterator[OtlpCollector]:
    collector = OtlpCollector()
    collector.gate.set()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers["content-encoding"] == "gzip":
                body = gzip.decompress(body)
            headers = {name.lower(): value for name, value in self.headers.items()}
            status = collector.take(self.path, headers, body)
            self.send_response(status)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    collector.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield collector
    finally:
        collector.gate.set()
        server.shutdown()
        server.server_close()
        thread.join()
