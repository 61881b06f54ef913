"""Microbatches of one epoch through one stage: received, computed and passed on at the same time, in number order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count
from time import perf_counter_ns

from llamaclust.core.errors import DeadlineError, ProtocolError, WorkerError
from llamaclust.wire.control.messages import Deadlines
from llamaclust.wire.microbatch.codec import (
    decode_inputs,
    decode_microbatch,
    decode_sampled_tokens,
    encode_sampled_tokens,
)
from llamaclust.wire.microbatch.frames import decode_frame
from llamaclust.wire.rpc.client import FORWARD, SAMPLED_TOKENS, ClientStream, Peer, UnreachableError
from llamaclust.wire.rpc.deadlines import deadline, recurring_deadline
from llamaclust.wire.rpc.send_queue import Writable
from llamaclust.wire.rpc.server import ServerStream
from llamaclust.wire.security.credentials import COORDINATOR, Principal
from llamaclust.worker.stage.executor import Answer, Arrival, StageContext, StageExecutor
from llamaclust.worker.stage.sampled_tokens import SampledTokensBox
from llamaclust.worker.stage.sampling_inputs import SamplingInputsBox
from llamaclust.worker.stage.stage_runner import StageRunner


async def run_together(*work: Coroutine[None, None, None]) -> None:
    """Runs all to their end; the first error cancels the others and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            for part in work:
                group.create_task(part)
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


async def _while_open(stream: ClientStream, which: str, work: Coroutine[None, None, None]) -> None:
    """Does the work and then ends the stream, on which nothing comes but its end; an early one is an error."""
    done = asyncio.Event()

    async def working() -> None:
        await work
        done.set()
        await stream.done_writing()

    async def watching() -> None:
        await stream.read()
        if not done.is_set():
            raise WorkerError(f"the {which} stage at {stream.address} ended its stream")

    await run_together(working(), watching())


def _check_caller(stream: ServerStream, expected: Principal) -> None:
    """ProtocolError where links have identities and another member than this one calls."""
    if stream.peer not in (None, expected):
        raise ProtocolError(f"{stream.peer} opens a stream that is for {expected} alone")


