"""Turns the registry's events into observations: a worker joins, is lost, hangs, or cannot reach a neighbour."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from llamaclust.cluster.control import observations
from llamaclust.cluster.control.actions import ActionRunner
from llamaclust.cluster.control.epochs import Epoch
from llamaclust.cluster.control.failures.overdue import OverdueResults, PendingResult, delaying_stage
from llamaclust.cluster.control.notices import lost_text, version_text
from llamaclust.cluster.control.partitions import PartitionTracker
from llamaclust.cluster.control.pool.newcomers import Newcomers
from llamaclust.cluster.launchers.base import Launcher
from llamaclust.cluster.membership.members import HeartbeatReceived, MemberJoined, MembershipEvent, PeerReported
from llamaclust.cluster.membership.registry import Registry
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.cluster.membership.worker_requests import renew_memory
from llamaclust.cluster.planner.links import COORDINATOR
from llamaclust.cluster.planner.plan import Plan
from llamaclust.cluster.planner.step_limits import UNPREDICTED_S, hang_text, link_limit_s, silence_text, step_limit_s
from llamaclust.cluster.scheduler.scheduler import Scheduler
from llamaclust.cluster.state.events import Notice, Report
from llamaclust.wire.rpc.task_set import TaskSet


@dataclass(eq=False)
class MembershipWatch:
    _registry: Registry
    _launcher: Launcher
    _runners: Sequence[ActionRunner]
    _newcomers: Newcomers
    _partitions: PartitionTracker
    _ending: TaskSet
    _report: Report
    _first_joins: frozenset[int] = field(default=frozenset(), init=False)
    _silent: set[WorkerHandle] = field(default_factory=set, init=False)  # Silent workers that send heartbeats.
    _overdue: OverdueResults = field(default_factory=OverdueResults, init=False)

    def start(self) -> None:
        registry = self._registry
        self._first_joins = frozenset(registry.joins[name] for name in registry.present)
        for worker in registry.present.values():
            self._note_version(worker)
            self._newcomers.take(worker)
        # These workers were lost while machines were measured.
        for name in registry.workers.keys() - registry.present.keys():
            self._ending.start(self._launcher.end(name))
        registry.subscribe(self._changed)

    async def close(self) -> None:
        await self._newcomers.close()

    def _changed(self, event: MembershipEvent) -> None:
        worker = event.worker
        if isinstance(event, PeerReported):
            self._partitions.suspect(worker, event.report)
        elif isinstance(event, HeartbeatReceived):
            self._check_steps(worker)
            self._check_memory(worker)
            self._check_silence(worker)
        elif isinstance(event, MemberJoined):
            if self._registry.joins[worker.name] in self._first_joins:
                return  # The worker was present when `start` ran. It has only now learned of its admission.
            self._report(Notice(f"worker {worker.name} joined (pid {worker.registration.pid})"))
            self._note_version(worker)
            self._newcomers.joined(worker)
        else:
            self._lost(worker)

    def _note_version(self, worker: WorkerHandle) -> None:
        if text := version_text(worker):
            self._report(Notice(text))

    def _check_steps(self, worker: WorkerHandle) -> None:
        """Marks workers as lost: `worker` if its step takes too long, and each worker that delays an overdue result."""
        computing_s = 0.0 if worker.heartbeat is None else worker.heartbeat.computing_s
        limits_s = self._limits_s(worker)
        limit_s = max(limits_s, default=UNPREDICTED_S)
        if computing_s > limit_s and any(runner.engine is not None for runner in self._runners):
            self._registry.mark_lost(worker, hang_text(computing_s, limit_s))
        now_s = asyncio.get_running_loop().time()
        due = [(runner, *served) for runner in self._runners for served in _due(runner)]
        self._overdue.keep([epoch.number for _, epoch, _, _ in due])
        for runner, epoch, scheduler, number in due:
            self._check_result(runner, epoch, number, scheduler.in_flight.most_rows, now_s)

    def _check_memory(self, worker: WorkerHandle) -> None:
        """Requests new plans for models that lack memory, if the worker has clearly more memory than plans assumed."""
        short = [runner for runner in self._runners if runner.store.state.is_short]
        if short and renew_memory(worker):
            for runner in short:
                runner.store.post(observations.Signal.MEMORY_FREED)

    def _check_silence(self, worker: WorkerHandle) -> None:
        """Requests new plans when a worker that was left out for its silence can be used again."""
        if worker.channel.is_silent:
            self._silent.add(worker)
        elif worker in self._silent:
            self._silent.discard(worker)
            for runner in self._runners:
                runner.store.post(observations.Signal.LINKS_CHANGED)

    def _check_result(self, runner: ActionRunner, epoch: Epoch, number: int, rows: int, now_s: float) -> None:
        chain = epoch.chain
        stage = delaying_stage(number, [worker.progress(epoch.number) for worker in chain])
        worker, names = _computing(epoch, stage), [COORDINATOR, *(worker.name for worker in chain), COORDINATOR]
        links = (runner.planner.links.between(*names[end : end + 2]) for end in (stage, stage + 1))
        hidden_bytes = 4 * rows * runner.planner.model.hyperparameters.embedding_length
        limit_s = self._turns_s(worker) + sum(link_limit_s(link, hidden_bytes) for link in links)
        waited_s = self._overdue.waited_s(PendingResult(epoch.number, number, stage), now_s)
        if waited_s > limit_s and worker.loss is None:
            self._registry.mark_lost(worker, silence_text(number, waited_s, limit_s))

    def _turns_s(self, worker: WorkerHandle) -> float:
        """Returns the sum of the time limits of the worker's steps in all pipelines. A step may wait for the others."""
        due = (served for runner in self._runners for served in _due(runner))
        stages = ((epoch.stage_of(worker), scheduler, epoch.plan) for epoch, scheduler, _ in due)
        return sum(stage_limit_s(scheduler, plan, stage) for stage, scheduler, plan in stages if stage is not None)

    def _limits_s(self, worker: WorkerHandle) -> list[float]:
        served = (runner for runner in self._runners if runner.engine is not None)
        return [limit_s for runner in served for limit_s in _limits_s(runner, worker)]

    def _lost(self, worker: WorkerHandle) -> None:
        self._silent.discard(worker)
        requests = {runner.planner.config.model_name: _requests(runner, worker) for runner in self._runners}
        self._report(Notice(lost_text(worker.error, requests)))
        self._ending.start(self._launcher.end(worker.name))
        self._partitions.forget(worker.name)
        for runner in self._runners:
            runner.store.post(observations.WorkerLost(worker.name))


