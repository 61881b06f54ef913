"""The streams of one loaded stage: to its neighbours, from the last stage to the first, and to the coordinator."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, replace
from functools import partial

from llamaclust.core.epochs import epoch_text
from llamaclust.core.errors import LlamaclustError, ProtocolError, WorkerError
from llamaclust.kernels._native import LinkError
from llamaclust.wire.control.messages import Deadlines, PeerUnreachable, StageProgress
from llamaclust.wire.microbatch.frames import most_frame_bytes
from llamaclust.wire.microbatch.inputs import PREPARE_MATCHERS
from llamaclust.wire.rpc.client import ClientStream, Peer, UnreachableError
from llamaclust.wire.rpc.deadlines import deadline
from llamaclust.wire.rpc.methods import FORWARD, SAMPLED_TOKENS
from llamaclust.wire.rpc.server import ServerStream
from llamaclust.wire.security.certificate_names import Principal
from llamaclust.worker.groups.member_links import MemberLinks
from llamaclust.worker.stage.dependencies import read_sampled_tokens
from llamaclust.worker.stage.leading import MemberFailedError
from llamaclust.worker.stage.loop import StageContext, StageLoop
from llamaclust.worker.stage.stage_runner import StageRunner
from llamaclust.worker.stage.step_inputs import StepInputs

_STEP_S = 60.0

_Use = Callable[[ClientStream], Coroutine[None, None, None]]


async def _while_open(stream: ClientStream, which: str, work: Coroutine[None, None, None]) -> None:
    """Awaits `work`, and then ends the stream. Raises WorkerError if the other side ends the stream first."""
    is_done = False

    async def working() -> None:
        nonlocal is_done
        await work
        is_done = True
        await stream.done_writing()

    async def watching() -> None:
        await stream.read()
        if not is_done:
            raise WorkerError(f"the {which} stage at {stream.address} ended its stream")

    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(working())
            group.create_task(watching())
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


def _check_caller(stream: ServerStream, expected: Principal) -> None:
    if stream.peer not in (None, expected):
        raise ProtocolError(f"{stream.peer} opened a stream that is reserved for {expected}")


@dataclass(frozen=True, slots=True)
class Neighbours:
    on_lost: Callable[[Peer, str], Awaitable[None]]  # Called with an unreachable neighbour and the reason.
    next: Peer | None = None  # The next stage, or None for the last stage.
    first: Peer | None = None  # Receiver of the last stage's sampled tokens, or None if this stage is the first.
    previous_worker: str | None = None  # Opens the FORWARD stream. None if the coordinator opens that stream.
    last_worker: str | None = None  # Opens the SAMPLED_TOKENS stream, if this is the first of several stages.


class StageStreams:
    def __init__(
        self,
        epoch: int,
        runner: StageRunner,
        context: StageContext,
        deadlines: Deadlines,
        neighbours: Neighbours,
        links: MemberLinks | None = None,
    ) -> None:
        """`links` is set if this worker leads a group. `context.compute` must then not be shared with other stages."""
        self.epoch = epoch
        self._links = links
        self.runner = runner
        self._compute = context.compute
        self._forward_s = deadlines.forward_s
        self._neighbours = neighbours
        self._loop = StageLoop(epoch, runner, context, deadlines)
        self._has_sampled_stream = False
        self._results: ServerStream | None = None
        self._forwarding: asyncio.Task[None] | None = None

    @property
    def progress(self) -> StageProgress:
        return replace(self._loop.progress, group=None if self._links is None else self._links.counters)

    @property
    def computing_s(self) -> float:
        """Seconds since this leader's step last waited for a group member. 0.0 if this worker leads no group."""
        return 0.0 if self._links is None else min(self._compute.computing_s, self._links.computing_s)

    async def sample(self, stream: ServerStream) -> None:
        if self._neighbours.next is not None:
            raise ProtocolError("this stage got sampling inputs, but is not the last stage")
        if self._results is not None:
            raise ProtocolError(f"a second sampling stream was opened for epoch {epoch_text(self.epoch)}")
        self._results = stream
        await stream.accept()
        try:
            while (data := await stream.read()) is not None:
                if data == PREPARE_MATCHERS:
                    self.runner.matchers.prepare()
                else:
                    self._loop.put_inputs(StepInputs.read(data))
        except ProtocolError as error:
            self._loop.dependencies.fail(error)
            raise

    async def sampled_tokens(self, stream: ServerStream) -> None:
        if not self.runner.program.is_first or self._neighbours.next is None:
            raise ProtocolError("this stage got sampled tokens, but is not the first of several stages")
        _check_caller(stream, Principal(self._neighbours.last_worker))
        if self._has_sampled_stream:
            raise ProtocolError(f"a second stream of sampled tokens was opened for epoch {epoch_text(self.epoch)}")
        self._has_sampled_stream = True
        await stream.accept()
        ended: LlamaclustError = WorkerError("the last stage stopped sending tokens")
        try:
            while (data := await stream.read()) is not None:
                self._loop.dependencies.put_tokens(read_sampled_tokens(data, self.runner.vocabulary))
        except ProtocolError as error:
            error.worker = self._neighbours.last_worker
            ended = error  # A microbatch that waits for tokens ends the stream, too, and is not answered.
            raise
        finally:
            self._loop.dependencies.fail(ended)

    async def forward(self, stream: ServerStream) -> None:
        """Accepts the stream of microbatches once the streams to later stages are open, and serves it."""
        _check_caller(stream, Principal(self._neighbours.previous_worker))
        if self._forwarding is not None:
            raise ProtocolError(f"a second stream of microbatches was opened for epoch {epoch_text(self.epoch)}")
        self._forwarding = asyncio.current_task()
        if self._links is None:
            await self._forward(stream)
            return
        try:
            # The earlier stages and the coordinator wait longer, so that they learn which member is missing.
            await self._links.opened(self._forward_s / 2)
            await self._forward(stream)
            self._links.close()
        except (LinkError, MemberFailedError) as error:
            fault = await self._links.give_up(error)
            ended = UnreachableError if isinstance(fault, PeerUnreachable) else WorkerError
            raise ended(fault.reason, worker=fault.worker) from error
        except BaseException:
            self._links.close()
            raise

    async def _forward(self, stream: ServerStream) -> None:
        program, rows = self.runner.program, self.runner.limits.max_batch_tokens
        stream.limit(most_frame_bytes(rows, 0 if program.is_first else program.hidden.width))
        first, results, sender = self._neighbours.first, self._results, self._neighbours.previous_worker
        if self._neighbours.next is not None:
            use: _Use = partial(self._loop.run, stream, receiver=self._neighbours.next.worker, sender=sender)
            await self._with_stream_to(self._neighbours.next, FORWARD, "next", stream, use)
        elif results is None:
            raise ProtocolError("microbatches came to the last stage before its sampling stream was opened")
        elif first is None:
            await stream.accept()
            await self._loop.run(stream, results, sender=sender)
        else:
            use = partial(self._loop.run, stream, results, sender=sender)
            await self._with_stream_to(first, SAMPLED_TOKENS, "first", stream, use)

    async def _with_stream_to(self, stage: Peer, method: str, which: str, incoming: ServerStream, use: _Use) -> None:
        """Opens a stream to `stage` and passes it to `use`. Reports a lost connection before it ends the streams."""
        stream = stage.open(method, epoch=self.epoch)
        try:
            await stage.connected()
            await self._opened(stream, stage, which)
            # Accepts before anything can cancel this task, because gRPC breaks if it is cancelled while accepting.
            await incoming.accept()
            await _while_open(stream, which, use(stream))
        except UnreachableError as error:
            await self._neighbours.on_lost(stage, str(error))
            raise
        finally:
            stream.cancel()

    async def _opened(self, stream: ClientStream, stage: Peer, which: str) -> None:
        async with deadline(f"opening the {which} stage at {stage.address}", self._forward_s, stage.worker):
            await stream.opened()

    async def settle(self) -> None:
        """Frees the memory of replaced adapters, or leaves this to the next run if a microbatch is in flight."""
        progress = self._loop.progress
        if progress.received == progress.sent:
            await self._compute.run(self.runner.settle)

    def close_links(self) -> None:
        if self._links is not None:
            self._links.close()

    async def release(self) -> StageRunner:
        if self._forwarding is not None:
            self._forwarding.cancel()
        self.close_links()
        if self._links is not None:
            await self._compute.idle(_STEP_S)
            self._compute.close()
        peers = (self._neighbours.next, self._neighbours.first)
        await asyncio.gather(*(peer.close() for peer in peers if peer is not None))
        return self.runner

    async def close(self) -> None:
        runner = await self.release()
        await (self._compute.run(runner.close) if self._links is None else asyncio.to_thread(runner.close))
