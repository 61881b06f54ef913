"""Microbatches of one epoch through one stage: received, computed and passed on at the same time, in number order."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from itertools import count
from time import perf_counter_ns

from llamaclust.errors import WireError, WorkerError
from llamaclust.wire.channels import FORWARD, ClientStream, Peer
from llamaclust.wire.codec import decode_inputs, decode_microbatch
from llamaclust.wire.control import Deadlines
from llamaclust.wire.deadlines import deadline, recurring_deadline
from llamaclust.wire.frames import decode_frame
from llamaclust.wire.outbox import Writable
from llamaclust.wire.server import ServerStream
from llamaclust.worker.compute import Compute
from llamaclust.worker.inputs import InputsBox
from llamaclust.worker.stage_runner import StageRunner
from llamaclust.worker.steps import Arrival, Counters, StageStep


async def together(*work: Coroutine[None, None, None]) -> None:
    """Runs all to their end; the first error cancels the others and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            for one in work:
                group.create_task(one)
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


class StageFlow:
    """One loaded stage and its streams: from the stage before, to the one after, or to and from the coordinator."""

    def __init__(
        self,
        epoch: int,
        runner: StageRunner,
        worker: str,
        compute: Compute,
        counters: Counters,
        deadlines: Deadlines,
        next_stage: Peer | None,
    ) -> None:
        self.epoch = epoch
        self.runner = runner
        self._compute = compute
        self._deadlines = deadlines
        self._next_stage = next_stage
        self._inputs = InputsBox(epoch, deadlines.sampling_inputs_s)
        self._counters = counters
        self._step = StageStep(runner, worker, self._inputs, compute, counters)
        self._results: ServerStream | None = None
        self._forwarding = False
        self._wire_ns = 0

    async def sample(self, stream: ServerStream) -> None:
        """The coordinator's stream to the last stage: sampling inputs come, results go."""
        if self._next_stage is not None:
            raise WireError("sampling inputs for a stage that is not the last")
        if self._results is not None:
            raise WireError(f"a second sampling stream for epoch {self.epoch}")
        self._results = stream
        await stream.accept()
        try:
            while (data := await stream.read()) is not None:
                self._inputs.put(decode_inputs(data))
        except WireError as error:
            self._inputs.fail(error)
            raise

    async def forward(self, stream: ServerStream) -> None:
        """The stream from the stage before, or from the coordinator. It is accepted once the whole chain is open."""
        if self._forwarding:
            raise WireError(f"a second stream of microbatches for epoch {self.epoch}")
        self._forwarding = True
        if self._next_stage is None:
            await self._forward_to_coordinator(stream)
            return
        to_next = self._next_stage.open(FORWARD, epoch=self.epoch)
        try:
            await self._forward_to(to_next, stream)
        finally:
            to_next.cancel()

    async def _forward_to_coordinator(self, stream: ServerStream) -> None:
        if self._results is None:
            raise WireError("microbatches for a last stage before its sampling stream")
        await stream.accept()
        async with self._handing_on() as limit:
            await self._pass_on(stream, self._results, limit)

    def _handing_on(self) -> recurring_deadline:
        return recurring_deadline("handing on a microbatch", self._deadlines.forward_s)

    async def _forward_to(self, to_next: ClientStream, stream: ServerStream) -> None:
        assert self._next_stage is not None
        async with deadline(f"connecting to the next stage at {self._next_stage.address}", self._deadlines.forward_s):
            await to_next.opened()
        await stream.accept()
        ended = asyncio.Event()

        async def passing() -> None:
            async with self._handing_on() as limit:
                await self._pass_on(stream, to_next, limit)
            ended.set()
            await to_next.done_writing()

        async def watching() -> None:
            await to_next.read()
            if not ended.is_set():
                raise WorkerError(f"the next stage at {to_next.address} ended its stream")

        await together(passing(), watching())

    async def _pass_on(self, stream: ServerStream, outlet: Writable, limit: recurring_deadline) -> None:
        """While one microbatch is computed, the next one is received and the one before is sent.

        Where microbatches do not follow each other closely, none waits until the next one's receipt is prepared.
        """
        reading = asyncio.create_task(stream.read())
        sending: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        sending.set_result(None)
        try:
            for number in count():
                follows = reading.done()
                data = await reading
                if data is None:
                    break
                arrival = self._arrival(data, number)
                if follows:
                    reading = asyncio.create_task(stream.read())
                    await asyncio.sleep(0)  # it begins before a short computation takes the event loop
                answer = await self._step.run(arrival)
                await sending
                if follows:
                    sending = asyncio.create_task(self._send(outlet, answer, limit))
                else:
                    reading = asyncio.create_task(stream.read())
                    await self._send(outlet, answer, limit)
            await sending
        finally:
            reading.cancel()
            sending.cancel()
            await asyncio.gather(reading, sending, return_exceptions=True)

    def _arrival(self, data: bytes, number: int) -> Arrival:
        received_ns = perf_counter_ns()
        frame = decode_frame(data)
        microbatch = decode_microbatch(frame.header)
        if (microbatch.epoch, microbatch.number) != (self.epoch, number):
            found = f"({microbatch.epoch}, {microbatch.number})"
            raise WireError(f"microbatch {found} where ({self.epoch}, {number}) was expected")
        return Arrival(frame, microbatch, received_ns, self._wire_ns)

    async def _send(self, outlet: Writable, data: bytes, limit: recurring_deadline) -> None:
        begun_ns, busy_ns = perf_counter_ns(), self._counters.busy_ns
        with limit:
            await outlet.write(data)
        computed_ns = self._counters.busy_ns - busy_ns  # meanwhile, on the event loop
        self._wire_ns = max(0, perf_counter_ns() - begun_ns - computed_ns)

    async def close(self) -> None:
        """Frees the stage after what is being computed. Its streams have ended."""
        if self._next_stage is not None:
            await self._next_stage.close()
        await self._compute.run(self.runner.close)
