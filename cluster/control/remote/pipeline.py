"""Runs a pipeline on worker processes. Microbatches go to the first stage, and sampling inputs to the last stage."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from traceback import clear_frames

from llamaclust.cluster.control.failures.failure_attribution import attribute_failure, has_failed, stage_of
from llamaclust.cluster.control.load_orders import leaders
from llamaclust.cluster.control.remote.encoder import RemoteEncoder
from llamaclust.cluster.control.remote.kv_disks import remote_kv_disks
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.cluster.scheduler.rows.slice import ScheduledMicrobatch
from llamaclust.core.epochs import epoch_text, place_text
from llamaclust.core.errors import LlamaclustError, ProtocolError, UsageError, WorkerError
from llamaclust.core.limits import MAX_TOP_LOGPROBS
from llamaclust.wire.microbatch.codec import encode_microbatch
from llamaclust.wire.microbatch.frames import encode_hidden
from llamaclust.wire.microbatch.inputs import PREPARE_MATCHERS, encode_inputs
from llamaclust.wire.microbatch.messages import Result
from llamaclust.wire.microbatch.results import decode_result, most_result_bytes
from llamaclust.wire.rpc.client import ClientStream, Peer
from llamaclust.wire.rpc.deadlines import deadline
from llamaclust.wire.rpc.methods import FORWARD, SAMPLE
from llamaclust.wire.rpc.send_queue import SendQueue
from llamaclust.wire.security.certificate_names import Principal
from llamaclust.wire.security.credentials import Credentials

_OPEN_S = 30.0
_WRITE_S = 20.0
"""Maximum seconds for a write to a stage."""


class RemotePipeline:
    """Implements `Pipeline` with streams to the first and the last stage. The caller loads and unloads the stages."""

    @classmethod
    async def open(
        cls, epoch: int, workers: Sequence[WorkerHandle], credentials: Credentials, no_images: str = ""
    ) -> RemotePipeline:
        """Opens the streams of an epoch. `workers` are in the order of stages, and each group begins with its leader.
        Raises WorkerError. The error's `worker` is the worker that caused the failure, if known."""
        chain = leaders(workers, [stage_of(epoch, worker) for worker in workers])
        ends = (chain[0], chain[-1])
        first, last = (_peer(worker, credentials) for worker in ends)
        encodes = [_peer(worker, credentials) for worker in workers if worker.stages[epoch][0].encoder is not None]
        encoder = RemoteEncoder(epoch, encodes[0]) if encodes else None
        try:
            async with deadline(f"opening the pipeline of epoch {epoch_text(epoch)}", _OPEN_S):
                sample = last.open(SAMPLE, epoch=epoch, reply_bytes=_most_reply_bytes(chain[-1], epoch))
                await _while_whole(sample.opened(), epoch, workers)
                forward = first.open(FORWARD, epoch=epoch)
                await _while_whole(forward.opened(), epoch, workers)
                if encoder is not None:
                    await _while_whole(encoder.check(), epoch, workers)
        except BaseException as error:
            await asyncio.gather(*(peer.close() for peer in (first, last, *encodes)))
            if isinstance(error, LlamaclustError):
                raise await attribute_failure(epoch, workers, error) from error
            raise
        return cls(epoch, workers, (first, last, *encodes), forward, sample, encoder, no_images)

    def __init__(
        self,
        epoch: int,
        workers: Sequence[WorkerHandle],
        peers: Sequence[Peer],
        forward: ClientStream,
        sample: ClientStream,
        encoder: RemoteEncoder | None,
        no_images: str = "",
    ) -> None:
        self.epoch = epoch
        held = (stage_of(epoch, worker) for worker in workers)
        self.stages = tuple(stage for stage in held if stage.member == 0)
        self.workers = frozenset(worker.name for worker in workers)
        self.kv_disks = remote_kv_disks(epoch, workers)
        self.encoder = encoder
        self.no_images = no_images
        self._workers = tuple(workers)
        self._peers = tuple(peers)
        self._forward = forward
        self._sample = sample
        self._microbatches = SendQueue(forward, "sending a microbatch to the first stage", _WRITE_S)
        self._prepares_matchers = False
        self._inputs = SendQueue(sample, "sending sampling inputs to the last stage", _WRITE_S)
        self._due_bytes: deque[int] = deque()  # Maximum result bytes of each microbatch in flight.

    def submit(self, *scheduled: ScheduledMicrobatch) -> None:
        """Queues microbatches for the first stage, and their sampling inputs for the last stage."""
        self._due_bytes.extend(map(_most_bytes, scheduled))
        self._microbatches.put(*(encode_hidden(encode_microbatch(each.microbatch)) for each in scheduled))
        self._inputs.put(*(encode_inputs(each.inputs) for each in scheduled))

    def prepare_matchers(self) -> None:
        if not self._prepares_matchers:
            self._prepares_matchers = True
            self._inputs.put(PREPARE_MATCHERS)

    async def run(self, on_results: Callable[[Sequence[Result]], None]) -> None:
        """Runs until the pipeline fails. Raises ProtocolError if a result is invalid, and otherwise an error that names
        the worker at fault, if known."""
        parts = self._microbatches.run(), self._inputs.run(), self._read_results(on_results), self._watch_forward()
        work = [asyncio.create_task(part) for part in parts]
        failing = asyncio.create_task(has_failed(self.epoch, self._workers))
        try:
            await asyncio.wait((*work, failing), return_when=asyncio.FIRST_COMPLETED)
            ended = next((_ending(task) for task in work if task.done()), None)
            if isinstance(ended, ProtocolError):
                raise ended
            raise await attribute_failure(self.epoch, self._workers, ended)
        finally:
            for task in (*work, failing):
                task.cancel()
            await asyncio.gather(*work, failing, return_exceptions=True)

    async def close(self) -> None:
        await asyncio.gather(*(peer.close() for peer in self._peers))

    async def _read_results(self, on_results: Callable[[Sequence[Result]], None]) -> None:
        number, stream = 0, self._sample
        while (data := await stream.read()) is not None:
            results: list[Result] = []
            while data is not None:
                results.append(self._result(data, number))
                number += 1
                data = await stream.read() if stream.has_message else None
            on_results(results)
        raise WorkerError("the last stage ended its stream")

    def _result(self, data: bytes, number: int) -> Result:
        most_bytes = self._due_bytes.popleft() if self._due_bytes else 0
        if len(data) > most_bytes:
            raise ProtocolError(f"a result has {len(data)} bytes; the limit for its microbatch is {most_bytes}")
        result = decode_result(data)
        found, expected = (result.epoch, result.number), (self.epoch, number)
        if found != expected:
            raise ProtocolError(f"expected result {place_text(expected)}, found {place_text(found)}")
        return result

    async def _watch_forward(self) -> None:
        data = await self._forward.read()
        raise WorkerError(
            "the first stage ended its stream"
            if data is None
            else "the first stage sent a message, but must not send any"
        )


