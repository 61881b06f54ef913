"""Keeps a pipeline under the engine, whichever worker is lost, comes back or is to be spared.

One loop: who is here, a plan over them, load what they lack, open it, run until something changes. A start, a loss, two
losses and a loss during a recovery are the same to it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from contextlib import suppress

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.control.drain import Workforce
from llamaclust.cluster.control.epoch_opener import EpochOpener
from llamaclust.cluster.control.epochs import Epoch, Epochs
from llamaclust.cluster.control.link_monitor import LinkKeeper, MeasureLinks
from llamaclust.cluster.control.notices import back_text, given_up_text, lost_text, recovered_text, waiting_text
from llamaclust.cluster.control.partitions import CutPairs
from llamaclust.cluster.control.planning import ClusterPlanner
from llamaclust.cluster.control.quarantine import LeftOut
from llamaclust.cluster.engine.engine import Engine
from llamaclust.cluster.launchers.base import Launcher
from llamaclust.cluster.membership.registry import Registry
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.cluster.planner.adjacency import split
from llamaclust.cluster.planner.links import Links
from llamaclust.cluster.planner.plan import Plan
from llamaclust.cluster.state.events import News, Watch
from llamaclust.core.errors import (
    InsufficientMemoryError,
    LlamaclustError,
    NetworkPartitionError,
    ProtocolError,
    WorkerError,
)

_TRIES = 3
"""So often the same workers may fail without one of them being lost or a request being answered."""
_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0
_MOST_DOUBLINGS = 16
"""Failures go on for hours; a float ends at 2 ** 1024."""
_REPLAY_S = 1.0
"""Requests may wait so long for a better plan."""
_LOOK_S = 1.0


class Supervisor:
    """Owns the epoch that serves. `start` opens the first one; from then on `keep` sees to it that there is one."""

    def __init__(
        self,
        config: ClusterConfig,
        epochs: Epochs,
        planner: ClusterPlanner,
        registry: Registry,
        launcher: Launcher,
        watch: Watch,
        measure_links: MeasureLinks | None = None,
    ) -> None:
        """`measure_links`: between those who are here, asked again when somebody joins later."""
        self.recoveries = 0
        self._config = config
        self._epochs = epochs
        self._planner = planner
        self._registry = registry
        self._launcher = launcher
        self._watch = watch
        self._epoch: Epoch | None = None
        self._engine: Engine | None = None
        self._news = asyncio.Event()  # something has changed
        self._settled = asyncio.Event()  # since the last change, all has been done that can be
        self._loss: LlamaclustError | None = None
        self._lost_s = 0.0  # on the event loop's clock
        self._waits_for = ""  # as it was told
        self._failures = 0  # of pipelines whose workers were all there, since a request was answered
        self._answered = 0  # requests, at the last of these failures
        self._work: set[asyncio.Task[None]] = set()
        self.cuts = CutPairs(lambda: registry.present, config.timeouts.worker, watch, self._change)
        self.workforce = Workforce(registry, self._planned, self._holds, self._change, self._settled)
        self._left_out = LeftOut(self._change)
        self._opener = EpochOpener(epochs, registry, watch, lambda: self._engine is None, self._left_out)
        self._links = LinkKeeper(measure_links, registry, self._know, self._settled, watch)

    @property
    def epoch(self) -> Epoch:
        """What serves, or served until it was lost."""
        assert self._epoch is not None
        return self._epoch

    async def start(self) -> Epoch:
        """The first epoch, whose workers have joined. Raises what no other worker can help, and what is missing after
        `timeouts.recovery`."""
        self._registry.tell(self._joined, self._left, self.cuts.hear)
        self._lost_s = self._now_s
        self._epoch = await self._next_epoch()
        return self._epoch

    async def keep(self, engine: Engine) -> None:
        """Works until it is cancelled; an error is a mistake of ours."""
        self._engine = engine
        try:
            while True:
                self._news.clear()
                if self._loss is not None:
                    await self._recover(engine)
                elif await self._improve(engine) and not self._news.is_set():
                    self._settled.set()
                    await self._something_new()
        finally:
            self._links.close()

    def lost(self, error: LlamaclustError) -> None:
        """The engine's word that its pipeline is lost."""
        self._loss = error
        self._lost_s = self._now_s
        self._change()

    async def _planned(self, workers: Mapping[str, WorkerHandle]) -> Plan:
        """Over these workers, as things are now."""
        return await self._planner.plan(workers, self.cuts.apart)

    async def _planned_without_left_out(self, workers: Mapping[str, WorkerHandle]) -> Plan:
        """Without those that are left out, where the others are enough."""
        others = self._left_out.others(workers)
        if len(others) < len(workers):
            with suppress(InsufficientMemoryError, WorkerError):
                return await self._planned(others)
        return await self._planned(workers)

    def _holds(self, name: str) -> bool:
        return self.epoch.holds(name)

    def _know(self, links: Links) -> None:
        if self._planner.update(links):
            self._change()

    # -- news --------------------------------------------------------------------------------------------------------

    @property
    def _now_s(self) -> float:
        return asyncio.get_running_loop().time()

    def _change(self) -> None:
        self._settled.clear()
        self._news.set()

    def _joined(self, handle: WorkerHandle) -> None:
        self._watch(News(back_text(handle)))
        self._change()
        self._links.joined()
        self._epochs.joined(handle)

    def _left(self, handle: WorkerHandle) -> None:
        counts = None if self._engine is None else self._engine.scheduler.counts
        serves = self._epoch is not None and handle in self._epoch.workers
        self._watch(News(lost_text(handle, counts.running + counts.waiting if counts and serves else 0)))
        self._do(self._launcher.end(handle.name))
        self.cuts.forget(handle.name)
        self._change()

    def given_up(self, name: str, why: str) -> None:
        self._watch(News(given_up_text(name, why)))
        self._registry.will_not_return(name, why)

    def _do(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._work.add(task)
        task.add_done_callback(self._work.discard)

    # -- the loop ----------------------------------------------------------------------------------------------------

    async def _next_epoch(self) -> Epoch:
        """Plans and loads, again and again until it is done, whoever is lost meanwhile."""
        failures = 0
        while True:
            plan = await self._plan()
            here = [*self.workforce.usable.values()]
            try:
                return await self._open(plan, alone=True)
            except LlamaclustError as error:
                await self.cuts.settled()
                if any(stage.worker not in self._registry.present for stage in plan.stages) or self._is_cut(plan):
                    continue
                if any(worker not in here for worker in self.workforce.usable.values()):
                    continue  # who has joined may be what was missing
                if self._lacks_file:
                    await self._wait_for_workers(error)
                    continue
                if self._engine is None:
                    raise
                await self._hold_on(error, failures)
                failures += 1

    @property
    def _lacks_file(self) -> bool:
        """Whether who has the model's file for the others may come back."""
        are_all = len(self.workforce.usable) == len(self._config.workers)
        return not (self._engine is None and are_all) and self._epochs.file_is_away

    def _is_cut(self, plan: Plan) -> bool:
        """Whether stages side by side cannot reach each other."""
        return split([stage.worker for stage in plan.stages], self.cuts.apart) is not None

    async def _plan(self) -> Plan:
        """Over those who are here, as soon as they are enough."""
        while True:
            self._news.clear()
            usable = self.workforce.usable
            try:
                return await self._planned_without_left_out(usable)
            except (InsufficientMemoryError, WorkerError) as error:
                is_whole = len(usable) == len(self._config.workers) and not isinstance(error, NetworkPartitionError)
                if self._engine is None and is_whole:
                    raise
                await self._wait_for_workers(error)

    async def _wait_for_workers(self, why: LlamaclustError) -> None:
        """Says why, once, and returns with the next news. When `timeouts.recovery` has passed, requests wait no more,
        but the cluster does; a start raises `why`."""
        limit_s = self._config.timeouts.recovery
        if str(why) != self._waits_for:
            self._waits_for = str(why)
            self._watch(News(waiting_text(why, limit_s)))
        try:
            async with asyncio.timeout_at(self._lost_s + limit_s):
                await self._news.wait()
        except TimeoutError:
            if self._engine is None:
                raise why from None
            if self._loss is not None:
                missed = "link" if isinstance(why, NetworkPartitionError) else "worker"
                late = f"no {missed} came back within {limit_s:g} s (timeouts.recovery)"
                self._engine.give_up(WorkerError(f"{self._cause}; {late}: {why}"))
            await self._news.wait()

    async def _open(self, plan: Plan, *, alone: bool) -> Epoch:
        while self._work:  # what is lost frees its memory first
            await asyncio.gather(*self._work, return_exceptions=True)
        return await self._opener.open(plan, self._planner.links, alone=alone)

    async def _hold_on(self, error: LlamaclustError, failures: int) -> None:
        """After a failure of workers that are all there: a pause, and in the end those who failed are given up. When
        `timeouts.recovery` has passed, requests wait no more."""
        self._opener.give_up_suspects(error, at_once=failures + 1 >= _TRIES)
        limit_s = self._config.timeouts.recovery
        if self._engine is not None and self._loss is not None and self._now_s >= self._lost_s + limit_s:
            late = f"no plan could be loaded within {limit_s:g} s (timeouts.recovery)"
            self._engine.give_up(WorkerError(f"{self._cause}; {late}: {error}"))
        await asyncio.sleep(min(_PAUSE_S * 2 ** min(failures, _MOST_DOUBLINGS), _LONGEST_PAUSE_S))

    # -- a loss ------------------------------------------------------------------------------------------------------

    @property
    def _cause(self) -> LlamaclustError | None:
        """What the pipeline was lost by: a worker's end, also where others said sooner that they cannot reach it."""
        lost = self.epoch.lost
        return lost[0].error if lost else self._loss

    async def _recover(self, engine: Engine) -> None:
        """From a lost pipeline to another one."""
        assert self._loss is not None
        await self.epoch.pipeline.close()
        await self.cuts.settled()
        self._judge(engine, self._loss, self.epoch)
        await self._serve(engine, await self._next_epoch())

    def _judge(self, engine: Engine, loss: LlamaclustError, old: Epoch) -> None:
        """Who answers what no stage may say is given up. Where nobody is to blame, and again and again, requests that
        no workers can compute are: they end."""
        if isinstance(loss, ProtocolError) and not old.lost:
            self._registry.fence(old.workers[-1], str(loss))
        if old.lost or self._is_cut(old.plan):
            self._failures = 0
        else:
            self._failures = self._failures + 1 if engine.answered == self._answered else 1
            self._answered = engine.answered
        if self._failures >= _TRIES:
            self._failures = 0
            engine.give_up(loss)

    async def _serve(self, engine: Engine, epoch: Epoch) -> None:
        """The engine goes on with this epoch; what others have left is freed."""
        loss, self._loss, self._waits_for = self._loss, None, ""
        old, self._epoch = self.epoch, epoch
        engine.resume(epoch.pipeline, epoch.settings)
        await old.pipeline.close()
        if loss is not None:
            seconds = self._now_s - self._lost_s
            self.recoveries += 1
            engine.metrics.recovered(seconds)
            counts = engine.scheduler.counts
            self._watch(News(recovered_text(seconds, counts.running + counts.waiting)))
        try:
            await self._epochs.free_others(epoch)
        except LlamaclustError as error:
            self._watch(News(f"layers that are not needed any more stay in memory: {error}"))

    # -- a better plan -----------------------------------------------------------------------------------------------

    async def _improve(self, engine: Engine) -> bool:
        """Changes to the plan that is best for those who are here now, while the old one serves. False where that is
        still to be done."""
        old = self.epoch
        must = any(old.holds(name) for name in self.workforce.spared)
        try:
            plan = await self._planned_without_left_out(self.workforce.usable)
        except (InsufficientMemoryError, WorkerError) as error:
            if must:
                self._watch(News(f"layers cannot be moved now: {error}"))
            return True
        if self._loss is not None:  # while the plan was made
            return False
        if old.is_as(plan):
            return True
        while not must and not _is_cheap(engine, plan):
            await self._something_new(_LOOK_S)
            if self._news.is_set():
                return False
        return await self._move(engine, plan, must)

    async def _move(self, engine: Engine, plan: Plan, must: bool) -> bool:
        try:
            epoch = await self._open(plan, alone=False)
        except InsufficientMemoryError as error:
            if must and self._loss is None:  # not beside the old one: then instead of it
                engine.interrupt(error)
            return not must
        except LlamaclustError as error:
            self._watch(News(f"layers stay where they are: {error}"))
            return True
        await self._serve(engine, epoch)
        return True

    async def _something_new(self, within_s: float | None = None) -> None:
        try:
            async with asyncio.timeout(within_s):
                await self._news.wait()
        except TimeoutError:
            return


def _is_cheap(engine: Engine, plan: Plan) -> bool:
    """Whether requests would hardly notice: what they have so far is soon computed again."""
    tokens = sum(len(sequence.tokens) for sequence in engine.scheduler.sequences)
    if plan.prediction is None or not tokens:
        return not tokens
    return tokens * sum(stage.prefill_s for stage in plan.prediction.stages) < _REPLAY_S
