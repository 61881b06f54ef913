"""A lane's draft model at work: it gets what the scheduler orders, one batch after the other."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from time import monotonic_ns

from llamaclust.cluster.scheduler.drafting.model import DraftModel
from llamaclust.cluster.scheduler.scheduler import Scheduler
from llamaclust.cluster.scheduler.speculation.speculation import Speculation
from llamaclust.core.drafts import DraftOrder

_DEADLINE_S = 30.0
"""Of one batch: a model that takes longer is not asked any more."""

_log = logging.getLogger(__name__)


class ModelDrafts:
    """Sequences wait for drafts, so whatever goes wrong with the model, they go on without it."""

    def __init__(self, scheduler: Scheduler, drafted: Callable[[], None]) -> None:
        """`drafted` is called when there may be something to send."""
        self._scheduler = scheduler
        self._drafted = drafted
        self._task: asyncio.Task[None] | None = None

    def request(self) -> None:
        """Gives the model what there is for it to do, unless it is busy."""
        speculation = self._scheduler.speculation
        if speculation is None or speculation.model is None or self._task is not None:
            return
        if orders := speculation.next_orders(self._scheduler.queues.running):
            self._task = asyncio.get_running_loop().create_task(self._draft(speculation, speculation.model, orders))

    async def _draft(self, speculation: Speculation, model: DraftModel, orders: list[DraftOrder]) -> None:
        begun_ns = monotonic_ns()
        try:
            async with asyncio.timeout(_DEADLINE_S):
                replies = await model.draft(orders)
            speculation.drafted(replies, monotonic_ns() - begun_ns, self._scheduler.by_key)
        except Exception as error:  # noqa: BLE001  a border: answers do not depend on drafts
            _log.warning("the draft model failed, and is not asked any more: %r", error)
            speculation.lose_model()
        finally:
            self._task = None
        self._drafted()

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
