"""The pipeline over worker processes: microbatches to the first stage, sampling inputs to the last, results from it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from llamaclust.cluster.pipeline import StageInfo
from llamaclust.cluster.worker_handle import WorkerHandle
from llamaclust.errors import LlamaclustError, WireError, WorkerError
from llamaclust.wire.channels import FORWARD, SAMPLE, ClientStream, Peer
from llamaclust.wire.codec import decode_result, encode_inputs, encode_microbatch
from llamaclust.wire.deadlines import deadline
from llamaclust.wire.frames import encode_hidden
from llamaclust.wire.messages import Microbatch, Result, SamplingInputs
from llamaclust.wire.token import ClusterToken

_OPEN_S = 30.0
_WRITE_S = 20.0
"""Shorter than a stage waits for sampling inputs or the next stage (`wire.control.Deadlines`)."""
_BLAME_S = 1.0
"""A stream breaks before the loss of the worker behind it is known."""


class RemotePipeline:
    """See `Pipeline`. Its stages are loaded before and unloaded after by whoever owns the workers."""

    @classmethod
    async def open(cls, epoch: int, workers: Sequence[WorkerHandle], token: ClusterToken) -> RemotePipeline:
        """Opens the streams of an epoch that `workers` hold, given in the order of their stages.

        WorkerError where a stage refuses or cannot be reached, DeadlineError where it does not answer.
        """
        first, last = (Peer(worker.registration.address, token) for worker in (workers[0], workers[-1]))
        try:
            async with deadline(f"opening the pipeline of epoch {epoch}", _OPEN_S):
                sample = last.open(SAMPLE, epoch=epoch)
                await sample.opened()
                forward = first.open(FORWARD, epoch=epoch)
                await forward.opened()
        except BaseException as error:
            await asyncio.gather(first.close(), last.close())
            if isinstance(error, LlamaclustError):
                raise await _blame(epoch, workers, error) from error
            raise
        return cls(epoch, workers, (first, last), forward, sample)

    def __init__(
        self,
        epoch: int,
        workers: Sequence[WorkerHandle],
        peers: tuple[Peer, Peer],
        forward: ClientStream,
        sample: ClientStream,
    ) -> None:
        self.epoch = epoch
        self.stages = tuple(_stage(epoch, worker) for worker in workers)
        self._workers = tuple(workers)
        self._peers = peers
        self._forward = forward
        self._sample = sample
        self._submitting = asyncio.Lock()
        self._results: asyncio.Queue[Result | None] = asyncio.Queue()
        self._error: LlamaclustError | None = None
        self._guarding = asyncio.create_task(self._guard())

    async def submit(self, microbatch: Microbatch, inputs: SamplingInputs) -> None:
        """WorkerError once the pipeline is lost."""
        frame = encode_hidden(encode_microbatch(microbatch), (), None)
        async with self._submitting:
            if self._error is not None:
                raise self._error
            try:
                async with deadline(f"handing out microbatch {microbatch.number}", _WRITE_S):
                    await self._write(frame, encode_inputs(inputs))
            except LlamaclustError as error:
                raise await self._lost(error) from error

    async def _write(self, frame: bytes, inputs: bytes) -> None:
        """Both at the same time; nothing goes on where one fails."""
        sampling = asyncio.create_task(self._sample.write(inputs))
        try:
            await self._forward.write(frame)
            await sampling
        finally:
            sampling.cancel()
            await asyncio.gather(sampling, return_exceptions=True)

    async def next_result(self) -> Result:
        """See `Pipeline`; results that came before the loss come first."""
        result = await self._results.get()
        if result is None:
            self._results.put_nowait(None)
            assert self._error is not None
            raise self._error
        return result

    async def close(self) -> None:
        """Ends the streams. What is in flight is abandoned."""
        self._fail(WorkerError(f"the pipeline of epoch {self.epoch} is closed"))
        self._guarding.cancel()
        await asyncio.gather(*(peer.close() for peer in self._peers))

    async def _guard(self) -> None:
        """Takes in results until a stream ends or a worker is lost; then everybody who waits hears of it."""
        reading = asyncio.create_task(self._read_results())
        watching = asyncio.create_task(self._watch_forward())
        losses = [asyncio.create_task(worker.lost.wait()) for worker in self._workers]
        try:
            await asyncio.wait((reading, watching, *losses), return_when=asyncio.FIRST_COMPLETED)
            ended = [_ending(task) for task in (reading, watching) if task.done()]
            self._fail(await _blame(self.epoch, self._workers, ended[0] if ended else None))
        finally:
            for task in (reading, watching, *losses):
                task.cancel()

    async def _read_results(self) -> LlamaclustError:
        """Returns why there are no more."""
        number = 0
        try:
            while (data := await self._sample.read()) is not None:
                result = decode_result(data)
                if (result.epoch, result.number) != (self.epoch, number):
                    found = f"({result.epoch}, {result.number})"
                    return WireError(f"result {found} where ({self.epoch}, {number}) was expected")
                self._results.put_nowait(result)
                number += 1
                await asyncio.sleep(0)  # whoever waits for it goes first
        except LlamaclustError as error:
            return error
        return WorkerError("the last stage ended its stream")

    async def _watch_forward(self) -> LlamaclustError:
        """Nothing comes back from the first stage but the end."""
        try:
            data = await self._forward.read()
        except LlamaclustError as error:
            return error
        return WorkerError("the first stage ended its stream" if data is None else "the first stage sent a message")

    async def _lost(self, error: LlamaclustError) -> LlamaclustError:
        """The error of the pipeline, once it is known; `error` is what a write met."""
        await asyncio.wait((self._guarding,), timeout=2 * _BLAME_S)
        self._fail(error)
        assert self._error is not None
        return self._error

    def _fail(self, error: LlamaclustError) -> None:
        """The first error stays."""
        if self._error is None:
            self._error = error
            self._results.put_nowait(None)


def _ending(task: asyncio.Task[LlamaclustError]) -> LlamaclustError:
    """What a reader ended with, in order or not."""
    if task.cancelled():
        return WorkerError("a stream was cancelled")
    error = task.exception()
    if error is None:
        return task.result()
    return error if isinstance(error, LlamaclustError) else WorkerError(f"{type(error).__name__}: {error}")


def _stage(epoch: int, worker: WorkerHandle) -> StageInfo:
    order, _ = worker.stages[epoch]
    return StageInfo(worker.name, order.start, order.end)


async def _blame(epoch: int, workers: Sequence[WorkerHandle], ended: LlamaclustError | None) -> LlamaclustError:
    """The loss of a worker, if there is one or will be in a moment; else what a stream ended with."""
    losses = [asyncio.create_task(worker.lost.wait()) for worker in workers]
    await asyncio.wait(losses, timeout=_BLAME_S, return_when=asyncio.FIRST_COMPLETED)
    for task in losses:
        task.cancel()
    lost = next((worker for worker in workers if worker.lost.is_set()), None)
    if lost is not None:
        return lost.error
    stages = (_stage(epoch, worker) for worker in workers)
    names = ", ".join(f"{stage.worker} [{stage.start}, {stage.end})" for stage in stages)
    return WorkerError(f"the pipeline of workers {names} broke: {ended}")
