"""Converts records to OTLP spans, which are named by OpenTelemetry's GenAI conventions. An HTTP request's span contains
its sequences' spans. A sequence's span contains its phases' spans. The span of a computing phase contains one span per
stage, whose length is the time that the stage took in the phase."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from llamaclust.cluster.engine.trace_context import TraceContext
from llamaclust.cluster.engine.waterfall import WaterfallPhase
from llamaclust.cluster.engine.waterfall_json import SHOWN_CHARACTERS
from llamaclust.cluster.server.telemetry.records import EndedSequence, Record, ServedRequest
from llamaclust.cluster.server.telemetry.trace_sampler import SPAN_ID_BYTES

Value = str | bool | int | float | Sequence[str]

PROVIDER: Final = "llamaclust"
_SAMPLED, _KNOWS_REMOTE, _IS_REMOTE = 0x1, 0x100, 0x200
_SERVER_ERROR: Final = 500
_ERROR: Final = "error"


def key_values(attributes: Mapping[str, Value]) -> list[KeyValue]:
    return [KeyValue(key=key, value=_any_value(value)) for key, value in attributes.items()]


def _any_value(value: Value) -> AnyValue:
    match value:
        case bool():
            return AnyValue(bool_value=value)
        case str():
            return AnyValue(string_value=value)
        case int():
            return AnyValue(int_value=value)
        case float():
            return AnyValue(double_value=value)
        case _:
            return AnyValue(array_value=ArrayValue(values=[AnyValue(string_value=text) for text in value]))


def spans_of(record: Record, unix_ns: int) -> list[Span]:
    """Converts a record to spans. `unix_ns` is the Unix time (ns) at which the monotonic clock was 0."""
    if isinstance(record, ServedRequest):
        return [_request_span(record, unix_ns)]
    return list(_sequence_spans(record, unix_ns))


def _request_span(request: ServedRequest, unix_ns: int) -> Span:
    trace, status = request.trace, request.status
    attributes: dict[str, Value] = {"http.request.method": request.method, "http.route": request.route}
    if status is not None:
        attributes["http.response.status_code"] = status
    failed = None if status is None or status < _SERVER_ERROR else str(status)
    span = _span(f"{request.method} {request.route}", trace.own, attributes, failed=failed)
    span.span_id, span.parent_span_id = trace.own.span_id, trace.parent_span_id
    span.kind = Span.SPAN_KIND_SERVER
    if trace.parent is not None:
        span.flags |= _IS_REMOTE
    _set_times(span, unix_ns + request.start_ns, unix_ns + request.end_ns)
    return span


def _sequence_spans(ended: EndedSequence, unix_ns: int) -> Iterator[Span]:
    record, waterfall = ended.record, ended.record.waterfall
    failed = _ERROR if record.end == _ERROR else None
    sequence = _span(f"{ended.operation} {ended.model}", ended.trace, _sequence_attributes(ended), failed=failed)
    start_ns = unix_ns + waterfall.start_ns
    _set_times(sequence, start_ns, start_ns + round(record.seconds * 1e9))
    yield sequence
    for phase in waterfall.phases:
        yield from _phase_spans(phase, sequence, unix_ns)


def _sequence_attributes(ended: EndedSequence) -> dict[str, Value]:
    record, timings = ended.record, ended.record.timings
    attributes: dict[str, Value] = {
        "gen_ai.operation.name": ended.operation.value,
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.request.model": ended.model,
        "gen_ai.response.model": ended.model,
        "gen_ai.usage.input_tokens": timings.prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": timings.cached_tokens,
        "gen_ai.usage.output_tokens": timings.generated_tokens,
        "llamaclust.request.id": record.request_id[:SHOWN_CHARACTERS],
        **{f"gen_ai.request.{name}": value for name, value in ended.parameters.items()},
    }
    if record.end is not None and record.end != _ERROR:
        attributes["gen_ai.response.finish_reasons"] = [record.end]
    if timings.generated_tokens:
        attributes["gen_ai.response.time_to_first_chunk"] = timings.ttft_ms / 1e3
    return attributes


def _phase_spans(phase: WaterfallPhase, sequence: Span, unix_ns: int) -> Iterator[Span]:
    attributes: dict[str, Value] = {}
    if phase.microbatches:
        attributes = {
            "llamaclust.tokens": phase.tokens,
            "llamaclust.microbatches": phase.microbatches,
            "llamaclust.links_seconds": phase.links_ns / 1e9,
            "llamaclust.idle_seconds": phase.idle_ns / 1e9,
        }
    span = _below(sequence, phase.kind.value, attributes)
    at_ns = unix_ns + phase.start_ns
    _set_times(span, at_ns, at_ns + phase.ns)
    yield span
    for index, stage in enumerate(phase.stages):
        compute, queue, wire = phase.stage_ns(index)
        times: dict[str, Value] = {
            "llamaclust.worker.name": stage.worker,
            "llamaclust.stage.index": index,
            "llamaclust.layers.start": stage.layers[0],
            "llamaclust.layers.end": stage.layers[1],
            "llamaclust.compute_seconds": compute / 1e9,
            "llamaclust.queue_seconds": queue / 1e9,
            "llamaclust.send_seconds": wire / 1e9,
        }
        child = _below(span, f"stage {index}: {stage.worker}", times)
        end_ns = at_ns + round(compute + queue + wire)
        _set_times(child, at_ns, end_ns)
        at_ns = end_ns
        yield child


def _span(name: str, trace: TraceContext, attributes: Mapping[str, Value], *, failed: str | None) -> Span:
    span = Span(
        trace_id=trace.trace_id,
        span_id=secrets.token_bytes(SPAN_ID_BYTES),
        parent_span_id=trace.span_id,
        trace_state=trace.state,
        flags=_SAMPLED | _KNOWS_REMOTE,
        name=name,
        kind=Span.SPAN_KIND_INTERNAL,
        attributes=key_values(attributes),
    )
    if failed is not None:
        span.attributes.extend(key_values({"error.type": failed}))
        span.status.code = Status.STATUS_CODE_ERROR
    return span


def _below(parent: Span, name: str, attributes: Mapping[str, Value]) -> Span:
    trace = TraceContext(parent.trace_id, parent.span_id, is_sampled=True, state=parent.trace_state)
    return _span(name, trace, attributes, failed=None)


def _set_times(span: Span, start_ns: int, end_ns: int) -> None:
    span.start_time_unix_nano, span.end_time_unix_nano = start_ns, max(start_ns, end_ns)