async def _while_whole(opens: Coroutine[None, None, None], epoch: int, workers: Sequence[WorkerHandle]) -> None:
    opening, failing = asyncio.create_task(opens), asyncio.create_task(has_failed(epoch, workers))
    try:
        await asyncio.wait((opening, failing), return_when=asyncio.FIRST_COMPLETED)
        if not opening.done():
            raise WorkerError("a worker of the pipeline has failed")
        opening.result()
    finally:
        opening.cancel()
        failing.cancel()


def _peer(worker: WorkerHandle, credentials: Credentials) -> Peer:
    try:
        return Peer(worker.registration.address, credentials, Principal(worker.name))
    except UsageError as error:
        raise WorkerError(f"worker {worker.name}: {error}", worker=worker.name) from error


def _most_bytes(scheduled: ScheduledMicrobatch) -> int:
    tasks, embeds = scheduled.inputs.tasks, scheduled.microbatch.embedded_rows > 0
    return most_result_bytes(len(tasks), sum(task.top_logprobs for task in tasks), embeds=embeds)


def _most_reply_bytes(worker: WorkerHandle, epoch: int) -> int:
    rows = worker.stages[epoch][0].limits.max_outputs
    return most_result_bytes(rows, rows * MAX_TOP_LOGPROBS, embeds=True)


def _ending(task: asyncio.Task[None]) -> LlamaclustError:
    if task.cancelled():
        return WorkerError("a stream was cancelled")
    if (error := task.exception()) is not None:
        clear_frames(error.__traceback__)
    return error if isinstance(error, LlamaclustError) else WorkerError(f"{type(error).__name__}: {error}")
