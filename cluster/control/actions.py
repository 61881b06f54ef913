"""Executes the supervisor's actions: makes plans, loads stages on workers, and switches the engine to them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llamaclust.cluster.control import observations
from llamaclust.cluster.control import reconcile as act
from llamaclust.cluster.control.cluster_state import ClusterState, Expulsion, PipelineLoss
from llamaclust.cluster.control.epochs import Epoch, Epochs, StageLoadError
from llamaclust.cluster.control.notices import awake_text, images_text, kv_memory_text, moving_text, recovered_text
from llamaclust.cluster.control.observations import Incarnation
from llamaclust.cluster.control.partitions import PartitionTracker
from llamaclust.cluster.control.state_store import StateStore
from llamaclust.cluster.engine.engine import Engine, EngineState
from llamaclust.cluster.engine.retirement import Retirement
from llamaclust.cluster.membership.registry import Registry
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.cluster.membership.worker_requests import ADAPTERS_S
from llamaclust.cluster.planner.format import encoder_lines, plan_lines
from llamaclust.cluster.planner.plan import Plan, Prediction
from llamaclust.cluster.state.events import Notice, PlanMade, Report, Waiting, WorkerLoading
from llamaclust.core.errors import DisputeError, InsufficientMemoryError, LlamaclustError, UsageError, WorkerError
from llamaclust.wire.rpc.deadlines import deadline
from llamaclust.wire.rpc.task_set import TaskSet

if TYPE_CHECKING:
    from llamaclust.cluster.control.planning import ClusterPlanner
    from llamaclust.model.loader import Model

_ENDING_S = 30.0


@dataclass(eq=False)
class ActionRunner:
    """Executes the supervisor's actions for one model. Posts the result of each action as an observation."""

    store: StateStore
    epochs: Epochs
    planner: ClusterPlanner
    _registry: Registry
    _partitions: PartitionTracker
    _report: Report
    # Tasks that end the processes of lost workers. A load waits for them, because it needs their memory.
    ending: TaskSet
    epoch: Epoch | None = field(default=None, init=False)  # Epoch that serves, or that served before it was lost.
    retiring: Epoch | None = field(default=None, init=False)  # Epoch that served before a move and still has sequences.
    engine: Engine | None = field(default=None, init=False)  # None until `Supervisor.run` sets it.
    plan: Plan | None = field(default=None, init=False)  # Plan of the epoch that serves or that served last.
    recoveries: int = field(default=0, init=False)
    unfit: set[Incarnation] = field(default_factory=set, init=False)  # Workers that a notice named as unfit for plans.
    watching: TaskSet = field(default_factory=TaskSet, init=False)  # Tasks that wait for the end of the retiring epoch.
    _loaded: Epoch | None = field(default=None, init=False)

    @property
    def open_epochs(self) -> tuple[Epoch, ...]:
        return tuple(epoch for epoch in (self.epoch, self.retiring) if epoch is not None)

    @property
    def is_asleep(self) -> bool:
        return not self.store.state.is_wanted

    async def set_adapters(self, model: Model) -> None:
        """Replaces the adapters of all loaded stages by those of `model`. First waits until no recovery is under way
        and no microbatch in flight uses a removed adapter. The prefix cache already has such microbatches' blocks."""
        engine = self.engine
        assert engine is not None

        def is_recovered(state: ClusterState) -> bool:  # The engine knows of a loss earlier than the state.
            return state.loss is None and engine.state is not EngineState.RECOVERING

        removed = self.planner.model.adapter_digests.items() - model.adapter_digests.items()
        async with deadline(f"the change of adapters of {self.planner.config.model_name}", ADAPTERS_S):
            await engine.wait_unused({number for number, _ in removed})
            await self.store.until(lambda state: is_recovered(state) or not state.is_wanted)
            await self.epochs.set_adapters(model)
        self.planner.model = model

    async def run(self, action: act.Action) -> None:
        match action:
            case act.MakePlan(inputs):
                await self._make_plan(inputs)
            case act.LoadEpoch(plan, is_exclusive):
                await self._load(plan, is_exclusive=is_exclusive)
            case act.Serve():
                await self._serve()
            case act.FreeRetired():
                await self._free_retired()
            case act.ClosePipeline():
                await asyncio.gather(*(epoch.pipeline.close() for epoch in self.open_epochs))
                self.retiring = None
                await self._partitions.settled()
                if (loss := self.store.state.loss) is not None and isinstance(loss.error, DisputeError):
                    record = self.store.state.pool.disputes.records[loss.error.pair]
                    self._notice(f"{loss.error}; plans keep them in different groups for {record.pause_s:g} s")
                self.store.post(observations.Signal.PIPELINE_CLOSED)
            case act.Sleep(is_forced):
                await self._sleep(is_forced=is_forced)
            case act.Expel(expulsions):
                for expulsion in expulsions:
                    self._expel(expulsion)
                self.store.post(observations.Signal.WORKERS_EXPELLED)
            case act.FailRequests(reason):
                self._fail_requests(reason)
            case act.Interrupt(error):
                assert self.engine is not None
                self.engine.interrupt_pipeline(error)
            case act.Notify(text):
                if self.engine is None:
                    self._report(Waiting(text.removeprefix("waiting for ")))
                else:
                    self._notice(text)
                self.store.post(observations.Noticed(text))

    def _notice(self, text: str) -> None:
        config = self.planner.config
        self._report(Notice(f"model {config.model_name}: {text}" if config.models else text))

    def _expel(self, expulsion: Expulsion) -> None:
        name, join = expulsion.worker
        if expulsion.stays:
            config = self.planner.config
            model = f"model {config.model_name}" if config.models else "the model"
            pause = f"for {expulsion.pause_s:g} s unless {model} needs it"
            self._report(Notice(f"worker {name} is quarantined {pause}: {expulsion.reason}"))
        elif self._registry.joins.get(name) == join:
            self._registry.mark_lost(self._registry.workers[name], expulsion.reason)

    async def _make_plan(self, inputs: observations.PlanInputs) -> None:
        """Plans with workers that are neither quarantined nor silent, and adds others only if necessary."""
        present = self._registry.present
        usable = {name: present[name] for name, _ in inputs.workers if name in present}
        needs_images = self.engine is None and self.planner.config.mmproj is not None
        plan, failure = None, None
        measured_first = sorted(present.keys() - self.store.state.pool.present.keys())
        async with self.planner.ledger.lock:
            self.planner.ledger.planned(self.epochs.model_id)
            for workers in self._choices(usable, inputs.quarantined):
                try:
                    plan = await self.planner.plan(
                        workers, inputs.partitions, disputes=inputs.disputes, needs_images=needs_images
                    )
                    failure = None
                    break
                except (InsufficientMemoryError, UsageError, WorkerError) as error:
                    names = ", ".join(measured_first)
                    failure = WorkerError(f"still measuring: {names}") if names and not usable else error
            self._name_unfit(inputs.workers)
            is_beside = bool(self.planner.ledger.beside(self.epochs.model_id))
            if plan is not None and self.store.state.loss is not None:
                self._enter(plan)
        served = None if plan is None else await self._predict_served(usable)
        self.store.post(observations.Planned(inputs, plan, failure, served, is_beside))

    def _choices(
        self, usable: Mapping[str, WorkerHandle], quarantined: frozenset[str]
    ) -> Iterator[dict[str, WorkerHandle]]:
        """Yields the workers to plan with, in the order of preference. The last choice has all workers."""
        answering = {name: worker for name, worker in usable.items() if not worker.channel.is_silent}
        for of in (answering, usable) if len(answering) < len(usable) else (usable,):
            excluded = self.store.state.pool.quarantine.worst_first(quarantined & of.keys())
            for count in range(len(excluded), -1, -1):
                workers = {name: worker for name, worker in of.items() if name not in excluded[:count]}
                if workers or (of is usable and not count):
                    yield workers

    def _name_unfit(self, workers: tuple[Incarnation, ...]) -> None:
        self.unfit.intersection_update(workers)
        for worker in workers:
            if worker not in self.unfit and (why := self.planner.unfit.get(worker[0])):
                self.unfit.add(worker)
                self._notice(f"worker {worker[0]} gets no layers: {why}")

    async def _predict_served(self, workers: Mapping[str, WorkerHandle]) -> Prediction | None:
        serving, loss = self.store.state.serving, self.store.state.loss
        return None if serving is None or loss is not None else await self.planner.predict(serving.plan, workers)

    def _enter(self, *plans: Plan) -> None:
        self.planner.ledger.enter(self.epochs.model_id, plans)

    async def _load(self, plan: Plan, *, is_exclusive: bool) -> None:
        serving = () if is_exclusive or self.epoch is None else (self.epoch.plan,)
        async with self.planner.ledger.lock:
            is_reserved = self.planner.ledger.reserve(self.epochs.model_id, (*serving, plan))
        if not is_reserved:
            self.store.post(observations.Signal.MEMORY_TAKEN)
            return
        try:
            await self._open(plan, is_exclusive=is_exclusive)
        except (StageLoadError, LlamaclustError) as failed:
            error, suspects = (failed.error, failed.suspects) if isinstance(failed, StageLoadError) else (failed, ())
            if not is_exclusive:
                self._enter(*serving)
            if is_exclusive:
                await self._partitions.settled()
                if short := [each.name for each in suspects if isinstance(each.error, InsufficientMemoryError)]:
                    await self.epochs.refresh_memory(short, self.planner.ledger)
            self.store.post(observations.EpochLoadFailed(error, is_exclusive, suspects, self.epochs.file_is_absent))
            return
        self.store.post(observations.Signal.EPOCH_LOADED)

    async def _open(self, plan: Plan, *, is_exclusive: bool) -> None:
        async with deadline("the end of lost workers' processes", _ENDING_S):
            await self.ending.join()
        is_start = self.engine is None
        if is_start:
            unknown = self.planner.profiles.unknown_speeds(self._registry.present)
            lines = plan_lines(plan, unknown=unknown)
            self._report(PlanMade((*lines, *encoder_lines(plan, self.planner.model.projector))))
        else:
            self._notice(moving_text(plan, self.epochs.held_layers))
        report, links = self._report if is_start else None, self.planner.links
        self._loaded = await self.epochs.open(
            plan,
            links,
            is_exclusive=is_exclusive,
            is_useless=lambda: self.store.state.is_plan_useless,
            report=report,
        )
        if report is not None:
            for worker in self._loaded.workers:
                order, loaded = worker.stages[self._loaded.number]
                total_bytes = loaded.weight_bytes
                report(
                    WorkerLoading(worker.name, *order.limits.places(order.start, order.end), total_bytes, total_bytes)
                )

    async def _serve(self) -> None:
        old, epoch, loss = self.epoch, self._loaded, self.store.state.loss
        assert epoch is not None
        if (text := images_text(self.plan, epoch.plan)) is not None:
            self._notice(text)
        if (text := kv_memory_text(self.plan, epoch.plan)) is not None:
            self._notice(text)
        self.epoch, self._loaded = epoch, None
        self.plan = epoch.plan
        self.planner.kept_context = epoch.plan.context_length
        if self.engine is not None:
            retirement = self.engine.resume(epoch.pipeline, epoch.settings)
            if retirement is not None:
                self.retiring = old
                self.watching.start(self._observe(retirement, old))
        self.store.post(observations.Signal.EPOCH_SERVING)
        if self.engine is None or self.retiring is not None:
            return
        if loss is not None:
            self._recovered(self.engine, loss)
        if old is not None:
            await old.pipeline.close()
        await self._free_others(epoch)

    def _recovered(self, engine: Engine, loss: PipelineLoss) -> None:
        seconds = asyncio.get_running_loop().time() - loss.since_s
        requests = engine.counts.running + engine.counts.waiting
        if loss.error is None:
            self._report(Notice(awake_text(self.planner.config.model_name, seconds, requests)))
            return
        self.recoveries += 1
        engine.metrics.recovered(seconds)
        self._notice(recovered_text(seconds, requests))

    async def _observe(self, retirement: Retirement, retiring: Epoch | None) -> None:
        encoder = None if self.engine is None else self.engine.encoder
        last_tile = () if encoder is None else (encoder.wait_idle(),)
        await asyncio.gather(retirement.ended.wait(), *last_tile)
        if retirement.error is not None:
            self._notice(f"requests of the previous epoch are computed again: {retirement.error}")
        if self.retiring is retiring:
            self.store.post(observations.Signal.RETIRING_EMPTY)

    async def _free_retired(self) -> None:
        retired, self.retiring = self.retiring, None
        assert retired is not None and self.epoch is not None
        await retired.pipeline.close()
        await self._free_others(self.epoch)
        self.store.post(observations.Signal.RETIRING_FREED)

    async def _sleep(self, *, is_forced: bool) -> None:
        assert self.engine is not None
        if not self.engine.sleep(is_forced=is_forced):
            self.store.post(observations.Signal.WAKE_REQUESTED)
            return
        epochs, self.epoch, self.retiring = self.open_epochs, None, None
        await asyncio.gather(*(epoch.pipeline.close() for epoch in epochs))
        await self._free_others(None)
        why = "it is another model's turn, and requests for this model wait" if is_forced else "a request wakes it"
        self._report(Notice(f"model {self.planner.config.model_name} sleeps: {why}"))
        self.store.post(observations.Signal.ASLEEP)
        # Requests for this model may have arrived while its stages were freed.
        if not (self.store.state.is_preempted or self.engine.requests.are_empty):
            self.store.post(observations.Signal.WAKE_REQUESTED)

    async def _free_others(self, epoch: Epoch | None) -> None:
        try:
            await self.epochs.free_others(epoch)
        except LlamaclustError as error:
            self._notice(f"layers that are no longer needed could not be freed: {error}")
        self._enter(*(() if epoch is None else (epoch.plan,)))

    def _fail_requests(self, reason: str) -> None:
        loss = self.store.state.loss
        assert self.engine is not None and loss is not None
        # The lost worker's error is preferred to errors of workers that could not reach it.
        lost = None if self.epoch is None else self.epoch.root_cause
        error = loss.error if lost is None else lost.error
        self.engine.fail_requests(WorkerError(reason if error is None else f"{error}; {reason}"))
        self.store.post(observations.RequestsFailed(reason))
        if not self.store.state.is_alone:  # The next request tries to load the model again.
            self.store.post(observations.Signal.SLEEP_REQUESTED)
