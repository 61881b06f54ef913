"""Executes operators' requests: to drain or undrain a worker, and to show its last log lines."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llamaclust.cluster.control.observations import DrainRequested, UndrainRequested
from llamaclust.cluster.control.partitions import PartitionTracker
from llamaclust.cluster.membership.registry import Registry
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.cluster.membership.worker_requests import log_tail
from llamaclust.cluster.state.control_record import ControlRecord
from llamaclust.cluster.state.events import Notice, Report
from llamaclust.core.errors import LlamaclustError, UsageError, WorkerError
from llamaclust.wire.control.logs import LogTail
from llamaclust.wire.rpc.task_set import TaskSet

if TYPE_CHECKING:
    from llamaclust.cluster.control.actions import ActionRunner


@dataclass(slots=True, eq=False)
class WorkerOperations:
    _registry: Registry
    _record: ControlRecord
    _runners: Sequence[ActionRunner]
    _partitions: PartitionTracker
    _report: Report
    # Number of undrain requests so far, by worker name.
    _undrained: Counter[str] = field(default_factory=Counter, init=False)
    _drained: set[str] = field(init=False)
    _recording: TaskSet = field(default_factory=TaskSet, init=False)

    def __post_init__(self) -> None:
        self._drained = set(self._record.drained)

    @property
    def drained(self) -> frozenset[str]:
        return frozenset(self._drained)

    async def recorded(self) -> None:
        """Waits until the list of drained workers is written to disk, or writing has failed."""
        await self._recording.join()

    async def drain(self, name: str) -> None:
        """Moves a worker's layers to other workers, and waits until they are moved. Raises UsageError if no worker has
        this name, and InsufficientMemoryError or WorkerError if the layers cannot move."""
        self._worker(name)
        undrained = self._undrained[name]
        excluded = self.drained | {name}
        others = {other: worker for other, worker in self._registry.present.items() if other not in excluded}
        if not others:
            raise WorkerError(f"all other workers are drained or absent: {name} keeps its layers")
        await self._plan_all(others)
        if self._undrained[name] != undrained:
            raise WorkerError(f"worker {name} was undrained before its layers moved")
        if name not in self.drained:
            self._report(Notice(f"worker {name} is drained: it gets no layers until `undrain`"))
        self._drained.add(name)
        self._post(DrainRequested(name))
        store = [runner.store for runner in self._runners]
        ended = (each.settled_or(lambda state: state.is_freed(name) or state.cannot_free(name)) for each in store)
        await asyncio.gather(*ended)
        if any(runner.epoch is not None and runner.epoch.holds(name) for runner in self._runners):
            self._report(Notice(f"the layers of worker {name} could not be moved"))
            self.undrain(name)
            await asyncio.gather(*(each.settled.wait() for each in store))
            raise WorkerError(f"the layers of worker {name} could not be moved: see the log")

    async def _plan_all(self, workers: Mapping[str, WorkerHandle]) -> None:
        """Plans all awake models one after another, to check that they fit together. Raises an error if they do not."""
        async with (ledger := self._runners[0].planner.ledger).lock:
            scratch = ledger.copy()
            for runner in self._runners:
                if not runner.store.state.is_asleep:
                    state = runner.store.state
                    pairs, disputes = self._partitions.pairs, state.inputs.disputes
                    plan = await runner.planner.plan(
                        workers, pairs, scratch, disputes=disputes, needs_images=state.reads_images
                    )
                    scratch.enter(runner.epochs.model_id, (plan,))

    def undrain(self, name: str) -> None:
        """Makes a drained or quarantined worker available again. Raises UsageError if no worker has this name."""
        if name not in self.drained:  # A worker that was drained before the coordinator's start may be absent.
            self._worker(name)
        else:
            self._report(Notice(f"worker {name} is no longer drained: plans use it again"))
        self._undrained[name] += 1
        self._drained.discard(name)
        self._post(UndrainRequested(name))

    async def log(self, name: str) -> LogTail:
        return await log_tail(self._worker(name))

    def _post(self, request: DrainRequested | UndrainRequested) -> None:
        for runner in self._runners:
            runner.store.post(request)
        self._recording.start(self._recorded(self.drained))

    async def _recorded(self, drained: frozenset[str]) -> None:
        try:
            await self._record.drain(drained)
        except LlamaclustError as error:
            self._report(Notice(f"the next start will not know which workers are drained: {error}"))

    def _worker(self, name: str) -> WorkerHandle:
        workers = self._registry.workers
        if name not in workers:
            raise UsageError(f"no worker is named {name!r}; the workers are {', '.join(sorted(workers))}")
        return workers[name]
