"""One microbatch through a stage: frame in; frame for the next stage, or result for the coordinator, out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from time import perf_counter_ns
from typing import TypeVar

from llamaclust.core.bounds import one_line
from llamaclust.core.errors import DeviceLostError, LlamaclustError, ProtocolError
from llamaclust.kernels.backend import Float32
from llamaclust.wire.microbatch.codec import encode_result
from llamaclust.wire.microbatch.frames import Frame, FrameKind, encode_failure, encode_hidden
from llamaclust.wire.microbatch.messages import Microbatch, Result, SampledTokens, SamplingInputs, StageTiming
from llamaclust.worker.stage.compute import INLINE_NS, Compute
from llamaclust.worker.stage.sampled_tokens import SampledTokensBox, sampled_tokens_of
from llamaclust.worker.stage.sampling_inputs import SamplingInputsBox
from llamaclust.worker.stage.stage_runner import StageRunner

_log = logging.getLogger(__name__)

_TOKENS_S = 600.0
"""A microbatch waits so long for tokens that it depends on; a coordinator that misses a result gives up earlier."""

_Answer = TypeVar("_Answer")


@dataclass(slots=True)
class Counters:
    """Totals of a worker since its start."""

    busy_ns: int = 0
    microbatches: int = 0
    tokens: int = 0
    received_bytes: int = 0
    sent_bytes: int = 0


@dataclass(frozen=True, slots=True)
class StageContext:
    """Shared by the stages of one membership."""

    worker: str
    compute: Compute
    counters: Counters


@dataclass(frozen=True, slots=True)
class Arrival:
    """A microbatch as received; `wire_ns`: time to send the one before it."""

    frame: Frame
    microbatch: Microbatch
    received_ns: int
    wire_ns: int


@dataclass(frozen=True, slots=True)
class Answer:
    """Bytes to send on; of a last stage also the sampled tokens."""

    data: bytes
    sampled: SampledTokens | None = None


class StageExecutor:
    """Computes the microbatches of one stage. A microbatch that fails is answered with its failure, in its turn."""

    def __init__(
        self,
        runner: StageRunner,
        context: StageContext,
        inputs: SamplingInputsBox,
        sampled: SampledTokensBox,
    ) -> None:
        program = runner.program
        self._runner = runner
        self._where = f"worker {context.worker} (layers [{program.start}, {program.end}))"
        self.inputs = inputs
        self.sampled = sampled
        self._compute = context.compute
        self._counters = context.counters
        self._is_whole = program.is_first and program.is_last
        self._width = 0 if program.is_first else program.hidden.width
        self._taken_ns: dict[tuple[str, int, int], int] = {}  # by job and number of bits in rows and attended keys

    async def begin(self, arrival: Arrival) -> asyncio.Future[Answer]:
        """Returns when the next microbatch may begin: with the answer, or while the thread computes it.

        So steps of a whole model that are sent ahead follow each other on that thread without a pause, while messages
        come and go on the event loop. The answer is a ProtocolError where the frame itself breaks the protocol.
        """
        microbatch = arrival.microbatch
        is_lookahead = any(chunk.depends_on for chunk in microbatch.chunks)
        answered: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        try:
            if is_lookahead and self._is_whole and arrival.frame.kind is not FrameKind.FAILURE:
                inputs = await self.inputs.take(microbatch.number)
                return self._compute.queue(partial(self._guarded, arrival, partial(self._both, arrival, inputs)))
            answered.set_result(await self._answer(arrival))
        except Exception as error:  # noqa: BLE001  a border, see there
            answered.set_result(self._failure(arrival, error))
        finally:
            self.inputs.done(microbatch.number)
        return answered

    def _guarded(self, arrival: Arrival, job: Callable[[], Answer]) -> Answer:
        try:
            return job()
        except Exception as error:  # noqa: BLE001  a border, see there
            return self._failure(arrival, error)

    def _failure(self, arrival: Arrival, error: Exception) -> Answer:
        """One microbatch fails, the worker serves on."""
        if isinstance(error, ProtocolError):
            raise error
        if isinstance(error, DeviceLostError):
            self._compute.give_up(error)
        if isinstance(error, LlamaclustError):
            _log.error("microbatch %d: %s", arrival.microbatch.number, error)
            return self._failed(arrival, f"{self._where}: {error}")
        _log.error("microbatch %d failed", arrival.microbatch.number, exc_info=error)
        return self._failed(arrival, one_line(f"{self._where}: {type(error).__name__}: {error}"))

    def _both(self, arrival: Arrival, inputs: SamplingInputs) -> Answer:
        """A whole model's step, in the thread that computes."""
        microbatch, started_ns = arrival.microbatch, perf_counter_ns()
        ready_ns = max(arrival.received_ns, self.sampled.came_ns(microbatch))
        logits = self._run(arrival)
        rows = self._runner.finish(logits, self.sampled.fill_inputs(inputs, microbatch))
        timings = self._timings(arrival, started_ns - ready_ns, perf_counter_ns() - started_ns)
        return self._result(Result(microbatch.epoch, microbatch.number, rows, timings))

    async def _answer(self, arrival: Arrival) -> Answer:
        microbatch = arrival.microbatch
        if arrival.frame.kind is FrameKind.FAILURE:
            return self._failed(arrival, arrival.frame.failure)
        if self._runner.program.is_first and not self._is_whole:
            await self.sampled.known(microbatch, _TOKENS_S)
        ready_ns = max(arrival.received_ns, self.sampled.came_ns(microbatch))
        size, attended = microbatch.rows.bit_length(), _attended_keys(microbatch).bit_length()
        out, started_ns, compute_ns = await self._timed(("run", size, attended), partial(self._run, arrival))
        queue_ns = started_ns - ready_ns
        if not self._runner.program.is_last:
            timings = self._timings(arrival, queue_ns, compute_ns)
            return Answer(encode_hidden(arrival.frame.header, timings, out))
        inputs = self.sampled.fill_inputs(await self.inputs.take(microbatch.number), microbatch)
        rows, _, finish_ns = await self._timed(("finish", size, 0), partial(self._runner.finish, out, inputs))
        timings = self._timings(arrival, queue_ns, compute_ns + finish_ns)
        return self._result(Result(microbatch.epoch, microbatch.number, rows, timings))

    def _run(self, arrival: Arrival) -> Float32:
        hidden = arrival.frame.hidden(arrival.microbatch.rows, self._width)
        if self._runner.program.is_first:
            return self._runner.run(self.sampled.fill(arrival.microbatch), None)
        return self._runner.run(arrival.microbatch, hidden)

    def _result(self, result: Result) -> Answer:
        sampled = sampled_tokens_of(result.number, result.rows)
        if result.rows:
            self.sampled.put(sampled)
        return Answer(encode_result(result), sampled if result.rows or result.failure else None)

    async def _timed(self, kind: tuple[str, int, int], job: Callable[[], _Answer]) -> tuple[_Answer, int, int]:
        """What `job` returns, when it began, what it took: as long as the last of its kind, it is expected."""

        def timed() -> tuple[_Answer, int, int]:
            begun_ns = perf_counter_ns()
            answer = job()
            return answer, begun_ns, perf_counter_ns() - begun_ns

        answered = await self._compute.run(timed, self._taken_ns.get(kind, INLINE_NS))
        self._taken_ns[kind] = answered[2]
        return answered

    def _timings(self, arrival: Arrival, queue_ns: int, compute_ns: int) -> tuple[StageTiming, ...]:
        rows = arrival.microbatch.rows
        self._counters.busy_ns += compute_ns
        self._counters.microbatches += 1
        self._counters.tokens += rows
        return (*arrival.frame.timings, StageTiming(queue_ns, compute_ns, arrival.wire_ns, rows))

    def _failed(self, arrival: Arrival, failure: str) -> Answer:
        microbatch, timings = arrival.microbatch, arrival.frame.timings
        if not self._runner.program.is_last:
            return Answer(encode_failure(arrival.frame.header, timings, failure))
        return self._result(Result(microbatch.epoch, microbatch.number, (), timings, failure))


def _attended_keys(microbatch: Microbatch) -> int:
    """About how many keys its rows look at in all: with a long context, attention takes most of the time."""
    return sum(len(chunk.tokens) * (chunk.position + len(chunk.tokens)) for chunk in microbatch.chunks)
