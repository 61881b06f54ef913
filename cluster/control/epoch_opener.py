"""Opens the epoch of a plan: tells what is loaded meanwhile, and remembers who failed at it."""

from __future__ import annotations

from collections.abc import Callable

from llamaclust.cluster.control.epochs import Epoch, Epochs
from llamaclust.cluster.control.notices import moving_text
from llamaclust.cluster.control.quarantine import LeftOut
from llamaclust.cluster.membership.registry import Registry
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.cluster.planner.format import plan_lines
from llamaclust.cluster.planner.links import Links
from llamaclust.cluster.planner.plan import Plan
from llamaclust.cluster.state.events import News, PlanMade, Watch, WorkerLoading, WorkerReading
from llamaclust.core.errors import DeadlineError, LlamaclustError, StalledError
from llamaclust.wire.control.messages import FindWeightsProgress, LoadProgress


class EpochOpener:
    """`is_start`: whether no epoch has served yet; then the whole plan and each load are told. `left_out` hears of
    workers that are given up, and of those that took part."""

    def __init__(
        self, epochs: Epochs, registry: Registry, watch: Watch, is_start: Callable[[], bool], left_out: LeftOut
    ) -> None:
        self._epochs = epochs
        self._registry = registry
        self._watch = watch
        self._is_start = is_start
        self._left_out = left_out
        self._suspects: list[tuple[WorkerHandle, BaseException]] = []

    async def open(self, plan: Plan, links: Links, *, alone: bool) -> Epoch:
        """The plan's epoch, once it is loaded. Who fails is suspected of it; who gets no further is given up."""
        self._suspects = []
        if self._is_start():
            self._watch(PlanMade(tuple(plan_lines(plan))))
        else:
            self._watch(News(moving_text(plan, self._registry.workers)))
        stages = {stage.worker: stage for stage in plan.stages}

        def progress(worker: str, news: LoadProgress) -> None:
            if self._is_start():
                stage = stages[worker]
                self._watch(WorkerLoading(worker, stage.start, stage.end, news.done_bytes, news.total_bytes))

        epoch = await self._epochs.open(
            plan, links, alone=alone, on_progress=progress, on_reading=self._reading, on_error=self._failed
        )
        self._left_out.forget([stage.worker for stage in plan.stages])
        for worker in epoch.workers if self._is_start() else ():
            order, loaded = worker.stages[epoch.number]
            self._watch(WorkerLoading(worker.name, order.start, order.end, loaded.weight_bytes, loaded.weight_bytes))
        return epoch

    def _reading(self, worker: str, news: FindWeightsProgress) -> None:
        if self._is_start():
            self._watch(WorkerReading(worker, news.done_bytes, news.total_bytes))

    def _failed(self, worker: WorkerHandle, error: BaseException) -> None:
        self._suspects.append((worker, error))
        if isinstance(error, StalledError):
            self._give_up(worker, f"it hangs: {error}")

    def give_up_suspects(self, error: LlamaclustError, *, at_once: bool) -> None:
        """Of the failure before; those that did not answer in any case, the others `at_once` or not yet."""
        for worker, why in self._suspects:
            if at_once or isinstance(why, DeadlineError):
                self._give_up(worker, f"it takes no part in a new epoch: {error}")

    def _give_up(self, worker: WorkerHandle, why: str) -> None:
        self._left_out.add(worker.name)
        self._registry.fence(worker, why)
