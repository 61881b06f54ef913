"""Runs workers in Ray. Each worker is a named, detached actor. All actors are in one placement group."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.launchers.base import Exited
from llamaclust.cluster.launchers.ray_cluster import RayCluster, RayStartError
from llamaclust.cluster.launchers.ray_workers import RayWorkers, resources
from llamaclust.cluster.launchers.static import RestartingLauncher
from llamaclust.cluster.state.directory import ClusterDir
from llamaclust.cluster.state.events import AwaitingWorkers, Report
from llamaclust.core.addresses import ANYWHERE, joined_address, split_address
from llamaclust.core.errors import DeadlineError
from llamaclust.wire.rpc.deadlines import deadline
from llamaclust.worker.settings import WorkerSettings

_log = logging.getLogger(__name__)

# Maximum number of starts. Sometimes one of Ray's processes ends at its start, which Ray notices after 30 s.
_STARTS = 3
_PATIENCE_S = 2.0
_GRACE_S = 1.0
_PAUSE_S = 0.2
_END_S = 2.0
_Value = TypeVar("_Value")


class RayLauncher(RestartingLauncher):
    """Launches workers in Ray. Calls to Ray block, so they run on a separate thread."""

    def __init__(self, config: ClusterConfig, folder: ClusterDir, report: Report) -> None:
        super().__init__(config, folder, report)
        self._cluster = RayCluster(config.ray, f"llamaclust-{config.name}", folder.path / "ray")
        self._workers: RayWorkers | None = None
        self._thread = _new_thread()
        self._watches: list[asyncio.Task[None]] = []
        self._incarnations: dict[str, str] = {}
        self._stopping = False

    async def start(self, workers: Sequence[WorkerSettings], join: str, exited: Exited) -> None:
        where = await self.open(join)
        library = await self._open(workers)
        _restore_signal_handlers()
        authority = self.authority
        assert authority is not None
        self._workers = placed = RayWorkers(library, authority.cluster)
        join = await self._call(lambda: _reachable(library, where))

        from llamaclust.cluster.launchers.ray_actor import ActorArguments

        token, search_s = authority.token.text, self._config.join.wait
        wanted = [
            ActorArguments(replace(worker, join=join, token=token, search_s=search_s), authority.cluster)
            for worker in workers
        ]
        if not await self._call(lambda: placed.take_back(wanted)):
            await self._reserve(placed, workers)
            await self._call(lambda: placed.make(wanted))
        self._watches = [
            asyncio.create_task(self._follow(name, actor, exited)) for name, actor in placed.actors.items()
        ]

    async def stop(self) -> None:
        self._stopping = True
        self._restarts.end()
        if self._watches:
            await asyncio.wait(self._watches, timeout=_GRACE_S)
        for task in self._watches:
            task.cancel()
        try:
            if self._workers is not None:
                await self._call(self._workers.remove)
        finally:
            await self._call(self._cluster.close)
            self._thread.shutdown()
            await super().stop()

    async def end(self, name: str) -> None:
        """Kills the actor of the worker, so that Ray restarts it. Does nothing if Ray has already restarted it."""
        from ray.exceptions import RayError

        with contextlib.suppress(DeadlineError, RayError):
            async with deadline(f"the end of worker {name}", _END_S):
                seen = await _answer(self._placed.actors[name].incarnation.remote())
                if self._incarnations.get(name) == seen:
                    await self._call(lambda: self._placed.restart(name))

    @property
    def _placed(self) -> RayWorkers:
        assert self._workers is not None
        return self._workers

    async def _call(self, function: Callable[[], _Value]) -> _Value:
        """Runs a function on Ray's thread. If this task is cancelled, the function still runs to its end."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    async def _open(self, workers: Sequence[WorkerSettings]) -> Any:
        """Connects to Ray, and tries again if Ray does not start."""
        for start in range(1, _STARTS):
            try:
                return await self._call(lambda: self._cluster.open(workers))
            except RayStartError as error:
                # The processes of a failed start end with the thread that started them.
                self._thread.shutdown()
                self._thread = _new_thread()
                await self._call(self._cluster.close)
                _log.warning("Ray did not start, trying again (%d of %d): %s", start + 1, _STARTS, error)
        return await self._call(lambda: self._cluster.open(workers))

    async def _reserve(self, placed: RayWorkers, workers: Sequence[WorkerSettings]) -> None:
        """Reserves CPUs, GPUs and memory in the Ray cluster. Raises DeadlineError after `join.wait` seconds."""
        await self._call(lambda: placed.reserve(workers, self._config.ray.strategy))
        clock = asyncio.get_running_loop().time
        tell_s: float | None = clock() + _PATIENCE_S
        async with deadline("finding room for all workers in the Ray cluster (`join.wait`)", self._config.join.wait):
            while not await self._call(placed.is_ready):
                if tell_s is not None and clock() > tell_s:
                    tell_s = None
                    self._report(AwaitingWorkers(_shortage(workers, await self._call(placed.free))))

    async def _follow(self, name: str, actor: Any, exited: Exited) -> None:
        from ray.exceptions import ActorDiedError, RayError

        while True:
            try:
                self._incarnations[name] = await _answer(actor.incarnation.remote())
                how, self._last_errors[name] = await _end_of(actor)
            except ActorDiedError as error:
                exited(name, _gone(error))
                return
            except RayError:  # The actor is being started.
                await asyncio.sleep(_PAUSE_S)
                continue
            ended = self._incarnations.pop(name)
            if not self._stopping:
                exited(name, how)
            if not await self._restarts.may_restart(name, how):
                if self._restarts.is_on:  # The worker was given up, so Ray must not restart it either.
                    await self._call(lambda: self._placed.forget(name))
                return
            with contextlib.suppress(RayError):  # The actor is being started.
                if await _answer(actor.incarnation.remote()) == ended:
                    await self._call(lambda: self._placed.restart(name))
            await _replaced(actor)


def _new_thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "ray")  # Ray's processes end when the thread that started them ends.


def _restore_signal_handlers() -> None:
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.getsignal(number))


async def _answer(reference: Any) -> Any:
    return await asyncio.wrap_future(reference.future())


async def _end_of(actor: Any) -> tuple[str, str]:
    from ray.exceptions import ActorDiedError, RayError

    try:
        while (end := await _answer(actor.ended.remote())) is None:
            pass
        how, error = end
        return how, error
    except ActorDiedError:
        raise
    except RayError as error:
        return _gone(error), ""


async def _replaced(actor: Any) -> None:
    from ray.exceptions import RayError

    with contextlib.suppress(RayError):
        while True:
            if not await _answer(actor.is_over.remote()):
                return
            await asyncio.sleep(_PAUSE_S)


def _reachable(library: Any, where: str) -> str:
    host, port = split_address(where)
    return joined_address(library.util.get_node_ip_address() if host in ANYWHERE else host, port)


def _shortage(workers: Sequence[WorkerSettings], free: Any) -> tuple[str, ...]:
    needed = "; ".join(f"{worker.name}: {_listed(resources(worker))}" for worker in workers)
    has = _listed({name: free.get(name, 0) for name in ("CPU", "memory", "GPU")})
    return (f"waiting for Ray to find room for {needed}", f"  free in the whole Ray cluster: {has}")


def _listed(amounts: dict[str, float]) -> str:
    return ", ".join(
        f"{amount / (1 << 30):,.1f} GiB memory" if name == "memory" else f"{amount:g} {name}"
        for name, amount in amounts.items()
    )


def _gone(error: Exception) -> str:
    """Describes Ray's error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return f"its Ray actor is gone: {lines[-1] if 'Traceback' in str(error) else lines[0]}"
