"""What a plan says: who holds which layers, what that takes, and how fast it should be. Values only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StagePlan:
    """Layers [start, end) on a worker. Times are predictions; None where something was not measured."""

    worker: str
    start: int
    end: int
    weight_bytes: int
    kv_bytes: int
    workspace_bytes: int
    memory_bytes: int | None  # what the worker may take; None: unknown
    decode_ms: float | None  # of one token of one sequence
    prefill_ms: float | None  # of each prompt token

    @property
    def bytes(self) -> int:
        """All that the stage takes."""
        return self.weight_bytes + self.kv_bytes + self.workspace_bytes


@dataclass(frozen=True, slots=True)
class Spare:
    """A worker without layers, and why."""

    worker: str
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """Stages in order, from the embedding to the head. Predictions are None where something was not measured."""

    stages: tuple[StagePlan, ...]
    kv_blocks: int
    context_length: int
    token_ms: float | None  # from token to token of one sequence alone
    ttft_ms: float | None  # first token after a prompt of 512 tokens
    tokens_per_s: float | None  # of as many sequences as may run together
    limiting: str | None  # worker whose stage takes longest
    spares: tuple[Spare, ...]
