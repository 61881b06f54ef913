"""Runs requests on a pipeline: schedule, run, complete. What to run is the scheduler's decision."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from collections.abc import Sequence as ListLike
from enum import StrEnum
from functools import partial, wraps
from time import monotonic_ns
from types import TracebackType
from typing import Concatenate, ParamSpec, Self

from llamaclust.cluster.metrics import Metrics
from llamaclust.cluster.pipeline import Pipeline
from llamaclust.cluster.request_stream import Mailbox, RequestStream
from llamaclust.cluster.requests import Finished, FinishReason, Generation, TokenChosen
from llamaclust.cluster.scheduler import Scheduler
from llamaclust.cluster.sequences import Failed, Sequence, Update
from llamaclust.cluster.settings import EngineSettings, SchedulerSettings
from llamaclust.errors import DeadlineError, LlamaclustError, WorkerError
from llamaclust.wire.messages import Result

_WATCH_S = 1.0
_STOPPING = "the cluster is stopping"

_log = logging.getLogger(__name__)

_Given = ParamSpec("_Given")


class EngineState(StrEnum):
    READY = "ready"
    DRAINING = "draining"  # serves those who were let in to their end; others are refused by whoever lets in
    DOWN = "down"


def _step(step: Callable[Concatenate[Engine, _Given], None]) -> Callable[Concatenate[Engine, _Given], None]:
    """A step of an engine, called by the event loop: its error takes the engine down, so that readers learn of it."""

    @wraps(step)
    def run(engine: Engine, /, *given: _Given.args, **named: _Given.kwargs) -> None:
        if engine.state is EngineState.DOWN:
            return
        try:
            step(engine, *given, **named)
        except Exception as error:  # noqa: BLE001  a border
            engine.break_down(error)

    return run


class Engine:
    """A context manager: runs while it is open. The pipeline is its owner's to close, after the engine."""

    def __init__(
        self, pipeline: Pipeline, settings: SchedulerSettings, deadlines: EngineSettings | None = None
    ) -> None:
        self.scheduler = Scheduler(settings, pipeline.epoch, len(pipeline.stages))
        self.metrics = Metrics(pipeline.stages, lambda: self.scheduler.counts, monotonic_ns)
        self.state = EngineState.READY
        self.error: LlamaclustError | None = None  # why it is down
        self._pipeline = pipeline
        self._deadlines = deadlines or EngineSettings()
        self._mailboxes: dict[int, Mailbox] = {}
        self._is_scheduling = False  # soon
        self._empty = asyncio.Event()
        self._empty.set()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(part) for part in (self._pipeline.run(self._complete), self._watch())]
        for task in self._tasks:
            task.add_done_callback(self._ended)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._go_down(WorkerError(_STOPPING))
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def submit(self, ask: Generation) -> RequestStream:
        """Takes a request. Raises RequestError, QueueFullError, or WorkerError where the engine runs no more.

        While it drains as well: who comes from outside is refused there, and those who were let in have choices to come
        or prompts that are still being made.
        """
        if self.state is EngineState.DOWN:
            raise WorkerError(str(self.error or _STOPPING))
        sequence = self.scheduler.add(ask, monotonic_ns())
        mailbox = Mailbox(sequence)
        if sequence.has_work:
            self._open(sequence, mailbox)
        else:
            mailbox.put(Finished(FinishReason.LENGTH, sequence.timings()))
            mailbox.close()
        return RequestStream(mailbox, partial(self._abort, sequence.key))

    async def drain(self, timeout_s: float) -> bool:
        """Says that it drains, and waits for the requests it has; False where some are left after `timeout_s`."""
        if self.state is EngineState.READY:
            self.state = EngineState.DRAINING
        try:
            async with asyncio.timeout(timeout_s):
                await self._empty.wait()
        except TimeoutError:
            return False
        return True

    # -- schedule, run, complete -----------------------------------------------------------------------------------

    def _schedule_soon(self) -> None:
        """Once everybody who comes now is there: requests that come together start together."""
        if not self._is_scheduling:
            self._is_scheduling = True
            asyncio.get_running_loop().call_soon(self._schedule)

    @_step
    def _schedule(self) -> None:
        self._is_scheduling = False
        self._launch()

    def _launch(self) -> None:
        while (scheduled := self.scheduler.next_microbatch(monotonic_ns())) is not None:
            self._pipeline.submit(scheduled.microbatch, scheduled.inputs)

    @_step
    def _complete(self, result: Result) -> None:
        if result.failure is not None:
            raise WorkerError(result.failure)
        now_ns = monotonic_ns()
        news = self.scheduler.complete(result, now_ns)
        self._launch()
        tokens = sum(self._deliver(key, updates) for key, updates in news)
        self.metrics.completed(result, tokens, now_ns)

    async def _watch(self) -> None:
        """A microbatch that never comes back takes the engine down: nobody waits for ever."""
        while True:
            await asyncio.sleep(_WATCH_S)
            sent_ns = self.scheduler.oldest_sent_ns()
            age_s = (monotonic_ns() - sent_ns) / 1e9 if sent_ns is not None else 0.0
            if age_s > self._deadlines.result_s:
                raise DeadlineError(f"no result of a microbatch for {age_s:.0f} s from the {self._workers}")

    # -- requests --------------------------------------------------------------------------------------------------

    @property
    def _workers(self) -> str:
        return "workers " + ", ".join(f"{s.worker} (layers {s.start}-{s.end - 1})" for s in self._pipeline.stages)

    def _open(self, sequence: Sequence, mailbox: Mailbox) -> None:
        expire = partial(self._expire, sequence.key)
        mailbox.deadline = asyncio.get_running_loop().call_later(self._deadlines.request_s, expire)
        self._mailboxes[sequence.key] = mailbox
        self._empty.clear()
        self._schedule_soon()

    def _deliver(self, key: int, updates: ListLike[Update]) -> int:
        """Hands a sequence's news to its reader; how many tokens were among them."""
        tokens = 0
        for update in updates:
            if isinstance(update, Failed):
                self._close(key, "error", WorkerError(update.message))
                continue
            self._mailboxes[key].put(update)
            tokens += isinstance(update, TokenChosen)
            if isinstance(update, Finished):
                self._close(key, update.reason)
        return tokens

    def _abort(self, key: int) -> None:
        mailbox = self._mailboxes.get(key)
        if mailbox is not None:
            self.scheduler.abort(key)
            mailbox.put(Finished(FinishReason.ABORT, mailbox.sequence.timings()))
            self._close(key, FinishReason.ABORT)
            self._schedule_soon()

    def _expire(self, key: int) -> None:
        self.scheduler.abort(key)
        limit = f"the request took longer than {self._deadlines.request_s:g} s (timeouts.request)"
        self._close(key, "error", DeadlineError(limit))
        self._schedule_soon()

    def _close(self, key: int, reason: str, error: LlamaclustError | None = None) -> None:
        mailbox = self._mailboxes.pop(key)
        mailbox.close(error)
        self.metrics.finished(reason, mailbox.sequence.timings())
        if not self._mailboxes:
            self._empty.set()

    # -- the end ---------------------------------------------------------------------------------------------------

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A task ends only when the engine is closed or something broke; a reader must learn of either."""
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self.break_down(error)

    def break_down(self, error: BaseException) -> None:
        """Ends every request with `error`; no more are taken."""
        if isinstance(error, LlamaclustError):
            self._go_down(error)
        else:
            _log.error("the engine broke", exc_info=error)
            self._go_down(LlamaclustError(f"the engine broke: {type(error).__name__}: {error}"))

    def _go_down(self, error: LlamaclustError) -> None:
        if self.state is EngineState.DOWN:
            return
        self.state = EngineState.DOWN
        self.error = error
        for task in self._tasks:
            task.cancel()
        for key in list(self._mailboxes):
            self.scheduler.abort(key)
            self._close(key, "error", error)
