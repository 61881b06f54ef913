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

from llamaclust.cluster.engine.metrics import Metrics
from llamaclust.cluster.engine.pipeline import Pipeline
from llamaclust.cluster.engine.request_stream import Mailbox, RequestStream
from llamaclust.cluster.scheduler.requests import Finished, FinishReason, GenerationRequest, Timings, TokenSampled
from llamaclust.cluster.scheduler.scheduler import Scheduler
from llamaclust.cluster.scheduler.sequences import Failed, Sequence, Update
from llamaclust.cluster.scheduler.settings import EngineSettings, SchedulerSettings
from llamaclust.core.errors import DeadlineError, LlamaclustError, WorkerError
from llamaclust.wire.microbatch.messages import Result

_WATCH_S = 1.0
_STOPPING = "the cluster is stopping"

_log = logging.getLogger(__name__)

_Given = ParamSpec("_Given")


class EngineState(StrEnum):
    READY = "ready"
    RECOVERING = "recovering"  # the pipeline is lost: requests are taken, and wait with those that are there
    DRAINING = "draining"  # serves those who were let in to their end; others are refused by whoever lets in
    DOWN = "down"  # requests are refused


OnLost = Callable[[LlamaclustError], None]
"""Called with the reason when a pipeline is lost."""


def _step(step: Callable[Concatenate[Engine, _Given], None]) -> Callable[Concatenate[Engine, _Given], None]:
    """A step of an engine, called by the event loop: its error is not lost, so that readers learn of it."""

    @wraps(step)
    def run(engine: Engine, /, *given: _Given.args, **named: _Given.kwargs) -> None:
        if engine.state is EngineState.DOWN:
            return
        try:
            step(engine, *given, **named)
        except Exception as error:  # noqa: BLE001  a border
            engine._lose(error)

    return run


class Engine:
    """A context manager: runs while it is open. Pipelines are their owner's to close, after the engine.

    A pipeline that is lost takes the engine down, unless somebody is told `on_lost`: then requests wait, until that one
    gives another pipeline to `resume` or says `give_up`.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        settings: SchedulerSettings,
        deadlines: EngineSettings | None = None,
        on_lost: OnLost | None = None,
    ) -> None:
        self.scheduler = Scheduler(settings, pipeline.epoch, len(pipeline.stages))
        self.metrics = Metrics(pipeline.stages, lambda: self.scheduler.counts, monotonic_ns)
        self.error: LlamaclustError | None = None  # why it is down or waits
        self.answered = 0  # requests that ended without an error
        self._is_closed = False
        self._is_refusing = False
        self._is_draining = False
        self._is_paused = False
        self._on_lost = on_lost
        self._pipeline = pipeline
        self._deadlines = deadlines or EngineSettings()
        self._mailboxes: dict[int, Mailbox] = {}
        self._is_scheduling = False  # soon
        self._empty = asyncio.Event()
        self._empty.set()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def state(self) -> EngineState:
        if self._is_closed or self._is_refusing:
            return EngineState.DOWN
        if self._is_draining:
            return EngineState.DRAINING
        return EngineState.RECOVERING if self._is_paused else EngineState.READY

    async def __aenter__(self) -> Self:
        self._run()
        return self

    def _run(self) -> None:
        loop = asyncio.get_running_loop()
        on_result = partial(self._take, self._pipeline)
        self._tasks = [loop.create_task(part) for part in (self._pipeline.run(on_result), self._watch())]
        for task in self._tasks:
            task.add_done_callback(self._ended)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        tasks = self._tasks
        self._go_down(WorkerError(_STOPPING))
        await asyncio.gather(*tasks, return_exceptions=True)

    def submit(self, ask: GenerationRequest) -> RequestStream:
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
        self._is_draining = True
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

    def _take(self, pipeline: Pipeline, result: Result) -> None:
        """What comes late from a pipeline that was given up counts no more."""
        if pipeline is self._pipeline and not self._is_paused:
            self._complete(result)

    def _launch(self) -> None:
        if self._is_paused:
            return
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
        """A microbatch that never comes back means that the pipeline is lost: nobody waits for ever."""
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
            tokens += isinstance(update, TokenSampled)
            if isinstance(update, Finished):
                self.answered += 1
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
        timings = mailbox.sequence.timings()
        self.metrics.finished(reason, timings)
        if _log.isEnabledFor(logging.INFO):
            _log.info("request ended%s", f": {error}" if error else "", extra=_told(mailbox.sequence, reason, timings))
        if not self._mailboxes:
            self._empty.set()

    # -- a lost pipeline, another one, the end -----------------------------------------------------------------------

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A task ends only when it is stopped or something broke; a reader must learn of that."""
        error = None if task.cancelled() else task.exception()
        if error is not None and task in self._tasks:
            self._lose(error)

    def _lose(self, error: BaseException) -> None:
        if self._on_lost is None or not isinstance(error, LlamaclustError):
            self.break_down(error)
        elif not self._is_closed and not self._is_paused:
            self._stop()
            self._is_paused = True
            self.error = error
            self._on_lost(error)

    def interrupt(self, why: LlamaclustError) -> None:
        """Gives up a pipeline that works: as if it were lost."""
        self._lose(why)

    def _stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        self._tasks = []

    def resume(self, pipeline: Pipeline, settings: SchedulerSettings) -> None:
        """Goes on with another pipeline, which is new: every request is computed again from its own tokens."""
        if self._is_closed:
            return
        self._stop()
        self._pipeline = pipeline
        self.scheduler.restart(settings, pipeline.epoch, len(pipeline.stages))
        self.metrics.restart(pipeline.stages)
        self._is_paused = self._is_refusing = False
        self.error = None
        self._run()
        self._schedule_soon()

    def give_up(self, error: LlamaclustError) -> None:
        """Ends every request with `error`; no more are taken until `resume`."""
        if not self._is_closed:
            self._is_refusing = True
            self._fail(error)

    def break_down(self, error: BaseException) -> None:
        """Ends every request with `error`; no more are ever taken."""
        if isinstance(error, LlamaclustError):
            self._go_down(error)
        else:
            _log.error("the engine broke", exc_info=error)
            self._go_down(LlamaclustError(f"the engine broke: {type(error).__name__}: {error}"))

    def _go_down(self, error: LlamaclustError) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._stop()
            self._fail(error)

    def _fail(self, error: LlamaclustError) -> None:
        self.error = error
        for key in list(self._mailboxes):
            self.scheduler.abort(key)
            self._close(key, "error", error)


def _told(sequence: Sequence, reason: str, timings: Timings) -> dict[str, object]:
    """What a log says of a request that ended: whose it is, and nothing of what it said."""
    return {
        "request": sequence.request.request_id,
        "reason": str(reason),
        "prompt_tokens": timings.prompt_tokens,
        "tokens": timings.generated_tokens,
        "ttft_ms": round(timings.ttft_ms, 3),
        "seconds": round((monotonic_ns() - sequence.arrived_ns) / 1e9, 3),
    }
