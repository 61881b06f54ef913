"""Owns the waterfalls (time lines) of open and recently ended requests. They contain no text and no tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Protocol

from llamaclust.cluster.engine.trace_context import TraceContext, current_trace
from llamaclust.cluster.engine.waterfall import ComputedMicrobatch, PhaseKind, Waterfall
from llamaclust.cluster.scheduler.requests import FinishReason, GenerationRequest, Timings
from llamaclust.cluster.scheduler.rows.slice import SequenceSlice
from llamaclust.cluster.scheduler.sequences import Sequence
from llamaclust.core.limits import AdapterScales

_ENDED = 256
_EMBEDDED = "embedded"


@dataclass(frozen=True, slots=True)
class RequestRecord:
    request_id: str
    end: str | None  # A finish reason, "embedded" or "error". None if the request has not ended.
    seconds: float  # Seconds since the client's HTTP request arrived.
    timings: Timings
    waterfall: Waterfall
    adapters: AdapterScales = ()


class SpanSink(Protocol):
    """Creates spans for traced requests. Methods are called on the event loop and must return at once."""

    def ended(self, record: RequestRecord, request: GenerationRequest, trace: TraceContext) -> None: ...


@dataclass(frozen=True, slots=True)
class _Open:
    sequence: Sequence
    waterfall: Waterfall
    trace: TraceContext | None  # None if the request is not traced.


class Waterfalls:
    """Records the waterfalls of an engine's requests."""

    def __init__(self) -> None:
        self.spans: SpanSink | None = None  # None if telemetry is off.
        self._open: dict[int, _Open] = {}  # Open requests by key of the sequence.
        self._ended: deque[RequestRecord] = deque(maxlen=_ENDED)
        # Phase that the current time without a pipeline counts as. None if there is a pipeline.
        self._idle_kind: PhaseKind | None = None

    def opened(self, sequence: Sequence) -> None:
        received_ns = sequence.request.received_ns or sequence.usage.arrived_ns
        waterfall = Waterfall(received_ns, sequence.usage.arrived_ns, sequence.prompt_length)
        self._open[sequence.key] = _Open(sequence, waterfall, None if self.spans is None else current_trace.get())

    def ended(self, key: int, reason: str, now_ns: int) -> None:
        ended = self._open.pop(key)
        is_embedded = ended.sequence.request.embedded is not None and reason == FinishReason.LENGTH
        record = self._record(ended.sequence, ended.waterfall, _EMBEDDED if is_embedded else reason, now_ns)
        self._ended.append(record)
        if self.spans is not None and ended.trace is not None:
            self.spans.ended(record, ended.sequence.request, ended.trace)

    def computed(self, slices: Iterable[SequenceSlice], microbatch: ComputedMicrobatch) -> None:
        for taken in slices:
            found = self._open.get(taken.sequence.key)
            if found is not None:  # The sequence may have been aborted, or may be a copy of another lane's sequence.
                found.waterfall.add(microbatch, taken.chunk, taken.drafted)

    def lost(self, now_ns: int) -> None:
        self._pass_until(now_ns)
        self._idle_kind = PhaseKind.RECOVERY

    def unloaded(self, now_ns: int) -> None:
        self._pass_until(now_ns)
        self._idle_kind = PhaseKind.LOADING

    def resumed(self, now_ns: int) -> None:
        self._pass_until(now_ns)
        self._idle_kind = None

    def records(self, now_ns: int) -> list[RequestRecord]:
        running = [
            self._record(running.sequence, deepcopy(running.waterfall), None, now_ns) for running in self._open.values()
        ]
        return [*self._ended, *running]

    def _pass_until(self, now_ns: int) -> None:
        for running in self._open.values():
            running.waterfall.pass_until(now_ns, self._idle_kind)

    def _record(self, sequence: Sequence, waterfall: Waterfall, end: str | None, now_ns: int) -> RequestRecord:
        waterfall.pass_until(now_ns, self._idle_kind)
        seconds = (now_ns - waterfall.start_ns) / 1e9
        request = sequence.request
        return RequestRecord(request.request_id, end, seconds, sequence.timings(), waterfall, request.adapters)
