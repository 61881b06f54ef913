"""Defines the exported records of HTTP requests, sequences and metrics. They contain no text, tokens or API keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Metric

from llamaclust.cluster.engine.trace_context import TraceContext
from llamaclust.cluster.engine.waterfalls import RequestRecord
from llamaclust.cluster.scheduler.requests import GenerationRequest, Operation
from llamaclust.cluster.server.telemetry.trace_sampler import RequestTrace


@dataclass(frozen=True, slots=True)
class ServedRequest:
    """A finished HTTP request. Times are monotonic. `route` is the path with placeholders for parameters."""

    trace: RequestTrace
    method: str
    route: str
    start_ns: int
    end_ns: int
    status: int | None  # None if the connection ended before a reply.

    @property
    def span_count(self) -> int:
        return 1


@dataclass(frozen=True, slots=True)
class EndedSequence:
    """A finished sequence of a traced request. `parameters` maps attribute names to sampling parameters."""

    trace: TraceContext
    record: RequestRecord
    model: str
    operation: Operation
    parameters: Mapping[str, int | float]

    @classmethod
    def of(cls, record: RequestRecord, request: GenerationRequest, trace: TraceContext, model: str) -> EndedSequence:
        return cls(trace, record, model, request.operation, _parameters(request))

    @property
    def span_count(self) -> int:
        return 1 + sum(1 + len(phase.stages) for phase in self.record.waterfall.phases)


Record = ServedRequest | EndedSequence


@dataclass(frozen=True, slots=True)
class MetricFamilies:
    model: str | None  # None for metrics of the whole cluster.
    families: Sequence[Metric]

    @classmethod
    def of(cls, model: str | None, registry: CollectorRegistry) -> MetricFamilies:
        return cls(model, [*registry.collect()])


def _parameters(request: GenerationRequest) -> dict[str, int | float]:
    if request.operation is Operation.EMBEDDINGS:
        return {}
    params = request.params
    given: dict[str, int | float] = {"max_tokens": request.max_new_tokens, "temperature": params.temperature}
    if params.temperature:
        given |= {"top_p": params.top_p, "top_k": params.top_k}
    given |= {"frequency_penalty": params.frequency_penalty, "presence_penalty": params.presence_penalty}
    return {name: value for name, value in given.items() if value or name in ("max_tokens", "temperature")}
