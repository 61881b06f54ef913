"""Parses the W3C trace context, which names a request's trace and the parent span."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final

_TRACEPARENT: Final = re.compile(
    r"(?P<version>(?!ff)[0-9a-f]{2})-(?P<trace>(?!0{32})[0-9a-f]{32})-(?P<span>(?!0{16})[0-9a-f]{16})"
    r"-(?P<flags>[0-9a-f]{2})(?P<more>-[\x21-\x7e]*)?"
)
_SAMPLED: Final = 1
_MAX_CHARACTERS: Final = 256
_STATE: Final = re.compile(r"[\x20-\x7e]{0,512}")


@dataclass(frozen=True, slots=True)
class TraceContext:
    trace_id: bytes  # 16 bytes.
    span_id: bytes  # 8 bytes.
    is_sampled: bool
    state: str = ""  # Value of the `tracestate` header, which is passed on unchanged.

    @classmethod
    def parse(cls, traceparent: Sequence[str], tracestate: Sequence[str] = ()) -> TraceContext | None:
        """Parses the values of the headers. Returns None unless there is exactly one valid `traceparent`. Ignores an
        invalid `tracestate`."""
        if len(traceparent) != 1 or len(traceparent[0]) > _MAX_CHARACTERS:
            return None
        found = _TRACEPARENT.fullmatch(traceparent[0].strip())
        if found is None or (found["version"] == "00" and found["more"] is not None):
            return None
        state = ",".join(tracestate)
        is_sampled = bool(int(found["flags"], 16) & _SAMPLED)
        ids = bytes.fromhex(found["trace"]), bytes.fromhex(found["span"])
        return cls(*ids, is_sampled, state if _STATE.fullmatch(state) else "")

    @property
    def traceparent(self) -> str:
        return f"00-{self.trace_id.hex()}-{self.span_id.hex()}-{int(self.is_sampled):02x}"


current_trace: ContextVar[TraceContext | None] = ContextVar("trace", default=None)
"""Trace context of the request that the current task handles. None if the request is not traced."""
