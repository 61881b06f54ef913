"""Sends the scheduler's requests for drafts to a draft model, one batch at a time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from time import monotonic_ns

from llamaclust.cluster.scheduler.scheduler import Scheduler
from llamaclust.cluster.scheduler.speculation.model_drafts import ModelDrafts
from llamaclust.core.drafts import DraftReplies
from llamaclust.core.errors import DeadlineError, LlamaclustError

_DEADLINE_S = 30
_SLICE_S = 1.0
"""Seconds of one wait. The deadline consists of many waits, so that a pause of this process uses up only one."""

_log = logging.getLogger(__name__)


class DraftRunner:
    """Runs a draft model. If the model fails, it is disabled, and waiting sequences continue without drafts."""

    def __init__(self, scheduler: Scheduler, drafted: Callable[[], None]) -> None:
        self._scheduler = scheduler
        self._drafted = drafted
        self._task: asyncio.Task[None] | None = None

    def request(self) -> None:
        speculation = self._scheduler.speculation
        if speculation is None or (drafts := speculation.model_drafts) is None or self._task is not None:
            return
        if orders := drafts.next_orders(self._scheduler.queues.running):
            begun_ns = monotonic_ns()
            try:
                drafting = drafts.model.draft(orders)
            except Exception as error:  # noqa: BLE001  answers do not depend on drafts
                self._lose(drafts, error)
                self._drafted()
            else:
                self._task = asyncio.get_running_loop().create_task(self._wait(drafts, drafting, begun_ns))

    async def _wait(self, drafts: ModelDrafts, drafting: Awaitable[DraftReplies], begun_ns: int) -> None:
        try:
            replies = await _in_time(drafting)
            drafts.drafted(replies, monotonic_ns() - begun_ns, self._scheduler.by_key)
        except Exception as error:  # noqa: BLE001  answers do not depend on drafts
            self._lose(drafts, error)
        finally:
            self._task = None
        self._drafted()

    def _lose(self, drafts: ModelDrafts, error: Exception) -> None:
        text = str(error) if isinstance(error, LlamaclustError) else repr(error)
        _log.warning("the draft model failed and is disabled: %s", text)
        drafts.model.lose()

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()


async def _in_time(drafting: Awaitable[DraftReplies]) -> DraftReplies:
    awaited = asyncio.ensure_future(drafting)
    try:
        for _ in range(round(_DEADLINE_S / _SLICE_S)):
            if (await asyncio.wait((awaited,), timeout=_SLICE_S))[0]:
                return awaited.result()
    finally:
        awaited.cancel()
    raise DeadlineError(f"the draft model did not answer within {_DEADLINE_S} s")
