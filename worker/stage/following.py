"""A group member that is not the leader. Its thread computes its portion of each step that the leader announces."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from time import perf_counter_ns

from llamaclust.core.epochs import epoch_text
from llamaclust.core.errors import DeadlineError, DeviceLostError, ProtocolError, WorkerError
from llamaclust.kernels._native import Links
from llamaclust.wire.control.messages import StageProgress
from llamaclust.wire.microbatch.frames import most_frame_bytes
from llamaclust.wire.rpc.deadlines import deadline
from llamaclust.worker.groups.member_links import Fault, MemberLinks
from llamaclust.worker.stage.arrival import Arrival
from llamaclust.worker.stage.counters import Counters
from llamaclust.worker.stage.leading import decode_step
from llamaclust.worker.stage.stage_runner import StageRunner

_log = logging.getLogger(__name__)

_TOKENS_BYTES = 1 << 20  # Maximum size of the sampled tokens that precede the frame.
_STEP_S = 60.0


class FollowingStage:
    def __init__(
        self,
        epoch: int,
        runner: StageRunner,
        counters: Counters,
        links: MemberLinks,
        give_up: Callable[[DeviceLostError], None],
    ) -> None:
        """`give_up` is called on any thread when a device is lost."""
        self.epoch = epoch
        self.runner = runner
        self._counters = counters
        self._member_links = links
        self._give_up = give_up
        self._loop = asyncio.get_running_loop()
        self._links: Links | None = None
        self._steps = 0
        self._ended: asyncio.Future[None] | None = None  # Done when the thread has ended.
        self._reporting: asyncio.Task[Fault] | None = None
        program, rows = runner.program, runner.limits.max_batch_tokens
        self._most_bytes = most_frame_bytes(rows, 0 if program.is_first else program.hidden.width) + _TOKENS_BYTES
        links.open(self._start)

    @property
    def progress(self) -> StageProgress:
        return StageProgress(self.epoch, self._steps, self._steps, group=self._member_links.counters)

    @property
    def computing_s(self) -> float:
        """Seconds since this member last waited for another member, or 0.0 if its thread does not run."""
        is_at_work = self._ended is not None and not self._ended.done()
        return self._member_links.computing_s if is_at_work else 0.0

    def _start(self, links: Links) -> None:
        self._ended = self._loop.create_future()
        self.runner.gather_by(links)
        self._links = links
        threading.Thread(target=self._follow, args=(links,), name="follow", daemon=True).start()

    def _follow(self, links: Links) -> None:
        try:
            while True:
                self._step(links.receive_step(self.epoch, self._steps, self._most_bytes))
        except Exception as error:  # noqa: BLE001  the event loop reports the error
            if isinstance(error, DeviceLostError):
                self._give_up(error)
            with suppress(RuntimeError):  # The event loop is closed, and the process is about to end.
                self._loop.call_soon_threadsafe(self._stopped, error)

    def _stopped(self, error: Exception) -> None:
        assert self._ended is not None
        self._ended.set_result(None)
        self._reporting = asyncio.create_task(self._member_links.give_up(error))

    def _step(self, data: bytes) -> None:
        assert self._links is not None
        frame, tokens, self._links.bands, adapters = decode_step(data)
        self.runner.settle(adapters)
        arrival = Arrival.read(frame, self.runner.reader, perf_counter_ns(), 0)
        if arrival.frame.epoch != self.epoch or arrival.failure is not None:
            raise ProtocolError(
                f"the leader announced something that is not a microbatch of epoch {epoch_text(self.epoch)}"
            )
        self._counters.received_bytes += len(data)
        begun_ns, rows = perf_counter_ns(), arrival.frame.rows
        checked = self.runner.program if arrival.frame.checked_chunks else None
        try:
            with self._member_links.step(rows), self._member_links.checking(checked, rows, self.runner.gather_by):
                if self.runner.program.is_first:
                    tokens.fill(arrival.frame)
                self.runner.run_frame(arrival.frame)
        except DeviceLostError:
            raise
        except WorkerError as error:  # The leader raises the same error, and answers that the microbatch failed.
            _log.error("microbatch %d: %s", arrival.frame.number, error)
        self._counters.busy_ns += perf_counter_ns() - begun_ns
        self._counters.microbatches += 1
        self._counters.tokens += arrival.frame.rows
        self._steps += 1

    def close_links(self) -> None:
        self._member_links.close()

    async def release(self) -> StageRunner:
        """Waits for the current step and returns the runner. Raises DeviceLostError if the step does not end."""
        self.close_links()
        if self._ended is not None:
            try:
                async with deadline("the end of a group's step", _STEP_S):
                    await asyncio.shield(self._ended)
            except DeadlineError as late:
                lost = DeviceLostError(f"{late}; this worker process ends")
                self._give_up(lost)
                raise lost from late
        if self._reporting is not None:
            self._reporting.cancel()
        return self.runner

    async def close(self) -> None:
        await asyncio.to_thread((await self.release()).close)
