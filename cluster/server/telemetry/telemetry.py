"""Exports a coordinator's telemetry: traces of requests and periodic metrics."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry
from starlette.types import ASGIApp

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.config.environment import otel_variables
from llamaclust.cluster.engine.engine import Engine
from llamaclust.cluster.engine.trace_context import TraceContext
from llamaclust.cluster.engine.waterfalls import RequestRecord
from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.cluster.server.telemetry.records import EndedSequence, MetricFamilies
from llamaclust.cluster.server.telemetry.settings import TelemetrySettings
from llamaclust.cluster.server.telemetry.traced_requests import TracedRequests
from llamaclust.core.errors import UsageError
from llamaclust.core.version import VERSION

if TYPE_CHECKING:
    from llamaclust.cluster.server.telemetry.exporter import Exporter

_LIBRARY = "opentelemetry.proto"


def _check_installed() -> None:
    try:
        is_found = find_spec(_LIBRARY) is not None
    except ModuleNotFoundError:
        is_found = False
    if not is_found:
        raise UsageError("telemetry needs opentelemetry-proto: pip install 'llamaclust[otel]'")


def resolve_telemetry(config: ClusterConfig) -> TelemetrySettings | None:
    """Returns the settings, or None if nothing is exported. Raises UsageError if a value is invalid or the library is
    missing."""
    settings = TelemetrySettings.resolve(config.telemetry, otel_variables())
    if settings is not None:
        _check_installed()
    return settings


class Telemetry:
    def __init__(self, settings: TelemetrySettings, exporter: Exporter) -> None:
        self._settings = settings
        self._exporter = exporter

    def traced(self, app: ASGIApp) -> ASGIApp:
        if self._settings.traces is None:
            return app
        return TracedRequests(app, self._settings.sampler, self._exporter.put_record)


class _ModelSpans:
    def __init__(self, model: str, exporter: Exporter) -> None:
        self._model = model
        self._exporter = exporter

    def ended(self, record: RequestRecord, request: GenerationRequest, trace: TraceContext) -> None:
        self._exporter.put_record(EndedSequence.of(record, request, trace, self._model))


@asynccontextmanager
async def open_telemetry(
    settings: TelemetrySettings, cluster: str, engines: Mapping[str, Engine], registry: CollectorRegistry
) -> AsyncIterator[Telemetry]:
    """Exports telemetry while the context is open. `engines` has the engines by model name. `registry` has the
    cluster's metrics; export counters are added to it."""
    from llamaclust.cluster.server.telemetry.exporter import ExportCounts, Exporter

    resource = {"service.version": VERSION, "service.instance.id": cluster, **settings.resource}
    counts = ExportCounts(registry)
    async with Exporter(settings, resource, counts) as exporter:
        for model, engine in engines.items():
            if settings.traces is not None:
                engine.waterfalls.spans = _ModelSpans(model, exporter)
        exporting = asyncio.create_task(_export_metrics(settings, exporter, engines, registry))
        try:
            yield Telemetry(settings, exporter)
        finally:
            exporting.cancel()
            for engine in engines.values():
                engine.waterfalls.spans = None
            if settings.metrics is not None:
                exporter.put_metrics(_metrics_of(engines, registry))


def _metrics_of(engines: Mapping[str, Engine], registry: CollectorRegistry) -> list[MetricFamilies]:
    models = [MetricFamilies.of(model, engine.metrics.registry) for model, engine in engines.items()]
    return [MetricFamilies.of(None, registry), *models]


async def _export_metrics(
    settings: TelemetrySettings, exporter: Exporter, engines: Mapping[str, Engine], registry: CollectorRegistry
) -> None:
    while settings.metrics is not None:
        await asyncio.sleep(settings.metrics_interval_s)
        exporter.put_metrics(_metrics_of(engines, registry))
