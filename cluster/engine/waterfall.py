"""Divides a sequence's time into phases such as prefill, and computing phases into stage, link and idle time."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from operator import add

from llamaclust.cluster.engine.pipeline import StageInfo
from llamaclust.wire.microbatch.messages import Chunk, StageTiming

PARTS = 3

_MERGED_FROM, _MOST = 32, 64


class PhaseKind(StrEnum):
    PREPARATION = "preparation"  # Time for the chat template, tokenization and the grammar.
    WAITING = "waiting"  # Time of waiting for a turn, for KV memory, or for KV blocks from disk.
    PREFILL = "prefill"
    DECODE = "decode"
    RECOMPUTATION = "recomputation"  # Time to compute tokens again after a loss, a move or a preemption.
    RECOVERY = "recovery"  # Time from the loss of a worker until another plan serves.
    LOADING = "loading"  # Time in which the model was not loaded.


_RECOMPUTATION, _PREFILL, _DECODE = PhaseKind.RECOMPUTATION, PhaseKind.PREFILL, PhaseKind.DECODE


@dataclass(slots=True)
class WaterfallPhase:
    """A phase in a sequence's timeline. `ns` is its duration. If nothing was computed, the fields after `ns` stay 0."""

    kind: PhaseKind
    start_ns: int
    stages: tuple[StageInfo, ...] = ()
    ns: int = 0
    microbatches: int = 0
    tokens: int = 0
    idle_ns: int = 0  # Time in which nothing of the sequence was in flight.
    links_ns: int = 0  # Time on links between stages and in the coordinator.
    stages_ns: list[float] = field(default_factory=list)  # Three times per stage: compute, queue and wire.

    def stage_ns(self, stage: int) -> list[float]:
        return self.stages_ns[PARTS * stage : PARTS * (stage + 1)]


@dataclass(frozen=True, slots=True)
class ComputedMicrobatch:
    stages: tuple[StageInfo, ...]
    sent_ns: int
    done_ns: int
    stages_ns: Sequence[float]  # Three times per stage: compute, queue and wire.
    measured_ns: int  # Sum of `stages_ns`.

    @classmethod
    def of(
        cls, stages: tuple[StageInfo, ...], timings: tuple[StageTiming, ...], sent_ns: int, done_ns: int
    ) -> ComputedMicrobatch:
        """Converts a result's stage timings. If the timings of a stage are missing, all time counts as link time."""
        if len(timings) != len(stages):
            return cls((), sent_ns, done_ns, (), 0)
        parts = tuple(ns for timing in timings for ns in (timing.compute_ns, timing.queue_ns, timing.wire_ns))
        return cls(stages, sent_ns, done_ns, parts, sum(parts))


class Waterfall:
    __slots__ = ("_at_ns", "_prompt_length", "_reached", "phases", "start_ns")

    def __init__(self, received_ns: int, arrived_ns: int, prompt_length: int) -> None:
        self.start_ns = self._at_ns = min(received_ns, arrived_ns)
        self.phases: deque[WaterfallPhase] = deque(maxlen=_MOST)
        self._prompt_length = prompt_length
        self._reached = 0  # Number of tokens that have been computed.
        self.pass_until(arrived_ns, PhaseKind.PREPARATION)

    def pass_until(self, now_ns: int, kind: PhaseKind | None = None) -> None:
        passed = now_ns - self._at_ns
        if passed <= 0:
            return
        last = self.phases[-1] if self.phases else None
        if kind is None and last is not None and last.microbatches:
            last.idle_ns += passed
        else:
            last = self._phase(kind or PhaseKind.WAITING, ())
        last.ns += passed
        self._at_ns = now_ns

    def add(self, microbatch: ComputedMicrobatch, chunk: Chunk, drafted: int = 0) -> None:
        """Adds a microbatch and the idle time before it. The last `drafted` tokens do not count as computed."""
        end = chunk.position + len(chunk.tokens)
        kind = self._kind(chunk.position)
        self._reached = max(self._reached, end - drafted)
        if kind is not _DECODE and not self._continues(kind, microbatch.stages):
            self.pass_until(microbatch.sent_ns, PhaseKind.WAITING)
        phase, at_ns = self._phase(kind, microbatch.stages), self._at_ns
        begun_ns = max(microbatch.sent_ns, at_ns)
        spent, measured, parts = microbatch.done_ns - begun_ns, microbatch.measured_ns, microbatch.stages_ns
        if measured > spent:
            parts = [ns * spent / measured for ns in parts]
        phase.stages_ns = [*map(add, phase.stages_ns, parts)]
        phase.links_ns += max(0, spent - measured)
        phase.idle_ns += begun_ns - at_ns
        phase.ns += microbatch.done_ns - at_ns
        phase.microbatches += 1
        phase.tokens += end - chunk.position
        self._at_ns = microbatch.done_ns

    def _kind(self, position: int) -> PhaseKind:
        if position < self._reached:
            return _RECOMPUTATION
        return _PREFILL if position < self._prompt_length else _DECODE

    def _continues(self, kind: PhaseKind, stages: tuple[StageInfo, ...]) -> bool:
        if not self.phases:
            return False
        last = self.phases[-1]
        return last.kind is kind and last.stages == stages

    def _phase(self, kind: PhaseKind, stages: tuple[StageInfo, ...]) -> WaterfallPhase:
        if self._continues(kind, stages):
            return self.phases[-1]
        if len(self.phases) >= _MERGED_FROM:
            for phase in reversed(self.phases):
                if (phase.kind, phase.stages) == (kind, stages):
                    return phase
        phase = WaterfallPhase(kind, self._at_ns, stages, stages_ns=[0.0] * (PARTS * len(stages)))
        self.phases.append(phase)
        return phase
