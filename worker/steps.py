"""What the compute thread does with one microbatch: frame in; frame for the next stage, or result, out."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from time import perf_counter_ns

from llamaclust.errors import LlamaclustError, WireError
from llamaclust.kernels.backend import Float32
from llamaclust.wire.bounds import one_line
from llamaclust.wire.codec import encode_result
from llamaclust.wire.frames import Frame, FrameKind, encode_failure, encode_hidden
from llamaclust.wire.messages import Microbatch, Result, StageTiming
from llamaclust.worker.inputs import InputsBox
from llamaclust.worker.stage_runner import StageRunner

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Counters:
    """What a worker has done since its start."""

    busy_ns: int = 0
    microbatches: int = 0
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Arrival:
    """A microbatch as it came in; `wire_ns` is what handing on the one before it took."""

    frame: Frame
    microbatch: Microbatch
    received_ns: int
    wire_ns: int


class StageStep:
    """The step of one stage. A microbatch that cannot be computed is answered with its failure, in its turn."""

    def __init__(self, runner: StageRunner, worker: str, inputs: InputsBox, counters: Counters) -> None:
        program = runner.program
        self._runner = runner
        self._where = f"worker {worker} (layers [{program.start}, {program.end}))"
        self._inputs = inputs
        self._counters = counters
        self._width = 0 if program.is_first else program.hidden.width
        self._answer = self._last if program.is_last else self._middle

    def run(self, arrival: Arrival) -> bytes:
        """WireError where the frame itself breaks the protocol."""
        if arrival.frame.kind is FrameKind.FAILURE:
            return self._failed(arrival, arrival.frame.failure)
        try:
            return self._answer(arrival, perf_counter_ns())
        except WireError:
            raise
        except LlamaclustError as error:
            _log.error("microbatch %d: %s", arrival.microbatch.number, error)
            return self._failed(arrival, f"{self._where}: {error}")
        except Exception as error:  # noqa: BLE001  a border: one microbatch fails, the worker serves on
            _log.exception("microbatch %d failed", arrival.microbatch.number)
            return self._failed(arrival, one_line(f"{self._where}: {type(error).__name__}: {error}"))

    def _compute(self, arrival: Arrival) -> Float32:
        rows = arrival.microbatch.rows
        hidden = arrival.frame.hidden(rows, self._width)
        return self._runner.run(arrival.microbatch, hidden if self._width else None)

    def _middle(self, arrival: Arrival, started_ns: int) -> bytes:
        hidden = self._compute(arrival)
        timings = self._timings(arrival, started_ns, perf_counter_ns() - started_ns)
        return encode_hidden(arrival.frame.header, timings, hidden)

    def _last(self, arrival: Arrival, started_ns: int) -> bytes:
        microbatch = arrival.microbatch
        logits = self._compute(arrival)
        waits_ns = perf_counter_ns()
        inputs = self._inputs.take(microbatch.number)
        waited_ns = perf_counter_ns() - waits_ns
        rows = self._runner.finish(logits, inputs)
        timings = self._timings(arrival, started_ns, perf_counter_ns() - started_ns - waited_ns)
        return encode_result(Result(microbatch.epoch, microbatch.number, rows, timings))

    def _timings(self, arrival: Arrival, started_ns: int, compute_ns: int) -> tuple[StageTiming, ...]:
        rows = arrival.microbatch.rows
        self._counters.busy_ns += compute_ns
        self._counters.microbatches += 1
        self._counters.tokens += rows
        queue_ns = started_ns - arrival.received_ns
        return (*arrival.frame.timings, StageTiming(queue_ns, compute_ns, arrival.wire_ns, rows))

    def _failed(self, arrival: Arrival, failure: str) -> bytes:
        microbatch, timings = arrival.microbatch, arrival.frame.timings
        if not self._runner.program.is_last:
            return encode_failure(arrival.frame.header, timings, failure)
        self._inputs.discard(microbatch.number)
        return encode_result(Result(microbatch.epoch, microbatch.number, (), timings, failure))
