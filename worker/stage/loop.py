"""The loop of a loaded stage, which receives, computes and answers microbatches in the order of their numbers."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from itertools import count
from time import perf_counter_ns
from typing import TypeVar

from llamaclust.core.bounds import one_line
from llamaclust.core.epochs import place_text
from llamaclust.core.errors import DeviceLostError, LlamaclustError, ProtocolError
from llamaclust.kernels._native import LinkError, RowOutcomes
from llamaclust.kernels.backend import Logits
from llamaclust.wire.control.messages import Deadlines, StageProgress
from llamaclust.wire.microbatch.codec import encode_sampled_tokens
from llamaclust.wire.microbatch.messages import SampledTokens, StageTiming
from llamaclust.wire.rpc.deadlines import recurring_deadline
from llamaclust.wire.rpc.send_queue import Writable
from llamaclust.wire.rpc.server import ServerStream
from llamaclust.worker.stage.arrival import Arrival
from llamaclust.worker.stage.compute import INLINE_NS, Compute, step_limit_s
from llamaclust.worker.stage.counters import Counters
from llamaclust.worker.stage.dependencies import Dependencies
from llamaclust.worker.stage.incoming import Incoming
from llamaclust.worker.stage.leading import Leader, MemberFailedError
from llamaclust.worker.stage.stage_runner import StageRunner, StepOutputs
from llamaclust.worker.stage.step_inputs import StepInputs

_log = logging.getLogger(__name__)

_DIRECT_BYTES = 1 << 16
"""Maximum size of an answer that is sent before the next step begins. Sending more bytes may wait for the receiver."""

# The coordinator handles a result in 0.7 ms, perhaps on the core that the first stage needs.
_RESULT_DELAY_S = 0.001
"""Seconds between sending tokens to a first stage in this process and sending the result to the coordinator."""
_MIN_ROUND_S = 0.004

_Value = TypeVar("_Value")
_Kind = tuple[str, int, int]
"""A kind of job: its name, and the bit lengths of its numbers of rows and of attended keys."""


def _kind(job: str, arrival: Arrival) -> _Kind:
    return job, arrival.frame.rows.bit_length(), arrival.frame.attended.bit_length()


async def _send_all(waiting: deque[asyncio.Future[Answer]], send: Callable[[list[Answer]], Awaitable[None]]) -> None:
    while waiting:
        if not waiting[0].done():
            await asyncio.wait([waiting[0]])
        ready: list[Answer] = []
        while waiting and waiting[0].done():
            ready.append(waiting.popleft().result())
        await send(ready)


@dataclass(frozen=True, slots=True)
class StageContext:
    worker: str
    compute: Compute
    counters: Counters
    leader: Leader | None = None  # Leader of the stage's group, or None without a group.


@dataclass(frozen=True, slots=True)
class Answer:
    data: bytes
    sampled: SampledTokens | None = None


class StageLoop:
    """Computes one epoch's microbatches. Failed microbatches get error answers, but a group's failure ends the loop."""

    def __init__(self, epoch: int, runner: StageRunner, context: StageContext, deadlines: Deadlines) -> None:
        self.runner = runner
        runner.matchers.clear()
        self.dependencies = Dependencies(epoch, deadlines.sampling_inputs_s)
        self._tokens = self.dependencies.tokens
        self._epoch = epoch
        self._compute = context.compute
        self._counters = context.counters
        self._leader = context.leader
        self._forward_s = deadlines.forward_s
        self._where = f"worker {context.worker} (layers [{runner.program.start}, {runner.program.end}))"
        self._wire_ns = 0
        self._last_result_ns = 0
        self._received = self._sent = 0
        self._has_ended = False
        self._taken_ns: dict[_Kind, int] = {}  # Duration of the last job of each kind.

    async def run(
        self,
        stream: ServerStream,
        outlet: Writable,
        to_first: Writable | None = None,
        receiver: str | None = None,
        sender: str | None = None,
    ) -> None:
        """Serves a stream. Sends answers to `outlet`, and sampled tokens to `to_first`. Errors name the `receiver` if
        it is too slow, and the `sender` if it breaks the protocol."""
        incoming = Incoming(stream)
        sending: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        sending.set_result(None)
        waiting: deque[asyncio.Future[Answer]] = deque()
        try:
            async with recurring_deadline("forwarding a microbatch", self._forward_s, receiver) as limit:
                send = partial(self._send, outlet, to_first, limit)
                is_local = stream.is_local
                for number in count():
                    is_close = incoming.is_there  # True if the microbatch came soon after the previous one.
                    if (arrival := await self._next(incoming, sending, number, sender)) is None:
                        break
                    if is_close:
                        incoming.prepare()
                        # Lets receiving and sending begin before a short computation takes the event loop.
                        await asyncio.sleep(0)
                    answer = await self.compute(arrival)
                    if answer.done():
                        await sending
                    incoming.prepare()
                    if not is_close and answer.done() and len(answer.result().data) <= _DIRECT_BYTES:
                        await self._send_tokens(to_first, limit, [answer.result()])
                        if to_first is not None and is_local and self._may_delay_result(arrival):
                            await incoming.wait(_RESULT_DELAY_S)
                        await self._send_answers(outlet, limit, [answer.result()])
                        continue
                    waiting.append(answer)
                    if sending.done():
                        sending.result()
                        sending = asyncio.create_task(_send_all(waiting, send))
                await sending
        finally:
            sending.cancel()
            await asyncio.gather(incoming.close(), sending, return_exceptions=True)

    async def _next(
        self, incoming: Incoming, sending: asyncio.Future[None], number: int, sender: str | None
    ) -> Arrival | None:
        try:
            data = await incoming.next(sending)
            return None if data is None else self.receive(data, number)
        except ProtocolError as error:
            error.worker = error.worker or sender
            raise

    def receive(self, data: bytes, number: int) -> Arrival:
        received_ns = perf_counter_ns()
        self._counters.received_bytes += len(data)
        arrival = Arrival.read(data, self.runner.reader, received_ns, self._wire_ns)
        found, expected = (arrival.frame.epoch, arrival.frame.number), (self._epoch, number)
        if found != expected:
            raise ProtocolError(f"microbatch: expected {place_text(expected)}, found {place_text(found)}")
        self._received = number + 1
        return arrival

    @property
    def progress(self) -> StageProgress:
        return StageProgress(self._epoch, self._received, self._sent, self.dependencies.awaits_tokens)

    def put_inputs(self, inputs: StepInputs) -> None:
        self.dependencies.put_inputs(inputs)
        self.runner.matchers.receive(inputs)

    async def compute(self, arrival: Arrival) -> asyncio.Future[Answer]:
        """Computes a microbatch. Returns when another may begin. The answer may come later. Raises ProtocolError."""
        program = self.runner.program
        answered: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        try:
            if (failure := arrival.failure) is not None:
                answered.set_result(self._failed(arrival, failure))
            elif program.is_first and program.is_last and arrival.newest_dependency is not None:
                inputs = await self._inputs(arrival)
                kind = _kind("whole", arrival)
                step = partial(self._whole_step, kind, arrival, inputs)
                expected_ns = self._taken_ns.get(kind, INLINE_NS)
                return self._compute.queue(step, limit_s=self._limit_s(kind), expected_ns=expected_ns)
            else:
                answered.set_result(await self._step(arrival))
        except Exception as error:  # noqa: BLE001  a border, see there
            answered.set_result(self._failure(arrival, error))
        finally:
            self.dependencies.done(arrival.frame.number)
        return answered

    async def _inputs(self, arrival: Arrival) -> StepInputs:
        inputs = await self.dependencies.inputs(arrival.frame.number)
        await self.runner.matchers.ready(inputs.tasks)
        return inputs

    def _whole_step(self, kind: _Kind, arrival: Arrival, inputs: StepInputs) -> Answer:
        started_ns = perf_counter_ns()
        try:
            queue_ns = started_ns - max(arrival.received_ns, self._tokens.came_ns(arrival.newest_dependency))
            outputs = self._finish(arrival, self._run_layers(arrival), inputs)
            self._taken_ns[kind] = taken_ns = perf_counter_ns() - started_ns
            return self._result(arrival, outputs, queue_ns, taken_ns)
        except Exception as error:  # noqa: BLE001  a border, see there
            return self._failure(arrival, error)

    async def _step(self, arrival: Arrival) -> Answer:
        """Computes a microbatch. Waits for sampling inputs after the layers, because a new matcher can take 50 ms."""
        program = self.runner.program
        if program.is_first and not program.is_last:
            await self.dependencies.known(arrival.newest_dependency)
        ready_ns = max(arrival.received_ns, self._tokens.came_ns(arrival.newest_dependency))
        out, started_ns, compute_ns = await self._timed(_kind("run", arrival), partial(self._run_layers, arrival))
        queue_ns = started_ns - ready_ns
        if not program.is_last:
            arrival.check(out)
            return Answer(arrival.next_frame(out, self._timing(arrival, queue_ns, compute_ns)))
        inputs = await self._inputs(arrival)
        kind = ("finish", arrival.frame.rows.bit_length(), len(arrival.frame.embedded_rows).bit_length())
        outputs, _, finish_ns = await self._timed(kind, partial(self._finish, arrival, out, inputs))
        return self._result(arrival, outputs, queue_ns, compute_ns + finish_ns)

    def _run_layers(self, arrival: Arrival) -> Logits:
        """Runs the layers. The first stage fills in sampled tokens. Raises WorkerError if a token is unknown."""
        runner, frame = self.runner, arrival.frame
        followed = self._tokens.fill(frame) if runner.program.is_first else []
        runner.settle()
        if self._leader is None:
            return runner.run_frame(frame)
        checked = runner.program if frame.checked_chunks else None
        with self._leader.step(arrival, followed, runner.adapters, checked):
            return runner.run_frame(frame)

    def _finish(self, arrival: Arrival, logits: Logits, inputs: StepInputs) -> StepOutputs:
        self._tokens.fill(arrival.frame)
        return self.runner.finish_step(logits, inputs)

    def _limit_s(self, kind: _Kind) -> float:
        return step_limit_s(self._taken_ns.get(kind), on_gpus=self.runner.is_on_gpus)

    async def _timed(self, kind: _Kind, job: Callable[[], _Value]) -> tuple[_Value, int, int]:
        def timed() -> tuple[_Value, int, int]:
            begun_ns = perf_counter_ns()
            value = job()
            return value, begun_ns, perf_counter_ns() - begun_ns

        expected_ns = self._taken_ns.get(kind, INLINE_NS)
        taken = await self._compute.run(timed, expected_ns=expected_ns, limit_s=self._limit_s(kind))
        self._taken_ns[kind] = taken[2]
        return taken

    def _result(self, arrival: Arrival, outputs: StepOutputs, queue_ns: int, compute_ns: int) -> Answer:
        timing = self._timing(arrival, queue_ns, compute_ns - outputs.drafting_ns)
        data = outputs.result(arrival.frame, timing)
        if not (tokens := outputs.rows.tokens):
            return Answer(data)
        sampled = SampledTokens(arrival.frame.number, tuple(tokens))
        self._tokens.put(sampled)
        return Answer(data, sampled)

    def _timing(self, arrival: Arrival, queue_ns: int, compute_ns: int) -> StageTiming:
        rows = arrival.frame.rows
        self._counters.busy_ns += compute_ns
        self._counters.microbatches += 1
        self._counters.tokens += rows
        return StageTiming(queue_ns, compute_ns, arrival.wire_ns, rows)

    def _failure(self, arrival: Arrival, error: Exception) -> Answer:
        """Returns the answer to a failed microbatch, so that the worker continues. Raises errors that end the loop."""
        if isinstance(error, ProtocolError | LinkError | MemberFailedError):
            self._has_ended = True
            raise error
        if isinstance(error, DeviceLostError):
            self._compute.give_up(error)
        if isinstance(error, LlamaclustError):
            # After an error that ended the loop, later microbatches fail too, and their errors are not logged.
            if not self._has_ended:
                _log.error("microbatch %d: %s", arrival.frame.number, error)
            return self._failed(arrival, f"{self._where}: {error}")
        _log.error("microbatch %d failed", arrival.frame.number, exc_info=error)
        return self._failed(arrival, f"{self._where}: {type(error).__name__}: {error}")

    def _failed(self, arrival: Arrival, failure: str) -> Answer:
        if not self.runner.program.is_last:
            return Answer(arrival.frame.failure_frame(one_line(failure)))
        data = RowOutcomes().result(arrival.frame, None, one_line(failure))
        return Answer(data, SampledTokens(arrival.frame.number, ()))

    def _may_delay_result(self, arrival: Arrival) -> bool:
        """True if the coordinator sends steps without waiting for results, and has had no result for `_MIN_ROUND_S`."""
        before_ns, self._last_result_ns = self._last_result_ns, perf_counter_ns()
        return arrival.newest_dependency is not None and self._last_result_ns - before_ns >= _MIN_ROUND_S * 1e9

    async def _send(
        self, outlet: Writable, to_first: Writable | None, limit: recurring_deadline, answers: list[Answer]
    ) -> None:
        await self._send_tokens(to_first, limit, answers)
        await self._send_answers(outlet, limit, answers)

    async def _send_tokens(self, to_first: Writable | None, limit: recurring_deadline, answers: list[Answer]) -> None:
        sampled = [encode_sampled_tokens(answer.sampled) for answer in answers if answer.sampled is not None]
        if to_first is not None and sampled:
            with limit:
                await to_first.write(*sampled)

    async def _send_answers(self, outlet: Writable, limit: recurring_deadline, answers: list[Answer]) -> None:
        begun_ns, busy_ns = perf_counter_ns(), self._counters.busy_ns
        self._sent += len(answers)
        with limit:
            await outlet.write(*[answer.data for answer in answers])
        self._counters.sent_bytes += sum(len(answer.data) for answer in answers)
        computed_ns = self._counters.busy_ns - busy_ns  # Computing time on the event loop while the answers were sent.
        self._wire_ns = max(0, perf_counter_ns() - begun_ns - computed_ns)