OnLost = Callable[[Peer, str], Awaitable[None]]
"""Called with a neighbour that cannot be reached and why."""


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The stages that this one calls, and the workers of those that call it."""

    on_lost: OnLost
    next: Peer | None = None  # None: this is the last
    first: Peer | None = None  # of the last stage, which receives the sampled tokens; None: this is the first
    previous_worker: str | None = None  # opens FORWARD; None: this is the first stage, where the coordinator does
    last_worker: str | None = None  # of the first of several stages: opens SAMPLED_TOKENS

    async def close(self) -> None:
        await asyncio.gather(*(peer.close() for peer in (self.next, self.first) if peer is not None))


class StageStreams:
    """One loaded stage and its streams: from the stage before, to the one after, or to and from the coordinator; of
    the last one also to the first."""

    def __init__(
        self,
        epoch: int,
        runner: StageRunner,
        context: StageContext,
        deadlines: Deadlines,
        neighbours: Neighbours,
    ) -> None:
        self.epoch = epoch
        self.runner = runner
        self._context = context
        self._deadlines = deadlines
        self._neighbours = neighbours
        self._has_sampled_stream = False
        inputs = SamplingInputsBox(epoch, deadlines.sampling_inputs_s)
        self._executor = StageExecutor(runner, context, inputs, SampledTokensBox())
        self._to_first: ClientStream | None = None
        self._results: ServerStream | None = None
        self._forwarding: asyncio.Task[None] | None = None
        self._wire_ns = 0

    async def sample(self, stream: ServerStream) -> None:
        """The coordinator's stream to the last stage: sampling inputs come, results go."""
        _check_caller(stream, COORDINATOR)
        if self._neighbours.next is not None:
            raise ProtocolError("sampling inputs for a stage that is not the last")
        if self._results is not None:
            raise ProtocolError(f"a second sampling stream for epoch {self.epoch}")
        self._results = stream
        await stream.accept()
        try:
            while (data := await stream.read()) is not None:
                self._executor.inputs.put(decode_inputs(data))
        except ProtocolError as error:
            self._executor.inputs.fail(error)
            raise

    async def forward(self, stream: ServerStream) -> None:
        """The stream from the stage before, or from the coordinator. It is accepted once the whole chain is open."""
        _check_caller(stream, Principal(self._neighbours.previous_worker))
        if self._forwarding is not None:
            raise ProtocolError(f"a second stream of microbatches for epoch {self.epoch}")
        self._forwarding = asyncio.current_task()
        if self._neighbours.next is None:
            await self._forward_to_coordinator(stream)
            return
        async with self._stream_to(self._neighbours.next, FORWARD, "next") as to_next:
            await self._forward_to(to_next, stream)

    @asynccontextmanager
    async def _stream_to(self, stage: Peer, method: str, which: str) -> AsyncIterator[ClientStream]:
        """Open. Where its connection fails, now or later, the coordinator is told before our own streams end."""
        stream = stage.open(method, epoch=self.epoch)
        try:
            await stage.connected()
            await self._opened(stream, stage, which)
            yield stream
        except UnreachableError as error:
            await self._neighbours.on_lost(stage, str(error))
            raise
        finally:
            stream.cancel()

    async def _opened(self, stream: ClientStream, stage: Peer, which: str) -> None:
        try:
            async with deadline(f"opening the {which} stage at {stage.address}", self._deadlines.forward_s):
                await stream.opened()
        except DeadlineError as error:
            error.worker = stage.worker
            raise

    async def sampled_tokens(self, stream: ServerStream) -> None:
        """The last stage's stream to the first one: tokens that it sampled."""
        if not self.runner.program.is_first or self._neighbours.next is None:
            raise ProtocolError("sampled tokens for a stage that is not the first of several")
        _check_caller(stream, Principal(self._neighbours.last_worker))
        if self._has_sampled_stream:
            raise ProtocolError(f"a second stream of sampled tokens for epoch {self.epoch}")
        self._has_sampled_stream = True
        await stream.accept()
        try:
            while (data := await stream.read()) is not None:
                self._executor.sampled.put(decode_sampled_tokens(data))
        finally:
            self._executor.sampled.fail(WorkerError("the last stage sends no more tokens"))

    async def _forward_to_coordinator(self, stream: ServerStream) -> None:
        if self._results is None:
            raise ProtocolError("microbatches for a last stage before its sampling stream")
        first = self._neighbours.first
        if first is None:
            await self._answer(stream, self._results)
            return
        async with self._stream_to(first, SAMPLED_TOKENS, "first") as self._to_first:
            await _while_open(self._to_first, "first", self._answer(stream, self._results))

    async def _answer(self, stream: ServerStream, results: ServerStream) -> None:
        await stream.accept()
        async with self._forward_deadline() as limit:
            await self._run(stream, results, limit)

    def _forward_deadline(self) -> recurring_deadline:
        return recurring_deadline("handing on a microbatch", self._deadlines.forward_s)

    async def _forward_to(self, to_next: ClientStream, stream: ServerStream) -> None:
        await stream.accept()

        async def passing() -> None:
            async with self._forward_deadline() as limit:
                await self._run(stream, to_next, limit)

        await _while_open(to_next, "next", passing())

    async def _run(self, stream: ServerStream, outlet: Writable, limit: recurring_deadline) -> None:
        """Receive, compute, send: while one microbatch is computed, the next is received and the one before is sent.

        Where they are far apart, none waits until the next one's receipt is prepared.
        """
        reading = asyncio.create_task(stream.read())
        sending: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        sending.set_result(None)
        try:
            for number in count():
                is_close = reading.done()  # to the one before
                data = await reading
                if data is None:
                    break
                arrival = self._arrival(data, number)
                if is_close:
                    reading = asyncio.create_task(stream.read())
                    await asyncio.sleep(0)  # it begins before a short computation takes the event loop
                answer = await self._executor.begin(arrival)
                await sending
                if not is_close:
                    reading = asyncio.create_task(stream.read())
                if is_close or not answer.done():
                    sending = asyncio.create_task(self._send(outlet, answer, limit))
                else:
                    await self._send(outlet, answer, limit)
            await sending
        finally:
            reading.cancel()
            sending.cancel()
            await asyncio.gather(reading, sending, return_exceptions=True)

    def _arrival(self, data: bytes, number: int) -> Arrival:
        received_ns = perf_counter_ns()
        self._context.counters.received_bytes += len(data)
        frame = decode_frame(data)
        microbatch = decode_microbatch(frame.header)
        if (microbatch.epoch, microbatch.number) != (self.epoch, number):
            found = f"({microbatch.epoch}, {microbatch.number})"
            raise ProtocolError(f"microbatch {found} where ({self.epoch}, {number}) was expected")
        return Arrival(frame, microbatch, received_ns, self._wire_ns)

    async def _send(self, outlet: Writable, answering: asyncio.Future[Answer], limit: recurring_deadline) -> None:
        answer = await asyncio.shield(answering)
        begun_ns, busy_ns = perf_counter_ns(), self._context.counters.busy_ns
        with limit:
            if self._to_first is not None and answer.sampled is not None:
                await self._to_first.write(encode_sampled_tokens(answer.sampled))
            await outlet.write(answer.data)
        self._context.counters.sent_bytes += len(answer.data)
        computed_ns = self._context.counters.busy_ns - busy_ns  # meanwhile, on the event loop
        self._wire_ns = max(0, perf_counter_ns() - begun_ns - computed_ns)

    async def release(self) -> StageRunner:
        """Ends the stage's ways to others, and what comes to it; what is loaded is the caller's then."""
        if self._forwarding is not None:
            self._forwarding.cancel()
        await self._neighbours.close()
        return self.runner

    async def close(self) -> None:
        """Frees the stage after what is being computed. Its streams have ended."""
        await self._context.compute.run((await self.release()).close)
