"""Injects faults into a running cluster, and undoes lasting faults."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

from llamaclust.cluster.client.operations import ClusterApi
from llamaclust.cluster.state.clusters import find_running
from llamaclust.cluster.state.directory import ClusterDir, ClusterRecord
from llamaclust.core.errors import LlamaclustError
from llamaclust.tools.chaos.firewall import Firewall, FirewallError
from llamaclust.tools.chaos.held import DisturbedLinks, FullDisks, Stops
from llamaclust.tools.chaos.links import Disturbance
from llamaclust.tools.chaos.processes import Process
from llamaclust.tools.chaos.schedule import Fault, FaultKind
from llamaclust.tools.chaos.targets import Permissions, Targets, find_targets
from llamaclust.tools.chaos.worker_faults import FAILING, MUTE

_RETURN_S = 120.0
_UNDRAIN_S = 30.0
_POLL_S = 0.1
_JOURNAL_S = 6.0
"""Seconds to wait after a full disk, in which the coordinator writes all open requests to its journal again."""

Show = Callable[[str], None]


class Injector:
    """Injects faults into one cluster. `close` undoes all lasting faults, and can be called twice."""

    def __init__(
        self, state_dir: Path, name: str, permissions: Permissions, show: Show, firewall: Firewall | None = None
    ) -> None:
        self._state_dir, self._name = state_dir, name
        self._permissions = permissions if firewall is not None else permissions.without_links()
        self._show = show
        self._stops, self._disks, self._drains = Stops(), FullDisks(), Drains(state_dir, name)
        self._links = DisturbedLinks(firewall)
        self._failing: set[str] = set()  # Workers with a fault that ends by itself.
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def held(self) -> frozenset[str]:
        return self._stops.names | self._disks.names | self._drains.names | self._links.names | self._failing

    def targets(self) -> Targets:
        record, status = self._status()
        return find_targets(record, status, self._permissions, has_standby=self._folder.has_standby)

    @property
    def _folder(self) -> ClusterDir:
        return find_running(self._state_dir, self._name)[0]

    async def inject(self, fault: Fault, targets: Targets) -> bool:
        """Injects a fault. If the coordinator is stopped or killed, waits until a coordinator runs again. Returns False
        if the fault did not take place."""
        match fault.kind:
            case FaultKind.KILL:
                return targets.workers[fault.target].send(signal.SIGKILL)
            case FaultKind.STOP:
                return self._stop_worker(fault, targets.workers[fault.target])
            case FaultKind.DRAIN:
                self._drains.add(fault.target)
                self._hold(self._drain(fault))
                return True
            case FaultKind.FAILS:
                return self._begin_within(fault, targets.workers[fault.target], FAILING)
            case FaultKind.MUTE:
                return self._begin_within(fault, targets.workers[fault.target], MUTE)
            case FaultKind.PARTITION:
                return self._disturb_link(fault, targets, Disturbance.CUT)
            case FaultKind.SLOW_LINK:
                return self._disturb_link(fault, targets, Disturbance.SLOW)
        process = targets.coordinator
        if process is None:
            return False
        match fault.kind:
            case FaultKind.COORDINATOR_KILL:
                return await self._kill_coordinator(process)
            case FaultKind.COORDINATOR_STOP:
                return await self._stop_coordinator(fault, process)
            case FaultKind.DISK_FULL:
                return self._fill_disk(fault, process)

    def close(self) -> None:
        """Undoes all lasting faults. Blocks for up to 30 s per drained worker if the cluster does not answer."""
        for task in self._tasks:
            task.cancel()
        for name in self._stops.names:
            self._stops.end(name)
        for name in self._disks.names:
            self._disks.end(name)
        for name in self._links.names:
            self._heal(name)
        for name in self._drains.names:
            self._undrain(name)

    def _status(self) -> tuple[ClusterRecord, dict[str, Any]]:
        _, record = find_running(self._state_dir, self._name)
        with ClusterApi.of(record) as api:
            return record, api.status()

    def _hold(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _stop_worker(self, fault: Fault, process: Process) -> bool:
        is_stopped = self._stops.begin(fault.target, process)
        if is_stopped:
            self._hold(self._continue_later(fault))
        return is_stopped

    def _begin_within(self, fault: Fault, process: Process, number: signal.Signals) -> bool:
        if not process.catches(number) or not process.send(number):
            return False
        self._failing.add(fault.target)
        self._hold(self._end_later(fault))
        return True

    async def _end_later(self, fault: Fault) -> None:
        await asyncio.sleep(fault.hold_s)
        self._failing.discard(fault.target)

    async def _stop_coordinator(self, fault: Fault, process: Process) -> bool:
        is_stopped = self._stops.begin(fault.target, process)
        if is_stopped:
            await self._continue_later(fault)
        return is_stopped

    async def _continue_later(self, fault: Fault) -> None:
        await asyncio.sleep(fault.hold_s)
        self._stops.end(fault.target)

    def _fill_disk(self, fault: Fault, process: Process) -> bool:
        is_full = self._disks.begin(fault.target, process)
        if is_full:
            self._hold(self._free_disk_later(fault))
        return is_full

    async def _free_disk_later(self, fault: Fault) -> None:
        await asyncio.sleep(fault.hold_s)
        self._disks.make_room(fault.target)
        await asyncio.sleep(_JOURNAL_S)
        self._disks.end(fault.target)

    def _disturb_link(self, fault: Fault, targets: Targets, disturbance: Disturbance) -> bool:
        try:
            self._links.begin(fault.target, targets.links[fault.target], disturbance, fault.hold_s)
        except FirewallError as error:
            self._show(f"{fault}: {error}")
            return False
        self._hold(self._heal_later(fault))
        return True

    async def _heal_later(self, fault: Fault) -> None:
        await asyncio.sleep(fault.hold_s)
        self._heal(fault.target)

    def _heal(self, name: str) -> None:
        try:
            self._links.end(name)
        except FirewallError as error:
            self._show(f"rules for the link of {name} remain until the end: {error}")

    async def _drain(self, fault: Fault) -> None:
        try:
            await asyncio.to_thread(self._drains.begin, fault.target)
            await asyncio.sleep(fault.hold_s)
        except LlamaclustError as error:
            self._show(f"drain {fault.target}: {error}")
        await asyncio.to_thread(self._undrain, fault.target)

    def _undrain(self, name: str) -> None:
        if why := self._drains.end(name):
            self._show(why)

    async def _kill_coordinator(self, process: Process) -> bool:
        try:
            before, _ = await asyncio.to_thread(self._status)
        except LlamaclustError as error:
            self._show(f"the coordinator is not killed, because its state is unknown: {error}")
            return False
        if not process.send(signal.SIGKILL):
            return False
        after = await self._successor(process)
        if after.api != before.api:
            raise LlamaclustError(
                f"the API moved from {before.api} to {after.api}: set a port in `listen` of the cluster file"
            )
        if not self._permissions.coordinator and not self._folder.has_standby:
            self._show("no standby is left, so the coordinator is not killed again")
        return True

    async def _successor(self, killed: Process) -> ClusterRecord:
        end_s = time.monotonic() + _RETURN_S
        while time.monotonic() < end_s:
            with suppress(LlamaclustError):
                record, status = await asyncio.to_thread(self._status)
                if record.pid != killed.pid and status["state"] == "ready":
                    return record
            await asyncio.sleep(_POLL_S)
        raise LlamaclustError(
            f"no coordinator of {self._name} became ready within {_RETURN_S:.0f} s: start it with `llamaclust up`"
        )


class Drains:
    def __init__(self, state_dir: Path, cluster: str) -> None:
        self._state_dir, self._cluster = state_dir, cluster
        self._workers: dict[str, threading.Lock] = {}  # A lock for each worker, held by the request to drain it.

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._workers)

    def add(self, name: str) -> None:
        self._workers[name] = threading.Lock()

    def begin(self, name: str) -> None:
        lock = self._workers.get(name)
        if lock is None:
            return
        with lock:
            if name in self._workers:
                with self._api() as api:
                    api.drain(name)

    def end(self, name: str) -> str:
        """Undrains the worker. Retries for 30 s if no coordinator answers. Returns "" or an error message."""
        with self._workers.get(name, threading.Lock()):
            return self._undrain(name)

    def _undrain(self, name: str) -> str:
        end_s = time.monotonic() + _UNDRAIN_S
        while name in self._workers:
            try:
                with self._api() as api:
                    api.undrain(name)
                self._workers.pop(name, None)
            except LlamaclustError as error:
                if time.monotonic() > end_s:
                    self._workers.pop(name, None)
                    return f"worker {name} stays drained ({error}): run `llamaclust undrain {name}`"
                time.sleep(_POLL_S)
        return ""

    def _api(self) -> ClusterApi:
        _, record = find_running(self._state_dir, self._cluster)
        return ClusterApi.of(record)
