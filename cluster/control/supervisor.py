"""Runs the control loop that keeps a pipeline ready for the engine of a model."""

from __future__ import annotations

import asyncio

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.control import observations
from llamaclust.cluster.control.actions import ActionRunner
from llamaclust.cluster.control.cluster_state import ClusterState, PipelineLoss, PoolState, Waits
from llamaclust.cluster.control.epochs import Epoch, Epochs
from llamaclust.cluster.control.planning import ClusterPlanner
from llamaclust.cluster.control.pool.worker_pool import WorkerPool
from llamaclust.cluster.control.reconcile import Abort, Action, Wait, reconcile
from llamaclust.cluster.control.state_store import StateStore
from llamaclust.cluster.engine.engine import Engine
from llamaclust.cluster.engine.failures import PipelineFailure
from llamaclust.cluster.planner.plan import Plan
from llamaclust.cluster.state.events import Notice, Report


class Supervisor:
    """Runs the control loop of one model. `start` loads the first pipeline, and `run` keeps a pipeline running."""

    def __init__(
        self,
        config: ClusterConfig,
        epochs: Epochs,
        planner: ClusterPlanner,
        pool: WorkerPool,
        *,
        report: Report,
        is_asleep: bool = False,
    ) -> None:
        """Adds the model to the pool. If `is_asleep` is set, the model is loaded when the first request comes."""
        now_s, workers = asyncio.get_running_loop().time(), pool.workers
        usable = PoolState(drained=workers.record.drained)
        waits = Waits(recovery_s=config.timeouts.recovery, start_s=max(config.timeouts.recovery, workers.start_s))
        loss = PipelineLoss(now_s, is_closed=is_asleep)
        state = ClusterState(
            waits,
            len(config.workers),
            observations.Tick(now_s),
            loss,
            pool=usable,
            is_start=not is_asleep,
            is_wanted=not is_asleep,
            is_unloaded=is_asleep,
            is_alone=len(config.models) < 2,
        )
        self.store = StateStore(state)
        self._runner = ActionRunner(self.store, epochs, planner, workers.registry, pool.partitions, report, pool.ending)
        pool.runners.append(self._runner)
        self._launcher = workers.launcher
        self._report = report
        self._action: asyncio.Task[None] | None = None

    @property
    def epoch(self) -> Epoch:
        assert self._runner.epoch is not None
        return self._runner.epoch

    @property
    def plan(self) -> Plan | None:
        return self._runner.plan

    @property
    def number(self) -> int | None:
        return None if self._runner.epoch is None else self._runner.epoch.number

    @property
    def retiring_epoch(self) -> Epoch | None:
        return self._runner.retiring

    async def close_pipelines(self) -> None:
        await asyncio.gather(*(epoch.pipeline.close() for epoch in self._runner.open_epochs))

    @property
    def planner(self) -> ClusterPlanner:
        return self._runner.planner

    @property
    def recoveries(self) -> int:
        return self._runner.recoveries

    async def start(self) -> Epoch:
        await self._loop(is_start=True)
        return self.epoch

    async def aclose(self) -> None:
        if self._action is not None:
            self._action.cancel()
            await asyncio.wait([self._action])
        await self._runner.watching.close()

    async def run(self, engine: Engine) -> None:
        self._runner.engine = engine
        await self._loop(is_start=False)

    def pipeline_lost(self, failure: PipelineFailure) -> None:
        self._report_ended(failure)
        self.store.post(observations.PipelineLost(failure.error, failure.requests, failure.causes, failure.is_repeated))

    def retiring_pipeline_lost(self, failure: PipelineFailure) -> None:
        self._report_ended(failure)
        self.store.post(observations.RequestsStruckOut(failure.causes))

    def _report_ended(self, failure: PipelineFailure) -> None:
        for error in failure.ended.values():
            self._report(Notice(str(error)))
        if self._runner.engine is not None and self._runner.engine.suspects_request:
            self._launcher.reset_restarts()

    def engine_closed(self) -> None:
        self.store.notify()

    @property
    def may_suspect_workers(self) -> bool:
        is_planned = self._runner.planner.config.plan is None
        return is_planned and self.store.state.pool.may_exclude_more(self._tick().now_s)

    def rows_failed(self, key: int) -> None:
        self.store.post(observations.RowsFailed(key))

    async def _loop(self, *, is_start: bool) -> None:
        while not (is_start and self._runner.epoch is not None and self._action is None):
            self.store.apply(self._tick())
            until_s = self._act(reconcile(self.store.state))
            observation = await self.store.next(until_s)
            if observation is not None:
                self.store.apply(self._tick())
                self.store.apply(observation)
                if self.store.state.is_plan_useless:
                    self._runner.epochs.cancel_loads()
            if observation is observations.Signal.ACTION_ENDED:
                assert self._action is not None
                ended, self._action = self._action, None
                ended.result()  # An error of the task is a bug.

    def _act(self, action: Action | None) -> float | None:
        match action:
            case None:
                return None
            case Abort(error):
                raise error
            case Wait(until_s, is_settled):
                if is_settled and self.store.is_current:
                    self.store.settle()
                return until_s
        self.store.begin()
        self._action = asyncio.create_task(self._runner.run(action))
        self._action.add_done_callback(lambda _: self.store.post(observations.Signal.ACTION_ENDED))
        return None

    def _tick(self) -> observations.Tick:
        return observations.Tick(asyncio.get_running_loop().time())
