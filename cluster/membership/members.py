"""Keeps track of a cluster's present workers, and of its lost workers with the reasons of their losses."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import count
from types import MappingProxyType

from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.core.errors import DeadlineError, WorkerError
from llamaclust.wire.control.messages import PeerUnreachable
from llamaclust.wire.rpc.deadlines import deadline
from llamaclust.wire.rpc.task_set import TaskSet

_EXIT_REPORT_S = 0.5
"""Seconds to wait for the launcher's exit report after the stream of a worker breaks."""

MAX_LOST_WORKERS = 1024
"""Lost workers that are remembered. The number is large, because a plan being made may contain lost workers."""


@dataclass(frozen=True, slots=True)
class MemberJoined:
    worker: WorkerHandle


@dataclass(frozen=True, slots=True)
class MemberLost:
    worker: WorkerHandle


@dataclass(frozen=True, slots=True)
class PeerReported:
    worker: WorkerHandle
    report: PeerUnreachable


@dataclass(frozen=True, slots=True)
class HeartbeatReceived:
    worker: WorkerHandle


MembershipEvent = MemberJoined | MemberLost | PeerReported | HeartbeatReceived


ReadLastError = Callable[[str, float], str]
"""Returns the last error in a worker's log, or "" if the worker logged it long before its last sign of life. Takes the
worker's name, and the seconds since this sign."""


class Members:
    """Workers by name. A lost worker stays in the list until a new worker with the same name joins, or until
    `MAX_LOST_WORKERS` more workers are lost."""

    def __init__(self, read_last_error: ReadLastError) -> None:
        self.read_last_error = read_last_error
        self.joins: dict[str, int] = {}
        self._workers: dict[str, WorkerHandle] = {}
        self._lost: dict[str, None] = {}  # Names of lost workers, in the order of their losses.
        self._numbers = count(1)
        self._exits: dict[str, tuple[str, str]] = {}  # How processes ended, and the last errors of their logs.
        self._changed = asyncio.Event()
        self._subscribers: list[Callable[[MembershipEvent], None]] = []
        self.losing = TaskSet()

    @property
    def workers(self) -> Mapping[str, WorkerHandle]:
        return MappingProxyType(self._workers)

    @property
    def present(self) -> dict[str, WorkerHandle]:
        return {name: handle for name, handle in self._workers.items() if handle.loss is None}

    def subscribe(self, subscriber: Callable[[MembershipEvent], None]) -> None:
        self._subscribers.append(subscriber)

    def publish(self, event: MembershipEvent) -> None:
        for subscriber in self._subscribers:
            subscriber(event)

    async def changed(self) -> None:
        await self._changed.wait()

    async def wait_for(self, names: Collection[str], deadline_s: float) -> None:
        """Waits until all named workers have joined. Raises DeadlineError if workers are missing, and WorkerError if
        the process of a worker has ended."""
        missing = sorted(names)
        try:
            async with deadline("workers joining", deadline_s):
                while missing := [name for name in names if name not in self.present]:
                    self.check_exits(missing)
                    await self._changed.wait()
        except DeadlineError as error:
            raise DeadlineError(f"workers {', '.join(missing)} have not joined within {deadline_s:g} s") from error

    def check_exits(self, names: Collection[str]) -> None:
        for name in names:
            if name in self._exits:
                raise _start_failed(name, *self._exits[name])

    def _set_changed(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def process_exited(self, name: str, how: str) -> None:
        handle = self._workers.get(name)
        self._exits[name] = how, self.read_last_error(name, 0.0 if handle is None else handle.silent_s)
        if handle is not None:
            self.mark_lost(handle, how)
        self._set_changed()

    def admit(self, handle: WorkerHandle) -> None:
        self._workers[handle.name] = handle
        self.joins[handle.name] = next(self._numbers)
        self._lost.pop(handle.name, None)
        self._exits.pop(handle.name, None)

    def announce(self, handle: WorkerHandle) -> None:
        """Publishes that an admitted worker has joined. Does nothing if the worker is already lost."""
        if handle.loss is not None:
            return
        self._set_changed()
        self.publish(MemberJoined(handle))

    def mark_lost(self, handle: WorkerHandle, reason: str) -> None:
        """Marks a worker as lost. Later messages from it are ignored, although its process may still run."""
        if not handle.state.is_gone:
            handle.lose(reason)
            self._lost[handle.name] = None
            self._set_changed()
            self.publish(MemberLost(handle))
            self._forget_lost()

    def _forget_lost(self) -> None:
        while len(self._lost) > MAX_LOST_WORKERS:
            name = next(iter(self._lost))
            del self._lost[name], self._workers[name], self.joins[name]

    def report_loss(self, handle: WorkerHandle, reason: str) -> None:
        """Marks a disconnected worker as lost. The launcher's report of its exit, if any, replaces `reason`."""
        self.losing.start(self._lose(handle, reason))

    async def _lose(self, handle: WorkerHandle, reason: str) -> None:
        with contextlib.suppress(DeadlineError):
            async with deadline("the report of its process", _EXIT_REPORT_S):
                await handle.lost.wait()
        self.mark_lost(handle, reason)


def _start_failed(name: str, how: str, last_error: str) -> WorkerError:
    return WorkerError(f"worker {name} did not start: {how}{f'; its last error: {last_error}' if last_error else ''}")
