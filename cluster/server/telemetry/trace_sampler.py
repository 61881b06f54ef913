"""Decides which requests are traced, and begins their traces."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from llamaclust.cluster.engine.trace_context import TraceContext

_TRACE_ID_BYTES, SPAN_ID_BYTES = 16, 8
_COUNTED_BITS = 64
"""Number of low bits of the trace id that decide whether a request is traced."""


@dataclass(frozen=True, slots=True)
class RequestTrace:
    own: TraceContext
    parent: TraceContext | None

    @property
    def parent_span_id(self) -> bytes:
        return b"" if self.parent is None else self.parent.span_id


@dataclass(frozen=True, slots=True)
class TraceSampler:
    """A sampler that traces the fraction `ratio` of all requests. If `obeys_parent` is true and a request
    has a trace context, that context decides instead."""

    ratio: float = 1.0
    obeys_parent: bool = True

    def begin(self, traceparent: Sequence[str], tracestate: Sequence[str]) -> RequestTrace | None:
        parent = TraceContext.parse(traceparent, tracestate)
        trace_id = secrets.token_bytes(_TRACE_ID_BYTES) if parent is None else parent.trace_id
        is_sampled = parent.is_sampled if parent is not None and self.obeys_parent else self._keeps(trace_id)
        if not is_sampled:
            return None
        state = "" if parent is None else parent.state
        return RequestTrace(
            TraceContext(trace_id, secrets.token_bytes(SPAN_ID_BYTES), is_sampled=True, state=state), parent
        )

    def _keeps(self, trace_id: bytes) -> bool:
        counted = int.from_bytes(trace_id, "big") & ((1 << _COUNTED_BITS) - 1)
        return counted < round(self.ratio * (1 << _COUNTED_BITS))
