"""Injects faults into a running cluster, and undoes those that are held."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

from llamaclust.cluster.client.operations import ClusterApi
from llamaclust.cluster.state.directory import ClusterRecord, find_running
from llamaclust.core.errors import LlamaclustError
from llamaclust.tools.chaos.processes import Process
from llamaclust.tools.chaos.schedule import Fault, FaultKind
from llamaclust.tools.chaos.targets import Permissions, Targets, find_targets

_RETURN_S = 120.0
_POLL_S = 0.1
_UNDRAIN_S = 30.0

Show = Callable[[str], None]


class Injector:
    """Of one cluster. `close` undoes everything that is held, however the run ends; it may be called again."""

    def __init__(self, state_dir: Path, name: str, permissions: Permissions, show: Show) -> None:
        self._state_dir, self._name = state_dir, name
        self._permissions = permissions
        self._show = show
        self._stopped: dict[str, Process] = {}
        self._drained: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def held(self) -> frozenset[str]:
        """Workers that are stopped or drained now."""
        return frozenset(self._stopped) | self._drained

    def targets(self) -> Targets:
        """LlamaclustError while no coordinator answers."""
        record, status = self._status()
        folder, _ = find_running(self._state_dir, self._name)
        return find_targets(record, status, self._permissions, has_standby=folder.has_standby)

    async def inject(self, fault: Fault, targets: Targets) -> bool:
        """Whether it took place. A fault that is held goes on in the background; after the loss of a coordinator,
        returns when another one serves."""
        match fault.kind:
            case FaultKind.KILL:
                return targets.workers[fault.target].send(signal.SIGKILL)
            case FaultKind.STOP:
                return self._stop(fault, targets.workers[fault.target])
            case FaultKind.DRAIN:
                self._drained.add(fault.target)
                self._hold(self._drain(fault))
                return True
            case FaultKind.COORDINATOR:
                return await self._kill_coordinator(targets.coordinator)

    def close(self) -> None:
        """Continues stopped processes, then undrains. Blocks, for half a minute where the cluster does not answer."""
        for task in self._tasks:
            task.cancel()
        for name in tuple(self._stopped):
            self._continue(name)
        for name in tuple(self._drained):
            self._undrain(name)

    def _status(self) -> tuple[ClusterRecord, dict[str, Any]]:
        _, record = find_running(self._state_dir, self._name)
        with ClusterApi.of(record) as api:
            return record, api.status()

    def _hold(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _stop(self, fault: Fault, process: Process) -> bool:
        self._stopped[fault.target] = process
        if not process.send(signal.SIGSTOP):
            del self._stopped[fault.target]
            return False
        self._hold(self._continue_later(fault))
        return True

    async def _continue_later(self, fault: Fault) -> None:
        await asyncio.sleep(fault.hold_s)
        self._continue(fault.target)

    def _continue(self, name: str) -> None:
        """One that was replaced meanwhile has ended."""
        if process := self._stopped.pop(name, None):
            process.send(signal.SIGCONT)

    async def _drain(self, fault: Fault) -> None:
        try:
            await asyncio.to_thread(self._request_drain, fault.target)
            await asyncio.sleep(fault.hold_s)
        except LlamaclustError as error:
            self._show(f"drain {fault.target}: {error}")
        await asyncio.to_thread(self._undrain, fault.target)

    def _request_drain(self, name: str) -> None:
        _, record = find_running(self._state_dir, self._name)
        with ClusterApi.of(record) as api:
            api.drain(name)

    def _undrain(self, name: str) -> None:
        """Tried again while no coordinator answers."""
        end_s = time.monotonic() + _UNDRAIN_S
        while name in self._drained:
            try:
                _, record = find_running(self._state_dir, self._name)
                with ClusterApi.of(record) as api:
                    api.undrain(name)
                self._drained.discard(name)
            except LlamaclustError as error:
                if time.monotonic() > end_s:
                    self._drained.discard(name)
                    self._show(f"worker {name} stays drained ({error}): `llamaclust undrain {name}`")
                time.sleep(_POLL_S)

    async def _kill_coordinator(self, process: Process | None) -> bool:
        before, _ = await asyncio.to_thread(self._status)
        if process is None or not process.send(signal.SIGKILL):
            return False
        after = await self._successor(process)
        if after.api != before.api:
            raise LlamaclustError(f"the API moved from {before.api} to {after.api}: give `listen` a port in the file")
        return True

    async def _successor(self, killed: Process) -> ClusterRecord:
        """The coordinator that serves in its place."""
        end_s = time.monotonic() + _RETURN_S
        while time.monotonic() < end_s:
            with suppress(LlamaclustError):
                record, status = await asyncio.to_thread(self._status)
                if record.pid != killed.pid and status["state"] == "ready":
                    return record
            await asyncio.sleep(_POLL_S)
        raise LlamaclustError(f"no coordinator of {self._name} within {_RETURN_S:.0f} s: start it with `llamaclust up`")
