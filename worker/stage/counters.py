from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    busy_ns: int = 0
    microbatches: int = 0
    tokens: int = 0
    received_bytes: int = 0
    sent_bytes: int = 0