def _computing(epoch: Epoch, stage: int) -> WorkerHandle:
    """Returns the stage's worker or, in a group, the member whose current step has taken longest."""
    members = [worker for worker in epoch.workers if epoch.stage_of(worker) == stage]
    return max(members, key=lambda worker: 0.0 if worker.heartbeat is None else worker.heartbeat.computing_s)


def _requests(runner: ActionRunner, worker: WorkerHandle) -> int:
    if runner.engine is None or runner.epoch is None or worker not in runner.epoch.workers:
        return 0
    return runner.engine.counts.running + runner.engine.counts.waiting


def _served(runner: ActionRunner) -> Iterator[tuple[Epoch, Scheduler]]:
    schedulers = () if runner.engine is None else runner.engine.schedulers
    by_epoch = {scheduler.in_flight.epoch: scheduler for scheduler in schedulers}
    for epoch in runner.open_epochs:
        if epoch.number in by_epoch:
            yield epoch, by_epoch[epoch.number]


def _due(runner: ActionRunner) -> Iterator[tuple[Epoch, Scheduler, int]]:
    """Yields each epoch that has microbatches in flight, its scheduler, and the number of the next expected result."""
    if runner.engine is None or not runner.engine.is_running:
        return
    for epoch, scheduler in _served(runner):
        due = scheduler.in_flight.due
        if due is not None and due[0] == epoch.number:
            yield epoch, scheduler, due[1]


def _limits_s(runner: ActionRunner, worker: WorkerHandle) -> list[float]:
    stages = [(epoch.stage_of(worker), scheduler, epoch.plan) for epoch, scheduler in _served(runner)]
    return [stage_limit_s(scheduler, plan, stage) for stage, scheduler, plan in stages if stage is not None]


def stage_limit_s(scheduler: Scheduler, plan: Plan, stage: int) -> float:
    rows, prediction = scheduler.in_flight.most_rows, plan.prediction
    measured_s = [times_ns[stage] / 1e9 for times_ns in scheduler.times.predictions(rows)]
    first = sum(map(len, plan.by_stage[:stage]))
    members = slice(first, first + len(plan.by_stage[stage]))
    predicted = () if prediction is None else prediction.stages[members]
    return step_limit_s(rows, measured_s, predicted)
